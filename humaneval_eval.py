"""HumanEval and other sets of its form: programs drawn, judged by their tests, counted as pass@k.

    python humaneval_eval.py --checkpoint-path checkpoints/checkpoint-1000 \\
        --data-path data/HumanEval.jsonl.gz                            # greedy, pass@1
    torchrun --nproc-per-node=8 humaneval_eval.py --checkpoint-path checkpoints \\
        --data-path data/HumanEval.jsonl.gz --num-samples 200 --temperature 0.8 --k 1 10 100

    # samples that are already there, from any tool, judged without a model
    python humaneval_eval.py --samples-file S.jsonl --data-path data/HumanEval.jsonl.gz

    from humaneval_eval import evaluate_humaneval
    record = evaluate_humaneval(model, tokenizer, "data/HumanEval.jsonl.gz")
    record["metrics"]["pass@1"]              # {"value": ..., "stderr": ..., "n": 164}

engine.py draws, sandbox.py judges in other processes meanwhile, results.py keeps what came of it. A
rank has a journal of what it drew and judged, so an interrupted run goes on by (task, sample), on
any number of ranks. samples.jsonl is what OpenAI's evaluate_functional_correctness and EvalPlus
read, and theirs are read here: samples.py reads, judges and counts. Problems, stop strings and
estimator are those of Chen et al., "Evaluating Large Language Models Trained on Code" (2021).
Published pass@1: Codex-12B 28.8%, Llama-2-7B 12.8%.
"""

import argparse
import json
import math
import queue
import time
from collections import Counter
from contextlib import nullcontext, suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np

import cli
import durable
import results
from sandbox.judge import TIERS, Sandbox, Verdict
from tasks.programs import (
    all_ks,
    count_kinds,
    count_workers,
    data_hash,
    find_task,
    judge_file,
    print_example,
    print_scores,
    program_of,
    read_problems,
    summarise,
)

# torch takes seconds to import, and judging a samples file needs none: what needs it is imported by
# the functions that draw samples.

STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
MAX_NEW_TOKENS = 512
SANDBOX = {"timeout": 3.0, "memory_mb": 1024, "tier": None, "unsafe": False}


def main(argv=None):
    args = parse(argv)
    problems = read_problems(args.data_path, args.limit)
    show = args.show and find_task(problems, args.show)
    sandbox = sandbox_of(args)
    if args.samples_file:
        if cli.rank() == 0:
            judge_file(
                args.samples_file,
                problems,
                sandbox,
                ks=args.k,
                workers=args.workers,
                ignore_incomplete=args.ignore_incomplete,
                show=show,
            )
        return
    with Sandbox(1, **sandbox):
        pass  # where no sandbox works, say so before a model is loaded
    evaluate_checkpoints(args, problems, show)


# ---------------------------------------------------------------------------------------------
# Prompts


def make_prompts(tokenizer, problems, strip_prompt, add_bos) -> list[list[int]]:
    texts = [p["prompt"].rstrip("\n") if strip_prompt else p["prompt"] for p in problems.values()]
    bos = [tokenizer.bos_token_id] if add_bos else []
    prompts = [bos + ids.tolist() for ids in tokenizer.encode_batch(texts)]
    if not all(prompts):
        task = list(problems)[prompts.index([])]
        raise ValueError(f"task {task}: its prompt is empty; --bos on would start it")
    return prompts


def continuation_of(prompt: str, text: str, strip_prompt: bool) -> str:
    """What to append to the published prompt so that the program is the one that was drawn: after a
    stripped prompt the model itself writes the newlines that were taken away."""
    return text.removeprefix(prompt[len(prompt.rstrip("\n")) :]) if strip_prompt else text


def end_tokens(tokenizer, model) -> set[int]:
    """End of text, and whatever else has no text: special tokens, and a padded head's extra ids."""
    ends = {*tokenizer.special_ids, *range(tokenizer.vocab_size, model.vocab_size)}
    return ends if tokenizer.eos_token_id is None else ends | {tokenizer.eos_token_id}


