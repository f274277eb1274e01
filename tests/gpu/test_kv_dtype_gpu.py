"""Keys and values in 8 bits on CUDA: the kernel against plain operations, what it stores bit for
bit; generation, in graphs and without, compiled and not, against a loop that rounds by a definition
of its own.

    python -m pytest -q tests/gpu/test_kv_dtype_gpu.py        # two minutes: it compiles
"""

import numpy as np
import pytest
import torch
from eight_bits import RoundedAttention, rounded
from test_engine_gpu import by_index, prompts_of, small_model

from backends import Sampling, engine, rows
from backends.engine import generate
from gpu_kernels import decode_attention
from gpu_kernels.kv_codes import DTYPES, Codes

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
KINDS = ("int8", "fp8")

# ---------------------------------------------------------------------------------------------
# The kernel

# dtype, B rows, N prompts, G key heads, R query heads each, D, S own, P prompt tokens, window, cap
CASES = [
    ("bfloat16", 1, 1, 32, 1, 128, 256, 150, 0, None),
    ("bfloat16", 64, 64, 8, 4, 128, 300, 500, 0, None),
    ("bfloat16", 64, 6, 8, 4, 64, 300, 500, 0, 3.0),
    ("bfloat16", 5, 3, 4, 7, 128, 700, 70, 37, None),
    ("bfloat16", 9, 2, 2, 3, 80, 100, 70, 37, 3.0),
    ("bfloat16", 2, 2, 2, 2, 256, 1000, 33, 0, 3.0),
    ("bfloat16", 3, 1, 1, 24, 96, 65, 0, 0, None),
    ("float16", 70, 2, 2, 1, 64, 60, 290, 55, None),
    ("float32", 5, 3, 4, 7, 128, 300, 70, 0, 3.0),
]
TOLERANCE = {"float32": 1e-5, "bfloat16": 6e-3, "float16": 1e-3}


def bits(room):
    return room.codes.view(torch.uint8).cpu(), room.scales.view(torch.int32).cpu()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype,B,N,G,R,D,S,P,window,cap", CASES)
def test_kernel_equals_plain_operations(dtype, B, N, G, R, D, S, P, window, cap, kind):
    tolerance, dtype, H = TOLERANCE[dtype], getattr(torch, dtype), G * R
    generator = torch.Generator("cuda").manual_seed(B + S)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device="cuda").to(dtype)

    qkv = normal(B, (H + 2 * G) * D)  # as the model has them: slices of one projection
    q, k_new, v_new = (x.unflatten(1, (-1, D)) for x in qkv.split([H * D, G * D, G * D], dim=1))
    k_new[0], v_new[0, :, 0] = 0, 250  # a scale of 0, and an outlier
    rooms = [Codes.of(normal(n, G, s, D), DTYPES[kind]) for n, s in [(B, S)] * 2 + [(N, P)] * 2]
    copies = [Codes(room.codes.clone(), room.scales.clone()) for room in rooms[:2]]
    g = np.random.default_rng(B)
    lengths = torch.tensor(g.integers(0, S, B), device="cuda")
    lengths[0], lengths[-1] = 0, S - 1
    prompt_lengths = torch.tensor(g.integers(0, P + 1, N), device="cuda")
    prompt_lengths[0], prompt_lengths[-1] = P // 3, P
    of_row = g.integers(0, N, B)
    tiles = decode_attention.plan_tiles(of_row, N, R, dtype).cuda()
    row_prompt, prompts = torch.tensor(of_row, device="cuda"), (*rooms[2:], prompt_lengths)
    wanted = decode_attention._decode_torch(
        *(q.double(), k_new, v_new, (*copies, lengths), prompts, row_prompt, S),
        *(window or None, cap, None),
    )
    got = decode_attention.decode_attention(
        q, k_new, v_new, (*rooms[:2], lengths), prompts, row_prompt, tiles, S,
        window=window or None, softcap=cap,
    )  # fmt: skip
    error = (got - wanted).norm() / wanted.norm()
    assert error < tolerance, float(error)
    for room, copy, new in zip(rooms, copies, (k_new, v_new)):
        for got, of_twin in zip(bits(room), bits(copy)):
            assert torch.equal(got, of_twin), "what is stored"
        codes, scales = rounded(new.float().cpu().numpy(), kind)
        at = torch.arange(B), slice(None), lengths.cpu()
        assert (room.codes.cpu().float()[at].numpy() == codes).all()
        assert (room.scales.cpu()[at].numpy() == scales).all()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_number_stays_none(kind):
    """NaN in a head's key, and in another's value, reaches their queries and no others."""
    B, G, D, S = 3, 2, 64, 16
    q, k_new, v_new = (torch.randn(B, G, D, device="cuda").bfloat16() for _ in range(3))
    k_new[1, 0, 5] = v_new[2, 1, 3] = torch.nan
    rooms = [Codes.room((B, G, S, D), DTYPES[kind], "cuda") for _ in range(2)]
    none = [Codes.room((1, G, 0, D), DTYPES[kind], "cuda") for _ in range(2)]
    lengths, zeros = (torch.zeros(B, dtype=torch.int64, device="cuda") for _ in range(2))
    tiles = decode_attention.plan_tiles([0] * B, 1, 1, torch.bfloat16).cuda()
    for _ in range(2):  # stored, then read
        own, prompts = (*rooms, lengths), (*none, zeros[:1])
        y = decode_attention.decode_attention(q, k_new, v_new, own, prompts, zeros, tiles, S)
        k_new, v_new, lengths = k_new.nan_to_num(), v_new.nan_to_num(), lengths + 1
    wrong = y.isnan().any(-1)
    assert wrong.nonzero().tolist() == [[1, 0], [2, 1]]


