"""adapter_config.json as PEFT writes it: which modules a LoRA adapter changes, and by how much.

    config = read(Path("lora/adapter_config.json"))
    config.changes("model.layers.0.self_attn.q_proj", "linear")     # whether it has A and B there
    config.rank("model.layers.0.self_attn.q_proj"), config.scale(…)

Every switch is either known to leave the function computed alone, or is expressed here, or is
refused by name: a newer PEFT's too, unless it is off. Modules have transformers' names. Plain
Python, no torch.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from families.llama import number
from formats import shown
from inputs import read_object

# How an adapter was trained, made or is called: nothing that a trained one computes
NO_MATTER = {"task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "peft_type"}
NO_MATTER |= {"lora_dropout", "megatron_core", "qalora_group_size", "eva_config", "velora_config"}
NO_MATTER |= {"runtime_config"}
NO_MATTER |= {"fan_in_fan_out"}  # as the base itself has it, in PEFT too
EXPRESSED = {"base_model_name_or_path", "r", "lora_alpha", "rank_pattern", "alpha_pattern"}
EXPRESSED |= {"use_rslora", "use_dora", "lora_bias", "target_modules", "exclude_modules"}
EXPRESSED |= {"modules_to_save", "layers_to_transform", "trainable_token_indices"}
EXPRESSED |= {"ensure_weight_tying", "init_lora_weights", "bias", "layers_pattern"}
WHY = {  # of the switches that are refused, what to do
    "target_parameters": "it changes parameters of fused experts: merge it with PEFT",
    "layer_replication": "its model repeats layers of the base: merge it with PEFT",
    "alora_invocation_tokens": "it acts on some tokens only, which no weights do",
    "arrow_config": "it routes tokens among adapters, which no weights do",
}
# Begin from other weights than the base's own, which the adapter's file does not hold
MOVE_THE_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
STARTS = ("gaussian", "eva", "orthogonal", "mica")
MAX_PATTERN, MAX_REPEATS = 2000, 6


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter_config.json says, its values checked."""

    file: Path
    base: str  # "": not said
    r: int
    alpha: float
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    rslora: bool
    dora: bool
    bias: str  # which of the base's biases are replaced: none, all, lora_only
    bias_of_b: bool
    tied: bool  # what is done to the embedding is done to a tied head too
    targets: str | tuple[str, ...]
    excluded: str | tuple[str, ...]
    saved: tuple[str, ...]  # modules that are replaced whole, by the ends of their names
    tokens: tuple[int, ...] | dict[str, tuple[int, ...]]  # rows that are replaced
    layers: tuple[int, ...]
    layers_pattern: tuple[str, ...]

    def rank(self, module: str) -> int:
        return self.rank_pattern.get(_key(self.rank_pattern, module), self.r)

    def scale(self, module: str) -> float:
        """What B A is multiplied with."""
        alpha = self.alpha_pattern.get(_key(self.alpha_pattern, module), self.alpha)
        return alpha / (math.sqrt(self.rank(module)) if self.rslora else self.rank(module))

    def saves(self, module: str) -> bool:
        """Whether a module, or one around it, is replaced whole."""
        return any(name.endswith(self.saved) for name in around(module)) if self.saved else False

    def changes(self, module: str, kind: str) -> bool:
        """Whether a module has A and B. kind: "linear", or another's."""
        if _matches(self.excluded, module) or self._is_below_a_saved_one(module):
            return False
        if isinstance(self.targets, str):
            if self.targets.lower() == "all-linear":
                return kind == "linear"
            return re.fullmatch(self.targets, module) is not None
        if module in self.targets:
            return True
        return _matches(self.targets, module) and (not self.layers or self._layer_counts(module))

    def rows(self, module: str, kind: str) -> tuple[int, ...]:
        """The rows of a module that the adapter replaces. kind: "embedding" of tokens, or other."""
        if not isinstance(self.tokens, dict):
            return self.tokens if kind == "embedding" else ()
        found = [rows for name, rows in self.tokens.items() if _matches((name,), module)]
        return found[0] if found else ()

    def _is_below_a_saved_one(self, module: str) -> bool:
        return any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in self.saved)

    def _layer_counts(self, module: str) -> bool:
        patterns = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in self.layers_pattern]
        for pattern in patterns or [r".*?\.[^.]*\.(\d+)\."]:
            if found := re.match(pattern, module):
                return int(found[1]) in self.layers
        return False


def is_named(module: str, names: tuple[str, ...]) -> bool:
    """Whether these are a module's name, or the end of it from a dot on."""
    return any(module == name or module.endswith(f".{name}") for name in names)


def around(module: str) -> list[str]:
    """The names of the modules that a module lies in, and its own."""
    parts = module.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts) + 1)]


def _matches(names: str | tuple[str, ...], module: str) -> bool:
    """A text is a pattern of whole names, a list has names or ends of names."""
    if isinstance(names, str):
        return bool(names) and re.fullmatch(names, module) is not None
    return is_named(module, names)


