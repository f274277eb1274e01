"""MMLU and other four-choice sets, scored as lm-evaluation-harness scores them.

    python mmlu_eval.py --checkpoint-path checkpoints/checkpoint-1000 --data-path data/mmlu \\
        --num-few-shot 5
    torchrun --nproc-per-node=8 mmlu_eval.py --checkpoint-path checkpoints --data-path data/mmlu \\
        --num-few-shot 5 --template lm_eval continuation --log-samples

    from mmlu_eval import evaluate_mmlu
    result = evaluate_mmlu(model, tokenizer, "data/mmlu", num_few_shot=5)
    result["metrics"]["accuracy"]            # {"value": ..., "stderr": ..., "n": 14042}

Questions and templates are read by questions.py and become rows of tokens in prompts.py. A
subject's few-shot examples are run once and their keys and values shared by all its questions
(scoring.py). Here, top to bottom: scores, metrics, the evaluation, tables. Guessing gives 25%;
Llama-2-7B's published score is 45.3% (5-shot).
"""

import functools
import itertools
import math
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import checkpoint as checkpoints
import cli
from backends.engine import generate
from backends.scoring import (
    Continuations,
    batch_overhead,
    device_cost,
    halve_until_it_fits,
    plan_batches,
    score_continuations,
)
from costs.flops import estimate_flops
from distributed import Dist, print0, setup
from results import (
    dumps,
    new_record,
    resume_key,
    running_code,
    save_record,
    write_atomic,
)
from stats import (
    calibration,
    proportion_stderr,
)
from tasks.prompts import MAX_NEW_TOKENS, PromptMaker, Prompts
from tasks.questions import (
    LETTERS,
    SCORINGS,
    QuestionSet,
    Template,
    load_template,
    read_data,
    subject_table,
)
from tokenizer import build_tokenizer

BATCH_TOKENS = {"cuda": 32768, "cpu": 4096}  # padded tokens of a batch


# ---------------------------------------------------------------------------------------------
# Scores


@dataclass(frozen=True)
class Answers:
    """predicted [questions, rotations]: the letter's index, -1 where none was given. scores
    [questions, rotations, 4]: log-probabilities in nats of the letters or of the whole choices, or
    None; texts, likewise [questions, rotations]: what was generated, or None."""

    predicted: np.ndarray
    scores: np.ndarray | None = None
    texts: np.ndarray | None = None


def answer(model, tokenizer, prompts: Prompts, asked_for: dict, dist):
    """(Answers, batches, tokens of a batch at most): the batches are halved until they fit."""
    max_rows, rows = asked_for["batch_size"], prompts.rows
    if dist.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(dist.device)
    if asked_for["scoring"] == "generate":
        answers = generate_answers(model, tokenizer, prompts, max_rows, dist)
        return answers, [], asked_for["batch_tokens"]
    overhead = batch_overhead(model, dist.device)

    def score(max_tokens):
        batches = plan_batches(rows, max_tokens, max_rows, overhead)
        with cli.progress(len(rows.ids), "mmlu", "row") as bar:
            return batches, score_continuations(model, rows, batches, dist, bar)

    (batches, (choices, targets)), max_tokens = halve_until_it_fits(
        score, asked_for["batch_tokens"]
    )
    scores = np.zeros((*prompts.shots.shape, len(LETTERS)))
    if rows.choice_ids:
        scores[prompts.question, prompts.rotation] = choices + targets[:, None]
    else:
        scores[prompts.question, prompts.rotation, prompts.choice] = targets
    if not np.isfinite(scores).all():
        raise ValueError("the model gives NaN or infinite log-probabilities; no score is written")
    return Answers(scores.argmax(-1), scores), batches, max_tokens


