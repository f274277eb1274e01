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

import json
import math
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import cli
import compute
import distributed
import durable
import results
from backends import scoring
from config import GPTConfig, load_config, load_yaml
from dataset import Windows, build_tokenizer, open_stream
from distributed import print0
from model import GPTModel
from training.batches import TrainBatches

MODEL_FLAGS = ("vocab_size", "max_position_embeddings", "n_layers", "n_heads", "d_model", "d_ff")
MODEL_FLAGS += ("dropout", "activation")


def main(argv=None):
    args = parse(argv)
    with distributed.setup(args.device, args.timeout) as dist:
        exact = cli.resolve_dtype(args, dist.device.type) == "float32"
        torch.set_float32_matmul_precision("highest" if exact else "high")
        tokenizer, train_stream, val_stream = open_data(args)
        model = build_model(args, tokenizer, dist.device)
        for stream in filter(None, (train_stream, val_stream)):
            stream.check_vocab(model.vocab_size)
        optimizer, scheduler = make_optimizer(args, model, dist.device)
        first_step = resume(args, model, optimizer, scheduler, dist)
        train(
            args, model, optimizer, scheduler, first_step, train_stream, val_stream, tokenizer, dist
        )


# ---------------------------------------------------------------------------------------------
# Flags


def parse(argv):
    p = cli.parser(__doc__)
    add_model_flags(p)
    add_data_flags(p)
    add_optimization_flags(p)
    p.add_argument("--train-config", metavar="FILE", help="YAML of flags, e.g. `num_steps: 1000`")
    p.add_argument("--checkpoint-path", required=True, metavar="DIR", help="where checkpoints go")
    p.add_argument("--resume", action="store_true", help="go on from the last checkpoint there")
    p.add_argument("--init-from", metavar="PATH", help="weights of any checkpoint, fresh optimizer")
    p.add_argument("--save-steps", type=cli.positive_int, help="default: as --eval-steps")
    p.add_argument(
        "--keep", type=cli.positive_int, help="keep the last K and the best; default all"
    )
    p.add_argument("--log-steps", type=cli.positive_int, default=10)
    p.add_argument("--use-wandb", action="store_true")
    p.add_argument("--wandb-project", default="roseval")
    p.add_argument("--wandb-run-name")
    cli.add_precision_flags(p)
    cli.add_run_flags(p)
    args, _ = p.parse_known_args(argv)
    if args.train_config:
        p.set_defaults(**yaml_flags(p, args.train_config))
    args = p.parse_args(argv)
    if args.resume and args.init_from:
        p.error("--resume and --init-from contradict each other: give one of them")
    chosen = any(getattr(args, name) for name in ("config", "init_from", *MODEL_FLAGS))
    if args.use_toy_data and not chosen:
        args.config, args.seq_len = "nano", min(args.seq_len, 256)
    return args


def add_model_flags(p):
    p.add_argument("--config", help="preset, YAML file or directory; the flags below override it")
    for name in MODEL_FLAGS:
        kind = {"dropout": float, "activation": str}.get(name, cli.positive_int)
        p.add_argument(f"--{name.replace('_', '-')}", type=kind)
    p.add_argument("--use-activation-checkpoint", action="store_true", help="recompute blocks")


def add_data_flags(p):
    p.add_argument("--data-mode", choices=("text", "fineweb_npy"), default="text")
    p.add_argument("--train-data", nargs="+", metavar="FILE")
    p.add_argument("--val-data", nargs="+", metavar="FILE")
    p.add_argument("--train-npy", nargs="+", metavar="FILE")
    p.add_argument("--val-npy", nargs="+", metavar="FILE")
    p.add_argument("--use-toy-data", action="store_true", help="these scripts, a small model")
    p.add_argument("--tokenizer-name", default="gpt2", help="byte, a tiktoken name or a directory")
    p.add_argument("--max-tokens", type=cli.positive_int, help="use the first training tokens only")
    p.add_argument("--val-max-tokens", type=cli.positive_int)
    p.add_argument(
        "--val-ratio", type=float, default=0.0, help="without validation files: hold out"
    )
    p.add_argument("--data-seed", type=int, help="order of the windows; default: --seed")


