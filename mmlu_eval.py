"""MMLU, ARC, HellaSwag, TruthfulQA and other choice sets, scored as lm-evaluation-harness does.

    python mmlu_eval.py --checkpoint-path checkpoints/checkpoint-1000 --data-path data/mmlu \\
        --num-few-shot 5
    torchrun --nproc-per-node=8 mmlu_eval.py --checkpoint-path checkpoints --data-path data/mmlu \\
        --num-few-shot 5 --template lm_eval continuation --log-samples
    python mmlu_eval.py --checkpoint-path checkpoints/checkpoint-1000 --set arc_challenge \\
        --data-path data/arc --num-few-shot 25

    from mmlu_eval import evaluate_mmlu
    result = evaluate_mmlu(model, tokenizer, "data/mmlu", num_few_shot=5)
    result["metrics"]["accuracy"]            # {"value": ..., "stderr": ..., "n": 14042}

A set is a YAML file of configs/choice_sets: how it lies in files, and how it is asked. Questions
(tasks/questions.py) and templates become rows of tokens in tasks/prompts.py. A subject's few-shot
examples are run once and their keys and values shared by all its questions
(backends/continuations.py, strips.py). tasks/choices.py counts the answers. Guessing: 25% on MMLU;
Llama-2-7B's published score is 45.3% (5-shot).

How sure the answers are is measured, too (certainty.py): --fit-temperature scales it by what a
split that is not asked shows, --p-true asks the model itself, --allow-abstain lets it not answer.
"""

import functools
import itertools
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import installed  # noqa: F401

import numpy as np

import cli
import command
import evaluation
from backends import BATCH_TOKENS, Backend, CacheOptions, Facts, Sampling
from evaluation import Evaluation, Folder, Outcome, Plan, Result
from tasks.chat import ChatOptions, encode, ends_of, open_chat, starts_with_bos
from tasks.choice_sets import ChoiceSet, load_set
from tasks.choice_tables import (
    column_of,
    print_accuracies,
    print_details,
    print_differences,
    print_submission,
)
from tasks.choices import (
    Answers,
    Terms,
    examples_of,
    first_letter,
    make_samples,
    right_places,
    summarise,
    with_abstention,
    without_answers,
)
from tasks.further import Further
from tasks.prompts import MAX_NEW_TOKENS, PromptMaker, Prompts
from tasks.questions import QuestionSet, read_data
from tasks.templates import SCORINGS

__all__ = ["MMLU", "column_of", "evaluate_mmlu"]

# ---------------------------------------------------------------------------------------------
# Options


