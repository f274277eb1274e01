"""A model whose layers lie on the ranks of a group: each rank's part, behind GPTModel's interface.

    dist = in_groups(dist, 2, ckpt.config, "bfloat16")
    model = load(ckpt, "bfloat16", dist)        # a Stage, or where a rank has it all, a whole model
    hidden = model.hidden(input_ids)            # on the last rank of the group; None on the others

All ranks of a group make the same calls in the same order. What the first makes of some tokens
goes to the second, which works on it while the first begins with the next ones. A rank reads its
own layers' weights, and nobody has all of them. torch.distributed.pipelining was considered: it
brings schedules for training, of which scoring needs none; and FSDP2, which gathers each layer for
each batch: a 70B on two GPUs of 80 GB had no room for that, and between hosts it wants a fast link.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from backends.pipe import Pipe, sharded
from config import GPTConfig
from costs.gpus import GPU, find_gpu
from costs.memory import fewest_shards
from costs.shards import cut, shares, weight_bytes
from costs.symbols import Setup
from distributed import Dist
from model import GPTModel
from modeling.attention import Cache
from quantisation.names import Quantisation

if TYPE_CHECKING:
    from checkpoint import Checkpoint
    from quantisation.apply import Rounding
    from transformers_model import Model

T = TypeVar("T")
PLANNED_TOKENS = 4096  # that a model must have room for, at the least, where --shard is auto


class Stage(GPTModel):
    """The layers of a GPTModel that one rank holds, under the names that they have in the whole;
    nothing is in the place of the others. Tied to a head that is elsewhere, an embedding is there
    twice: with the first layers, and as the head.

    wire: what `hidden` goes on from and hands on to: the group's Pipe, or for a step whose tensors
    stay where they are, Buffers.
    """

    pipe: Pipe
    _setup: Setup
    _layers: range
    _dtype: torch.dtype
    wire: "Pipe | Buffers"

    @classmethod
    def of(cls, config: GPTConfig, pipe: Pipe, dtype: str) -> "Stage":
        """This rank's, without memory: `allocate` makes room."""
        stage = cls.on_meta(config)
        stage.pipe = stage.wire = pipe
        stage._setup = Setup(dtype=dtype, training=False, shard=pipe.size)
        stage._layers = cut(config, pipe.size, stage._setup)[pipe.stage]
        stage.is_first, stage.is_last = pipe.stage == 0, pipe.is_last
        elsewhere = [f"blocks.{i}" for i in range(config.n_layers) if i not in stage._layers]
        if not stage.is_first:
            elsewhere += ["position_embedding", "ln_embedding"]
            elsewhere += [] if config.tie_embeddings and stage.is_last else ["token_embedding"]
        if not stage.is_last:
            elsewhere += ["ln_f", "lm_head"]
        _leave_out(stage, elsewhere)
        return stage

    @property
    def layers(self) -> range:
        return self._layers

    def whole(self) -> GPTModel:
        return GPTModel.on_meta(self.config)

    @property
    def copies(self) -> Sequence[nn.Module]:
        again = self.config.tie_embeddings and self.is_last and not self.is_first
        return (self.token_embedding,) if again else ()

    def of_all_ranks(self, counts: list[int]) -> list[int]:
        every = torch.tensor(counts, dtype=torch.int64, device=self.device)
        self.pipe.sum(every)()
        return every.tolist()

    @property
    def device(self) -> torch.device:
        return self.pipe.device

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def largest_share(self) -> tuple[int, float]:
        """Layers and bytes of weights of the rank that has most of each: ranks agree on it."""
        each = shares(self.config, self._setup)
        layers = max(config.n_layers for config, _ in each)
        return layers, max(weight_bytes(*one) for one in each)

    def allocate(
        self, dtype: torch.dtype, device: torch.device | str, later: Collection[str] = ()
    ) -> None:
        super().allocate(dtype, device, later)
        self._dtype = dtype

    def hidden(
        self,
        input_ids: Tensor,
        positions: Tensor | None = None,
        cache: Cache | None = None,
        mask: Sequence[Any] | None = None,
    ) -> Any:
        """Final hidden states [B, T, C] on the last rank; None on others, and where memory ran out:
        the ranks agree on that later (Pipe.settle)."""
        shape = (*input_ids.shape, self.config.d_model)
        came = [] if self.is_first else [self.wire.receive(*shape)]
        done = None
        if not self.pipe.failed:
            done = self.wire.attempt(self._go_on, came, input_ids, positions, cache, mask)
        if self.is_last:
            return done
        self.wire.send(self.pipe.room(*shape) if done is None else done)
        return None

    def _go_on(
        self,
        came: list[Tensor],
        input_ids: Tensor,
        positions: Tensor | None,
        cache: Cache | None,
        mask: Sequence[Any] | None,
    ) -> Tensor:
        positions = self.positions(input_ids, positions, cache)
        stream = self.through_blocks(input_ids, positions, cache, mask, came)
        return self._final_norm(stream)  # of all but the last stage, nothing


