"""HumanEval, HumanEval+, MBPP, MBPP+: programs drawn, judged by their tests, counted as pass@k.

    python humaneval_eval.py --checkpoint-path checkpoints/checkpoint-1000 \\
        --data-path data/HumanEval.jsonl.gz                            # greedy, pass@1
    torchrun --nproc-per-node=8 humaneval_eval.py --checkpoint-path checkpoints \\
        --data-path data/HumanEval.jsonl.gz --num-samples 200 --temperature 0.8 --k 1 10 100

    # an instruct model asked as EvalPlus asks it; base tests, and those with EvalPlus's beside
    python humaneval_eval.py --checkpoint-path checkpoints/an-instruct-model \\
        --data-path data/HumanEvalPlus-NoExtreme.jsonl.gz --chat-template

    # samples that are already there, from any tool, judged without a model
    python humaneval_eval.py --samples-file S.jsonl --data-path data/HumanEval.jsonl.gz

    from humaneval_eval import evaluate_humaneval
    record = evaluate_humaneval(model, tokenizer, "data/HumanEval.jsonl.gz")
    record["metrics"]["pass@1"]              # {"value": ..., "stderr": ..., "n": 164}

The backend draws, sandbox/ judges in other processes meanwhile. A rank has a journal of what it
drew and judged, so an interrupted run goes on by (task, sample), on any number of ranks.
samples.jsonl is what OpenAI's evaluate_functional_correctness and EvalPlus read, and theirs are
read here. tasks/problems.py and code_prompts.py say what is asked, tasks/programs.py judges.
HumanEval's problems, stop strings and estimator are those of Chen et al., "Evaluating Large
Language Models Trained on Code" (2021). Published pass@1: Codex-12B 28.8%, Llama-2-7B 12.8%.
"""

import argparse
import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import installed  # noqa: F401

import cli
import command
import evaluation
import launcher
from backends import Backend, CacheOptions, Facts, Sampling
from evaluation import Evaluation, Folder, Outcome, Plan, Result
from sandbox.judge import Sandbox
from tasks import drawing
from tasks.chat import Chat, ChatOptions, ends_of, open_chat, starts_with_bos
from tasks.code_prompts import PROMPTS, CodePrompt, choose
from tasks.problems import data_hash, find_task, read_examples, read_problems
from tasks.programs import (
    JudgeOptions,
    Judging,
    count_workers,
    judge_file,
    judged_by,
    print_example,
    split_off,
)
from tasks.scores import PREFIX, Judged, all_ks, pass_at_more, print_scores, summarise_all

# ---------------------------------------------------------------------------------------------
# Options


@dataclass(frozen=True)
class Options:
    """What is drawn, and how it is judged: flags, YAML keys and keywords."""

    data_path: str = cli.option("", "problems: HumanEval.jsonl.gz, say", metavar="FILE")
    prompt: str = cli.option(
        "auto",
        "how a program is asked for (auto: as those who published the problems do)",
        choices=("auto", *PROMPTS),
    )
    chat: ChatOptions = ChatOptions()  # noqa: RUF009
    num_samples: int = cli.option(1, "programs for each task (1)", type=cli.positive_int)
    sampling: Sampling = Sampling(max_new_tokens=512, top_p=0.95)  # noqa: RUF009
    k: tuple[int, ...] = cli.option(
        (), "of pass@k, beside 1, 10, 100 if possible", type=cli.positive_int, nargs="+"
    )
    strip_prompt: bool = cli.option(
        True,
        "prompts without their trailing newline (the default). Many tokenizers join that newline "
        "and the indentation after it in one token: a model whose prompt ends in a newline starts "
        "with a wrong token, a known cause of Llama scores that are far too low",
        action=argparse.BooleanOptionalAction,
    )
    bos: str = evaluation.bos_option()
    limit: int | None = cli.option(
        None, "the first so many tasks: not a score", type=cli.positive_int
    )
    batch_size: int | None = cli.option(
        None, "rows drawn at a time (what memory holds)", type=cli.positive_int
    )
    compile: str = evaluation.compile_option()
    cache: CacheOptions = CacheOptions()  # noqa: RUF009
    show: str | None = cli.option(None, "print a failing sample of this task", metavar="TASK")
    judges: JudgeOptions = JudgeOptions()  # noqa: RUF009

    def __post_init__(self):
        if not self.data_path:
            raise ValueError("--data-path FILE is needed: HumanEval.jsonl.gz, say")
        if self.num_samples > 1 and not self.sampling.temperature:
            raise ValueError(
                f"--num-samples {self.num_samples} at temperature 0 would be equal samples: give "
                "a --temperature (0.2 for pass@1, 0.8 for pass@100, say)"
            )

    @property
    def ks(self) -> list[int]:
        """The k of pass@k that so many samples allow."""
        for k in self.k:
            if k > self.num_samples:
                raise ValueError(
                    f"--k {k} needs at least {k} samples of each task: --num-samples {k}"
                )
        return all_ks(self.k, self.num_samples)