@dataclass(frozen=True)
class Options:
    """What is asked and how: flags, YAML keys and keywords."""

    data_path: str = cli.option("", "directory of the set, or one file of it", metavar="PATH")
    set: str = cli.option(
        "mmlu", "a name in configs/choice_sets, or a YAML file (mmlu)", metavar="NAME"
    )
    num_few_shot: int = cli.option(
        0, "examples from the set's few-shot split, MMLU's dev (0)", type=int, metavar="K"
    )
    few_shot_draw: str = cli.option(
        "first",
        "the first examples for all questions, or others for each, those that lm-eval draws for "
        "this set on one GPU (first)",
        choices=("first", "lm_eval"),
    )
    template: tuple[str, ...] = cli.option(
        (), "names in configs/prompts or YAML files (the set's own, MMLU's lm_eval)", nargs="+"
    )
    scoring: tuple[str, ...] = cli.option(
        (), "default: the template's own", nargs="+", choices=SCORINGS
    )
    split: str | None = cli.option(
        None, "what is asked (the set's own, MMLU's test)", choices=("test", "val")
    )
    subjects: tuple[str, ...] = cli.option((), "only these", nargs="+", metavar="NAME")
    limit: int | None = cli.option(
        None, "so many questions of each subject: not a score", type=cli.positive_int
    )
    further: Further = Further()  # noqa: RUF009  # frozen
    permute_choices: int = cli.option(
        1, "also score rotated choice orders, K in all (MMLU: at most 4)", type=int, metavar="K"
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
    cache: CacheOptions = CacheOptions()  # noqa: RUF009
    chat: ChatOptions = ChatOptions()  # noqa: RUF009

    def __post_init__(self):
        if not self.data_path:
            raise ValueError("--data-path PATH is needed: the directory of the set")
        if self.num_few_shot < 0:
            raise ValueError("--num-few-shot must not be negative")

    @property
    def choice_set(self) -> ChoiceSet:
        return load_set(self.set)


def variants(options: Options) -> list[Options]:
    """One for each template and scoring. Beside others, a scoring that a template has no letters
    for is left out of it; a template that is left with none is an error."""
    found, choice_set = [], options.choice_set
    for name in dict.fromkeys(options.template or (choice_set.own.name,)):
        template = choice_set.template(name)
        wanted = dict.fromkeys(options.scoring or (choice_set.scoring_of(template),))
        possible = [scoring for scoring in wanted if scoring in template.scorings]
        if not possible:
            raise ValueError(
                f"--scoring {' '.join(wanted)} does not go with --template {name}, which shows "
                "no letters: --scoring continuation"
            )
        found += [replace(options, template=(name,), scoring=(scoring,)) for scoring in possible]
    return found


def check(options: Options) -> None:
    """Questions that can be read, and flags that say something of how they are asked."""
    generates = any(variant.scoring == ("generate",) for variant in variants(options))
    if options.cache.kv_dtype and not generates:
        raise ValueError("--kv-dtype goes with --scoring generate: it is of what is drawn")
    read_questions(options)


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
    choice_set: ChoiceSet
    further: Further
    held_out: QuestionSet | None  # what a temperature is fitted on

    @functools.cached_property
    def prepared(self) -> tuple[Prompts, float]:
        """The prompts, and the seconds that it took to make them."""
        start = time.perf_counter()
        prompts = self.maker.make(self.share_prefix)
        evaluation.check_vocabulary(prompts.rows.highest_token, self.facts)
        return prompts, time.perf_counter() - start

    def about(self, data: QuestionSet, changes: dict) -> "Asked":
        """Other questions, asked in the same way but for `changes`."""
        made = self.maker
        terms = {
            "tokenizer": made.tokenizer,
            "template": made.template,
            "scoring": made.scoring,
            "context": made.context,
            "truncate": made.truncate,
            "bos": made.bos,
            "chat": made.chat,
        }
        return replace(
            self, data=data, maker=PromptMaker(data=data, rotations=1, **terms | changes)
        )


def plan(options: Options, facts: Facts) -> Plan:
    """Reads the questions; of several templates or scorings only the first is planned."""
    choice_set, tokenizer = options.choice_set, facts.tokenizer
    first = variants(options)[0]
    template, scoring = choice_set.template(first.template[0]), first.scoring[0]
    maker = PromptMaker(
        tokenizer=tokenizer,
        data=read_questions(options),
        template=template,
        scoring=scoring,
        context=facts.context or sys.maxsize,
        rotations=options.permute_choices,
        truncate=options.truncate,
        bos=evaluation.resolve_bos(options.bos, tokenizer),
        chat=open_chat(options.chat, tokenizer),
    )
    data, chat, further = maker.data, maker.chat, options.further
    further.check(data, scoring)
    held_out = read_held_out(options, data)
    shares = facts.shares_prefixes and scoring != "generate" and not data.drawn
    shares = shares and not options.no_prefix_cache
    work = Asked(facts, data, maker, shares, choice_set, further, held_out)
    protocol = protocol_of(options, work) | further.terms(held_out)
    about = {"files": data.files, "hash": data.hash, "examples_hash": data.examples_hash}
    whole = not options.limit and not options.subjects
    if whole and (release := choice_set.release_of(data)):
        about["release"] = release
    words = words_of(protocol, about, chat.words if chat else ())
    return Plan(protocol, about, work, words, lambda: work.prepared, choice_set.name)


def protocol_of(options: Options, work: Asked) -> dict:
    facts, maker, chat = work.facts, work.maker, work.maker.chat
    tokenizer, bos, generates = facts.tokenizer, maker.bos, maker.scoring == "generate"
    if chat:  # a template may write its own
        bos = starts_with_bos(tokenizer, encode(tokenizer, [chat.ask("?")], bos))
    batch_tokens = options.batch_tokens or BATCH_TOKENS.get(facts.device)  # a server has its own
    return work.choice_set.protocol | {
        "template": maker.template.name,
        "template_hash": maker.template.hash,
        "scoring": maker.scoring,
        "shots": options.num_few_shot,
        **({"few_shot_draw": options.few_shot_draw} if work.data.drawn else {}),
        "split": options.split or work.choice_set.layout.ask,
        "subjects": sorted({*options.subjects}) or None,
        "limit": options.limit,
        "permute_choices": options.permute_choices,
        "truncate": options.truncate,
        "bos": bos,
        **(chat.protocol if chat else {}),
        **facts.protocol,
        "prefix_cache": work.share_prefix,
        "batch_tokens": None if generates else batch_tokens,
        "batch_size": options.batch_size,
        **(options.cache.protocol if generates else {}),
        "examples_hash": work.data.examples_hash,
    }


def read_questions(options: Options) -> QuestionSet:
    subjects, rotations = list(options.subjects) or None, options.permute_choices
    data = read_data(
        options.data_path,
        options.num_few_shot,
        options.split,
        subjects,
        options.limit,
        options.choice_set.layout,
        options.few_shot_draw != "first",
    )
    data = with_abstention(data) if options.further.allow_abstain else data
    fewest = data.n_choices.min()
    if not 1 <= rotations <= fewest:
        raise ValueError(f"--permute-choices must be 1 to {fewest}, not {rotations}")
    return data


def read_held_out(options: Options, data: QuestionSet) -> QuestionSet | None:
    """What a temperature is fitted on, if one is."""
    layout = options.choice_set.layout
    return options.further.held_out(
        data,
        asked=options.split or layout.ask,
        shown=layout.few_shot if options.num_few_shot else None,
        read=lambda split: read_questions(replace(options, split=split)),
    )


def words_of(protocol: dict, about: dict, of_chat: tuple[str, ...]) -> tuple[str, ...]:
    subjects, limit = protocol["subjects"], protocol["limit"]
    return (
        *([about["release"]] if "release" in about else []),
        *([protocol["template"]] if protocol["template"] != protocol.get("set") else []),
        protocol["scoring"],
        f"{protocol['shots']}-shot",
        *(["lm-eval's examples"] if "few_shot_draw" in protocol else []),
        *(["may abstain"] if "abstain" in protocol else []),
        *of_chat,
        *(["BOS"] if protocol["bos"] else []),
        protocol["dtype"],
        *([f"keys and values {protocol['kv_dtype']}"] if "kv_dtype" in protocol else []),
        *([f"{len(subjects)} subjects only: not a score"] if subjects else []),
        *([f"limit {limit}: not a score"] if limit else []),
    )


# ---------------------------------------------------------------------------------------------
# Scores


def answer(backend: Backend, prompts: Prompts, protocol: dict, work: Asked) -> Answers:
    """Every prompt asked, in the way that the protocol says."""
    if protocol["scoring"] == "generate":
        return generate_answers(backend, prompts, protocol["batch_size"], work)
    rows, data, K = prompts.rows, work.data, work.data.n_choices.max()
    found = backend.score_rows(rows, protocol["batch_tokens"], protocol["batch_size"])
    scores = np.zeros((*prompts.shots.shape, K))
    if rows.choice_ids:
        start = prompts.letter_start(found)
        scores[prompts.question, prompts.rotation] = found.choices + start[:, None]
    else:
        scores[prompts.question, prompts.rotation, prompts.choice] = found.targets
    there = np.arange(K) < data.n_choices[:, None, None]  # [questions, 1, K]
    scores = np.where(there, scores, -np.inf)
    predicted = scores.argmax(-1)
    if found.bounded is not None:  # of no letter is it known how likely it is: no answer
        unknown = found.bounded.all(-1)
        predicted[prompts.question[unknown], prompts.rotation[unknown]] = -1
    return Answers(predicted, scores)


def generate_answers(
    backend: Backend, prompts: Prompts, batch_size: int | None, work: Asked
) -> Answers:
    """The first letter that stands alone in MAX_NEW_TOKENS greedy tokens, before a blank line."""
    tokenizer, chat, mine = backend.facts.tokenizer, work.maker.chat, []
    ids = [row.tolist() for row in prompts.rows.ids]
    greedy = Sampling(max_new_tokens=MAX_NEW_TOKENS, seed=0, stop=ends_of(chat))
    with cli.progress(len(ids), "mmlu", "row") as bar:
        for sample in backend.generate(ids, greedy, batch_size=batch_size):
            mine.append((sample.prompt_index, tokenizer.decode(sample.token_ids)))
            bar.update(1)
    texts = np.full(prompts.shots.shape, "", dtype=object)
    for row, text in itertools.chain.from_iterable(backend.dist.gather(mine)):
        texts[prompts.question[row], prompts.rotation[row]] = text
    read = np.vectorize(first_letter, otypes=[np.int64])
    return Answers(read(texts, work.data.n_choices[:, None]), texts=texts)


# ---------------------------------------------------------------------------------------------
# Run, and what the answers amount to


def run(backend: Backend, plan: Plan, folder: Folder) -> Outcome:
    """Score every question; arrays hold an entry for each, of the choices as they are listed."""
    protocol, data = plan.protocol, plan.work.data
    prompts, prepare_seconds = plan.work.prepared
    answers = answer(backend, prompts, protocol, plan.work)
    right = right_places(data, protocol["permute_choices"])
    choice_set, cost = plan.work.choice_set, backend.cost()
    terms = Terms(
        protocol["scoring"], choice_set.normalisation, choice_set.metric, "abstain" in protocol
    )
    if data.hidden:
        metrics, breakdown, arrays = without_answers(data, answers)
    else:
        metrics, breakdown, arrays = summarise(data, terms, answers, right)

    def ask(others: QuestionSet, changes: dict) -> Answers:
        scoring = changes.get("scoring", protocol["scoring"])
        batch_tokens = protocol["batch_tokens"] or BATCH_TOKENS.get(backend.facts.device)
        own = protocol | {"scoring": scoring, "batch_tokens": batch_tokens}
        work = plan.work.about(others, changes)
        return answer(backend, work.prepared[0], own, work)

    found = plan.work.further.measure(ask, data, plan.work.held_out, answers, arrays)
    arrays |= found.arrays
    generates = protocol["scoring"] == "generate"
    return Outcome(
        metrics=metrics | found.metrics,
        breakdown=breakdown | found.breakdown,
        arrays=arrays,
        examples=examples_of(arrays),
        protocol={
            "subjects": len(data.subjects) if protocol["subjects"] else None,
            "letter_ids": prompts.rows.choice_ids,
            "max_new_tokens": MAX_NEW_TOKENS if generates else None,
            "truncated": prompts.truncated,
            "shortened": int((prompts.shots < protocol["shots"]).sum()),
            "shots_kept": np.bincount(prompts.shots.ravel()).tolist(),  # prompts by examples kept
            **found.protocol,
        },
        data={"tokens": prompts.rows.unique_tokens()}
        | ({"first_prompt": prompts.first} if "chat_template" in protocol else {}),
        cost=cost | {"prepare_seconds": prepare_seconds},
        samples=functools.partial(make_samples, data, prompts, answers, right),
        shown=data,
    )


# ---------------------------------------------------------------------------------------------
# The evaluation


def show(records: list[Result]) -> None:
    """All records of a checkpoint, side by side, and where they lie."""
    print_accuracies(records)
    for record in records:
        print_details(record)
    for record in records:
        print(f"record: {record.place}")
        if record.shown.hidden:
            print_submission(record)
    if len(records) > 1:
        print_differences(records)


MMLU = Evaluation(
    name="mmlu",
    script=__file__,
    Options=Options,
    plan=plan,
    run=run,
    show=show,
    check=check,
    variants=variants,
)


def evaluate_mmlu(
    model: Any, tokenizer: Any, data_path: str | Path, num_few_shot: int = 0, **options
) -> Result:
    """results.py's record of a model on a choice set; see tasks.questions.read_data.

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
