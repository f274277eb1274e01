"""Megatron's checkpoints: a directory of an iteration, below one with a tracker file.

    latest_checkpointed_iteration.txt
    iter_0001000/mp_rank_00_000/model_optim_rng.pt  mp_rank_01_000/…   one file a rank
    iter_0001000/metadata.json  .metadata  __0_0.distcp …  common.pt    Megatron-Core's torch_dist
    NAME/weights/metadata.json …  context/model.yaml                    the same, of NeMo 2

The files of ranks are joined here: rows or columns by tensor rank, layers by pipeline stage (and by
virtual stage, which come first), experts by their ranks, whose number comes last. torch_dist has
whole tensors, in the container of dcp.py, with all layers stacked in one. Which model it is, is
said by the command line that was pickled beside the weights, which is read as data
(formats/megatron_args.py); what of it has no native form is refused.
"""

import os
import re
from pathlib import Path
from typing import Any

from config import GPTConfig, read_json
from formats import Opened, archives, dcp, dialects, megatron_args, shown, stored, trained
from formats.stored import Stored

FORMAT = "formats/megatron.py"
TRACKER = "latest_checkpointed_iteration.txt"
RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?")
WEIGHTS = "model_optim_rng.pt"
OTHER_PARTS = re.compile(r"(^|\.)mtp\.|_extra_state(\.|$|/)")  # heads for later tokens, FP8's state
EXPERT = re.compile(r"(decoder\.layers\.\d+\.mlp\.experts\.local_experts\.)(\d+)(\..+)")
MLP = r"mlp\.(?:experts\.local_experts\.\d+\.|shared_experts\.)?"
# by which dimension tensor ranks share a weight; biases with it where it is the first
SHARED = (
    (0, re.compile(r"embedding\.word_embeddings\.weight|output_layer\.(weight|bias)")),
    (0, re.compile(rf"decoder\.layers\.\d+\.(self_attention\.linear_qkv|{MLP}linear_fc1)\.\w+")),
    (
        1,
        re.compile(rf"decoder\.layers\.\d+\.(self_attention\.linear_proj|{MLP}linear_fc2)\.weight"),
    ),
)


def place(path: Path) -> Path | None:
    """The directory of an iteration: itself, or the only one in it, or the one of the tracker."""
    if not os.path.isdir(path):
        return None
    if _is_iteration(path):
        return path
    found = _iterations(path)
    return (
        found[0] if len(found) == 1 else next((f for f in found if f.name == _latest(path)), None)
    )


def _is_iteration(folder: Path) -> bool:
    return any(_ranks_in(folder)) or _distributed(folder) is not None


def _ranks_in(folder: Path) -> list[Path]:
    files = folder.glob(f"mp_rank_*/{WEIGHTS}")
    return sorted(file for file in files if RANK.fullmatch(file.parent.name))


def _distributed(folder: Path) -> Path | None:
    """Where the files of torch_dist lie, whole or not: metadata.json comes last."""
    for where in (folder, folder / "weights"):
        if os.path.isfile(where / "metadata.json") and _backend(where):
            return where
        if os.path.isfile(where / "common.pt") and any(where.glob("__*.distcp")):
            return where
    return None


def _backend(folder: Path) -> str | None:
    """The word of metadata.json for the container; None where it is not Megatron's."""
    try:
        said = read_json(folder / "metadata.json").get("sharded_backend")
    except ValueError:
        return "unknown" if any(folder.glob("__*.distcp")) else None
    return said if type(said) is str else None


def _iterations(path: Path) -> list[Path]:
    try:
        folders = sorted(path.iterdir())
    except OSError:  # one that may not be looked into
        return []
    named = (f for f in folders if re.fullmatch(r"iter_\d+|release", f.name) and os.path.isdir(f))
    return [folder for folder in named if _is_iteration(folder)]


def _latest(root: Path) -> str | None:
    """The directory that the tracker speaks of."""
    if not os.path.isfile(root / TRACKER):
        return None
    with (root / TRACKER).open("rb") as f:
        word = f.read(100).decode(errors="replace").strip()
    return f"iter_{int(word):07d}" if re.fullmatch(r"[0-9]{1,18}", word) else word


def recognises(path: Path) -> bool:
    """An iteration. What holds iterations is a run, of which they are the checkpoints."""
    return os.path.isdir(path) and _is_iteration(path)


def tries(path: Path) -> bool:
    """A run, whose only iteration it is, or the one that the tracker names."""
    return os.path.isdir(path) and (_latest(path) is not None or len(_iterations(path)) == 1)