def check(options: Options) -> None:
    """Problems that tests can judge, and a sandbox that works here."""
    problems = read_problems(options.data_path, options.limit)
    if options.show:
        find_task(problems, options.show)
    _ = options.ks
    if options.chat.chat_template == "off":
        read_examples(options.data_path, choose(options.prompt, problems, None).n_shots)
    with Sandbox(1, **options.judges.sandbox(problems)):
        pass


# ---------------------------------------------------------------------------------------------
# Plan: the problems, and their prompts as tokens


@dataclass(frozen=True)
class Drawn:
    """sampling: with the stop strings that hold."""

    options: Options
    sampling: Sampling
    prompt: CodePrompt
    problems: dict[str, dict]
    prompts: list[list[int]]

    def only(self, problems: dict[str, dict]) -> "Drawn":
        """Of some of the problems."""
        of = dict(zip(self.problems, self.prompts, strict=True))
        return replace(self, problems=problems, prompts=[of[task] for task in problems])

    @property
    def asked(self) -> drawing.Asked:
        tasks, o = list(self.problems), self.options
        return drawing.Asked(tasks, self.prompts, self.sampling, o.num_samples, o.batch_size)

    def complete(self, entry: dict) -> None:
        """Make of what was drawn what is judged: what follows the published prompt, or the program
        that the prompt's rule finds in it."""
        problem = self.problems[entry["task_id"]]
        if self.prompt.takes == "completion":
            text, stripped = entry["completion"], self.options.strip_prompt
            entry["completion"] = continuation_of(problem["prompt"], text, stripped)
        entry |= self.prompt.program_in(problem, entry["completion"])


def plan(options: Options, facts: Facts) -> Plan:
    tokenizer, sampling = facts.tokenizer, options.sampling
    _ = options.ks  # ValueError before anything is drawn
    bos = evaluation.resolve_bos(options.bos, tokenizer)
    problems = read_problems(options.data_path, options.limit)
    chat = open_chat(options.chat, tokenizer)
    prompt = choose(options.prompt, problems, chat)
    shots = read_examples(options.data_path, prompt.n_shots)
    texts = [prompt.render(problem, shots, chat) for problem in problems.values()]
    if stripped := prompt.takes == "completion" and options.strip_prompt and not chat:
        texts = [text.rstrip("\n") for text in texts]
    prompts = drawing.encode_prompts(tokenizer, list(problems), texts, bos, bool(chat))
    evaluation.check_vocabulary(max(map(max, prompts)), facts)
    sampling = replace(sampling, stop=(sampling.stop or prompt.stop) + ends_of(chat))
    protocol = {
        "prompt": prompt.name,
        "prompt_hash": hashlib.sha256(repr(prompt).encode()).hexdigest(),
        "program": prompt.takes,
        "examples": [shot["task_id"] for shot in shots],
        **(chat.protocol if chat else {}),
        "num_samples": options.num_samples,
        **sampling.protocol,
        "stop": list(sampling.stop),
        "strip_prompt": stripped,
        "bos": starts_with_bos(tokenizer, prompts),
        "limit": options.limit,
        "batch_size": options.batch_size,
        "compile": options.compile,
        **options.cache.protocol,
        **facts.protocol,
        **options.judges.protocol(problems),
    }
    data = {
        "files": [Path(options.data_path).name],
        "hash": data_hash(problems),
        "tasks": len(problems),
        "first_prompt": texts[0],
    }
    drawn = Drawn(options, sampling, prompt, problems, prompts)
    return Plan(protocol, data, drawn, words_of(protocol, chat))


