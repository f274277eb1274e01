"""A real model behind serve.py on loopback, beside the same model asked directly: MMLU by letters
and by continuations, greedy HumanEval, perplexity; the same answers, nats within 1e-4.

    ROSEVAL_DATA=… ROSEVAL_MODEL=…/smollm2-135m-instruct pytest --slow -s tests/serving
"""

import os

import numpy as np
import pytest
from servers import serving

import eval as perplexity
import humaneval_eval
import mmlu_eval
import results
from checkpoint import load_model
from tokenizer import build_tokenizer

pytestmark = pytest.mark.slow
SUBJECTS = ("global_facts", "sociology")
TEXT = 6000  # characters


@pytest.fixture(scope="module")
def place():
    directory = os.environ.get("ROSEVAL_MODEL")
    if not directory:
        pytest.skip("needs a real model: set ROSEVAL_MODEL to a Hugging Face directory")
    return directory


@pytest.fixture(scope="module")
def both(place):
    """(the URL of the model served, the model, its tokenizer)"""
    model, tokenizer = load_model(place, "float32", "cpu"), build_tokenizer(place)
    with serving(place, max_rows=4) as (client, _):
        yield client.url, model, tokenizer


def through(script, url, place, folder, *flags):
    """(the record that a command leaves of the endpoint, its arrays)"""
    words = ["--endpoint", url, "--tokenizer-name", place, "--results-dir", folder, "--log-samples"]
    words = words if script is mmlu_eval else words[:-1]
    script.main([*map(str, [*words, *flags])])
    (record,) = results.load_records(folder)
    return record, results.load_arrays(record)


@pytest.mark.parametrize("scoring, shots, limit", [("letter", 5, 8), ("continuation", 2, 3)])
def test_mmlu(scoring, shots, limit, both, place, data_dir, tmp_path):
    url, model, tokenizer = both
    asked = ["--data-path", data_dir / "mmlu", "--num-few-shot", shots, "--scoring", scoring]
    asked += ["--limit", limit, "--subjects", *SUBJECTS]
    record, arrays = through(mmlu_eval, url, place, tmp_path, *asked)
    wanted = mmlu_eval.evaluate_mmlu(
        *(model, tokenizer, data_dir / "mmlu", shots),
        scoring=scoring, limit=limit, subjects=SUBJECTS,
    )  # fmt: skip
    np.testing.assert_array_equal(arrays["predicted"], wanted.arrays["predicted"])
    difference = np.abs(arrays["logprobs"] - wanted.arrays["logprobs"]).max()
    print(
        f"{scoring}: {len(arrays['predicted'])} questions, nats differ by {difference:.1e} at most"
    )
    assert difference < 1e-4
    assert record["metrics"]["accuracy"] == wanted["metrics"]["accuracy"]
    assert record["protocol"]["endpoint"]["server"] == "roseval"


def test_humaneval(both, place, data_dir, tmp_path):
    url, model, tokenizer = both
    options = {"limit": 4, "max_new_tokens": 48}
    data = data_dir / "HumanEval.jsonl.gz"
    flags = ["--data-path", data, "--limit", 4, "--max-new-tokens", 48, "--workers", 1]
    record, _ = through(humaneval_eval, url, place, tmp_path, *flags)
    wanted = humaneval_eval.evaluate_humaneval(model, tokenizer, data, workers=1, **options)
    ours = [sample["completion"] for sample in results.load_samples(record)]
    assert ours == [sample["completion"] for sample in wanted.samples()] and len(ours) == 4
    assert record["metrics"] == wanted["metrics"]
    cost = record["cost"]
    assert cost["ttft_seconds"]["p50"] < cost["latency_seconds"]["p50"]
    assert {"tpot_seconds", "inter_token_seconds"} <= cost.keys()


def test_perplexity(both, place, data_dir, tmp_path):
    url, model, tokenizer = both
    text = tmp_path / "text.txt"
    text.write_text((data_dir / "text/wikitext2-valid.txt").read_text()[:TEXT])
    shape = {"seq_len": 256, "stride": 128}
    flags = ["--val-data", text, "--seq-len", 256, "--stride", 128]
    _, arrays = through(perplexity, url, place, tmp_path / "r", *flags)
    wanted = perplexity.evaluate_perplexity(model, tokenizer, val_data=(str(text),), **shape)
    np.testing.assert_array_equal(arrays["count"], wanted.arrays["count"])
    tokens = arrays["count"].sum()
    difference = abs(arrays["nll"].sum() - wanted.arrays["nll"].sum()) / tokens
    print(f"perplexity: {tokens:,} tokens, nats a token differ by {difference:.1e}")
    assert difference < 1e-5
    np.testing.assert_allclose(arrays["nll"], wanted.arrays["nll"], atol=1e-4 * 256)
