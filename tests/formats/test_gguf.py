"""formats/gguf.py: files that the package `gguf` writes, against its own dequantiser and against
the transformers models that they were made of."""

import copy
import json
import shutil
import struct
import unicodedata

import numpy as np
import pytest
import torch
from builders import ROOT, torchrun

import checkpoint
import evaluation
from formats import blocks, gguf_config, gguf_file, stored
from model import GPTModel
from tokenizer import build_tokenizer

transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")

from family_checks import SIZES, T, V  # noqa: E402
from gguf_files import (  # noqa: E402
    converted,
    described,
    gpt2_vocabulary,
    sentencepiece_vocabulary,
    write_model,
    write_tensors,
    write_vocabulary,
)

IDS = torch.randint(0, V, (2, T), generator=torch.Generator().manual_seed(0))
WIDE, WINDOW = dict(head_dim=32), dict(sliding_window=8)
LINEAR = dict(rope_type="linear", factor=8.0)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
LONG = dict(rope_type="longrope", short_factor=[1.0 + i / 9 for i in range(8)])
LONG |= dict(long_factor=[1.5 + i / 3 for i in range(8)])
FEW = dict(num_experts=5, num_local_experts=5, num_experts_per_tok=3, moe_intermediate_size=40)
GLM = dict(n_routed_experts=6, num_experts_per_tok=3, moe_intermediate_size=40, head_dim=16)
GLM |= dict(n_shared_experts=2, first_k_dense_replace=1, n_group=1, routed_scaling_factor=1.7)
GLM |= dict(topk_group=1)
GRANITE = dict(embedding_multiplier=12.0, attention_multiplier=0.4)
GRANITE |= dict(residual_multiplier=0.22, logits_scaling=3.0)
CASES = [
    ("llama", "llama", dict(attention_bias=True, mlp_bias=True)),
    ("llama", "llama", dict(rope_scaling=LLAMA3 | dict(original_max_position_embeddings=16))),
    ("llama", "mistral", dict(head_dim=24, tie_word_embeddings=True, sliding_window=None)),
    ("qwen2", "qwen2", dict(rope_scaling=YARN)),
    ("qwen3", "qwen3", dict(head_dim=16, rope_theta=1e6)),
    ("gpt2", "gpt2", dict(n_inner=96)),
    ("gptneox", "gpt_neox", dict(rope_scaling=LINEAR)),
    ("gptneox", "gpt_neox", dict(use_parallel_residual=False, rotary_pct=0.5)),
    ("gemma", "gemma", WIDE),
    ("gemma2", "gemma2", WIDE | WINDOW | dict(query_pre_attn_scalar=32)),
    ("gemma3", "gemma3_text", WIDE | WINDOW | dict(query_pre_attn_scalar=32, rope_scaling=LINEAR)),
    ("phi2", "phi", {}),
    ("phi3", "phi3", WINDOW),
    ("phi3", "phi3", dict(rope_scaling=LONG, original_max_position_embeddings=16)),
    ("starcoder2", "starcoder2", {}),
    ("stablelm", "stablelm", dict(use_qkv_bias=True)),
    ("stablelm", "stablelm", dict(use_parallel_residual=True, qk_layernorm=True)),
    ("olmo", "olmo", dict(clip_qkv=0.5)),
    ("olmo2", "olmo2", {}),
    ("olmo2", "olmo3", WINDOW),
    ("granite", "granite", GRANITE),
    ("command-r", "cohere", dict(logit_scale=0.5)),
    ("cohere2", "cohere2", WINDOW | dict(logit_scale=0.5)),
    ("glm4", "glm4", WIDE),
    ("nemotron", "nemotron", {}),
    ("smollm3", "smollm3", {}),
    ("arcee", "arcee", {}),
    ("seed_oss", "seed_oss", WIDE | dict(attention_dropout=0.0)),
    ("hunyuan-dense", "hunyuan_v1_dense", dict(head_dim=16)),
    ("ernie4_5", "ernie4_5", WIDE),
    ("llama", "mixtral", dict(num_local_experts=5)),
    ("qwen2moe", "qwen2_moe", FEW | dict(shared_expert_intermediate_size=56)),
    ("qwen3moe", "qwen3_moe", FEW | dict(head_dim=24, norm_topk_prob=True)),
    ("olmoe", "olmoe", dict(num_experts=5, num_experts_per_tok=3)),
    ("granitemoe", "granitemoe", GRANITE | dict(num_local_experts=5)),
    (
        "granitemoe",
        "granitemoeshared",
        GRANITE | dict(num_local_experts=5, shared_intermediate_size=56),
    ),
    ("glm4moe", "glm4_moe", GLM),
    (
        "glm4moe",
        "glm4_moe",
        GLM | dict(use_qk_norm=True, norm_topk_prob=False, n_group=3, topk_group=2),
    ),
]


