"""A sharded run's checkpoint, written and taken up by all ranks; nobody has the whole of it.

entries = write(state, directory, dist)         # on all ranks; directory: rank 0's, else None
resume(state, path)                             # this rank's rows of weights and moments

Weights are whole tensors in Hugging Face's layout, as of any other run: gathered one parameter at
a time, each by all ranks and written by the one whose file it is in. Moments stay where they are:
each rank writes its rows to a file of its own (formats/training_state.py). All ranks must see the
same directory: with several hosts, on a file system that they share.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

import checkpoint
from distributed import Dist
from formats import huggingface, layouts, native, tensorfiles, training_state
from formats.row_shards import own_rows
from formats.stored import Stored, read_whole, rows
from model import GPTModel
from training.fsdp import named_shards

if TYPE_CHECKING:
    from training.state import TrainingState

# ---------------------------------------------------------------------------------------------
# Writing


@torch.no_grad()
def write(state: "TrainingState", directory: Path | None, dist: Dist) -> native.Entries:
    """Weights, moments and what lies beside them; what the manifest says of the ranks' files.
    ValueError, on all ranks, where one of them does not see rank 0's directory."""
    folder = Path(dist.broadcast(directory))
    blind = [rank for rank, sees in enumerate(dist.gather(folder.is_dir())) if not sees]
    if blind:
        raise ValueError(
            f"{folder.parent} of rank 0 is not there for rank {blind[0]}: --checkpoint-path must "
            "be on a file system that all hosts share"
        )
    if dist.is_main:
        native.write_about(state.model.config, folder, state.tokenizer, torch.float32)
    files = [*_write_weights(state.model, folder, dist), _write_moments(state, folder, dist)]
    own = {file.name: native.flushed(file) for file in files}
    return {name: entry for entries in dist.gather(own) for name, entry in entries.items()}


def plain_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Its state without what the ranks have rows of."""
    said = optimizer.state_dict()
    plain = {
        i: {key: value for key, value in own.items() if not isinstance(value, DTensor)}
        for i, own in said["state"].items()
    }
    return said | {"state": plain}


def _write_weights(model: GPTModel, folder: Path, dist: Dist) -> list[Path]:
    """This rank's files of weights, none or one."""
    layout = native.layout_of(model.config)
    shares = _shares(list(named_shards(model)), dist.world_size)
    names, where, total, mine = huggingface.shard_names(len(shares)), {}, 0, []
    for rank, (name, share) in enumerate(zip(names, shares)):
        shapes: dict[str, Tensor] = {}
        for ours, p in share:
            assert p.dtype == torch.float32, f"{ours} is {p.dtype}"
            whole = torch.empty(p.shape, device="meta")
            shapes |= {n: part.tensor for n, part in _parts(model, layout, ours, whole)}
        where |= dict.fromkeys(shapes, name)
        total += sum(t.numel() * t.itemsize for t in shapes.values())
        gathered = ((ours, p.full_tensor()) for ours, p in share)  # all ranks take part
        if rank != dist.rank:
            for _ in gathered:
                pass
            continue
        made = (
            (n, part.get())
            for ours, whole in gathered
            for n, part in _parts(model, layout, ours, whole.cpu())
        )
        file = folder / name
        _write_in_turn(file, shapes, made)
        mine.append(file)
    if dist.is_main and len(shares) > 1:
        huggingface.write_index(folder, where, total)
    return mine


def _parts(model: GPTModel, layout: str, name: str, whole: Tensor) -> Any:
    return layouts.parts_of(model.config, layout, name, whole)


def _write_in_turn(file: Path, shapes: dict[str, Tensor], made: Any) -> None:
    def next_one(name: str) -> Tensor:
        found, tensor = next(made)
        assert found == name, (found, name)
        return tensor

    tensorfiles.write_safetensors(file, shapes, torch.float32, made=next_one)
    assert next(made, None) is None, "all were written"


def _shares(parameters: list[tuple[str, DTensor]], n: int) -> list[list[tuple[str, DTensor]]]:
    """The parameters of each of at most n files, in order, of about as many bytes each."""
    total, before, shares = sum(p.numel() for _, p in parameters), 0, [[] for _ in range(n)]
    for name, p in parameters:
        shares[before * n // total].append((name, p))
        before += p.numel()
    return [share for share in shares if share]


def moments(optimizer: torch.optim.Optimizer) -> dict[str, DTensor]:
    """By "{number of the parameter}.{name of the moment}", what the ranks have rows of."""
    return {
        f"{i}.{key}": value
        for i, own in optimizer.state_dict()["state"].items()
        for key, value in own.items()
        if isinstance(value, DTensor)
    }


def about_moments(optimizer: torch.optim.Optimizer, dist: Dist) -> dict[str, Any]:
    """How many files they lie in, and along which dimension those are cut that are not by rows."""
    dims = {name: own_rows(t)[0] for name, t in moments(optimizer).items()}
    return {"files": dist.world_size, "dims": {name: dim for name, dim in dims.items() if dim}}


def _write_moments(state: "TrainingState", folder: Path, dist: Dist) -> Path:
    file = training_state.moments_file(folder, dist.rank, dist.world_size)
    parts = {name: t.to_local() for name, t in moments(state.optimizer).items()}
    parts = {name: t for name, t in parts.items() if t.numel()}
    tensorfiles.write_safetensors(file, parts, torch.float32)
    return file


# ---------------------------------------------------------------------------------------------
# Taking up


def resume(state: "TrainingState", path: Path) -> int:
    """The step of a checkpoint, sharded or not, once this rank's rows of it are restored."""
    found = checkpoint.load_training_state(path, whole=False)
    training_state.require(found, state.optimizer, state.scheduler, path)
    checkpoint.load_weights(path, state.model)
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
    for i, own in found["optimizer"]["state"].items():
        if i >= len(parameters):
            raise ValueError(f"{path}: its training state does not fit: it has more parameters")
        own |= {key: _own_part(value, parameters[i]) for key, value in own.items()}
    training_state.restore(found, state.optimizer, state.scheduler, path)
    return found["step"] or 0


def _own_part(value: Any, p: DTensor) -> Any:
    """This rank's rows of what has a parameter's shape; anything else as it is."""
    if not isinstance(value, (Tensor, Stored)) or tuple(value.shape) != tuple(p.shape):
        return value
    dim, own = own_rows(p)
    if isinstance(value, Stored) and dim == 0:
        local = read_whole(rows(value, [own]))
    else:
        whole = read_whole(value) if isinstance(value, Stored) else value
        local = whole.narrow(dim, own.start, len(own)).clone()
    return DTensor.from_local(
        local.to(p.device), p.device_mesh, [Shard(dim)], run_check=False, shape=p.shape,
        stride=p.stride(),
    )  # fmt: skip
