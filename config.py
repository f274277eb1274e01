"""The shape of a model, as one frozen dataclass, and the places a shape can be read from.

    from config import GPTConfig, load_config
    load_config("7b")                       # a preset: configs/7b.yaml
    load_config("my_model.yaml")            # the same fields in a file of your own
    load_config("checkpoints/checkpoint-1000")   # any directory with a Hugging Face config.json

Fields name features (grouped queries, a gated MLP, a sliding window), never model families, so
that all of these are one `GPTModel`: families/dense.py says which family has which. Nothing here
imports torch: `compute.py` answers in a fraction of a second.
"""

import json
import os
import re
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from cli import note
from families.convert import config_to_hf, fields_from_hf
from families.llama import WORDS, checked_rope_scaling, number, size
from inputs import read_object
from plain_yaml import load_yaml

__all__ = ["CONFIGS_DIR", "GPTConfig", "config_from_hf", "load_config", "load_yaml", "presets"]

VOCAB_MULTIPLE = 64  # matrix products fall off the fast path when a side is odd: GPT-2's 50257
CONFIGS_DIR = Path(__file__).resolve().parent / "configs"

CHOICES = {
    # gelu_new is the tanh approximation, relu2 the square of relu
    "activation": ("gelu", "gelu_new", "silu", "relu", "relu2"),
    "norm": ("layernorm", "rmsnorm"),
    "position": ("learned", "rope"),
    "qk_norm_type": ("layernorm", "rmsnorm"),
    # each head, all with the same weights; each head, with weights of its own; all heads as one
    "qk_norm_over": ("head", "heads", "width"),
    "router_score": ("softmax", "sigmoid"),
    # a group of experts is as good as its best one, or as the sum of its best two
    "expert_group_score": ("max", "top2"),
}
POSITIVE = (
    *("rope_theta", "local_rope_theta", "clip_qkv", "attention_scale", "attention_softcap"),
    *("logit_softcap", "embedding_scale", "residual_scale", "logit_scale", "router_scale"),
)
LATENT = ("q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
EXPERTS_ALONE = r"n_expert|d_ff_|dense_layers|router_|expert_|shared_gate"  # fields of a mixture
LAYER_LISTS = ("full_attention_layers", "no_rope_layers", "dense_layers")


# A field that __post_init__ derives from others where it is None: typed as it is afterwards
_DERIVED: Any = None


@dataclass(frozen=True)
class GPTConfig:
    """A decoder-only transformer. The first eight fields are rosetrainer's, defaults included."""

    vocab_size: int = 32000
    max_position_embeddings: int = 1024
    n_layers: int = 12
    n_heads: int = 12
    d_model: int = 768
    d_ff: int = 3072
    dropout: float = 0.1
    activation: str = "gelu"

    n_kv_heads: int = _DERIVED  # None: n_heads; fewer: grouped queries
    head_dim: int = _DERIVED  # None: d_model / n_heads; of queries and keys
    norm: str = "layernorm"
    norm_eps: float = 1e-5
    norm_weight: bool = True
    norm_bias: bool = _DERIVED  # None: as `bias` in layer norms; an RMSNorm has none
    norm_offset: bool = False  # norms multiply by 1 + weight
    pre_norm: bool = True  # of what attention and the MLP read
    post_norm: bool = False  # of what they add to the residual stream
    parallel_residual: bool = False  # both read the stream as the block found it
    shared_norm: bool = False  # through one norm
    embedding_norm: bool = False
    position: str = "learned"
    rope_theta: float = 10000.0
    rope_scaling: dict | None = field(default=None, hash=False)  # Hugging Face's keys, `rope_type`
    local_rope_theta: float | None = None  # of layers with a window; rope_scaling is not theirs
    rotary_fraction: float = 1.0  # of each head's channels, the first of them
    no_rope_layers: tuple[int, ...] = ()  # that know no positions
    gated_mlp: bool = False  # act(gate) * up instead of act(fc1)
    bias: bool = True  # of linear layers and layer norms, but for
    qkv_bias: bool = _DERIVED  # None: as `bias`
    o_bias: bool = _DERIVED  # None: as `bias`; of attention's output
    mlp_bias: bool = _DERIVED  # None: as `bias`
    head_bias: bool = False
    qk_norm: bool = False  # of queries and keys
    qk_norm_type: str = "rmsnorm"
    qk_norm_over: str = "head"
    qk_norm_after_rope: bool = False
    clip_qkv: float | None = None  # queries, keys and values lie within +- this
    attention_scale: float | None = None  # of query-key products; None: head_dim ** -0.5
    attention_softcap: float | None = None  # scores become cap * tanh(score / cap)
    logit_softcap: float | None = None
    embedding_scale: float = 1.0  # what embeddings are multiplied by
    residual_scale: float = 1.0  # and what each branch adds
    logit_scale: float = 1.0
    tie_embeddings: bool = True
    sliding_window: int | None = None  # a token sees itself and the window - 1 before it
    full_attention_layers: tuple[int, ...] = ()  # layers that the sliding window does not apply to
    kv_lora_rank: int | None = None  # latent attention: keys and values are made of so few numbers
    q_lora_rank: int | None = None  # and queries of so many; None: of the input itself
    qk_nope_head_dim: int | None = None  # channels of a query and a key that know no position,
    qk_rope_head_dim: int | None = None  # and that positions turn: of a key, the same in all heads
    v_head_dim: int | None = None  # of latent attention's values
    n_experts: int = 0  # 0: a dense MLP; else layers are mixtures of experts, without biases
    n_experts_per_token: int = 0
    d_ff_expert: int = _DERIVED  # None: d_ff
    dense_layers: tuple[int, ...] = ()  # of a mixture: layers with a dense MLP of d_ff
    router_score: str = "softmax"  # of its logits: what experts are chosen and weighed by
    router_norm: bool = False  # weights of those chosen sum to 1, as a softmax over them alone
    router_scale: float = 1.0  # what weights are multiplied by then
    router_bias: bool = False  # of its logits
    router_choice_bias: bool = False  # of scores where experts are chosen, not where weighed
    n_expert_groups: int = 1  # of which a token chooses
    n_expert_groups_per_token: int = 1  # and then experts of these alone
    expert_group_score: str = "max"
    d_ff_shared: int = 0  # width of an MLP that all tokens pass beside their experts; 0: none
    shared_gate: bool = False  # which is weighed by the sigmoid of a projection of its own
    router_loss: float = 0.0  # how much of the load-balancing loss training adds

    def __post_init__(self):
        self._check_numbers()
        for name, value in self._implied().items():
            if getattr(self, name) is None:
                self._set(name, value)
        self._check_latent()
        if self.head_dim is None:
            if self.d_model % self.n_heads:
                raise ValueError(
                    f"d_model {self.d_model} does not divide into n_heads {self.n_heads}; "
                    "set head_dim if that is meant"
                )
            self._set("head_dim", self.d_model // self.n_heads)
        self._check_features()

    def _set(self, name, value):
        object.__setattr__(self, name, value)

    def _implied(self) -> dict[str, Any]:
        """What fields are that nobody gives, where other fields decide it."""
        of_norms = self.bias and self.norm == "layernorm" and self.norm_weight
        biases = dict.fromkeys(("qkv_bias", "o_bias"), self.bias)
        biases |= {"mlp_bias": self.bias and not self.n_experts, "norm_bias": of_norms}
        return {"n_kv_heads": self.n_heads, "d_ff_expert": self.d_ff, **biases}

    def _check_numbers(self):
        """Types and ranges of all fields but the named choices."""
        for f in fields(self):
            value = getattr(self, f.name)
            if value is None and f.default is None:
                continue
            if f.type in (bool, bool | None):
                if type(value) is not bool:
                    raise ValueError(f"{f.name} must be true or false, not {value!r}")
            elif f.type in (int, int | None):
                self._set(f.name, size(f.name, value))
            elif f.type in (float, float | None):
                self._set(f.name, float(number(f.name, value)))
        if not (0 <= self.dropout <= 1 and self.norm_eps >= 0 and self.rope_theta > 0):
            raise ValueError(
                f"dropout {self.dropout} must lie in 0..1, norm_eps {self.norm_eps} be 0 or more, "
                f"rope_theta {self.rope_theta:g} be positive"
            )
        for name in POSITIVE:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive, not {value!r}")
        for name in LAYER_LISTS:
            layers = getattr(self, name)
            if not isinstance(layers, (list, tuple)) or any(type(i) is not int for i in layers):
                raise ValueError(f"{name} must be layer numbers, not {layers!r}")
            self._set(name, tuple(sorted({i for i in layers if 0 <= i < self.n_layers})))

    def _check_latent(self):
        """All sizes of latent attention, or none; its heads are as wide as their two parts."""
        given = {name: getattr(self, name) for name in LATENT if getattr(self, name) is not None}
        if self.kv_lora_rank is None:
            if given:
                raise ValueError(f"{next(iter(given))} is of latent attention: set kv_lora_rank")
            return
        for name in LATENT[1:]:
            if name not in given:
                raise ValueError(f"latent attention (kv_lora_rank) lacks {name}")
        width = given["qk_nope_head_dim"] + given["qk_rope_head_dim"]
        if self.head_dim not in (None, width):
            raise ValueError(
                f"head_dim {self.head_dim} is not qk_nope_head_dim + qk_rope_head_dim, {width}"
            )
        self._set("head_dim", width)
        for name, plain in {"n_kv_heads": self.n_heads, "qk_norm": False, "clip_qkv": None}.items():
            if getattr(self, name) != plain:
                raise ValueError(f"latent attention knows no {name} {getattr(self, name)!r}")
        if self.rotary_fraction != 1.0:
            raise ValueError("rotary_fraction is 1 in latent attention: qk_rope_head_dim is turned")

    def _check_features(self):
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, not {getattr(self, name)!r}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}"
            )
        if self.position == "rope" and self.kv_lora_rank is None and self.head_dim % 2:
            raise ValueError(f"rotary positions need an even head_dim, not {self.head_dim}")
        if self.position == "rope" and (self.rotary_dim < 2 or self.rotary_dim % 2):
            raise ValueError(
                f"rotary_fraction {self.rotary_fraction} of head_dim {self.head_dim} must be an "
                f"even number of channels, not {self.head_dim * self.rotary_fraction:g}"
                if self.kv_lora_rank is None
                else f"qk_rope_head_dim must be even, not {self.qk_rope_head_dim}"
            )
        if self.attention_scale == self.head_dim**-0.5:
            self._set("attention_scale", None)
        if self.rope_scaling is not None:
            self._set("rope_scaling", checked_rope_scaling(self.rope_scaling))
            for name in ("short_factor", "long_factor"):
                factors = self.rope_scaling.get(name)
                if factors is not None and len(factors) != self.rotary_dim // 2:
                    raise ValueError(
                        f"rope_scaling[{name!r}] has {len(factors)} numbers for"
                        f" {self.rotary_dim // 2} pairs of channels"
                    )
        self._check_norms()
        self._check_experts()

    def _check_norms(self):
        if self.norm_bias and not (self.norm == "layernorm" and self.norm_weight):
            raise ValueError("norm_bias is of layer norms with weights")
        if self.norm_offset and not self.norm_weight:
            raise ValueError("norm_offset needs norms with weights")
        if self.shared_norm and not (self.parallel_residual and self.pre_norm):
            raise ValueError("shared_norm needs parallel_residual and pre_norm")

    def _check_experts(self):
        n, groups, chosen = self.n_experts, self.n_expert_groups, self.n_expert_groups_per_token
        if self.router_loss < 0:
            raise ValueError(f"router_loss must be 0 or more, not {self.router_loss!r}")
        if not n:
            plain = {f.name: f.default for f in fields(self)} | {"d_ff_expert": self.d_ff}
            own = [name for name in plain if re.match(EXPERTS_ALONE, name)]
            if told := [name for name in own if getattr(self, name) != plain[name]]:
                raise ValueError(f"{told[0]} needs experts: n_experts is 0")
            return
        if not 1 <= self.n_experts_per_token <= n:
            raise ValueError(f"n_experts_per_token {self.n_experts_per_token} must lie in 1..{n}")
        if self.mlp_bias:
            raise ValueError("mlp_bias must be false: experts have no biases")
        if n % groups or not 1 <= chosen <= groups:
            raise ValueError(
                f"{n} experts must divide into n_expert_groups {groups}, of which "
                f"n_expert_groups_per_token {chosen} are chosen"
            )
        if chosen * (n // groups) < self.n_experts_per_token:
            raise ValueError(
                f"{chosen} groups of {n // groups} experts are fewer than n_experts_per_token "
                f"{self.n_experts_per_token}"
            )
        if groups > 1 and self.expert_group_score == "top2" and n // groups < 2:
            raise ValueError(f"expert_group_score top2 needs groups of two, not {n} in {groups}")
        if self.shared_gate and not self.d_ff_shared:
            raise ValueError("shared_gate needs a shared expert: d_ff_shared is 0")

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that rotary positions turn."""
        if self.qk_rope_head_dim is not None:
            return self.qk_rope_head_dim
        return int(self.head_dim * self.rotary_fraction)

    @property
    def value_dim(self) -> int:
        """Channels of a head's values."""
        return self.head_dim if self.v_head_dim is None else self.v_head_dim

    @property
    def qkv_dim(self) -> int:
        """Rows of the fused projection [q; k; v]."""
        return (self.n_heads + 2 * self.n_kv_heads) * self.head_dim

    @property
    def cache_dim(self) -> int:
        """Numbers that a token leaves in a layer's cache, in generation."""
        if self.kv_lora_rank is not None:
            return self.kv_lora_rank + self.rotary_dim
        return 2 * self.n_kv_heads * self.head_dim

    def layer_window(self, layer: int) -> int | None:
        """The sliding window of one layer, None where it sees everything before it."""
        return None if layer in self.full_attention_layers else self.sliding_window

    def layer_experts(self, layer: int) -> int:
        """How many experts a layer has, 0 where its MLP is dense."""
        return 0 if layer in self.dense_layers else self.n_experts

    def layer_rope(self, layer: int) -> str | None:
        """Which rotary frequencies a layer turns by: "global", "local" or None."""
        if self.position != "rope" or layer in self.no_rope_layers:
            return None
        local = self.local_rope_theta is not None and self.layer_window(layer) is not None
        return "local" if local else "global"

    def replace(self, **changes: Any) -> "GPTConfig":
        """A copy with other values. What follows from a field that changes (head_dim from d_model
        and n_heads, n_kv_heads from n_heads, the biases of layers from bias) follows it, unless it
        is given."""
        implied = self._implied()
        parts = {"kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim"}
        for name, follows, sources in (
            ("head_dim", self.head_dim * self.n_heads == self.d_model, {"d_model", "n_heads"}),
            ("head_dim", self.kv_lora_rank is not None, parts),
            ("n_kv_heads", self.n_kv_heads == self.n_heads, {"n_heads"}),
            ("qkv_bias", self.qkv_bias == self.bias, {"bias"}),
            ("o_bias", self.o_bias == self.bias, {"bias"}),
            ("mlp_bias", self.mlp_bias == implied["mlp_bias"], {"bias", "n_experts"}),
            ("d_ff_expert", self.d_ff_expert == self.d_ff, {"d_ff"}),
            ("norm_bias", self.norm_bias == implied["norm_bias"], {"bias", "norm", "norm_weight"}),
        ):
            if follows and sources & changes.keys():
                changes.setdefault(name, None)
        return replace(self, **changes)

    @property
    def recomputed_together(self) -> int:
        """Blocks of a frozen model whose activations are recomputed at a time, where they are: of L
        blocks, what L/n groups keep, and n blocks recomputed, is least for n^2 = L/10, a block
        keeping about ten times what goes into it. Where all is trained, gradients are there in the
        end instead of what groups keep, and one is best."""
        return max(1, round((self.n_layers / 10) ** 0.5))

    def to_dict(self) -> dict:
        """All fields of GPT-2 and of Llama's kin, and of the others those that say something."""
        values = asdict(self) | {name: list(getattr(self, name)) for name in LAYER_LISTS}
        plain = {f.name: f.default for f in fields(self)} | self._implied()
        told = {name for name in values if name in WORDS or getattr(self, name) != plain[name]}
        return {name: value for name, value in values.items() if name in told}

    @classmethod
    def from_dict(cls, values: dict, source: str = "config") -> "GPTConfig":
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known, key=str)
        if unknown:
            raise ValueError(
                f"{source}: unknown field {unknown[0]!r} of a model; fields are {sorted(known)}"
            )
        try:
            return cls(**values)
        except ValueError as error:
            raise type(error)(f"{source}: {error}") from None

    def save_pretrained(self, directory: str | Path, **extra: Any) -> None:
        """Write `config.json`: Hugging Face's fields where an architecture has them, and ours under
        "roseval". `extra` (token ids, dtype) goes to the top level."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        config = (config_to_hf(self) or {}) | extra | {"roseval": self.to_dict()}
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (Path(directory) / "config.json").write_text(text, encoding="utf-8")

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "GPTConfig":
        """Read `config.json` from a directory, or the file itself: ours or Hugging Face's."""
        path = Path(directory)
        path = path / "config.json" if path.is_dir() else path
        return cls.from_json(read_json(path), str(path))

    @classmethod
    def from_json(cls, values: dict, source: str) -> "GPTConfig":
        """From the values of a `config.json`, ours or Hugging Face's. ValueError names `source`;
        UnsupportedArchitecture is one.

        Where a file has both and they differ, Hugging Face's fields win: transformers keeps our
        block as it was when it saves a model again whose fields it changed."""
        block = values.get("roseval")
        if "model_type" not in values and (isinstance(block, dict) or "n_heads" in values):
            return cls.from_dict(block if isinstance(block, dict) else values, source)
        try:
            config = config_from_hf(values)
        except ValueError as error:
            raise type(error)(f"{source}: {error}") from None
        if not isinstance(block, dict):
            return config
        if stale := _differing(config, block):
            note(f'{source}: its fields were changed beside the "roseval" block, and win: {stale}')
            return config
        return cls(**block)  # the same model, down to what Hugging Face has no word for