def add_optimization_flags(p):
    p.add_argument("--batch-size", type=cli.positive_int, default=8, help="windows a rank and pass")
    p.add_argument("--grad-accum-steps", type=cli.positive_int, default=1)
    p.add_argument("--seq-len", type=cli.positive_int, default=1024)
    p.add_argument("--num-steps", type=cli.positive_int, default=1000)
    p.add_argument("--eval-steps", type=cli.positive_int, default=500, help="validate and save")
    p.add_argument("--lr", type=float, default=6e-4)
    p.add_argument("--min-lr-ratio", type=float, default=0.1)
    p.add_argument("--lr-scheduler", choices=("cosine", "linear", "constant"), default="cosine")
    p.add_argument("--warmup-steps", type=int, default=100)
    p.add_argument(
        "--weight-decay", type=float, default=0.1, help="of matrices and embeddings only"
    )
    p.add_argument("--beta1", type=float, default=0.9)
    p.add_argument("--beta2", type=float, default=0.95)
    p.add_argument("--grad-clip-norm", type=float, default=1.0, help="0: no clipping")


def yaml_flags(p, path) -> dict:
    values = load_yaml(path)
    known = {action.dest for action in p._actions}
    for name in values:
        if name not in known:
            raise ValueError(
                f"{path}: no flag is called {name!r} (write num_steps for --num-steps)"
            )
    return values


# ---------------------------------------------------------------------------------------------
# Data, model, optimizer


def open_data(args):
    """(tokenizer, training stream, validation stream or None)."""
    if args.use_toy_data:
        args.data_mode, args.tokenizer_name = "text", "byte"
        args.train_data = [str(path) for path in results.source_files()]
        args.val_ratio = args.val_ratio or 0.1
    kind = "data" if args.data_mode == "text" else "npy"
    files, val_files = getattr(args, f"train_{kind}"), getattr(args, f"val_{kind}")
    if not files:
        raise ValueError(f"--data-mode {args.data_mode} needs --train-{kind} FILE …")
    tokenizer = build_tokenizer(args.tokenizer_name)
    train = open_stream(args.data_mode, files, tokenizer, args.max_tokens)
    if val_files:
        return (
            tokenizer,
            train,
            open_stream(args.data_mode, val_files, tokenizer, args.val_max_tokens),
        )
    if args.val_ratio:
        return tokenizer, *train.split(args.val_ratio)
    return tokenizer, train, None


def build_model(args, tokenizer, device) -> GPTModel:
    """Fresh weights, the same on every rank: drawn on CPU from the seed, then moved."""
    config = load_config(args.config) if args.config else None
    if args.init_from and config is None:
        config = checkpoint.load_config_of(args.init_from)
        if config is None:
            raise ValueError(f"{args.init_from}: train.py has no native form for this architecture")
    changes = {name: getattr(args, name) for name in MODEL_FLAGS if getattr(args, name) is not None}
    if config is None:
        changes.setdefault("vocab_size", tokenizer.vocab_size)
        changes.setdefault("max_position_embeddings", args.seq_len)
        config = GPTConfig(**changes)
    else:
        config = config.replace(**changes)
    if args.seq_len > config.max_position_embeddings:
        raise ValueError(
            f"--seq-len {args.seq_len} exceeds max_position_embeddings "
            f"{config.max_position_embeddings} of the model"
        )
    torch.manual_seed(args.seed)
    model = GPTModel(config)
    if args.init_from:
        checkpoint.load_weights(args.init_from, model)
    model.activation_checkpointing = args.use_activation_checkpoint
    return model.to(device)


