"""Pretrain a GPT on the data that eval.py scores, writing checkpoints that it reads.

    python train.py --config nano --tokenizer-name byte --data-mode fineweb_npy \\
        --train-npy 'data/stdlib/stdlib_train_*.npy' --val-npy 'data/stdlib/stdlib_val_*.npy' \\
        --seq-len 256 --num-steps 500 --eval-steps 100 --checkpoint-path checkpoints/nano
    torchrun --nproc-per-node=8 train.py --config gpt2 … --batch-size 32 --compile on

rosetrainer's flags keep their names; --train-config FILE.yaml sets any of them, and flags on the
command line win. `--checkpoint-path` is the directory that checkpoint-{step}/ and log.jsonl go to;
`--resume` goes on from the last complete one there. Resuming is exact: a step's data, dropout and
learning rate are functions of the step number alone, and weights and optimizer state are saved
whole, so k steps, kill -9, and the rest give the bits of an uninterrupted run (seen on CPU; CUDA's
backward kernels are not deterministic).

Reference: nanoGPT trains GPT-2 124M to a validation loss of about 2.85 on OpenWebText.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from dataset import TokenStream, Windows, build_tokenizer, open_stream
from distributed import Dist, print0
from durable import check_writable
from model import GPTModel
from modeling.mlp import balance_loss
from tokenizer import Tokenizer
from training.batches import TrainBatches
from training.log import Log, mean_over_ranks, start_wandb
from training.options import (
    DataOptions,
    ModelOptions,
    OptimizationOptions,
    Options,
    RunOptions,
    parse,
)


def main(argv=None):
    options = parse(argv, __doc__)
    if cli.rank() == 0:
        check_writable(options.run.checkpoint_path, "--checkpoint-path")
    with distributed.setup(options.device.device, options.device.timeout) as dist:
        dtype = choose_dtype(options.precision, dist.device)
        tokenizer = choose_tokenizer(options)
        stream, val_stream = open_data(options.data, tokenizer)
        model = build_model(options, tokenizer).to(dist.device)
        for data in filter(None, (stream, val_stream)):
            data.check_vocab(model.vocab_size)
        state = TrainingState(model, *make_optimizer(model, options.optimization), tokenizer)
        resume(state, options.run)
        train(options, state, stream, val_stream, dtype, dist)


def choose_dtype(precision: cli.PrecisionOptions, device: torch.device) -> str:
    """float32 or bfloat16 by name; float32 on CUDA is exact, without TF32."""
    dtype = precision.resolve(device.type)
    if dtype == "float16":
        raise ValueError("train.py has no loss scaling for float16: use --dtype bfloat16")
    torch.set_float32_matmul_precision("highest" if dtype == "float32" else "high")
    return dtype


# ---------------------------------------------------------------------------------------------
# Data, model, optimizer


@dataclass
class TrainingState:
    """What a checkpoint holds. step: how many have been taken."""

    model: GPTModel
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    tokenizer: Tokenizer
    step: int = 0


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


def open_data(data: DataOptions, tokenizer: Tokenizer) -> tuple[TokenStream, TokenStream | None]:
    """(training stream, validation stream or None)."""
    kind = "data" if data.data_mode == "text" else "npy"
    files, val_files = getattr(data, f"train_{kind}"), getattr(data, f"val_{kind}")
    if not files:
        raise ValueError(f"--data-mode {data.data_mode} needs --train-{kind} FILE …")
    width = data.token_dtype
    train = open_stream(data.data_mode, files, tokenizer, data.max_tokens, token_dtype=width)
    if val_files:
        limit = data.val_max_tokens
        return train, open_stream(data.data_mode, val_files, tokenizer, limit, token_dtype=width)
    return train.split(data.val_ratio) if data.val_ratio else (train, None)


def config_given(given: ModelOptions) -> GPTConfig | None:
    """That of --config, else of --init-from; the other flags are still to come."""
    if given.config:
        return load_config(given.config)
    config = checkpoint.open(given.init_from).config if given.init_from else None
    if given.init_from and config is None:
        raise ValueError(f"{given.init_from}: train.py has no native form for this architecture")
    return config


def build_model(options: Options, tokenizer: Tokenizer) -> GPTModel:
    """Fresh weights on CPU, the same on every rank: drawn from the seed. ValueError for a model
    that is too short for --seq-len."""
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
    model = GPTModel(config)
    if given.init_from:
        checkpoint.load_weights(given.init_from, model)
    model.activation_checkpointing = given.use_activation_checkpoint
    return model


def make_optimizer(
    model: GPTModel, options: OptimizationOptions
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Fused AdamW that decays matrices and embeddings, not biases and norms, under a LambdaLR."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (options.beta1, options.beta2)
    optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=betas, fused=True)

    def factor(step: int) -> float:
        """Of step 0, 1, …: linear warm-up, then the schedule down to min_lr_ratio."""
        warmup, least = options.warmup_steps, options.min_lr_ratio
        if step < warmup:
            return (step + 1) / warmup
        if options.lr_scheduler == "constant":
            return 1.0
        done = min((step - warmup) / max(1, options.num_steps - warmup), 1.0)
        cosine = options.lr_scheduler == "cosine"
        shape = 0.5 * (1 + math.cos(math.pi * done)) if cosine else 1 - done
        return least + (1 - least) * shape

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def resume(state: TrainingState, run: RunOptions) -> None:
    """Load the last complete checkpoint, if any. Refuses to write over an earlier run without
    --resume."""
    directory = Path(run.checkpoint_path)
    found = checkpoint.list_checkpoints(directory) if directory.is_dir() else []
    if found and not run.resume:
        raise ValueError(f"{directory} has checkpoints: --resume goes on from {found[-1].name}")
    if not found:
        return
    _, state.step, _ = checkpoint.load_checkpoint(
        found[-1].path, state.model, state.optimizer, state.scheduler
    )
    print0(f"resuming from {cli.printable(found[-1].path)}, step {state.step}")


# ---------------------------------------------------------------------------------------------
# Training


def train(
    options: Options,
    state: TrainingState,
    stream: TokenStream,
    val_stream: TokenStream | None,
    dtype: str,
    dist: Dist,
) -> None:
    """The steps that are left, with validation, checkpoints and the log."""
    optimization, run, model = options.optimization, options.run, state.model
    accum, last = optimization.grad_accum_steps, optimization.num_steps
    per_step = optimization.batch_size * accum * dist.world_size
    seed = run.seed if options.data.data_seed is None else options.data.data_seed
    batches = TrainBatches(len(stream), optimization.seq_len, per_step, seed, accum)
    steps = range(state.step, last)
    micro_batches = load_micro_batches(batches, stream, steps, dist)
    loss_fn = wrap(model, run.compile, dist)
    amp = torch.autocast(dist.device.type, torch.bfloat16, enabled=dtype == "bfloat16")
    log = open_log(options, model.config, batches, steps, dist)
    model.train()
    for step in steps:
        # dropout of a step depends on (seed, step, rank) alone, so a resumed run draws the same
        torch.manual_seed((run.seed * 1_000_003 + step) * 65_537 + dist.rank)
        loss, router_loss = backward(
            loss_fn, micro_batches, accum, amp, dist, model.config.router_loss
        )
        norm = clip(model, optimization.grad_clip_norm)
        state.optimizer.step()
        state.scheduler.step()
        state.optimizer.zero_grad(set_to_none=True)
        dist.bump()
        state.step = done = step + 1
        log.step(done, loss, norm, float(state.scheduler.get_last_lr()[0]), router_loss)

        val_loss = None
        if val_stream is not None and (done == last or done % optimization.eval_steps == 0):
            val_loss = validate(model, val_stream, optimization, amp, dist)
            log.validation(done, val_loss)
            log.restart_clock(done)
        if done == last or done % (run.save_steps or optimization.eval_steps) == 0:
            known_loss = mean_over_ranks(loss, dist) if val_loss is None else val_loss
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
        self, input_ids: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """input_ids, targets [B, T]; nats a token, and the load-balancing loss or None: scalars."""
        hidden = self.model.hidden(input_ids).flatten(0, 1)
        loss = self.model.nll(hidden, targets.flatten()).mean()
        if self.of_all_ranks is None:
            return loss, None
        return loss, balance_loss(self.of_all_ranks(self.model.router_loads()))


def of_all_ranks(loads: torch.Tensor) -> torch.Tensor:
    """`Mixture.load` of all layers, [L, 2, E], with the share of tokens that chose an expert taken
    over all ranks. It has no gradient, and the loss is linear in the rest, so that the mean of the
    ranks' losses is the loss of their tokens together."""
    if not torch.distributed.is_initialized():
        return loads
    share = loads[:, 0].detach().clone()
    torch.distributed.all_reduce(share)
    return torch.stack((share / torch.distributed.get_world_size(), loads[:, 1]), dim=1)


