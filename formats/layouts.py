"""The names and layouts that others give to the weights of the same models, as tables.

    for name, view in views(model, "gpt2"):      # a key of LAYOUTS
        view.copy_(theirs[name])                 # loads
        theirs[name] = view                      # saves
    check_fits(model, tensors, layout, path)     # then, of a file's table:
    fill(model, tensors, layout, path)

A fused projection of ours can be several modules of theirs, and GPT-2's Conv1D keeps matrices as
[in, out]: both are views of our parameter, so neither direction needs a second copy of the model.
Rows can lie in another order: GPT-NeoX fuses head by head, and rotary pairs can be neighbours. They
are permuted as they are read and written, which changes scores by their order of summation alone.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import nn

import cli
from config import GPTConfig
from formats import tensorfiles
from formats.stored import FLOATS, Stored, read
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
PHI3_MODULES = LLAMA_MODULES | {  # fused as ours are
    "blocks.{i}.attn.qkv_proj": ["model.layers.{i}.self_attn.qkv_proj"],
    "blocks.{i}.mlp.fc1": ["model.layers.{i}.mlp.gate_up_proj"],
}
OLMO2_MODULES = LLAMA_MODULES | {  # norms of what a branch adds
    "blocks.{i}.ln1_post": ["model.layers.{i}.post_attention_layernorm"],
    "blocks.{i}.ln2_post": ["model.layers.{i}.post_feedforward_layernorm"],
}
GEMMA2_MODULES = OLMO2_MODULES | {
    "blocks.{i}.ln2": ["model.layers.{i}.pre_feedforward_layernorm"],
}
GLM_MODULES = LLAMA_MODULES | {
    "blocks.{i}.mlp.fc1": ["model.layers.{i}.mlp.gate_up_proj"],
    "blocks.{i}.ln1_post": ["model.layers.{i}.post_self_attn_layernorm"],
    "blocks.{i}.ln2_post": ["model.layers.{i}.post_mlp_layernorm"],
}
STABLELM_MODULES = LLAMA_MODULES | {  # a module for each head's norm
    "blocks.{i}.attn.q_norm": ["model.layers.{i}.self_attn.q_layernorm.norms.{h}"],
    "blocks.{i}.attn.k_norm": ["model.layers.{i}.self_attn.k_layernorm.norms.{h}"],
}
STARCODER2_MODULES = LLAMA_MODULES | {
    "blocks.{i}.mlp.fc1": ["model.layers.{i}.mlp.c_fc"],
    "blocks.{i}.mlp.fc2": ["model.layers.{i}.mlp.c_proj"],
}
PHI_MODULES = LLAMA_MODULES | {
    "blocks.{i}.attn.out_proj": ["model.layers.{i}.self_attn.dense"],
    "blocks.{i}.mlp.fc1": ["model.layers.{i}.mlp.fc1"],
    "blocks.{i}.mlp.fc2": ["model.layers.{i}.mlp.fc2"],
    "ln_f": ["model.final_layernorm"],
}
NANOCHAT_MODULES = LLAMA_MODULES | {
    "blocks.{i}.mlp.fc1": ["model.layers.{i}.mlp.fc1"],
    "blocks.{i}.mlp.fc2": ["model.layers.{i}.mlp.fc2"],
}
NEMOTRON_MODULES = LLAMA_MODULES | {"blocks.{i}.mlp.fc1": ["model.layers.{i}.mlp.up_proj"]}
HUNYUAN_MODULES = LLAMA_MODULES | {
    "blocks.{i}.attn.q_norm": ["model.layers.{i}.self_attn.query_layernorm"],
    "blocks.{i}.attn.k_norm": ["model.layers.{i}.self_attn.key_layernorm"],
}
GPT_NEOX_MODULES = {
    "token_embedding": ["gpt_neox.embed_in"],
    "blocks.{i}.ln1": ["gpt_neox.layers.{i}.input_layernorm"],
    "blocks.{i}.ln2": ["gpt_neox.layers.{i}.post_attention_layernorm"],
    "blocks.{i}.attn.qkv_proj": ["gpt_neox.layers.{i}.attention.query_key_value"],
    "blocks.{i}.attn.out_proj": ["gpt_neox.layers.{i}.attention.dense"],
    "blocks.{i}.mlp.fc1": ["gpt_neox.layers.{i}.mlp.dense_h_to_4h"],
    "blocks.{i}.mlp.fc2": ["gpt_neox.layers.{i}.mlp.dense_4h_to_h"],
    "ln_f": ["gpt_neox.final_layer_norm"],
    "lm_head": ["embed_out"],
}
OLD_MASKS = r"\.attn\.(masked_)?bias$"
OLD_FREQUENCIES = r"rotary_emb\.inv_freq$"
OLD_NEOX = r"\.attention\.((masked_)?bias|rotary_emb\.inv_freq)$"


# Ours of their R rotary channels: pairs (2i, 2i + 1), or (i + R/2, i), which turn the other way
PAIRS = {
    "neighbours": lambda R: torch.arange(R).view(2, -1).t().flatten(),
    "backwards": lambda R: torch.arange(R).view(2, -1).flip(0).flatten(),
}


class Layout(NamedTuple):
    modules: dict[str, list[str]]  # ours: theirs, in the order of our rows; absent: the same name
    prefix: str = ""  # of all names but the head's; files of the bare backbone lack it
    conv1d: bool = False  # matrices of the blocks are [in, out]
    ignored: str = r"$^"  # buffers that old files hold
    pairs: str = ""  # of rotary channels, ours being (i, i + R/2): see PAIRS
    by_head: bool = False  # rows of the fused projection are q, k, v of each head in turn

    def names(self, ours: str) -> list[str]:
        return self.modules.get(ours, [ours])


LLAMA = Layout(LLAMA_MODULES, "model.", ignored=OLD_FREQUENCIES)
LAYOUTS = {
    "native": Layout({}),
    "gpt2": Layout(GPT2_MODULES, "transformer.", conv1d=True, ignored=OLD_MASKS),
    "nanogpt": Layout(GPT2_MODULES, "transformer.", ignored=OLD_MASKS),
    "llama": LLAMA,
    "phi3": LLAMA._replace(modules=PHI3_MODULES),
    "olmo2": LLAMA._replace(modules=OLMO2_MODULES),
    "gemma2": LLAMA._replace(modules=GEMMA2_MODULES),
    "cohere": LLAMA._replace(pairs="neighbours"),
    "glm": LLAMA._replace(modules=GLM_MODULES, pairs="neighbours"),
    "stablelm": LLAMA._replace(modules=STABLELM_MODULES),
    "starcoder2": LLAMA._replace(modules=STARCODER2_MODULES),
    "phi": LLAMA._replace(modules=PHI_MODULES),
    "nanochat": LLAMA._replace(modules=NANOCHAT_MODULES, pairs="backwards"),
    "nemotron": LLAMA._replace(modules=NEMOTRON_MODULES),
    "hunyuan_v1_dense": LLAMA._replace(modules=HUNYUAN_MODULES),
    "ernie4_5": LLAMA._replace(pairs="neighbours"),
    "gpt_neox": Layout(GPT_NEOX_MODULES, "gpt_neox.", ignored=OLD_NEOX, by_head=True),
}
FAMILIES = {  # the layout of a `model_type`, where it is not that of its own name
    **dict.fromkeys(("mistral", "qwen2", "qwen3", "mixtral", "olmo"), "llama"),
    **dict.fromkeys(("gemma", "smollm3", "granite", "seed_oss"), "llama"),
    "arcee": "nemotron",
    "olmo3": "olmo2",
    "gemma3": "gemma2",
    "gemma3_text": "gemma2",
    "cohere2": "cohere",
    "glm4": "glm",
}


def of_family(model_type: object) -> str | None:
    """The layout of a Hugging Face `model_type`; None if it has none here."""
    layout = FAMILIES.get(str(model_type), str(model_type))
    return layout if layout in LAYOUTS else None


# ---------------------------------------------------------------------------------------------
# Their names, and where in our parameters their numbers belong


class Part(NamedTuple):
    """The part of our parameter that one tensor of theirs is."""

    tensor: torch.Tensor  # of their shape
    order: torch.Tensor | None  # their i-th number along `dim` is our order[i]-th; None: as it is
    dim: int

    def put(self, where: tuple[slice, ...], values: torch.Tensor) -> None:
        """Their numbers at `where` of their tensor, into ours."""
        if self.order is None:
            self.tensor[where].copy_(values)
            return
        at: list = list(where)
        at[self.dim] = self.order[where[self.dim]].to(self.tensor.device)
        self.tensor[tuple(at)] = values.to(self.tensor.device, self.tensor.dtype)

    def get(self) -> torch.Tensor:
        """Their tensor: a view of ours, or where the order is another, a copy."""
        if self.order is None:
            return self.tensor
        return self.tensor.index_select(self.dim, self.order.to(self.tensor.device))


def parts(model: GPTModel, layout: str) -> Iterator[tuple[str, Part]]:
    """(their name, the part of our parameter that it is), over the whole GPTModel."""
    c, spec = model.config, LAYOUTS[layout]
    heads = {"attn.q_norm": c.n_heads, "attn.k_norm": c.n_kv_heads}
    rows = {
        "attn.qkv_proj": [n * c.head_dim for n in (c.n_heads, c.n_kv_heads, c.n_kv_heads)],
        "mlp.fc1": [c.d_ff, c.d_ff],
    }
    for name, p in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", module)
        inner = block[2] if block else ""
        theirs, tensors = spec.names(f"blocks.{{i}}.{inner}" if block else module), [p.data]
        if inner in heads and c.qk_norm_over == "heads":
            tensors = [p.data.view(heads[inner], c.head_dim)]
            if "{h}" in theirs[0]:
                theirs = [theirs[0].replace("{h}", str(h)) for h in range(heads[inner])]
                tensors = list(tensors[0])
        elif len(theirs) > 1:
            tensors = list(p.data.split(rows[inner]))
        for i, (their, tensor) in enumerate(zip(theirs, tensors, strict=True)):
            if spec.conv1d and block and tensor.dim() == 2:
                tensor = tensor.t()
            order, dim = _order(c, spec, inner, i, tensor)
            yield f"{their.format(i=block and block[1])}.{leaf}", Part(tensor, order, dim)


def _order(
    c: GPTConfig, spec: Layout, inner: str, i: int, tensor: torch.Tensor
) -> tuple[torch.Tensor | None, int]:
    """(order, dim) of a Part, the i-th of a block's module."""
    if spec.by_head and inner == "attn.qkv_proj":
        rows = torch.arange(3 * c.n_heads * c.head_dim)
        return rows.view(3, c.n_heads, c.head_dim).transpose(0, 1).flatten(), 0
    turned = inner in ("attn.q_norm", "attn.k_norm") or (inner == "attn.qkv_proj" and i < 2)
    if not (spec.pairs and turned):
        return None, 0
    head = torch.cat((PAIRS[spec.pairs](c.rotary_dim), torch.arange(c.rotary_dim, c.head_dim)))
    dim = tensor.dim() - 1 if inner != "attn.qkv_proj" else 0
    starts = torch.arange(0, tensor.shape[dim], c.head_dim)
    return (starts[:, None] + head).flatten(), dim


