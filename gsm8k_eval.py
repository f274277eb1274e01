"""GSM8K and MGSM: word problems solved in writing, scored by the number in the end.

    python gsm8k_eval.py --checkpoint-path checkpoints/checkpoint-1000 --data-path data/gsm8k
    torchrun --nproc-per-node=8 gsm8k_eval.py --checkpoint-path checkpoints \\
        --data-path data/gsm8k --prompt gsm8k_cot --num-samples 40 --temperature 0.7 --k 8 40
    python gsm8k_eval.py --checkpoint-path checkpoints/checkpoint-1000 --data-path data/mgsm \\
        --prompt mgsm_native_cot --languages de sw
    python gsm8k_eval.py --checkpoint-path checkpoints/an-instruct-model --data-path data/gsm8k \\
        --prompt gsm8k_cot_llama --chat-template

    from gsm8k_eval import evaluate_gsm8k
    record = evaluate_gsm8k(model, tokenizer, "data/gsm8k")
    record["metrics"]["accuracy"]            # {"value": ..., "stderr": ..., "n": 1319}

Three verdicts on every sample: lm-evaluation-harness's `strict_match` and `flexible_extract`, to
the letter, and `accuracy`, which reads numbers as people do (tasks/answers.py). Where they differ
much, the form of the answers is what was measured. With several samples: pass@k, and maj@k, the
chance that the commonest answer of k samples is right (self-consistency, Wang et al. 2022), whose
share of the votes is a confidence with a calibration of its own. --p-true gives another: the model
is asked whether the solution that has most votes is right (tasks/p_true.py). The examples before a
question are the same for all of them; lm-eval draws others for each. Cobbe et al., "Training
Verifiers to Solve Math Word Problems" (2021); Shi et al., "Language Models are Multilingual
Chain-of-Thought Reasoners" (2022). Published, 8 shots: DeepSeekMath-Base 7B 64.2%, Llama-2-7B
14.6%.
"""

from collections import Counter
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import installed  # noqa: F401

import numpy as np

import cli
import command
import evaluation
import results
import stats
from backends import Backend, CacheOptions, Facts, Sampling
from evaluation import Evaluation, Folder, Outcome, Plan, Result
from tasks import answers, drawing, p_true
from tasks import confidence as sure
from tasks.chat import Chat, ChatOptions, ends_of, open_chat, starts_with_bos
from tasks.templates import load_template
from tasks.word_problems import Problem, Prompt, data_hash, load_prompt, read_problems

VERDICTS = ("accuracy", "strict_match", "flexible_extract")
CONFIDENCES = {"vote_": "share of the votes", "p_true_": "P(True)"}  # by prefix of their metrics
VOTE_KS = (8, 40)  # of pass@k and maj@k, where there are more samples

# ---------------------------------------------------------------------------------------------
# Options


@dataclass(frozen=True)
class Options:
    """What is asked, and how it is drawn: flags, YAML keys and keywords."""

    data_path: str = cli.option("", "directory of GSM8K or MGSM, or one file", metavar="PATH")
    prompt: str = cli.option("gsm8k", "a name in configs/word_problems, or a YAML file (gsm8k)")
    num_few_shot: int | None = cli.option(
        None, "examples before each question (the prompt's own number)", type=int, metavar="K"
    )
    chat: ChatOptions = ChatOptions()  # noqa: RUF009
    languages: tuple[str, ...] = cli.option((), "of MGSM: only these", nargs="+", metavar="LANG")
    num_samples: int = cli.option(1, "solutions of each problem (1)", type=cli.positive_int)
    sampling: Sampling = Sampling(max_new_tokens=256)  # noqa: RUF009
    k: tuple[int, ...] = cli.option(
        (), "of pass@k and maj@k (8, 40 and all)", type=cli.positive_int, nargs="+"
    )
    p_true: bool = cli.option(
        False, "ask of each answer whether it is right: P(True), a confidence of its own"
    )
    bos: str = evaluation.bos_option()
    limit: int | None = cli.option(
        None, "the first so many problems of a file: not a score", type=cli.positive_int
    )
    batch_size: int | None = cli.option(
        None, "rows drawn at a time (what memory holds)", type=cli.positive_int
    )
    compile: str = evaluation.compile_option()
    cache: CacheOptions = CacheOptions()  # noqa: RUF009

    def __post_init__(self):
        if not self.data_path:
            raise ValueError("--data-path PATH is needed: data/gsm8k, say")
        if self.num_few_shot is not None and self.num_few_shot < 0:
            raise ValueError("--num-few-shot must not be negative")
        if self.num_samples > 1 and not self.sampling.temperature:
            raise ValueError(
                f"--num-samples {self.num_samples} at temperature 0 would be equal samples: give "
                "a --temperature (0.7, say)"
            )

    @property
    def ks(self) -> list[int]:
        """The k of pass@k and maj@k: those asked for, else what so many samples allow."""
        for k in self.k:
            if k > self.num_samples:
                raise ValueError(f"--k {k} needs at least {k} samples: --num-samples {k}")
        usual = [k for k in VOTE_KS if k < self.num_samples] + [self.num_samples]
        return sorted(set(self.k or usual) - {1})  # pass@1 is accuracy, and so is maj@1


