"""MMLU and other four-choice sets, scored as lm-evaluation-harness scores them.

    python mmlu_eval.py --checkpoint-path checkpoints/checkpoint-1000 --data-path data/mmlu \\
        --num-few-shot 5
    torchrun --nproc-per-node=8 mmlu_eval.py --checkpoint-path checkpoints --data-path data/mmlu \\
        --num-few-shot 5 --template lm_eval continuation --log-samples

    from mmlu_eval import evaluate_mmlu
    result = evaluate_mmlu(model, tokenizer, "data/mmlu", num_few_shot=5)
    result["metrics"]["accuracy"]            # {"value": ..., "stderr": ..., "n": 14042}

Questions and templates are read by tasks/questions.py and become rows of tokens in
tasks/prompts.py. A subject's few-shot examples are run once and their keys and values shared by all
its questions (backends/continuations.py). tasks/choices.py counts the answers. Guessing gives 25%;
Llama-2-7B's published score is 45.3% (5-shot).
"""

import functools
import hashlib
import itertools
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import cli
import command
import evaluation
import stats
from backends import Backend, Facts, Sampling
from cli import printable
from durable import dumps, write_atomic
from evaluation import Evaluation, Folder, Outcome, Plan, Result
from tasks.choices import (
    Answers,
    examples_of,
    first_letter,
    letter_or_none,
    make_samples,
    summarise,
)
from tasks.prompts import MAX_NEW_TOKENS, PromptMaker, Prompts
from tasks.questions import (
    LETTERS,
    SCORINGS,
    QuestionSet,
    load_template,
    read_data,
)

BATCH_TOKENS = {"cuda": 32768, "cpu": 4096}  # padded tokens of a batch

# ---------------------------------------------------------------------------------------------
# Options


@dataclass(frozen=True)
class Options:
    """What is asked and how: flags, YAML keys and keywords."""

    data_path: str = cli.option("", "directory of the set, or one file of it", metavar="PATH")
    num_few_shot: int = cli.option(0, "examples from dev (0)", type=int, metavar="K")
    template: tuple[str, ...] = cli.option(("lm_eval",), "names or YAML files", nargs="+")
    scoring: tuple[str, ...] = cli.option(
        (), "default: the template's own", nargs="+", choices=SCORINGS
    )
    split: str = cli.option("test", "what is asked", choices=("test", "val"))
    subjects: tuple[str, ...] = cli.option((), "only these", nargs="+", metavar="NAME")
    limit: int | None = cli.option(
        None, "so many questions of each subject: not a score", type=cli.positive_int
    )
    permute_choices: int = cli.option(
        1, "also score rotated choice orders, K in all (at most 4)", type=int, metavar="K"
    )
    truncate: bool = cli.option(
        False, "cut questions that alone exceed the context on the left: no error"
    )
    bos: str = evaluation.bos_option()
    no_prefix_cache: bool = cli.option(
        False, "run every prompt whole (as --scoring generate always does)"
    )
    batch_tokens: int | None = cli.option(
        None,
        "padded tokens of a batch at most (32768 on CUDA, 4096 on CPU); not of --scoring generate",
        type=cli.positive_int,
    )
    batch_size: int | None = cli.option(None, "rows of a batch at most", type=cli.positive_int)

    def __post_init__(self):
        if not self.data_path:
            raise ValueError("--data-path PATH is needed: the directory of the set")
        if self.num_few_shot < 0:
            raise ValueError("--num-few-shot must not be negative")
        if not 1 <= self.permute_choices <= len(LETTERS):
            raise ValueError(f"--permute-choices must be 1 to 4, not {self.permute_choices}")


def variants(options: Options) -> list[Options]:
    """One for each template and scoring. Beside others, a scoring that a template has no letters
    for is left out of it; a template that is left with none is an error."""
    found = []
    for name in dict.fromkeys(options.template):
        template = load_template(name)
        wanted = dict.fromkeys(options.scoring or template.scorings[:1])
        possible = [scoring for scoring in wanted if scoring in template.scorings]
        if not possible:
            raise ValueError(
                f"--scoring {' '.join(wanted)} does not go with --template {name}, which shows "
                "no letters: --scoring continuation"
            )
        found += [replace(options, template=(name,), scoring=(scoring,)) for scoring in possible]
    return found