def views(model: GPTModel, layout: str) -> Iterator[tuple[str, torch.Tensor]]:
    """(their name, their tensor), over the whole GPTModel: views of our parameters, in which they
    can be read and written; copies where their order is another."""
    return ((name, part.get()) for name, part in parts(model, layout))


def embedding_name(layout: str) -> str:
    return LAYOUTS[layout].names("token_embedding")[0] + ".weight"


def head_name(layout: str) -> str:
    return LAYOUTS[layout].names("lm_head")[0] + ".weight"


def identify(
    tensors: dict[str, Stored], model_type: object = None
) -> tuple[dict[str, Stored], str | None]:
    """A file's table under the full names of its layout, and which layout that is: None, and the
    names as they are, where no layout has them. model_type: of a config.json that goes with them,
    since several families have the same names for other things."""
    tensors = text_only(strip_wrappers(tensors))
    layout = recognise({name: stored.shape for name, stored in tensors.items()})
    family = of_family(model_type)
    if family is not None and layout not in ("native", "gpt2", "nanogpt"):
        embedding = embedding_name(family)
        bare = embedding.removeprefix(LAYOUTS[family].prefix)
        layout = family if {embedding, bare} & tensors.keys() else layout
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
    head = head_name(layout).removesuffix("weight")

    def full(name):
        return name if name.startswith((prefix, head)) else prefix + name

    return {full(name): entry for name, entry in table.items() if not re.search(ignored, name)}


