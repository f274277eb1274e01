"""The names and layouts that others give to the weights of the same models, as tables.

    for name, view in views(model, "gpt2"):      # "native", "gpt2", "nanogpt" or "llama"
        view.copy_(theirs[name])                 # loads
        theirs[name] = view                      # saves

A fused projection of ours can be several modules of theirs, and GPT-2's Conv1D keeps matrices as
[in, out]: both are views of our parameter, so neither direction needs a second copy of the model.
"""

import re
from typing import NamedTuple

import torch

GPT2_MODULES = {
    "token_embedding": ["transformer.wte"],
    "position_embedding": ["transformer.wpe"],
    "blocks.{i}.ln1": ["transformer.h.{i}.ln_1"],
    "blocks.{i}.ln2": ["transformer.h.{i}.ln_2"],
    "blocks.{i}.attn.qkv_proj": ["transformer.h.{i}.attn.c_attn"],
    "blocks.{i}.attn.out_proj": ["transformer.h.{i}.attn.c_proj"],
    "blocks.{i}.mlp.fc1": ["transformer.h.{i}.mlp.c_fc"],
    "blocks.{i}.mlp.fc2": ["transformer.h.{i}.mlp.c_proj"],
    "ln_f": ["transformer.ln_f"],
}
LLAMA_MODULES = {
    "token_embedding": ["model.embed_tokens"],
    "blocks.{i}.ln1": ["model.layers.{i}.input_layernorm"],
    "blocks.{i}.ln2": ["model.layers.{i}.post_attention_layernorm"],
    "blocks.{i}.attn.qkv_proj": [f"model.layers.{{i}}.self_attn.{x}_proj" for x in "qkv"],
    "blocks.{i}.attn.out_proj": ["model.layers.{i}.self_attn.o_proj"],
    "blocks.{i}.attn.q_norm": ["model.layers.{i}.self_attn.q_norm"],
    "blocks.{i}.attn.k_norm": ["model.layers.{i}.self_attn.k_norm"],
    "blocks.{i}.mlp.fc1": ["model.layers.{i}.mlp.gate_proj", "model.layers.{i}.mlp.up_proj"],
    "blocks.{i}.mlp.fc2": ["model.layers.{i}.mlp.down_proj"],
    "ln_f": ["model.norm"],
}
OLD_MASKS = r"\.attn\.(masked_)?bias$"


class Layout(NamedTuple):
    modules: dict[str, list[str]]  # ours: theirs, in the order of our rows; absent: the same name
    prefix: str = ""  # of all names but the head's; files of the bare backbone lack it
    conv1d: bool = False  # matrices of the blocks are [in, out]
    ignored: str = r"$^"  # buffers that old files hold


LAYOUTS = {
    "native": Layout({}),
    "gpt2": Layout(GPT2_MODULES, "transformer.", conv1d=True, ignored=OLD_MASKS),
    "nanogpt": Layout(GPT2_MODULES, "transformer.", ignored=OLD_MASKS),
    "llama": Layout(LLAMA_MODULES, "model.", ignored=r"rotary_emb\.inv_freq$"),
}


def views(model, layout: str):
    """(their name, the part of our parameter that it is), over the whole model."""
    c, spec = model.config, LAYOUTS[layout]
    heads = (c.n_heads, c.n_kv_heads, c.n_kv_heads)
    rows = {"attn.qkv_proj": [n * c.head_dim for n in heads], "mlp.fc1": [c.d_ff, c.d_ff]}
    for name, p in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", module)
        ours = f"blocks.{{i}}.{block[2]}" if block else module
        theirs = spec.modules.get(ours, [ours])
        parts = [p.data] if len(theirs) == 1 else p.data.split(rows[block[2]])
        for their, part in zip(theirs, parts, strict=True):
            if spec.conv1d and block and part.dim() == 2:
                part = part.t()
            yield f"{their.format(i=block and block[1])}.{leaf}", part


def embedding_name(layout: str) -> str:
    return LAYOUTS[layout].modules.get("token_embedding", ["token_embedding"])[0] + ".weight"


def recognise(shapes: dict[str, torch.Size]) -> str | None:
    """The layout that a file's names, and for GPT-2 the direction of its matrices, speak of."""
    bare = {re.sub(r"^(transformer|model)\.", "", name): shape for name, shape in shapes.items()}
    if "token_embedding.weight" in bare:
        return "native"
    if "embed_tokens.weight" in bare:
        return "llama"
    if "wte.weight" in bare:
        fused = bare.get("h.0.attn.c_attn.weight", ())  # [3C, C] of nn.Linear, [C, 3C] of Conv1D
        return "nanogpt" if len(fused) == 2 and fused[0] > fused[1] else "gpt2"
    return None


def canonical(table: dict, layout: str) -> dict:
    """The same table under full names, without buffers."""
    prefix, ignored = LAYOUTS[layout].prefix, LAYOUTS[layout].ignored

    def full(name):
        return name if name.startswith((prefix, "lm_head.")) else prefix + name

    return {full(name): entry for name, entry in table.items() if not re.search(ignored, name)}


def strip_wrappers(table: dict) -> dict:
    """Names without what DDP and torch.compile put before each of them, in whatever order."""
    for prefix in ("module.", "_orig_mod.") * 3:
        if table and all(name.startswith(prefix) for name in table):
            table = {name.removeprefix(prefix): entry for name, entry in table.items()}
    return table