# ---------------------------------------------------------------------------------------------
# Plan: the questions, and the rows of tokens that ask them


@dataclass(frozen=True)
class Asked:
    """The questions of a plan, and how they become rows: made when first asked for, since that
    takes seconds and can go on while weights load."""

    facts: Facts
    data: QuestionSet
    maker: PromptMaker
    share_prefix: bool

    @functools.cached_property
    def prepared(self) -> tuple[Prompts, float]:
        """The prompts, and the seconds that it took to make them."""
        start = time.perf_counter()
        prompts = self.maker.make(self.share_prefix)
        evaluation.check_vocabulary(prompts.rows.highest_token, self.facts)
        return prompts, time.perf_counter() - start


def plan(options: Options, facts: Facts) -> Plan:
    """Reads the questions; of several templates or scorings only the first is planned."""
    template, tokenizer = load_template(options.template[0]), facts.tokenizer
    scoring = options.scoring[0] if options.scoring else template.scorings[0]
    if scoring not in template.scorings:
        raise ValueError(f"template {template.name} shows no letters: --scoring continuation only")
    bos = evaluation.resolve_bos(options.bos, tokenizer)
    generates = scoring == "generate"
    share_prefix = not options.no_prefix_cache and facts.shares_prefixes and not generates
    batch_tokens = None if generates else options.batch_tokens or BATCH_TOKENS.get(facts.device)
    data = read_questions(options)
    protocol = {
        "template": template.name,
        "template_hash": template.hash,
        "scoring": scoring,
        "shots": options.num_few_shot,
        "split": options.split,
        "subjects": sorted(options.subjects) or None,
        "limit": options.limit,
        "permute_choices": options.permute_choices,
        "truncate": options.truncate,
        "bos": bos,
        "context": facts.context,
        "dtype": facts.dtype,
        "tokenizer": tokenizer.name,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "prefix_cache": share_prefix,
        "batch_tokens": batch_tokens,
        "batch_size": options.batch_size,
        "examples_hash": data.examples_hash,
    }
    maker = PromptMaker(
        tokenizer=tokenizer,
        data=data,
        template=template,
        scoring=scoring,
        context=facts.context or sys.maxsize,
        rotations=options.permute_choices,
        truncate=options.truncate,
        bos=bos,
    )
    work = Asked(facts, data, maker, share_prefix)
    about = {"files": data.files, "hash": data.hash, "examples_hash": data.examples_hash}
    return Plan(protocol, about, work, words_of(protocol), prepare=lambda: work.prepared)


def read_questions(options: Options) -> QuestionSet:
    subjects = list(options.subjects) or None
    return read_data(
        options.data_path, options.num_few_shot, options.split, subjects, options.limit
    )


def words_of(protocol: dict) -> tuple[str, ...]:
    subjects, limit = protocol["subjects"], protocol["limit"]
    return (
        protocol["template"],
        protocol["scoring"],
        f"{protocol['shots']}-shot",
        *(["BOS"] if protocol["bos"] else []),
        protocol["dtype"],
        *([f"{len(subjects)} subjects only: not a score"] if subjects else []),
        *([f"limit {limit}: not a score"] if limit else []),
    )


# ---------------------------------------------------------------------------------------------
# Scores


def answer(backend: Backend, prompts: Prompts, protocol: dict) -> Answers:
    """Every prompt asked, in the way that the protocol says."""
    if protocol["scoring"] == "generate":
        return generate_answers(backend, prompts, protocol["batch_size"])
    rows = prompts.rows
    found = backend.score_rows(rows, protocol["batch_tokens"], protocol["batch_size"])
    scores = np.zeros((*prompts.shots.shape, len(LETTERS)))
    if rows.choice_ids:
        scores[prompts.question, prompts.rotation] = found.choices + found.targets[:, None]
    else:
        scores[prompts.question, prompts.rotation, prompts.choice] = found.targets
    return Answers(scores.argmax(-1), scores)