def check_model(model, tokenizer, prompts) -> None:
    """ValueError for the wrong tokenizer, and for a model that computes NaN."""
    import torch

    highest = max(map(max, prompts))
    if highest >= model.vocab_size:
        raise ValueError(
            f"tokenizer {tokenizer.name} gives token {highest}, the model has {model.vocab_size}: "
            "name the tokenizer that it was trained with (--tokenizer-name)"
        )
    shortest = min(prompts, key=len)[: model.max_positions]
    with torch.no_grad():
        ids = torch.tensor([shortest], device=next(model.parameters()).device)
        if not model.logits(model.hidden(ids)[:, -1]).isfinite().all():
            raise ValueError("the model gives NaN or infinite logits; no score is written")


# ---------------------------------------------------------------------------------------------
# Journals
#
# A line holds part of what is known of one sample: what was drawn, then its verdict. Each rank
# writes one journal, alone, and reads those of all ranks that worked on this before, however many
# they were. The name holds the work's key, so other code or data never goes on from these.


def read_journals(folder: Path, key: str) -> dict[tuple, dict]:
    """{(task_id, sample): all that is known of it}"""
    known = {}
    for path in sorted(folder.glob(f"journal-{key[:16]}-rank*")):
        for entry in durable.read_journal(path)[0]:
            known.setdefault((entry["task_id"], entry["sample"]), {}).update(entry)
    # a verdict whose sample was on a damaged line
    return {at: entry for at, entry in known.items() if "completion" in entry}


def open_journal(folder: Path, key: str, rank: int):
    return durable.Journal(folder / f"journal-{key[:16]}-rank{rank}")


def one_line(entry) -> str:
    """A line of samples.jsonl: ASCII, which every tool reads under every locale."""
    return json.dumps({"task_id": entry["task_id"], "completion": entry["completion"]}) + "\n"


# ---------------------------------------------------------------------------------------------
# The evaluation


def evaluate_humaneval(
    model,
    tokenizer,
    data_path,
    num_samples=1,
    *,
    temperature=0.0,
    top_p=0.95,
    top_k=0,
    ks=None,
    max_new_tokens=MAX_NEW_TOKENS,
    stop=STOP,
    strip_prompt=True,
    add_bos=None,
    seed=42,
    limit=None,
    batch_size=None,
    compile_mode="auto",
    sandbox=None,
    workers=None,
    results_dir=None,
    dist=None,
    checkpoint_info=None,
    run="run",
) -> dict:
    """Draw `num_samples` programs for each problem, judge them, and return results.py's record.

    model: GPTModel or the transformers fallback. temperature 0 takes the likeliest token. ks: k of
    pass@k beside 1, 10 and 100, which are given wherever num_samples allows them. limit: the first
    so many problems only. add_bos: default as the tokenizer itself would. sandbox: changes to
    SANDBOX. workers: judges on this rank, default its share of the cores. results_dir: where
    save_record will put the record; then an interrupted evaluation goes on where it stopped, and
    samples.jsonl is written (needs checkpoint_info). checkpoint_info: what checkpoint.describe
    gives, or a function that will. The record's "_arrays" and "_samples()" are for save_record. All
    ranks of `dist` call this alike and get the same. ValueError for k > num_samples, bad values,
    prompts beyond the context, and where no sandbox works.
    """
    from distributed import Dist

    parameter = next(model.parameters())
    dist = dist or Dist(0, 1, 0, parameter.device)
    ks = choose_ks(ks, num_samples)
    sandbox = SANDBOX | (sandbox or {})
    problems = read_problems(data_path, limit)
    asked_for = configure(
        model,
        tokenizer,
        str(parameter.dtype).removeprefix("torch."),
        num_samples,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        max_new_tokens=max_new_tokens,
        stop=stop,
        strip_prompt=strip_prompt,
        add_bos=add_bos,
        seed=seed,
        limit=limit,
        batch_size=batch_size,
        sandbox=sandbox,
    )
    prompts = make_prompts(tokenizer, problems, strip_prompt, asked_for["bos"])
    check_model(model, tokenizer, prompts)
    info = dist.broadcast(results.checkpoint_of(checkpoint_info))
    folder = place_of(results_dir, run, info, configuration_of(asked_for))
    key = resume_key(info["fingerprint"], asked_for, problems)
    with (
        Sandbox(workers or count_workers(), **sandbox) as box,
        open_journal(folder, key, dist.rank) if folder else nullcontext() as journal,
    ):
        known = read_journals(folder, key) if folder else {}
        dist.barrier()  # all have read before any adds to them
        job = Job(model, tokenizer, problems, prompts, asked_for, compile_mode, dist, box, journal)
        entries, came_of_it, cost = job.run(known)
    if folder and dist.is_main:
        durable.write_atomic(folder / "samples.jsonl", "".join(map(one_line, entries)))
    judged = [(entry["task_id"], entry, Verdict(**entry["verdict"])) for entry in entries]
    tally = count_kinds(problems, judged)
    metrics, breakdown, arrays = summarise(tally, ks)
    breakdown["finish"] = dict(Counter(entry["finish"] for entry in entries).most_common())
    record = results.new_record(
        "humaneval",
        metrics,
        asked_for | came_of_it,
        run=run,
        checkpoint=info,
        configuration=configuration_of(asked_for),
        data={"files": [Path(data_path).name], "hash": data_hash(problems), "tasks": len(problems)},
        cost=cost,
        breakdown=breakdown,
        code=results.running_code(__file__, CODE_BESIDE),
    )
    return record | {
        "_arrays": arrays,
        "_samples": lambda: map(with_verdict, judged),
        "_judged": judged,
        "_tally": tally,
        "_folder": folder,
    }


