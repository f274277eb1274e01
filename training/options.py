"""train.py's flags, in four groups that its functions take.

rosetrainer's flags keep their names. --train-config FILE.yaml sets any of them (`num_steps: 1000`,
`train_npy: [a.npy, b.npy]`, `resume: true`), and flags on the command line win.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import cli
import results
from cli import option, positive_int
from config import load_yaml
from formats.shards import RAW
from quantisation.names import Quantisation
from quantisation.names import parse as parse_rule
from training.mixing import read_mix

WAYS = ("concat", "document", "noise", "best-fit", "cluster", "in-context")
KEPT = ("best-fit", "cluster", "in-context")  # their plans lie on disk
# flags that choose a model; the others vary the one that is chosen
SIZES = ("vocab_size", "max_position_embeddings", "n_layers", "n_heads", "d_model", "d_ff")


@dataclass(frozen=True)
class ModelOptions:
    """--config and --init-from give a GPTConfig, whose fields the others override."""

    config: str | None = option(None, "preset, YAML file or directory; the flags below override it")
    vocab_size: int | None = option(None, type=positive_int)
    max_position_embeddings: int | None = option(None, type=positive_int)
    n_layers: int | None = option(None, type=positive_int)
    n_heads: int | None = option(None, type=positive_int)
    d_model: int | None = option(None, type=positive_int)
    d_ff: int | None = option(None, type=positive_int)
    dropout: float | None = option(None, type=float)
    activation: str | None = option(None)
    router_loss: float | None = option(
        None, "of a mixture of experts: how much of its load-balancing loss is added", type=float
    )
    use_activation_checkpoint: bool = option(False, "recompute blocks")
    init_from: str | None = option(
        None, "weights of any checkpoint, fresh optimizer", metavar="PATH"
    )

    @property
    def config_fields(self) -> dict[str, Any]:
        """The fields of GPTConfig that were given."""
        own = ("config", "use_activation_checkpoint", "init_from")
        given = {name: getattr(self, name) for name in cli.option_names(self) if name not in own}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class LoraOptions:
    """Low-rank adapters over --init-from, which stays frozen (training/lora.py)."""

    lora_rank: int | None = option(
        None, "train adapters of this rank over --init-from, which stays frozen", type=positive_int
    )
    lora_alpha: int | None = option(None, "default: twice the rank", type=positive_int)
    lora_dropout: float | None = option(None, "of what adapters see; default: 0", type=float)
    lora_targets: tuple[str, ...] | None = option(
        None,
        "q_proj v_proj …, as transformers calls them; default: all linear layers of the blocks",
        nargs="+",
        metavar="NAME",
    )
    lora_rs: bool = option(False, "alpha over the root of the rank")
    train_embeddings: bool = option(False, "embeddings and head beside adapters, in full")
    quantise: str | None = option(
        None,
        "pack the frozen weights by this rule, as rtn-w4-g128 (quantisation/names.py)",
        metavar="RULE",
    )
    quantise_skip: tuple[str, ...] = option(
        (), "matrices that stay as they are: 'blocks.0.*', say", nargs="+", metavar="PATTERN"
    )

    @property
    def quantisation(self) -> Quantisation | None:
        return Quantisation(self.quantise, False, self.quantise_skip) if self.quantise else None

    def __post_init__(self):
        if self.lora_dropout is not None and not 0 <= self.lora_dropout < 1:
            raise ValueError(f"--lora-dropout must be from 0 to below 1, not {self.lora_dropout}")
        for name in cli.option_names(self):
            if self.lora_rank is None and getattr(self, name) != getattr(LoraOptions, name):
                raise ValueError(f"{cli.flag_of(name)} needs --lora-rank")
        if self.quantise_skip and not self.quantise:
            raise ValueError("--quantise-skip goes with --quantise RULE")
        rule = parse_rule(self.quantise) if self.quantise else None
        if rule and (rule.kind == "cast" or rule.activations):
            raise ValueError(
                f"--quantise {rule.name}: frozen weights are packed by a rule of 8 bits or fewer "
                "that leaves activations alone, as rtn-w8 or rtn-w4-g128"
            )


@dataclass(frozen=True)
class DataOptions:
    data_mode: str = option("text", choices=("text", "fineweb_npy"))
    train_data: tuple[str, ...] | None = option(None, nargs="+", metavar="FILE")
    val_data: tuple[str, ...] | None = option(None, nargs="+", metavar="FILE")
    train_npy: tuple[str, ...] | None = option(None, nargs="+", metavar="FILE")
    val_npy: tuple[str, ...] | None = option(None, nargs="+", metavar="FILE")
    token_dtype: str | None = option(
        None, "of .bin shards without a header; default: told by the ids", choices=tuple(RAW)
    )
    use_toy_data: bool = option(False, "these scripts, a small model")
    tokenizer_name: str | None = option(
        None,
        "byte, a tiktoken name or a directory; default: that of --init-from, else gpt2 for a "
        "vocabulary of GPT-2's size",
    )
    max_tokens: int | None = option(None, "use the first training tokens only", type=positive_int)
    val_max_tokens: int | None = option(None, type=positive_int)
    val_ratio: float = option(0.0, "without validation files: hold out", type=float)
    data_seed: int | None = option(None, "order of the windows; default: --seed", type=int)
    mix: tuple[str, ...] | None = option(
        None,
        "several sources of training data, each a file or glob and its share of the windows",
        nargs="+",
        metavar="FILE:WEIGHT",
    )
    packing: str | None = option(
        None,
        "which documents share a window. concat (the default): the next T tokens. document: the "
        "same, but tokens see their own document alone. noise: the same, documents set apart. "
        "best-fit: documents whole where they fit. cluster, in-context: alike ones side by side",
        choices=WAYS,
    )
    document_mask: bool = option(
        False, "tokens see their own document alone, in concat and best-fit"
    )
    packing_noise: str | None = option(
        None,
        "how --packing noise sets documents apart: mask:N, the first N tokens of one that begins "
        "in a window are no targets; separator:N, N end-of-text tokens more (mask:8)",
        metavar="KIND:N",
    )
    packing_vectors: str | None = option(
        None, "of the documents, for --packing in-context; default: TF-IDF", metavar="FILE.npy"
    )
    packing_index: str | None = option(
        None, "where the plan of packing is kept; default: beside the data", metavar="FILE"
    )

    @property
    def within_documents(self) -> bool:
        return self.document_mask or self.packing == "document"

    @property
    def noise(self) -> tuple[str, int]:
        """(kind, N) of --packing-noise. ValueError for what is none."""
        kind, _, number = (self.packing_noise or "mask:8").partition(":")
        if kind not in ("mask", "separator") or not number.isdecimal() or int(number) < 1:
            raise ValueError(
                f"--packing-noise {self.packing_noise}: give mask:N or separator:N, N at least 1"
            )
        return kind, int(number)

    def __post_init__(self):
        self._check_files()
        self._check_packing()

    def _check_packing(self):
        way = self.packing or "concat"
        if self.document_mask and way not in ("concat", "document", "best-fit"):
            raise ValueError(f"--document-mask would undo what --packing {way} is for")
        if self.packing_noise and way != "noise":
            raise ValueError("--packing-noise needs --packing noise")
        if self.packing_vectors and way != "in-context":
            raise ValueError("--packing-vectors needs --packing in-context")
        if self.packing_index and (way not in KEPT or self.mix):
            raise ValueError(f"--packing-index needs one source and --packing {'|'.join(KEPT)}")
        if self.packing_vectors and self.mix:
            raise ValueError("--packing-vectors is of one source: it does not go with --mix")
        self.noise  # noqa: B018  it checks itself

    def _check_files(self):
        if self.mix:
            for name in ("train_data", "train_npy", "max_tokens", "val_ratio", "use_toy_data"):
                if getattr(self, name):
                    raise ValueError(f"{cli.flag_of(name)} does not go with --mix")
            read_mix(self.mix)
        kind, other = ("data", "npy") if self.data_mode == "text" else ("npy", "data")
        for name in (f"train_{other}", f"val_{other}"):
            if getattr(self, name):
                flag = cli.flag_of(name)
                raise ValueError(f"{flag} does not go with --data-mode {self.data_mode}")
        validation = getattr(self, f"val_{kind}")
        if self.val_ratio and validation:
            raise ValueError(f"--val-ratio does not go with --val-{kind}: give one of them")
        if self.val_max_tokens and not validation:
            raise ValueError(f"--val-max-tokens needs --val-{kind} FILE …")


@dataclass(frozen=True)
class OptimizationOptions:
    batch_size: int = option(8, "windows a rank and pass", type=positive_int)
    grad_accum_steps: int = option(1, type=positive_int)
    seq_len: int = option(1024, type=positive_int)
    num_steps: int = option(1000, type=positive_int)
    eval_steps: int = option(500, "validate and save", type=positive_int)
    lr: float = option(6e-4, type=float)
    min_lr_ratio: float = option(0.1, "where the schedule ends; not of constant", type=float)
    lr_scheduler: str = option("cosine", choices=("cosine", "linear", "constant", "wsd"))
    warmup_steps: int = option(100, type=int)
    decay_steps: int | None = option(
        None, "of wsd: the last steps of a cycle; default: a tenth of it", type=positive_int
    )
    decay_shape: str | None = option(
        None,
        "of wsd's decay; default: sqrt",
        choices=("sqrt", "linear", "cosine", "exponential"),
    )
    rewarm: tuple[int, ...] | None = option(
        None, "begin the schedule anew at these steps", type=positive_int, nargs="+", metavar="STEP"
    )
    weight_decay: float = option(0.1, "of matrices and embeddings only", type=float)
    beta1: float = option(0.9, type=float)
    beta2: float = option(0.95, type=float)
    grad_clip_norm: float = option(1.0, "0: no clipping", type=float)

    def __post_init__(self):
        for name in ("lr", "min_lr_ratio", "warmup_steps", "weight_decay", "grad_clip_norm"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise ValueError(f"{cli.flag_of(name)} must be 0 or more, not {value:g}")
        for name in ("beta1", "beta2"):
            if not 0 <= (value := getattr(self, name)) < 1:
                raise ValueError(
                    f"{cli.flag_of(name)} must be 0 or more, and below 1, not {value:g}"
                )
        for name in ("decay_steps", "decay_shape") if self.lr_scheduler != "wsd" else ():
            if getattr(self, name) is not None:
                raise ValueError(f"{cli.flag_of(name)} goes with --lr-scheduler wsd")
        if self.decay_shape == "exponential" and not self.min_lr_ratio > 0:
            raise ValueError("--decay-shape exponential needs a --min-lr-ratio above 0")


@dataclass(frozen=True)
class RunOptions:
    """Where a run's checkpoints and log go, and how it is launched."""

    checkpoint_path: str = option(help="where checkpoints go", metavar="DIR")
    train_config: str | None = option(None, "YAML of flags, e.g. `num_steps: 1000`", metavar="FILE")
    resume: bool = option(False, "go on from the last checkpoint there")
    save_steps: int | None = option(None, "default: as --eval-steps", type=positive_int)
    keep: int | None = option(None, "keep the last K and the best; default all", type=positive_int)
    log_steps: int = option(10, type=positive_int)
    use_wandb: bool = option(False, "WANDB_MODE=offline without a network")
    wandb_project: str = option("roseval", "of --use-wandb")
    wandb_run_name: str | None = option(None, "default: as the directory of checkpoints")
    tensorboard: str | None = option(None, "also log there", metavar="DIR")
    seed: int = option(42, "of weights, dropout and the order of the data (42)", type=int)
    fsdp: bool = option(
        False, "parameters, gradients and moments over all ranks, rows of each (FSDP2)"
    )
    compile: str = option("auto", "torch.compile; auto: on CUDA", choices=("auto", "on", "off"))


