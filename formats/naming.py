"""The names that others give to the weights of the same models, as tables, and which of them a file
has.

    table, layout = identify(tensors, ["gemma2"])     # under full names; a key of LAYOUTS, or None
    theirs_of("llama", "blocks.{i}.mlp.fc1")          # the names of gate_proj and of up_proj

A layout is known by a whole first block of its names. Families that share names differ in what lies
under them, so the model_type of a config.json comes first; without one, Llama's names are Llama's.
"""

import itertools
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from formats import foreign, shown, stored
from formats.stored import Stored

GATED = ("gate", "up")
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
MIXTURE_MODULES = LLAMA_MODULES | {  # an expert each, E of them
    "blocks.{i}.mlp.router": ["model.layers.{i}.mlp.gate"],
    "blocks.{i}.mlp.experts.fc1": [f"model.layers.{{i}}.mlp.experts.{{e}}.{x}_proj" for x in GATED],
    "blocks.{i}.mlp.experts.fc2": ["model.layers.{i}.mlp.experts.{e}.down_proj"],
}
QWEN2_MOE_MODULES = MIXTURE_MODULES | {
    "blocks.{i}.mlp.shared.fc1": [f"model.layers.{{i}}.mlp.shared_expert.{x}_proj" for x in GATED],
    "blocks.{i}.mlp.shared.fc2": ["model.layers.{i}.mlp.shared_expert.down_proj"],
    "blocks.{i}.mlp.shared_gate": ["model.layers.{i}.mlp.shared_expert_gate"],
}
GLM4_MOE_MODULES = MIXTURE_MODULES | {
    "blocks.{i}.mlp.shared.fc1": [f"model.layers.{{i}}.mlp.shared_experts.{x}_proj" for x in GATED],
    "blocks.{i}.mlp.shared.fc2": ["model.layers.{i}.mlp.shared_experts.down_proj"],
}
MIXTRAL_MODULES = LLAMA_MODULES | {
    "blocks.{i}.mlp.router": ["model.layers.{i}.block_sparse_moe.gate"],
    "blocks.{i}.mlp.experts.fc1": [
        f"model.layers.{{i}}.block_sparse_moe.experts.{{e}}.{w}" for w in ("w1", "w3")
    ],
    "blocks.{i}.mlp.experts.fc2": ["model.layers.{i}.block_sparse_moe.experts.{e}.w2"],
}
GRANITEMOE_MODULES = LLAMA_MODULES | {  # stacked as ours are
    "blocks.{i}.mlp.router": ["model.layers.{i}.block_sparse_moe.router.layer"],
    "blocks.{i}.mlp.experts.fc1": ["model.layers.{i}.block_sparse_moe.input_linear"],
    "blocks.{i}.mlp.experts.fc2": ["model.layers.{i}.block_sparse_moe.output_linear"],
}
GRANITEMOE_MEMORY = LLAMA_MODULES | {  # as transformers 5 has them, and trainers that save that
    "blocks.{i}.mlp.router": ["model.layers.{i}.block_sparse_moe.router"],
    "blocks.{i}.mlp.experts.fc1": [
        f"model.layers.{{i}}.block_sparse_moe.experts.{{e}}.{x}_proj" for x in GATED
    ],
    "blocks.{i}.mlp.experts.fc2": ["model.layers.{i}.block_sparse_moe.experts.{e}.down_proj"],
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
# what is compressed, normalised and made of it, in latent attention
LATENTS = {
    "q_proj": "q_proj",
    "q_down_proj": "q_a_proj",
    "q_down_norm": "q_a_layernorm",
    "q_up_proj": "q_b_proj",
    "kv_down_proj": "kv_a_proj_with_mqa",
    "kv_down_norm": "kv_a_layernorm",
    "kv_up_proj": "kv_b_proj",
}
DEEPSEEK_MODULES = {ours: name for ours, name in GLM4_MOE_MODULES.items() if "qkv" not in ours}
DEEPSEEK_MODULES |= {
    f"blocks.{{i}}.attn.{ours}": [f"model.layers.{{i}}.self_attn.{name}"]
    for ours, name in LATENTS.items()
}
EMA_COUNT = r"(^|\.)n_averaged$"  # of torch.optim.swa_utils.AveragedModel
OLD_MASKS = rf"\.attn\.(masked_)?bias$|{EMA_COUNT}"
OLD_FREQUENCIES = rf"rotary_emb\.inv_freq$|{EMA_COUNT}"
OLD_NEOX = rf"\.attention\.((masked_)?bias|rotary_emb\.inv_freq)$|{EMA_COUNT}"
# What torch.compile, FSDP, activation checkpointing and Lightning put into names, anywhere
DEEPEST = 8  # modules around a model
WRAPPERS = "_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module"
# what a block has of matrices: one of these attentions, and one of these MLPs
ATTENTIONS = (
    ("attn.qkv_proj", "attn.out_proj"),
    ("attn.kv_down_proj", "attn.kv_up_proj", "attn.out_proj"),
)
STACKED = r"\.experts\.gate_up_proj$"  # of all experts of a layer, beside a down_proj
MLPS = (("mlp.fc1", "mlp.fc2"), ("mlp.router", "mlp.experts.fc1", "mlp.experts.fc2"))
SEES_IMAGES = ("gemma3", "gemma3_text")  # models whose text is a model of ours


class Layout(NamedTuple):
    modules: dict[str, list[str]]  # ours: theirs, in the order of our rows; absent: the same name
    prefix: str = ""  # of all names but the head's; files of the bare backbone lack it
    conv1d: bool = False  # matrices of the blocks are [in, out]
    ignored: str = EMA_COUNT  # buffers that files hold beside weights: all that is ever dropped
    norms: tuple[str, ...] = ("ln1", "ln2")  # with weights, in the blocks of all its models
    pairs: str = ""  # of rotary channels, ours being (i, i + R/2): see layouts.PAIRS
    by_head: bool = False  # rows of the fused projection are q, k, v of each head in turn
    turned_last: bool = False  # rotary channels stand behind the others in latent attention
    choice_bias: str = "e_score_correction_bias"  # what a router chooses by, beside its weight

    def names(self, ours: str) -> list[str]:
        return self.modules.get(ours, [ours])


LLAMA = Layout(LLAMA_MODULES, "model.", ignored=OLD_FREQUENCIES)
POST = ("ln1_post", "ln2_post")
LAYOUTS = {
    "native": Layout({}, norms=(), choice_bias="choice_bias"),  # which our features can do without
    "gpt2": Layout(GPT2_MODULES, "transformer.", conv1d=True, ignored=OLD_MASKS),
    "nanogpt": Layout(GPT2_MODULES, "transformer.", ignored=OLD_MASKS),
    "llama": LLAMA,
    "phi3": LLAMA._replace(modules=PHI3_MODULES),
    "olmo": LLAMA._replace(norms=()),
    "olmo2": LLAMA._replace(modules=OLMO2_MODULES, norms=POST),
    "gemma2": LLAMA._replace(modules=GEMMA2_MODULES, norms=("ln1", "ln2", *POST)),
    "cohere": LLAMA._replace(norms=("ln1",), pairs="neighbours"),
    "glm": LLAMA._replace(modules=GLM_MODULES, pairs="neighbours"),
    "stablelm": LLAMA._replace(modules=STABLELM_MODULES, norms=("ln1",)),
    "starcoder2": LLAMA._replace(modules=STARCODER2_MODULES),
    "phi": LLAMA._replace(modules=PHI_MODULES, norms=("ln1",)),
    "nanochat": LLAMA._replace(modules=NANOCHAT_MODULES, norms=(), pairs="backwards"),
    "nemotron": LLAMA._replace(modules=NEMOTRON_MODULES),
    "hunyuan_v1_dense": LLAMA._replace(modules=HUNYUAN_MODULES),
    "ernie4_5": LLAMA._replace(pairs="neighbours"),
    "deepseek": LLAMA._replace(modules=DEEPSEEK_MODULES, pairs="neighbours", turned_last=True),
    "minicpm3": LLAMA._replace(modules=DEEPSEEK_MODULES, turned_last=True),
    "qwen3_moe": LLAMA._replace(modules=MIXTURE_MODULES),
    "qwen2_moe": LLAMA._replace(modules=QWEN2_MOE_MODULES),
    "glm4_moe": LLAMA._replace(modules=GLM4_MOE_MODULES),
    "mixtral": LLAMA._replace(modules=MIXTRAL_MODULES),
    "granitemoe": LLAMA._replace(modules=GRANITEMOE_MODULES),
    "granitemoe_memory": LLAMA._replace(modules=GRANITEMOE_MEMORY),
    "gpt_neox": Layout(GPT_NEOX_MODULES, "gpt_neox.", ignored=OLD_NEOX, by_head=True),
}
FAMILIES = {  # the layout of a `model_type`, where it is not that of its own name
    **dict.fromkeys(("mistral", "qwen2", "qwen3"), "llama"),
    **dict.fromkeys(("gemma", "smollm3", "granite", "seed_oss"), "llama"),
    "arcee": "nemotron",
    **dict.fromkeys(
        ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "kimi_k2", "youtu"), "deepseek"
    ),
    "olmo3": "olmo2",
    "olmoe": "qwen3_moe",
    "gemma3": "gemma2",
    "gemma3_text": "gemma2",
    "cohere2": "cohere",
    "glm4": "glm",
}
# What transformers 5 calls the weights in memory, where it is not what it writes
IN_MEMORY = {"mixtral": "qwen3_moe", "granitemoe": "granitemoe_memory"}


