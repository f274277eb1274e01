"""model.py against transformers' own models, closed formulas and itself without a cache."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from published import PARAMETERS

from backends.kvcache import DecodeCache, PrefixCache
from config import GPTConfig, config_from_hf, load_config
from formats import layouts
from model import GPTModel
from modeling import attention

ROOT = Path(__file__).resolve().parent.parent
V, T = 97, 48
SIZES = dict(
    vocab_size=V,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
FAMILIES = {
    "gpt2": ("gpt2", dict(n_embd=64, n_layer=3, n_head=4, n_positions=64, vocab_size=V)),
    "gpt2 erf, wide": (
        "gpt2",
        dict(
            n_embd=64,
            n_layer=3,
            n_head=4,
            n_positions=64,
            vocab_size=V,
            n_inner=96,
            activation_function="gelu",
            tie_word_embeddings=False,
        ),
    ),
    "llama": ("llama", SIZES),
    "llama multi-head, tied": (
        "llama",
        SIZES | dict(num_key_value_heads=4, tie_word_embeddings=True, rms_norm_eps=1e-3),
    ),
    "llama with biases": ("llama", SIZES | dict(attention_bias=True, mlp_bias=True)),
    "llama 3 rope": ("llama", SIZES | dict(rope_scaling=LLAMA3, rope_theta=5e5)),
    "llama linear rope": ("llama", SIZES | dict(rope_scaling=dict(rope_type="linear", factor=4.0))),
    "llama yarn": ("llama", SIZES | dict(rope_scaling=YARN)),
    "llama yarn, every key": (
        "llama",
        SIZES | dict(rope_scaling=YARN | dict(beta_fast=16.0, beta_slow=2.0, attention_factor=0.9)),
    ),
    "llama yarn, mscale": (
        "llama",
        SIZES | dict(rope_scaling=YARN | dict(mscale=1.0, mscale_all_dim=0.5)),
    ),
    "llama wide heads": ("llama", SIZES | dict(head_dim=32)),
    "mistral": ("mistral", SIZES | dict(sliding_window=8)),
    "mistral without window": ("mistral", SIZES | dict(sliding_window=None, head_dim=24)),
    "qwen2": ("qwen2", SIZES),
    "qwen2 window on later layers": (
        "qwen2",
        SIZES | dict(use_sliding_window=True, sliding_window=8, max_window_layers=1),
    ),
    "qwen3": ("qwen3", SIZES | dict(head_dim=32)),
    "qwen3 window": (
        "qwen3",
        SIZES | dict(head_dim=32, use_sliding_window=True, sliding_window=8, max_window_layers=2),
    ),
}
WINDOWED = [name for name in FAMILIES if "window" in name or name == "mistral"]
WINDOWED.remove("mistral without window")
generator = torch.Generator().manual_seed(0)
IDS = torch.randint(0, V, (3, T), generator=generator)


def make_pair(name, scale=0.15, attention="eager"):
    """transformers' model with random weights, and ours with the same."""
    transformers = pytest.importorskip("transformers")
    family, fields = FAMILIES[name]
    hf_config = transformers.AutoConfig.for_model(family, **fields)
    torch.manual_seed(1)
    theirs = transformers.AutoModelForCausalLM.from_config(
        hf_config, attn_implementation=attention
    ).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) * scale)
    ours = GPTModel(config_from_hf(hf_config.to_dict())).eval()
    state = dict(theirs.state_dict())
    layout = "gpt2" if family == "gpt2" else "llama"
    with torch.no_grad():
        for key, view in layouts.views(ours, layout):
            view.copy_(state.pop(key))
    assert not state or list(state) == ["lm_head.weight"]
    return theirs, ours


# ---------------------------------------------------------------------------------------------
# The same function as transformers


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_logits(name):
    theirs, ours = make_pair(name)
    wanted, (got, loss) = theirs(IDS).logits, ours(IDS)
    assert 0.3 < wanted.std() < 10, "logits of order 1, or the comparison says little"
    assert loss is None
    assert (got - wanted).abs().max() <= 1e-5 * max(1.0, wanted.std().item())