def check(options: Options) -> None:
    """Problems, a prompt in their languages, and examples for it."""
    prompt, _ = load_prompt(options.prompt), options.ks
    for problem in read_problems(options.data_path, options.languages, options.limit):
        prompt.of_language(problem.language)
    prompt.shots_of(options.data_path, options.num_few_shot)


# ---------------------------------------------------------------------------------------------
# Plan: the problems, and their prompts as tokens


@dataclass(frozen=True)
class Work:
    options: Options
    problems: list[Problem]
    prompt: Prompt
    asked: drawing.Asked
    bos: bool
    chat: Chat | None


def plan(options: Options, facts: Facts) -> Plan:
    tokenizer, sampling, _ = facts.tokenizer, options.sampling, options.ks
    bos = evaluation.resolve_bos(options.bos, tokenizer)
    prompt = load_prompt(options.prompt)
    problems = read_problems(options.data_path, options.languages, options.limit)
    shots = prompt.shots_of(options.data_path, options.num_few_shot)
    chat = open_chat(options.chat, tokenizer)
    names = [p.name for p in problems]
    texts = [prompt.render(p, shots, chat) for p in problems]
    prompts = drawing.encode_prompts(tokenizer, names, texts, bos, by_template=bool(chat))
    evaluation.check_vocabulary(max(map(max, prompts)), facts)
    # a stop string of any of the languages ends a sample: which is asked decides nothing else
    own = [prompt.of_language(p.language).stop for p in problems]
    ends = ends_of(chat)
    samplings = [replace(sampling, stop=(sampling.stop or stop) + ends) for stop in own]
    stop = sorted({text for s in samplings for text in s.stop})
    protocol = {
        "prompt": prompt.name,
        "prompt_hash": prompt.hash,
        "num_few_shot": len(shots),
        "few_shot": "the first of the file, for every question",
        **(chat.protocol if chat else {}),
        "num_samples": options.num_samples,
        "k": options.ks,
        **sampling.protocol,
        "stop": stop,
        "bos": starts_with_bos(tokenizer, prompts),
        "languages": sorted({p.language for p in problems}),
        "limit": options.limit,
        "batch_size": options.batch_size,
        "compile": options.compile,
        **options.cache.protocol,
        **facts.protocol,
        **({"p_true": load_template("p_true").hash} if options.p_true else {}),
    }
    if options.p_true:  # what no tokens can ask is known before anything is drawn
        p_true.make_prompts(facts, p_true.questions_on([("?", "?", True, "")]), bos, chat)
    data = {
        "files": sorted({Path(p.where.rpartition(":")[0]).name for p in problems}),
        "hash": data_hash([*shots, *problems]),
        "problems": len(problems),
        **({"first_prompt": texts[0]} if chat else {}),
    }
    asked = drawing.Asked(names, prompts, samplings, options.num_samples, options.batch_size)
    words = words_of(protocol, chat.words if chat else ())
    return Plan(protocol, data, Work(options, problems, prompt, asked, bos, chat), words)


def words_of(protocol: dict, of_chat: tuple[str, ...] = ()) -> tuple[str, ...]:
    return (
        protocol["prompt"],
        f"{protocol['num_few_shot']} shots",
        *of_chat,
        *([] if protocol["num_samples"] == 1 else [f"{protocol['num_samples']} samples"]),
        drawing.how_drawn(protocol),
        *evaluation.closing_words(protocol),
    )


# ---------------------------------------------------------------------------------------------
# Run: solutions are drawn, then read