def generate_answers(backend: Backend, prompts: Prompts, batch_size: int | None) -> Answers:
    """The first letter that stands alone in MAX_NEW_TOKENS greedy tokens, before a blank line."""
    tokenizer, mine = backend.facts.tokenizer, []
    ids = [row.tolist() for row in prompts.rows.ids]
    greedy = Sampling(max_new_tokens=MAX_NEW_TOKENS, seed=0)
    with cli.progress(len(ids), "mmlu", "row") as bar:
        for sample in backend.generate(ids, greedy, batch_size=batch_size):
            mine.append((sample.prompt_index, tokenizer.decode(sample.token_ids)))
            bar.update(1)
    texts = np.full(prompts.shots.shape, "", dtype=object)
    for row, text in itertools.chain.from_iterable(backend.dist.gather(mine)):
        texts[prompts.question[row], prompts.rotation[row]] = text
    return Answers(np.vectorize(first_letter, otypes=[np.int64])(texts), texts=texts)


# ---------------------------------------------------------------------------------------------
# Run, and what the answers amount to


def run(backend: Backend, plan: Plan, folder: Folder) -> Outcome:
    """Score every question; arrays hold an entry for each, of the choices as they are listed."""
    protocol, data = plan.protocol, plan.work.data
    prompts, prepare_seconds = plan.work.prepared
    answers = answer(backend, prompts, protocol)
    rotation = np.arange(protocol["permute_choices"])
    gold = (np.array([[q.answer] for q in data.questions]) - rotation) % len(LETTERS)
    metrics, breakdown, arrays = summarise(data, protocol["scoring"], answers, gold)
    generates = protocol["scoring"] == "generate"
    return Outcome(
        metrics=metrics,
        breakdown=breakdown,
        arrays=arrays,
        examples=examples_of(arrays),
        protocol={
            "subjects": len(data.subjects) if protocol["subjects"] else None,
            "letter_ids": prompts.rows.choice_ids,
            "max_new_tokens": MAX_NEW_TOKENS if generates else None,
            "truncated": prompts.truncated,
            "shortened": int((prompts.shots < protocol["shots"]).sum()),
            "shots_kept": np.bincount(prompts.shots.ravel()).tolist(),  # prompts by examples kept
        },
        data={"tokens": prompts.rows.unique_tokens()},
        cost={"prepare_seconds": prepare_seconds},
        samples=functools.partial(make_samples, data, prompts, answers, gold),
        shown=data,
    )


# ---------------------------------------------------------------------------------------------
# Output


def column_of(record: Result) -> str:
    return f"{record['protocol']['template']}/{record['protocol']['scoring']}"


def show(records: list[Result]) -> None:
    """All records of a checkpoint, side by side, and where they lie."""
    print_accuracies(records)
    for record in records:
        print_details(record)
    for record in records:
        print(f"record: {record.place}")
    if len(records) > 1:
        print_differences(records)


def print_accuracies(records: list[Result]) -> None:
    """Accuracy overall, by category and by subject, one column for each record of a checkpoint."""
    first = records[0]
    data, protocol = first.shown, first["protocol"]
    print(
        f"\n{printable(first['checkpoint']['name'])}: {len(data.questions):,} questions of "
        f"{len(data.subjects)} subjects, {protocol['shots']}-shot"
    )
    if protocol["limit"] or protocol["subjects"]:
        print("A PART OF THE QUESTIONS (--limit, --subjects): not a score of the set")
    names = ["accuracy", "accuracy_normalised"]
    columns = [
        (r, n, column_of(r) + ("/norm" if n != "accuracy" else ""))
        for r in records
        for n in names
        if n in r["metrics"]
    ]
    widths = [max(17, len(title)) + 2 for *_, title in columns]

    def line(label, cells):
        print(f"{label:38}" + "".join(f"{c:>{width}}" for c, width in zip(cells, widths)))

    def share_line(label, shares):
        line(label, map(stats.show_share, shares))

    line("", [title for *_, title in columns])

    share_line("micro (all questions)", [r["metrics"][n] for r, n, _ in columns])
    macro = [r["metrics"][n.replace("accuracy", "accuracy_macro")] for r, n, _ in columns]
    share_line("macro (mean of subjects)", macro)
    for dimension in ("category", "subject"):
        for group in first["breakdown"][dimension]:
            shares = [r["breakdown"][dimension][group][n] for r, n, _ in columns]
            share_line(f"  {printable(group)}", shares)