def head_alone(config: GPTConfig) -> GPTModel:
    """What `logits` needs of a model, without memory."""
    model = GPTModel.on_meta(config)
    names = [f"blocks.{i}" for i in range(config.n_layers)]
    names += ["position_embedding", "ln_embedding", "ln_f"]
    _leave_out(model, names + ([] if config.tie_embeddings else ["token_embedding"]))
    return model


def _leave_out(model: GPTModel, names: list[str]) -> None:
    there = dict(model.named_modules())
    for name in names:
        if name in there:
            model.set_submodule(name, nn.Identity())


class Buffers:
    """Both ends of a stage in one place each, where a CUDA graph finds them: [B, 1, C]."""

    def __init__(self, model: Stage, rows: int):
        shape = rows, 1, model.config.d_model
        self.came, self.goes = (torch.zeros(shape, device=model.device) for _ in range(2))

    def receive(self, *shape: int) -> Tensor:
        assert shape == self.came.shape, (shape, self.came.shape)
        return self.came

    def send(self, x: Tensor) -> None:
        self.goes.copy_(x)

    def attempt(self, function: Callable[..., T], *args: Any) -> T:
        return function(*args)


# ---------------------------------------------------------------------------------------------
# Of a checkpoint


def load(
    ckpt: "Checkpoint",
    dtype: str,
    dist: Dist,
    packed: bool | None = None,
    rounding: "Rounding | None" = None,
) -> "Model":
    """The model of a checkpoint, or this rank's part of it. packed, rounding: see there."""
    pipe = dist.pipe
    if pipe is None:
        return ckpt.load(dtype, dist.device, packed=packed, rounding=rounding)
    if not ckpt.native:
        raise ValueError(
            f"{ckpt.path} is run by transformers, whose models --shard does not cut: each process "
            "needs memory for all of it"
        )

    def part(config: GPTConfig) -> Stage:
        return Stage.of(config, pipe, dtype)

    return ckpt.load(dtype, dist.device, part, packed=packed, rounding=rounding)


def in_groups(
    dist: Dist,
    asked: int | str,
    config: GPTConfig | None,
    dtype: str,
    rounded: Quantisation | None = None,
    block_bytes: Callable[[], float | None] | None = None,
) -> Dist:
    """The run in groups of as many ranks as are asked for or, for "auto", as compute.py's formulas
    say that memory needs, of the divisors of the world's size. config: None of a model that
    transformers runs. rounded: how, if it is as soon as it is read; block_bytes: asked where they
    count, of a file whose codes stay packed, see costs/symbols.Setup. All ranks call it alike;
    ValueError where no number would do."""
    if asked == "auto":
        asked = 1
        if config is not None and dist.device.type == "cuda":
            rule = rounded.rule if rounded and not rounded.skip else None
            packed = block_bytes() if block_bytes and rounded is None else None
            setup = Setup(dtype=dtype, training=False, quantise=rule, block_bytes=packed)
            asked = dist.broadcast(_fewest(config, dist, setup))
    if not asked:
        raise ValueError(
            f"--shard auto: by compute.py's estimate the model fits none of 1 to {dist.world_size} "
            "GPUs: start more processes, or say --shard N"
        )
    return sharded(dist, int(asked))


def _fewest(config: GPTConfig, dist: Dist, setup: Setup) -> int:
    """0 where none is enough."""
    properties = torch.cuda.get_device_properties(dist.device)
    gpu = find_gpu(properties.name) or GPU("this GPU", "", 1.0, 1.0, 1.0, 1.0)
    gpu = replace(gpu, memory=properties.total_memory)
    among = [n for n in range(1, dist.world_size + 1) if dist.world_size % n == 0]
    tokens = min(config.max_position_embeddings, PLANNED_TOKENS)
    return fewest_shards(config, gpu, 1, tokens, setup, among) or 0