def of_family(model_type: object) -> str | None:
    """The layout of a Hugging Face `model_type`; None if it has none here."""
    layout = FAMILIES.get(str(model_type), str(model_type))
    return layout if layout in LAYOUTS else None


def theirs_of(layout: str, module: str, block: int = 0) -> list[str]:
    """The names that the weight of one of our modules has in a layout, under full names."""
    return [f"{name.format(i=block, e=0)}.weight" for name in LAYOUTS[layout].names(module)]


def embedding_name(layout: str) -> str:
    return theirs_of(layout, "token_embedding")[0]


def head_name(layout: str) -> str:
    return theirs_of(layout, "lm_head")[0]


# ---------------------------------------------------------------------------------------------
# Whose a file's names are


def identify(
    tensors: dict[str, Stored], model_types: Sequence[object] = ()
) -> tuple[dict[str, Stored], str | None]:
    """A file's table under the full names of its layout, and which layout that is: None, and the
    names as they are, where no layout has them. model_types: those that its config.json and a
    given config speak of; the first that has such names counts."""
    tensors = table = one_by_one(strip_wrappers(tensors))
    if any(model_type in SEES_IMAGES for model_type in model_types):
        tensors = table = text_only(tensors)
    layout = recognise(_shapes(table), model_types)
    for _ in range(DEEPEST):  # a Lightning module's `model.`
        shared = next(iter(table), "").partition(".")[0] + "."
        if layout is not None or not all(name.startswith(shared) for name in table):
            break
        table = {name.removeprefix(shared): entry for name, entry in table.items()}
        layout = recognise(_shapes(table), model_types)
    return (tensors if layout is None else canonical(table, layout)), layout


