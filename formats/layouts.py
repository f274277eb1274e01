"""The names and layouts that others give to the weights of the same models, as tables.

    for name, view in views(model, "gpt2"):      # "native", "gpt2", "nanogpt" or "llama"
        view.copy_(theirs[name])                 # loads
        theirs[name] = view                      # saves
    check_fits(model, tensors, layout, path)     # then, of a file's table:
    fill(model, tensors, layout, path)

A fused projection of ours can be several modules of theirs, and GPT-2's Conv1D keeps matrices as
[in, out]: both are views of our parameter, so neither direction needs a second copy of the model.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import nn

import cli
from config import GPTConfig
from formats import foreign, shown, tensorfiles
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
EMA_COUNT = r"(^|\.)n_averaged$"  # of torch.optim.swa_utils.AveragedModel
# What torch.compile, FSDP, activation checkpointing and Lightning put into names, anywhere
DEEPEST = 8  # modules around a model
WRAPPERS = "_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module"


class Layout(NamedTuple):
    modules: dict[str, list[str]]  # ours: theirs, in the order of our rows; absent: the same name
    prefix: str = ""  # of all names but the head's; files of the bare backbone lack it
    conv1d: bool = False  # matrices of the blocks are [in, out]
    ignored: str = EMA_COUNT  # buffers that files hold beside weights: all that is ever dropped


LAYOUTS = {
    "native": Layout({}),
    "gpt2": Layout(GPT2_MODULES, "transformer.", True, f"{OLD_MASKS}|{EMA_COUNT}"),
    "nanogpt": Layout(GPT2_MODULES, "transformer.", False, f"{OLD_MASKS}|{EMA_COUNT}"),
    "llama": Layout(LLAMA_MODULES, "model.", False, rf"rotary_emb\.inv_freq$|{EMA_COUNT}"),
}
MATRICES = ("attn.qkv_proj", "attn.out_proj", "mlp.fc1", "mlp.fc2")  # what every block has …
NORMS = ("ln1", "ln2")


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


def theirs_of(layout: str, module: str, block: int = 0) -> list[str]:
    """The names that the weight of one of our modules has in a layout, under full names."""
    theirs = LAYOUTS[layout].modules.get(module, [module])
    return [f"{name.format(i=block)}.weight" for name in theirs]


def embedding_name(layout: str) -> str:
    return theirs_of(layout, "token_embedding")[0]


def identify(tensors: dict[str, Stored]) -> tuple[dict[str, Stored], str | None]:
    """A file's table under the full names of its layout, and which layout that is: None, and the
    names as they are, where no layout has them."""
    tensors = table = strip_wrappers(tensors)
    layout = recognise({name: stored.shape for name, stored in table.items()})
    for _ in range(DEEPEST):  # a Lightning module's `model.`
        shared = next(iter(table), "").partition(".")[0] + "."
        if layout is not None or not all(name.startswith(shared) for name in table):
            break
        table = {name.removeprefix(shared): stored for name, stored in table.items()}
        layout = recognise({name: stored.shape for name, stored in table.items()})
    return (tensors if layout is None else canonical(table, layout)), layout


def recognise(shapes: dict[str, tuple[int, ...]]) -> str | None:
    """The layout that a file's names, and for GPT-2 the direction of its matrices, speak of. An
    embedding is not enough: litgpt's and nanochat's have GPT-2's name, Phi's has Llama's. So the
    first block must have every matrix and norm under the layout's names."""
    for layout in ("native", "llama", "gpt2"):
        modules = ["token_embedding", *(f"blocks.{{i}}.{part}" for part in (*MATRICES, *NORMS))]
        full = {name for module in modules for name in theirs_of(layout, module)}
        bare = {name.removeprefix(LAYOUTS[layout].prefix) for name in full}
        if full <= shapes.keys() or bare <= shapes.keys():
            break
    else:
        return None
    if layout == "gpt2":  # [3C, C] of nn.Linear, [C, 3C] of Conv1D
        fused = next(shapes[n] for n in shapes if n.endswith("h.0.attn.c_attn.weight"))
        return "nanogpt" if len(fused) == 2 and fused[0] > fused[1] else "gpt2"
    return layout


def unknown_names(tensors: dict[str, Stored]) -> str:
    """What to say of weights that no layout has names for."""
    owner = foreign.whose(tensors)
    said = f": they are {owner}" if owner else ""
    return f"its weights have names that are not known here{said} ({shown(list(tensors), 3)})"