def test_every_architecture_is_compared():
    assert {arch for arch, _, _ in CASES} == gguf_config.ARCHITECTURES.keys()


def made(model_type, case):
    """A transformers model, its weights of a size that tells them apart."""
    config = transformers.AutoConfig.for_model(model_type, **(SIZES | copy.deepcopy(case)))
    torch.manual_seed(1)
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) * 0.12)
    return theirs.eval()


@pytest.mark.parametrize("arch, model_type, case", CASES)
@torch.no_grad()
def test_logits(tmp_path, arch, model_type, case):
    theirs = made(model_type, case)
    path = write_model(tmp_path / "a.gguf", theirs, arch)
    model = checkpoint.load_model(path, "float32")
    wanted = theirs(IDS).logits
    assert isinstance(model, GPTModel) and 0.1 < wanted.std() < 30
    assert (model(IDS)[0] - wanted).abs().max() <= 1e-5 * max(1.0, wanted.std().item())


# ---------------------------------------------------------------------------------------------
# Types of tensors


def random_blocks(kind, rows, columns, seed=0):
    """Any bytes but scales that are no numbers, as rows of blocks."""
    packed = blocks.TYPES[kind]
    n = rows * columns // packed.numbers
    raw = np.random.default_rng(seed).integers(0, 256, (n, packed.bytes), dtype=np.uint8)
    halves = raw.reshape(n, -1, 2).view(np.float16)[..., 0]
    halves[~np.isfinite(halves) | (np.abs(halves) > 100)] = 0.5
    return raw.reshape(rows, -1)


@pytest.mark.parametrize("kind", blocks.TYPES)
def test_every_type_is_read_bit_for_bit(tmp_path, kind):
    """Whole, by rows in another order, and beside another; against the package's dequantiser."""
    raw = random_blocks(kind, 24, 512)
    path = write_tensors(tmp_path / "a.gguf", {"x": (kind, raw)}, "llama", {})
    entry = gguf_file.read(path).tensors["x"]
    assert (entry.type, entry.shape) == (kind, (24, 512))
    whole = stored.whole(path, entry.offset, torch.float32, entry.shape)
    whole = whole._replace(pieces=(whole.pieces[0]._replace(blocks=blocks.TYPES[kind]),))
    wanted = torch.tensor(gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind]))
    assert torch.equal(stored.read_whole(whole), wanted) and whole.kinds == {kind}
    order = [range(1, 24, 2), range(0, 24, 3)]
    part = stored.rows(whole, order)
    wanted_rows = wanted[[i for run in order for i in run]]
    assert torch.equal(stored.read_whole(part), wanted_rows)
    both = stored.beside("both", [part, whole])
    assert torch.equal(stored.read_whole(both), torch.cat((wanted_rows, wanted)))


def test_memory_of_reading_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "READ_BYTES", 8192)
    path = write_tensors(
        tmp_path / "a.gguf", {"x": ("Q4_K", random_blocks("Q4_K", 64, 512))}, "llama", {}
    )
    entry = gguf_file.read(path).tensors["x"]
    whole = stored.whole(path, entry.offset, torch.float32, entry.shape)
    whole = whole._replace(pieces=(whole.pieces[0]._replace(blocks=blocks.TYPES["Q4_K"]),))
    assert max(values.numel() for _, values in stored.read(whole)) == 8192 // 4


