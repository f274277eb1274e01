"""The shape of a model, as one frozen dataclass, and the places a shape can be read from.

    from config import GPTConfig, load_config
    load_config("7b")                       # a preset: configs/7b.yaml
    load_config("my_model.yaml")            # the same fields in a file of your own
    load_config("checkpoints/checkpoint-1000")   # any directory with a Hugging Face config.json

Fields name features (grouped queries, a gated MLP, a sliding window), never model families, so
that GPT-2 and Llama-style models are one `GPTModel`. Nothing here imports torch: `compute.py`
answers in a fraction of a second.
"""

import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

VOCAB_MULTIPLE = 64  # matrix products fall off the fast path when a side is odd: GPT-2's 50257
CONFIGS_DIR = Path(__file__).resolve().parent / "configs"

CHOICES = {
    "activation": ("gelu", "gelu_new", "silu", "relu"),  # gelu_new is the tanh approximation
    "norm": ("layernorm", "rmsnorm"),
    "position": ("learned", "rope"),
}
HF_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
}
ROPE_SCALING_TYPES = ("linear", "llama3", "yarn")


class UnsupportedArchitecture(ValueError):
    """A Hugging Face config that GPTModel cannot express; transformers itself may still run it."""


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

    n_kv_heads: int | None = None  # None: n_heads; fewer: grouped queries
    head_dim: int | None = None  # None: d_model / n_heads
    norm: str = "layernorm"
    norm_eps: float = 1e-5
    position: str = "learned"
    rope_theta: float = 10000.0
    rope_scaling: dict | None = field(default=None, hash=False)  # Hugging Face's keys, `rope_type`
    gated_mlp: bool = False  # act(gate) * up instead of act(fc1)
    bias: bool = True  # of linear layers and layer norms
    qkv_bias: bool | None = None  # None: as `bias`
    qk_norm: bool = False  # RMSNorm over each query and key head
    tie_embeddings: bool = True
    sliding_window: int | None = None  # a token sees itself and the window - 1 before it
    full_attention_layers: tuple[int, ...] = ()  # layers that the sliding window does not apply to
    n_experts: int = 0  # 0: a dense MLP
    n_experts_per_token: int = 0

    def __post_init__(self):
        if self.n_kv_heads is None:
            object.__setattr__(self, "n_kv_heads", self.n_heads)
        if self.qkv_bias is None:
            object.__setattr__(self, "qkv_bias", self.bias)
        self._check_sizes()
        if self.head_dim is None:
            if self.d_model % self.n_heads:
                raise ValueError(
                    f"d_model {self.d_model} does not divide into n_heads {self.n_heads}; "
                    "set head_dim if that is meant"
                )
            object.__setattr__(self, "head_dim", self.d_model // self.n_heads)
        object.__setattr__(self, "full_attention_layers", tuple(self.full_attention_layers))
        self._check_features()

    def _check_sizes(self):
        names = "vocab_size max_position_embeddings n_layers n_heads d_model d_ff n_kv_heads"
        optional = [n for n in ("head_dim", "sliding_window") if getattr(self, n) is not None]
        for name in names.split() + optional:
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a positive integer, not {value!r}")

    def _check_features(self):
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, not {getattr(self, name)!r}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}"
            )
        if self.position == "rope" and self.head_dim % 2:
            raise ValueError(f"rotary positions need an even head_dim, not {self.head_dim}")
        if self.rope_scaling and self.rope_scaling.get("rope_type") not in ROPE_SCALING_TYPES:
            raise UnsupportedArchitecture(
                f"rope_scaling['rope_type'] must be one of {ROPE_SCALING_TYPES}, "
                f"not {self.rope_scaling.get('rope_type')!r}"
            )
        if self.n_experts and not 1 <= self.n_experts_per_token <= self.n_experts:
            raise ValueError(
                f"n_experts_per_token {self.n_experts_per_token} must lie in 1..{self.n_experts}"
            )

    @property
    def qkv_dim(self) -> int:
        """Rows of the fused projection [q; k; v]."""
        return (self.n_heads + 2 * self.n_kv_heads) * self.head_dim

    def layer_window(self, layer: int) -> int | None:
        """The sliding window of one layer, None where it sees everything before it."""
        return None if layer in self.full_attention_layers else self.sliding_window

    def replace(self, **changes) -> "GPTConfig":
        return replace(self, **changes)

    def to_dict(self) -> dict:
        return asdict(self) | {"full_attention_layers": list(self.full_attention_layers)}

    @classmethod
    def from_dict(cls, values: dict, source: str = "config") -> "GPTConfig":
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"{source}: unknown field {unknown[0]!r}; fields are {sorted(known)}")
        try:
            return cls(**values)
        except ValueError as error:
            raise type(error)(f"{source}: {error}") from None

    def save_pretrained(self, directory, **extra) -> None:
        """Write `config.json`: Hugging Face's fields where an architecture has them, and ours under
        "roseval". `extra` (token ids, dtype) goes to the top level."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        config = (config_to_hf(self) or {}) | extra | {"roseval": self.to_dict()}
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (Path(directory) / "config.json").write_text(text)

    @classmethod
    def from_pretrained(cls, directory) -> "GPTConfig":
        """Read `config.json` from a directory, or the file itself: ours or Hugging Face's."""
        path = Path(directory)
        path = path / "config.json" if path.is_dir() else path
        try:
            values = json.loads(path.read_text())
        except FileNotFoundError:
            raise ValueError(f"{path} does not exist; a Hugging Face directory has one") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"{path} holds {type(values).__name__}, not a JSON object")
        if isinstance(values.get("roseval"), dict):
            return cls.from_dict(values["roseval"], str(path))
        if "model_type" not in values and "n_heads" in values:  # our fields alone
            return cls.from_dict(values, str(path))
        try:
            return config_from_hf(values)
        except KeyError as error:
            raise ValueError(f"{path}: field {error} is missing") from None
        except ValueError as error:
            raise type(error)(f"{path}: {error}") from None


