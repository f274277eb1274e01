"""DeepSpeed's checkpoints: a directory of a tag, mostly global_step{N}, below one with `latest`.

    latest  global_step300/mp_rank_00_model_states.pt        ZeRO 0, 1, 2: the weights, in `module`
            global_step300/zero_pp_rank_0_mp_rank_00_model_states.pt …
                           bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt …     ZeRO 3
            layer_0_expert_3_mp_rank_00_model_states.pt …     an expert, beside mp_rank_00
            global_step300_universal/zero/{name}/fp32.pt     universal

Under ZeRO 3 each rank holds an equal share of every parameter in one long vector, so a parameter is
as many ranges as there are ranks, read where they lie. There is no config of the model in it: one
lies beside it (transformers' Trainer) or is given.
"""

import math
import os
import re
from pathlib import Path
from typing import Any

from config import GPTConfig
from formats import Opened, archives, dialects, shown, trained
from formats.pickles import Record
from formats.stored import Stored, joined, ranges

FORMAT = "formats/deepspeed.py"
WHOLE = re.compile(r"mp_rank_(\d+)_model_states\.pt")
RANKS = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_(model|optim)_states\.pt")
EXPERT = re.compile(r"(?:layer_\d+_)?expert_\d+_mp_rank_(\d+)_model_states\.pt")
OTHER = re.compile(r"layer_\d+(?!_expert).*model_states\.pt")
# its modules around a router and around experts, which may be anybody's
OF_EXPERTS = {r"\.deepspeed_moe\.gate\.wg\.": ".gate.",
              r"\.deepspeed_moe\.experts\.deepspeed_experts\.": ".experts."}  # fmt: skip


def place(path: Path) -> Path | None:
    """The directory of a tag: itself, or the only one in it, or the one that `latest` names."""
    if not os.path.isdir(path):
        return None
    if _is_tag(path):
        return path
    tags = [folder for folder in _folders(path) if _is_tag(folder)]
    if len(tags) == 1:
        return tags[0]
    return next((tag for tag in tags if tag.name == _latest(path)), None)


def _is_tag(folder: Path) -> bool:
    names = (WHOLE, RANKS, EXPERT, OTHER)
    found = any(name.fullmatch(f.name) for f in folder.glob("*_states.pt") for name in names)
    return found or any(folder.glob("zero/*/fp32.pt"))


def _latest(root: Path) -> str | None:
    for name in ("latest", "latest_universal"):
        if os.path.isfile(root / name):
            with (root / name).open("rb") as f:
                return f.read(1000).decode(errors="replace").strip()
    return None


def recognises(path: Path) -> bool:
    """A tag's directory, or one that holds a single tag: with several it is a run, whose tags are
    checkpoints."""
    tag = place(path)
    return tag is not None and (tag == path or sum(map(_is_tag, _folders(path))) == 1)


def _folders(path: Path) -> list[Path]:
    try:
        return sorted(folder for folder in path.iterdir() if os.path.isdir(folder))
    except OSError:  # one that may not be looked into
        return []


def tries(path: Path) -> bool:
    """A run with several tags, of which `latest` names one."""
    return _latest(path) is not None


def finished(path: Path) -> bool | None:
    """Whether `latest`, which is written last, names this tag or a later one."""
    tag = place(path)
    latest = None if tag is None else _latest(tag.parent)
    if tag is None or latest is None:
        return None
    steps = [re.findall(r"\d+", name) for name in (tag.name, latest)]
    return tag.name == latest or (all(steps) and int(steps[0][-1]) <= int(steps[1][-1]))


def glance(path: Path) -> tuple[str, int | None]:
    """(kind, step); the step is in the tag's name."""
    tag = place(path)
    word = None if tag is None else re.search(r"step[-_]?(\d+)", tag.name)
    return "deepspeed", int(word[1]) if word else None


