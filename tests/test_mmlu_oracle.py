"""lm-evaluation-harness as the oracle: its own task files render the prompts, its own scorer scores
them with transformers on the same weights, in float32.

Needs `pip install lm-eval --no-deps` and what it imports (datasets, dill, evaluate, more_itertools,
pytablewriter, rouge-score, sacrebleu, scikit-learn, sqlitedict, word2number); skipped without.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import checkpoint
from mmlu_eval import evaluate_mmlu
from tasks.questions import read_data
from tasks.templates import load_template
from tokenizer import build_tokenizer

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: no oracle")
pytest.importorskip(
    "lm_eval.models.huggingface", reason="a package that lm-eval imports is missing"
)
TASKS = Path(lm_eval.__file__).parent / "tasks" / "mmlu"
LETTERS = "ABCD"
FOLDERS = {"lm_eval": "default", "continuation": "continuation"}
# short and long prompts, formulas, and text that ends in white space or begins with it
SUBJECTS = ["abstract_algebra", "sociology", "high_school_us_history"]


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def instances(template, data, subject, shots, folder):
    """The requests that lm-eval's own MMLU task makes of our questions, in order."""
    from lm_eval.api.task import ConfigurableTask

    tasks = TASKS / FOLDERS[template]
    config = yaml.safe_load(next(tasks.glob("_*_template_yaml")).read_text())
    own = yaml.safe_load((tasks / f"mmlu_{subject}.yaml").read_text())
    files = {}
    for split, rows in (("test", data.questions), ("dev", data.examples[subject])):
        files[split] = str(folder / f"{template}_{subject}_{shots}_{split}.jsonl")
        rows = [
            {"question": q.question, "choices": q.choices, "answer": q.answer}
            for q in rows
            if q.subject == subject
        ]
        Path(files[split]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    if not shots:
        del files["dev"], config["fewshot_split"], config["fewshot_config"]
    config |= {
        "task": own["task"],
        "description": own["description"],
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
        "num_fewshot": shots,
    }
    task = ConfigurableTask(config=config)
    task.set_fewshot_seed(0)
    task.build_all_requests(rank=0, world_size=1)
    return task.instances


def make_checkpoint(shape, tokenizer_dir, directory):
    """A random Hugging Face model with room for every five-shot prompt, and its tokenizer."""
    from transformers import (
        AutoTokenizer,
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
    )

    torch.manual_seed(0)
    if shape == "gpt2":
        config = GPT2Config(n_positions=4096, n_embd=64, n_layer=2, n_head=4, initializer_range=0.1)
        model = GPT2LMHeadModel(config)
    else:
        config = LlamaConfig(
            vocab_size=50257,
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=4096,
            initializer_range=0.1,
        )
        model = LlamaForCausalLM(config)
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(directory)


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def pair(request, data_dir, tmp_path_factory):
    """(our model, our tokenizer, lm-eval's wrapper) of one random checkpoint."""
    from lm_eval.models.huggingface import HFLM

    directory = tmp_path_factory.mktemp(request.param)
    make_checkpoint(request.param, data_dir / "tokenizers" / "gpt2", directory)
    theirs = HFLM(
        pretrained=str(directory), device="cpu", dtype="float32", batch_size=4, max_length=4096
    )
    ours = checkpoint.load_model(directory, "float32")
    return ours, build_tokenizer(directory), theirs


def compare(pair, data_path, template, shots, limit, subjects, tmp_path):
    model, tokenizer, theirs = pair
    data = read_data(data_path, shots, subjects=subjects or None, limit=limit)
    requests = [r for s in data.subjects for r in instances(template, data, s, shots, tmp_path)]
    assert len(requests) == len(LETTERS) * len(data.questions)
    wanted = theirs.loglikelihood(requests, disable_tqdm=True)
    wanted = np.array([value for value, _ in wanted]).reshape(-1, len(LETTERS))
    record = evaluate_mmlu(
        model, tokenizer, data_path, shots, template=template, subjects=subjects, limit=limit
    )
    assert record["protocol"]["shortened"] == 0
    found = record.arrays["logprobs"]
    # lm-eval adds a choice's tokens up in float32, whose last digit is 6e-5 at 1,000 nats
    assert (np.abs(found - wanted) < np.maximum(1e-4, 1e-6 * np.abs(wanted))).all()
    assert np.array_equal(found.argmax(-1), wanted.argmax(-1))
    assert np.ptp(wanted, axis=1).min() > 1e-3  # the choices do differ: agreement means something
    gold = np.array([q.answer for q in data.questions])
    assert record["metrics"]["accuracy"]["value"] == np.mean(wanted.argmax(-1) == gold)
    if template == "continuation":
        characters = np.array([[len(c) for c in q.choices] for q in data.questions])
        normalised = np.mean((wanted / characters).argmax(-1) == gold)
        assert record["metrics"]["accuracy_normalised"]["value"] == normalised


@pytest.mark.parametrize("template", ["lm_eval", "continuation"])
@pytest.mark.parametrize("shots", [0, 5])
def test_prompts_are_lm_evals_byte_for_byte(template, shots, data_dir, tmp_path):
    data = read_data(data_dir / "mmlu", shots, subjects=SUBJECTS, limit=40)
    rendered = load_template(template)
    scoring = rendered.scorings[0]
    for subject in SUBJECTS:
        head = rendered.render_head(subject, None, data.examples[subject], scoring)
        asked = [q for q in data.questions if q.subject == subject]
        requests = instances(template, data, subject, shots, tmp_path)
        assert len(requests) == len(LETTERS) * len(asked)
        for request in requests:
            q = asked[request.doc_id]
            answer = rendered.render_answer(q, request.idx, scoring)
            assert request.args == (head + rendered.render_question(q), answer)


@pytest.mark.parametrize("template,shots,limit", [("lm_eval", 5, 4), ("lm_eval", 0, 8)])
def test_letters_score_as_in_lm_eval(template, shots, limit, pair, data_dir, tmp_path):
    compare(pair, data_dir / "mmlu", template, shots, limit, SUBJECTS[:2], tmp_path)


def test_whole_choices_score_as_in_lm_eval(pair, data_dir, tmp_path):
    compare(pair, data_dir / "mmlu", "continuation", 0, 4, SUBJECTS[:2], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("template,shots", [("lm_eval", 5), ("lm_eval", 0), ("continuation", 5)])
def test_hundreds_of_questions_score_as_in_lm_eval(template, shots, pair, data_dir, tmp_path):
    limit = 2 if template == "continuation" else 5
    compare(pair, data_dir / "mmlu", template, shots, limit, (), tmp_path)