SMALL = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=2, head_dim=64)


def quantised(path, kind, **options):
    """A Llama with its matrices in `kind`: (the file, what they are dequantised)."""
    theirs = made("llama", SMALL)
    tensors, wanted = {}, {}
    for n, (name, array) in enumerate(converted(theirs, "llama").items()):
        form, data = "F32", array
        if array.ndim == 2:
            form, columns = kind, array.shape[1]
            if kind in ("F16", "BF16") or not kind.endswith("_K"):
                data = gguf.quants.quantize(array, gguf.GGMLQuantizationType[kind])
                data = data.view(np.uint8).reshape(len(array), -1)
            else:
                data = random_blocks(kind, len(array), columns, seed=n)
            array = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
        tensors[name], wanted[name] = (form, data), torch.tensor(array)
    said = {f"llama.{key}": value for key, value in described(theirs, "llama").items()}
    return write_tensors(path, tensors, "llama", said | options.get("more", {})), wanted


@pytest.mark.parametrize("kind", ["F16", "BF16", *blocks.TYPES])
def test_a_model_of_every_type(tmp_path, kind):
    path, wanted = quantised(tmp_path / "a.gguf", kind)
    model = checkpoint.load_model(path, "float32")
    found = model.state_dict()
    q, k = (wanted[f"blk.1.attn_{x}.weight"].view(-1, 32, 2, 256) for x in "qk")
    halves = [t.transpose(1, 2).reshape(-1, 256) for t in (q, k)]
    assert torch.equal(
        found["blocks.1.attn.qkv_proj.weight"],
        torch.cat((*halves, wanted["blk.1.attn_v.weight"])),
    )
    gate, up = (wanted[f"blk.1.ffn_{x}.weight"] for x in ("gate", "up"))
    assert torch.equal(found["blocks.1.mlp.fc1.weight"], torch.cat((gate, up)))
    assert torch.equal(found["token_embedding.weight"], wanted["token_embd.weight"])
    kinds = {"F16": "float16", "BF16": "bfloat16"}
    assert checkpoint.inspect(path)["dtypes"] == sorted({"float32", kinds.get(kind, kind)})


# ---------------------------------------------------------------------------------------------
# Mixtures of experts


def write_mixture(path, theirs, arch, pack=lambda name, array: ("F32", array), **changes):
    tensors = {name: pack(name, array) for name, array in converted(theirs, arch).items()}
    said = described(theirs, arch) | changes
    return write_tensors(path, tensors, arch, {f"{arch}.{key}": v for key, v in said.items()})


@pytest.mark.parametrize("kind", ["BF16", "Q8_0", "Q4_K"])
def test_stacks_of_experts_are_unpacked_matrix_by_matrix(tmp_path, monkeypatch, kind):
    """Bit for bit, and never more of a stack in memory than is read at once."""
    monkeypatch.setattr(stored, "READ_BYTES", 64 << 10)
    few = dict(num_local_experts=3, hidden_size=256, intermediate_size=512, num_hidden_layers=1)
    theirs, wanted = made("mixtral", few), {}

    def pack(name, array):
        if array.ndim != 3:
            return "F32", array
        if kind.endswith("_K"):
            raw = np.stack([random_blocks(kind, *array[0].shape, seed=e) for e in range(3)])
        else:
            raw = gguf.quants.quantize(array, gguf.GGMLQuantizationType[kind]).view(np.uint8)
        wanted[name] = torch.tensor(gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind]))
        return kind, raw

    path = write_mixture(tmp_path / "a.gguf", theirs, "llama", pack)
    tensors = checkpoint.open(path).tensors
    gate, up, down = (wanted[f"blk.0.ffn_{x}_exps.weight"] for x in ("gate", "up", "down"))
    ours = {"fc1": torch.cat((gate, up), dim=1), "fc2": down}
    for name, t in ours.items():
        entry = tensors[f"blocks.0.mlp.experts.{name}.weight"]
        assert max(v.numel() * v.element_size() for _, v in stored.read(entry)) <= 64 << 10
        assert torch.equal(stored.read_whole(entry), t)
    found = checkpoint.load_model(path, "float32").state_dict()
    assert all(
        torch.equal(found[f"blocks.0.mlp.experts.{name}.weight"], ours[name]) for name in ours
    )