def open(path: Path, config: GPTConfig | None = None) -> Opened:
    """The structure of the files of a tag."""
    tag = place(path)
    if tag is None:
        raise ValueError(
            f"{path} has no directory of the tag {_latest(path)!r} that it calls latest"
        )
    files = sorted(tag.glob("*model_states.pt"))
    whole, experts, other = (
        [f for f in files if kind.fullmatch(f.name)] for kind in (WHOLE, EXPERT, OTHER)
    )
    parts = [*other, *whole[1:], *(f for f in experts if not whole or _model_rank(f))]
    if parts:
        raise ValueError(
            f"{tag} is of a pipeline, of experts under ZeRO 3 or of model parallelism "
            f"({parts[0].name}), whose parts are not joined here"
        )
    if any(tag.glob("zero/*/fp32.pt")):
        tensors, step = _universal(tag), None
    elif whole:
        said = archives.open_archive(whole[0])
        module = trained.weights(_field(said, "module", whole[0]), whole[0])
        tensors, step = _with_experts(module, experts), _step(said)
    else:
        tensors, step = _zero3(tag)
    step = glance(path)[1] if step is None else step
    return trained.opened(
        path, "deepspeed", FORMAT, dialects.model_part(tensors), config, step=step
    )


def _field(said: Any, name: str, file: Path) -> Any:
    if not isinstance(said, dict) or name not in said:
        raise ValueError(f"{file} has no {name!r}: it is not what DeepSpeed saves")
    return said[name]


def _step(said: dict) -> int | None:
    step = said.get("global_steps")
    return step if type(step) is int else None


def _model_rank(file: Path) -> int:
    name = EXPERT.fullmatch(file.name)
    return int(name[1]) if name else 0


def _with_experts(module: dict[str, Stored], files: list[Path]) -> dict[str, Stored]:
    """Each expert of a layer is a file, whichever rank had it; their names are those of the whole
    model, under which the router is in `module`."""
    tensors = dict(module)
    for file in files:
        own = trained.weights(archives.open_archive(file), file)
        if twice := sorted(own.keys() & tensors.keys()):
            raise ValueError(f"{file} holds {shown(twice)}, and so does another file")
        tensors |= own
    for pattern, instead in OF_EXPERTS.items():
        tensors = {re.sub(pattern, instead, name): t for name, t in tensors.items()}
    return tensors


def _universal(tag: Path) -> dict[str, Stored]:
    tensors = {}
    for file in sorted(tag.glob("zero/*/fp32.pt")):
        said = archives.open_archive(file)
        param = said if isinstance(said, Stored) else _field(said, "param", file)
        tensors |= trained.weights({file.parent.name: param}, file)
    return tensors


# ---------------------------------------------------------------------------------------------
# ZeRO 3


def _by_rank(tag: Path, kind: str) -> list[Path]:
    """The files of ranks 0 … n - 1."""
    found = {}
    for file in tag.glob(f"*_{kind}_states.pt"):
        if name := RANKS.fullmatch(file.name):
            if int(name[2]):
                raise ValueError(
                    f"{tag} is of model parallelism ({file.name}), which is not joined"
                )
            if int(name[1]) in found:
                raise ValueError(f"{tag} has two files of rank {name[1]}: {file.name} is one")
            found[int(name[1])] = file
    missing = next((rank for rank in range(max(found, default=0) + 1) if rank not in found), None)
    if missing is not None:
        raise ValueError(f"{tag} lacks the {kind} states of rank {missing}")
    return [found[rank] for rank in sorted(found)]