def finished(path: Path) -> bool | None:
    """Whether the tracker, which is written last, names this iteration or a later one; without
    one, whether metadata.json is there, which ends a save of torch_dist."""
    folder = place(path)
    if folder is None:
        return None
    latest, where = _latest(folder.parent), _distributed(folder)
    if latest is None:
        return None if where is None else os.path.isfile(where / "metadata.json")
    steps = [re.fullmatch(r"iter_(\d+)", name) for name in (folder.name, latest)]
    if folder.name == latest or not steps[0]:
        return folder.name == latest
    return steps[1] is not None and int(steps[0][1]) <= int(steps[1][1])


def glance(path: Path) -> tuple[str, int | None]:
    """(kind, step); the step is in the directory's name."""
    folder = place(path)
    named = None if folder is None else re.fullmatch(r"iter_(\d{1,18})", folder.name)
    return "megatron", int(named[1]) if named else None


def open(path: Path, config: GPTConfig | None = None) -> Opened:
    """The structure of an iteration's files, joined, and what its settings say of the model."""
    folder = place(path)
    if folder is None:
        raise ValueError(
            f"{path}, a directory of Megatron's, has no directory {_latest(path)!r:.100}, which "
            f"{TRACKER} names"
        )
    where = _distributed(folder)
    if where is None:
        tensors, said, files = _of_ranks(folder)
    else:
        tensors, said, files = _of_torch_dist(where)
    args, problem = _settings(said.get("args")), ""
    if config is None or args is None:
        try:
            beside, file = megatron_args.settings_beside(folder)
            args, files = args or beside, [*files, *([file] if file else [])]
            if config is None and args is not None:
                sizes = dialects.facts(tensors, "megatron")
                config = megatron_args.config_of(args, sizes, str(folder))
        except ValueError as error:
            problem = str(error) if config is None else ""
    tensors = _without_padding(tensors, config, args or {})
    if (args or {}).get("rotary_interleaved"):  # the dialect's name of such rows
        tensors = {name.replace("linear_qkv", "linear_qkv_pairs"): t for name, t in tensors.items()}
    step = said.get("iteration", glance(path)[1])
    return trained.opened(path, "megatron", FORMAT, tensors, config, files, problem, step=step)


def _settings(namespace: Any) -> dict | None:
    """The attributes of a Namespace that stayed a record."""
    values = namespace if isinstance(namespace, dict) else getattr(namespace, "state", None)
    return {str(k): v for k, v in values.items()} if isinstance(values, dict) and values else None


def _without_padding(
    tensors: dict[str, Stored], config: GPTConfig | None, args: dict
) -> dict[str, Stored]:
    """Rows of the vocabulary that only make it divisible are cut, where it is known that they are
    that; others stay, as they were trained."""
    names = ("embedding.word_embeddings.weight", "output_layer.weight")
    cut = {}
    for name in names:
        table = tensors.get(name)
        if config is None or table is None or table.shape[:1] <= (config.vocab_size,):
            continue
        if megatron_args.padded(args, config.vocab_size) == table.shape[0]:
            cut[name] = stored.rows(table, [range(config.vocab_size)])
    return tensors | cut


# ---------------------------------------------------------------------------------------------
# One file a rank


def _of_ranks(folder: Path) -> tuple[dict[str, Stored], dict[str, Any], list[Path]]:
    """(whole tensors, what the first rank's file says beside them, files)."""
    files = _by_rank(folder)
    T, P, E = (1 + max(rank[i] for rank in files) for i in (0, 1, 2))
    for rank in ((t, p, e) for p in range(P) for t in range(T) for e in range(E)):
        if rank not in files:
            last = f", rank {rank[2]} of experts" if E > 1 else ""
            said_of = f"tensor rank {rank[0]}, stage {rank[1]}{last}"
            raise ValueError(f"{folder} lacks the file of {said_of}")
    contents = {rank: archives.open_archive(file) for rank, file in files.items()}
    first = contents[0, 0, 0]
    for rank, said in contents.items():
        _check_rank(files[rank], said, first, (T, P, E))
    layers, tensors = 0, {}
    for chunk, p in _chunks(contents, P, files):
        whole: dict[str, Stored] = {}
        for e in range(E):
            parts = [_weights(contents[t, p, e][chunk], files[t, p, e]) for t in range(T)]
            if any(part.keys() != parts[0].keys() for part in parts):
                odd = next(t for t in range(T) if parts[t].keys() != parts[0].keys())
                raise ValueError(f"{files[odd, p, e]} holds other weights than {files[0, p, e]}")
            _add_experts(whole, _joined(parts), e)
        numbers = {
            int(m[1]) for name in whole if (m := re.match(r"decoder\.layers\.(\d+)\.", name))
        }
        if numbers != set(range(len(numbers))):
            raise ValueError(f"{files[0, p, 0]} holds layers {sorted(numbers)}, not all from 0 on")
        for name, t in whole.items():
            local = re.fullmatch(r"(decoder\.layers\.)(\d+)(\..+)", name)
            name = f"{local[1]}{layers + int(local[2])}{local[3]}" if local else name
            tensors.setdefault(name, t)  # a tied head is the embedding's copy on the last stage
        layers += len(numbers)
    return tensors, first, list(files.values())