@torch.no_grad()
def test_experts_in_tensors_of_their_own(tmp_path):
    """As files had them before experts were stacked."""
    theirs = made("mixtral", dict(num_local_experts=3, num_hidden_layers=2))
    tensors = {}
    for name, array in converted(theirs, "llama").items():
        each = [(name.replace("_exps", f".{e}"), own) for e, own in enumerate(array)]
        tensors |= dict(each) if "_exps" in name else {name: array}
    typed = {name: ("F32", array) for name, array in tensors.items()}
    said = {f"llama.{key}": value for key, value in described(theirs, "llama").items()}
    path = write_tensors(tmp_path / "a.gguf", typed, "llama", said)
    assert (checkpoint.load_model(path, "float32")(IDS)[0] - theirs(IDS).logits).abs().max() < 1e-4
    del typed["blk.1.ffn_up.1.weight"]
    path = write_tensors(tmp_path / "b.gguf", typed, "llama", said)
    with pytest.raises(ValueError, match=r"blk\.1\.ffn_up\.2\.weight"):
        checkpoint.load_model(path, "float32")


@torch.no_grad()
def test_layers_that_guess_ahead_are_left_out(tmp_path):
    """GLM-4.5's files count them among the blocks, behind the others."""
    theirs = made("glm4_moe", GLM | dict(num_hidden_layers=2))
    tensors = {name: ("F32", array) for name, array in converted(theirs, "glm4moe").items()}
    ahead = {"nextn.eh_proj": (64, 128), "attn_norm": (64,), "ffn_gate_inp": (6, 64)}
    tensors |= {
        f"blk.2.{name}.weight": ("F32", np.ones(shape, np.float32)) for name, shape in ahead.items()
    }
    said = described(theirs, "glm4moe") | {"block_count": 3, "nextn_predict_layers": 1}
    said = {f"glm4moe.{key}": value for key, value in said.items()}
    path = write_tensors(tmp_path / "a.gguf", tensors, "glm4moe", said)
    model = checkpoint.load_model(path, "float32")
    assert model.config.n_layers == 2
    assert (model(IDS)[0] - theirs(IDS).logits).abs().max() < 1e-4


@pytest.mark.parametrize(
    "key, value, match",
    [
        ("expert_gating_func", 3, "expert_gating_func 3 has no native form"),
        ("expert_used_count", 9, "n_experts_per_token 9 must lie in 1..6"),
        (
            "expert_count",
            5,
            r"mlp\.experts\.fc1\.weight \(file \[6, 80, 64\], model \[5, 80, 64\]\)",
        ),
        ("expert_count", "x", "expert_count is 'x', and should be a number"),
        ("expert_shared_count", 0, r"unexpected: blocks\.1\.mlp\.shared\.fc1\.weight"),
        ("expert_weights_norm", 7, "router_norm must be true or false, not 7"),
        ("leading_dense_block_count", 2, r"leading_dense_block_count is 2, but layers \[1\] have"),
        ("experts_per_group", 2, "experts_per_group = 2 has no native form"),
    ],
)
def test_mixtures_that_are_refused(tmp_path, key, value, match):
    theirs = made("glm4_moe", GLM | dict(num_hidden_layers=2))
    path = write_mixture(tmp_path / "a.gguf", theirs, "glm4moe", **{key: value})
    with pytest.raises(ValueError, match=match) as error:
        checkpoint.load_model(path, "float32")
    assert "\n" not in str(error.value) and "a.gguf" in str(error.value)


