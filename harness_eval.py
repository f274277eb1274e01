"""lm-evaluation-harness's tasks, answered by our verbs: any checkpoint, any number of GPUs.

    python harness_eval.py --checkpoint-path checkpoints/checkpoint-1000 --tasks gsm8k arc_challenge
    torchrun --nproc-per-node=8 harness_eval.py --checkpoint-path checkpoints \\
        --tasks mmlu,bbh --include-path tasks/ --log-samples

    from harness_eval import evaluate_harness
    (record,) = evaluate_harness(model, tokenizer, ["arc_easy"])
    record["metrics"]["acc_norm"]            # {"value": ..., "stderr": ..., "n": 2376}

Needs `pip install lm_eval`. lm-eval makes the requests of a task, filters the answers and counts:
its numbers are those of its own Hugging Face class on the same weights, found faster, since what
requests have in common is run once, and on every rank, whose number changes no bit. A record for
each task or group named, with its metrics under lm-eval's names. Without internet a task reads
local files: a YAML of yours in --include-path, which may bear a known task's name. Programs that a
model writes are not run here: that is humaneval_eval.py's.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import installed  # noqa: F401

import numpy as np

import cli
import command
import evaluation
import results
import stats
from backends import BATCH_TOKENS, Backend, CacheOptions, Facts
from evaluation import Evaluation, Folder, Outcome, Plan, Result
from tasks.chat import Chat, ChatOptions, open_chat

# ---------------------------------------------------------------------------------------------
# Options


@dataclass(frozen=True)
class Options:
    """What is asked: flags, YAML keys and keywords."""

    tasks: tuple[str, ...] = cli.option(
        (), "of lm-eval: tasks and groups, with spaces or commas between", nargs="+", metavar="TASK"
    )
    include_path: str | None = cli.option(None, "directory of more tasks' YAML", metavar="DIR")
    num_few_shot: int | None = cli.option(
        None, "examples before each question (the task's own number)", type=int, metavar="K"
    )
    gen_kwargs: str = cli.option(
        "", "of generation, instead of the task's: max_gen_toks=128,temperature=0.7", metavar="K=V"
    )
    chat: ChatOptions = ChatOptions()  # noqa: RUF009
    seed: int = cli.option(42, "of the random numbers", type=int)
    bos: str = evaluation.bos_option()
    limit: int | None = cli.option(
        None, "the first so many documents of a task: not a score", type=cli.positive_int
    )
    batch_tokens: int | None = cli.option(
        None, "padded tokens of a batch (32768 on CUDA, 4096 on a CPU)", type=cli.positive_int
    )
    compile: str = evaluation.compile_option()
    cache: CacheOptions = CacheOptions()  # noqa: RUF009

    def __post_init__(self):
        if not self.names:
            raise ValueError("--tasks is needed: gsm8k arc_challenge, say")
        if self.num_few_shot is not None and self.num_few_shot < 0:
            raise ValueError("--num-few-shot must not be negative")

    @property
    def names(self) -> tuple[str, ...]:
        words = (word.strip() for text in self.tasks for word in text.split(","))
        return tuple(dict.fromkeys(word for word in words if word))


def variants(options: Options) -> list[Options]:
    """One for each task."""
    return [replace(options, tasks=(name,)) for name in options.names]


def read_gen_kwargs(text: str) -> dict:
    """lm-eval's own reading of k=v,k=v."""
    from lm_eval.utils import simple_parse_args_string

    if text and not all("=" in part for part in text.split(",")):
        raise ValueError(f"--gen-kwargs {text!r}: not of the form key=value,key=value")
    return dict(simple_parse_args_string(text)) if text else {}


def find(options: Options) -> Any:
    """The tasks.harness.Asked of options of one task."""
    (name,) = options.names
    return _found(name, options.include_path, options.num_few_shot, options.gen_kwargs)


@functools.cache
def _found(name: str, include_path: str | None, num_few_shot: int | None, gen_kwargs: str) -> Any:
    """Loading a task's data takes seconds: check() and plan() share it."""
    from tasks import harness

    return harness.find_tasks(name, include_path, num_few_shot, read_gen_kwargs(gen_kwargs))


