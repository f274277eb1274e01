"""lm-eval's own client of OpenAI's API against a server, beside harness_eval.py on the same model.
It has no tokenizer of its own: it asks the server's."""

import json

import pytest
from builders import saved_checkpoint, small_mmlu
from servers import TEMPLATE, serving

pytest.importorskip("lm_eval.models.api_models", reason="lm-eval is not installed: no oracle")
pytest.importorskip("tenacity", reason="lm-eval's client needs it")
from harness_tasks import mmlu_rows, rebase

from checkpoint import load_model
from tokenizer import build_tokenizer

NAME, NEW = "checkpoint-10", 12


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    import datasets

    folder = tmp_path_factory.mktemp("lm_eval")
    small_mmlu(folder / "mmlu", n=3)
    splits = {split: mmlu_rows(folder / "mmlu", "anatomy", split) for split in ("dev", "test")}
    (folder / "tasks").mkdir()
    rebase(folder / "tasks", "mmlu_anatomy", "mmlu/default/mmlu_anatomy.yaml", splits)
    rows = [{"question": f"What is {i} + é?", "answer": f"It is.\n#### {i}"} for i in range(4)]
    rebase(folder / "tasks", "gsm8k", "gsm8k/gsm8k.yaml", {"train": rows, "test": rows})
    path = saved_checkpoint(folder / "run", kind="llama", max_position_embeddings=1024)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
        yield folder


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [1, 4])
def test_lm_eval_finds_what_we_find(place, tmp_path, at_once):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from harness_eval import evaluate_harness

    path, tasks = place / "run" / NAME, ["gsm8k", "mmlu_anatomy"]
    model, tokenizer = load_model(path, "float32", "cpu"), build_tokenizer(path)
    words = {"include_path": str(place / "tasks"), "gen_kwargs": f"max_gen_toks={NEW}"}
    words |= {"num_few_shot": 1, "results_dir": str(tmp_path / "ours")}
    ours = evaluate_harness(model, tokenizer, tasks, **words)
    with serving(path, key="secret") as (client, _):
        address = {"base_url": f"{client.url}/v1/completions", "auth_token": "secret"}
        arguments = address | {"model": NAME, "max_length": 1024, "num_concurrent": at_once}
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OPENAI_API_KEY", "secret")
            theirs = simple_evaluate(
                model="local-completions",
                model_args=arguments,
                tasks=tasks,
                task_manager=TaskManager(
                    include_path=words["include_path"], include_defaults=False
                ),
                num_fewshot=1,
                gen_kwargs=words["gen_kwargs"],
                bootstrap_iters=0,
                batch_size=2,
            )
    same_samples(ours, theirs, tasks)


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [1, 4])
def test_lm_evals_client_of_chats(place, tmp_path, at_once):
    """It sends messages, and the server puts them into the checkpoint's template; here harness_eval
    does."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from harness_eval import evaluate_harness

    path, tasks = place / "run" / NAME, ["gsm8k"]
    model, tokenizer = load_model(path, "float32", "cpu"), build_tokenizer(path)
    words = {"include_path": str(place / "tasks"), "gen_kwargs": f"max_gen_toks={NEW}"}
    words |= {
        "num_few_shot": 2,
        "results_dir": str(tmp_path / "ours"),
        "chat_template": "on",
        "fewshot_as_turns": False,
    }
    ours = evaluate_harness(model, tokenizer, tasks, **words)
    with serving(path) as (client, _):
        url = f"{client.url}/v1/chat/completions"
        theirs = simple_evaluate(
            model="local-chat-completions",
            model_args={"base_url": url, "model": NAME, "num_concurrent": at_once},
            tasks=tasks,
            task_manager=TaskManager(include_path=words["include_path"], include_defaults=False),
            num_fewshot=2,
            gen_kwargs=words["gen_kwargs"],
            apply_chat_template=True,
            fewshot_as_multiturn=False,
            bootstrap_iters=0,
        )
    same_samples(ours, theirs, tasks)


def same_samples(ours, theirs, tasks):
    for record, task in zip(ours, tasks, strict=True):
        wanted = sorted(theirs["samples"][task], key=lambda s: (s["doc_id"], s["filter"]))
        samples = [json.loads(json.dumps(sample, default=str)) for sample in record.samples()]
        samples.sort(key=lambda sample: (sample["doc_id"], sample["filter"]))
        assert len(samples) == len(wanted) > 0
        for own, other in zip(samples, wanted, strict=True):
            for mine, their in zip(own["resps"], other["resps"], strict=True):
                if isinstance(their[0], str):
                    assert mine == their
                else:
                    (value, greedy), (other_value, other_greedy) = mine[0], their[0]
                    assert float(value) == pytest.approx(other_value, abs=1e-4)
                    assert str(greedy) == str(other_greedy)