def _by_rank(folder: Path) -> dict[tuple[int, int, int], Path]:
    """{(tensor rank, stage, rank of experts): file}. With one stage alone, the number behind the
    tensor rank is that of the experts, where the settings say so."""
    found, files = {}, _ranks_in(folder)
    said = archives.open_archive(files[0])
    args = _settings(said.get("args") if isinstance(said, dict) else None) or {}
    of_experts = args.get("expert_model_parallel_size", 1) != 1
    one_stage = of_experts and args.get("pipeline_model_parallel_size") == 1
    for file in files:
        name = RANK.fullmatch(file.parent.name)
        assert name, "_ranks_in looks for such names"
        second, third = int(name[2] or 0), int(name[3] or 0)
        stage, expert = (0, second) if one_stage and not name[3] else (second, third)
        found[int(name[1]), stage, expert] = file
    return found


def _add_experts(whole: dict[str, Stored], part: dict[str, Stored], rank: int) -> None:
    """What ranks of experts hold: the same, but for experts, which each counts from 0 on."""
    held = {int(m[2]) for name in part if (m := EXPERT.fullmatch(name))}
    for name, t in part.items():
        if (local := EXPERT.fullmatch(name)) and rank:
            name = f"{local[1]}{rank * len(held) + int(local[2])}{local[3]}"
        whole.setdefault(name, t)


def _check_rank(file: Path, said: Any, first: dict, ranks: tuple[int, ...]) -> None:
    """That a rank's file is of the same save as the first one's, and of as many ranks."""
    if not isinstance(said, dict) or not any(str(key).startswith("model") for key in said):
        raise ValueError(f"{file} has no 'model': it is not what Megatron saves")
    if said.get("iteration") != first.get("iteration"):
        raise ValueError(
            f"{file} is of iteration {said.get('iteration')!r:.50}, the first rank's of "
            f"{first.get('iteration')!r:.50}: they are not of one save"
        )
    version = said.get("checkpoint_version", 0)
    if not isinstance(version, (int, float)) or version < 2:
        raise ValueError(
            f"{file} is of checkpoint_version {version!r:.50}, whose rows of queries, keys and "
            "values lie in another order: load and save it with a newer Megatron"
        )
    args = _settings(said.get("args")) or {}
    for kind, there in zip(("tensor", "pipeline", "expert"), ranks):
        name = f"{kind}_model_parallel_size"
        if args.get(name, there) != there:
            raise ValueError(
                f"{file} is of {name} {args[name]!r:.50}, there are files of {there}: not all are "
                "there, or they are not of one save"
            )
    of_experts = args.get("expert_tensor_parallel_size")
    if args.get("num_experts") and of_experts not in (None, ranks[0]):
        raise ValueError(
            f"{file} is of expert_tensor_parallel_size {of_experts!r:.50} and {ranks[0]} tensor "
            "ranks: experts that are cut otherwise than the rest are not joined here"
        )


def _chunks(contents: dict, P: int, files: dict) -> list[tuple[str, int]]:
    """(key of the weights, stage) in the order of the layers: virtual stages come first."""
    keys = sorted(
        (key for key in contents[0, 0, 0] if re.fullmatch(r"model\d*", str(key))),
        key=lambda key: int(key[5:] or 0),
    )
    for rank, said in contents.items():
        if any(key not in said for key in keys):
            raise ValueError(f"{files[rank]} lacks one of {shown(keys)}: it is of another save")
    return [(key, p) for key in keys for p in range(P)]