def presets() -> list[str]:
    """The models among configs/*.yaml; sweep.yaml says what a sweep runs."""
    return sorted(path.stem for path in CONFIGS_DIR.glob("*.yaml") if path.stem != "sweep")


def load_config(spec) -> GPTConfig:
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


def load_yaml(path) -> dict:
    """A YAML file's mapping. Raises ValueError naming the file, and the line where known."""
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold `field: value` lines, not {type(values).__name__}")
    return values


# ---------------------------------------------------------------------------------------------
# Hugging Face's config.json, both ways


def config_from_hf(hf: dict) -> GPTConfig:
    """The GPTConfig of a Hugging Face config, or UnsupportedArchitecture.

    Covers gpt2, llama, mistral, qwen2, qwen3 and mixtral. A field that would change the function
    computed and that GPTConfig has no word for is refused, never ignored.
    """
    model_type = hf.get("model_type")
    if model_type == "gpt2":
        return _gpt2_from_hf(hf)
    if model_type in ("llama", "mistral", "qwen2", "qwen3", "mixtral"):
        return _llama_from_hf(hf, model_type)
    raise UnsupportedArchitecture(f"model_type {model_type!r} has no native form")


def _activation(name: str) -> str:
    if name not in HF_ACTIVATIONS:
        raise UnsupportedArchitecture(f"activation {name!r} has no native form")
    return HF_ACTIVATIONS[name]


def _gpt2_from_hf(hf: dict) -> GPTConfig:
    if not hf.get("scale_attn_weights", True) or hf.get("scale_attn_by_inverse_layer_idx", False):
        raise UnsupportedArchitecture("GPT-2's attention scaling variants have no native form")
    return GPTConfig(
        vocab_size=hf["vocab_size"],
        max_position_embeddings=hf["n_positions"],
        n_layers=hf["n_layer"],
        n_heads=hf["n_head"],
        d_model=hf["n_embd"],
        d_ff=hf.get("n_inner") or 4 * hf["n_embd"],
        dropout=hf.get("resid_pdrop", 0.1),
        activation=_activation(hf.get("activation_function", "gelu_new")),
        norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        tie_embeddings=hf.get("tie_word_embeddings", True),
    )


def _llama_from_hf(hf: dict, model_type: str) -> GPTConfig:
    theta, scaling = _rope_from_hf(hf)
    attention_bias, mlp_bias = hf.get("attention_bias", False), hf.get("mlp_bias", False)
    if attention_bias != mlp_bias:
        raise UnsupportedArchitecture("biases on some of the linear layers only")
    window, full_layers = _window_from_hf(hf, model_type)
    moe = model_type == "mixtral"
    return GPTConfig(
        vocab_size=hf["vocab_size"],
        max_position_embeddings=hf["max_position_embeddings"],
        n_layers=hf["num_hidden_layers"],
        n_heads=hf["num_attention_heads"],
        d_model=hf["hidden_size"],
        d_ff=hf["intermediate_size"],
        dropout=hf.get("attention_dropout", 0.0),
        activation=_activation(hf.get("hidden_act", "silu")),
        n_kv_heads=hf.get("num_key_value_heads") or hf["num_attention_heads"],
        # Qwen3's head_dim is 128 whatever the width; the others derive theirs
        head_dim=hf.get("head_dim") or (128 if model_type == "qwen3" else None),
        norm="rmsnorm",
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        position="rope",
        rope_theta=theta,
        rope_scaling=scaling,
        gated_mlp=True,
        bias=attention_bias,
        qkv_bias=True if model_type == "qwen2" else attention_bias,
        qk_norm=model_type == "qwen3",
        tie_embeddings=hf.get("tie_word_embeddings", False),
        sliding_window=window,
        full_attention_layers=full_layers,
        n_experts=hf["num_local_experts"] if moe else 0,
        n_experts_per_token=hf["num_experts_per_tok"] if moe else 0,
    )