def wrap(model: GPTModel, compile: str, dist: Dist) -> nn.Module:
    """Loss(model), compiled if wanted, under DDP where there are several ranks."""
    loss_fn = Loss(model)
    if compile == "on" or (compile == "auto" and dist.device.type == "cuda"):
        loss_fn.compile(dynamic=False)
    if dist.world_size == 1:
        return loss_fn
    on_cuda = dist.device.type == "cuda"
    return DistributedDataParallel(
        loss_fn,
        device_ids=[dist.local_rank] if on_cuda else None,
        gradient_as_bucket_view=True,
        # DDP regroups its buckets after the first step, and a resumed run has another first step:
        # looking for unused parameters keeps the groups, and with them the order of summation
        find_unused_parameters=not on_cuda,
    )


def load_micro_batches(
    batches: TrainBatches, stream: TokenStream, steps: range, dist: Dist
) -> Iterator[Sequence[torch.Tensor]]:
    """(input_ids, targets), each [B, T], of this rank's passes in order, on its device."""
    accum = batches.grad_accum_steps

    def make(i):
        step, micro_step = divmod(i, accum)
        return batches.batch(stream, step, dist.rank, dist.world_size, micro_step)

    return scoring.prefetch(make, range(steps.start * accum, steps.stop * accum), dist.device)