def configure(
    model,
    tokenizer,
    dtype,
    num_samples=1,
    *,
    temperature,
    top_p,
    top_k,
    max_new_tokens,
    stop,
    strip_prompt,
    add_bos,
    seed,
    limit,
    batch_size,
    sandbox,
) -> dict:
    """What evaluate_humaneval is asked for, in full. `model`: itself, or its checkpoint.Shape."""
    check_sampling(num_samples, temperature, top_p, top_k)
    if add_bos and tokenizer.bos_token_id is None:
        raise ValueError(f"--bos on: tokenizer {tokenizer.name} has no BOS token")
    sandbox = SANDBOX | (sandbox or {})
    return {
        "num_samples": num_samples,
        "temperature": temperature,
        "top_p": top_p if temperature else 1.0,
        "top_k": top_k if temperature else 0,
        "max_new_tokens": max_new_tokens,
        "stop": list(stop),
        "strip_prompt": strip_prompt,
        "bos": tokenizer.adds_bos if add_bos is None else add_bos,
        "seed": seed,
        "limit": limit,
        "batch_size": batch_size,
        "context": model.max_positions,
        "dtype": dtype,
        "tokenizer": tokenizer.name,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "judge_timeout": sandbox["timeout"],
        "judge_memory_mb": sandbox["memory_mb"],
        "sandbox_tier": sandbox["tier"],
        "unsafe_no_sandbox": sandbox["unsafe"],
    }


CODE_BESIDE = (
    "sandbox/worker.py",
    "sandbox/jail.py",
    "sandbox/frames.py",
    "formats/tensorfiles.py",
    "formats/layouts.py",
)  # a program that is started, not imported


def configuration_of(asked_for: dict) -> dict:
    """What decides the numbers. A tokenizer counts by its content: each checkpoint may hold a copy
    under a path of its own."""
    return {name: value for name, value in asked_for.items() if name != "tokenizer"}


