"""The names and layouts that others give to the weights of the same models, as tables.

    for name, view in views(model, "gpt2"):      # "native", "gpt2", "nanogpt" or "llama"
        view.copy_(theirs[name])                 # loads
        theirs[name] = view                      # saves
    check_fits(model, tensors, layout, path)     # then, of a file's table:
    fill(model, tensors, layout, path)

A fused projection of ours can be several modules of theirs, and GPT-2's Conv1D keeps matrices as
[in, out]: both are views of our parameter, so neither direction needs a second copy of the model.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import nn

import cli
from formats import tensorfiles
from formats.stored import FLOATS, Stored, check_sums, read
from model import GPTModel

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


def views(model: GPTModel, layout: str) -> Iterator[tuple[str, torch.Tensor]]:
    """(their name, the part of our parameter that it is), over the whole GPTModel."""
    c, spec = model.config, LAYOUTS[layout]
    heads = (c.n_heads, c.n_kv_heads, c.n_kv_heads)
    rows = {"attn.qkv_proj": [n * c.head_dim for n in heads], "mlp.fc1": [c.d_ff, c.d_ff]}
    for name, p in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", module)
        ours = f"blocks.{{i}}.{block[2]}" if block else module
        theirs = spec.modules.get(ours, [ours])
        parts = [p.data] if len(theirs) == 1 or block is None else p.data.split(rows[block[2]])
        for their, part in zip(theirs, parts, strict=True):
            if spec.conv1d and block and part.dim() == 2:
                part = part.t()
            yield f"{their.format(i=block and block[1])}.{leaf}", part


def embedding_name(layout: str) -> str:
    return LAYOUTS[layout].modules.get("token_embedding", ["token_embedding"])[0] + ".weight"


def identify(tensors: dict[str, Stored]) -> tuple[dict[str, Stored], str | None]:
    """A file's table under the full names of its layout, and which layout that is: None, and the
    names as they are, where no layout has them."""
    tensors = strip_wrappers(tensors)
    layout = recognise({name: stored.shape for name, stored in tensors.items()})
    return (tensors if layout is None else canonical(tensors, layout)), layout


def recognise(shapes: dict[str, tuple[int, ...]]) -> str | None:
    """The layout that a file's names, and for GPT-2 the direction of its matrices, speak of. An
    embedding is not enough: litgpt's and nanochat's have GPT-2's name, Phi's has Llama's."""
    bare = {re.sub(r"^(transformer|model)\.", "", name): shape for name, shape in shapes.items()}
    if "token_embedding.weight" in bare:
        return "native"
    if {"embed_tokens.weight", "layers.0.self_attn.q_proj.weight"} <= bare.keys():
        return "llama"
    if {"wte.weight", "h.0.attn.c_attn.weight"} <= bare.keys():
        fused = bare["h.0.attn.c_attn.weight"]  # [3C, C] of nn.Linear, [C, 3C] of Conv1D
        return "nanogpt" if len(fused) == 2 and fused[0] > fused[1] else "gpt2"
    return None


def sizes(tensors: dict[str, Stored]) -> dict[str, int]:
    """The fields of rosetrainer's config that the shapes of native weights fix."""
    fields = {}
    for name, of_shape in {
        "token_embedding.weight": ("vocab_size", "d_model"),
        "position_embedding.weight": ("max_position_embeddings", "d_model"),
        "blocks.0.mlp.fc1.weight": ("d_ff", "d_model"),
    }.items():
        if name in tensors:
            fields |= dict(zip(of_shape, tensors[name].shape))
    layers = {m[1] for name in tensors if (m := re.match(r"blocks\.(\d+)\.", name))}
    return fields | ({"n_layers": len(layers)} if layers else {})


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


# ---------------------------------------------------------------------------------------------
# From a table into a model


def bare(model: nn.Module) -> GPTModel:
    """The GPTModel inside DDP and torch.compile."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return cast(GPTModel, model)
        model = inner


def check_fits(
    model: GPTModel, tensors: dict[str, Stored], layout: str | None, path: Path, hint: str = ""
) -> None:
    """Every tensor of a GPTModel, of its shape and a float type, and no others; ValueError says
    which, and `hint`. Before anything is allocated on the word of a config."""
    wanted = {name: list(view.shape) for name, view in views(model, layout or "native")}
    spare = {"lm_head.weight"} if model.config.tie_embeddings else set()
    found = {name: tensors[name] for name in wanted if name in tensors}
    problems = {
        "missing": [name for name in wanted if name not in tensors],
        "unexpected": [name for name in tensors if name not in wanted and name not in spare],
        "of another shape": [
            f"{name} (file {list(t.shape)}, model {wanted[name]})"
            for name, t in found.items()
            if list(t.shape) != wanted[name]
        ],
        "of a type that is not float32, bfloat16, float16 or float64": [
            f"{name} ({str(t.dtype).removeprefix('torch.')})"
            for name, t in found.items()
            if t.dtype not in FLOATS
        ],
    }
    said = [
        f"{len(names)} {what}: {', '.join(names[:5])}{', …' if len(names) > 5 else ''}"
        for what, names in problems.items()
        if names
    ]
    if said:
        said += [hint] if hint else []
        raise ValueError(f"{path}: of {len(wanted)} tensors, {'; '.join(said)}")


def as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """float32, bfloat16 or float16, by torch's name, a short name (bf16) or itself."""
    if isinstance(dtype, str):
        dtype = getattr(torch, cli.DTYPES.get(dtype, ""), dtype)
    if dtype not in FLOATS:
        raise ValueError(f"dtype must be one of {', '.join(cli.DTYPES)}, not {dtype!r}")
    return dtype


@torch.no_grad()
def fill(model: GPTModel, tensors: dict[str, Stored], layout: str, path: Path) -> None:
    """From files into a GPTModel, in its dtypes and on its device. ValueError for a wrong checksum,
    NaN and Inf."""
    parameters, records = dict(views(model, layout)), {}
    for piece in (piece for name in parameters for piece in tensors[name].pieces):
        if piece.record:
            records.setdefault(piece.file, set()).add(piece.record)
    for file, names in records.items():
        tensorfiles.check_crc(file, names)
    check_sums(piece for name in parameters for piece in tensors[name].pieces)
    extremes = {}
    with cli.progress(len(parameters), f"loading {path.name}", "tensor") as bar:
        for name, parameter in parameters.items():
            for where, values in read(tensors[name]):
                parameter[where].copy_(values)
            extremes[name] = tensorfiles.extremes(parameter)
            bar.update(1)
    tensorfiles.refuse_nonfinite(extremes, path)