def run(backend: Backend, plan: Plan, folder: Folder) -> Outcome:
    work = plan.work
    entries, resumed = drawing.draw_all(backend, work.asked, folder, "gsm8k")
    n, P = work.options.num_samples, len(work.problems)
    read = [_read(entry, work.prompt, work.problems[i // n]) for i, entry in enumerate(entries)]
    # [problems, samples]
    verdicts = {name: np.array([r[name] for r in read]).reshape(P, n) for name in VERDICTS}
    values = [[r["number"] for r in read[i * n : (i + 1) * n]] for i in range(P)]
    arrays: dict[str, np.ndarray] = {
        name: right.mean(axis=1) if n > 1 else right[:, 0] for name, right in verdicts.items()
    }
    metrics = {name: _mean(arrays[name]) for name in VERDICTS}
    breakdown = _breakdown(work, entries, verdicts, arrays["accuracy"])
    if n > 1:
        golds = [p.gold for p in work.problems]
        voted, measured, drawn_votes = _votes(values, golds, work.options.ks)
        arrays |= voted
        metrics |= measured
        breakdown |= drawn_votes
    drawn, ran = backend.cost(), backend.ran()
    if work.options.p_true:
        told, measured, of_words, cut = _own_word(
            backend, work, entries, values, verdicts["accuracy"]
        )
        arrays |= told
        metrics |= measured
        breakdown |= of_words
        ran |= {"p_true_truncated": cut}
    examples = {
        "unit": "problems",
        "scores": {name: name for name in metrics if name in arrays},
        "labels": {"problem": "{}"},
    }
    if n > 1:
        sure.add_examples(examples, "vote_share", "voted_right", "vote_brier", "vote_")
    if work.options.p_true:
        sure.add_examples(examples, "p_true", "p_true_right", "p_true_brier", "p_true_")
    return Outcome(
        metrics=metrics,
        breakdown=breakdown,
        arrays=arrays,
        examples=examples,
        protocol=ran,
        cost=drawn | {"samples_resumed": resumed},
        samples=lambda: map(_sample, entries, read, (p for p in work.problems for _ in range(n))),
        shown=breakdown,
    )


def _read(entry: dict, prompt: Prompt, problem: Problem) -> dict:
    """What the three rules find in a solution, and whether each takes it for right."""
    text, own = entry["completion"], prompt.of_language(problem.language)
    number = answers.number(text, problem.language)
    strict, flexible = answers.strict(text, own.strict), answers.flexible(text)
    gold = problem.solution if own.punctuation else str(problem.gold)
    return {
        "number": number,
        "strict": strict,
        "flexible": flexible,
        "accuracy": number == problem.gold,
        "strict_match": answers.same_text(strict, gold, own.punctuation),
        "flexible_extract": answers.same_text(flexible, gold, own.punctuation),
    }


def _mean(scores: np.ndarray) -> dict:
    """Over problems; each problem's score is the share of its samples that are right."""
    stderr = stats.mean_stderr(scores)
    return results.metric(float(scores.mean()), stderr, len(scores), "higher", "share")


def _breakdown(work: Work, entries: list[dict], verdicts: dict, accuracy: np.ndarray) -> dict:
    right = verdicts["accuracy"]
    found = {
        "finish": dict(Counter(entry["finish"] for entry in entries).most_common()),
        "disagree": {
            name: {
                "right for this rule alone": int((verdicts[name] & ~right).sum()),
                "right but for this rule": int((~verdicts[name] & right).sum()),
            }
            for name in VERDICTS[1:]
        },
    }
    languages = np.array([p.language for p in work.problems])
    if len(set(languages)) > 1:
        found["language"] = {
            str(name): {"accuracy": _mean(accuracy[languages == name])}
            for name in sorted(set(languages))
        }
    return found


def _votes(
    values: list[list[Fraction | None]], golds: list[Fraction], ks: list[int]
) -> tuple[dict, dict, dict]:
    """(arrays, metrics, breakdown) of pass@k, of maj@k, and of the confidence that
    the share of votes is. A sample without a number has no vote, but counts among the samples."""
    n = len(values[0])
    counts = [Counter(v for v in own if v is not None) for own in values]
    right = np.array([count[gold] for count, gold in zip(counts, golds)])
    arrays, metrics = {}, {}
    for k in ks:
        passed = np.asarray(stats.pass_at_k(n, right, k))
        majority = np.array([_majority(count, gold, n, k) for count, gold in zip(counts, golds)])
        arrays |= {f"pass@{k}": passed, f"maj@{k}": majority}
        metrics |= {f"pass@{k}": _mean(passed), f"maj@{k}": _mean(majority)}
    # the commonest answer, the first drawn among equals
    best = [count.most_common(1) for count in counts]  # [(answer, votes)], or nothing
    confidence = np.array([top[0][1] / n if top else 0.0 for top in best])
    is_right = np.array([bool(top) and top[0][0] == gold for top, gold in zip(best, golds)])
    own, drawn, brier = sure.measured(confidence, is_right, "vote_")
    arrays |= {"vote_share": confidence, "voted_right": is_right, "vote_brier": brier}
    return arrays, metrics | own, drawn


def _majority(count: Counter, gold: Fraction, n: int, k: int) -> float:
    wrong = [votes for answer, votes in count.items() if answer != gold]
    return stats.majority_at_k(count[gold], wrong, n - count.total(), k)


def _own_word(
    backend: Backend,
    work: Work,
    entries: list[dict],
    values: list[list[Fraction | None]],
    right: np.ndarray,
) -> tuple[dict, dict, dict, int]:
    """(arrays, metrics, breakdown, prompts that were cut) of P(True), asked of one solution of each
    problem: the first that ends in the commonest answer. right: [problems, samples]."""
    chosen = []
    for own in values:
        votes = Counter(v for v in own if v is not None).most_common(1)
        chosen.append(own.index(votes[0][0]) if votes else 0)
    n, is_right = right.shape[1], right[np.arange(len(right)), chosen]
    solutions = [
        (problem.question, entries[i * n + sample]["completion"], bool(ok), problem.where)
        for i, (problem, sample, ok) in enumerate(zip(work.problems, chosen, is_right))
    ]
    asked = p_true.questions_on(solutions)
    prompts = p_true.make_prompts(backend.facts, asked, work.bos, work.chat)
    p = p_true.probability_of_true(backend, prompts)
    metrics, breakdown, brier = sure.measured(p, is_right, "p_true_")
    arrays = {"p_true": p, "p_true_right": is_right, "p_true_brier": brier}
    return arrays | {"p_true_sample": np.array(chosen)}, metrics, breakdown, prompts.truncated


def _sample(entry: dict, read: dict, problem: Problem) -> dict:
    """A line beside the record."""
    number = None if read["number"] is None else str(read["number"])
    return (
        {"id": problem.name, "question": problem.question, "gold": str(problem.gold)}
        | {name: entry[name] for name in ("sample", "completion", "finish", "tokens")}
        | read
        | {"number": number}
    )


# ---------------------------------------------------------------------------------------------
# Output


def show(records: list[Result]) -> None:
    for record in records:
        print_record(record)


def print_record(record: Result) -> None:
    protocol, parts = record["protocol"], record.shown
    n = record["data"]["problems"] * protocol["num_samples"]
    command.print_head(record, record["data"]["problems"], "problems")
    metrics = record["metrics"]
    for name in shares_of(metrics):
        print(f"  {name:<18} {stats.show_share(metrics[name])}")
    for prefix, words in CONFIDENCES.items():
        if f"{prefix}ece" in metrics:
            print(f"  {words}: {sure.show_figures(metrics, prefix)}")
    for name, split in parts.get("language", {}).items():
        print(f"    {name:<16} {stats.show_share(split['accuracy'])}")
    for name, counts in parts["disagree"].items():
        alone, missed = counts.values()
        print(f"  {name} alone calls {alone:,} of {n:,} right, and {missed:,} right ones wrong")
    cut = parts["finish"].get("length", 0)
    if cut:
        print(f"  {cut:,} of {n:,} solutions were cut off at {protocol['max_new_tokens']} tokens")
    command.print_drawn(record)


def print_table(records: list[dict]) -> None:
    command.print_shares(records, shares_of(records[0]["metrics"]), 22)


def shares_of(metrics: dict) -> list[str]:
    return [name for name in metrics if not name.startswith(tuple(CONFIDENCES))]


# ---------------------------------------------------------------------------------------------
# The evaluation

GSM8K = Evaluation(
    name="gsm8k",
    script=__file__,
    Options=Options,
    plan=plan,
    run=run,
    show=show,
    table=print_table,
    check=check,
)


def evaluate_gsm8k(
    model: Any, tokenizer: Any, data_path: str | Path, num_samples: int = 1, **options
) -> Result:
    """Draw `num_samples` solutions of each problem, score them, and return results.py's record.

    options: Options' and Sampling's fields. Also dist, info, run and results_dir (then an
    interrupted evaluation goes on where it stopped): see Evaluation. ValueError for k >
    num_samples, bad values, and prompts beyond the context.
    """
    return GSM8K(model, tokenizer, data_path=data_path, num_samples=num_samples, **options)


def main(argv=None):
    command.main(GSM8K, argv, __doc__)


if __name__ == "__main__":
    cli.run(main)