def resume_key(fingerprint, asked_for: dict, problems) -> str:
    """The resume_key of the record that evaluate_humaneval will return."""
    code = results.running_code(__file__, CODE_BESIDE)
    configuration = configuration_of(asked_for)
    return results.resume_key(fingerprint, "humaneval", configuration, data_hash(problems), code)


def check_sampling(num_samples, temperature, top_p, top_k) -> None:
    if not 0 <= temperature < math.inf:
        raise ValueError(f"--temperature must be 0 (greedy) or more, not {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"--top-p must be above 0 and at most 1, not {top_p}")
    if top_k < 0:
        raise ValueError(f"--top-k must be 0 (off) or more, not {top_k}")
    if num_samples > 1 and not temperature:
        raise ValueError(
            f"--num-samples {num_samples} at temperature 0 would be equal samples: give a "
            "--temperature (0.2 for pass@1, 0.8 for pass@100, say)"
        )


def choose_ks(ks, num_samples) -> list[int]:
    for k in ks or ():
        if not 1 <= k <= num_samples:
            raise ValueError(f"--k {k} needs at least {k} samples of each task: --num-samples {k}")
    return all_ks(ks, num_samples)


def place_of(results_dir, run, info, configuration) -> Path | None:
    """The folder of journals and samples.jsonl, beside the record that save_record will write."""
    if results_dir is None:
        return None
    assert info is not results.IN_MEMORY, (
        "results_dir needs checkpoint_info: journals are kept by it"
    )
    path = results.record_path(
        results_dir,
        run,
        info["name"],
        info["fingerprint"],
        "humaneval",
        results.config_hash(configuration),
    )
    return path.with_suffix("")


def with_verdict(judged) -> dict:
    """A line beside the record: OpenAI's fields of a judged sample, and ours."""
    _, entry, verdict = judged
    names = ("task_id", "completion", "sample", "finish", "tokens")
    return {name: entry[name] for name in names} | {
        "result": verdict.result,
        "passed": verdict.passed,
        "kind": verdict.kind,
    }


class Job:
    """One rank's part of an evaluation: drawing its units' samples while others are judged."""

    def __init__(
        self, model, tokenizer, problems, prompts, protocol, compile_mode, dist, box, journal
    ):
        self.model, self.tokenizer, self.dist, self.box = model, tokenizer, dist, box
        self.tasks, self.problems = list(problems), problems
        self.prompts, self.protocol, self.compile_mode = prompts, protocol, compile_mode
        self.append = journal.append if journal else lambda entry: None
        self.drawn_tokens = 0

    def run(self, known: dict):
        """(all ranks' entries in order, what came of it, cost); `known`: what journals hold."""
        import torch

        from backends.engine import default_batch_size
        from backends.scoring import agree_on_memory, halve_until_it_fits

        protocol, dist = self.protocol, self.dist
        start, resumed = time.perf_counter(), len(known)
        if dist.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(dist.device)
        most = min(protocol["max_new_tokens"], self.model.max_positions or 2**31)
        batch_size = protocol["batch_size"] or default_batch_size(
            self.model, max(map(len, self.prompts)), most
        )

        def attempt(b):
            agree_on_memory(lambda: self.draw_and_judge(known, b), dist)

        _, used = halve_until_it_fits(attempt, batch_size)
        seconds = {"draw": self.drawn_at - start, "judge": time.perf_counter() - self.drawn_at}
        mine = [entry for at, entry in known.items() if at in self.own]
        entries = [entry for part in dist.gather(mine) for entry in part]
        place = {task: i for i, task in enumerate(self.tasks)}
        entries.sort(key=lambda entry: (place[entry["task_id"]], entry["sample"]))
        total = len(self.tasks) * protocol["num_samples"]
        assert len(entries) == total, f"{len(entries)} samples where {total} were asked for"
        tiers = sorted(set(dist.gather(self.box.tier)))
        came_of_it = {"batch_size": used, "sandbox_tier": "; ".join(tiers)}
        return entries, came_of_it, self.cost(seconds, resumed)

    def draw_and_judge(self, known: dict, batch_size: int) -> None:
        """Draw this rank's samples that are not in `known`, and add them there with verdicts."""
        from backends.engine import plan_units

        n, done = self.protocol["num_samples"], queue.SimpleQueue()
        units = plan_units(len(self.tasks), n, batch_size)
        own = {self.tasks[p] for u in self.dist.shard(len(units)) for p in units[u]}
        self.own = {(task, s) for task in own for s in range(n)}
        waiting = 0

        def submit(entry):
            nonlocal waiting
            program = program_of(self.problems[entry["task_id"]], entry)
            future = self.box.submit(*program)  # an equal program is judged once
            future.add_done_callback(lambda future: done.put((entry, future)))
            waiting += 1

        def settle(entry, future):
            nonlocal waiting
            entry["verdict"] = asdict(future.result())
            self.append({name: entry[name] for name in ("task_id", "sample", "verdict")})
            waiting -= 1
            bar.update(1)

        here = [known[at] for at in known.keys() & self.own]
        unjudged = [entry for entry in here if "verdict" not in entry]
        with cli.progress(len(self.own), "humaneval", "sample") as bar:
            bar.update(len(here) - len(unjudged))
            for entry in unjudged:
                submit(entry)
            for entry in self.draw(known, batch_size, units):
                submit(entry)
                while not done.empty():
                    settle(*done.get())
            self.drawn_at = time.perf_counter()
            while waiting:
                self.dist.bump()  # the sandbox bounds how long a verdict takes
                with suppress(queue.Empty):
                    settle(*done.get(timeout=1.0))

    def draw(self, known, batch_size, units):
        """Yield entries of samples as they finish, journaled and in `known`."""
        from backends.engine import generate

        protocol, at = self.protocol, {task: i for i, task in enumerate(self.tasks)}
        for sample in generate(
            self.model,
            self.prompts,
            tokenizer=self.tokenizer,
            n_samples=protocol["num_samples"],
            max_new_tokens=protocol["max_new_tokens"],
            temperature=protocol["temperature"],
            top_p=protocol["top_p"],
            top_k=protocol["top_k"],
            stop=protocol["stop"],
            eos_ids=end_tokens(self.tokenizer, self.model),
            seed=protocol["seed"],
            keys=self.tasks,
            done={(at[task], s) for task, s in known},
            batch_size=batch_size,
            units=units,
            compile={"auto": "auto", "on": True, "off": False}[self.compile_mode],
            dist=self.dist,
        ):
            task = self.tasks[sample.prompt_index]
            prompt = self.problems[task]["prompt"]
            entry = {
                "task_id": task,
                "sample": sample.sample_index,
                "completion": continuation_of(prompt, sample.text, protocol["strip_prompt"]),
                "finish": sample.finish_reason,
                "tokens": len(sample.token_ids),
            }
            self.drawn_tokens += entry["tokens"]
            self.append(entry)
            known[task, entry["sample"]] = entry
            yield entry

    def cost(self, seconds, resumed) -> dict:
        """Times are the slowest rank's. judge_seconds: what judging took after the last sample."""
        import torch

        parts = self.dist.gather((seconds["draw"], seconds["judge"], self.drawn_tokens))
        draw, judge, tokens = (np.array(column) for column in zip(*parts))
        cuda = self.dist.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self.dist.device) if cuda else None
        return {
            "seconds": float((draw + judge).max()),
            "draw_seconds": float(draw.max()),
            "judge_seconds": float(judge.max()),
            "tokens": int(tokens.sum()),
            "tokens_per_second": float(tokens.sum() / draw.max()),
            "samples_resumed": resumed,
            "judges": sum(self.dist.gather(self.box.workers)),
            "world_size": self.dist.world_size,
            "mfu": None,
            "gpu": torch.cuda.get_device_name(self.dist.device) if cuda else None,
            "peak_memory_bytes": max(self.dist.gather(peak)) if cuda else None,
        }


