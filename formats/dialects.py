"""The names that trainers give to the weights of models that we know, and the order of their rows.

    tensors = model_part(tensors)                     # without optimizer, wrappers, common prefix
    if (found := dialect_of(tensors)) is not None:
        known = facts(tensors, found)                 # fields of GPTConfig that the shapes tell
        tensors = translated(tensors, found, config)  # our names and order of rows

layouts.py has the names of files that are written again, as views of our parameters. These are only
read: a table under their names becomes one under ours, and no byte is moved. Meta's code turns the
channels (2i, 2i + 1) of a head together where ours turns (i, i + D/2), so the rows of its q and k
are taken in another order, for which the config must say how many heads there are.
"""

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from config import GPTConfig
from formats.stored import Stored, beside, rows, stacked

NOT_THE_MODEL = re.compile(
    r"(optim\w*|lr_schedulers?|schedulers?|dataloader\w*|train_state|trainer_state|rng\w*|"
    r"metrics?|callbacks|loops|grad_scaler|scaler|ema\w*|chained_\d+)(\.|$)"
)
WRAPPERS = re.compile(
    r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\."
)
# what stands at the top of a model's names, whoever's they are
EMBEDDING = re.compile(
    r"((model|transformer|gpt_neox)\.)?"
    r"(embed_tokens|wte|word_embeddings|embed_in|token_embedding|tok_embeddings|embeddings)\.weight$"
)


# rows of latent attention with rotary channels
TURNED = tuple(f".attn.{x}.weight" for x in ("q_proj", "q_up_proj", "kv_down_proj"))
# a matrix that Megatron has in every block, before and since Megatron-Core
MEGATRON = re.compile(
    r"^((module|model|language_model)\.)*(decoder|encoder|transformer)\.layers\.(\d+\.)?"
    r"(self_attention\.linear_proj|(self_)?attention\.dense)\.weight$"
)


class Dialect(NamedTuple):
    modules: dict[str, list[str]]  # ours: theirs, in the order of our rows; {e}: for each expert
    paired: bool = False  # rotary channels (2i, 2i + 1) turn together: Meta's order
    grouped: bool = False  # their one qkv matrix has rows [q … q, k, v] for each key head
    ignored: str = r"$^"  # buffers
    turned_last: bool = False  # rotary channels stand behind the others in latent attention
    choice_bias: str = ""  # what a router chooses by beside its weight, by its whole name


def _meta(
    qkv: list[str], paired: bool, grouped: bool = False, latents: dict[str, str] | None = None
) -> Dialect:
    """latents: of latent attention, in place of qkv and of the norms of queries and keys."""
    at = "layers.{i}."
    attention = {"qkv_proj": qkv, "q_norm": ["q_norm"], "k_norm": ["k_norm"]}
    if latents:
        attention = {ours: [name] for ours, name in latents.items()}
    return Dialect(
        {
            f"blocks.{{i}}.attn.{ours}": [f"{at}attention.{name}" for name in theirs]
            for ours, theirs in attention.items()
        }
        | {
            "token_embedding": ["tok_embeddings"],
            "blocks.{i}.ln1": [at + "attention_norm"],
            "blocks.{i}.ln2": [at + "ffn_norm"],
            "blocks.{i}.attn.out_proj": [at + "attention.wo"],
            "blocks.{i}.mlp.fc1": [at + "feed_forward.w1", at + "feed_forward.w3"],
            "blocks.{i}.mlp.fc2": [at + "feed_forward.w2"],
            "blocks.{i}.mlp.router": [at + "moe.router.gate"],
            "blocks.{i}.mlp.experts.fc1": [at + "moe.experts.w1", at + "moe.experts.w3"],
            "blocks.{i}.mlp.experts.fc2": [at + "moe.experts.w2"],
            "blocks.{i}.mlp.shared.fc1": [at + f"moe.shared_experts.{w}" for w in ("w1", "w3")],
            "blocks.{i}.mlp.shared.fc2": [at + "moe.shared_experts.w2"],
            "ln_f": ["norm"],
            "lm_head": ["output"],
        },
        paired,
        grouped,
        r"^(freqs_cis|rope\.freqs|rope\.cache|freqs_(cos|sin))$",
        turned_last=bool(latents),
        choice_bias=at + "moe.expert_bias",
    )