def generate_answers(model, tokenizer, prompts: Prompts, batch_size, dist) -> Answers:
    """The first letter that stands alone in MAX_NEW_TOKENS greedy tokens, before a blank line."""
    eos = tokenizer.eos_token_id
    mine = []
    with cli.progress(len(prompts.rows.ids), "mmlu", "row") as bar:
        for sample in generate(
            model,
            [ids.tolist() for ids in prompts.rows.ids],
            max_new_tokens=MAX_NEW_TOKENS,
            eos_ids=() if eos is None else (eos,),
            batch_size=batch_size,
            dist=dist,
        ):
            mine.append((sample.prompt_index, tokenizer.decode(sample.token_ids)))
            bar.update(1)
    texts = np.full(prompts.shots.shape, "", dtype=object)
    for row, text in itertools.chain.from_iterable(dist.gather(mine)):
        texts[prompts.question[row], prompts.rotation[row]] = text
    return Answers(np.vectorize(first_letter, otypes=[np.int64])(texts), texts=texts)


def first_letter(text: str) -> int:
    found = re.search(r"(?<![A-Za-z])[A-D](?![A-Za-z])", text.strip().split("\n\n")[0])
    return LETTERS.index(found[0]) if found else -1


# ---------------------------------------------------------------------------------------------
# Metrics


def share(correct) -> dict:
    """{value, stderr, n} of booleans [n]."""
    p = float(np.mean(correct))
    return {"value": p, "stderr": proportion_stderr(p, len(correct)), "n": len(correct)}


def mean_of_shares(shares) -> dict:
    """Their unweighted mean; n counts the questions behind it. The groups are taken as given, the
    questions in each as drawn: variances add."""
    values, errors = [s["value"] for s in shares], [s["stderr"] for s in shares]
    stderr = math.sqrt(sum(e * e for e in errors)) / len(errors)
    return {"value": float(np.mean(values)), "stderr": stderr, "n": sum(s["n"] for s in shares)}


def accuracies(data, correct: dict) -> tuple[dict, dict]:
    """(metrics, breakdown by category and by subject) of booleans [questions] by metric name:
    micro over questions (lm-evaluation-harness's weighting), macro over subjects."""
    subject = np.array([q.subject for q in data.questions])
    category_of = subject_table(data.subjects)["categories"]
    category = np.array([category_of.get(s, "") for s in subject])
    metrics, by_subject, by_category = {}, {}, {}
    for name, right in correct.items():
        for key, groups, out in (
            (subject, data.subjects, by_subject),
            (category, sorted({*category} - {""}), by_category),
        ):
            for group in groups:
                out.setdefault(str(group), {})[name] = share(right[key == group])
        metrics[name] = share(right)
        macro = name.replace("accuracy", "accuracy_macro")
        metrics[macro] = mean_of_shares([by_subject[s][name] for s in data.subjects])
    return metrics, {"category": by_category, "subject": by_subject}


def summarise(data, scoring, answers: Answers, gold):
    """(metrics, breakdown, arrays), all but the permuted ones of the choices as they are listed."""
    right, predicted = answers.predicted == gold, answers.predicted[:, 0]
    arrays = {
        "correct": right[:, 0],
        "predicted": predicted,
        "gold": gold[:, 0],
        "subject": np.array([q.subject for q in data.questions]),
        "subject_id": np.array([data.subjects.index(q.subject) for q in data.questions]),
    }
    correct, scores = {"accuracy": right[:, 0]}, None
    if answers.scores is not None:
        arrays["logprobs"] = scores = answers.scores[:, 0]
    if scoring == "continuation":  # log-likelihood per character, lm-evaluation-harness's acc_norm
        characters = np.array([[max(len(c), 1) for c in q.choices] for q in data.questions])
        correct["accuracy_normalised"] = (scores / characters).argmax(-1) == gold[:, 0]
        arrays["correct_normalised"] = correct["accuracy_normalised"]
    metrics, breakdown = accuracies(data, correct)
    breakdown["letter"] = {  # position bias, over all rotations
        letter: {
            "predicted": float(np.mean(answers.predicted == i)),
            "gold": float(np.mean(gold == i)),
        }
        for i, letter in enumerate(LETTERS)
    }
    if scores is None:
        metrics["answered"] = share(predicted >= 0)
    else:
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p = (p / p.sum(-1, keepdims=True))[np.arange(len(p)), predicted]
        measured = calibration(p, right[:, 0])
        metrics |= {"ece": measured["ece"], "brier": measured["brier"]}
        breakdown["calibration"] = measured["bins"]
        best, second = np.sort(scores, -1)[:, :1:-1].T
        metrics["ties"] = int((best == second).sum())
    if right.shape[1] > 1:
        add_permuted(metrics, breakdown, answers.predicted, right)
        arrays["correct_permuted"] = right
    return metrics, breakdown, arrays


