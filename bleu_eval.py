"""Translation, and any text with references: BLEU, chrF, chrF++ and TER, by sacrebleu.

    python bleu_eval.py --checkpoint-path checkpoints/checkpoint-1000 \\
        --data-path wmt22.en-de.jsonl --source-lang en --target-lang de
    torchrun --nproc-per-node=8 bleu_eval.py --checkpoint-path checkpoints --data-path src.txt \\
        --references ref.txt ref2.txt --source-lang en --target-lang zh --num-few-shot 5
    python bleu_eval.py --checkpoint-path checkpoints/checkpoint-1000 --prompt text_to_text \\
        --data-path summaries.jsonl --fields article summary --target-lang en

    from bleu_eval import evaluate_bleu
    record = evaluate_bleu(model, tokenizer, "test.jsonl", source_lang="en", target_lang="de")
    record["metrics"]["bleu"]        # {"value": 27.3, "stderr": 0.4, "low": 26.5, "high": ...}

One hypothesis a segment, greedy unless --temperature says otherwise, up to a stop string, in one
line. Scores are of the whole corpus, their errors from a bootstrap over segments: what each segment
counts is kept, so that `report.py --compare` resamples both sides together, as sacrebleu's paired
bootstrap does. BLEU's tokenizer goes by the target language: 13a on Chinese or Thai would find 0.
sacrebleu's signatures say it all. The examples before a segment are the same for all: the first of
--few-shot-path, else of the set itself, which then are not scored. Post, "A Call for Clarity in
Reporting BLEU Scores" (2018). WMT14 English-French, GPT-3 175B few-shot: BLEU 32.6.
"""

import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import installed  # noqa: F401

import numpy as np

import cli
import command
import evaluation
import resampling
import results
from backends import Backend, CacheOptions, Facts, Sampling
from evaluation import Evaluation, Folder, Outcome, Plan, Result
from tasks import corpus_scores, drawing
from tasks.chat import ChatOptions, ends_of, open_chat, starts_with_bos
from tasks.translation import (
    FIELDS,
    Language,
    Prompt,
    Segment,
    data_hash,
    load_prompt,
    read_segments,
)

METRICS = tuple(corpus_scores.METRICS)
COUNTS = {"bleu": 10, "chrf": 18, "chrf++": 24, "ter": 2}  # of a segment

# ---------------------------------------------------------------------------------------------
# Options


@dataclass(frozen=True)
class Options:
    """What is asked, how it is drawn, and by what it is scored: flags, YAML keys and keywords."""

    data_path: str = cli.option("", "JSON lines, a TSV, or a text of sources", metavar="PATH")
    references: tuple[str, ...] = cli.option(
        (), "texts parallel to --data-path, line by line", nargs="+", metavar="FILE"
    )
    fields: tuple[str, ...] = cli.option(
        FIELDS, "of JSON lines: source and reference(s) (source reference)", nargs=2, metavar="NAME"
    )
    source_lang: str = cli.option("", "a code: de; or de=German", metavar="CODE")
    target_lang: str = cli.option("", "decides BLEU's tokenizer, too", metavar="CODE")
    prompt: str = cli.option("lm_eval", "a name in configs/translation, or a YAML file (lm_eval)")
    num_few_shot: int | None = cli.option(
        None, "examples before each segment (the prompt's own number)", type=int, metavar="K"
    )
    few_shot_path: str | None = cli.option(
        None, "where they come from, as --data-path (its first ones, not scored)", metavar="PATH"
    )
    few_shot_references: tuple[str, ...] = cli.option(
        (), "texts parallel to --few-shot-path", nargs="+", metavar="FILE"
    )
    metrics: tuple[str, ...] = cli.option(METRICS, "(all)", nargs="+", choices=METRICS)
    tokenize: str = cli.option(
        "auto",
        "BLEU's tokenizer (auto: by the target language)",
        choices=("auto", *corpus_scores.TOKENIZERS),
    )
    chat: ChatOptions = ChatOptions()  # noqa: RUF009
    sampling: Sampling = Sampling(max_new_tokens=256)  # noqa: RUF009
    bos: str = evaluation.bos_option()
    limit: int | None = cli.option(
        None, "the first so many segments: not a score", type=cli.positive_int
    )
    batch_size: int | None = cli.option(
        None, "rows drawn at a time (what memory holds)", type=cli.positive_int
    )
    compile: str = evaluation.compile_option()
    cache: CacheOptions = CacheOptions()  # noqa: RUF009

    def __post_init__(self):
        if not self.data_path:
            raise ValueError("--data-path PATH is needed: a .jsonl or .tsv file, or src.txt")
        if self.num_few_shot is not None and self.num_few_shot < 0:
            raise ValueError("--num-few-shot must not be negative")
        if self.few_shot_references and not self.few_shot_path:
            raise ValueError("--few-shot-references needs --few-shot-path, to which it is parallel")
        if not self.target_lang and "bleu" in self.metrics and self.tokenize == "auto":
            raise ValueError(
                "--target-lang CODE is needed: BLEU's tokenizer goes by it (or --tokenize 13a)"
            )