def words_of(protocol: dict, chat: Chat | None) -> tuple[str, ...]:
    return (
        *([] if protocol["prompt"] == "completion" else [f"prompt {protocol['prompt']}"]),
        *(chat.words if chat else ()),
        f"{protocol['num_samples']} samples",
        drawing.how_drawn(protocol),
        *([f"top-p {protocol['top_p']:g}"] if protocol["temperature"] else []),
        *evaluation.closing_words(protocol),
    )


def continuation_of(prompt: str, text: str, strip_prompt: bool) -> str:
    """What to append to the published prompt so that the program is the one that was drawn: after a
    stripped prompt the model itself writes the newlines that were taken away."""
    return text.removeprefix(prompt[len(prompt.rstrip("\n")) :]) if strip_prompt else text


# ---------------------------------------------------------------------------------------------
# Run: programs are judged while more of them are drawn
#
# A journal's entry holds part of what is known of one sample: what was drawn, then its verdict.


def run(backend: Backend, plan: Plan, folder: Folder) -> Outcome:
    """Draw what no journal holds, judge it meanwhile, count it."""
    work, dist = plan.work, backend.dist
    judges = work.options.judges
    with Sandbox(judges.workers or count_workers(), **judges.sandbox(work.problems)) as sandbox:
        kept, left_out = split_off(work.problems, sandbox, dist)
        work = work.only(kept)
        known = drawing.known_samples(folder.known(), kept)
        mine = [known[at] for at in dist.mine(sorted(known))]
        resumed = len(known)
        with cli.progress(
            work.options.num_samples * len(work.problems), "humaneval", "sample"
        ) as bar:
            judging = Judging(sandbox, work.problems, folder, bar)
            for entry in mine:
                judging.take(entry)
            for entry in drawing.draw(backend, work.asked, known):
                work.complete(entry)
                folder.append(entry)
                mine.append(entry)
                judging.take(entry)
            start = time.perf_counter()
            judging.finish(dist)
        drawn = backend.cost()
        judge_seconds = dist.gather(time.perf_counter() - start)
        tiers = sorted(set(dist.gather(sandbox.tier)))
        n_judges = sum(dist.gather(sandbox.workers))
    everyone = [entry for part in dist.gather(mine) for entry in part]
    entries = drawing.in_order(everyone, work.asked)
    folder.write("samples.jsonl", "".join(map(sample_line, entries)))
    judged = judged_by(entries, work.problems)
    tallies, metrics, breakdown, arrays = summarise_all(work.problems, judged, work.options.ks)
    breakdown["finish"] = dict(Counter(entry["finish"] for entry in entries).most_common())
    return Outcome(
        metrics=metrics,
        breakdown=breakdown,
        arrays=arrays,
        examples={
            "unit": "tasks",
            "scores": {name: name for name in metrics},
            "labels": {"task_id": "{}"},
        },
        protocol={"sandbox_tier": "; ".join(tiers)},
        data={"left_out": left_out},
        words=(f"{len(left_out)} tasks left out",) if left_out else (),
        cost={
            "seconds": drawn["seconds"] + max(judge_seconds),
            "draw_seconds": drawn["seconds"],
            "judge_seconds": max(judge_seconds),
            "samples_resumed": resumed,
            "judges": n_judges,
        },
        samples=lambda: with_verdicts(judged),
        shown=(work, judged, tallies, folder.path),
    )


def sample_line(entry: dict) -> str:
    """A line of samples.jsonl: ASCII, which every tool reads under every locale."""
    field = "solution" if "solution" in entry else "completion"
    return json.dumps({"task_id": entry["task_id"], field: entry[field]}) + "\n"


def with_verdicts(judged: dict[str, Judged]) -> Iterator[dict]:
    """A line beside the record each: OpenAI's fields of a judged sample, and ours."""
    names = ("task_id", "completion", "solution", "sample", "finish", "tokens")
    for suites in zip(*judged.values(), strict=True):
        line = {name: suites[0][1][name] for name in names if name in suites[0][1]}
        for prefix, (_, _, verdict) in zip(PREFIX.values(), suites):
            found = {"result": verdict.result, "passed": verdict.passed, "kind": verdict.kind}
            line |= {prefix + name: value for name, value in found.items()}
        yield line