def add_permuted(metrics, breakdown, predicted, right) -> None:
    """Accuracy over rotated choice orders [questions, rotations], a question being the unit that
    was drawn, and how often a question gets the same choice in all of them."""
    rotations, mean = right.shape[1], right.mean(axis=1)
    stderr = mean.std(ddof=1) / math.sqrt(len(mean)) if len(mean) > 1 else math.nan
    metrics["accuracy_permuted"] = {"value": float(mean.mean()), "stderr": stderr, "n": len(mean)}
    chosen = np.where(predicted < 0, -1, (predicted + np.arange(rotations)) % len(LETTERS))
    metrics["same_answer"] = share((chosen == chosen[:, :1]).all(axis=1) & (chosen[:, 0] >= 0))
    breakdown["rotation"] = {str(r): {"accuracy": share(right[:, r])} for r in range(rotations)}


def make_samples(data, prompts, answers: Answers, gold):
    """One dict a question (and rotation): what was asked, scored and answered."""
    for i, q in enumerate(data.questions):
        for r, predicted in enumerate(answers.predicted[i].tolist()):
            yield {
                "id": i,
                "subject": q.subject,
                "rotation": r,
                "question": q.question,
                "choices": q.choices[r:] + q.choices[:r],
                "gold": LETTERS[gold[i, r]],
                "predicted": letter_or_none(predicted),
                "correct": predicted == gold[i, r],
                "shots": prompts.shots[i, r],
                "logprobs": None if answers.scores is None else answers.scores[i, r],
                "text": None if answers.texts is None else answers.texts[i, r],
            }


def letter_or_none(index) -> str | None:
    return LETTERS[index] if index >= 0 else None


# ---------------------------------------------------------------------------------------------
# The evaluation


@dataclass(frozen=True)
class Task:
    """All that is known before a model runs, and so the same for every checkpoint of one shape."""

    tokenizer: object
    template: Template
    data: QuestionSet
    asked_for: dict

    @functools.cached_property
    def prepared(self) -> tuple[Prompts, float]:
        """The rows to score, and the seconds that it took to make them."""
        start, asked = time.perf_counter(), self.asked_for
        prompts = PromptMaker(
            self.tokenizer,
            self.data,
            self.template,
            asked["scoring"],
            asked["context"] or sys.maxsize,
            asked["permute_choices"],
            asked["truncate"],
            asked["bos"],
        ).make(asked["prefix_cache"])
        return prompts, time.perf_counter() - start

    @property
    def configuration(self) -> dict:
        """What decides the numbers. A tokenizer counts by its content: each checkpoint may hold a
        copy under a path of its own."""
        asked_for = {name: value for name, value in self.asked_for.items() if name != "tokenizer"}
        return asked_for | {"examples_hash": self.data.examples_hash}

    def resume_key(self, fingerprint) -> str:
        """The resume_key of the record that run_task will return."""
        code = running_code(__file__, checkpoints.READ_WITH)
        return resume_key(fingerprint, "mmlu", self.configuration, self.data.hash, code)