OLMO_CORE = Dialect(
    {
        "token_embedding": ["embeddings"],
        "blocks.{i}.ln1": ["blocks.{i}.attention_norm"],
        "blocks.{i}.ln2": ["blocks.{i}.feed_forward_norm"],
        "blocks.{i}.attn.qkv_proj": [f"blocks.{{i}}.attention.w_{x}" for x in "qkv"],
        "blocks.{i}.attn.out_proj": ["blocks.{i}.attention.w_out"],
        "blocks.{i}.attn.q_norm": ["blocks.{i}.attention.q_norm"],
        "blocks.{i}.attn.k_norm": ["blocks.{i}.attention.k_norm"],
        "blocks.{i}.mlp.fc1": ["blocks.{i}.feed_forward.w1", "blocks.{i}.feed_forward.w3"],
        "blocks.{i}.mlp.fc2": ["blocks.{i}.feed_forward.w2"],
        "ln_f": ["lm_head.norm"],
        "lm_head": ["lm_head.w_out"],
    }
)


def _litgpt(gated: bool, old: bool) -> Dialect:
    """old: `attn.attn`, whose rows lie by groups, before `attn.qkv`."""
    at, mlp = "transformer.h.{i}.", ["mlp.fc_1", "mlp.fc_2"] if gated else ["mlp.fc"]
    return Dialect(
        {
            "token_embedding": ["transformer.wte"],
            "blocks.{i}.ln1": [at + "norm_1"],
            "blocks.{i}.ln2": [at + "norm_2"],
            "blocks.{i}.attn.qkv_proj": [at + ("attn.attn" if old else "attn.qkv")],
            "blocks.{i}.attn.out_proj": [at + "attn.proj"],
            "blocks.{i}.attn.q_norm": [at + "attn.norm_q"],
            "blocks.{i}.attn.k_norm": [at + "attn.norm_k"],
            "blocks.{i}.mlp.fc1": [at + name for name in mlp],
            "blocks.{i}.mlp.fc2": [at + "mlp.proj"],
            "ln_f": ["transformer.ln_f"],
            "lm_head": ["lm_head"],
        },
        grouped=old,
    )


def _megatron(qkv: str, paired: bool) -> Dialect:
    at = "decoder.layers.{i}."
    return Dialect(
        {
            "token_embedding": ["embedding.word_embeddings"],
            "position_embedding": ["embedding.position_embeddings"],
            "blocks.{i}.ln1": [at + "input_layernorm"],
            "blocks.{i}.ln2": [at + "pre_mlp_layernorm"],
            "blocks.{i}.attn.qkv_proj": [at + "self_attention." + qkv],
            "blocks.{i}.attn.out_proj": [at + "self_attention.linear_proj"],
            "blocks.{i}.attn.q_norm": [at + "self_attention.q_layernorm"],
            "blocks.{i}.attn.k_norm": [at + "self_attention.k_layernorm"],
            "blocks.{i}.mlp.fc1": [at + "mlp.linear_fc1"],
            "blocks.{i}.mlp.fc2": [at + "mlp.linear_fc2"],
            "blocks.{i}.mlp.router": [at + "mlp.router"],
            "blocks.{i}.mlp.experts.fc1": [at + "mlp.experts.local_experts.{e}.linear_fc1"],
            "blocks.{i}.mlp.experts.fc2": [at + "mlp.experts.local_experts.{e}.linear_fc2"],
            "blocks.{i}.mlp.shared.fc1": [at + "mlp.shared_experts.linear_fc1"],
            "blocks.{i}.mlp.shared.fc2": [at + "mlp.shared_experts.linear_fc2"],
            "blocks.{i}.mlp.shared_gate": [at + "mlp.shared_experts.gate"],
            "ln_f": ["decoder.final_layernorm"],
            "lm_head": ["output_layer"],
        },
        paired,
        grouped=True,
        choice_bias=at + "mlp.router.expert_bias",
    )


# Megatron's names before Megatron-Core, and where a norm is fused with what reads it, under those
# of Megatron-Core's plain modules
FORMER_MEGATRON = tuple((re.compile(pattern), now) for pattern, now in (
    (r"^((module|model|language_model)\.)+", ""),
    (r"^(encoder|transformer)\.", "decoder."),
    (r"^word_embeddings_for_head\.", "output_layer."),
    (r"\.attention\.", ".self_attention."),
    (r"\.query_key_value\.", ".linear_qkv."),
    (r"\.self_attention\.dense\.", ".self_attention.linear_proj."),
    (r"\.dense_h_to_4h\.", ".linear_fc1."),
    (r"\.dense_4h_to_h\.", ".linear_fc2."),
    (r"\.input_norm\.", ".input_layernorm."),
    (r"\.post_attention_(layer)?norm\.", ".pre_mlp_layernorm."),
    (r"^decoder\.final_norm\.", "decoder.final_layernorm."),
    (r"\.self_attention\.linear_qkv\.layer_norm_", ".input_layernorm."),
    (r"\.mlp\.linear_fc1\.layer_norm_", ".pre_mlp_layernorm."),
    (r"\.experts\.linear_fc([12])\.weight(\d+)$", r".experts.local_experts.\2.linear_fc\1.weight"),
    (r"\.experts\.experts\.(?=\d)", ".experts.local_experts."),
    (r"\.shared_experts\.gate_weight$", ".shared_experts.gate.weight"),
))  # fmt: skip

