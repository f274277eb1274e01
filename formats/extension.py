"""A model over another vocabulary: its embedding and head with a row for each token of it.

    print(extend(ckpt, old, new, Path("out"), rows="mean"))      # what became of the rows

Rows of tokens that both vocabularies have are kept, bit for bit; a new one's is the mean of the
rows of the tokens that its text was cut into, or drawn at random (tokenizing/pieces.py). What else
the model has stays. Then train it: `train.py --init-from out --lora-rank 64 --train-embeddings …`.

Source: means: Hewitt 2021, Cui et al. 2023 (Chinese-LLaMA).
"""

from argparse import ArgumentParser, Namespace
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from formats import conversion, native
from model import GPTModel
from tokenizer import Tokenizer, build_tokenizer
from tokenizing.pieces import inherited

if TYPE_CHECKING:
    from checkpoint import Checkpoint

ROWS = ("mean", "random")


def extend(
    ckpt: "Checkpoint", old: Tokenizer, new: Tokenizer, final: Path, rows: str, seed: int = 0
) -> str:
    """Write a checkpoint's model over `new` to a directory as `save_checkpoint` writes it, and say
    how many rows came from where. ValueError for one that is not the model's, and for the same."""
    conversion.refuse(ckpt, final)
    if old.fingerprint == new.fingerprint:
        raise ValueError(f"{ckpt.path} has the vocabulary of {new.name} already")
    assert ckpt.config is not None, "a native one has a config"
    size = ckpt.config.vocab_size
    if old.vocab_size > size:
        raise ValueError(
            f"{ckpt.path} has {size:,} rows, fewer than the {old.vocab_size:,} tokens of "
            f"{old.name}: name the tokenizer that it was trained with (--old-tokenizer)"
        )
    sources = inherited(old, new)
    dtype = conversion.dtype_of(ckpt)
    model = conversion.loaded(ckpt, dtype)
    torch.manual_seed(seed)
    grow(model, sources, rows)
    about = {"step": ckpt.step, "extended": ckpt.path.name}
    with native.appearing(final, about) as directory:
        native.write_weights(model, model.config, directory, new, dtype)
    kept = Counter(min(len(source), 2) for source in sources)
    made = f"{kept[2]:,} of several old ones, {kept[0]:,} of none"
    return f"{len(sources):,} tokens: {kept[1]:,} rows kept or copied, {made}"


def add_job(jobs: Any) -> ArgumentParser:
    """`checkpoint.py extend-vocab` among the subparsers of its command line."""
    job = jobs.add_parser("extend-vocab", help="the same model over another tokenizer")
    job.add_argument("source")
    job.add_argument("destination")
    job.add_argument("--tokenizer", required=True, metavar="NAME", help="as --tokenizer-name")
    job.add_argument("--old-tokenizer", metavar="NAME", help="default: the one beside SOURCE")
    job.add_argument("--new-rows", choices=ROWS, default="mean", help="of tokens not there before")
    job.add_argument("--seed", type=int, default=0, help="of random ones (0)")
    return job


def run(ckpt: "Checkpoint", args: Namespace) -> str:
    """What `checkpoint.py extend-vocab` does and says."""
    name = args.old_tokenizer or ckpt.tokenizer
    if name is None:
        raise ValueError(f"{ckpt.path} has no tokenizer beside it: name it with --old-tokenizer")
    old, new = build_tokenizer(name), build_tokenizer(args.tokenizer)
    said = extend(ckpt, old, new, Path(args.destination), args.new_rows, args.seed)
    return f"{args.destination}\n{said}"


@torch.no_grad()
def grow(model: GPTModel, sources: list[tuple[int, ...]], rows: str) -> None:
    """Change the embedding and the head, and its bias, to one row for each entry of `sources`: the
    old rows that it is made of. rows: "mean", or "random" for those that are no old row themselves;
    where there are none to be made of, the mean of all, or random."""
    assert rows in ROWS, rows
    embedding, head = model.token_embedding, model.lm_head
    tied = head.weight is embedding.weight
    embedding.weight = nn.Parameter(_made(embedding.weight, sources, rows), requires_grad=False)
    if tied:
        head.weight = embedding.weight
    else:
        head.weight = nn.Parameter(_made(head.weight, sources, rows), requires_grad=False)
    if head.bias is not None:
        bias = _made(head.bias[:, None], sources, "mean")[:, 0]
        head.bias = nn.Parameter(bias, requires_grad=False)
    embedding.num_embeddings = head.out_features = len(sources)
    model.config = model.config.replace(vocab_size=len(sources))


def _made(old: Tensor, sources: list[tuple[int, ...]], rows: str) -> Tensor:
    values = old.float()
    mean, spread = values.mean(0), values.std()
    made = torch.empty(len(sources), values.shape[1])
    for i, source in enumerate(sources):
        if len(source) == 1:
            made[i] = values[source[0]]
        elif rows == "random":
            made[i] = mean + spread * torch.randn_like(mean)
        else:
            made[i] = values[list(source)].mean(0) if source else mean
    return made.to(old.dtype)
