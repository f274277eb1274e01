"""eval.py on CUDA: the same bits on one GPU and two, agreement with float32 on CPU, memory.

python -m pytest tests/gpu/test_eval_gpu.py        # two GPUs for the NCCL part
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import ROOT, saved_checkpoint, torchrun
from on_gpus import held

import eval as eval_script
from config import load_config
from model import GPTModel
from modeling import mlp

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

WIDTHS = {"n_layers": 3, "n_heads": 4, "d_model": 256}
SHAPES = {
    "gpt2": ("gpt", {"d_ff": 1024, "activation": "gelu_new"}),
    "llama": ("llama", {"d_ff": 512}),
    "mistral": ("windowed", {"d_ff": 512, "sliding_window": 100}),
    "gemma2": (
        "windowed",
        {"d_ff": 512, "sliding_window": 100, "full_attention_layers": (1,), "norm_offset": True}
        | {"post_norm": True, "attention_softcap": 5.0, "logit_softcap": 8.0, "head_dim": 128}
        | {"embedding_scale": 16.0, "activation": "gelu_new"},
    ),
    "gpt_neox": (
        "gpt",
        {"d_ff": 1024, "position": "rope", "rotary_fraction": 0.25, "parallel_residual": True},
    ),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("random")
    for name, (kind, changes) in SHAPES.items():
        saved_checkpoint(directory / name, 1, kind, std=0.08, **WIDTHS, **changes)
    return directory


def evaluate(saved, name, n_gpus, tmp_path, *flags):
    words = ["--checkpoint-path", saved / name / "checkpoint-1", "--seq-len", "256"]
    words += ["--val-data", ROOT / "model.py", ROOT / "train.py", "--batch-size", "6"]
    words += ["--results-dir", tmp_path, "--run-name", f"{name}-{n_gpus}{''.join(flags)}"]
    out = torchrun(n_gpus, "eval.py", *words, *flags, cold=True)
    line = next(x for x in out.stdout.splitlines() if x.startswith("record: "))
    path = Path(line.removeprefix("record: "))
    return json.loads(path.read_text()), np.load(path.with_suffix(".npz"))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("compiled", ["on", "off"])
def test_one_and_two_gpus_give_the_same_bits(saved, tmp_path, name, compiled):
    one, losses_one = evaluate(saved, name, 1, tmp_path, "--compile", compiled)
    two, losses_two = evaluate(saved, name, 2, tmp_path, "--compile", compiled)
    assert two["cost"]["world_size"] == 2
    assert one["metrics"] == two["metrics"]
    for key in losses_one:
        assert losses_one[key].tobytes() == losses_two[key].tobytes(), key


@pytest.mark.parametrize("name", SHAPES)
def test_float32_and_bfloat16_against_the_cpu(saved, tmp_path, name):
    cpu, _ = evaluate(saved, name, 1, tmp_path, "--device", "cpu")
    exact, _ = evaluate(saved, name, 1, tmp_path, "--no-amp")
    half, _ = evaluate(saved, name, 1, tmp_path, "--compile", "on")
    loss = cpu["metrics"]["loss"]["value"]
    assert exact["metrics"]["loss"]["value"] == pytest.approx(loss, rel=1e-6)
    assert half["metrics"]["loss"]["value"] == pytest.approx(loss, rel=3e-3)
    assert cpu["data"]["tokens_scored"] == half["data"]["tokens_scored"]


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral"])  # soft caps take a compiled kernel
def test_a_short_eager_run_never_loads_the_compiler(saved, tmp_path, name):
    """Its import takes longer than everything else that such a run does."""
    words = ["--checkpoint-path", saved / name / "checkpoint-1", "--seq-len", "64"]
    words += ["--val-data", ROOT / "train.py", "--compile", "off", "--results-dir", tmp_path]
    code = f"import sys, eval; eval.main({[str(word) for word in words]})\n"
    code += "sys.exit('torch._dynamo' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr


def test_out_of_memory_halves_the_batch_and_goes_on(saved, tmp_path, capsys):
    small, _ = evaluate(saved, "gpt2", 1, tmp_path)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((held() + 150e6) / total)
    flags = ["--val-data", str(ROOT / "model.py"), str(ROOT / "train.py"), "--seq-len", "256"]
    flags += ["--checkpoint-path", str(saved / "gpt2" / "checkpoint-1"), "--batch-size", "128"]
    try:
        eval_script.main([*flags, "--results-dir", str(tmp_path), "--run-name", "oom"])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "out of memory: going on with a batch of 64" in capsys.readouterr().out
    (path,) = tmp_path.glob("oom/*/*.json")
    record = json.loads(path.read_text())
    assert record["protocol"]["batch_size"] < 128
    wanted = small["metrics"]["loss"]["value"]
    assert record["metrics"]["loss"]["value"] == pytest.approx(wanted, rel=1e-3)


def test_the_gelu_epilogue_is_the_tanh_gelu(monkeypatch):
    torch.manual_seed(0)
    model = GPTModel(load_config("gpt2")).cuda().for_inference(torch.bfloat16)
    ids = torch.randint(50257, (2, 128), device="cuda")
    fused = model.hidden(ids)
    monkeypatch.setattr(mlp, "_is_half", lambda weight: False)
    plain = model.hidden(ids)
    reference = GPTModel(model.config)
    reference.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    with torch.no_grad():
        wanted = reference.eval().hidden(ids.cpu())

    def error(x):
        return float((x.cpu() - wanted).norm() / wanted.norm())

    assert error(fused) < 1.2 * error(plain) + 1e-4
    assert error(fused) < 2e-2


def test_the_head_is_padded_once_and_never_seen():
    model = GPTModel(load_config("gpt2")).cuda().for_inference(torch.bfloat16)
    assert model.state_dict()["lm_head.weight"].shape == (50257, 768)
    assert model.lm_head.weight.data_ptr() == model.token_embedding.weight.data_ptr()
    logits = model.logits(torch.randn(3, 768, device="cuda"))
    assert logits.shape == (3, 50257)