@dataclass(frozen=True)
class Task:
    """What is asked, whatever the model. why: a word on BLEU's tokenizer, where it is not the one
    that sacrebleu would take."""

    prompt: Prompt
    shots: list[Segment]
    segments: list[Segment]
    source: Language
    target: Language
    tokenizer: str
    why: str
    metrics: dict[str, Any]  # sacrebleu's


def read_task(options: Options) -> Task:
    """Segments, examples, languages and metrics; ValueError for what does not go together."""
    prompt = load_prompt(options.prompt)
    source = _language(options.source_lang, "--source-lang", prompt)
    target = _language(options.target_lang, "--target-lang", prompt)
    tokenizer, why = options.tokenize, ""
    if tokenizer == "auto":
        tokenizer, why = corpus_scores.tokenizer_for(target.code)
    n = prompt.num_few_shot if options.num_few_shot is None else options.num_few_shot
    own = n if options.few_shot_path is None else 0  # examples that the set itself gives
    limit = None if options.limit is None else options.limit + own
    found = read_segments(options.data_path, options.references, options.fields, limit)
    shots, segments = found[:own], found[own:]
    if options.few_shot_path is not None and n:
        path, others = options.few_shot_path, options.few_shot_references
        shots = read_segments(path, others, options.fields, n)
        if len(shots) < n:
            raise ValueError(f"{path}: {len(shots)} examples, --num-few-shot {n} asked for")
    if not segments:
        raise ValueError(
            f"{options.data_path}: {len(found)} segments, of which {n} are examples: none is left "
            "to score (--num-few-shot, --few-shot-path)"
        )
    metrics = corpus_scores.metrics_of(options.metrics, tokenizer, target.code)
    return Task(prompt, shots, segments, source, target, tokenizer, why, metrics)


def _language(text: str, flag: str, prompt: Prompt) -> Language:
    if not text and prompt.names_languages:
        raise ValueError(f"prompt {prompt.name} names the languages: {flag} CODE is needed")
    return Language.of(text, flag) if text else Language("", "")


# ---------------------------------------------------------------------------------------------
# Plan: the segments, and their prompts as tokens


@dataclass(frozen=True)
class Work:
    task: Task
    asked: drawing.Asked