def check(options: Options) -> None:
    """lm-eval, and every task's data."""
    drawn = [find(variant).draws() for variant in variants(options)]
    if options.cache.kv_dtype and not any(drawn):
        raise ValueError("--kv-dtype is of what is drawn: all of these tasks are scored")


# ---------------------------------------------------------------------------------------------
# Plan and run


@dataclass(frozen=True)
class Work:
    asked: Any  # tasks.harness.Asked
    chat: Chat | None


def plan(options: Options, facts: Facts) -> Plan:
    from tasks import harness

    asked, tokenizer = find(options), facts.tokenizer
    chat = open_chat(options.chat, tokenizer)
    protocol = {
        "task": asked.name,
        "lm_eval": harness.VERSION,
        "num_few_shot": asked.shots(),
        "gen_kwargs": read_gen_kwargs(options.gen_kwargs) or None,
        "seed": options.seed,
        **(chat.protocol if chat else {}),
        "bos": evaluation.resolve_bos(options.bos, tokenizer),
        "limit": options.limit,
        "batch_tokens": options.batch_tokens or BATCH_TOKENS.get(facts.device),
        "compile": options.compile,
        **(options.cache.protocol if asked.draws() else {}),
        **facts.protocol,
    }
    data = {"files": sorted(asked.tasks), "hash": harness.content_hash(asked, options.limit)}
    shots = "/".join(map(str, asked.shots()))
    words = (asked.name, f"{shots}-shot", *(chat.words if chat else ()))
    return Plan(protocol, data, Work(asked, chat), words + evaluation.closing_words(protocol))


def run(backend: Backend, plan: Plan, folder: Folder) -> Outcome:
    from tasks import harness

    asked, chat, protocol = plan.work.asked, plan.work.chat, plan.protocol
    model = harness.Verbs(
        backend,
        folder,
        lambda highest: evaluation.check_vocabulary(highest, backend.facts),
        bos=protocol["bos"],
        chat=chat,
        batch_tokens=protocol["batch_tokens"],
        seed=protocol["seed"],
    )
    found = harness.evaluate(asked, model, protocol["limit"])
    values = {task: values_of(found["samples"][task]) for task in asked.tasks}
    together = join(list(values.values()))
    by_task = {task: metrics_of(found, task, own) for task, own in values.items()}
    metrics = metrics_of(found, asked.name, together) or next(iter(by_task.values()))
    documents = [
        f"{task} {doc}"
        for task, samples in found["samples"].items()
        for doc in dict.fromkeys(sample["doc_id"] for sample in samples)
    ]
    arrays = {
        name: np.array(own)
        for name, own in together.items()
        if is_flat(own) and len(own) == len(documents)
    }
    scores = {  # what two checkpoints can be paired by
        name: name
        for name, metric in metrics.items()
        if name in arrays and is_close(arrays[name].mean(), metric["value"])
    }
    return Outcome(
        metrics=metrics,
        breakdown={"task": by_task} if len(by_task) > 1 else {},
        arrays=arrays | {"document": np.array(documents)},
        examples={"unit": "documents", "scores": scores, "labels": {"document": "{}"}}
        if scores
        else None,
        protocol={"versions": {name: found["versions"].get(name) for name in asked.tasks}},
        data={"documents": len(documents)},
        cost={
            "seconds": model.seconds,
            "tokens_per_second": model.tokens / model.seconds if model.seconds else 0.0,
            "samples_resumed": model.resumed,
            "lm_eval_seconds": model.other_seconds,
        },
        samples=lambda: samples_of(found["samples"]),
    )


def metrics_of(found: dict, task: str, values: dict[str, list]) -> dict[str, dict]:
    """A task's or a group's metrics as results.py has them, under lm-eval's names: the filter
    follows where there is one."""
    own = found["results"].get(task) or found.get("groups", {}).get(task) or {}
    higher = found.get("higher_is_better", {}).get(task, {})
    metrics = {}
    for key, value in own.items():
        metric, _, rule = key.partition(",")
        if not rule or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        name = name_of(metric, rule)
        of_documents = values.get(name, [])
        better = "lower" if higher.get(metric) is False else "higher"
        unit = "share" if better == "higher" and 0 <= value <= 1 else None
        stderr, n = stderr_of(float(value), of_documents), len(of_documents) or None
        metrics[name] = results.metric(float(value), stderr, n, better, unit)
    return metrics


