"""eval.py --reference on CUDA: nothing from itself, the numbers of the CPU, one GPU and two.

python -m pytest tests/gpu/test_reference_gpu.py        # two GPUs for the NCCL part
"""

import pytest
import torch
from builders import saved_checkpoint, token_shard, torchrun

import results

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
WIDTHS = {"n_layers": 3, "n_heads": 4, "d_model": 256, "d_ff": 512}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    for step in (1, 2):
        saved_checkpoint(folder / "run", step, "llama", std=0.05, **WIDTHS)
    token_shard(folder / "x.npy", n=20_001)
    return folder


def evaluate(place, name, n, *flags, path=2):
    words = ["--checkpoint-path", place / f"run/checkpoint-{path}", "--data-mode", "fineweb_npy"]
    words += ["--val-npy", place / "x.npy", "--seq-len", "128", "--batch-size", "4"]
    words += ["--reference", place / "run/checkpoint-1", "--results-dir", place / name, *flags]
    torchrun(n, "eval.py", *words, cold=True)
    [record] = results.load_records(place / name)
    return record


@pytest.mark.parametrize("compile", ["on", "off"])
def test_nothing_from_itself(place, compile):
    """In bfloat16, through the padded head, states made and read."""
    for _ in range(2):
        record = evaluate(place, f"self-{compile}", 0, "--compile", compile, path=1)
        assert record["metrics"]["kl"]["value"] == 0
        assert record["metrics"]["same_top"]["value"] == 1


def test_numbers_are_the_cpus(place):
    cuda = evaluate(place, "float32", 0, "--dtype", "float32")["metrics"]
    cpu = evaluate(place, "cpu", 0, "--device", "cpu")["metrics"]
    for name in ("kl", "kl_median", "kl_99", "rms_delta_p", "ln_ppl_ratio"):
        assert cuda[name]["value"] == pytest.approx(cpu[name]["value"], rel=1e-3), name
    assert cuda["same_top"]["value"] == pytest.approx(cpu["same_top"]["value"], abs=1e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_give_the_same_bits(place):
    one, two = (evaluate(place, f"ranks-{n}", n) for n in (1, 2))
    assert one["metrics"] == two["metrics"] and one["breakdown"] == two["breakdown"]