SPLIT = ["wq", "wk", "wv"]
LATENTS = {
    "q_proj": "wq", "q_down_proj": "wq_a", "q_down_norm": "q_norm", "q_up_proj": "wq_b",
    "kv_down_proj": "wkv_a", "kv_down_norm": "kv_norm", "kv_up_proj": "wkv_b",
}  # fmt: skip
DIALECTS = {
    "litgpt": _litgpt(gated=False, old=False),
    "litgpt, gated": _litgpt(gated=True, old=False),
    "litgpt, old": _litgpt(gated=False, old=True),
    "litgpt, old, gated": _litgpt(gated=True, old=True),
    "meta": _meta(SPLIT, paired=True),
    "meta, fused": _meta(["qkv_linear.wqkv"], paired=True, grouped=True),
    "torchtitan qwen3": _meta(SPLIT, paired=False),
    "torchtitan qwen3, fused": _meta(["qkv_linear.wqkv"], paired=False, grouped=True),
    "torchtitan deepseek": _meta([], paired=True, latents=LATENTS),
    "olmo-core": OLMO_CORE,
    "megatron": _megatron("linear_qkv", paired=False),
    "megatron, neighbours": _megatron("linear_qkv_pairs", paired=True),
}


# ---------------------------------------------------------------------------------------------
# Which names there are


def model_part(tensors: dict[str, Stored]) -> dict[str, Stored]:
    """The model's tensors of a training state, under the names that its module gives them."""
    tensors = _renamed(tensors, lambda name: WRAPPERS.sub("", name))
    for _ in range(4):  # {"app": {"model": {"module": …}}}
        tensors = {name: t for name, t in tensors.items() if not NOT_THE_MODEL.match(name)}
        first = {name.partition(".")[0] for name in tensors}
        prefix = first.pop() if len(first) == 1 else "model" if "model" in first else None
        inside = {
            name.removeprefix(f"{prefix}."): t
            for name, t in tensors.items()
            if name.startswith(f"{prefix}.")
        }
        stays_known = len(inside) == len(tensors) and _is_known(inside)
        if not inside or (_is_known(tensors) and not stays_known):
            break
        tensors = inside
    return _of_one_generation(tensors)


def _is_known(tensors: dict[str, Stored]) -> bool:
    return any(map(EMBEDDING.match, tensors))


def _of_one_generation(tensors: dict[str, Stored]) -> dict[str, Stored]:
    """torchtitan's names of 2026 under those that it had before, which are Meta's, and Megatron's
    of all its versions under Megatron-Core's."""
    if any(map(MEGATRON.search, tensors)):
        return megatron_core(tensors)
    if "tok_embeddings.weight" not in tensors:
        return tensors

    def former(name: str) -> str:
        name = re.sub(r"\.qkv_linear\.(w[qkv])\.", r".\1.", name)
        name = re.sub(r"\.routed_experts\.inner_experts\.(w[123])_[A-Z]+$", r".experts.\1", name)
        name = re.sub(r"\.moe\.experts\.w[123]$", r"\g<0>.weight", name)
        name = re.sub(r"\.moe\.expert_bias_E$", ".moe.expert_bias", name)
        return re.sub(r"^lm_head\.", "output.", name)

    return _renamed(tensors, former)


def megatron_core(tensors: dict[str, Stored]) -> dict[str, Stored]:
    """Megatron's names of all its versions, of a whole model or a part, under Megatron-Core's."""

    def now(name: str) -> str:
        for pattern, instead in FORMER_MEGATRON:
            name = pattern.sub(instead, name)
        return name

    return _renamed(tensors, now)


def _renamed(tensors: dict[str, Stored], new: Callable[[str], str]) -> dict[str, Stored]:
    renamed: dict[str, Stored] = {}
    for name, stored in tensors.items():
        if new(name) in renamed:
            raise ValueError(f"{name} is there under a second name too: which of the two is meant?")
        renamed[new(name)] = stored
    return renamed