# ---------------------------------------------------------------------------------------------
# Files that are in parts, elsewhere, or no good


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A small file of Q4_0, and a Hugging Face directory of the same weights."""
    folder = tmp_path_factory.mktemp("plain")
    return quantised(folder / "model.gguf", "Q4_0")[0]


def test_listing_opening_converting(tmp_path, plain):
    path = shutil.copy(plain, tmp_path / "model.gguf")
    (info,) = checkpoint.list_checkpoints(tmp_path)
    assert (info.kind, info.name, info.step, info.problem) == ("gguf", "model", None, "")
    ckpt = checkpoint.open(path)
    assert (ckpt.kind, ckpt.format, ckpt.tokenizer) == ("gguf", "formats/gguf.py", None)
    assert len(ckpt.fingerprint) == 64 and ckpt.describe()["module"] == "GPTModel"
    made = checkpoint.convert(path, tmp_path / "checkpoint-1")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32)
    with torch.no_grad():
        wanted = checkpoint.load_model(path, "float32")(IDS)[0]
        assert (theirs.eval()(IDS).logits - wanted).abs().max() < 1e-4
    assert checkpoint.is_finished(path) is None and checkpoint.is_complete(path)


def test_a_model_in_parts(tmp_path, plain):
    """As llama-gguf-split cuts it; given by any part, listed once."""
    held = gguf.GGUFReader(plain)
    names = [t.name for t in held.tensors]
    tensors = {t.name: (t.tensor_type.name, np.array(t.data)) for t in held.tensors}
    said = {
        f.name: f.contents()
        for f in held.fields.values()
        if not f.name.startswith(("GGUF.", "general.arch"))
    }
    shares = [names[:3], names[3:4], names[4:]]
    for n, share in enumerate(shares):
        path = tmp_path / f"m-{n + 1:05d}-of-00003.gguf"
        part = {"split.no": n, "split.count": 3, "split.tensors.count": len(names)}
        write_tensors(
            path, {name: tensors[name] for name in share}, "llama", part | (said if n == 0 else {})
        )
    (info,) = checkpoint.list_checkpoints(tmp_path)
    assert info.name == "m-00001-of-00003"
    wanted = checkpoint.load_model(plain, "float32").state_dict()
    for part in (1, 3):
        ckpt = checkpoint.open(tmp_path / f"m-{part:05d}-of-00003.gguf")
        found = ckpt.load("float32").state_dict()
        assert all(torch.equal(t, wanted[name]) for name, t in found.items())
    first, second = info.path, tmp_path / "m-00002-of-00003.gguf"
    before = checkpoint.fingerprint(first)
    second.rename(tmp_path / "gone")
    assert checkpoint.is_finished(first) is False and not checkpoint.is_complete(first)
    with pytest.raises(ValueError, match=r"lacks 'm-00002-of-00003\.gguf', of 3 parts"):
        checkpoint.open(first)
    shutil.copy(tmp_path / "m-00003-of-00003.gguf", second)
    with pytest.raises(ValueError, match=r"00002-of-00003\.gguf does not say of itself that it is"):
        checkpoint.open(first)
    (tmp_path / "gone").replace(second)
    assert checkpoint.fingerprint(first) == before


def header(tensors=(), keys=(), version=3, counts=None):
    """The bytes of a head. keys: (name, type, bytes of the value)."""

    def text(value):
        return struct.pack("<Q", len(value)) + value.encode()

    n_tensors, n_keys = counts or (len(tensors), len(keys))
    out = b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys)
    for name, kind, value in keys:
        out += text(name) + struct.pack("<I", kind) + value
    for name, dims, kind, offset in tensors:
        sides = struct.pack(f"<{len(dims)}Q", *dims)
        out += text(name) + struct.pack("<I", len(dims)) + sides + struct.pack("<IQ", kind, offset)
    return out


ARCH = ("general.architecture", 8, struct.pack("<Q", 5) + b"llama")
MANY = 1 << 60
HOSTILE = {
    "no GGUF file": b"GGML" + bytes(100),
    "of version 1,": header(version=1),
    "of a big-endian machine": b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(50),
    "truncated or damaged: it would have 1,152": header(counts=(MANY, 0)) + bytes(99),
    "would have 100,001 entries of metadata": header(counts=(0, 100_001)) + bytes(99),
    "would have 1,152,921,504,606,846,976 bytes of a text": header(counts=(0, 1))
    + struct.pack("<Q", MANY)
    + bytes(9),
    "1,152,921,504,606,846,976 items of lists": header(keys=[("a", 9, struct.pack("<IQ", 8, MANY))])
    + bytes(99),
    "4,000,001 items of lists": header(keys=[("a", 9, struct.pack("<IQ", 0, 4_000_001))])
    + bytes(4_000_001),
    "a list of type 9": header(keys=[("a", 9, struct.pack("<IQ", 9, 1))]) + bytes(99),
    "a value of type 77": header(keys=[("a", 77, b"")]) + bytes(99),
    "holds the key 'general.architecture' twice": header(keys=[ARCH, ARCH]) + bytes(99),
    "holds the tensor 'a' twice": header([("a", [2], 0, 0)] * 2, [ARCH]) + bytes(99),
    "has 9 dimensions": header([("a", [2] * 9, 0, 0)], [ARCH]) + bytes(99),
    "has sides": header([("a", [1 << 62], 0, 0)], [ARCH]) + bytes(99),
    "is not UTF-8": header(keys=[("a", 8, struct.pack("<Q", 2) + b"\xff\xfe")]) + bytes(99),
    "general.alignment 7": header(keys=[("general.alignment", 4, struct.pack("<I", 7)), ARCH])
    + bytes(99),
    "is truncated or still being written: a ends at": header([("a", [1 << 39], 0, 0)], [ARCH])
    + bytes(99),
    "b overlaps a": header([("a", [16], 0, 0), ("b", [8], 0, 32)], [ARCH]) + bytes(999),
    "b is not aligned": header([("a", [2], 0, 0), ("b", [8], 0, 40)], [ARCH]) + bytes(999),
    "is of IQ4_XS, which is not read; read are F32": header([("a", [256, 2], 23, 0)], [ARCH])
    + bytes(999),
    "is of type 99": header([("a", [256, 2], 99, 0)], [ARCH]) + bytes(999),
    "no matrix whose rows are blocks of 32": header(
        [("a", [32, 2], 2, 0), ("b", [40], 2, 64)], [ARCH]
    )
    + bytes(999),
    "holds no tensors": header(keys=[ARCH]) + bytes(99),
    "of the architecture None": header(),
    "of the architecture 'mamba'": header(
        keys=[("general.architecture", 8, struct.pack("<Q", 5) + b"mamba")]
    ),
    "no model: its general.type is 'adapter'": header(
        keys=[ARCH, ("general.type", 8, struct.pack("<Q", 7) + b"adapter")]
    ),
}


@pytest.mark.parametrize("match", HOSTILE)
def test_files_that_do_not_hold(tmp_path, match):
    path = tmp_path / "a.gguf"
    path.write_bytes(HOSTILE[match])
    with pytest.raises(ValueError) as error:
        checkpoint.open(path)
    assert match in str(error.value) and str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert [info.kind for info in checkpoint.list_checkpoints(tmp_path)] == ["gguf"]


def test_every_cut_is_one_line(tmp_path, plain):
    data, path = plain.read_bytes(), tmp_path / "a.gguf"
    for n in (0, 3, 5, 23, 24, 30, 200, 700, 2000, len(data) // 2, len(data) - 40):
        path.write_bytes(data[:n])
        with pytest.raises(ValueError, match=r"a\.gguf") as error:
            checkpoint.load_model(path, "float32")
        assert "\n" not in str(error.value), n


@pytest.mark.parametrize(
    "key, value, match",
    [
        ("llama.expert_count", 8, "expert_count is 8, and no layer has a router"),
        ("llama.expert_used_count", 2, "expert_used_count = 2 has no native form"),
        ("llama.attention.sliding_window", 512, "sliding_window 512 has no native form"),
        ("llama.block_count", 1 << 30, "block_count is 1073741824"),
        ("llama.block_count", 3, "n_layers is 3 in the config, 2 in the tensors"),
        ("llama.attention.head_count", [4, 2], r"head_count is \[4, 2\]"),
        ("llama.attention.causal", False, "causal is false"),
        ("llama.rope.scaling.type", "yarnish", "yarnish"),
        ("llama.rope.scaling.yarn_log_multiplier", 0.1, "yarn_log_multiplier = 0.1"),
        ("llama.rope.freq_base", "x", "rope.freq_base is 'x'"),
        ("llama.attention.value_length", 32, "heads of 64 channels, and values of 32"),
    ],
)
def test_metadata_without_a_native_form(tmp_path, key, value, match):
    theirs = made("llama", SMALL)
    tensors = {n: ("F32", a) for n, a in converted(theirs, "llama").items()}
    said = {f"llama.{k}": v for k, v in described(theirs, "llama").items()}
    path = write_tensors(tmp_path / "a.gguf", tensors, "llama", said | {key: value})
    with pytest.raises(ValueError, match=match):
        checkpoint.load_model(path, "float32")
    assert match.split()[0].strip("\\") in checkpoint.inspect(path)["note"]


def test_layers_that_say_the_same_are_one_number(tmp_path):
    theirs = made("llama", SMALL)
    path = write_model(tmp_path / "a.gguf", theirs, "llama", **{"attention.head_count": [4, 4]})
    assert checkpoint.open(path).config.n_heads == 4


# ---------------------------------------------------------------------------------------------
# Tokenizers


LLAMA_CPP = json.loads((ROOT / "tests/fixtures/llama_cpp_tokens.json").read_text())
TEXTS = LLAMA_CPP.pop("texts")
QUICK = ("smollm", "sentencepiece True")
RULES = [r if r in QUICK else pytest.param(r, marks=pytest.mark.slow) for r in LLAMA_CPP]


@pytest.mark.parametrize("rule", RULES)
def test_ids_are_those_of_llama_cpp(tmp_path, data_dir, rule):
    """For every way of splitting that it and we know, over hard texts. Only Qwen's own tokenizer
    composes its text first (NFC), which llama.cpp leaves out."""
    folder, (kind, _, prefix) = data_dir / "tokenizers/gpt2", rule.partition(" ")
    if kind == "sentencepiece":
        vocabulary = sentencepiece_vocabulary(folder)
        vocabulary["tokenizer.ggml.add_space_prefix"] = prefix == "True"
    else:
        vocabulary = gpt2_vocabulary(folder) | {"tokenizer.ggml.pre": rule}
    tokenizer = build_tokenizer(write_vocabulary(tmp_path / "a.gguf", vocabulary))
    for text, ids in zip(TEXTS, LLAMA_CPP[rule], strict=True):
        if rule != "qwen2" or unicodedata.is_normalized("NFC", text):
            assert tokenizer.encode(text) == ids, text
        assert rule == "qwen2" or tokenizer.decode(ids) == text, text
    assert tokenizer.adds_bos == (kind == "sentencepiece")


def test_a_tokenizer_goes_along(tmp_path, data_dir):
    """With the handle, into a converted directory, to eval.py's door and to train.py's."""
    vocabulary = gpt2_vocabulary(data_dir / "tokenizers/gpt2")
    more = {"tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.add_bos_token": True}
    more["tokenizer.chat_template"] = "{{ messages[0].content }}"
    path = write_vocabulary(tmp_path / "a.gguf", vocabulary | more)
    ckpt = checkpoint.open(path)
    assert ckpt.tokenizer == path
    tokenizer = evaluation.pick_tokenizer(None, ckpt, needed=True)
    assert tokenizer is evaluation.open_tokenizer(path)
    theirs = build_tokenizer(data_dir / "tokenizers/gpt2")
    text = (data_dir / "text/wikitext2-raw-test.txt").read_text()[:50_000]
    assert tokenizer.encode(text) == theirs.encode(text)
    assert (tokenizer.token_bytes() == theirs.token_bytes()).all()
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (50256, 50256)
    assert tokenizer.adds_bos and tokenizer.special_ids == (50256,)
    assert tokenizer.tok.chat_template == more["tokenizer.chat_template"]
    assert ckpt.facts == {"bos_token_id": 50256, "eos_token_id": 50256}
    made = checkpoint.open(checkpoint.convert(path, tmp_path / "checkpoint-1"))
    again = build_tokenizer(made.tokenizer)
    assert again.encode(text) == theirs.encode(text) and again.adds_bos
    model = GPTModel(ckpt.config)
    checkpoint.load_weights(path, model)
    wanted = ckpt.load("float32").state_dict()
    assert all(torch.equal(t, wanted[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize(
    "change, match",
    [
        ({"tokenizer.ggml.pre": "default"}, "splits text as 'default', which is not known here"),
        ({"tokenizer.ggml.model": "bert"}, "of the kind 'bert', which is not known here"),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, "holds a token twice"),
        ({"tokenizer.ggml.token_type": [1]}, "not one type for each"),
        ({"tokenizer.ggml.merges": ["a b"], "tokenizer.ggml.pre": "gpt-2"}, "is damaged"),
        ({"tokenizer.ggml.eos_token_id": 9, "tokenizer.ggml.pre": "gpt-2"}, "eos_token_id 9 is"),
        ({"tokenizer.ggml.model": "llama"}, "lacks a score for each of 3 pieces"),
    ],
)
def test_tokenizers_that_are_refused(tmp_path, change, match):
    vocabulary = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a", "b", "c"]}
    path = write_vocabulary(
        tmp_path / "a.gguf", vocabulary | {"tokenizer.ggml.merges": [""]} | change
    )
    with pytest.raises(ValueError, match=match) as error:
        build_tokenizer(path)
    assert "\n" not in str(error.value) and "a.gguf" in str(error.value)
    assert checkpoint.load_model(path, "float32") is not None  # with another tokenizer


@pytest.mark.slow
def test_evaluated_and_trained_on(tmp_path, data_dir):
    """eval.py's loss is that of the converted directory; train.py goes on from the file."""
    theirs = made("llama", dict(vocab_size=50257, tie_word_embeddings=True))
    vocabulary = gpt2_vocabulary(data_dir / "tokenizers/gpt2") | {"tokenizer.ggml.pre": "gpt-2"}
    tensors = {n: ("F32", a) for n, a in converted(theirs, "llama").items()}
    said = {f"llama.{k}": v for k, v in described(theirs, "llama").items()}
    path = write_tensors(tmp_path / "a.gguf", tensors, "llama", said | vocabulary)
    text = tmp_path / "text.txt"
    text.write_text((data_dir / "text/tinyshakespeare.txt").read_text()[:20_000])
    losses = []
    for one in (path, checkpoint.convert(path, tmp_path / "checkpoint-1")):
        options = ["--val-data", text, "--device", "cpu", "--results-dir", tmp_path / "results"]
        out = torchrun(0, "eval.py", "--checkpoint-path", one, *options)
        losses += [line for line in out.stdout.splitlines() if line.startswith("avg_loss")]
    assert losses[0] == losses[1]
    options = ["--train-data", text, "--num-steps", 1, "--batch-size", 2, "--seq-len", 32]
    folder = tmp_path / "trained"
    options += ["--checkpoint-path", folder, "--device", "cpu", "--save-steps", 1]
    torchrun(0, "train.py", "--init-from", path, *options)
    assert checkpoint.list_checkpoints(folder)[-1].step == 1


def test_a_record_says_how_its_numbers_lie(tmp_path):
    path, _ = quantised(tmp_path / "a.gguf", "Q4_0")
    said = checkpoint.open(path).describe()["quantisation"]
    assert said["rule"] == "gguf-Q4_0" and said["bits_per_weight"] == 8 * 18 / 32
    assert said["weight_bytes"] * 8 % 18 == 0 and said["matrices"] > 2