@dataclass(frozen=True)
class Options:
    model: ModelOptions
    lora: LoraOptions
    data: DataOptions
    optimization: OptimizationOptions
    run: RunOptions
    precision: cli.PrecisionOptions
    device: cli.RunOptions

    def flags(self) -> dict[str, Any]:
        """Every flag's value."""
        parts = (getattr(self, f.name) for f in dataclasses.fields(self))
        return {name: value for part in parts for name, value in dataclasses.asdict(part).items()}


# ---------------------------------------------------------------------------------------------
# From the command line and --train-config


def parse(argv: list[str] | None, description: str) -> Options:
    """The options of a command line (None: this process's) and of its --train-config, whose values
    are checked like flags: ValueError, in one line, naming file and field."""
    kinds: tuple[type, ...] = (ModelOptions, LoraOptions, DataOptions)
    kinds += (OptimizationOptions, RunOptions)
    kinds += (cli.PrecisionOptions, cli.RunOptions)
    p = cli.parser(description)
    cli.add_options(p, *kinds)
    file_only = cli.Parser(add_help=False, allow_abbrev=False)
    file_only.add_argument("--train-config")
    file = file_only.parse_known_args(argv)[0].train_config
    values = load_yaml(file) if file else {}
    cli.take_defaults(p, kinds, values, file or "")
    args = p.parse_args(argv)
    options = Options(*(cli.read_options(kind, args) for kind in kinds))
    if options.lora.lora_rank is not None:
        if not options.model.init_from:
            p.error("--lora-rank needs --init-from PATH, the weights that stay frozen")
        if options.run.fsdp:
            p.error("--fsdp shards models that train in full: it does not go with --lora-rank")
    elif options.run.resume and options.model.init_from:
        p.error("--resume and --init-from contradict each other: give one of them")
    if options.data.use_toy_data:
        return with_toy_data(options, args.given | values.keys())
    return options


def with_toy_data(options: Options, chosen: set[str]) -> Options:
    """These scripts as text, and a small model unless one is chosen. ValueError for other data.
    chosen: the options that were given, whatever their values."""
    given = options.data
    for name in ("train_data", "val_data", "train_npy", "val_npy", "tokenizer_name"):
        if getattr(given, name):
            raise ValueError(f"{cli.flag_of(name)} does not go with --use-toy-data")
    data = dataclasses.replace(
        given,
        data_mode="text",
        tokenizer_name="byte",
        train_data=tuple(str(path) for path in results.source_files()),
        val_ratio=given.val_ratio if "val_ratio" in chosen else 0.1,
    )
    model, optimization = options.model, options.optimization
    if not chosen & {"config", "init_from", *SIZES}:
        model = dataclasses.replace(model, config="nano")
        if "seq_len" not in chosen:  # as long as the model's context
            optimization = dataclasses.replace(optimization, seq_len=256)
    return dataclasses.replace(options, model=model, data=data, optimization=optimization)
