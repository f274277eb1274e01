"""Token streams and the windows over them.

    from dataset import Windows, build_tokenizer, open_stream
    tokenizer = build_tokenizer("gpt2")
    stream = open_stream("text", ["data/val/*.txt"], tokenizer)      # or "fineweb_npy", shards
    windows = Windows(len(stream), seq_len=1024)
    batch = windows.batch(stream, [0, 1, 2, 3])                      # numpy, see Windows.batch

Data modes:
- `text`: UTF-8 files, globs or directories (their *.txt, *.jsonl, *.ndjson, *.parquet, gzipped
  or not), see formats/text.py. The end-of-text token follows each document, so each file as in
  rosetrainer.
- `fineweb_npy`: shards of token ids, memory-mapped: `.npy` and `.bin`, see formats/shards.py. The
  files already hold their end-of-text tokens.
Several files are one stream, in the order given; what a glob or a directory finds is sorted.
Every file that cannot be used raises ValueError in one line naming it and what would help.
"""

import glob
import math
import os
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from cli import progress
from costs.symbols import CHUNK_TOKENS
from formats.documents import Mark, starts_in_rows
from formats.shards import open_shard
from formats.text import text_groups
from formats.tokens import Source, TokenStream
from gpu_kernels.cross_entropy import IGNORE
from model import GPTModel
from packed import require_file, suffix_of
from tokenizer import Tokenizer, build_tokenizer

__all__ = [
    "FineWebNPYDataset",
    "RandomWindows",
    "Source",
    "TextDatasetForCausalLM",
    "TokenStream",
    "Windows",
    "build_tokenizer",
    "compute_perplexity",
    "open_stream",
]

Paths = str | os.PathLike | Iterable[str | os.PathLike]  # of files, globs and directories


# ---------------------------------------------------------------------------------------------
# Token streams


def open_stream(
    data_mode: str,
    files: Paths,
    tokenizer: Tokenizer | None,
    max_tokens: int | None = None,
    add_eos: bool = True,
    token_dtype: str | None = None,
) -> TokenStream:
    """The TokenStream of `files` (a path, glob or directory, or a list of them).

    `max_tokens` keeps only the first so many tokens. `tokenizer` may be None for shards, which
    then have no `bos_id`; `add_eos` matters to text only, `token_dtype` to shards without a header.
    Text is encoded once, in memory, by each process that asks. Raises ValueError for whatever is
    wrong with the input.
    """
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, not {max_tokens}")
    bos_id = getattr(tokenizer, "bos_token_id", None)
    bos_id = getattr(tokenizer, "eos_token_id", None) if bos_id is None else bos_id
    if data_mode == "fineweb_npy":
        paths = _expand(files, (".npy", ".bin"))
        sources = [Source(str(path), *open_shard(path, token_dtype)) for path in paths]
        return TokenStream(sources, max_tokens, bos_id)
    if data_mode != "text":
        raise ValueError(f"data mode must be 'text' or 'fineweb_npy', not {data_mode!r}")
    if tokenizer is None:
        raise ValueError("text needs a tokenizer")
    if add_eos and tokenizer.eos_token_id is None:
        raise ValueError(
            f"tokenizer {tokenizer.name!r} has no end-of-text token to put after each document; "
            "set eos_token in its tokenizer_config.json"
        )
    sources, n_bytes, left = [], 0, max_tokens or float("inf")
    paths = _expand(files, (".txt", ".jsonl", ".ndjson", ".parquet"))
    total = sum(path.stat().st_size for path in paths)
    with progress(total, "tokenising", "B") as bar:
        bar.unit_scale = True
        for path in paths:
            if left > 0:
                tokens, size = _tokenise(path, tokenizer, add_eos, left, bar)
                sources.append(Source(str(path), tokens))
                n_bytes, left = n_bytes + size, left - len(tokens)
    whole = len(sources) == len(paths) and left >= 0
    return TokenStream(sources, max_tokens, bos_id, n_bytes if whole else None)