# ---------------------------------------------------------------------------------------------
# Output


def print_record(record, problems, show) -> None:
    protocol, cost = record["protocol"], record["cost"]
    print(f"\n{record['checkpoint']['name']}  ({record['checkpoint']['path']})")
    drawn = "greedy"
    if protocol["temperature"]:
        drawn = f"temperature {protocol['temperature']:g}, top-p {protocol['top_p']:g}"
    print(f"{len(problems)} tasks, samples of each: {protocol['num_samples']}, {drawn}")
    if protocol["limit"]:
        print("A PART OF THE TASKS (--limit): not a score of the set")
    print_scores(record["metrics"], record["_tally"])
    cut = record["breakdown"]["finish"].get("length", 0)
    if cut:
        print(f"{cut:,} samples were cut off at {protocol['max_new_tokens']} tokens or the context")
    print(
        f"drawn in {cost['draw_seconds']:.1f} s: {cost['tokens']:,} tokens, "
        f"{cost['tokens_per_second']:,.0f}/s; judged {cost['judge_seconds']:.1f} s after the last; "
        f"{cost['samples_resumed']:,} samples were there already"
    )
    print(f"sandbox: {protocol['sandbox_tier']}")
    if show:
        print_example(problems[show], record["_judged"])
    print(f"samples: {record['_folder'] / 'samples.jsonl'}")