def make_optimizer(args, model, device):
    """Fused AdamW that decays matrices and embeddings, not biases and norms, under a LambdaLR."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": args.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (args.beta1, args.beta2)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=betas, fused=True)

    def factor(step):
        """Of step 0, 1, …: linear warm-up, then the schedule down to min_lr_ratio."""
        if step < args.warmup_steps:
            return (step + 1) / args.warmup_steps
        if args.lr_scheduler == "constant":
            return 1.0
        done = (step - args.warmup_steps) / max(1, args.num_steps - args.warmup_steps)
        done = min(done, 1.0)
        shape = 0.5 * (1 + math.cos(math.pi * done)) if args.lr_scheduler == "cosine" else 1 - done
        return args.min_lr_ratio + (1 - args.min_lr_ratio) * shape

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def resume(args, model, optimizer, scheduler, dist) -> int:
    """The step to begin with. Refuses to write over an earlier run without --resume."""
    directory = Path(args.checkpoint_path)
    found = checkpoint.list_checkpoints(directory) if directory.is_dir() else []
    if found and not args.resume:
        raise ValueError(f"{directory} has checkpoints: --resume goes on from {found[-1].name}")
    if not found:
        return 0
    _, step, _ = checkpoint.load_checkpoint(found[-1].path, model, optimizer, scheduler)
    print0(f"resuming from {found[-1].path}, step {step}")
    return step


# ---------------------------------------------------------------------------------------------
# Training


class Loss(nn.Module):
    """Mean cross-entropy of next tokens: what DDP wraps and torch.compile compiles."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, targets):
        hidden = self.model.hidden(input_ids).flatten(0, 1)
        return self.model.nll(hidden, targets.flatten()).mean()


def wrap(args, model, dist) -> nn.Module:
    loss_fn = Loss(model)
    if args.compile == "on" or (args.compile == "auto" and dist.device.type == "cuda"):
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