def _rope_from_hf(hf: dict) -> tuple[float, dict | None]:
    """transformers 5 keeps `rope_parameters`; older files have `rope_theta` and `rope_scaling`."""
    rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    theta = float(rope.pop("rope_theta", None) or hf.get("rope_theta") or 10000.0)
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    rope.pop("type", None)
    if hf.get("partial_rotary_factor", rope.pop("partial_rotary_factor", 1.0)) != 1.0:
        raise UnsupportedArchitecture("partial rotary embeddings have no native form")
    if kind == "default":
        return theta, None
    return theta, {"rope_type": kind} | rope


def _window_from_hf(hf: dict, model_type: str) -> tuple[int | None, tuple[int, ...]]:
    window = hf.get("sliding_window")
    if model_type.startswith("qwen") and not hf.get("use_sliding_window", False):
        return None, ()
    if model_type == "llama" or window is None:
        return None, ()
    layers = range(hf["num_hidden_layers"])
    if hf.get("layer_types"):
        return window, tuple(i for i in layers if hf["layer_types"][i] == "full_attention")
    if model_type.startswith("qwen"):  # the first max_window_layers layers attend in full
        return window, tuple(i for i in layers if i < hf.get("max_window_layers", 28))
    return window, ()


def config_to_hf(c: GPTConfig) -> dict | None:
    """The Hugging Face config that computes the same function, None where no architecture does."""
    if c.norm == "layernorm" and c.position == "learned":
        return _gpt2_to_hf(c)
    if c.norm == "rmsnorm" and c.position == "rope" and c.gated_mlp:
        return _llama_to_hf(c)
    return None


def _gpt2_to_hf(c: GPTConfig) -> dict | None:
    plain = c.bias and c.qkv_bias and not (c.gated_mlp or c.qk_norm or c.n_experts)
    square = c.n_kv_heads == c.n_heads and c.head_dim * c.n_heads == c.d_model
    if not (plain and square and c.sliding_window is None):
        return None
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": c.vocab_size,
        "n_positions": c.max_position_embeddings,
        "n_layer": c.n_layers,
        "n_head": c.n_heads,
        "n_embd": c.d_model,
        "n_inner": c.d_ff,
        "activation_function": c.activation,
        "layer_norm_epsilon": c.norm_eps,
        "resid_pdrop": c.dropout,
        "embd_pdrop": c.dropout,
        "attn_pdrop": c.dropout,
        "tie_word_embeddings": c.tie_embeddings,
    }


def _llama_to_hf(c: GPTConfig) -> dict | None:
    family = _llama_family(c)
    if family is None:
        return None
    hf = {
        "architectures": [f"{family.capitalize()}ForCausalLM"],
        "model_type": family,
        "vocab_size": c.vocab_size,
        "max_position_embeddings": c.max_position_embeddings,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.n_kv_heads,
        "head_dim": c.head_dim,
        "hidden_size": c.d_model,
        "intermediate_size": c.d_ff,
        "hidden_act": {"gelu_new": "gelu_pytorch_tanh"}.get(c.activation, c.activation),
        "rms_norm_eps": c.norm_eps,
        "attention_dropout": c.dropout,
        "tie_word_embeddings": c.tie_embeddings,
        "rope_theta": c.rope_theta,
        "rope_scaling": c.rope_scaling,
    }
    if family == "llama":
        hf |= {"attention_bias": c.bias, "mlp_bias": c.bias}
    if family in ("mistral", "mixtral"):
        hf |= {"sliding_window": c.sliding_window}
    if family in ("qwen2", "qwen3"):
        full = set(c.full_attention_layers)
        hf |= {
            "attention_bias": False,
            "use_sliding_window": c.sliding_window is not None,
            "sliding_window": c.sliding_window,
            "layer_types": [
                "full_attention" if i in full or c.sliding_window is None else "sliding_attention"
                for i in range(c.n_layers)
            ],
        }
    if family == "mixtral":
        hf |= {
            "num_local_experts": c.n_experts,
            "num_experts_per_tok": c.n_experts_per_token,
        }
    return hf


def _llama_family(c: GPTConfig) -> str | None:
    """Which of transformers' Llama-style classes has exactly these features."""
    windowed = c.sliding_window is not None
    if c.n_experts:
        ok = not (c.bias or c.qkv_bias or c.qk_norm or c.full_attention_layers)
        return "mixtral" if ok else None
    if c.qk_norm:
        return None if c.bias or c.qkv_bias else "qwen3"
    if c.qkv_bias and not c.bias:
        return "qwen2" if c.head_dim * c.n_heads == c.d_model else None
    if c.qkv_bias != c.bias:
        return None
    if windowed:
        if c.bias or c.full_attention_layers:
            return None
        return "mistral"
    return "llama"