def dialect_of(tensors: dict[str, Stored]) -> str | None:
    """The entry of DIALECTS whose names these are. q and k norms tell Qwen3, whose rotary order is
    ours, from Llama: torchtitan calls the rest of both the same."""
    names = _of_one_generation(tensors).keys()
    if "tok_embeddings.weight" in names:
        if "layers.0.attention.wkv_a.weight" in names:
            return "torchtitan deepseek"
        fused = "layers.0.attention.qkv_linear.wqkv.weight" in names
        if not fused and "layers.0.attention.wq.weight" not in names:
            return None
        qwen3 = "layers.0.attention.q_norm.weight" in names
        return ("torchtitan qwen3" if qwen3 else "meta") + (", fused" if fused else "")
    if {"embeddings.weight", "blocks.0.attention.w_q.weight"} <= names:
        return "olmo-core"
    for kind, qkv in (("megatron", "linear_qkv"), ("megatron, neighbours", "linear_qkv_pairs")):
        at = f"decoder.layers.0.self_attention.{qkv}.weight"
        if {"embedding.word_embeddings.weight", at} <= names:
            return kind
    for old, qkv in (("", "attn.qkv"), (", old", "attn.attn")):
        if {"transformer.wte.weight", f"transformer.h.0.{qkv}.weight"} <= names:
            gated = "transformer.h.0.mlp.fc_1.weight" in names
            return "litgpt" + old + (", gated" if gated else "")
    return None


# ---------------------------------------------------------------------------------------------
# What the shapes tell