# ---------------------------------------------------------------------------------------------
# Output


def show(records: list[Result]) -> None:
    for record in records:
        print_record(record)


def print_record(record: Result) -> None:
    protocol, cost = record["protocol"], record["cost"]
    work, judged, tallies, folder = record.shown
    command.print_head(record, len(work.problems), "tasks")
    print_scores(record["metrics"], tallies, record["data"]["left_out"])
    cut = record["breakdown"]["finish"].get("length", 0)
    if cut:
        print(f"{cut:,} samples were cut off at {protocol['max_new_tokens']} tokens or the context")
    print(
        f"drawn in {cost['draw_seconds']:.1f} s: {cost['tokens']:,} tokens, "
        f"{cost['tokens_per_second']:,.0f}/s; judged {cost['judge_seconds']:.1f} s after the last; "
        f"{cost['samples_resumed']:,} samples were there already"
    )
    print(f"sandbox: {protocol['sandbox_tier']}")
    if work.options.show:
        print_example(work.problems[find_task(work.problems, work.options.show)], judged)
    if folder and (folder / "samples.jsonl").exists():
        print(f"samples: {cli.printable(folder / 'samples.jsonl')}")
    print(f"record: {record.place}", flush=True)


def print_table(records: list[dict]) -> None:
    command.print_shares(records, list(records[0]["metrics"]), 20)


# ---------------------------------------------------------------------------------------------
# The evaluation

HUMANEVAL = Evaluation(
    name="humaneval",
    script=__file__,
    Options=Options,
    plan=plan,
    run=run,
    show=show,
    table=print_table,
    check=check,
    samples="always",
    recount=lambda options, record: pass_at_more(record, options.ks),
    programs=("sandbox/worker.py", "sandbox/jail.py"),
)


def evaluate_humaneval(
    model: Any, tokenizer: Any, data_path: str | Path, num_samples: int = 1, **options
) -> Result:
    """Draw `num_samples` programs for each problem, judge them, and return results.py's record.

    options: Options' and Sampling's fields, and dist, info, run and results_dir: see Evaluation.
    ValueError for k > num_samples, bad values, long prompts, and where no sandbox works.
    """
    return HUMANEVAL(model, tokenizer, data_path=data_path, num_samples=num_samples, **options)


# flags of judging a file of samples; all others say what is drawn, and by which model
JUDGING = ["samples_file", "ignore_incomplete", "data_path", "k", "show", "debug"]
JUDGING += cli.option_names(JudgeOptions)


def main(argv=None):
    p = cli.parser(__doc__)
    command.add_flags(p, HUMANEVAL)
    p.add_argument("--samples-file", metavar="FILE", help="judge these samples; needs no model")
    p.add_argument("--ignore-incomplete", action="store_true", help="... though tasks are missing")
    args = p.parse_args(argv)
    if bool(args.samples_file) == bool(args.checkpoint_path or args.endpoint):
        p.error("give --checkpoint-path or --endpoint to draw samples, or --samples-file to judge")
    if args.ignore_incomplete and not args.samples_file:
        p.error("--ignore-incomplete goes with --samples-file")
    if not args.samples_file:
        return command.run_command(HUMANEVAL, args)
    for name in sorted(args.given - set(JUDGING)):
        p.error(f"{cli.flag_of(name)} goes with --checkpoint-path, not --samples-file")
    judge_samples(args.samples_file, args.ignore_incomplete, cli.read_options(Options, args))


def judge_samples(path: str, ignore_incomplete: bool, options: Options) -> None:
    """By rank 0 alone."""
    launcher.check_launch()
    problems = read_problems(options.data_path)
    task = find_task(problems, options.show) if options.show else None
    if cli.rank() == 0:
        judge_file(
            path,
            problems,
            options.judges.sandbox(problems),
            ks=options.k,
            workers=options.judges.workers,
            ignore_incomplete=ignore_incomplete,
            show=task,
        )


if __name__ == "__main__":
    cli.run(main)