def _shapes(table: dict[str, Stored]) -> dict[str, tuple[int, ...]]:
    return {name: entry.shape for name, entry in table.items()}


def recognise(shapes: dict[str, tuple[int, ...]], model_types: Sequence[object] = ()) -> str | None:
    """The layout that a file's names, and for GPT-2 the direction of its matrices, speak of. An
    embedding is not enough: litgpt's and nanochat's have GPT-2's name, Phi's has Llama's."""
    families = [layout for kind in model_types if (layout := of_family(kind))]
    families += [IN_MEMORY[layout] for layout in families if layout in IN_MEMORY]
    for layout in (*(families or ["llama"]), "native", "gpt2"):
        if has_whole_block(shapes, layout):
            break
    else:
        return None
    if layout in ("gpt2", "nanogpt"):  # [3C, C] of nn.Linear, [C, 3C] of Conv1D
        fused = next(shapes[n] for n in shapes if n.endswith("h.0.attn.c_attn.weight"))
        return "nanogpt" if len(fused) == 2 and fused[0] > fused[1] else "gpt2"
    return layout


def has_whole_block(names: Iterable[str], layout: str) -> bool:
    """Whether the embedding, and of the first block every matrix and norm, are among the names."""
    spec, names = LAYOUTS[layout], set(names)
    for attention, mlp in itertools.product(ATTENTIONS, MLPS):
        inner = [f"blocks.{{i}}.{part}" for part in (*attention, *spec.norms, *mlp)]
        modules = ("token_embedding", *inner)
        full = {name for module in modules for name in theirs_of(layout, module)}
        if full <= names or {name.removeprefix(spec.prefix) for name in full} <= names:
            return True
    return False


def whose(names: Iterable[str], layout: str | None = None) -> str | None:
    """Whose weights have such names, where they are not simply those of `layout`: of families that
    have others than Llama's and GPT-2's, or of somebody whom foreign.py knows."""
    names = list(names)
    kinds = model_types_of(names, layout)
    return f"those of a model_type {' or '.join(kinds)}" if kinds else foreign.whose(names)


