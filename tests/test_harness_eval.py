"""harness_eval.py beside lm-evaluation-harness's own model class, on its own task definitions."""

import json
from dataclasses import replace

import numpy as np
import pytest
from builders import tiny_model, torchrun

pytest.importorskip("lm_eval.models.huggingface", reason="lm-eval is not installed: no oracle")
from harness_tasks import write_tasks
from transformers import LlamaConfig, LlamaForCausalLM

import harness_eval
from backends import CacheOptions
from backends.local import facts_in_memory
from tokenizer import build_tokenizer

LIMIT, SHOTS, NEW = 3, 2, 12


@pytest.fixture(scope="module")
def place(tmp_path_factory, data_dir):
    """A folder with `model` (random, its context shorter than some prompts) and `tasks`."""
    import shutil

    import datasets
    import torch

    folder = tmp_path_factory.mktemp("harness")
    shutil.copytree(data_dir / "tokenizers" / "gpt2", folder / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50257, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512,
        bos_token_id=50256, eos_token_id=50256, initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|endoftext|>{% endfor %}"
    template += "{% if add_generation_prompt %}[assistant]{% endif %}"
    (folder / "model/chat_template.jinja").write_text(template)
    write_tasks(folder / "tasks", data_dir, LIMIT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
        yield folder


@pytest.fixture(scope="module")
def theirs(place):
    """A function of tasks' names: lm-eval's results of them with transformers."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(place / "tasks"), include_defaults=False)
    model = HFLM(pretrained=str(place / "model"), dtype="float32", device="cpu", batch_size=4)
    return lambda tasks, **chat: simple_evaluate(
        model=model, tasks=sorted(tasks), task_manager=manager, num_fewshot=SHOTS,
        limit=LIMIT, gen_kwargs=f"max_gen_toks={NEW}", bootstrap_iters=0, **chat,
    )  # fmt: skip


def flags(place, results, tasks):
    words = ["--checkpoint-path", place / "model", "--tasks", ",".join(sorted(tasks))]
    words += ["--limit", LIMIT]
    words += ["--include-path", place / "tasks", "--num-few-shot", SHOTS, "--dtype", "float32"]
    return [
        *words,
        "--gen-kwargs",
        f"max_gen_toks={NEW}",
        "--log-samples",
        "--results-dir",
        results,
    ]


def records_of(folder):
    found = {}
    for path in folder.rglob("harness-*.json"):
        record = json.loads(path.read_text())
        lines = path.with_suffix(".jsonl").read_text().splitlines()
        found[record["protocol"]["task"]] = record, [json.loads(line) for line in lines]
    return found


def test_answers_are_lm_evals(place, theirs, tmp_path, capsys):
    """A choice, a text, and a loss over windows; lm-eval's bars are for terminals."""
    quick = {"mmlu_anatomy", "bbh_fewshot_date_understanding", "wikitext"}
    harness_eval.main([*map(str, flags(place, tmp_path, quick)), "--device", "cpu"])
    assert "it/s]" not in capsys.readouterr().err  # datasets has bars of its own
    found = records_of(tmp_path)
    assert found.keys() == quick
    compare(found, theirs(quick))


@pytest.mark.slow
def test_every_answer_is_lm_evals_on_two_ranks(place, theirs, tmp_path):
    every = {path.stem for path in (place / "tasks").glob("*.yaml")}
    torchrun(2, "harness_eval.py", *flags(place, tmp_path, every), cold=True)
    found = records_of(tmp_path)
    assert found.keys() == every and len(every) == 8
    compare(found, theirs(every))


@pytest.mark.slow
@pytest.mark.parametrize("as_turns", [True, False])
def test_chats_are_lm_evals(place, theirs, tmp_path, as_turns):
    """By a template in which a special token stands."""
    tasks = {"mmlu_anatomy", "gsm8k", "bbh_cot_fewshot_web_of_lies"}
    words = ["--chat-template", "--system-prompt", "Be brief."]
    words += [f"--{'' if as_turns else 'no-'}fewshot-as-turns"]
    harness_eval.main([*map(str, flags(place, tmp_path, tasks)), *words, "--device", "cpu"])
    wanted = theirs(
        tasks,
        apply_chat_template=True,
        system_instruction="Be brief.",
        fewshot_as_multiturn=as_turns,
    )
    compare(records_of(tmp_path), wanted)


def compare(found, theirs):
    for task, (record, samples) in found.items():
        wanted = theirs["samples"][task]
        assert len(samples) == len(wanted) > 0, task
        for ours, their in zip(samples, wanted):
            assert (ours["doc_id"], ours["filter"]) == (their["doc_id"], their["filter"])
            for own, other in zip(ours["resps"], their["resps"], strict=True):
                same_answer(own[0], other[0])
        assert record["metrics"]
        for name, metric in record["metrics"].items():
            key = name if "," in name else f"{name},none"
            value = theirs["results"][task][key]
            assert metric["value"] == pytest.approx(value, rel=1e-4), (task, name)
        assert record["data"]["documents"] == LIMIT


def same_answer(ours, theirs):
    """A text, a log-probability, or a log-probability and whether it is greedy."""
    if isinstance(theirs, str):
        assert ours == theirs
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, abs=1e-3, rel=1e-5)
    else:
        assert ours[0] == pytest.approx(theirs[0], abs=1e-4, rel=1e-5) and ours[1] == theirs[1]


@pytest.mark.slow
def test_any_number_of_ranks_gives_the_same_bits(place, tmp_path):
    tasks = {"mmlu_anatomy", "gsm8k", "truthfulqa_mc2"}
    for ranks in (1, 3):
        torchrun(ranks, "harness_eval.py", *flags(place, tmp_path / str(ranks), tasks), cold=True)
    one, three = (
        {path.name: dict(np.load(path)) for path in (tmp_path / ranks).rglob("*.npz")}
        for ranks in ("1", "3")
    )
    assert one.keys() == three.keys() and len(one) == 3
    for name, arrays in one.items():
        for key, values in arrays.items():
            assert np.array_equal(values, three[name][key]), (name, key)


def test_errors_are_one_line(place, monkeypatch):
    from harness_eval import HARNESS
    from tasks import harness

    manager = harness._manager  # reading lm-eval's own tasks takes seconds
    monkeypatch.setattr(harness, "_manager", lambda path, defaults: manager(path, False))
    with pytest.raises(ValueError, match="--tasks is needed"):
        HARNESS.Options()
    tasks = str(place / "tasks")
    for words, said in (
        ({"tasks": ("no_such_task",)}, "no task, group or tag of that name"),
        ({"tasks": ("gsm8k",), "include_path": "nowhere"}, "nowhere: no such directory"),
        ({"tasks": ("gsm8k",), "gen_kwargs": "what"}, "not of the form key=value"),
    ):
        with pytest.raises(ValueError, match=said):
            HARNESS.check(HARNESS.Options(**{"include_path": tasks} | words))
    options = HARNESS.Options(
        tasks=("mmlu_anatomy",), include_path=tasks, cache=CacheOptions("int8")
    )
    with pytest.raises(ValueError, match="--kv-dtype is of what is drawn: all of these tasks are"):
        HARNESS.check(options)
    both = replace(options, tasks=("mmlu_anatomy", "gsm8k"))
    HARNESS.check(both)
    facts = facts_in_memory(tiny_model(), build_tokenizer("byte"))
    terms = [HARNESS.plan(one, facts).protocol.get("kv_dtype") for one in HARNESS.variants(both)]
    assert terms == [None, "int8-token-head-sym-absmax"]