def plan(options: Options, facts: Facts) -> Plan:
    tokenizer, sampling, task = facts.tokenizer, options.sampling, read_task(options)
    bos = evaluation.resolve_bos(options.bos, tokenizer)
    names = [s.name for s in task.segments]
    languages, chat = (task.source.name, task.target.name), open_chat(options.chat, tokenizer)
    texts = [task.prompt.render(s, task.shots, *languages, chat) for s in task.segments]
    prompts = drawing.encode_prompts(tokenizer, names, texts, bos, by_template=bool(chat))
    evaluation.check_vocabulary(max(map(max, prompts)), facts)
    stop = (sampling.stop or task.prompt.stop) + ends_of(chat)
    sampling = replace(sampling, stop=stop)
    references = [s.references for s in task.segments]
    scored_by = {
        name: corpus_scores.signature(metric, references) for name, metric in task.metrics.items()
    }
    protocol = {
        "prompt": task.prompt.name,
        "prompt_hash": task.prompt.hash,
        "num_few_shot": len(task.shots),
        "few_shot": _origin(options, task),
        "examples_hash": data_hash(task.shots),
        **(chat.protocol if chat else {}),
        "source_language": task.source.code or None,
        "target_language": task.target.code or None,
        "signatures": scored_by,
        "resamples": resampling.RESAMPLES,
        "resampling_seed": resampling.SEED,
        **sampling.protocol,
        "stop": sorted(sampling.stop),
        "bos": starts_with_bos(tokenizer, prompts),
        "limit": options.limit,
        "batch_size": options.batch_size,
        "compile": options.compile,
        **options.cache.protocol,
        **facts.protocol,
    }
    files = [Path(path).name for path in (options.data_path, *options.references)]
    data = {"files": files, "hash": data_hash(task.segments), "segments": len(task.segments)}
    asked = drawing.Asked(names, prompts, sampling, 1, options.batch_size)
    if chat:
        data["first_prompt"] = texts[0]
    words = words_of(protocol, task, chat.words if chat else ())
    return Plan(protocol, data, Work(task, asked), words)


def _origin(options: Options, task: Task) -> str:
    if not task.shots:
        return "none"
    if options.few_shot_path is None:
        return "the first of the set, for every segment; they are not scored"
    return f"the first of {Path(options.few_shot_path).name}, for every segment"


def words_of(protocol: dict, task: Task, of_chat: tuple[str, ...]) -> tuple[str, ...]:
    pair = (task.source.code, task.target.code)
    return (
        *(["-".join(filter(None, pair))] if any(pair) else []),
        protocol["prompt"],
        f"{protocol['num_few_shot']} shots",
        *of_chat,
        *([f"tok:{task.tokenizer}"] if "bleu" in task.metrics else []),
        drawing.how_drawn(protocol),
        *evaluation.closing_words(protocol),
    )


# ---------------------------------------------------------------------------------------------
# Run: hypotheses are drawn, then counted


def run(backend: Backend, plan: Plan, folder: Folder) -> Outcome:
    task = plan.work.task
    entries, resumed = drawing.draw_all(backend, plan.work.asked, folder, "bleu")
    hypotheses = [in_one_line(entry["completion"]) for entry in entries]
    counts = count(backend.dist, task, hypotheses)
    metrics = {name: _measured(name, columns) for name, columns in counts.items()}
    scores = {name: corpus_scores.METRICS[name] for name in metrics}
    return Outcome(
        metrics=metrics,
        breakdown=_breakdown(entries, counts),
        arrays={f"{name}_counts": columns for name, columns in counts.items()},
        examples={
            "unit": "segments",
            "scores": {},
            "statistics": {
                name: {"score": scores[name], "arrays": [f"{name}_counts"]} for name in metrics
            },
            "labels": {"source": "{}"},
        },
        cost={"seconds": backend.cost()["seconds"], "samples_resumed": resumed},
        samples=lambda: map(_sample, range(len(entries)), entries, hypotheses, task.segments),
        shown={"why": task.why, "empty": hypotheses.count("")},
    )


def in_one_line(text: str) -> str:
    """As other programs read hypotheses from files."""
    return re.sub(r"\s*[\r\n]\s*", " ", text.strip())