@pytest.mark.parametrize("name", WINDOWED)
@torch.no_grad()
def test_the_sliding_window_is_active(name):
    _, ours = make_pair(name)
    assert ours.config.sliding_window == 8
    full = GPTModel(ours.config.replace(sliding_window=None, full_attention_layers=())).eval()
    full.load_state_dict(ours.state_dict())
    difference = (full(IDS)[0] - ours(IDS)[0]).abs().amax(dim=(0, 2))
    assert difference[:8].max() < 1e-5 and difference[8:].min() > 1e-3


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "qwen2", "qwen3 window"])
@torch.no_grad()
def test_padded_logits_and_loss(name, side):
    theirs, ours = make_pair(name)
    real = torch.ones(3, T, dtype=torch.int64)
    for row, count in enumerate((0, 5, 17)):
        if side in ("left", "both"):
            real[row, :count] = 0
        if side in ("right", "both"):
            real[row, T - count :] = 0
    labels = IDS.clone()
    labels[:, 20:23] = -100
    positions = torch.arange(T).expand(3, T)  # ours count from the row's start, padding included
    wanted = theirs(IDS, attention_mask=real, position_ids=positions).logits
    got, loss = ours(IDS, attention_mask=real, labels=labels)
    seen = real.bool()
    assert (got - wanted)[seen].abs().max() <= 1e-5 * max(1.0, wanted.std().item())
    # the loss by hand, in float64, target by target
    total, count = 0.0, 0
    logprobs = wanted.double().log_softmax(-1)
    for b in range(3):
        for t in range(1, T):
            if labels[b, t] != -100 and real[b, t]:
                total, count = total - logprobs[b, t - 1, labels[b, t]].item(), count + 1
    if side == "right":  # with padding on the left, a first token is predicted from padding
        assert abs(loss.item() - total / count) < 1e-5


@torch.no_grad()
def test_loss_is_that_of_transformers():
    theirs, ours = make_pair("llama")
    labels = IDS.clone()
    labels[0, :30] = -100
    labels[2] = -100
    wanted = theirs(IDS, labels=labels).loss.item()
    assert abs(ours(IDS, labels=labels)[1].item() - wanted) < 1e-6 * wanted


def test_gradients_are_those_of_transformers():
    theirs, ours = make_pair("qwen3")
    theirs(IDS, labels=IDS).loss.backward()
    ours(IDS, labels=IDS)[1].backward()
    wanted = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        p.data = p.grad  # layouts.views then maps gradients as it maps weights
        assert p.grad.abs().max() > 0, name
    for name, gradient in layouts.views(ours, "llama"):
        assert torch.allclose(gradient, wanted[name].grad, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("name", ["gpt2", "mistral"])
@torch.no_grad()
def test_a_soft_cap_reaches_every_cache(name, monkeypatch):
    """One line of attention_of: without a cache, in prefill, decoding and after a prefix."""
    _, ours = make_pair(name)
    plain = ours.hidden(IDS)
    monkeypatch.setattr(
        attention,
        "attention_of",
        lambda c, layer: {"window": c.layer_window(layer), "softcap": 0.5, "scale": 0.4},
    )
    capped = GPTModel(ours.config).eval()
    capped.load_state_dict(ours.state_dict())
    wanted = capped.hidden(IDS)
    assert (wanted - plain).abs().max() > 0.05
    decode = DecodeCache(capped, n_prompts=3, prompt_len=20, n_rows=3, max_len=4)
    filling = decode.filling([0, 1, 2], [20] * 3)
    assert (capped.hidden(IDS[:, :20], cache=filling) - wanted[:, :20]).abs().max() < 1e-5
    decode.assign([0, 1, 2])
    for t in range(20, 24):
        hidden = capped.hidden(IDS[:, t : t + 1], cache=decode)
        assert (hidden[:, 0] - wanted[:, t]).abs().max() < 1e-5
        decode.advance(torch.ones(3, dtype=torch.int32))
    prefix = PrefixCache(capped, 20)
    capped.hidden(IDS[:1, :20], cache=prefix.filling())
    rest = capped.hidden(IDS[:1, 20:], cache=prefix)
    assert (rest - wanted[:1, 20:]).abs().max() < 1e-5


# ---------------------------------------------------------------------------------------------
# Shapes, names, dtypes


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_parameters_of_full_size_presets(name):
    with torch.device("meta"):
        model = GPTModel(load_config(name))
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def test_shapes_alone_come_without_drawing_weights():
    """On meta, torch draws through dynamo, whose import costs more than a small checkpoint."""
    code = (
        "import sys, torch; from model import GPTModel; from config import load_config\n"
        "model = GPTModel.on_meta(load_config('llama3-8b'))\n"
        "assert all(p.is_meta for p in model.parameters())\n"
        "assert model.rope_global.device.type == 'meta'\n"
        "assert 'torch._dynamo' not in sys.modules\n"
        "assert torch.nn.init.ones_(torch.zeros(3)).sum() == 3 == len(torch.nn.Linear(2, 3).bias)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_names_and_order_are_rosetrainers():
    config = GPTConfig(V, 64, n_layers=2, n_heads=4, d_model=64, d_ff=96)
    block = ["ln1", "ln2", "attn.qkv_proj", "attn.out_proj", "mlp.fc1", "mlp.fc2"]
    modules = [f"blocks.{i}.{module}" for i in range(2) for module in block]
    wanted = ["token_embedding.weight", "position_embedding.weight"]
    wanted += [f"{m}.{leaf}" for m in [*modules, "ln_f"] for leaf in ("weight", "bias")]
    model = GPTModel(config)
    assert list(model.state_dict()) == [*wanted, "lm_head.weight"]
    assert [name for name, _ in model.named_parameters()] == wanted  # the head is tied
    assert model.lm_head.weight is model.token_embedding.weight
    assert len(model.state_dict()) == 12 * 2 + 5
    untied = GPTModel(config.replace(tie_embeddings=False))
    assert list(untied.state_dict()) == list(model.state_dict())
    assert untied.lm_head.weight is not untied.token_embedding.weight


def test_fused_rows_are_q_k_v():
    """rosetrainer views the projection as (B, T, 3, H, D): the same as rows [q; k; v]."""
    config = GPTConfig(V, 64, n_layers=1, n_heads=4, d_model=64, d_ff=96, dropout=0.0)
    torch.manual_seed(0)
    model = GPTModel(config).eval()
    x = torch.randn(2, 7, 64)
    attention = model.blocks[0].attn
    with torch.no_grad():
        q, k, v = attention.qkv_proj(x).view(2, 7, 3, 4, 16).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / 4
        scores = scores.masked_fill(~torch.ones(7, 7, dtype=torch.bool).tril(), float("-inf"))
        wanted = attention.out_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 7, 64))
        assert (attention(x) - wanted).abs().max() < 1e-6


