"""sweeping/planner.py: labels of entries and the lines that a sweep prints. What it chooses is in
tests/test_sweep.py."""

import math
from types import SimpleNamespace

import pytest
import torch
from quantised_files import source

import checkpoint
import results
from eval import PERPLEXITY
from evaluation import ModelOptions
from formats import filling
from humaneval_eval import HUMANEVAL
from mmlu_eval import MMLU
from sweep import SharedOptions, entries_of
from sweeping import planner
from sweeping.planner import Planner, Work, headline
from sweeping.seen import Seen, signature


def entries(kind, *values, **shared):
    found = []
    for each in values:
        found += entries_of("e.yaml", kind, each, ModelOptions(), SharedOptions(**shared))
    return [entry.labelled(found) for entry in found]


def labels(*args, **shared):
    return [entry.label for entry in entries(*args, **shared)]


def test_a_label_is_the_name_and_what_sets_an_entry_apart():
    shard = {"data-mode": "fineweb_npy", "val-npy": "x.npy"}
    assert labels(PERPLEXITY, shard) == ["perplexity"]
    assert labels(PERPLEXITY, shard, shard | {"seq-len": 32}) == [
        "perplexity",
        "perplexity seq-len=32",
    ]
    both = {"data-path": "m", "template": ["lm_eval", "continuation"]}
    assert labels(MMLU, both) == [
        "mmlu template=lm_eval scoring=letter",
        "mmlu template=continuation scoring=continuation",
    ]
    drawn = {"data-path": "p", "temperature": 0.5, "num-samples": 2}
    # stop strings that nobody gave are the prompt's, which its name tells
    assert labels(HUMANEVAL, drawn, drawn | {"temperature": 0.25, "stop": ["\nclass", "b"]}) == [
        "humaneval temperature=0.5",
        "humaneval temperature=0.25 stop=\\nclass,b",
    ]
    byte = {"tokenizer-name": "byte"}
    assert labels(MMLU, {"data-path": "m"}, {"data-path": "m"} | byte) == [
        "mmlu",
        "mmlu tokenizer-name=byte",
    ]


def test_shared_options_are_for_evaluations_that_have_them_and_do_not_say():
    shard = {"data-mode": "fineweb_npy", "val-npy": "x.npy"}
    shared = {"batch_size": 3, "seed": 7, "compile": "off"}
    one, two = entries(PERPLEXITY, shard, shard | {"batch-size": 5, "compile": True}, **shared)
    assert (one.options.batch_size, one.options.seed, one.options.compile) == (3, 7, "off")
    assert (two.options.batch_size, two.options.seed, two.options.compile) == (5, 7, "on")
    (drawn,) = entries(HUMANEVAL, {"data-path": "p"}, **shared)
    assert (drawn.options.batch_size, drawn.options.sampling.seed) == (3, 7)
    (asked,) = entries(MMLU, {"data-path": "p"}, **shared)
    assert asked.options.batch_size == 3


@pytest.mark.parametrize(
    "stderr, wanted",
    [
        (0.125, "pass@1 0 ± 0.12  (1.5 s)"),
        (math.nan, "pass@1 0  (1.5 s)"),
        (0.0, None),
        (None, None),
    ],
)
def test_an_error_that_is_not_known_is_not_printed(stderr, wanted):
    metrics = {"pass@1": results.metric(0.0, stderr, 1)}
    line = headline({"metrics": metrics, "cost": {"seconds": 1.5}})
    assert line == (wanted or "pass@1 0  (1.5 s)")


def test_auto_counts_codes_where_all_entries_leave_them(monkeypatch):
    """Of a quantised file, on a GPU; an entry's rule rounds what is no longer packed then."""
    monkeypatch.setattr(planner.parallel, "in_groups", lambda *args: args[-1] and args[-1]())
    shard = {"data-mode": "fineweb_npy", "val-npy": "x.npy"}
    both = entries(PERPLEXITY, shard, shard | {"quantise": "rtn-w8"})
    gpus = SimpleNamespace(device=torch.device("cuda", 0))
    options = SimpleNamespace(watch=False, poll_seconds=0.1)
    path = source("gptq-4bit-v1")
    kept = Planner(ModelOptions(shard="auto"), options, [], "bfloat16", gpus)
    seen = Seen(path, signature(path), SimpleNamespace(name="m", step=None), 0.0)
    assert kept._make_plan(seen)
    wanted = filling.block_bytes(checkpoint.open(path), "bfloat16")
    assert wanted and seen.block_bytes == wanted
    kept.entries = {entry.label: entry for entry in both}
    for labels, found in (
        ([both[0].label], wanted),
        ([both[1].label], None),
        ([entry.label for entry in both], None),
    ):
        work = Work(path, seen.files, seen.about, "", dict.fromkeys(labels, ""), None, wanted)
        assert kept.in_groups(work, gpus) == found