def sizes(tensors: dict[str, Stored], layout: str | None) -> dict[str, int]:
    """The fields of GPTConfig that the shapes of weights fix."""
    if layout is None:
        return {}
    fields = {}
    for module, of_shape in {
        "token_embedding": ("vocab_size", "d_model"),
        "position_embedding": ("max_position_embeddings", "d_model"),
        "blocks.{i}.mlp.fc2": ("d_model", "d_ff"),
    }.items():
        stored = tensors.get(theirs_of(layout, module)[0])
        if stored and len(stored.shape) == 2:
            turned = LAYOUTS[layout].conv1d and module.startswith("blocks")
            fields |= dict(zip(of_shape, stored.shape[:: -1 if turned else 1]))
    block = theirs_of(layout, "blocks.{i}.mlp.fc2")[0].partition("0")[0]
    layers = {m[1] for name in tensors if (m := re.match(rf"{re.escape(block)}(\d+)\.", name))}
    return fields | ({"n_layers": len(layers)} if layers else {})


def check_sizes(
    config: GPTConfig, tensors: dict[str, Stored], layout: str, path: Path, hint: str = ""
) -> None:
    """ValueError with the fields of a config that the tensors contradict. A model of a million
    layers is not even begun."""
    found: dict[str, int] = sizes(tensors, layout)
    if config.position != "learned":
        found.pop("max_position_embeddings", None)
    said = {name: getattr(config, name) for name in found}
    fused = [tensors.get(name) for name in theirs_of(layout, "blocks.{i}.attn.qkv_proj")]
    if all(stored is not None and len(stored.shape) == 2 for stored in fused):
        side = 1 if LAYOUTS[layout].conv1d else 0
        rows = "(n_heads + 2 n_kv_heads) x head_dim"
        found[rows] = sum(stored.shape[side] for stored in fused if stored)
        said[rows] = config.qkv_dim
    if len(theirs_of(layout, "blocks.{i}.mlp.fc1")) > 1:
        said["gated_mlp"], found["gated_mlp"] = config.gated_mlp, True
    wrong = [
        f"{name} is {said[name]:,} in the config, {n:,} in the tensors"
        for name, n in found.items()
        if said[name] != n
    ]
    if wrong:
        raise ValueError(f"{path}: {'; '.join([*wrong, hint] if hint else wrong)}")


def canonical(table: dict, layout: str) -> dict:
    """The same table under full names, without buffers."""
    prefix, ignored = LAYOUTS[layout].prefix, LAYOUTS[layout].ignored

    def full(name):
        return name if name.startswith((prefix, "lm_head.")) else prefix + name

    return {full(name): entry for name, entry in table.items() if not re.search(ignored, name)}


def strip_wrappers(tensors: dict[str, Stored]) -> dict[str, Stored]:
    """Names without what DDP puts before each of them, and FSDP, torch.compile and activation
    checkpointing anywhere in them."""
    table: dict[str, Stored] = {}
    for name, stored in tensors.items():
        bare = re.sub(rf"(^|(?<=\.))(({WRAPPERS})\.)+", "", name)
        if bare in table:
            file = stored.pieces[0].file
            raise ValueError(f"{file} holds {shown(bare)} twice, wrapped and not")
        table[bare] = stored
    for _ in range(DEEPEST):
        wrapped = [name for name in table if not re.search(EMA_COUNT, name)]
        if not (wrapped and all(name.startswith("module.") for name in wrapped)):
            break
        table = {name.removeprefix("module."): stored for name, stored in table.items()}
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
    if layout is not None:
        check_sizes(model.config, tensors, layout, path, hint)
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
    said = [f"{len(names)} {what}: {shown(names)}" for what, names in problems.items() if names]
    if said:
        owner = foreign.whose(tensors)
        said += [f"names like {owner}"] if owner else []
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
    for name in tensorfiles.nonfinite(extremes):
        _refuse_overflow(name, tensors[name], parameters[name].dtype, path)
    tensorfiles.refuse_nonfinite(extremes, path)


def _refuse_overflow(name: str, stored: Stored, dtype: torch.dtype, path: Path) -> None:
    """Where the file's numbers are finite, it is not the file that is damaged."""
    largest = max(values.abs().amax().item() for _, values in read(stored))
    if math.isfinite(largest):
        dtypes = [str(d).removeprefix("torch.") for d in (dtype, stored.dtype)]
        raise ValueError(
            f"{path}: {shown(name)} holds {largest:g}, which overflows {dtypes[0]}; the file has "
            f"it in {dtypes[1]}: load it as that or as bfloat16"
        )
