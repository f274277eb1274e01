"""GGUF files for tests: written by the package `gguf`, by the rules of llama.cpp's converter.

write_model(path, theirs, "gemma2")              # a transformers model
write_tensors(path, {"token_embd.weight": ("Q4_K", array)}, "llama", metadata)
"""

import json
import math

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type

from tokenizing.byte_bpe import byte_alphabet

PERMUTED = (
    "llama",
    "olmo",
    "granite",
    "smollm3",
    "arcee",
    "granitemoe",
)  # halves of q and k become pairs
PLUS_ONE = ("gemma", "gemma2", "gemma3", "nemotron")
ARCHITECTURES = {gguf.MODEL_ARCH_NAMES[arch]: arch for arch in gguf.MODEL_ARCH}
DIRECT = {  # keys of a Hugging Face config: GGUF's, where a value is there
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "clip_qkv": "attention.clamp_kqv",
    "sliding_window": "attention.sliding_window",
    "logits_scaling": "logit_scale",
    "logit_scale": "logit_scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "attention_multiplier": "attention.scale",
}
WITHOUT_WINDOW = (
    "starcoder2",
    "qwen2",
    "qwen3",
    "llama",
    "qwen2moe",
    "qwen3moe",
)  # whose converter writes none


def permuted(t, heads):
    return (
        t.reshape(heads, 2, t.shape[0] // heads // 2, *t.shape[1:]).swapaxes(1, 2).reshape(t.shape)
    )


def converted(theirs, arch):
    """{GGUF's name: array} of a model's weights."""
    c, tensors = theirs.config, {}
    layers, heads = c.num_hidden_layers, c.num_attention_heads
    keys = getattr(c, "num_key_value_heads", None) or heads  # GPT-NeoX has no such
    names = gguf.get_tensor_name_map(ARCHITECTURES[arch], layers)
    per_head: dict[str, list] = {}
    for name, t in _of_experts(theirs.state_dict()).items():
        array = t.float().numpy()
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        if arch == "gpt2" and array.ndim == 2 and ".h." in name:
            array = array.T
        if arch in PERMUTED and "q_proj" in name:
            array = permuted(array, heads)
        if arch in PERMUTED and "k_proj" in name:
            array = permuted(array, keys)
        if arch in PLUS_ONE and name.endswith("norm.weight"):
            array = array + 1
        if "query_key_value" in name:
            array = (
                array.reshape(heads, 3, -1, *array.shape[1:]).swapaxes(0, 1).reshape(array.shape)
            )
        if ".norms." in name:
            stem, _, rest = name.partition(".norms.")
            per_head.setdefault(f"{stem}.{rest.partition('.')[2]}", []).append(array)
            continue
        tensors[names.get_name(name, (".weight", ".bias")) or name] = array
    for name, arrays in per_head.items():
        tensors[names.get_name(name, (".weight", ".bias"))] = np.stack(arrays)
    return tensors


def _of_experts(weights):
    """What transformers keeps in one, gate and up, in two; a stack's name like a module's."""
    found = {}
    for name, t in weights.items():
        name = name.replace("router.weight", "router.layer.weight")
        name = name.replace("e_score_correction_bias", "e_score_correction.bias")
        if name.endswith("shared_expert_gate.weight"):
            t = t[0]
        stem, _, last = name.rpartition(".experts.")
        if stem and last in ("gate_up_proj", "down_proj"):
            gate, up = t.chunk(2, dim=1)
            parts = {"gate": gate, "up": up} if last == "gate_up_proj" else {"down": t}
            layer = name.split(".")[2]
            found |= {f"blk.{layer}.ffn_{part}_exps.weight": one for part, one in parts.items()}
        elif name.endswith("shared_mlp.input_linear.weight"):
            layer = name.split(".")[2]
            for part, one in zip(("gate", "up"), t.chunk(2)):
                found[f"blk.{layer}.ffn_{part}_shexp.weight"] = one
        else:
            found[name] = t
    return found


def _described_experts(c, arch):
    """Of a mixture, as the converter of each architecture says it."""
    counts = (getattr(c, key, None) for key in ("num_local_experts", "num_experts"))
    n = next((n for n in counts if n), None) or getattr(c, "n_routed_experts", None)
    if not n:
        return {}
    said = {"expert_count": n, "expert_used_count": c.num_experts_per_tok}
    if getattr(c, "moe_intermediate_size", None):
        said["expert_feed_forward_length"] = c.moe_intermediate_size
    for key in ("shared_expert_intermediate_size", "shared_intermediate_size"):
        if getattr(c, key, None):
            said["expert_shared_feed_forward_length"] = getattr(c, key)
    if arch == "glm4moe":
        said |= {"expert_shared_count": c.n_shared_experts, "expert_gating_func": 2}
        said |= {"leading_dense_block_count": c.first_k_dense_replace}
        said |= {"expert_weights_scale": c.routed_scaling_factor}
        said |= {"expert_weights_norm": c.norm_topk_prob}
        said |= {"expert_group_count": c.n_group, "expert_group_used_count": c.topk_group}
    return said


def described(theirs, arch):
    """{key without the architecture's name: value} of a model's config."""
    c = theirs.config
    heads = c.num_attention_heads
    head = getattr(c, "head_dim", None) or c.hidden_size // heads
    rope = getattr(c, "rope_parameters", None) or {}
    own = rope.get("full_attention", rope)
    said = {
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "block_count": c.num_hidden_layers,
        "feed_forward_length": getattr(c, "intermediate_size", None) or 4 * c.hidden_size,
        "attention.head_count": heads,
    }
    if getattr(c, "num_key_value_heads", None) and arch not in ("gptneox", "gpt2"):
        said["attention.head_count_kv"] = c.num_key_value_heads
    if head * heads != c.hidden_size:
        said |= {"attention.key_length": head, "attention.value_length": head}
    for key in ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"):
        if getattr(c, key, None) is not None:
            kind = "layer_norm_rms" if key == "rms_norm_eps" else "layer_norm"
            said[f"attention.{kind}_epsilon"] = getattr(c, key)
    if arch == "olmo":
        said["attention.layer_norm_epsilon"] = 1e-5
    if own.get("rope_theta"):
        said["rope.freq_base"] = float(own["rope_theta"])
    fraction = own.get("partial_rotary_factor")
    said["rope.dimension_count"] = int(head * (fraction or 1.0))
    if own.get("rope_type") in ("linear", "yarn"):
        said |= {"rope.scaling.type": own["rope_type"], "rope.scaling.factor": own["factor"]}
        if own["rope_type"] == "yarn":
            original = own["original_max_position_embeddings"]
            said["rope.scaling.original_context_length"] = original
    for key, theirs_of in DIRECT.items():
        value = getattr(c, key, None)
        if value is not None and not (key == "sliding_window" and arch in WITHOUT_WINDOW):
            said[theirs_of] = value
    if hasattr(c, "use_parallel_residual"):
        said["use_parallel_residual"] = c.use_parallel_residual
    return said | _described_experts(c, arch)


def write_model(path, theirs, arch, **changes):
    """A model of transformers', in float32."""
    tensors, said = converted(theirs, arch), described(theirs, arch) | changes
    rope = getattr(theirs.config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        for which in ("short", "long"):
            factors = np.array(rope[f"{which}_factor"], dtype=np.float32)
            tensors[f"rope_factors_{which}.weight"] = factors
        original = rope["original_max_position_embeddings"]
        scale = theirs.config.max_position_embeddings / original
        attention = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
        said["rope.scaling.original_context_length"] = original
        said["rope.scaling.attn_factor"] = float(rope.get("attention_factor") or attention)
    if rope.get("rope_type") == "llama3":
        frequencies = theirs.model.rotary_emb.inv_freq.double()
        head = 2 * len(frequencies)
        plain = rope["rope_theta"] ** -(torch.arange(0, head, 2).double() / head)
        tensors["rope_freqs.weight"] = (plain / frequencies).float().numpy()
    values = {f"{arch}.{key}": value for key, value in said.items()}
    return write_tensors(path, {n: ("F32", a) for n, a in tensors.items()}, arch, values)


def write_native(path, model):
    """A Llama of ours, its widest matrices in Q8_0, with a vocabulary of letters."""
    c, tensors = model.config, {"token_embd.weight": model.token_embedding.weight}
    tensors |= {"output_norm.weight": model.ln_f.weight, "output.weight": model.lm_head.weight}
    for i, block in enumerate(model.blocks):
        at, D = f"blk.{i}.", c.head_dim
        sides = [n * D for n in (c.n_heads, c.n_kv_heads, c.n_kv_heads)]
        q, k, v = block.attn.qkv_proj.weight.split(sides)
        gate, up = block.mlp.fc1.weight.chunk(2)
        tensors |= {
            at + "attn_norm.weight": block.ln1.weight,
            at + "ffn_norm.weight": block.ln2.weight,
        }
        tensors |= {at + "attn_q.weight": permuted(q, c.n_heads), at + "attn_v.weight": v}
        tensors |= {at + "attn_k.weight": permuted(k, c.n_kv_heads), at + "ffn_gate.weight": gate}
        tensors |= {at + "ffn_up.weight": up, at + "ffn_down.weight": block.mlp.fc2.weight}
        tensors |= {at + "attn_output.weight": block.attn.out_proj.weight}
    said = {"block_count": c.n_layers, "context_length": c.max_position_embeddings}
    said |= {"embedding_length": c.d_model, "feed_forward_length": c.d_ff}
    said |= {"attention.head_count": c.n_heads, "attention.head_count_kv": c.n_kv_heads}
    said |= {"attention.layer_norm_rms_epsilon": c.norm_eps, "rope.freq_base": c.rope_theta}
    said = {f"llama.{key}": value for key, value in said.items()}
    letters = [chr(0x100 + i) for i in range(c.vocab_size)]
    said |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2"}
    said |= {"tokenizer.ggml.tokens": letters, "tokenizer.ggml.bos_token_id": 1}
    typed = {
        name: ("Q8_0" if "ffn_gate" in name else "F32", t.detach().numpy())
        for name, t in tensors.items()
    }
    return write_tensors(path, typed, "llama", said)


def add(writer, key, value):
    """A metadata entry of the type that its Python value has."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def write_tensors(path, tensors, arch, metadata, **options):
    """{name: (its type, a float32 array, or uint8 blocks)} as a GGUF file."""
    writer = gguf.GGUFWriter(path, arch, **options)
    for key, value in metadata.items():
        add(writer, key, value)
    for name, (kind, array) in tensors.items():
        data = np.ascontiguousarray(array)
        if data.dtype != np.uint8:
            data = gguf.quants.quantize(data.astype(np.float32), Type[kind])
        writer.add_tensor(name, data, raw_dtype=Type[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# ---------------------------------------------------------------------------------------------
# Tokenizers


def gpt2_vocabulary(folder):
    """Metadata of GPT-2's byte-level BPE, from its vocab.json and merges.txt."""
    vocab = json.loads((folder / "vocab.json").read_text())
    merges = (folder / "merges.txt").read_text().splitlines()
    tokens = sorted(vocab, key=vocab.get)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if t == "<|endoftext|>" else 1 for t in tokens],
        "tokenizer.ggml.merges": [m for m in merges if m and not m.startswith("#version")],
        "tokenizer.ggml.bos_token_id": len(tokens) - 1,
        "tokenizer.ggml.eos_token_id": len(tokens) - 1,
        "tokenizer.ggml.add_bos_token": False,
    }