def make_task(
    model,
    tokenizer,
    data_path,
    num_few_shot=0,
    *,
    dtype,
    device_type="cpu",
    template="lm_eval",
    scoring=None,
    split="test",
    subjects=None,
    limit=None,
    permute_choices=1,
    truncate=False,
    add_bos=None,
    prefix_cache=True,
    batch_tokens=None,
    batch_size=None,
) -> Task:
    """What evaluate_mmlu describes, for a model or the checkpoint.Shape of one, in a dtype by name.
    Reads the questions; they become tokens when the prompts are first asked for."""
    template = load_template(template)
    scoring = scoring or template.scorings[0]
    if scoring not in template.scorings:
        raise ValueError(f"template {template.name} shows no letters: --scoring continuation only")
    if not 1 <= permute_choices <= len(LETTERS):
        raise ValueError(f"--permute-choices must be 1 to 4, not {permute_choices}")
    if add_bos and tokenizer.bos_token_id is None:
        raise ValueError(f"--bos on: tokenizer {tokenizer.name} has no BOS token")
    add_bos = tokenizer.adds_bos if add_bos is None else add_bos
    share_prefix = prefix_cache and model.supports_cache and scoring != "generate"
    asked_for = {
        "template": template.name,
        "template_hash": template.hash,
        "scoring": scoring,
        "shots": num_few_shot,
        "split": split,
        "subjects": sorted(subjects) if subjects else None,
        "limit": limit,
        "permute_choices": permute_choices,
        "truncate": truncate,
        "bos": add_bos,
        "context": model.max_positions,
        "dtype": dtype,
        "tokenizer": tokenizer.name,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "prefix_cache": share_prefix,
        "batch_tokens": batch_tokens or BATCH_TOKENS[device_type],
        "batch_size": batch_size,
    }
    data = read_data(data_path, num_few_shot, split, subjects, limit)
    return Task(tokenizer, template, data, asked_for)


class TaskMaker:
    """Tasks of the command line's flags: checkpoints of one tokenizer and shape share theirs, and
    with it the prompts."""

    def __init__(self, args, template, scoring):
        self.args = args
        self.options = options_of(args) | {"template": template, "scoring": scoring}
        self.task = self.made_for = None

    def make(self, tokenizer, shape, dtype, device_type) -> Task:
        """shape: checkpoint.Shape."""
        made_for = tokenizer.fingerprint, shape, dtype, device_type
        if self.made_for != made_for:
            self.made_for = made_for
            where = self.args.data_path, self.args.num_few_shot
            how = self.options | {"dtype": dtype, "device_type": device_type}
            self.task = make_task(shape, tokenizer, *where, **how)
        return self.task


def evaluate_mmlu(
    model,
    tokenizer,
    data_path,
    num_few_shot=0,
    *,
    dist=None,
    checkpoint_info=None,
    run="run",
    **options,
) -> dict:
    """Score `model` on a four-choice set and return results.py's record.

    model: GPTModel or the transformers fallback. data_path, split, subjects, limit: see read_data.
    template: a name or file; scoring: letter, continuation or generate, default the template's
    first. permute_choices: choice orders tried, each one rotated by one more. truncate: cut a
    question that alone exceeds the context on the left, instead of ValueError. add_bos: default as
    the tokenizer itself would. batch_tokens, batch_size: padded tokens and rows of a batch at most.
    The defaults of these options are make_task's. The record's "_arrays" hold per-question results
    and "_samples()" yields one dict a question; `save_record` takes both. checkpoint_info: what
    checkpoint.describe gives, or a function that will; it is called last. All ranks of `dist` call
    this alike and get the same figures.
    """
    parameter = next(model.parameters())
    dtype = str(parameter.dtype).removeprefix("torch.")
    options |= {"dtype": dtype, "device_type": parameter.device.type}
    task = make_task(model, tokenizer, data_path, num_few_shot, **options)
    return run_task(model, task, dist, checkpoint_info, run)


def run_task(model, task: Task, dist=None, checkpoint_info=None, run="run") -> dict:
    """evaluate_mmlu of a task that was made for a model of this shape; it may be used again."""
    dist = dist or Dist(0, 1, 0, next(model.parameters()).device)
    tokenizer, data, asked_for = task.tokenizer, task.data, task.asked_for
    scoring, num_few_shot = asked_for["scoring"], asked_for["shots"]
    prompts, prepare_seconds = task.prepared
    check_vocabulary(prompts.rows, tokenizer, model)
    start = time.perf_counter()
    answers, batches, used_tokens = answer(model, tokenizer, prompts, asked_for, dist)
    seconds = {"prepare": prepare_seconds, "score": time.perf_counter() - start}
    rotation = np.arange(asked_for["permute_choices"])
    gold = (np.array([[q.answer] for q in data.questions]) - rotation) % len(LETTERS)
    metrics, breakdown, arrays = summarise(data, scoring, answers, gold)
    came_of_it = {
        "subjects": len(data.subjects) if asked_for["subjects"] else None,
        "batch_tokens": used_tokens,
        "compiled": False,
        "letter_ids": prompts.rows.choice_ids,
        "max_new_tokens": MAX_NEW_TOKENS if scoring == "generate" else None,
        "truncated": prompts.truncated,
        "shortened": int((prompts.shots < num_few_shot).sum()),
        "shots_kept": np.bincount(prompts.shots.ravel()).tolist(),  # prompts by examples kept
    }
    record = new_record(
        "mmlu",
        metrics,
        asked_for | came_of_it,
        run=run,
        checkpoint=checkpoint_info,
        configuration=task.configuration,
        data={
            "files": data.files,
            "hash": data.hash,
            "examples_hash": data.examples_hash,
            "tokens": prompts.rows.unique_tokens(),
        },
        cost=cost_of(model, prompts.rows, batches, seconds, dist),
        breakdown=breakdown,
        code=running_code(__file__, checkpoints.READ_WITH),
    )
    samples = functools.partial(make_samples, data, prompts, answers, gold)
    return record | {"_arrays": arrays, "_samples": samples, "_data": data}