def print_table(records) -> None:
    """A line for each checkpoint."""
    width = max(10, *(len(record["checkpoint"]["name"]) for record in records))
    print(f"\n{'checkpoint':{width}}" + "".join(f"{k:>20}" for k in records[0]["metrics"]))
    for record in records:
        cells = (f"{m['value']:.2%} ± {m['stderr']:.2%}" for m in record["metrics"].values())
        print(f"{record['checkpoint']['name']:{width}}" + "".join(f"{cell:>20}" for cell in cells))


# ---------------------------------------------------------------------------------------------
# Command line


def parse(argv):
    p = cli.parser(__doc__)
    cli.add_evaluation_flags(p, batch_size=None, needs_checkpoint=False)
    p.add_argument("--data-path", required=True, metavar="FILE", help="HumanEval.jsonl.gz, say")
    p.add_argument("--samples-file", metavar="FILE", help="judge these samples; needs no model")
    p.add_argument("--ignore-incomplete", action="store_true", help="... though tasks are missing")
    p.add_argument("--num-samples", type=cli.positive_int, default=1, help="for each task (1)")
    p.add_argument("--temperature", type=float, default=0.0, help="0, the default: greedy")
    p.add_argument("--top-p", type=float, default=0.95, help="as in the paper (0.95); 1: off")
    p.add_argument("--top-k", type=int, default=0, help="0, the default: off")
    p.add_argument("--k", type=cli.positive_int, nargs="+", help="beside 1, 10, 100 if possible")
    p.add_argument("--max-new-tokens", type=cli.positive_int, default=MAX_NEW_TOKENS)
    p.add_argument(
        "--stop",
        nargs="*",
        default=list(STOP),
        type=lambda text: text.replace("\\n", "\n"),
        help="a sample ends before the first of these, \\n being a newline (default: the paper's, "
        + " ".join(s.replace("\n", "\\n") for s in STOP) + ")",
    )  # fmt: skip
    p.add_argument(
        "--strip-prompt",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="prompts without their trailing newline (the default). Many tokenizers join that "
        "newline and the indentation after it in one token: a model whose prompt ends in a newline "
        "starts with a wrong token, a known cause of Llama scores that are far too low",
    )
    p.add_argument(
        "--bos",
        choices=("auto", "on", "off"),
        default="auto",
        help="BOS before each prompt; auto: as the tokenizer does by itself",
    )
    p.add_argument("--limit", type=cli.positive_int, help="the first so many tasks: not a score")
    p.add_argument("--show", metavar="TASK", help="print a failing sample of this task")
    p.add_argument("--workers", type=cli.positive_int, help="judges a rank (its share of cores)")
    p.add_argument("--judge-timeout", type=float, default=SANDBOX["timeout"], metavar="SECONDS")
    p.add_argument("--judge-memory", type=cli.positive_int, default=1024, metavar="MB")
    p.add_argument("--sandbox-tier", choices=TIERS, help="default: the best that works here")
    p.add_argument("--unsafe-no-sandbox", action="store_true", help="if no sandbox works: none")
    args = p.parse_args(argv)
    if bool(args.samples_file) == bool(args.checkpoint_path):
        p.error("give --checkpoint-path to draw samples, or --samples-file to judge those there")
    drawing = "num_samples temperature top_p top_k max_new_tokens stop strip_prompt bos limit"
    for name in drawing.split() if args.samples_file else ():
        if getattr(args, name) != p.get_default(name):
            p.error(f"--{name.replace('_', '-')} goes with --checkpoint-path, not --samples-file")
    if args.ignore_incomplete and not args.samples_file:
        p.error("--ignore-incomplete goes with --samples-file")
    if not args.samples_file:  # before anything is loaded
        check_sampling(args.num_samples, args.temperature, args.top_p, args.top_k)
        choose_ks(args.k, args.num_samples)
    return args