def sentencepiece_vocabulary(folder):
    """A SentencePiece BPE of GPT-2's tokens that are text, each scored by its rank."""
    vocab = json.loads((folder / "vocab.json").read_text())
    letters = dict(zip(byte_alphabet(), range(256)))
    pieces = {}
    for token in sorted(vocab, key=vocab.get):
        data = bytes(letters.get(letter, 0) for letter in token)
        text = data.decode("utf-8", errors="replace").replace(" ", "▁")
        if "\ufffd" not in text and "\0" not in text and text.isprintable():
            pieces.setdefault(text, float(-len(pieces)))
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "<|user|>"]
    pieces = {text: score for text, score in pieces.items() if text not in special}
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [*special, *pieces],
        "tokenizer.ggml.scores": [*[0.0] * len(special), *pieces.values()],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, 4, *[1] * len(pieces)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def write_vocabulary(path, vocabulary):
    """A Llama of one tiny layer with this vocabulary."""
    C, V = 32, len(vocabulary["tokenizer.ggml.tokens"])
    shapes = {f"blk.0.attn_{x}.weight": (C, C) for x in ("q", "k", "v", "output")}
    shapes |= {f"blk.0.ffn_{x}.weight": (C, C) for x in ("gate", "up", "down")}
    shapes |= {f"blk.0.{x}_norm.weight": (C,) for x in ("attn", "ffn")}
    shapes |= {"output_norm.weight": (C,), "token_embd.weight": (V, C)}
    said = {"block_count": 1, "context_length": 64, "embedding_length": C}
    said |= {"feed_forward_length": C, "attention.head_count": 2}
    said |= {"attention.layer_norm_rms_epsilon": 1e-5, "rope.dimension_count": C // 2}
    tensors = {name: ("F32", np.ones(shape, np.float32)) for name, shape in shapes.items()}
    metadata = {f"llama.{key}": value for key, value in said.items()} | vocabulary
    return write_tensors(path, tensors, "llama", metadata)