def model_types_of(names: list[str], layout: str | None = None) -> list[str]:
    """The families whose names these are, and which only a config tells apart; none where they can
    be those of `layout`, or are known without a config."""
    patterns = {re.sub(r"(?<=\.)\d+(?=\.)", "{i}", name) for name in names}
    likeness = {other: _likeness(patterns, other) for other in LAYOUTS}
    best = max(likeness.values())
    alike = {o for o in LAYOUTS if likeness[o] == best and has_whole_block(names, o)}
    if alike & {layout, "llama", "native", "gpt2", "nanogpt"}:
        return []
    kinds = [kind for kind in {**LAYOUTS, **FAMILIES} if kind != IN_MEMORY["granitemoe"]]
    return [kind for kind in kinds if of_family(kind) in alike]


def _likeness(patterns: set[str], layout: str) -> tuple[int, int]:
    """(how many kinds of modules a layout has names for, minus how many of its own are lacking)."""
    modules = {name.rpartition(".")[0] for name in full_names(patterns, layout)}
    table = LAYOUTS[layout].modules.values()
    known = {re.sub(r"\{[he]\}", "{i}", name) for theirs in table for name in theirs}
    return len(modules & known), -len(known - modules)


def unknown_names(tensors: dict[str, Stored]) -> str:
    """What to say of weights whose names are of no layout, or of one that needs another config."""
    owner, some = whose(tensors), shown(list(tensors), 3)
    if model_types_of(list(tensors)):
        return f"its weights have names that need a config of their family: {owner} ({some})"
    said = f": they are {owner}" if owner else ""
    return f"its weights have names that are not known here{said} ({some})"


# ---------------------------------------------------------------------------------------------
# Full names


def full_names(names: Iterable[str], layout: str) -> list[str]:
    """With the prefix that a bare backbone's names lack."""
    prefix, head = LAYOUTS[layout].prefix, head_name(layout).removesuffix("weight")
    return [name if name.startswith((prefix, head)) else prefix + name for name in names]


def canonical(table: dict, layout: str) -> dict:
    """The same table under full names, without buffers, and without the layers behind the last that
    guess at tokens further ahead (DeepSeek-V3's, GLM-4.5's)."""
    ignored = LAYOUTS[layout].ignored
    ahead = [re.escape(name.partition("eh_proj.")[0]) for name in table if ".eh_proj." in name]
    ignored = "|".join([ignored, *(f"^{layer}" for layer in ahead)])
    full = zip(full_names(table, layout), table.items(), strict=True)
    return {name: entry for name, (old, entry) in full if not re.search(ignored, old)}


def one_by_one(table: dict[str, Stored]) -> dict[str, Stored]:
    """The same table with an entry for each matrix of each expert where a file stacks them as
    transformers 5 has them in memory: gate and up in one, [E, 2F, C] or [E, C, 2F]."""
    stacks = [name for name in table if re.search(STACKED, name)]
    if not stacks:
        return table
    found = {name: entry for name, entry in table.items() if name not in stacks}
    for name in stacks:
        inner = name.removesuffix("gate_up_proj")
        down = table.get(f"{inner}down_proj")
        up = table[name]
        if down is None or not len(up.shape) == len(down.shape) == 3:
            found[name] = up
            continue
        turned = up.shape[1] == down.shape[2]
        up_each, down_each = stored.unstacked(up, turned), stored.unstacked(down, turned)
        for e, (both, one) in enumerate(zip(up_each, down_each, strict=True)):
            half = both.shape[0] // 2
            found[f"{inner}{e}.gate_proj.weight"] = stored.rows(both, [range(half)])
            found[f"{inner}{e}.up_proj.weight"] = stored.rows(both, [range(half, 2 * half)])
            found[f"{inner}{e}.down_proj.weight"] = one
        del found[f"{inner}down_proj"]
    return found


def text_only(table: dict[str, Stored]) -> dict[str, Stored]:
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


def strip_wrappers(tensors: dict[str, Stored]) -> dict[str, Stored]:
    """Names without what DDP puts before each of them, and FSDP, torch.compile and activation
    checkpointing anywhere in them."""
    table: dict[str, Stored] = {}
    for name, entry in tensors.items():
        bare = re.sub(rf"(^|(?<=\.))(({WRAPPERS})\.)+", "", name)
        if bare in table:
            file = entry.pieces[0].file
            raise ValueError(f"{file} holds {shown(bare)} twice, wrapped and not")
        table[bare] = entry
    for _ in range(DEEPEST):
        wrapped = [name for name in table if not re.search(EMA_COUNT, name)]
        if not (wrapped and all(name.startswith("module.") for name in wrapped)):
            break
        table = {name.removeprefix("module."): entry for name, entry in table.items()}
    return table