def _differing(config: GPTConfig, block: dict) -> str:
    """The fields in which a "roseval" block says something else, in words; "" where it does not."""
    try:
        said = config_from_hf(config_to_hf(GPTConfig(**block)) or {})  # as those fields can say it
    except (ValueError, TypeError):
        return "the block cannot be read"
    names = (f.name for f in fields(GPTConfig))  # to_dict leaves out what says nothing
    both = ((name, getattr(config, name), getattr(said, name)) for name in names)
    return ", ".join(
        f"{name} {ours}, not {theirs}" for name, ours, theirs in both if ours != theirs
    )


def config_from_hf(hf: dict) -> GPTConfig:
    """The GPTConfig of a Hugging Face config.json's values, or UnsupportedArchitecture."""
    return GPTConfig(**fields_from_hf(hf))


def presets() -> list[str]:
    """The models among configs/*.yaml; sweep*.yaml say what a sweep runs."""
    names = (path.stem for path in CONFIGS_DIR.glob("*.yaml"))
    return sorted(name for name in names if name.partition("-")[0] != "sweep")


def load_config(spec: str | Path) -> GPTConfig:
    """From a preset name, a YAML file of GPTConfig fields, a `config.json` or its directory."""
    path = Path(spec)
    if path.is_dir() or path.suffix == ".json":
        return GPTConfig.from_pretrained(path)
    if path.suffix not in (".yaml", ".yml"):
        path = CONFIGS_DIR / f"{spec}.yaml"
        if not path.is_file():
            raise ValueError(
                f"no preset, YAML file, config.json or directory named {str(spec)!r}; "
                f"presets are {', '.join(presets())}"
            )
    return GPTConfig.from_dict(load_yaml(path), str(path))


def read_json(path: Path) -> dict:
    """A JSON file's object. Raises ValueError naming the file."""
    if not os.path.lexists(path):
        raise ValueError(f"{path} does not exist; a Hugging Face directory has one")
    return read_object(path)
