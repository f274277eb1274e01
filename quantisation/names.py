"""The rules that weights are rounded by, as names that say all that changes a number. No torch.

    parse("rtn-w4-g128").name       # "rtn-w4-g128-sym-absmax": what a record is known by
    parse("fp8").size(4096, 4096)   # bytes of a matrix: codes, scales and zeros

    bf16 fp16 fp32                                          casts, of every matrix
    rtn-w{2…8}[a8][-GRID][-sym|asym][-SCALE]                round to nearest
    fp8[-e4m3][-GRID][-a8]                                  8-bit floats, scale absmax/448
    gguf-q4_0 gguf-q8_0                                     as those types of GGUF hold them

GRID, which weights share a scale: channel (the row of an output, also called row; the default),
tensor, g128 (so many columns of a row, the last ones fewer), b128 (so many rows and columns).
SCALE, of b bits:
    sym   absmax   absmax / (2^(b-1) - 1), absmax no less than 1e-5: llmc, AutoAWQ. The default
          range    absmax / ((2^b - 1) / 2), one code more: compressed-tensors and, in groups that
                   hold a negative number, GPTQ
    asym  minmax   (max - min) / (2^b - 1), no less than 1e-5, and a whole zero: llmc, AutoAWQ. The
                   default
          range    the same, the range made to hold 0: GPTQ (compressed-tensors rounds the sum of
                   quotient and zero instead, which differs at ties alone)
a8: each token that comes into a matrix is rounded to 8 bits as it runs, sym absmax over its
channels; of fp8 to e4m3, absmax/448, and both sides are multiplied as 8-bit floats where a GPU can;
its weights have a scale for each row, or one.

Keys and values of generation (gpu_kernels/kv_codes.py) are rounded by token and head: int8, scale
absmax/127, or e4m3, absmax/448; a query sees all of them so, its own token's too.

Everything is computed in float32 and scales stay
float32, but GGUF's, which are float16.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import cli

CASTS = {"fp32": 32, "bf16": 16, "fp16": 16}
GGUF = {"gguf-q4_0": 4, "gguf-q8_0": 8}
GGUF_BLOCK = 32
SCALES = {"sym": ("absmax", "range"), "asym": ("minmax", "range")}  # the default first
GRID = r"tensor|channel|row|[gb][1-9]\d*"
SIGNS = r"(?:-(sym|asym))?(?:-(absmax|minmax|range))?"
RTN = re.compile(rf"rtn-w([2-8])(a8)?(?:-({GRID}))?{SIGNS}(-a8)?")
FP8 = re.compile(rf"fp8(?:-e4m3)?(?:-({GRID}))?(-a8)?")
REST_BYTES = 2  # of a number that a rule leaves alone: all else is held in 16 bits, norms in 32
NORM_BYTES = 4
# Of keys and values in generation, by the words of --kv-dtype: their full names
KV_DTYPES = {"fp8": "fp8-e4m3-token-head", "int8": "int8-token-head-sym-absmax"}
KNOWN = "bf16, fp16, fp32, rtn-w8, rtn-w4-g128, rtn-w4-g128-asym, rtn-w8a8, fp8, fp8-a8, "
KNOWN += "fp8-b128, gguf-q4_0, gguf-q8_0, … (quantisation/names.py)"


@dataclass(frozen=True)
class Rule:
    """kind: cast, rtn, fp8 or gguf. grid: tensor, channel, group or block; span: columns of a
    group, rows and columns of a block, else 0. scale: a word of SCALES. activations: their bits."""

    kind: str
    bits: int
    grid: str = "channel"
    span: int = 0
    signs: str = "sym"
    scale: str = "absmax"
    activations: int | None = None
    cast: str = ""

    @property
    def name(self) -> str:
        """The one full spelling; `parse` gives this rule for it."""
        grid = f"{self.grid[0]}{self.span}" if self.span else self.grid
        if self.kind == "cast":
            return self.cast
        if self.kind == "gguf":
            return next(name for name, bits in GGUF.items() if bits == self.bits)
        end = f"-a{self.activations}" if self.activations else ""
        if self.kind == "fp8":
            return f"fp8-e4m3-{grid}{end}"
        return f"rtn-w{self.bits}-{grid}-{self.signs}-{self.scale}{end}"

    def n_scales(self, rows: int, columns: int) -> int:
        """Of a matrix of its own: parts of a fused one have scales of their own."""
        if self.kind == "cast":
            return 0
        wide = -(-columns // self.span) if self.span else 1
        tall = {"tensor": 1, "block": -(-rows // (self.span or 1))}.get(self.grid, rows)
        return wide * tall

    def size(self, rows: int, columns: int) -> int:
        """Bytes of a matrix as the rule stores it: codes, scales, zeros of a byte each."""
        each = (2 if self.kind == "gguf" else 4) + (self.signs == "asym")
        return -(-rows * columns * self.bits // 8) + self.n_scales(rows, columns) * each


def parse(name: str) -> Rule:
    """The rule of a name in any of its spellings; ValueError names the rules."""
    if name in CASTS:
        return Rule("cast", CASTS[name], cast=name)
    if (gguf := name if name in GGUF else f"gguf-{name}") in GGUF:
        return Rule("gguf", GGUF[gguf], "group", GGUF_BLOCK, scale="extreme")
    if found := FP8.fullmatch(name):
        rule = Rule("fp8", 8, *_grid(found[1]), scale="range", activations=8 if found[2] else None)
        if rule.activations and rule.span:
            raise ValueError(f"{name!r}: a8 goes with a scale for each row, or one")
        return rule
    found = RTN.fullmatch(name)
    if not found:
        raise ValueError(f"there is no rule {name!r:.60}; there are {KNOWN}")
    bits, signs = int(found[1]), found[4] or "sym"
    scale = found[5] or SCALES[signs][0]
    if scale not in SCALES[signs]:
        raise ValueError(f"{name!r}: {signs} goes with {' or '.join(SCALES[signs])}, not {scale}")
    activations = 8 if found[2] or found[6] else None
    return Rule("rtn", bits, *_grid(found[3]), signs, scale, activations)


def _grid(text: str | None) -> tuple[str, int]:
    if text is None or text in ("row", "channel", "tensor"):
        return ("tensor" if text == "tensor" else "channel"), 0
    return ("group" if text[0] == "g" else "block"), int(text[1:])


# ---------------------------------------------------------------------------------------------
# What is asked of a model


@dataclass(frozen=True)
class Quantisation:
    """A rule, and what of a model it is for: the blocks' matrices but those whose name a pattern of
    `skip` fits; with `embeddings` the token embedding and the head too. Casts are for all."""

    rule: str
    embeddings: bool = False
    skip: tuple[str, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "rule", parse(self.rule).name)

    @property
    def protocol(self) -> dict[str, Any]:
        return {"rule": self.rule, "embeddings": self.embeddings, "skip": list(self.skip)}

    @property
    def words(self) -> tuple[str, ...]:
        more = ["embeddings too"] if self.embeddings else []
        more += [f"without {', '.join(self.skip)}"] if self.skip else []
        return (self.rule, *more)


@dataclass(frozen=True)
class QuantiseOptions:
    """How weights are rounded once they are loaded: flags of every evaluation of checkpoints, and
    keys of a sweep's entries."""

    quantise: tuple[str, ...] = cli.option(
        (),
        "rules by which weights are rounded, as bf16, rtn-w8, rtn-w4-g128 (quantisation/names.py "
        "has the grammar); several are compared",
        nargs="+",
        metavar="RULE",
    )
    quantise_embeddings: bool = cli.option(False, "the embedding and the head too")
    quantise_skip: tuple[str, ...] = cli.option(
        (), "matrices that stay: 'blocks.0.*', say", nargs="+", metavar="PATTERN"
    )

    def __post_init__(self):
        if not self.quantise and (self.quantise_embeddings or self.quantise_skip):
            raise ValueError("--quantise-embeddings and --quantise-skip go with --quantise RULE")
        names = [each.rule for each in self.wanted if each]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"--quantise: {twice} is asked for twice")

    @property
    def wanted(self) -> list[Quantisation | None]:
        """One for each rule; without any, None alone: the weights as they are."""
        more = self.quantise_embeddings, self.quantise_skip
        return [Quantisation(rule, *more) for rule in self.quantise] or [None]


def rule_of(record: Mapping[str, Any]) -> str | None:
    """The rule that a record's model was rounded by; None for none."""
    found = (record.get("protocol") or {}).get("quantisation")
    return found.get("rule") if isinstance(found, dict) else None
