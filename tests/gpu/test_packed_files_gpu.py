"""Quantised files on CUDA: codes go to the card as they lie, with the numbers of dequantised
weights, and a model that is rounded as it is read is never dense there.

python -m pytest -q tests/gpu/test_packed_files_gpu.py
"""

import json

import pytest
import torch
from builders import saved_checkpoint
from safetensors.torch import save_file

import checkpoint
from backends import Sampling, engine
from quantisation.apply import Rounding, quantise_model
from quantisation.names import Quantisation

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
C, F, LAYERS, V = 1024, 2048, 24, 257
SIDES = {"self_attn.q_proj": (C, C), "self_attn.k_proj": (C, C), "self_attn.v_proj": (C, C)}
SIDES |= {"self_attn.o_proj": (C, C), "mlp.gate_proj": (F, C), "mlp.up_proj": (F, C)}
SIDES |= {"mlp.down_proj": (C, F)}


def words(*shape):
    return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32)


def gptq(N, K, shuffled):
    index = torch.arange(K, dtype=torch.int32) // 128
    index = index[torch.randperm(K)] if shuffled else index
    scales = torch.rand(K // 128, N).half() * 0.01 + 0.002
    made = {"qweight": words(K // 8, N), "qzeros": words(K // 128, N // 8)}
    return made | {"scales": scales, "g_idx": index}


def fp8(N, K, shuffled):
    codes = (torch.randn(N, K) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale_inv": torch.rand(-(-N // 128), -(-K // 128)) * 4e-4}


SAID = {"gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": False}}
SAID["gptq"]["checkpoint_format"] = "gptq_v2"
SAID["fp8"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}


def saved(folder, kind, shuffled=False, layers=LAYERS):
    """A Llama of this many layers in the form of a library that quantises."""
    torch.manual_seed(0)
    config = dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=C)
    config |= dict(intermediate_size=F, num_hidden_layers=layers, num_attention_heads=16)
    config |= dict(num_key_value_heads=16, vocab_size=V, tie_word_embeddings=False)
    config |= dict(max_position_embeddings=512, rms_norm_eps=1e-5, hidden_act="silu")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": SAID[kind]}))
    state = {f"{n}.weight": torch.randn(V, C) * 0.02 for n in ("model.embed_tokens", "lm_head")}
    state["model.norm.weight"] = torch.ones(C)
    for i in range(layers):
        at = f"model.layers.{i}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            state[f"{at}{name}.weight"] = torch.ones(C)
        for name, (N, K) in SIDES.items():
            made = (gptq if kind == "gptq" else fp8)(N, K, shuffled)
            state |= {f"{at}{name}.{leaf}": t.contiguous() for leaf, t in made.items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


def asked_for():
    """Bytes of tensors that are there. memory_allocated counts besides what a block has left of up
    to 1 MiB, which no other tensor can have, and that hangs on the order of what was freed."""
    return torch.cuda.memory_stats()["requested_bytes.all.current"]


def measured(path, **how):
    """(model, bytes held, bytes at the peak) of loading it."""
    torch.ones(16, 16, device="cuda", dtype=torch.bfloat16).mm(torch.ones(16, 16).cuda().bfloat16())
    torch.cuda.empty_cache()  # all but cuBLAS's workspace, which the first product takes for good
    start, asked = torch.cuda.memory_allocated(), asked_for()
    torch.cuda.reset_peak_memory_stats()
    model = checkpoint.open(path).load("bfloat16", "cuda", **how)
    return model, asked_for() - asked, torch.cuda.max_memory_allocated() - start


@pytest.mark.parametrize("kind, share", [("gptq", 0.3), ("fp8", 0.58)])
@torch.no_grad()
def test_a_file_takes_its_own_memory(kind, share, tmp_path):
    """Unasked, and at no time more than the codes and some layers; drawn greedily nearly as the
    dense model draws, scored to the bit."""
    path = saved(tmp_path / "m", kind)
    packed, held, peak = measured(path)
    dense, whole, _ = measured(path, packed=False)
    assert held < share * whole and peak < (share + 0.2) * whole, (held / whole, peak / whole)
    assert packed.packing["packed"] == 4 * LAYERS and packed.packing["dequantised"] == 0
    assert abs(held - packed.packing["memory_bytes"]) < 0.001 * whole
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(0, V, (4, 100), generator=g).cuda()
    assert torch.equal(packed.hidden(ids), dense.hidden(ids))
    few, wanted = (m.logits(m.hidden(ids[:1, :9])).float() for m in (packed, dense))
    assert (few - wanted).abs().max() < 0.1 * wanted.abs().max()
    drawn = [list(engine.generate(m, [ids[0, :70].tolist()], Sampling(8))) for m in (packed, dense)]
    assert all(len(samples[0].token_ids) == 8 for samples in drawn)


@torch.no_grad()
def test_columns_in_the_order_of_activations(tmp_path):
    """Each part of q, k and v with an order of its own: scored to the bit all the same."""
    path = saved(tmp_path / "m", "gptq", shuffled=True, layers=2)
    packed, dense = (measured(path, **how)[0] for how in ({}, {"packed": False}))
    assert packed.packing["packed"] == 8 and len(packed.blocks[0].attn.qkv_proj.weights) == 3
    ids = torch.arange(200).view(2, 100).cuda()
    assert torch.equal(packed.hidden(ids), dense.hidden(ids))
    few, wanted = (m.logits(m.hidden(ids[:1, :9])).float() for m in (packed, dense))
    assert (few - wanted).abs().max() < 0.1 * wanted.abs().max()


@pytest.mark.parametrize("keep", [False, True])
@torch.no_grad()
def test_a_rule_never_holds_the_dense_model(keep, tmp_path):
    """From files of 16 bits, and the same numbers as of a model rounded once it is there."""
    wide = dict(d_model=C, d_ff=F, n_heads=16, n_kv_heads=16, n_layers=LAYERS)
    path = saved_checkpoint(tmp_path, kind="llama", std=0.02, **wide)
    rounding = Rounding(Quantisation("rtn-w4-g128"), keep)
    model, held, peak = measured(path, rounding=rounding)
    restore = rounding.finish(model)
    afterwards, whole, _ = measured(path)
    before = {name: p.cpu() for name, p in afterwards.named_parameters()}
    quantise_model(afterwards, "rtn-w4-g128")
    assert held < 0.32 * whole and peak < 0.6 * whole, (held / whole, peak / whole)
    assert model.quantisation == afterwards.quantisation
    ids = torch.arange(200).view(2, 100).cuda()
    for some in (ids, ids[:1, :9]):
        assert torch.equal(model.hidden(some), afterwards.hidden(some))
    if keep:
        restore()
        for name, p in model.named_parameters():
            assert p.is_cuda and torch.equal(p.cpu(), before[name]), name