def _expand(files: Paths, suffixes: tuple[str, ...]) -> list[Path]:
    """The files that paths, globs and directories stand for, in order."""
    paths = []
    for spec in [files] if isinstance(files, str | os.PathLike) else files:
        spec = os.path.expanduser(os.fspath(spec))
        if os.path.isdir(spec):
            inside = (p for p in Path(spec).iterdir() if p.is_file())
            found = sorted(p for p in inside if suffix_of(p) in suffixes)
            if not found:
                raise ValueError(f"{spec}: the directory holds no {' or '.join(suffixes)} files")
        elif os.path.exists(spec):
            found = [Path(spec)]
        elif glob.has_magic(spec):
            found = sorted(Path(p) for p in glob.glob(spec, recursive=True) if os.path.isfile(p))
            if not found:
                raise ValueError(f"{spec}: no file matches this pattern")
        else:
            raise ValueError(f"{spec}: no such file")
        paths += found
    if not paths:
        raise ValueError("no data files were given")
    seen = set()
    for path in paths:
        real = os.path.realpath(path)
        if real in seen:
            raise ValueError(f"{path}: listed twice; its tokens would count double")
        seen.add(real)
        if not os.access(path, os.R_OK):
            raise ValueError(f"{path}: no permission to read it")
        require_file(path)
        if path.stat().st_size == 0:
            raise ValueError(f"{path}: the file is empty")
    return paths


def _tokenise(path: Path, tokenizer, add_eos: bool, limit: float, bar) -> tuple[np.ndarray, int]:
    """One file's tokens (at least `limit` of them, if it has so many) and its bytes of text."""
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    eos = np.array([tokenizer.eos_token_id] if add_eos else [], dtype=dtype)
    parts, n_tokens, n_bytes = [], 0, 0
    for group in text_groups(path, tokenizer.splits_at_newline):
        for (_, size, ends), ids in zip(
            group, tokenizer.encode_batch([text for text, *_ in group])
        ):
            parts += [ids.astype(dtype), eos] if ends else [ids.astype(dtype)]
            n_tokens, n_bytes = n_tokens + len(ids) + len(eos) * ends, n_bytes + size
        bar.update(sum(size for _, size, _ in group))
        if n_tokens > limit:
            break
    if n_tokens == 0:
        raise ValueError(f"{path}: holds no text")
    return np.concatenate(parts), n_bytes


# ---------------------------------------------------------------------------------------------
# Windows for evaluation