def _key(patterns: Iterable[str], module: str) -> str:
    """The first of the patterns that is the end of a module's name."""
    found = (pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", module))
    return next(found, module)


# ---------------------------------------------------------------------------------------------
# Reading


def read(file: Path) -> AdapterConfig:
    """ValueError, one line with the file's name, for what is no LoRA adapter of a causal language
    model, what cannot be expressed, and values of another type."""
    values = read_object(file)
    try:
        _refuse_others(values)
        return _from_values(file, values)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _refuse_others(values: dict[str, Any]) -> None:
    kind, task = values.get("peft_type"), values.get("task_type")
    if kind != "LORA":
        raise ValueError(f"peft_type is {kind!r:.60}, and of PEFT's methods only LORA is read")
    if task not in (None, "CAUSAL_LM"):
        raise ValueError(f"task_type is {task!r:.60}: it is no causal language model's")
    start = values.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(MOVE_THE_BASE):
        raise ValueError(
            f"init_lora_weights is {shown(start)}: it belongs to weights that PEFT makes of the "
            "base's when it loads it. Save it with path_initial_model_for_weight_conversion"
        )
    if start not in (True, False, None, *STARTS):
        raise ValueError(f"init_lora_weights is {start!r:.60}, which is not known here")
    given = {"loftq_config", "corda_config", "lora_ga_config"}  # of those starts
    for name, value in values.items():
        off = value is None or value is False or value in ("", [], {})
        if not off and name not in NO_MATTER | EXPRESSED | given:
            why = WHY.get(name, "which changes what is computed, or may, and is not known here")
            raise ValueError(f"{shown(name)} is {value!r:.60}: {why}")


def _from_values(file: Path, values: dict[str, Any]) -> AdapterConfig:
    base, tokens = values.get("base_model_name_or_path"), values.get("trainable_token_indices")
    ranks, alphas = (_mapping(values, name) for name in ("rank_pattern", "alpha_pattern"))
    layers = values.get("layers_to_transform")
    config = AdapterConfig(
        file=file,
        base=base if isinstance(base, str) else "",
        r=_positive("r", values.get("r", 8)),
        alpha=float(number("lora_alpha", values.get("lora_alpha", 8))),
        rank_pattern={name: _positive("rank_pattern", r) for name, r in ranks.items()},
        alpha_pattern={n: float(number("alpha_pattern", a)) for n, a in alphas.items()},
        rslora=_switch(values, "use_rslora"),
        dora=_switch(values, "use_dora"),
        bias=_bias(values.get("bias", "none")),
        bias_of_b=_switch(values, "lora_bias"),
        tied=_switch(values, "ensure_weight_tying"),
        targets=_names(values, "target_modules", pattern=True),
        excluded=_names(values, "exclude_modules", pattern=True),
        saved=tuple(_names(values, "modules_to_save")),
        tokens=_tokens(tokens),
        layers=_integers("layers_to_transform", [layers] if type(layers) is int else layers),
        layers_pattern=tuple(_names(values, "layers_pattern", pattern=True, single=True)),
    )
    for pattern in (*ranks, *alphas, *config.saved, *config.layers_pattern):
        _check_pattern(pattern)
    if isinstance(config.targets, str) and config.layers:
        raise ValueError("layers_to_transform does not go with target_modules that is a pattern")
    return config


def _positive(name: str, value: Any) -> int:
    if type(value) is not int or not 0 < value < 2**31:
        raise ValueError(f"{name} must be a positive integer, not {value!r:.60}")
    return value


def _bias(value: Any) -> str:
    if value not in ("none", "all", "lora_only"):
        raise ValueError(f"bias must be none, all or lora_only, not {value!r:.60}")
    return value


def _switch(values: dict, name: str) -> bool:
    value = values.get(name)
    if value not in (True, False, None):
        raise ValueError(f"{name} must be true or false, not {value!r:.60}")
    return bool(value)


def _mapping(values: dict, name: str) -> dict[str, Any]:
    value = values.get(name) or {}
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be an object, not {value!r:.60}")
    return value


def _names(values: dict, name: str, pattern: bool = False, single: bool = False) -> Any:
    """A tuple of names, or where that may stand there, one pattern (as a tuple too: `single`)."""
    value = values.get(name) or ()
    if isinstance(value, str) and pattern:
        _check_pattern(value)
        return (value,) if single else value
    if not isinstance(value, (list, tuple)) or not all(type(v) is str and v for v in value):
        raise ValueError(f"{name} must be a list of names, not {value!r:.60}")
    return tuple(value)


def _integers(name: str, value: Any) -> tuple[int, ...]:
    value = value or []
    if not isinstance(value, list) or not all(type(v) is int and v >= 0 for v in value):
        raise ValueError(f"{name} must be a list of integers, not {value!r:.60}")
    return tuple(value)


def _tokens(value: Any) -> tuple[int, ...] | dict[str, tuple[int, ...]]:
    name = "trainable_token_indices"
    rows = value if isinstance(value, dict) else {"": value}
    found = {module: _integers(name, listed) for module, listed in rows.items()}
    for listed in found.values():
        if len(set(listed)) < len(listed):
            raise ValueError(f"{name} names a row twice")
    return found if isinstance(value, dict) else found[""]


def _check_pattern(pattern: str) -> None:
    """Some patterns take for ever on a short name: no repeated groups, and not many repeats."""
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{pattern!r:.80} is no pattern: {error}") from None
    repeats = len(re.findall(r"(?<!\\)[*+]|\{\d*,\d*\}", pattern))
    if len(pattern) > MAX_PATTERN or repeats > MAX_REPEATS or re.search(r"\)[*+{]", pattern):
        raise ValueError(f"the pattern {pattern!r:.80} may take too long to match")