def facts(tensors: dict[str, Stored], dialect: str) -> dict:
    """Fields of GPTConfig that the names and shapes of a model's weights fix."""
    modules = DIALECTS[dialect].modules

    def shape(ours: str, part: int = 0):
        parts = modules.get(ours.replace("blocks.0.", "blocks.{i}."), [])
        name = f"{parts[part].format(i=0)}.weight" if part < len(parts) else ""
        return tensors[name].shape if name in tensors else None

    def size_of(ours: str, dim: int, part: int = 0) -> int | None:
        found = shape(ours, part)
        return found[dim] if found is not None and len(found) > dim else None

    embedding = modules["token_embedding"][0] + ".weight"
    head = modules["lm_head"][0] + ".weight"
    layer = re.escape(modules["blocks.{i}.ln1"][0]).replace(r"\{i\}", r"(\d+)") + r"\.weight"
    layers = {m[1] for name in tensors if (m := re.fullmatch(layer, name))}
    D = size_of("blocks.0.attn.q_norm", 0)
    found = {
        "vocab_size": size_of("token_embedding", 0),
        "d_model": size_of("token_embedding", 1),
        "n_layers": len(layers) or None,
        "d_ff": size_of("blocks.0.mlp.fc2", 1),
        "max_position_embeddings": size_of("position_embedding", 0),
        "head_dim": D,
    }
    queries, keys = (size_of("blocks.0.attn.qkv_proj", 0, part) for part in (0, 1))
    if D and queries and keys:
        found |= {"n_heads": queries // D, "n_kv_heads": keys // D}
    known: dict[str, Any] = {field: value for field, value in found.items() if value}
    known |= {"norm": "rmsnorm", "position": "rope", "gated_mlp": True, "activation": "silu"}
    known |= {"bias": False, "qk_norm": bool(D)}
    untied = head in tensors and tensors[head] != tensors.get(embedding)
    return known | {"tie_embeddings": not untied}


CANNOT_BE_TOLD = ("n_heads", "n_kv_heads", "rope_theta", "norm_eps", "max_position_embeddings")


def no_config(path: Path, known: dict) -> str:
    """What to say of weights whose config lies nowhere."""
    sizes = {k: v for k, v in known.items() if type(v) is int}
    said = ", ".join(f"{k}={v}" for k, v in sizes.items())
    missing = ", ".join(name for name in CANNOT_BE_TOLD if name not in known)
    return (
        f"{path} has no config. Its shapes say {said or 'nothing'}, but not {missing}: give it "
        "with --config"
    )


# ---------------------------------------------------------------------------------------------
# Under our names


def translated(
    tensors: dict[str, Stored], dialect: str, config: GPTConfig | None
) -> dict[str, Stored]:
    """The table under our own names (layout "native"). Without a config rows stay where they are;
    such a table is for looking at. What no module of ours has keeps its name."""
    return under_ours(tensors, DIALECTS[dialect], config)


def under_ours(
    tensors: dict[str, Stored], spec: Dialect, config: GPTConfig | None
) -> dict[str, Stored]:
    """`translated` of a dialect that is no entry of DIALECTS."""
    left, ours = dict(tensors), {}
    number = re.compile(r"(?:\w+\.){1,2}?(\d+)\.")
    layers = sorted({int(m[1]) for name in tensors if (m := number.match(name))})
    table = {
        f"{ours}.{leaf}": [f"{their}.{leaf}" for their in theirs]
        for ours, theirs in spec.modules.items()
        for leaf in ("weight", "bias")
    }
    if spec.choice_bias:
        table["blocks.{i}.mlp.router.choice_bias"] = [spec.choice_bias]
    for our, theirs in table.items():
        for i in layers if "{i}" in our else [0]:
            name, names = our.format(i=i), [_of_layer(their, i, left) for their in theirs]
            there = all(each and all(n in left for n in each) for each in names)
            if not there or len({len(each) for each in names}) > 1:  # an expert's half
                continue
            parts = [_taken(name, each, their, left) for each, their in zip(names, theirs)]
            if ".qkv_proj." in our:
                parts = _by_heads(parts, spec, config, name)
            if spec.turned_last and config is not None and our.endswith(TURNED):
                parts = [_turned_first(parts[0], our, spec, config)]
            dim = max(0, len(parts[0].shape) - 2)  # rows, of each expert
            ours[name] = parts[0] if len(parts) == 1 else beside(name, parts, dim)
    return ours | {name: t for name, t in left.items() if not re.search(spec.ignored, name)}


def _of_layer(their: str, i: int, left: dict[str, Stored]) -> list[str]:
    """Their names of one of our tensors: as many as there are experts, where each has its own."""
    if "{e}" not in their:
        return [their.format(i=i)]
    every = (their.format(i=i, e=e) for e in itertools.count())
    return list(itertools.takewhile(left.__contains__, every))


def _taken(name: str, names: list[str], their: str, left: dict[str, Stored]) -> Stored:
    """A part of ours, which is no longer left."""
    found = [left.pop(one) for one in names]
    return stacked(name, found) if "{e}" in their else found[0]


def _by_heads(parts: list[Stored], spec: Dialect, config: GPTConfig | None, name: str):
    """q, k and v, in our order of rows."""
    if config is None or not (spec.grouped or spec.paired):
        return parts
    H, G, D = config.n_heads, config.n_kv_heads, config.head_dim
    if sum(sum(part.shape[:1]) for part in parts) != config.qkv_dim:
        return parts  # check_fits says so
    if spec.grouped:
        parts = ungrouped(parts[0], H, G, D)
    elif [part.shape[0] for part in parts] != [H * D, G * D, G * D]:
        shapes = [list(part.shape) for part in parts]
        raise ValueError(f"{name}: q, k and v are {shapes}, which {H} and {G} heads of {D} are not")
    if spec.paired:
        R = config.rotary_dim
        parts = [unpaired(parts[0], D, R), unpaired(parts[1], D, R), parts[2]]
    return parts


def _turned_first(t: Stored, our: str, spec: Dialect, config: GPTConfig) -> Stored:
    """Rows of latent attention whose rotary channels stand behind the others of each head, or of
    the latent, in our order: before them."""
    R, heads = config.rotary_dim, 1 if "kv_down" in our else config.n_heads
    others = config.kv_lora_rank if "kv_down" in our else config.qk_nope_head_dim
    if others is None or t.shape[0] != heads * (others + R):
        return t  # check_fits says so
    step, runs = 2 if spec.paired else 1, []
    for a in range(0, t.shape[0], others + R):
        b = a + others
        runs += [range(b + i, b + R, step) for i in range(step)] + [range(a, b)]
    return rows(t, runs)


def ungrouped(qkv: Stored, H: int, G: int, D: int) -> list[Stored]:
    """q, k and v of rows [q … q, k, v] for each of G key heads."""
    per, width = H // G, (H // G + 2) * D
    at = [g * width for g in range(G)]
    return [
        rows(qkv, [range(a, a + per * D) for a in at]),
        rows(qkv, [range(a + per * D, a + per * D + D) for a in at]),
        rows(qkv, [range(a + per * D + D, a + width) for a in at]),
    ]


def unpaired(t: Stored, D: int, R: int) -> Stored:
    """Rows (2i, 2i + 1) of the first R of each head of D to (i, i + R/2)."""
    heads = range(0, t.shape[0], D)
    runs = ([range(a, a + R, 2), range(a + 1, a + R, 2), range(a + R, a + D)] for a in heads)
    return rows(t, [run for head in runs for run in head if run])