def check_vocabulary(rows, tokenizer, model) -> None:
    highest = max(int(ids.max(initial=0)) for ids in (*rows.ids, *rows.prefixes, *rows.targets))
    highest = max(highest, *(rows.choice_ids or [0]))
    if highest >= model.vocab_size:
        raise ValueError(
            f"tokenizer {tokenizer.name} gives token {highest}, the model has {model.vocab_size}: "
            "name the tokenizer that it was trained with (--tokenizer-name)"
        )


def cost_of(model, rows, batches, seconds, dist) -> dict:
    """Time, and the share of the arithmetic limit reached: FLOPs of the unique tokens only (each
    prefix once, no padding), over what the GPU's dense bf16 peak allows in the scoring time."""
    score, prefixes = seconds["score"], rows.prefixes
    flops = unique_flops(model.config, rows) if model.is_native else None
    return {
        "seconds": score,
        "prepare_seconds": seconds["prepare"],
        "tokens_per_second": rows.unique_tokens() / score,
        "rows": len(rows.ids),
        "tokens_padded": sum(batch.tokens for batch in batches),
        "tokens_unshared": int(rows.lengths.sum()) + sum(len(prefixes[g]) for g in rows.prefix),
        "batches": len(batches),
    } | device_cost(dist, flops, score)


def unique_flops(config, rows: Continuations) -> float:
    """FLOPs of a forward over each prefix and each row once, the head at scored positions only."""
    per_token = estimate_flops(config, 1, 1)["parts"]
    P = np.array([len(prefix) for prefix in rows.prefixes], dtype=np.float64)
    P = np.where(np.isin(np.arange(len(P)), rows.prefix), P, 0)
    T, before = rows.lengths.astype(np.float64), P[rows.prefix]
    pairs = (P * (P + 1) / 2).sum() + (T * before + T * (T + 1) / 2).sum()
    heads = sum(map(len, rows.targets)) + (len(rows.ids) if rows.choice_ids else 0)
    linear = per_token["linear"] * rows.unique_tokens()
    return linear + per_token["attention_causal"] * pairs + per_token["head"] * heads


# ---------------------------------------------------------------------------------------------
# Output


def column_of(record) -> str:
    return f"{record['protocol']['template']}/{record['protocol']['scoring']}"


def show_share(share) -> str:
    value, stderr = share["value"], share["stderr"]
    return f"{value:.2%}" if math.isnan(stderr) else f"{value:.2%} ± {stderr:.2%}"