def backward(
    loss_fn: nn.Module,
    micro_batches: Iterator[Sequence[torch.Tensor]],
    accum: int,
    amp: torch.autocast,
    dist: Dist,
    weight: float,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """This rank's mean losses over `accum` micro-batches, as Loss has them; and the gradients of
    the first + weight times the second, meaned over ranks."""
    total, router_total = torch.zeros(2, device=dist.device)
    for micro_step in range(accum):
        input_ids, targets = next(micro_batches)
        without_ranks: AbstractContextManager[None] = nullcontext()
        if isinstance(loss_fn, DistributedDataParallel) and micro_step < accum - 1:
            without_ranks = loss_fn.no_sync()  # they meet in the last pass
        with without_ranks:
            with amp:
                loss, router_loss = loss_fn(input_ids, targets)
            objective = loss if router_loss is None else loss + weight * router_loss
            (objective / accum).backward()
        total += loss.detach() / accum
        router_total += 0 if router_loss is None else router_loss.detach() / accum
    return total, router_total if weight else None


def clip(model: GPTModel, max_norm: float) -> torch.Tensor:
    """The gradients' norm, after which they are clipped to max_norm (0: left alone)."""
    return nn.utils.clip_grad_norm_(model.parameters(), max_norm or float("inf"))


@torch.no_grad()
def validate(
    model: GPTModel,
    stream: TokenStream,
    options: OptimizationOptions,
    amp: torch.autocast,
    dist: Dist,
) -> float:
    """Exact loss over the validation stream, the number that eval.py gives."""
    model.eval()
    nll = scoring.nll_function(model, compiled=False)

    def nll_fn(input_ids, targets, window_ids):
        with amp:
            return nll(input_ids, targets)

    windows = Windows(len(stream), options.seq_len)
    nothing = torch.zeros(model.vocab_size, dtype=torch.int64)
    totals = scoring.score_windows(
        nll_fn, stream, windows, options.batch_size, dist, nothing, nothing.bool()
    )
    model.train()
    return totals.loss


def save(
    state: TrainingState, batches: TrainBatches, loss: float, run: RunOptions, dist: Dist
) -> None:
    """checkpoint-{step}, by rank 0, for which the others wait."""
    if dist.is_main:
        path = checkpoint.save_checkpoint(
            state.model,
            state.optimizer,
            state.scheduler,
            int(batches.epoch(state.step)),
            state.step,
            loss,
            run.checkpoint_path,
            tokenizer=state.tokenizer,
            extra={"tokens": state.step * batches.batch_size * batches.seq_len},
            keep=run.keep,
        )
        print0(f"step {state.step}: saved {cli.printable(path)}")
    dist.barrier()


def open_log(
    options: Options, config: GPTConfig, batches: TrainBatches, steps: range, dist: Dist
) -> Log:
    run, tracker = options.run, None
    if run.use_wandb and dist.is_main:
        known = options.flags() | {"model": config.to_dict()}
        tracker = start_wandb(run.wandb_project, run.wandb_run_name, known)
    return Log(
        Path(run.checkpoint_path) / "log.jsonl",
        steps,
        run.log_steps,
        batches.batch_size * batches.seq_len,
        dist,
        mfu_of(config, batches, dist),
        tracker,
    )


def mfu_of(config: GPTConfig, batches: TrainBatches, dist: Dist) -> Callable[[float], float | None]:
    """f(seconds of a step) -> model FLOPs utilisation; None where the GPU is not known."""
    gpu = None
    if dist.device.type == "cuda":
        gpu = gpus.find_gpu(torch.cuda.get_device_name(dist.device))
    flops = estimate_flops(config, batches.batch_size, batches.seq_len)["training_causal"]

    def mfu(seconds: float) -> float | None:
        return None if gpu is None else gpus.mfu(flops, seconds, dist.world_size, gpu)

    return mfu


if __name__ == "__main__":
    cli.run(main)
