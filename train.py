"""Pretrain a GPT on the data that eval.py scores, writing checkpoints that it reads.

    python train.py --config nano --tokenizer-name byte --data-mode fineweb_npy \\
        --train-npy 'data/stdlib/stdlib_train_*.npy' --val-npy 'data/stdlib/stdlib_val_*.npy' \\
        --seq-len 256 --num-steps 500 --eval-steps 100 --checkpoint-path checkpoints/nano
    torchrun --nproc-per-node=8 train.py --config gpt2 … --batch-size 32 --compile on
    torchrun --nproc-per-node=8 train.py --config llama3-8b … --fsdp --use-activation-checkpoint

--packing says which documents share a window, --mix how much of which source comes. rosetrainer's
flags keep their names; --train-config FILE.yaml sets any of them, and flags on the command line
win. `--checkpoint-path` is the directory that checkpoint-{step}/ and log.jsonl go to; `--resume`
goes on from the last complete one there. Resuming is exact: a step's data, dropout and learning
rate are functions of the step number alone, and weights and optimizer state are saved whole, so k
steps, kill -9, and the rest give the bits of an uninterrupted run (seen on CPU; CUDA's backward
kernels are not deterministic).

Reference: nanoGPT trains GPT-2 124M to a validation loss of about 2.85 on OpenWebText.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import installed  # noqa: F401

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import cli
import distributed
import evaluation
from backends import scoring
from config import GPTConfig, load_config
from costs import gpus
from costs.flops import estimate_flops
from dataset import TokenStream, Windows, build_tokenizer
from distributed import Dist
from durable import check_writable
from formats import row_shards
from gpu_kernels.cross_entropy import IGNORE
from model import GPTModel
from modeling.mlp import balance_loss
from recording.trackers import trackers
from tokenizer import Tokenizer
from training import fsdp
from training.batches import TrainBatches
from training.log import Log, mean_loss
from training.lora import Adapters, adapted
from training.low_rank import LowRank
from training.options import (
    ModelOptions,
    OptimizationOptions,
    Options,
    parse,
)
from training.schedule import schedule
from training.sources import Data, make_batches, open_data
from training.state import TrainingState, find_latest, resume, save


def main(argv=None):
    options = parse(argv, __doc__)
    if cli.rank() == 0:
        check_writable(options.run.checkpoint_path, "--checkpoint-path")
    with distributed.setup(options.device.device, options.device.timeout) as dist:
        dtype = choose_dtype(options.precision, dist.device)
        tokenizer = choose_tokenizer(options)
        data = open_data(options.data, tokenizer, options.optimization.seq_len)
        latest = find_latest(options.run, dist)
        loss_fn, adapters = build_model(options, tokenizer, dtype, latest, dist)
        model = loss_fn.model
        data.check_vocab(model.vocab_size)
        trained = adapters.parameters() if adapters else list(model.parameters())
        optimizer, scheduler = make_optimizer(trained, options.optimization)
        state = TrainingState(model, optimizer, scheduler, tokenizer, adapters)
        if latest:
            resume(state, latest)
            if state.step >= (wanted := options.optimization.num_steps):
                cli.note(f"step {state.step} is there: nothing is left of --num-steps {wanted}")
        train(options, state, loss_fn, data, dtype, dist)


def choose_dtype(precision: cli.PrecisionOptions, device: torch.device) -> str:
    """float32 or bfloat16 by name; float32 on CUDA is exact, without TF32."""
    dtype = precision.resolve(device.type)
    if dtype == "float16":
        raise ValueError("train.py has no loss scaling for float16: use --dtype bfloat16")
    torch.set_float32_matmul_precision("highest" if dtype == "float32" else "high")
    return dtype


# ---------------------------------------------------------------------------------------------
# Data, model, optimizer


def choose_tokenizer(options: Options) -> Tokenizer:
    """The one named, else that of --init-from, else GPT-2's where the vocabulary is GPT-2's."""
    name, given = options.data.tokenizer_name, options.model
    if name is None and given.init_from:
        own = evaluation.pick_tokenizer(None, checkpoint.open(given.init_from), needed=True)
        assert own is not None, "needed"
        return own
    if name is None:
        config = config_given(given)
        vocab_size = given.vocab_size or (config and config.vocab_size)
        if vocab_size and vocab_size not in evaluation.GPT2_VOCABULARIES:
            raise ValueError(
                f"a vocabulary of {vocab_size:,} is not GPT-2's: name the tokenizer that the data "
                "has, or shall get (--tokenizer-name)"
            )
    return build_tokenizer(name or "gpt2")


def config_given(given: ModelOptions) -> GPTConfig | None:
    """That of --config, else of --init-from; the other flags are still to come."""
    if given.config:
        return load_config(given.config)
    config = checkpoint.open(given.init_from).config if given.init_from else None
    if given.init_from and config is None:
        raise ValueError(f"{given.init_from}: train.py has no native form for this architecture")
    return config


def build_model(
    options: Options, tokenizer: Tokenizer, dtype: str, latest: Path | None, dist: Dist
) -> tuple["Loss", Adapters | None]:
    """The loss of a model with fresh weights, the same on every rank: drawn on the CPU from the
    seed; or of frozen ones, and adapters that are. latest: the checkpoint that the run goes on
    from. ValueError for a model that is too short for --seq-len."""
    given, seq_len = options.model, options.optimization.seq_len
    config = config_given(given)
    if config is None:
        defaults: dict[str, Any] = {
            "vocab_size": tokenizer.vocab_size,
            "max_position_embeddings": seq_len,
        }
        config = GPTConfig(**(defaults | given.config_fields))
    else:
        config = config.replace(**given.config_fields)
    if seq_len > config.max_position_embeddings:
        raise ValueError(
            f"--seq-len {seq_len} exceeds max_position_embeddings "
            f"{config.max_position_embeddings} of the model"
        )
    torch.manual_seed(options.run.seed)
    adapters, rows, sharded = None, None, options.run.fsdp and dist.world_size > 1
    if options.run.fsdp and not sharded:
        cli.note("--fsdp on one rank: there is nothing to share")
    if options.lora.lora_rank is not None:
        assert given.init_from, "options.py asks for it"
        model, adapters = adapted(given.init_from, config, options.lora, dtype, dist.device)
    elif not sharded:
        model = GPTModel(config)
    elif given.init_from or latest:  # weights come from there
        model = GPTModel.on_meta(config)
    else:
        model, rows = fsdp.drawn(config, dist)
    model.activation_checkpointing = given.use_activation_checkpoint
    loss_fn = Loss(model)
    if sharded:
        fsdp.shard(loss_fn, dtype, dist)
    if rows:
        fsdp.put(model, rows)
    if given.init_from and adapters is None:
        checkpoint.load_weights(given.init_from, model)
    return loss_fn.to(dist.device), adapters


def make_optimizer(
    parameters: list[nn.Parameter], options: OptimizationOptions
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Fused AdamW that decays matrices and embeddings, not biases and norms, under a LambdaLR."""
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (options.beta1, options.beta2)
    optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=betas, fused=True)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, schedule(options))