# ---------------------------------------------------------------------------------------------
# Generation


class OnCuda(RoundedAttention):
    def positions(self, T):
        return super().positions(T).cuda()


@torch.no_grad()
def plain_greedy(model, prompt, n, kind):
    ids = list(prompt)
    for _ in range(n):
        cache = OnCuda(kind, len(ids))
        hidden = model.hidden(torch.tensor([ids], device="cuda"), cache=cache)
        ids.append(int(model.logits(hidden[0, -1]).argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("kind, compiled", [("int8", False), ("fp8", False), ("fp8", True)])
def test_greedy_equals_the_plain_loop_that_rounds(kind, compiled):
    model, prompts = small_model(std=0.3), prompts_of(1, 70, 33, 64)
    lengths = [20, 15, 5, 12]
    options = {"batch_size": 3, "compile": compiled, "n_samples": 2, "kv_dtype": kind}
    samples = by_index(generate(model, prompts, [Sampling(n) for n in lengths], **options))
    assert len(samples) == 2 * len(prompts)
    for (i, _), sample in samples.items():
        assert sample.token_ids == plain_greedy(model, prompts[i], lengths[i], kind), i


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_gives_the_bits_of_steps_without(kind, monkeypatch):
    """bfloat16, rows refilled, prompts that begin alike kept once; and the same again."""
    model = small_model(dtype=torch.bfloat16, std=0.3)
    begin = prompts_of(160)[0]
    prompts = [begin + own for own in prompts_of(*range(1, 20))]
    assert set(engine.shared_tokens(model, prompts, 1)) == {160}
    drawn = Sampling(40, temperature=1.0, seed=0)
    options = {"batch_size": 8, "eos_ids": [7, 8, 9], "compile": False, "kv_dtype": kind}
    captured = by_index(generate(model, prompts, drawn, **options))
    assert by_index(generate(model, prompts, drawn, **options)) == captured
    monkeypatch.setattr(rows.CachedRows, "_capture", lambda self: None)
    assert by_index(generate(model, prompts, drawn, **options)) == captured
    exact = by_index(generate(model, prompts, drawn, **options | {"kv_dtype": None}))
    assert exact != captured, "which is told from a cache that rounds nothing"
