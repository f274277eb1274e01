"""Samples drawn for tasks, kept in journals, so that interrupted work goes on at any world size.

asked = Asked(names, prompts, sampling, n_samples)
known = known_samples(folder.known(), names)
for entry in draw(backend, asked, known):           # this rank's: {"task_id", "sample", ...}
    folder.append(entry)
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import cli
from backends import Backend, Facts, Sampling
from durable import Folder
from tasks import chat


@dataclass(frozen=True)
class Asked:
    """tasks: names, which key the random numbers. prompts: token ids of each. sampling: of all of
    them, or of each."""

    tasks: Sequence[str]
    prompts: list[list[int]]
    sampling: Sampling | Sequence[Sampling]
    n_samples: int = 1
    batch_size: int | None = None


def encode_prompts(
    tokenizer: Any, names: Sequence[str], texts: Sequence[str], add_bos: bool, by_template: bool
) -> list[list[int]]:
    """Token ids of each text; by_template: a chat template wrote them. ValueError for one without
    any."""
    if by_template:
        prompts = chat.encode(tokenizer, texts, add_bos)
    else:
        bos = [tokenizer.bos_token_id] if add_bos else []
        prompts = [bos + ids.tolist() for ids in tokenizer.encode_batch(list(texts))]
    if not all(prompts):
        name = names[prompts.index([])]
        raise ValueError(f"task {name}: its prompt is empty; --bos on would start it")
    return prompts


def how_drawn(protocol: dict) -> str:
    """The word for the sampling of a protocol."""
    temperature = protocol["temperature"]
    return f"temperature {temperature:g}" if temperature else "greedy"


def end_tokens(facts: Facts) -> set[int]:
    """End of text, and whatever else has no text: special tokens, and a padded head's extra ids."""
    tokenizer = facts.tokenizer
    ends = {*tokenizer.special_ids, *range(tokenizer.vocab_size, facts.vocab_size)}
    return ends if tokenizer.eos_token_id is None else ends | {tokenizer.eos_token_id}


def known_samples(entries: list[dict], tasks: Collection[str]) -> dict[tuple[str, int], dict]:
    """{(task_id, sample): all that journals know of it} of these tasks' samples."""
    known: dict[tuple[str, int], dict] = {}
    for entry in entries:
        if entry["task_id"] in tasks:
            known.setdefault((entry["task_id"], entry["sample"]), {}).update(entry)
    # what was found out later of a sample whose own line is damaged
    return {at: entry for at, entry in known.items() if "completion" in entry}


def draw(backend: Backend, asked: Asked, known: dict[tuple[str, int], dict]) -> Iterator[dict]:
    """This rank's entries of the samples that are not known, as they are finished."""
    at = {task: i for i, task in enumerate(asked.tasks)}
    for sample in backend.generate(
        asked.prompts,
        asked.sampling,
        asked.n_samples,
        keys=asked.tasks,
        end_ids=end_tokens(backend.facts),
        done={(at[task], s) for task, s in known},
        batch_size=asked.batch_size,
    ):
        yield {
            "task_id": asked.tasks[sample.prompt_index],
            "sample": sample.sample_index,
            "completion": sample.text or "",
            "finish": sample.finish_reason,
            "tokens": len(sample.token_ids),
        }


def in_order(entries: list[dict], asked: Asked) -> list[dict]:
    """All ranks' entries, by task and sample."""
    place = {task: i for i, task in enumerate(asked.tasks)}
    entries = sorted(entries, key=lambda entry: (place[entry["task_id"]], entry["sample"]))
    total = len(asked.tasks) * asked.n_samples
    assert len(entries) == total, f"{len(entries)} samples where {total} were asked for"
    return entries


def draw_all(backend: Backend, asked: Asked, folder: Folder, name: str) -> tuple[list[dict], int]:
    """(every sample's entry in order, on every rank, and how many a journal held already)."""
    dist, known = backend.dist, known_samples(folder.known(), asked.tasks)
    mine = [known[at] for at in dist.mine(sorted(known))]
    with cli.progress(len(asked.tasks) * asked.n_samples, name, "sample") as bar:
        bar.update(len(known))
        for entry in draw(backend, asked, known):
            folder.append(entry)
            mine.append(entry)
            bar.update(min(dist.world_size, bar.total - bar.n))
    return in_order([entry for part in dist.gather(mine) for entry in part], asked), len(known)
