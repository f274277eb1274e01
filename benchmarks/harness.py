"""lm-eval's tasks: harness_eval.py beside lm-eval's own model class, in one run on one GPU.

    python benchmarks/harness.py --mmlu data/mmlu --gsm8k data/gsm8k --tokenizer data/gpt2 \\
        --out benchmarks/results/harness.json
    python benchmarks/harness.py --only choice …          # or generation, or fixed
    python benchmarks/harness.py --small …                # a CPU's rehearsal

Three parts, each lm-eval's own definition over local files: mmlu's subjects, 5-shot (choice); gsm8k
(generation), whose five examples are drawn anew for each problem, so that prompts share nothing;
and gsm8k_cot (fixed), whose eight are the same for all, as those of most tasks are. Texts are 256
greedy tokens. A 7B Llama shape of random weights with GPT-2's vocabulary, in bfloat16, from one
Hugging Face directory. Each side is a process of its own, timed from its start to its last line;
before them harness_eval.py runs once on the first document of each task, which fills the caches of
data, of bytecode and of kernels. Told apart on both sides: what lm-eval's own code took, which
makes all requests and counts all answers; the answers; and the rest, imports and weights above all.

The peer is lm-eval's Hugging Face class under lm-eval's simple_evaluate. It runs one row for warmth
and one batch of each size of --peer-batch (of texts, an eighth of the tokens), which are not
counted; then, at the quickest of them, every n-th block (--peer-every) of all rows ordered by
length, as it orders them. Only the seconds of these rows are scaled to all: by the tokens read, or
by the number of texts. Answers are compared on these rows; in bfloat16 random weights soon draw
other tokens on the two sides.

--tokenizer: a directory with vocab.json and merges.txt. TIKTOKEN_CACHE_DIR, where set, is used by
our side, as users of `--tokenizer-name gpt2` would.
"""

import itertools
import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests")]

from gsm8k import CONTEXT, shared_start  # noqa: E402
from mmlu import hflm_terms, make_in_child, offline, timed, tokenizer_name  # noqa: E402

import cli  # noqa: E402
from inputs import read_jsonl  # noqa: E402

WANTED = 5
TASK = {"choice": "mmlu", "generation": "gsm8k", "fixed": "gsm8k_cot"}
SHOTS = {"choice": 5, "generation": 5, "fixed": 8}
BATCH = {"choice": [16, 32], "generation": [32, 64], "fixed": [32, 64]}
EVERY = {"choice": 24, "generation": 10, "fixed": 10}
SMALL = {"model": "nano", "subjects": 3, "questions": 20, "problems": 12, "new_tokens": 16}
SMALL |= {"peer_batch": [2, 4], "peer_every": 2}


# ---------------------------------------------------------------------------------------------
# Tasks