# ---------------------------------------------------------------------------------------------
# Training


def train(
    options: Options,
    state: TrainingState,
    loss_fn: "Loss",
    data: Data,
    dtype: str,
    dist: Dist,
) -> None:
    """The steps that are left, with validation, checkpoints and the log."""
    optimization, run, model = options.optimization, options.run, state.model
    accum, last = optimization.grad_accum_steps, optimization.num_steps
    batches, counts = make_batches(options, data, state.tokenizer, dist)
    steps = range(state.step, last)
    micro_batches = load_micro_batches(batches, steps, dist)
    wrapped = wrap(loss_fn, run.compile, dist)
    amp = torch.autocast(dist.device.type, torch.bfloat16, enabled=dtype == "bfloat16")
    log = open_log(options, model.config, batches, steps, dist)
    log.packing(steps.start, options.data.packing, counts)
    model.train()
    for step in steps:
        # dropout of a step depends on (seed, step, rank) alone, so a resumed run draws the same
        torch.manual_seed((run.seed * 1_000_003 + step) * 65_537 + dist.rank)
        loss, router_loss, scored = backward(wrapped, model, micro_batches, accum, amp, dist)
        norm = clip(model, optimization.grad_clip_norm)
        state.optimizer.step()
        state.scheduler.step()
        state.optimizer.zero_grad(set_to_none=True)
        dist.bump()
        state.step = done = step + 1
        log.step(done, loss, norm, float(state.scheduler.get_last_lr()[0]), router_loss, scored)

        val_loss = None
        if data.validation and (done == last or done % optimization.eval_steps == 0):
            val_loss = validate(loss_fn, *data.validation, optimization, amp, dist)
            log.validation(done, val_loss)
            log.restart_clock(done)
        if done == last or done % (run.save_steps or optimization.eval_steps) == 0:
            known_loss = mean_loss(loss, scored, dist) if val_loss is None else val_loss
            save(state, batches, known_loss, run, dist)
            log.restart_clock(done)