def stderr_of(value: float, of_documents: list) -> float | None:
    """Of a mean of documents' values, and of the perplexities: exp of a mean, and of nats over
    words or bytes, or those in bits. None of what is counted in another way."""
    if len(of_documents) < 2:
        return None
    if is_flat(of_documents):
        scores = np.array(of_documents, dtype=np.float64)
        stderr = stats.mean_stderr(scores)
        if is_close(scores.mean(), value):
            return stderr
        return value * stderr if is_close(np.exp(-scores.mean()), value) else None
    if not all(isinstance(v, tuple | list) and len(v) == 2 for v in of_documents):
        return None
    nll, count = -np.array([v[0] for v in of_documents]), np.array([v[1] for v in of_documents])
    stderr, ratio = stats.ratio_stderr(nll, count), nll.sum() / count.sum()
    if is_close(np.exp(ratio), value):
        return value * stderr
    return stderr / np.log(2) if is_close(ratio / np.log(2), value) else None


def is_flat(values: list) -> bool:
    return all(isinstance(value, bool | int | float) for value in values)


def is_close(a: float, b: float) -> bool:
    return bool(np.isclose(a, b, rtol=1e-9, atol=1e-12))


def name_of(metric: str, rule: str) -> str:
    return metric if rule == "none" else f"{metric},{rule}"


def values_of(samples: list[dict]) -> dict[str, list]:
    """Each metric's values, by document, as the task gives them."""
    values: dict[str, list] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            values.setdefault(name_of(metric, sample["filter"]), []).append(sample[metric])
    return values


def join(parts: list[dict[str, list]]) -> dict[str, list]:
    """Of all tasks, the metrics that each of them has."""
    names = [name for name in parts[0] if all(name in part for part in parts)]
    return {name: [value for part in parts for value in part[name]] for name in names}


def samples_of(samples: dict[str, list[dict]]) -> Iterator[dict]:
    for task, of_task in samples.items():
        for sample in of_task:
            yield {"id": f"{task} {sample['doc_id']}", "task": task} | sample


# ---------------------------------------------------------------------------------------------
# Output


def show(records: list[Result]) -> None:
    first = records[0]["checkpoint"]
    print(f"\n{cli.printable(first['name'])}  ({cli.printable(first['path'])})")
    for record in records:
        words = ", ".join(map(cli.printable, record["words"]))
        print(f"{record['data']['documents']:,} documents: {words}")
        for name, metric in record["metrics"].items():
            print(f"  {name:<28} {show_metric(metric)}")
        for task, metrics in record["breakdown"].get("task", {}).items():
            name, metric = next(iter(metrics.items()))
            print(f"    {cli.printable(task):<36} {name} {show_metric(metric)}")
        cost = record["cost"]
        print(
            f"  {cost['seconds']:.1f} s: {cost['tokens_per_second']:,.0f} tokens/s; "
            f"{cost['lm_eval_seconds']:.1f} s of lm-eval's own"
        )
        print(f"record: {record.place}")


def show_metric(metric: dict) -> str:
    stderr = f" ± {metric['stderr']:.4f}" if "stderr" in metric else ""
    return f"{metric['value']:.4f}{stderr}"


# ---------------------------------------------------------------------------------------------
# The evaluation

HARNESS = Evaluation(
    name="harness",
    script=__file__,
    Options=Options,
    plan=plan,
    run=run,
    show=show,
    check=check,
    variants=variants,
)


def evaluate_harness(model: Any, tokenizer: Any, tasks: list[str], **options) -> list[Result]:
    """A record for each of lm-eval's tasks or groups.

    options: Options' fields, and dist, info, run and results_dir: see Evaluation. ValueError for
    unknown tasks, data that cannot be had, and generation settings that are not known here.
    """
    return [HARNESS(model, tokenizer, tasks=(name,), **options) for name in tasks]


def main(argv=None):
    command.main(HARNESS, argv, __doc__)


if __name__ == "__main__":
    cli.run(main)