def write_tasks(folder: Path, args) -> None:
    """lm-eval's mmlu, gsm8k and gsm8k_cot over local files."""
    import yaml
    from harness_tasks import mmlu_rows, read_lines, rebase

    folder.mkdir()
    found = sorted(path.stem.removesuffix("_test") for path in (args.mmlu / "test").glob("*.csv"))
    subjects = found[:: max(1, len(found) // args.subjects)][: args.subjects]
    for subject in subjects:
        dev, test = (mmlu_rows(args.mmlu, subject, split) for split in ("dev", "test"))
        own = f"mmlu/default/mmlu_{subject}.yaml"
        rebase(folder, f"mmlu_{subject}", own, {"dev": dev, "test": test[: args.questions]})
    group = {"group": "mmlu", "task": [f"mmlu_{subject}" for subject in subjects]}
    group["aggregate_metric_list"] = [{"metric": "acc", "weight_by_size": True}]
    (folder / "mmlu.yaml").write_text(yaml.safe_dump(group))
    splits = {split: read_lines(args.gsm8k / f"{split}.jsonl") for split in ("train", "test")}
    splits["test"] = splits["test"][: args.problems]
    rebase(folder, "gsm8k", "gsm8k/gsm8k.yaml", splits)
    rebase(folder, "gsm8k_cot", "gsm8k/gsm8k-cot.yaml", splits)


def environment(work: Path) -> dict:
    """Of both sides: no hub, and datasets' files here."""
    return offline() | {"HF_DATASETS_CACHE": str(work / "datasets")}


# ---------------------------------------------------------------------------------------------
# The peer: this file, run as a process of its own


def peer_model(args):
    """lm-eval's Hugging Face class, which runs a part of what it is asked, and in `told` says how
    long that took; the other answers are empty."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.utils import hash_string

    class InPart(HFLM):
        told: dict

        def loglikelihood(self, requests, disable_tqdm=False):
            self.asked, start = requests, time.perf_counter()
            answers = super().loglikelihood(requests, disable_tqdm=True)
            self.told["verb_seconds"] = time.perf_counter() - start
            return answers

        def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
            score = super()._loglikelihood_tokens
            rows: dict[tuple, list[int]] = {}  # what it runs once: contexts of one-token answers
            for i, (_, before, after) in enumerate(requests):
                rows.setdefault((*before, *after[:-1]), []).append(i)
            sized = [(len(read), members) for read, members in rows.items()]
            found = self.run_part(
                sized, lambda asked, trial: score([requests[i] for i in asked], True), by_size=True
            )
            values = {i: value for i, (value, _) in found.items()}
            self.tell(self.asked, values)
            return [found.get(i, (0.0, False)) for i in range(len(requests))]

        def generate_until(self, requests, disable_tqdm=False):
            draw = super().generate_until
            first = {"max_gen_toks": max(1, args.new_tokens // 8)}

            def run(asked, trial):
                chosen = [requests[i] for i in asked]
                wanted = [request.arguments for request in chosen]
                for request, (text, how) in zip(chosen, wanted):
                    request.arguments = (text, how | (first if trial else {}))
                texts = draw(chosen, disable_tqdm=True)
                for request, own in zip(chosen, wanted):
                    request.arguments = own
                return texts

            start = time.perf_counter()
            sized = ((len(self.tok_encode(r.args[0])), [i]) for i, r in enumerate(requests))
            found = self.run_part(sized, run, by_size=False)
            self.tell(requests, found)
            self.told["verb_seconds"] = time.perf_counter() - start
            return [found.get(i, "") for i in range(len(requests))]

        def run_part(self, rows, run, by_size):
            """{request: its answer} of every n-th block of rows, (tokens, requests) each."""
            begun, rows = time.perf_counter(), list(rows)
            blocks = blocks_of(rows, max(args.peer_batch))
            middle = blocks[len(blocks) // 2]
            run(middle[0][1], True)
            tried = {n: self.time_rows(middle[:n], run, n, True)[0] / n for n in args.peer_batch}
            trial_seconds = time.perf_counter() - begun
            batch = min(tried, key=lambda n: tried[n])
            first = min(args.peer_every, len(blocks)) // 2
            part = list(itertools.chain(*blocks[first :: args.peer_every]))
            seconds, found = self.time_rows(part, run, batch, False)
            done, whole = (sum(row[0] for row in of) if by_size else len(of) for of in (part, rows))
            self.told = {
                "batch": batch, "seconds_a_row": tried, "trial_seconds": trial_seconds,
                "seconds": seconds, "rows": len(part), "part": done / whole,
            }  # fmt: skip
            return found

        def time_rows(self, rows, run, batch, trial):
            self.batch_size_per_gpu = batch
            asked = [i for _, members in rows for i in members]
            start = time.perf_counter()
            answers = run(asked, trial)
            return time.perf_counter() - start, dict(zip(asked, answers, strict=True))

        def tell(self, requests, found):
            """By document: the prompt's hash, and the answers in their order."""
            documents: dict[str, dict] = {}
            for i in sorted(found):
                prompt = hash_string(requests[i].args[0])
                at = f"{requests[i].task_name} {requests[i].doc_id}"
                own = documents.setdefault(at, {"prompt": prompt, "answers": []})
                own["answers"].append(found[i])
            self.told["documents"] = documents

    return InPart(**hflm_terms(args, "bfloat16", args.peer_batch[0], CONTEXT))


def blocks_of(rows: list[tuple], size: int) -> list[list[tuple]]:
    """Rows of like lengths, the longest first; without a last block that is not full."""
    rows = sorted(rows, key=lambda row: -row[0])
    blocks = [rows[i : i + size] for i in range(0, len(rows), size)]
    return blocks[:-1] if len(blocks) > 1 and len(blocks[-1]) < size else blocks


def peer(args):
    """lm-eval's own evaluation of one part's task."""
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    model, evaluate = peer_model(args), evaluator.evaluate

    def timed_evaluate(**asked):
        start = time.perf_counter()
        found = evaluate(**asked)
        spent = time.perf_counter() - start
        model.told["lm_eval_seconds"] = spent - model.told.pop("verb_seconds")
        return found

    evaluator.evaluate = timed_evaluate  # which simple_evaluate calls, once tasks are loaded
    evaluator.simple_evaluate(
        model=model,
        tasks=[TASK[args.part]],
        task_manager=TaskManager(include_path=str(args.tasks), include_defaults=False),
        num_fewshot=SHOTS[args.part],
        gen_kwargs=None if args.part == "choice" else gen_kwargs(args),
        bootstrap_iters=0,
        log_samples=False,
    )
    args.result.write_text(json.dumps(model.told))


# ---------------------------------------------------------------------------------------------
# Both sides, timed


def gen_kwargs(args) -> str:
    return f"max_gen_toks={args.new_tokens}"


def run_ours(args, work: Path, results: Path, parts: list[str], *words) -> tuple[float, str]:
    """(seconds, what it printed) of harness_eval.py."""
    command = [sys.executable, "harness_eval.py", "--checkpoint-path", work / args.model]
    command += ["--include-path", work / "tasks", "--tasks", *(TASK[part] for part in parts)]
    command += ["--num-few-shot", SHOTS[parts[0]], "--tokenizer-name", tokenizer_name(args)]
    command += ["--dtype", "bfloat16", "--results-dir", results, *words]
    return timed(command, environment(work))


def prepare(args, work: Path, parts: list[str]) -> float:
    """The model, the tasks and the caches; seconds of the run that fills these."""
    make_in_child(args, args.model, work / args.model, CONTEXT)
    write_tasks(work / "tasks", args)
    words = ["--limit", 1, "--gen-kwargs", "max_gen_toks=8"]
    return run_ours(args, work, work / "warm", parts, *words)[0]


def ours(args, work: Path, part: str) -> dict:
    words = [] if part == "choice" else ["--gen-kwargs", gen_kwargs(args)]
    seconds, text = run_ours(args, work, work / part, [part], "--log-samples", *words)
    print(text[-500:])
    record = json.loads(record_of(work / part).read_text())
    cost = record["cost"]
    row = {"seconds": seconds, "documents": record["data"]["documents"], "cost": cost}
    return row | phases(seconds, cost["lm_eval_seconds"], cost["seconds"])


def phases(whole: float, of_lm_eval: float, answers: float) -> dict:
    rest = whole - of_lm_eval - answers
    return {"lm_eval_seconds": of_lm_eval, "answer_seconds": answers, "rest_seconds": rest}


def record_of(results: Path) -> Path:
    found = list(results.glob("*/*/harness-*.json"))
    if not found:
        raise ValueError(f"the peer's {results.name} is compared with ours: run both")
    return found[0]


def theirs(args, work: Path, part: str, cases: dict) -> dict:
    """The peer's part, its time for all, and how its answers agree with ours."""
    samples, result = record_of(work / part).with_suffix(".jsonl"), work / f"{part}-peer.json"
    command = [sys.executable, __file__, "--peer", work / args.model, "--part", part]
    command += ["--tasks", work / "tasks", "--result", result, "--tokenizer", args.tokenizer]
    command += ["--new-tokens", args.new_tokens, "--peer-every", args.peer_every or EVERY[part]]
    command += ["--peer-batch", *(args.peer_batch or BATCH[part])]
    seconds, _ = timed(command, environment(work))
    told = json.loads(result.read_text())
    documents = told.pop("documents")
    answers = told["seconds"] / told["part"]
    whole = seconds - told["seconds"] - told["trial_seconds"] + answers
    row = {"measured_seconds": seconds, "whole_seconds": whole, **told, "wanted": WANTED}
    row |= phases(whole, told["lm_eval_seconds"], answers) | agreement(samples, documents)
    return row | {"speedup": whole / cases[f"{part} roseval"]["seconds"]}


def agreement(samples: Path, documents: dict[str, dict]) -> dict:
    """How many documents of the peer's have our prompt, and our answer."""
    found = {sample["id"]: sample for _, _, sample in read_jsonl(samples)}
    pairs = [(found[at], theirs) for at, theirs in documents.items()]
    counts = {"compared": len(pairs)}
    counts["same_prompts"] = sum(our["prompt_hash"] == their["prompt"] for our, their in pairs)
    answers = [(answers_of(our), their["answers"]) for our, their in pairs]
    if isinstance(answers[0][1][0], str):
        alike = sum(shared_start(our[0], their[0]) for our, their in answers) / len(answers)
        same = sum(our == their for our, their in answers)
        return counts | {"same_texts": same, "alike_from_the_start": alike}
    same = sum(our.index(max(our)) == their.index(max(their)) for our, their in answers)
    apart = max(abs(a - b) for our, their in answers for a, b in zip(our, their, strict=True))
    return counts | {"same_choices": same, "largest_difference": apart}


def answers_of(sample: dict) -> list:
    """A sample's log-probabilities, or its text."""
    first = [response[0] for response in sample["resps"]]
    return [value if isinstance(value, str) else float(value[0]) for value in first]


def line(name: str, row: dict) -> str:
    if "error" in row:
        return f"{name:20} {row['error']}"
    parts = [row[f"{part}_seconds"] for part in ("lm_eval", "answer", "rest")]
    told = "lm-eval's own {:.1f}, answers {:.1f}, the rest {:.1f}".format(*parts)
    if "cost" in row:
        rate = row["cost"]["tokens_per_second"]
        return f"{name:20} {row['seconds']:7.1f} s ({told}), {rate:,.0f} tokens/s"
    same = row.get("same_choices", row.get("same_texts"))
    return (
        f"{name:20} {row['whole_seconds']:7.1f} s ({told}) from {row['part']:.1%}, "
        f"{row['batch']} rows: {row['speedup']:.1f}x; of {row['compared']} {same} answers and "
        f"{row['same_prompts']} prompts equal"
    )


def parser():
    from cases import parser as of_cases

    p = of_cases(__doc__, 600)
    p.add_argument("--mmlu", type=Path, help="MMLU in its original layout")
    p.add_argument("--gsm8k", type=Path, help="GSM8K: train.jsonl and test.jsonl")
    p.add_argument("--model", default="7b", help="a preset (7b)")
    p.add_argument("--subjects", type=cli.positive_int, default=57, help="so many of MMLU's (57)")
    p.add_argument("--questions", type=cli.positive_int, help="the first so many of each (all)")
    p.add_argument("--problems", type=cli.positive_int, help="the first so many of GSM8K (all)")
    shared_arguments(p)
    return p


def shared_arguments(p) -> None:
    """What the peer's process is told too."""
    numbers = {"type": cli.positive_int}
    p.add_argument("--tokenizer", type=Path, required=True, help="of GPT-2's vocab.json")
    p.add_argument("--new-tokens", **numbers, default=256, help="of each text (256)")
    p.add_argument("--peer-every", **numbers, help=f"the peer runs every n-th block ({EVERY})")
    p.add_argument("--peer-batch", **numbers, nargs="+", help=f"rows that it tries ({BATCH})")


def peer_parser():
    p = cli.parser("The peer's process")
    shared_arguments(p)
    for name in ("--peer", "--tasks", "--result"):
        p.add_argument(name, type=Path, required=True)
    p.add_argument("--part", choices=TASK, required=True)
    return p


def main(argv=None):
    if "--peer" in (argv or sys.argv):  # the script calling itself
        return peer(peer_parser().parse_args(argv))
    import importlib.metadata as metadata

    import cases

    p = parser()
    args = p.parse_args(argv)
    if args.small:
        p.set_defaults(**SMALL)
        args = p.parse_args(argv)
    for name in ("mmlu", "gsm8k", "tokenizer"):
        if not (path := getattr(args, name)) or not path.is_dir():
            raise ValueError(f"--{name} {path}: needs a directory")
        setattr(args, name, path.resolve())
    shape = {name: getattr(args, name) for name in ("model", "subjects", "questions", "problems")}
    shape |= {"new_tokens": args.new_tokens, "lm_eval": metadata.version("lm_eval")}
    _, _, report = cases.begin(args, **shape)
    names = {part: [f"{part} {side}" for side in ("roseval", "lm-eval")] for part in TASK}
    parts = [part for part in TASK if any(word in n for word in args.only for n in names[part])]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        report["warm_seconds"] = prepare(args, work, parts)
        print(f"model and tasks after {time.perf_counter() - cases.START:.0f} s", flush=True)
        jobs = []
        for part in parts:
            own, other = names[part]
            jobs.append((own, partial(ours, args, work, part)))
            jobs.append((other, partial(theirs, args, work, part, report["cases"])))
        cases.measure(jobs, args, report, line)


if __name__ == "__main__":
    cli.run(main)