class Loss(nn.Module):
    """Mean cross-entropy of next tokens, and for a mixture of experts what its router is to lose:
    what DDP wraps and torch.compile compiles."""

    def __init__(self, model: GPTModel):
        super().__init__()
        self.model = model
        # here and not above the function: the mark alone imports a compiler, which takes seconds
        self.of_all_ranks = (
            torch.compiler.disable(of_all_ranks) if model.config.router_loss else None
        )

    def forward(
        self, input_ids: torch.Tensor, targets: torch.Tensor, **within: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """input_ids, targets [B, T]; within: of model.within_documents. Nats a position, those that
        are no targets counted as 0, and the load-balancing loss or None: scalars."""
        hidden = self.model.hidden(input_ids, **within).flatten(0, 1)
        loss = self.model.nll(hidden, targets.flatten()).mean()
        if self.of_all_ranks is None:
            return loss, None
        return loss, balance_loss(self.of_all_ranks(self.model.router_loads()))

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """function(*args), which uses the model: where it is sharded, what lies outside of its
        blocks is gathered meanwhile."""
        return function(*args)


def of_all_ranks(loads: torch.Tensor) -> torch.Tensor:
    """`Mixture.load` of all layers, [L, 2, E], with the share of tokens that chose an expert taken
    over all ranks. It has no gradient, and the loss is linear in the rest, so that the mean of the
    ranks' losses is the loss of their tokens together."""
    if not torch.distributed.is_initialized():
        return loads
    share = loads[:, 0].detach().clone()
    torch.distributed.all_reduce(share)
    return torch.stack((share / torch.distributed.get_world_size(), loads[:, 1]), dim=1)


def wrap(loss_fn: Loss, compile: str, dist: Dist) -> nn.Module:
    """A loss, compiled if wanted, under DDP where there are several ranks that it is not sharded
    over."""
    model, sharded = loss_fn.model, row_shards.is_sharded(loss_fn)
    frozen = any(isinstance(m, LowRank) for m in model.modules())
    if compile == "on" or (compile == "auto" and dist.device.type == "cuda"):
        if frozen or sharded:  # large models, for which one compilation serves all blocks
            scoring.compile_blocks(model, True)
        else:
            loss_fn.compile(dynamic=False)
    if dist.world_size == 1 or sharded:
        return loss_fn
    on_cuda = dist.device.type == "cuda"
    return DistributedDataParallel(
        loss_fn,
        device_ids=[dist.local_rank] if on_cuda else None,
        gradient_as_bucket_view=True,
        broadcast_buffers=False,  # rotary tables, and packed weights: alike from the start
        # DDP regroups its buckets after the first step, and a resumed run has another first step:
        # looking for unused parameters keeps the groups, and with them the order of summation
        find_unused_parameters=not on_cuda,
    )


def load_micro_batches(
    batches: TrainBatches, steps: range, dist: Dist
) -> Iterator[Sequence[torch.Tensor | Any]]:
    """(input_ids, targets, starts or None) of this rank's passes in order, on its device: see
    training.batches.Batch."""
    accum = batches.grad_accum_steps

    def make(i):
        step, micro_step = divmod(i, accum)
        return batches.batch(step, dist.rank, dist.world_size, micro_step)

    return scoring.prefetch(make, range(steps.start * accum, steps.stop * accum), dist.device)


def backward(
    loss_fn: nn.Module,
    model: GPTModel,
    micro_batches: Iterator[Sequence[torch.Tensor | Any]],
    accum: int,
    amp: torch.autocast,
    dist: Dist,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """This rank's mean losses over `accum` micro-batches, as Loss has them, and the share of
    positions that are targets; and the gradients of the first + router_loss times the second,
    meaned over ranks: a target weighs the same in any window and on any number of ranks."""
    total, router_total = torch.zeros(2, device=dist.device)
    scored, positions = torch.zeros((), dtype=torch.int64, device=dist.device), 0
    weight = model.config.router_loss
    for micro_step in range(accum):
        input_ids, targets, starts = next(micro_batches)
        within = {} if starts is None else model.within_documents(starts)
        without_ranks: AbstractContextManager[None] = nullcontext()
        if isinstance(loss_fn, DistributedDataParallel) and micro_step < accum - 1:
            without_ranks = loss_fn.no_sync()  # they meet in the last pass
        with without_ranks:
            with amp:
                loss, router_loss = loss_fn(input_ids, targets, **within)
            objective = loss if router_loss is None else loss + weight * router_loss
            (objective / accum).backward()
        total += loss.detach() / accum
        scored += (targets != IGNORE).sum()
        positions += targets.numel()
        router_total += 0 if router_loss is None else router_loss.detach() / accum
    return total, router_total if weight else None, scored.double() / positions


def clip(model: GPTModel, max_norm: float) -> torch.Tensor:
    """The gradients' norm, after which they are clipped to max_norm (0: left alone)."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm or float("inf"))
    return fsdp.whole_norm(norm)


@torch.no_grad()
def validate(
    loss_fn: Loss,
    stream: TokenStream,
    windows: Windows,
    options: OptimizationOptions,
    amp: torch.autocast,
    dist: Dist,
) -> float:
    """Exact loss over the validation stream, the number that eval.py gives."""
    model = loss_fn.model.eval()
    nll = scoring.nll_function(model, compiled=model.is_compiled)

    def nll_fn(input_ids, targets, *more):
        with amp:
            return loss_fn.run(nll, input_ids, targets, *more)

    if row_shards.is_sharded(model):
        dist = fsdp.in_step(dist)
    nothing = torch.zeros(model.vocab_size, dtype=torch.int64)
    totals = scoring.score_windows(
        nll_fn, stream, windows, options.batch_size, dist, nothing, nothing.bool()
    )
    fsdp.let_go(loss_fn)
    model.train()
    return totals.loss


def open_log(
    options: Options, config: GPTConfig, batches: TrainBatches, steps: range, dist: Dist
) -> Log:
    run, directory, sent_to = options.run, Path(options.run.checkpoint_path).resolve(), {}
    if dist.is_main:
        project = run.wandb_project if run.use_wandb else None
        about = options.flags() | {"model": config.to_dict()}
        key = hashlib.sha256(os.fsencode(directory)).hexdigest()[:8]
        sent_to = {
            where: start(run.wandb_run_name or directory.name, about, key)
            for where, start in trackers(run.tensorboard, project, "--use-wandb").items()
        }
    return Log(
        directory / "log.jsonl",
        steps,
        run.log_steps,
        batches.batch_size * batches.seq_len,
        dist,
        mfu_of(options, config, batches, dist),
        sent_to,
    )


def mfu_of(
    options: Options, config: GPTConfig, batches: TrainBatches, dist: Dist
) -> Callable[[float], float | None]:
    """f(seconds of a step) -> model FLOPs utilisation; None where the GPU is not known."""
    gpu = None
    if dist.device.type == "cuda":
        gpu = gpus.find_gpu(torch.cuda.get_device_name(dist.device))
    rank = options.lora.lora_rank or 0
    of_step = estimate_flops(config, batches.batch_size, batches.seq_len, lora_rank=rank)
    flops = of_step["training_causal"]
    if rank:  # nothing for the gradients of what is frozen
        flops += of_step["training_lora"] - of_step["training"]

    def mfu(seconds: float) -> float | None:
        return None if gpu is None else gpus.mfu(flops, seconds, dist.world_size, gpu)

    return mfu


if __name__ == "__main__":
    cli.run(main)