def _weights(values: Any, file: Path) -> dict[str, Stored]:
    """Megatron nests the dictionaries of modules; names of all its versions, under today's."""
    flat: dict[str, Stored] = {}

    def add(prefix: str, values: dict, depth: int) -> None:
        for name, value in values.items():
            full = f"{prefix}{name}"
            if OTHER_PARTS.search(full):
                continue
            if isinstance(value, dict) and depth < 8:
                add(f"{full}.", value, depth + 1)
            else:
                flat[full] = value

    if isinstance(values, dict):
        add("", values, 0)
    return dialects.megatron_core(trained.weights(flat, file) if flat else {})


def _joined(parts: list[dict[str, Stored]]) -> dict[str, Stored]:
    """The weights of one stage, of which each tensor rank has a share, or all have the same."""
    if len(parts) == 1:
        return parts[0]
    whole = {}
    for name, first in parts[0].items():
        shares = [part[name] for part in parts]
        dim = next((dim for dim, names in SHARED if names.fullmatch(name)), None)
        if dim is not None and any(len(share.shape) <= dim for share in shares):
            raise ValueError(f"{first.pieces[0].file}: {name} is of shape {list(first.shape)}")
        if ".linear_fc1." in name and _gated(name, parts[0]):  # each has [gate; up] of its own
            halves = [[range(0, n // 2), range(n // 2, n)] for n in (s.shape[0] for s in shares)]
            shares = [stored.rows(s, [half[i]]) for i in (0, 1) for s, half in zip(shares, halves)]
        whole[name] = first if dim is None else stored.beside(name, shares, dim)
    return whole


def _gated(name: str, part: dict[str, Stored]) -> bool:
    """Whether fc1 is twice as high as fc2 is wide."""
    up, down = (part.get(f"{name.rpartition('.linear_fc1')[0]}.{n}.weight")
                for n in ("linear_fc1", "linear_fc2"))  # fmt: skip
    if up is None or down is None or len(down.shape) != 2:
        return False
    return up.shape[:1] == (2 * down.shape[1],)


# ---------------------------------------------------------------------------------------------
# torch_dist


def _of_torch_dist(folder: Path) -> tuple[dict[str, Stored], dict[str, Any], list[Path]]:
    """(tensors of each layer, what is said beside them, files)."""
    if not os.path.isfile(folder / "metadata.json"):
        raise ValueError(f"{folder} lacks metadata.json: the save is going on or was broken off")
    backend = read_json(folder / "metadata.json").get("sharded_backend")
    if backend != "torch_dist":
        raise ValueError(
            f"{folder} is in Megatron's format {backend!r:.50}, which is not read: torch_dist is"
        )
    tensors: dict[str, Stored] = {}
    for name, t in _with_halves_joined(dcp.tensors_in(folder)).items():
        if OTHER_PARTS.search(name):
            continue
        stack = re.fullmatch(r"(decoder\.layers\.)(?!\d)(.+)", name)
        if stack and t.pieces and len(t.shape) > 1:
            for i, one in enumerate(stored.unstacked(t)):
                tensors[f"{stack[1]}{i}.{stack[2]}"] = one
        else:
            tensors[name] = t
    tensors = dialects.megatron_core(_experts_apart(tensors))
    files = [*dcp.metadata_files(folder), folder / "metadata.json"]
    if os.path.isfile(folder / "common.pt"):
        said = archives.open_archive(folder / "common.pt")
        files.append(folder / "common.pt")
    else:  # newer ones keep it among the objects
        said = dcp.object_in(folder, "common_state")
    return tensors, said if isinstance(said, dict) else {}, files


def _experts_apart(tensors: dict[str, Stored]) -> dict[str, Stored]:
    """An entry for each expert of those that lie stacked."""
    found: dict[str, Stored] = {}
    for name, t in tensors.items():
        if re.search(r"\.experts\.experts\.linear_fc[12]\.weight$", name) and len(t.shape) == 3:
            for e, one in enumerate(stored.unstacked(t)):
                found[name.replace(".experts.linear", f".local_experts.{e}.linear")] = one
        else:
            found[name] = t
    return found


def _with_halves_joined(tensors: dict[str, Stored]) -> dict[str, Stored]:
    """Gate and up stand for themselves where each rank's share is kept as it is."""
    for name in [name for name in tensors if re.search(r"\.linear_fc1\.(weight|bias)_w$", name)]:
        gate, up = tensors.pop(name), tensors.pop(f"{name[:-1]}v", None)
        if up is None:
            raise ValueError(f"{gate.pieces[0].file}: {name} is there without its {name[:-1]}v")
        stacked = (0 if re.search(r"layers\.\d+\.", name) else 1) + (".experts.linear" in name)
        tensors[name[:-2]] = stored.beside(name, [gate, up], stacked)
    return tensors