def train(args, model, optimizer, scheduler, first_step, stream, val_stream, tokenizer, dist):
    dtype = cli.resolve_dtype(args, dist.device.type)
    if dtype == "float16":
        raise ValueError("train.py has no loss scaling for float16: use --dtype bfloat16")
    amp = nullcontext()
    if dtype == "bfloat16":
        amp = torch.autocast(dist.device.type, torch.bfloat16)
    accum, world = args.grad_accum_steps, dist.world_size
    seed = args.seed if args.data_seed is None else args.data_seed
    per_step = args.batch_size * accum * world
    batches = TrainBatches(len(stream), args.seq_len, per_step, seed, accum)
    loss_fn = wrap(args, model, dist)
    log = Log(args, model.config, first_step, per_step, dist)

    def make(i):
        step, micro = divmod(i, accum)
        return batches.batch(stream, step, dist.rank, world, micro)

    data = scoring.prefetch(make, range(first_step * accum, args.num_steps * accum), dist.device)
    model.train()
    for step in range(first_step, args.num_steps):
        # dropout of a step depends on (seed, step, rank) alone, so a resumed run draws the same
        torch.manual_seed((args.seed * 1_000_003 + step) * 65_537 + dist.rank)
        total = torch.zeros((), device=dist.device)
        for micro in range(accum):
            input_ids, targets = next(data)
            waits = world > 1 and micro < accum - 1
            with loss_fn.no_sync() if waits else nullcontext():
                with amp:
                    loss = loss_fn(input_ids, targets) / accum
                loss.backward()
            total += loss.detach()
        norm = clip(model, args.grad_clip_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        dist.bump()
        done = step + 1
        log.step(done, total, norm, scheduler.get_last_lr()[0])
        last = done == args.num_steps
        val_loss = None
        if val_stream is not None and (last or done % args.eval_steps == 0):
            val_loss = validate(args, model, val_stream, dtype, dist)
            log.validation(done, val_loss)
        if last or done % (args.save_steps or args.eval_steps) == 0:
            loss = mean_over_ranks(total, dist) if val_loss is None else val_loss
            epoch = int(batches.epoch(done))
            tokens = done * per_step * args.seq_len
            save(args, model, optimizer, scheduler, epoch, done, loss, tokens, tokenizer, dist)
            log.clock_starts_again()


def mean_over_ranks(loss, dist) -> float:
    return float(dist.sum(loss.double()[None])[0]) / dist.world_size


def clip(model, max_norm: float) -> torch.Tensor:
    """The gradients' norm, after which they are clipped to max_norm (0: left alone)."""
    return nn.utils.clip_grad_norm_(model.parameters(), max_norm or float("inf"))


@torch.no_grad()
def validate(args, model, stream, dtype, dist) -> float:
    """Exact loss over the validation stream, the number that eval.py gives."""
    model.eval()
    nll = scoring.nll_function(model, compiled=False)

    def nll_fn(input_ids, targets):
        with torch.autocast(dist.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            return nll(input_ids, targets)

    windows = Windows(len(stream), args.seq_len)
    nothing = torch.zeros(model.vocab_size, dtype=torch.int64)
    totals = scoring.score_windows(
        nll_fn, stream, windows, args.batch_size, dist, nothing, nothing.bool()
    )
    model.train()
    return totals.loss


def save(args, model, optimizer, scheduler, epoch, step, loss, tokens, tokenizer, dist) -> None:
    if dist.is_main:
        path = checkpoint.save_checkpoint(
            model,
            optimizer,
            scheduler,
            epoch,
            step,
            loss,
            args.checkpoint_path,
            tokenizer=tokenizer,
            extra={"tokens": tokens},
            keep=args.keep,
        )
        print0(f"step {step}: saved {path}")
    dist.barrier()


class Log:
    """Lines on the terminal, log.jsonl beside the checkpoints, and Weights & Biases if asked."""

    def __init__(self, args, config, first_step, windows_per_step, dist):
        self.args, self.dist, self.wandb = args, dist, None
        self.tokens_per_step = windows_per_step * args.seq_len
        flops = compute.estimate_flops(config, windows_per_step, args.seq_len)
        self.flops_per_step = flops["training_causal"]
        self.gpu = None
        if dist.device.type == "cuda":
            self.gpu = compute.find_gpu(torch.cuda.get_device_name(dist.device))
        self.path = Path(args.checkpoint_path) / "log.jsonl"
        if dist.is_main:
            self._cut_after(first_step)
            if args.use_wandb:
                self.wandb = start_wandb(args, config)
        self.clock_starts_again(first_step)

    def _cut_after(self, step):
        """A resumed run repeats the steps since its checkpoint: their lines are written again."""
        kept = []
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:  # the line that a kill tore
                    continue
                if entry["step"] <= step:
                    kept.append(line + "\n")
        durable.write_atomic(self.path, "".join(kept))

    def clock_starts_again(self, step=None):
        """Validation and saving are not training time."""
        if self.dist.device.type == "cuda":
            torch.cuda.synchronize(self.dist.device)
        self.since, self.clock = step if step is not None else self.since, time.perf_counter()

    def step(self, step, loss, norm, lr):
        if step % self.args.log_steps and step != self.args.num_steps:
            return
        loss, norm = mean_over_ranks(loss, self.dist), float(norm)  # the loop's only device sync
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss is {loss} at step {step}: nothing was saved since; lower --lr"
            )
        seconds = (time.perf_counter() - self.clock) / max(1, step - self.since)
        entry = {
            "step": step,
            "loss": loss,
            "lr": lr,
            "grad_norm": norm,
            "tokens_per_second": self.tokens_per_step / seconds,
        }
        if self.gpu:
            entry["mfu"] = compute.mfu(self.flops_per_step, seconds, self.dist.world_size, self.gpu)
        self._write(entry)
        mfu = f"  mfu {entry['mfu']:.1%}" if "mfu" in entry else ""
        print0(
            f"step {step}/{self.args.num_steps}  loss {loss:.4f}  lr {lr:.2e}  norm {norm:.2f}  "
            f"{entry['tokens_per_second']:,.0f} tokens/s{mfu}"
        )
        self.since, self.clock = step, time.perf_counter()

    def validation(self, step, loss):
        self._write({"step": step, "val_loss": loss})
        print0(f"step {step}: val_loss {loss:.6f}  val_ppl {math.exp(min(loss, 700)):.4f}")

    def _write(self, entry):
        if self.dist.is_main:
            with open(self.path, "a") as f:
                f.write(json.dumps(entry) + "\n")
            if self.wandb:
                self.wandb.log(entry, step=entry["step"])


def start_wandb(args, config):
    try:
        import wandb
    except ImportError:
        raise ValueError("--use-wandb needs the package: pip install wandb") from None
    return wandb.init(
        project=args.wandb_project,
        name=args.wandb_run_name,
        config=vars(args) | {"model": config.to_dict()},
        resume="allow",
    )


if __name__ == "__main__":
    cli.run(main)