def count(dist: Any, task: Task, hypotheses: list[str]) -> dict[str, np.ndarray]:
    """{metric: counts [segments, k]} on every rank; each counts its own segments."""
    counts = {name: np.zeros((len(hypotheses), COUNTS[name])) for name in task.metrics}
    with cli.progress(len(hypotheses), "scores", "segment") as bar:
        for i in dist.mine(range(len(hypotheses))):
            dist.bump()  # TER takes a second where two long texts have little in common
            for name, metric in task.metrics.items():
                references = task.segments[i].references
                counts[name][i] = corpus_scores.counted(metric, hypotheses[i], references)
            bar.update(min(dist.world_size, bar.total - bar.n))
    return {name: dist.sum(columns) for name, columns in counts.items()}


def _measured(name: str, columns: np.ndarray) -> dict:
    score = corpus_scores.METRICS[name]
    better = "lower" if name == "ter" else "higher"
    value, spread = resampling.score_of(score, columns), resampling.spread(score, columns)
    return results.metric(value, n=len(columns), better=better) | spread


def _breakdown(entries: list[dict], counts: dict[str, np.ndarray]) -> dict:
    found: dict[str, dict] = {"finish": dict(Counter(e["finish"] for e in entries).most_common())}
    if "bleu" in counts:
        length, reference, *grams = counts["bleu"].sum(axis=0).tolist()
        found["n-gram"] = {
            f"{n}-gram": {"precision": grams[n - 1] / max(grams[n + 3], 1)} for n in range(1, 5)
        }
        found["length"] = {"hypothesis / reference": {"ratio": length / max(reference, 1)}}
    return found


def _sample(i: int, entry: dict, hypothesis: str, segment: Segment) -> dict:
    """A line beside the record."""
    about = {"id": i, "segment": segment.name, "source": segment.source}
    about |= {"references": list(segment.references), "hypothesis": hypothesis}
    return about | {name: entry[name] for name in ("completion", "finish", "tokens")}


# ---------------------------------------------------------------------------------------------
# Output


def show(records: list[Result]) -> None:
    for record in records:
        print_record(record)


def print_record(record: Result) -> None:
    protocol, finish = record["protocol"], record["breakdown"]["finish"]
    n = record["data"]["segments"]
    command.print_head(record, n, "segments")
    for name, metric in record["metrics"].items():
        print(f"  {name:<8} {show_score(metric):<24} {protocol['signatures'][name]}")
    if record.shown["why"]:
        print(f"  {protocol['target_language']}: {record.shown['why']}")
    for kind, number in (("empty", record.shown["empty"]), ("cut off", finish.get("length", 0))):
        if number:
            limit = f" at {protocol['max_new_tokens']} tokens" if kind == "cut off" else ""
            print(f"  {number:,} of {n:,} hypotheses are {kind}{limit}")
    command.print_drawn(record)


def show_score(metric: dict) -> str:
    """In points, with its 95% interval."""
    low, high = metric["low"], metric["high"]
    interval = f" [{low:.2f}, {high:.2f}]" if low == low else ""
    return f"{metric['value']:6.2f}{interval}"


def print_table(records: list[dict]) -> None:
    command.print_shares(records, list(records[0]["metrics"]), 26, show_score)


# ---------------------------------------------------------------------------------------------
# The evaluation

BLEU = Evaluation(
    name="bleu",
    script=__file__,
    Options=Options,
    plan=plan,
    run=run,
    show=show,
    table=print_table,
    check=read_task,
    samples="always",
)


def evaluate_bleu(model: Any, tokenizer: Any, data_path: str | Path, **options) -> Result:
    """Draw a hypothesis for each segment, score them all, and return results.py's record.

    options: Options' and Sampling's fields. Also dist, info, run and results_dir (then an
    interrupted evaluation goes on where it stopped): see Evaluation. ValueError for bad values, and
    for prompts beyond the context.
    """
    return BLEU(model, tokenizer, data_path=str(data_path), **options)


def main(argv=None):
    command.main(BLEU, argv, __doc__)


if __name__ == "__main__":
    cli.run(main)