def text_only(table: dict) -> dict:
    """Of a model that sees images too, the part that reads and writes text, as if it were alone."""
    inner = r"^(?:model\.language_model|language_model\.model)\."
    if not any(re.match(inner, name) for name in table):
        return table
    names = {name: re.sub(inner, "model.", name) for name in table}
    names = {name: full.removeprefix("language_model.") for name, full in names.items()}
    return {
        names[name]: entry
        for name, entry in table.items()
        if not re.search(r"(^|\.)(vision_tower|multi_modal_projector)\.", name)
    }


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
    layout = layout or "native"
    wanted = {name: list(part.tensor.shape) for name, part in parts(model, layout)}
    spare = {head_name(layout)} if model.config.tie_embeddings else set()
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
    parameters, records = dict(parts(model, layout)), {}
    for piece in (piece for name in parameters for piece in tensors[name].pieces):
        if piece.record:
            records.setdefault(piece.file, set()).add(piece.record)
    for file, names in records.items():
        tensorfiles.check_crc(file, names)
    extremes = {}
    with cli.progress(len(parameters), f"loading {path.name}", "tensor") as bar:
        for name, part in parameters.items():
            for where, values in read(tensors[name]):
                part.put(where, values)
            extremes[name] = tensorfiles.extremes(part.tensor)
            bar.update(1)
    tensorfiles.refuse_nonfinite(extremes, path)