def print_table(records) -> None:
    """Accuracy overall, by category and by subject, one column for each record of a checkpoint."""
    first = records[0]
    data, protocol = first["_data"], first["protocol"]
    print0(
        f"\n{first['checkpoint']['name']}: {len(data.questions):,} questions of "
        f"{len(data.subjects)} subjects, {protocol['shots']}-shot"
    )
    if protocol["limit"] or protocol["subjects"]:
        print0("A PART OF THE QUESTIONS (--limit, --subjects): not a score of the set")
    names = ["accuracy", "accuracy_normalised"]
    columns = [
        (r, n, column_of(r) + ("/norm" if n != "accuracy" else ""))
        for r in records
        for n in names
        if n in r["metrics"]
    ]
    widths = [max(17, len(title)) + 2 for *_, title in columns]

    def line(label, cells):
        print0(f"{label:38}" + "".join(f"{c:>{width}}" for c, width in zip(cells, widths)))

    def share_line(label, shares):
        line(label, map(show_share, shares))

    line("", [title for *_, title in columns])

    share_line("micro (all questions)", [r["metrics"][n] for r, n, _ in columns])
    macro = [r["metrics"][n.replace("accuracy", "accuracy_macro")] for r, n, _ in columns]
    share_line("macro (mean of subjects)", macro)
    for dimension in ("category", "subject"):
        for group in first["breakdown"][dimension]:
            share_line(f"  {group}", [r["breakdown"][dimension][group][n] for r, n, _ in columns])
    for record in records:
        print_details(record)


def print_details(record) -> None:
    metrics, protocol, cost = record["metrics"], record["protocol"], record["cost"]
    letters = record["breakdown"]["letter"]
    bias = "  ".join(f"{k} {v['predicted']:.1%}/{v['gold']:.1%}" for k, v in letters.items())
    print0(f"{column_of(record)}: letters predicted/gold  {bias}")
    if "ece" in metrics:
        print0(f"  calibration error {metrics['ece']:.4f}, Brier {metrics['brier']:.4f}")
    if metrics.get("ties"):
        print0(f"  ties between the best two answers, which go to the first: {metrics['ties']:,}")
    if "answered" in metrics:
        print0(f"  gave a letter: {metrics['answered']['value']:.2%}")
    if "accuracy_permuted" in metrics:
        permuted, same = metrics["accuracy_permuted"], metrics["same_answer"]["value"]
        print0(
            f"  over {protocol['permute_choices']} choice orders: {show_share(permuted)}; "
            f"same answer in all of them: {same:.2%}"
        )
    if protocol["shortened"] or protocol["truncated"]:
        print0(
            f"  context of {protocol['context']}: {protocol['shortened']:,} prompts lost few-shot "
            f"examples, {protocol['truncated']:,} were cut"
        )
    speed = f"{cost['tokens_per_second']:,.0f} tokens/s"
    mfu = "" if cost["mfu"] is None else f", {cost['mfu']:.1%} of the arithmetic limit"
    print0(
        f"  prepared in {cost['prepare_seconds']:.2f} s, scored in {cost['seconds']:.2f} s: "
        f"{speed}{mfu}"
    )


def print_differences(records, path: Path) -> None:
    """Pairs of columns: how many questions they answer differently, and all of them in a file."""
    lines, questions = [], records[0]["_data"].questions
    for a, b in itertools.combinations(records, 2):
        ours, theirs = a["_arrays"]["predicted"], b["_arrays"]["predicted"]
        ids = np.flatnonzero(ours != theirs)
        print0(f"{column_of(a)} and {column_of(b)} differ on {len(ids):,} questions")
        for i in ids.tolist():
            q = questions[i]
            line = {"id": i, "subject": q.subject, "where": q.where, "gold": LETTERS[q.answer]}
            line |= {column_of(a): letter_or_none(ours[i]), column_of(b): letter_or_none(theirs[i])}
            lines.append(dumps(line) + "\n")
    write_atomic(path, "".join(lines))
    print0(f"differences: {path}")


# ---------------------------------------------------------------------------------------------
# Command line