@pytest.mark.parametrize("name", ["gpt2", "llama 3 rope", "mistral", "qwen3"])
@torch.no_grad()
def test_bfloat16_inference_is_close(name):
    _, ours = make_pair(name, scale=0.05)
    hidden32, logits32 = ours.hidden(IDS), ours(IDS)[0]
    norms = {n: p.clone() for n, p in ours.named_parameters() if "ln" in n or "norm" in n}
    ours.for_inference(torch.bfloat16)
    hidden16, logits16 = ours.hidden(IDS), ours(IDS)[0].float()
    assert hidden16.dtype == torch.float32
    assert (logits16 - logits32).abs().mean() < 0.01 * logits32.std()
    assert (hidden16 - hidden32).abs().mean() < 0.01 * hidden32.std()
    for n, p in ours.named_parameters():
        assert p.dtype == (torch.float32 if n in norms else torch.bfloat16), n
        assert not p.requires_grad
    for n, p in norms.items():
        assert torch.equal(dict(ours.named_parameters())[n], p)


def test_initialisation():
    """N(0, 0.02), residual projections scaled by 1/sqrt(2L), biases 0, norms 1 (GPT-2)."""
    torch.manual_seed(0)
    model = GPTModel(GPTConfig(V, 64, n_layers=8, n_heads=4, d_model=256, d_ff=1024))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any()
        elif p.dim() == 1:
            assert (p == 1).all()
        else:
            residual = name.endswith(("out_proj.weight", "fc2.weight"))
            assert p.std().item() == pytest.approx(0.02 / (4 if residual else 1), rel=0.05), name


def _into(kept):
    return lambda t: kept.append(t) or t


@pytest.mark.parametrize("n_layers, together", [(2, 1), (7, 2), (5, 3)])
def test_activation_checkpointing_changes_no_gradient(n_layers, together):
    """Of the stream is kept what each group of blocks begins with."""
    model = GPTModel(GPTConfig(V, 64, n_layers=n_layers, n_heads=4, d_model=64, d_ff=96))
    gradients, streams = [], set()
    assert model.config.dropout
    model.recomputed_together = together
    for model.activation_checkpointing in (False, True):
        torch.manual_seed(3)  # dropout's
        model.zero_grad()
        kept: list = []
        with torch.autograd.graph.saved_tensors_hooks(_into(kept), lambda t: t):
            loss = model(IDS, labels=IDS)[1]
        streams = {t.data_ptr() for t in kept if t.shape == (*IDS.shape, 64)}
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert len(streams) <= -(-n_layers // together) + 2  # of each group, of the embeddings, the end
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)