def _zero3(tag: Path) -> tuple[dict[str, Stored], int | None]:
    models, optimizers = _by_rank(tag, "model"), _by_rank(tag, "optim")
    if len(models) != len(optimizers):
        raise ValueError(
            f"{tag} has the model states of {len(models)} ranks, the optimizer's of "
            f"{len(optimizers)}: they are not of one save"
        )
    states = [archives.open_archive(file) for file in models]
    for file, state in zip(models, states):
        for name in ("module", "param_shapes"):
            _field(state, name, file)
        if _step(state) != _step(states[0]):
            raise ValueError(
                f"{file} is of step {_step(state)}, {models[0].name} of {_step(states[0])}"
            )
    groups = [_flat_groups(file, len(optimizers)) for file in optimizers]
    tensors = _trainable(states[0]["param_shapes"], groups, models[0])
    fragments = [state.get("frozen_param_fragments") or {} for state in states]
    for name, shape in (states[0].get("frozen_param_shapes") or {}).items():
        try:
            own = [trained.weights(part, file)[name] for part, file in zip(fragments, models)]
        except KeyError:
            raise ValueError(f"{tag}: not every rank holds its part of {name}") from None
        tensors[name] = _of_shares(name, _numbers(shape, models[0]), [[part] for part in own], 0)
    module, buffers = states[0]["module"] or {}, states[0].get("buffer_names") or ()
    tensors |= {name: module[name] for name in buffers if isinstance(module.get(name), Stored)}
    for alias, name in (states[0].get("shared_params") or {}).items():
        if name in tensors:
            tensors[alias] = tensors[name]
    return tensors, _step(states[0])


def _flat_groups(file: Path, ranks: int) -> list[Stored]:
    """A rank's vectors, whose concatenation holds its share of every parameter."""
    said = _field(archives.open_archive(file), "optimizer_state_dict", file)
    stage, count = _field(said, "zero_stage", file), _field(said, "partition_count", file)
    stage = stage.args[0] if isinstance(stage, Record) and stage.args else stage
    count = max(count) if isinstance(count, list) and count else count
    if stage != 3 or count != ranks:
        raise ValueError(
            f"{file} is of ZeRO {stage} with {count} ranks, there are files of {ranks}: not all "
            "are there, or they are not of one save"
        )
    groups = _field(said, "fp32_flat_groups", file)
    if not isinstance(groups, list) or not all(isinstance(g, Stored) for g in groups):
        raise ValueError(f"{file}: its fp32_flat_groups are no tensors")
    if any(len(group.shape) != 1 for group in groups):
        raise ValueError(f"{file}: its fp32_flat_groups are not flat")
    return groups


def _numbers(shape: Any, file: Path) -> tuple[int, ...]:
    if type(shape) is not tuple or any(type(n) is not int or n < 0 for n in shape):
        raise ValueError(f"{file}: a parameter's shape is {shape!r}")
    return shape


def _trainable(shapes: Any, groups: list[list[Stored]], file: Path) -> dict[str, Stored]:
    """Every parameter has ceil(numel / ranks) elements of each rank, one after the other."""
    held = {sum(group.shape[0] for group in of_rank) for of_rank in groups}
    if len(held) != 1:
        raise ValueError(f"{file.parent}: ranks hold {sorted(held)} elements, not equally many")
    if not isinstance(shapes, list) or not all(isinstance(part, dict) for part in shapes):
        raise ValueError(f"{file}: its param_shapes are no list of names and shapes")
    tensors, at, (limit,) = {}, 0, held
    for name, shape in ((n, s) for part in shapes for n, s in part.items()):
        share = -(-math.prod(_numbers(shape, file)) // len(groups))
        if at + share > limit:
            raise ValueError(
                f"{file.parent}: its parameters need {at + share:,} elements of each rank by "
                f"{name}, which hold {limit:,}"
            )
        tensors[name] = _of_shares(name, shape, groups, at)
        at += share
    return tensors


def _of_shares(name: str, shape: tuple[int, ...], groups: list[list[Stored]], at: int) -> Stored:
    """A tensor whose elements lie, in equal shares, from `at` on in the vectors of each rank."""
    numel = math.prod(shape)
    share, pieces = -(-numel // len(groups)), []
    for rank, of_rank in enumerate(groups):
        begin = 0
        for group in of_rank:
            n = group.shape[0]
            a, b = max(at, begin), min(at + share, begin + n)  # in the rank's concatenation
            first = rank * share + a - at
            last = min(rank * share + b - at, numel)
            if first < last:
                pieces += ranges(group, a - begin, shape, first, last)
            begin += n
    return joined(name, groups[0][0].dtype, shape, pieces)