def parse(argv):
    p = cli.parser(__doc__)
    cli.add_evaluation_flags(p, batch_size=None)
    p.add_argument("--data-path", required=True, help="directory of the set, or one file of it")
    p.add_argument("--num-few-shot", type=int, default=0, metavar="K", help="examples from dev (0)")
    p.add_argument("--template", nargs="+", default=["lm_eval"], help="names or YAML files")
    p.add_argument("--scoring", nargs="+", choices=SCORINGS, help="default: the template's own")
    p.add_argument("--split", choices=("test", "val"), default="test")
    p.add_argument("--subjects", nargs="+", metavar="NAME", help="only these")
    p.add_argument("--limit", type=cli.positive_int, help="so many questions of each subject")
    p.add_argument(
        "--permute-choices",
        type=int,
        default=1,
        metavar="K",
        help="also score rotated choice orders, K in all (at most 4)",
    )
    p.add_argument(
        "--truncate",
        action="store_true",
        help="cut questions that alone exceed the context on the left: no error",
    )
    p.add_argument(
        "--bos",
        choices=("auto", "on", "off"),
        default="auto",
        help="BOS before each prompt; auto: as the tokenizer does by itself",
    )
    p.add_argument("--no-prefix-cache", action="store_true", help="run every prompt whole")
    p.add_argument(
        "--batch-tokens",
        type=cli.positive_int,
        help="padded tokens of a batch at most (32768 on CUDA, 4096 on CPU)",
    )
    p.add_argument("--log-samples", action="store_true", help="keep every question and its scores")
    args = p.parse_args(argv)
    if args.num_few_shot < 0:
        p.error("--num-few-shot must not be negative")
    if args.compile == "on":
        p.error(
            "--compile on: mmlu_eval.py always runs eagerly; compiling costs more than it saves"
        )
    return args


def options_of(args) -> dict:
    """The flags as make_task's options, all but the template and the scoring."""
    return {
        "split": args.split,
        "subjects": args.subjects,
        "limit": args.limit,
        "permute_choices": args.permute_choices,
        "truncate": args.truncate,
        "add_bos": {"auto": None, "on": True, "off": False}[args.bos],
        "prefix_cache": not args.no_prefix_cache,
        "batch_tokens": args.batch_tokens,
        "batch_size": args.batch_size,
    }


def combinations(args) -> list[tuple[str, str]]:
    """The (template, scoring) pairs asked for. Beside others, a scoring that a template has no
    letters for is left out of it; a template that is left with none is an error."""
    pairs = []
    for name in dict.fromkeys(args.template):
        template = load_template(name)
        wanted = dict.fromkeys(args.scoring or template.scorings[:1])
        possible = [(name, scoring) for scoring in wanted if scoring in template.scorings]
        if not possible:
            raise ValueError(
                f"--scoring {' '.join(wanted)} does not go with --template {name}, which shows "
                "no letters: --scoring continuation"
            )
        pairs += possible
    return pairs


def main(argv=None):
    args = parse(argv)
    makers = [TaskMaker(args, template, scoring) for template, scoring in combinations(args)]
    paths = checkpoints.expand_paths(args.checkpoint_path)
    with setup(args.device, args.timeout) as dist, ThreadPoolExecutor(2) as background:
        dtype = cli.resolve_dtype(args, dist.device.type)
        if dtype == "float32":
            torch.set_float32_matmul_precision("highest")
        for path in paths:
            start = time.perf_counter()
            # hashing a large checkpoint takes seconds: beside the scoring, and on one rank only
            info = background.submit(checkpoints.describe, path).result if dist.is_main else None
            name = args.tokenizer_name or checkpoints.find_tokenizer(path) or "gpt2"
            tokenizer, shape = build_tokenizer(name), checkpoints.shape_of(path)
            tasks = [maker.make(tokenizer, shape, dtype, dist.device.type) for maker in makers]
            # questions become tokens while the weights come from the disk
            prepared = background.submit(lambda tasks=tasks: [task.prepared for task in tasks])
            model = checkpoints.load_model(path, dtype, dist.device)
            prepared.result()
            load_seconds = time.perf_counter() - start
            run = args.run_name or Path(path).resolve().parent.name or "checkpoints"
            records = [run_task(model, task, dist, info, run) for task in tasks]
            for record in records:
                record["cost"]["load_seconds"] = load_seconds
            if dist.is_main:
                save_and_print(records, args)
            del model


def save_and_print(records, args) -> None:
    print_table(records)
    for record in records:
        samples = record["_samples"]() if args.log_samples else None
        path = save_record(args.results_dir, record, record["_arrays"], samples)
        print0(f"record: {path}")
    if len(records) > 1:
        print_differences(records, path.with_name(f"mmlu-differences-{path.stem[-8:]}.jsonl"))


if __name__ == "__main__":
    cli.run(main)