def sandbox_of(args) -> dict:
    return {
        "timeout": args.judge_timeout,
        "memory_mb": args.judge_memory,
        "tier": args.sandbox_tier,
        "unsafe": args.unsafe_no_sandbox,
    }


def options_of(args) -> dict:
    """The flags as configure's options."""
    return {
        "temperature": args.temperature,
        "top_p": args.top_p,
        "top_k": args.top_k,
        "max_new_tokens": args.max_new_tokens,
        "stop": args.stop,
        "strip_prompt": args.strip_prompt,
        "add_bos": {"auto": None, "on": True, "off": False}[args.bos],
        "seed": args.seed,
        "limit": args.limit,
        "batch_size": args.batch_size,
        "sandbox": sandbox_of(args),
    }


def evaluate_checkpoints(args, problems, show) -> None:
    from concurrent.futures import ThreadPoolExecutor

    import torch

    import checkpoint as checkpoints
    from config import load_config
    from distributed import setup
    from tokenizer import build_tokenizer

    paths = checkpoints.expand_paths(args.checkpoint_path)
    config = load_config(args.config) if args.config else None
    with setup(args.device, args.timeout) as dist, ThreadPoolExecutor(1) as background:
        dtype = cli.resolve_dtype(args, dist.device.type)
        if dtype == "float32":
            torch.set_float32_matmul_precision("highest")
        done = []
        for path in paths:
            start = time.perf_counter()
            # hashing a large checkpoint takes seconds: beside the loading, and on one rank only
            info = background.submit(checkpoints.describe, path).result if dist.is_main else None
            name = args.tokenizer_name or checkpoints.find_tokenizer(path) or "gpt2"
            tokenizer = build_tokenizer(name)
            model = checkpoints.load_model(path, dtype, dist.device, config)
            load_seconds = time.perf_counter() - start
            record = evaluate_humaneval(
                model,
                tokenizer,
                args.data_path,
                args.num_samples,
                **options_of(args),
                ks=args.k,
                compile_mode=args.compile,
                workers=args.workers,
                results_dir=args.results_dir,
                dist=dist,
                checkpoint_info=info,
                run=args.run_name or Path(path).resolve().parent.name or "checkpoints",
            )
            record["cost"]["load_seconds"] = load_seconds
            if dist.is_main:
                print_record(record, problems, show)
                done.append(record)
                where = results.save_record(
                    args.results_dir, record, record["_arrays"], record["_samples"]()
                )
                print(f"record: {where}", flush=True)
            del model
        if len(done) > 1:
            print_table(done)


if __name__ == "__main__":
    cli.run(main)