class Windows:
    """Windows of T tokens over a stream x of N, in which every target is scored exactly once.

    Window k has inputs x[s : s+T] and targets x[s+1 : s+T+1] with s = k·stride. It scores the
    targets that no earlier window reached: all T of them in the first, the last `stride` in the
    others, fewer in the last. So N - 1 targets are scored for any T and stride; N with `bos`, where
    the stream's BOS comes before x and the first token is scored too. A stride below T gives each
    target at least T - stride tokens of context (Hugging Face's and lm-eval's sliding window).
    mark: what parts documents, where no token is to see another one than its own.
    ValueError for a stride that would skip targets, and where there is nothing to score.
    """

    def __init__(
        self,
        n_tokens: int,
        seq_len: int,
        stride: int | None = None,
        bos: bool = False,
        mark: Mark | None = None,
    ):
        stride = seq_len if stride is None else stride
        if seq_len < 1 or not 1 <= stride <= seq_len:
            raise ValueError(
                f"need seq_len >= 1 and 1 <= stride <= seq_len, not seq_len {seq_len} and "
                f"stride {stride}: a larger stride would skip targets"
            )
        self.n_tokens, self.seq_len, self.stride, self.bos = n_tokens, seq_len, stride, bool(bos)
        self.mark = mark
        self.n_targets = n_tokens - 1 + self.bos
        if self.n_targets < 1:
            raise ValueError(
                f"the data has {n_tokens} token(s), so there is nothing to score; "
                "give more text, or score the first token as well with --bos"
            )
        after_the_first = max(0, self.n_targets - seq_len)
        self.n_windows = 1 + -(-after_the_first // stride)

    def __len__(self) -> int:
        return self.n_windows

    def _scored_columns(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Each window scores its columns low … high - 1; a dummy none."""
        low = np.where(ids > 0, self.seq_len - self.stride, 0)
        high = np.minimum(self.seq_len, self.n_targets - ids * self.stride)
        return low, np.where(ids < 0, 0, high)

    def target_span(self, ids: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Stream positions (first, last) [B] of the targets that the windows `ids` [B] score."""
        ids = np.asarray(ids, dtype=np.int64)
        low, high = self._scored_columns(ids)
        start = ids * self.stride - self.bos
        return start + 1 + low, start + high

    def in_order(self, values: np.ndarray) -> np.ndarray:
        """[n_targets], in the order of the stream: of values [n_windows, T] those that count."""
        first, last = self.target_span(np.arange(len(self)))
        window = np.repeat(np.arange(len(self)), last - first + 1)
        position = np.arange(first[0], last[-1] + 1)
        return values[window, position - 1 - (window * self.stride - self.bos)]

    def batch(self, stream: TokenStream, ids: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """The windows `ids` [B] as numpy arrays; id -1 is a dummy row in which nothing is scored.

        input_ids [B, T] int64, 0 where the stream has ended; targets [B, T] int64, -100 where not
        scored; first_target [B] int64, the stream position of target 0 of each row (of target j:
        first_target + j); n_scored [B] int64; with a mark starts [B, T] int64, the column
        in which each token's document begins.
        """
        assert len(stream) == self.n_tokens, (len(stream), self.n_tokens)
        ids = np.asarray(ids, dtype=np.int64)
        assert ids.size == 0 or (-1 <= ids.min() and ids.max() < len(self)), (ids, len(self))
        T, dummy = self.seq_len, ids < 0
        starts = ids * self.stride - self.bos  # position of input 0; -1 is BOS
        rows = stream.rows(np.where(dummy, self.n_tokens, np.maximum(starts, 0)), T + 1)
        if self.bos:
            if stream.bos_id is None:
                raise ValueError("--bos needs a tokenizer with a BOS or an end-of-text token")
            first = ids == 0
            rows[first, 1:] = rows[first, :-1]
            rows[first, 0] = stream.bos_id
        low, high = self._scored_columns(ids)
        targets = rows[:, 1:].copy()
        if low.any() or (high < T).any():
            column = np.arange(T)
            targets[(column < low[:, None]) | (column >= high[:, None])] = IGNORE
        return {
            "input_ids": np.ascontiguousarray(rows[:, :T]),
            "targets": targets,
            "first_target": np.where(dummy, 0, starts + 1),
            "n_scored": np.maximum(high - low, 0),
        } | ({} if self.mark is None else {"starts": starts_in_rows(rows[:, :T], self.mark)})


class RandomWindows:
    """rosetrainer's sampled windows, so that old numbers can be compared: N//T starts drawn by
    `random.Random(seed).sample`, T tokens each, of which T - 1 targets are scored. They overlap:
    about 63% of the tokens are covered. rosetrainer's figure is the mean over windows."""

    mark = None  # documents are not told apart

    def __init__(self, n_tokens: int, seq_len: int, seed: int | None):
        if seq_len < 2 or n_tokens < seq_len:
            raise ValueError(
                f"random windows need 2 <= seq_len <= tokens, not seq_len {seq_len} and "
                f"{n_tokens} tokens; lower --seq-len or give more data"
            )
        self.n_tokens, self.seq_len = n_tokens, seq_len
        possible = n_tokens - seq_len + 1
        count = min(n_tokens // seq_len, possible)
        self.starts = np.array(random.Random(seed).sample(range(possible), count), dtype=np.int64)
        self.n_targets = count * (seq_len - 1)

    def __len__(self) -> int:
        return len(self.starts)

    def target_span(self, ids: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As Windows.target_span."""
        starts = self.starts[np.asarray(ids)]
        return starts + 1, starts + self.seq_len - 1

    def batch(self, stream: TokenStream, ids: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """As Windows.batch; the last column of `targets` is -100 in every row."""
        assert len(stream) == self.n_tokens, (len(stream), self.n_tokens)
        ids = np.asarray(ids, dtype=np.int64)
        assert ids.size == 0 or (-1 <= ids.min() and ids.max() < len(self)), (ids, len(self))
        dummy = ids < 0
        starts = np.where(dummy, self.n_tokens, self.starts[ids])  # beyond the end: zeros
        input_ids = stream.rows(starts, self.seq_len)
        targets = np.full_like(input_ids, IGNORE)
        targets[~dummy, :-1] = input_ids[~dummy, 1:]
        return {
            "input_ids": input_ids,
            "targets": targets,
            "first_target": np.where(dummy, 0, starts + 1),
            "n_scored": np.where(dummy, 0, self.seq_len - 1),
        }


# ---------------------------------------------------------------------------------------------
# rosetrainer's functions. No script here calls them: they stay for code written against it


class _StreamDataset(Dataset):
    """Items `input_ids`, `labels`, `attention_mask`, each int64 [T]: the windows of a stream that
    begin at `starts`. `labels` equals `input_ids`; the model shifts."""

    def __init__(self, stream: TokenStream, starts: np.ndarray, seq_len: int):
        self.stream, self.starts, self.seq_len = stream, starts, seq_len

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        start = int(self.starts[index])
        ids = torch.from_numpy(self.stream.read(start, start + self.seq_len))
        return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}


class TextDatasetForCausalLM(_StreamDataset):
    """Windows over text files. Without a seed each process draws its own."""

    def __init__(
        self,
        file_paths: Paths,
        tokenizer: Tokenizer,
        seq_len: int,
        add_eos: bool = True,
        max_tokens: int | None = None,
        seed: int | None = None,
    ):
        stream = open_stream("text", file_paths, tokenizer, max_tokens, add_eos)
        super().__init__(stream, RandomWindows(len(stream), seq_len, seed).starts, seq_len)


class FineWebNPYDataset(_StreamDataset):
    """The same over shards. `random_start=False` takes the N//T disjoint windows in order."""

    def __init__(
        self,
        file_paths: Paths,
        seq_len: int,
        max_tokens: int | None = None,
        seed: int | None = None,
        random_start: bool = True,
    ):
        stream = open_stream("fineweb_npy", file_paths, None, max_tokens)
        windows = RandomWindows(len(stream), seq_len, seed)
        starts = windows.starts if random_start else np.arange(len(windows)) * seq_len
        super().__init__(stream, starts, seq_len)


@torch.no_grad()
def compute_perplexity(
    model: GPTModel, dataloader: Iterable[dict[str, torch.Tensor]], device: torch.device | str
) -> dict[str, float]:
    """Loss and perplexity over a DataLoader of such items, by a model of model.py.

    Each batch has `input_ids` [B, T], `labels` [B, T] (shifted here; -100 left out) and, if padded,
    `attention_mask` [B, T] (0 left out). Returns avg_loss (nats per scored token), ppl and tokens.
    """
    nll: torch.Tensor | float = 0.0
    tokens: torch.Tensor | int = 0
    for batch in dataloader:
        ids, labels = batch["input_ids"].to(device), batch["labels"].to(device)
        if batch.get("attention_mask") is not None:
            labels = labels.masked_fill(batch["attention_mask"].to(device) == 0, IGNORE)
        targets = torch.full_like(labels, IGNORE)
        targets[:, :-1] = labels[:, 1:]
        hidden = model.hidden(ids).flatten(0, 1).split(CHUNK_TOKENS)  # all logits would not fit
        chunks = zip(hidden, targets.flatten().split(CHUNK_TOKENS))
        nll += torch.cat([model.nll(h, t) for h, t in chunks]).double().sum()
        tokens += (targets != IGNORE).sum()
    if not int(tokens):
        raise ValueError("the data has no token to score: a window needs at least two tokens")
    loss = float(nll) / int(tokens)
    return {"avg_loss": loss, "ppl": math.exp(min(loss, 700.0)), "tokens": int(tokens)}
