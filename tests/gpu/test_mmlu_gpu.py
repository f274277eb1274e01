"""mmlu_eval.py on CUDA: lm-eval as the oracle in float32, prefix cache, one GPU and two.

ROSEVAL_DATA=... python -m pytest tests/gpu/test_mmlu_gpu.py            # 1 or 2 GPUs
ROSEVAL_DATA=... python -m pytest tests/gpu/test_mmlu_gpu.py --slow     # all 14,042 questions
"""

import numpy as np
import pytest
import torch
from builders import CONFIGS, save_model, torchrun

import checkpoint
from backends import strips
from config import load_config
from mmlu_eval import evaluate_mmlu
from model import GPTModel
from modeling.attention import Segments, attend_segments
from tasks.questions import read_data
from tasks.templates import load_template
from tokenizer import build_tokenizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

SIZES = {"vocab_size": 50257, "max_position_embeddings": 4096, "n_layers": 12, "n_heads": 12}
SHAPES = {
    "gpt2": load_config("gpt2").replace(max_position_embeddings=4096, dropout=0.0),
    "llama": CONFIGS["llama"].replace(
        **SIZES, n_kv_heads=4, d_model=768, d_ff=2048, tie_embeddings=True
    ),
}


@pytest.fixture(scope="module", params=SHAPES)
def saved(request, gpt2, tmp_path_factory):
    """A random 124M checkpoint of each shape with GPT-2's tokenizer, in float32."""
    torch.manual_seed(0)
    model = GPTModel(SHAPES[request.param])
    for p in model.parameters():
        if p.dim() > 1:
            p.data.normal_(std=0.03)
    return save_model(model, tmp_path_factory.mktemp(request.param), 1, gpt2)


def evaluate(saved, data_dir, dtype="float32", **options):
    model = checkpoint.load_model(saved, dtype, "cuda")
    return evaluate_mmlu(model, build_tokenizer(saved), data_dir / "mmlu", 5, **options)


def lm_eval_scores(saved, data_dir, limit):
    """lm-eval's log-probabilities [questions, 4] of the letters, in float32 without TF32."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = HFLM(
        pretrained=str(saved), device="cuda", dtype="float32", batch_size=16, max_length=4096
    )
    encode, known = model.tok_encode, {}

    def remember(text, *args, **kwargs):  # a context is encoded once for each letter: the same
        if text not in known:
            known[text] = encode(text, *args, **kwargs)
        return known[text]

    model.tok_encode = remember
    data, template = read_data(data_dir / "mmlu", 5, limit=limit), load_template("lm_eval")
    requests = []
    for i, q in enumerate(data.questions):
        head = template.render_head(q.subject, None, data.examples[q.subject], "letter")
        context = head + template.render_question(q)
        for k, letter in enumerate("ABCD"):
            requests.append(Instance("loglikelihood", {}, (context, f" {letter}"), k, ("", i, 1)))
    values = model.loglikelihood(requests, disable_tqdm=True)
    return np.array([value for value, _ in values]).reshape(-1, 4)


@pytest.mark.parametrize("limit", [5, pytest.param(None, marks=pytest.mark.slow)])
def test_predictions_are_lm_evals(limit, saved, data_dir):
    wanted = lm_eval_scores(saved, data_dir, limit)
    found = evaluate(saved, data_dir, limit=limit).arrays["logprobs"]
    assert len(found) == (14042 if limit is None else 57 * limit)
    ordered = np.sort(wanted)
    print(f"largest difference {np.abs(found - wanted).max():.2e} over {len(found):,} questions")
    assert np.abs(found - wanted).max() < 1e-4
    differing = np.flatnonzero(found.argmax(-1) != wanted.argmax(-1))
    gaps = (ordered[:, -1] - ordered[:, -2])[differing]
    assert (gaps < 1e-5).all(), f"{len(differing)} differ, by {gaps}"


def test_the_prefix_cache_changes_nothing(saved, data_dir):
    cached, plain = (
        evaluate(saved, data_dir, limit=8, no_prefix_cache=not use).arrays["logprobs"]
        for use in (True, False)
    )
    # logits stay below 10 with such weights; the bound is 1e-5 * max(1, largest |logit|)
    assert np.abs(cached - plain).max() < 1e-4
    for i in np.flatnonzero(cached.argmax(-1) != plain.argmax(-1)):
        top = np.sort(plain[i])
        assert top[-1] - top[-2] < 2e-4, f"question {i} is no tie"


def test_bfloat16_stays_near_float32(saved, data_dir):
    exact, rounded = (
        evaluate(saved, data_dir, dtype, limit=8).arrays["logprobs"]
        for dtype in ("float32", "bfloat16")
    )
    spread = exact.std(axis=-1).mean()  # what tells the choices apart
    assert np.abs(exact - rounded).mean() < 0.1 * spread
    assert np.mean(exact.argmax(-1) == rounded.argmax(-1)) > 0.9


def test_rows_laid_end_to_end_are_as_near_to_float32_as_padded_ones(saved, data_dir, monkeypatch):
    exact = evaluate(saved, data_dir, limit=8)
    found = evaluate(saved, data_dir, "bfloat16", limit=8)
    monkeypatch.setattr(strips, "apply", lambda *asked: False)
    padded = evaluate(saved, data_dir, "bfloat16", limit=8)
    assert found["cost"]["batches"] < padded["cost"]["batches"] / 2
    wanted = exact.arrays["logprobs"]
    errors = [np.abs(x.arrays["logprobs"] - wanted).mean() for x in (found, padded)]
    print(f"mean errors: {errors[0]:.2e} end to end, {errors[1]:.2e} padded")
    assert errors[0] < 1.3 * errors[1]


@pytest.mark.parametrize("scale", [None, 0.2])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "groups", "width"), [(4, 4, 64), (8, 2, 128), (4, 1, 256)])
def test_segments_of_attention_are_their_plain_twins(heads, groups, width, causal, scale):
    torch.manual_seed(0)
    queries = torch.tensor([0, 300, 301, 555, 1000], dtype=torch.int32)
    keys = queries if causal else torch.tensor([7, 200, 1000, 1003, 1900], dtype=torch.int32)
    N, M = int(queries[-1]), int(keys[-1])
    shapes = (1, heads, N, width), (1, groups, M, width), (1, groups, M, width)
    q, k, v = (torch.randn(shape).bfloat16() for shape in shapes)
    on_gpu = [Segments(x.cuda(), int(x.diff().max())) for x in (queries, keys)]
    terms = {"causal": causal, "scale": scale}
    out, lse = attend_segments(q.cuda(), k.cuda(), v.cuda(), *on_gpu, **terms)
    twins = attend_segments(
        q.float(), k.float(), v.float(), Segments(queries, 0), Segments(keys, 0), **terms
    )
    assert (out.cpu().float() - twins[0]).abs().max() < 0.02
    assert (lse.cpu() - twins[1]).abs().max() < 0.02


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("template", ["lm_eval", "continuation"])
def test_one_gpu_and_two_give_the_same_bits(template, saved, data_dir, tmp_path):
    arrays = []
    for n_gpus in (1, 2):
        words = ["--num-few-shot", "5", "--checkpoint-path", saved, "--limit", "40"]
        words += ["--data-path", data_dir / "mmlu", "--template", template]
        torchrun(n_gpus, "mmlu_eval.py", *words, "--results-dir", tmp_path / str(n_gpus), cold=True)
        arrays.append(next((tmp_path / str(n_gpus)).rglob("*.npz")))
    one, two = (np.load(path) for path in arrays)
    for name in one.files:
        assert np.array_equal(one[name], two[name]), name
