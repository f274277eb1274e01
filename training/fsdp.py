"""Training whose parameters, gradients and moments lie on all ranks, rows of each: torch's FSDP2.

    model, rows = drawn(config, dist)             # on meta; this rank's rows of fresh weights
    loss_fn = shard(Loss(model), "bfloat16", dist)
    put(model, rows)                              # or checkpoint.load_weights(path, model)

A block is gathered when its turn comes and let go after it, in the forward and in the backward; the
embeddings, the last norm and the head are gathered as long as a pass lasts. No rank ever has a
whole model: fresh weights are drawn one tensor at a time, of which each rank keeps its rows, and a
checkpoint's are read by rows (formats/row_shards.py). The random numbers are those of a model that
is not sharded: first weights have the same bits on any number of ranks.

In float32 the losses are those of DDP but for the order of sums. In bfloat16 all weights are
gathered in bfloat16, the masters and the sums of gradients being float32: DDP's autocast rounds the
matrices alone, and leaves norms, routers and embeddings in float32.
"""

from collections.abc import Iterator
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Shard
from torch.overrides import TorchFunctionMode

from config import GPTConfig
from distributed import Dist
from formats.row_shards import dim_of, rows_of_rank
from model import GPTModel
from modeling.norms import Norm

LossModule = TypeVar("LossModule", bound=nn.Module)  # train.Loss: `model`, `run` and a forward


def shard(loss_fn: LossModule, dtype: str, dist: Dist) -> LossModule:
    """The parameters of loss_fn.model, which is on meta, over all ranks, with room on this rank's
    device for its rows. dtype: of the products."""
    model = cast(GPTModel, loss_fn.model)
    tied = model.lm_head.weight is model.token_embedding.weight
    policy = MixedPrecisionPolicy(
        param_dtype=getattr(torch, dtype),
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # the residual stream stays float32
    )
    mesh = init_device_mesh(dist.device.type, (dist.world_size,))

    def placed(p: nn.Parameter) -> Shard:
        return Shard(dim_of(p.shape, dist.world_size))

    for module in (*model.blocks, loss_fn):
        fully_shard(module, mesh=mesh, mp_policy=policy, shard_placement_fn=placed)
    register_fsdp_forward_method(loss_fn, "run")
    model.to_empty(device=dist.device)
    if tied:  # which to_empty does not know
        model.lm_head.weight = model.token_embedding.weight
    model.materialize_buffers(dist.device)
    return loss_fn


def let_go(loss_fn: nn.Module) -> None:
    """Of what is gathered as long as a pass lasts, where no backward has let it go."""
    if isinstance(loss_fn, FSDPModule):
        loss_fn.reshard()


class InStep(Dist):
    """A Dist whose ranks all have as many units, where each pass wants all ranks: those beyond the
    last stand for nothing."""

    def shard(self, n_units: int) -> range:
        return super().shard(-(-n_units // self.n_groups) * self.n_groups)


def in_step(dist: Dist) -> InStep:
    return InStep(**{name: getattr(dist, name) for name in dist.__dataclass_fields__})


def whole_norm(norm: Tensor) -> Tensor:
    """Of gradients, over all ranks."""
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


# ---------------------------------------------------------------------------------------------
# Fresh weights


def part_of(whole: Tensor, rank: int, world_size: int) -> Tensor:
    """What of a parameter is a rank's."""
    dim = dim_of(whole.shape, world_size)
    own = rows_of_rank(whole.shape[dim], rank, world_size)
    return whole.narrow(dim, own.start, len(own))


class _Drawing(TorchFunctionMode):
    """What torch.nn.init does to tensors of meta within, it does to a tensor of the CPU, one at a
    time; rows of it are kept. Whatever is drawn and not kept takes its random numbers too."""

    def __init__(self, rank: int, world_size: int):
        super().__init__()
        self.ranks = rank, world_size
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}  # by id of what the first of the two is

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) != "torch.nn.init":
            return func(*args, **kwargs)
        tensor = args[0] if args else kwargs.pop("tensor")
        whole = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        func(whole, *args[1:], **kwargs)
        self.kept[id(tensor)] = tensor, part_of(whole, *self.ranks).clone()
        return tensor


def drawn(config: GPTConfig, dist: Dist) -> tuple[GPTModel, dict[str, Tensor]]:
    """GPTModel(config) on meta, and this rank's rows of its weights by name, drawn from torch's
    seed as GPTModel draws them."""
    drawing = _Drawing(dist.rank, dist.world_size)
    with torch.device("meta"), drawing:
        model = GPTModel(config)
    rows = {}
    for name, p in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        own = part_of(p, dist.rank, dist.world_size).shape
        if leaf.endswith("bias"):  # GPTModel._init_weights
            rows[name] = torch.zeros(own)
        elif id(p) in drawing.kept:
            rows[name] = drawing.kept[id(p)][1]
        else:
            norm = model.get_submodule(module)
            assert isinstance(norm, Norm), f"{name} is not drawn"
            rows[name] = torch.full(own, 1.0 - norm.offset)
    return model, rows


@torch.no_grad()
def put(model: GPTModel, rows: dict[str, Tensor]) -> None:
    """This rank's rows of each parameter, by name, into a model that was sharded."""
    for name, p in named_shards(model):
        p.to_local().copy_(rows[name])


def named_shards(model: nn.Module) -> Iterator[tuple[str, DTensor]]:
    """The parameters of a sharded model, each once."""
    for name, p in model.named_parameters():
        assert isinstance(p, DTensor), f"{name} is gathered, or no part of a sharded model"
        yield name, p