def print_details(record: Result) -> None:
    metrics, protocol, cost = record["metrics"], record["protocol"], record["cost"]
    letters = record["breakdown"]["letter"]
    bias = "  ".join(f"{k} {v['predicted']:.1%}/{v['gold']:.1%}" for k, v in letters.items())
    print(f"{column_of(record)}: letters predicted/gold  {bias}")
    if "ece" in metrics:
        ece, brier = metrics["ece"]["value"], metrics["brier"]["value"]
        print(f"  calibration error {ece:.4f}, Brier {brier:.4f}")
    ties = metrics.get("ties", {}).get("value")
    if ties:
        print(f"  ties between the best two answers, which go to the first: {ties:,}")
    if "answered" in metrics:
        print(f"  gave a letter: {metrics['answered']['value']:.2%}")
    if "accuracy_permuted" in metrics:
        permuted, same = metrics["accuracy_permuted"], metrics["same_answer"]["value"]
        print(
            f"  over {protocol['permute_choices']} choice orders: {stats.show_share(permuted)}; "
            f"same answer in all of them: {same:.2%}"
        )
    if protocol["shortened"] or protocol["truncated"]:
        print(
            f"  context of {protocol['context']}: {protocol['shortened']:,} prompts lost few-shot "
            f"examples, {protocol['truncated']:,} were cut"
        )
    speed = f"{cost['tokens_per_second']:,.0f} tokens/s"
    mfu = "" if cost.get("mfu") is None else f", {cost['mfu']:.1%} of the arithmetic limit"
    print(
        f"  prepared in {cost['prepare_seconds']:.2f} s, scored in {cost['seconds']:.2f} s: "
        f"{speed}{mfu}"
    )


def print_differences(records: list[Result]) -> None:
    """How many questions pairs of columns answer differently, and all of them in a file beside the
    records, which is named by theirs."""
    pairs = list(itertools.combinations(records, 2))
    found = [differences(a, b) for a, b in pairs]
    place, paths = "not saved", [record.path for record in records if record.path]
    if len(paths) == len(records):
        digest = hashlib.sha256(" ".join(path.name for path in paths).encode()).hexdigest()
        file = paths[0].with_name(f"mmlu-differences-{digest[:8]}.jsonl")
        write_atomic(file, "".join(dumps(line) + "\n" for lines in found for line in lines))
        place = str(file)
    for (a, b), lines in zip(pairs, found):
        print(f"{column_of(a)} and {column_of(b)} differ on {len(lines):,} questions")
    print(f"differences: {printable(place)}")


def differences(a: Result, b: Result) -> list[dict]:
    """What is said of each question that the two answer differently."""
    lines, questions = [], a.shown.questions
    ours, theirs = a.arrays["predicted"], b.arrays["predicted"]
    for i in np.flatnonzero(ours != theirs).tolist():
        q = questions[i]
        line = {"id": i, "subject": q.subject, "where": q.where, "gold": LETTERS[q.answer]}
        answers = {column_of(a): letter_or_none(ours[i]), column_of(b): letter_or_none(theirs[i])}
        lines.append(line | answers)
    return lines


# ---------------------------------------------------------------------------------------------
# The evaluation

MMLU = Evaluation(
    name="mmlu",
    script=__file__,
    Options=Options,
    plan=plan,
    run=run,
    show=show,
    check=read_questions,
    variants=variants,
)


def evaluate_mmlu(
    model: Any, tokenizer: Any, data_path: str | Path, num_few_shot: int = 0, **options
) -> Result:
    """results.py's record of a model on a four-choice set; see tasks.questions.read_data.

    options: Options' fields (`template` and `scoring` one each, as a text). Also dist, info and
    run: see Evaluation.
    """
    for name in ("template", "scoring"):
        if isinstance(options.get(name), str):
            options[name] = (options[name],)
    return MMLU(model, tokenizer, data_path=data_path, num_few_shot=num_few_shot, **options)


def main(argv=None):
    command.main(MMLU, argv, __doc__)


if __name__ == "__main__":
    cli.run(main)
