"""Token streams, windows over them, and the batches that training takes from them.

    from dataset import Windows, build_tokenizer, open_stream
    tokenizer = build_tokenizer("gpt2")
    stream = open_stream("text", ["data/val/*.txt"], tokenizer)      # or "fineweb_npy", shards
    windows = Windows(len(stream), seq_len=1024)
    batch = windows.batch(stream, [0, 1, 2, 3])                      # numpy, see Windows.batch

Data modes:
- `text`: UTF-8 files, globs or directories (their *.txt and *.jsonl). A `.jsonl` file holds one
  document a line in its `text` field; every other file is one document. The end-of-text token
  follows each document, so each file as in rosetrainer. Bytes are taken as they are: no newline
  translation, no stripping, no byte-order mark removed.
- `fineweb_npy`: shards of token ids, memory-mapped. `.npy` 1-D uint16 or uint32 (FineWeb's layout),
  nanoGPT's raw uint16 `.bin`, and llm.c's `.bin` (known by its header). The files already hold
  their end-of-text tokens.
Several files are one stream, in the order given; what a glob or a directory finds is sorted.
Every file that cannot be used raises ValueError in one line naming it and what would help.
"""

import functools
import glob
import hashlib
import os
import random
import tokenize
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from cli import progress
from durable import decode_utf8, read_jsonl, refuse_impostor
from gpu_kernels.cross_entropy import IGNORE
from tokenizer import SAFE_BREAK, build_tokenizer, utf8_bytes

__all__ = [
    "FineWebNPYDataset",
    "RandomWindows",
    "TextDatasetForCausalLM",
    "TokenStream",
    "TrainBatches",
    "Windows",
    "build_tokenizer",
    "open_stream",
]

CHUNK_BYTES = 2**20  # text is encoded in pieces of about this size …
GROUP_BYTES = 2**23  # … this much at a time, spread over threads
BLOCK_TOKENS = 2**22  # unit of scans over a whole stream
FULL_HASH_TOKENS = 2**28  # streams up to this length are hashed whole: about a second
# llm.c's headers: magic number -> (version, dtype)
LLMC_HEADERS = {20240520: (1, "<u2"), 20240801: (7, "<u4")}


# ---------------------------------------------------------------------------------------------
# Token streams


@dataclass(frozen=True)
class Source:
    """One file's tokens. `offset` is where they start in a mapped file, None if held in memory."""

    name: str
    tokens: np.ndarray
    offset: int | None = None

    def blocks(self):
        """The tokens in order, in blocks. Mapped files are read, not paged in: scanning a shard
        through its mapping would count as the process's memory."""
        for start in range(0, len(self.tokens), BLOCK_TOKENS):
            count = min(BLOCK_TOKENS, len(self.tokens) - start)
            if self.offset is None:
                yield self.tokens[start : start + count]
            else:
                dtype = self.tokens.dtype
                offset = self.offset + start * dtype.itemsize
                yield np.fromfile(self.name, dtype=dtype, count=count, offset=offset)


class TokenStream:
    """Several sources as one read-only sequence of N token ids.

    `file_starts` [files + 1] int64: the position of each file's first token, then N; the file that
    holds position p is `searchsorted(file_starts, p, "right") - 1`. `file_names`: their paths.
    `n_text_bytes`: UTF-8 bytes of the text, None where unknown (shards, or cut by max_tokens).
    `bos_id`: what `Windows(…, bos=True)` puts before the first token.
    """

    def __init__(self, sources, max_tokens=None, bos_id=None, n_text_bytes=None):
        assert sources, "a stream needs a source"
        self.sources, left = [], float("inf") if max_tokens is None else max_tokens
        for source in sources:
            if left > 0:
                tokens = source.tokens[: int(min(left, len(source.tokens)))]
                self.sources.append(Source(source.name, tokens, source.offset))
                left -= len(tokens)
        lengths = [len(source.tokens) for source in self.sources]
        self.file_starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self.file_names = [source.name for source in self.sources]
        self.bos_id, self.n_text_bytes = bos_id, n_text_bytes

    def __len__(self):
        return int(self.file_starts[-1])

    def split(self, ratio):
        """(all but the last `ratio` of the tokens, the rest) as two streams."""
        if not 0 < ratio < 1:
            raise ValueError(f"the share to hold out must lie between 0 and 1, not {ratio}")
        cut = len(self) - max(1, int(len(self) * ratio))
        if cut < 1:
            raise ValueError(f"{len(self)} token(s) are too few to hold some out; give more data")
        head, tail = [], []
        for source, start in zip(self.sources, self.file_starts.tolist()):
            n = min(max(cut - start, 0), len(source.tokens))
            itemsize = source.tokens.dtype.itemsize
            offset = None if source.offset is None else source.offset + n * itemsize
            head += [Source(source.name, source.tokens[:n], source.offset)] if n else []
            if n < len(source.tokens):
                tail.append(Source(source.name, source.tokens[n:], offset))
        return TokenStream(head, bos_id=self.bos_id), TokenStream(tail, bos_id=self.bos_id)

    def read(self, start, end):
        """Token ids start … end - 1, int64 [end - start]."""
        assert 0 <= start <= end <= len(self), (start, end, len(self))
        return self.rows(np.array([start]), end - start)[0]

    def rows(self, starts, length):
        """Token ids [B, length] int64 from each of the positions `starts` [B]; 0 beyond the end."""
        out = np.zeros((len(starts), length), dtype=np.int64)
        files = np.searchsorted(self.file_starts, starts, side="right") - 1
        offsets = starts - self.file_starts[files]
        for row, file, offset in zip(out, files.tolist(), offsets.tolist()):
            filled = 0
            while filled < length and file < len(self.sources):
                piece = self.sources[file].tokens[offset : offset + length - filled]
                row[filled : filled + len(piece)] = piece
                filled, file, offset = filled + len(piece), file + 1, 0
        return out

    @functools.cached_property
    def _file_max(self):
        return [int(max(block.max() for block in source.blocks())) for source in self.sources]

    def max_token_id(self):
        """The largest id, from one scan of the whole stream (memory speed; remembered)."""
        return max(self._file_max)

    def check_vocab(self, vocab_size):
        """Raise ValueError, naming the file, if an id does not fit a vocabulary of `vocab_size`.

        Costs nothing where the files' dtype cannot hold such an id, else one scan."""
        if all(np.iinfo(source.tokens.dtype).max < vocab_size for source in self.sources):
            return
        for name, largest in zip(self.file_names, self._file_max):
            if largest >= vocab_size:
                raise ValueError(
                    f"{name}: holds token id {largest}, but the vocabulary has {vocab_size} ids "
                    f"(0…{vocab_size - 1}); it was made with another tokenizer than the model's"
                )

    @functools.cached_property
    def fingerprint(self):
        """A hash of the token sequence, the same however it is cut into files and stored.

        Up to 2^28 tokens `sha256:…` of them all, as little-endian uint32. Beyond that
        `sampled:…`, over the length and 256 evenly spaced blocks of 2^16 tokens, first and last
        included: it tells other data from this, not one changed token; `full_fingerprint` does.
        """
        if len(self) <= FULL_HASH_TOKENS:
            return self.full_fingerprint()
        digest, size = hashlib.sha256(b"%d" % len(self)), 2**16
        for start in np.linspace(0, len(self) - size, 256).astype(np.int64).tolist():
            digest.update(self.read(start, start + size).astype("<u4"))
        return "sampled:" + digest.hexdigest()

    def full_fingerprint(self):
        """`sha256:…` of every token, whatever the length: about a second per 2^28 tokens."""
        digest = hashlib.sha256()
        for source in self.sources:
            for block in source.blocks():
                digest.update(np.ascontiguousarray(block, dtype="<u4"))
        return "sha256:" + digest.hexdigest()


def open_stream(data_mode, files, tokenizer, max_tokens=None, add_eos=True):
    """The TokenStream of `files` (a path, glob or directory, or a list of them).

    `max_tokens` keeps only the first so many tokens. `tokenizer` may be None for shards, which
    then have no `bos_id`; `add_eos` matters to text only. Text is encoded once, in memory, by each
    process that asks. Raises ValueError for whatever is wrong with the input.
    """
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, not {max_tokens}")
    bos_id = getattr(tokenizer, "bos_token_id", None)
    bos_id = getattr(tokenizer, "eos_token_id", None) if bos_id is None else bos_id
    if data_mode == "fineweb_npy":
        sources = [_open_shard(path) for path in _expand(files, (".npy", ".bin"))]
        return TokenStream(sources, max_tokens, bos_id)
    if data_mode != "text":
        raise ValueError(f"data mode must be 'text' or 'fineweb_npy', not {data_mode!r}")
    if add_eos and tokenizer.eos_token_id is None:
        raise ValueError(
            f"tokenizer {tokenizer.name!r} has no end-of-text token to put after each document; "
            "set eos_token in its tokenizer_config.json"
        )
    sources, n_bytes, left = [], 0, max_tokens or float("inf")
    paths = _expand(files, (".txt", ".jsonl"))
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


def _expand(files, suffixes):
    """The files that paths, globs and directories stand for, in order."""
    paths = []
    for spec in [files] if isinstance(files, str | os.PathLike) else files:
        spec = os.path.expanduser(os.fspath(spec))
        if os.path.isdir(spec):
            found = sorted(p for p in Path(spec).iterdir() if p.suffix in suffixes and p.is_file())
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
        if path.is_file() and path.stat().st_size == 0:
            raise ValueError(f"{path}: the file is empty")
    return paths


# ---------------------------------------------------------------------------------------------
# Text


def _tokenise(path, tokenizer, add_eos, limit, bar):
    """One file's tokens (at least `limit` of them, if it has so many) and its bytes of text."""
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    eos = np.array([tokenizer.eos_token_id] if add_eos else [], dtype=dtype)
    parts, n_tokens, n_bytes = [], 0, 0
    for group in _groups(_text_pieces(path, tokenizer.splits_at_newline)):
        for (_, size, last), ids in zip(group, tokenizer.encode_batch([g[0] for g in group])):
            parts += [ids.astype(dtype), eos] if last else [ids.astype(dtype)]
            n_tokens, n_bytes = n_tokens + len(ids) + len(eos) * last, n_bytes + size
        bar.update(sum(size for _, size, _ in group))
        if n_tokens > limit:
            break
    if n_tokens == 0:
        raise ValueError(f"{path}: holds no text")
    return np.concatenate(parts), n_bytes


def _text_pieces(path, may_split):
    """(text, bytes, whether a document ends here) for all pieces of a file, in order."""
    if path.suffix in (".npy", ".bin"):
        raise ValueError(f"{path}: holds token ids, not text; use --data-mode fineweb_npy")
    if path.suffix == ".jsonl":
        yield from _jsonl_documents(path)
        return
    data = path.read_bytes()
    start = 0
    while start < len(data):
        cut = SAFE_BREAK.search(data, start + CHUNK_BYTES) if may_split else None
        end = cut.end() if cut else len(data)
        yield decode_utf8(data[start:end], path, start), end - start, end == len(data)
        start = end


def _jsonl_documents(path):
    for where, _, record in read_jsonl(path):
        document = record.get("text")
        if not isinstance(document, str):
            raise ValueError(f'{where}: needs {{"text": "…"}}, a string in that field')
        valid = utf8_bytes(document)
        yield valid.decode(), len(valid), True


def _groups(pieces):
    """Lists of pieces of about GROUP_BYTES each."""
    group, size = [], 0
    for piece in pieces:
        group.append(piece)
        size += piece[1]
        if size >= GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


# ---------------------------------------------------------------------------------------------
# Shards


def _open_shard(path):
    """A Source over a memory-mapped shard; nothing but its header is read."""
    refuse_impostor(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(6)
    if path.suffix == ".bin":
        dtype, n, offset = _bin_layout(path, size)
    elif path.suffix == ".npy" or start.startswith(b"\x93NUMPY"):
        dtype, n, offset = _npy_layout(path)
    else:
        raise ValueError(f"{path}: is neither .npy nor .bin; for text files use --data-mode text")
    expected = offset + n * dtype.itemsize
    if size != expected:
        state = "truncated or still being written" if size < expected else "damaged"
        raise ValueError(
            f"{path}: {state}: its header promises {n} tokens, {expected} bytes in all, but the "
            f"file has {size}"
        )
    tokens = np.asarray(np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(n,)))
    return Source(str(path), tokens, offset)


def _npy_layout(path):
    """(dtype, tokens, offset of the first) from a .npy header. Never unpickles."""
    form = np.lib.format
    with path.open("rb") as file:
        try:
            version = form.read_magic(file)
            if version not in ((1, 0), (2, 0)):
                raise ValueError(f"format version {version} is not 1.0 or 2.0")
            read_header = {1: form.read_array_header_1_0, 2: form.read_array_header_2_0}[version[0]]
            shape, _, dtype = read_header(file)
        except (ValueError, SyntaxError, TypeError, tokenize.TokenError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"{path}: not a .npy array ({reason}); save one with np.save(path, ids)"
            ) from None
        offset = file.tell()
    if dtype.hasobject:
        raise ValueError(f"{path}: holds pickled objects, which are never loaded; {_HOW_TO_SAVE}")
    if len(shape) != 1:
        raise ValueError(f"{path}: has shape {shape}, but token ids are 1-D; {_HOW_TO_SAVE}")
    if dtype.kind != "u" or dtype.itemsize not in (2, 4):
        raise ValueError(f"{path}: has dtype {dtype}, not uint16 or uint32; {_HOW_TO_SAVE}")
    if shape[0] < 1:
        raise ValueError(f"{path}: holds no tokens")
    return dtype, shape[0], offset


_HOW_TO_SAVE = "save it with np.save(path, ids.astype(np.uint16).ravel())"


def _bin_layout(path, size):
    """(dtype, tokens, offset of the first): llm.c's by its magic number, else nanoGPT's."""
    header = np.fromfile(path, dtype="<i4", count=256)
    if len(header) == 256 and int(header[0]) in LLMC_HEADERS:
        version, dtype = LLMC_HEADERS[int(header[0])]
        if header[1] != version:
            raise ValueError(f"{path}: llm.c data of version {header[1]}, known is {version}")
        if header[2] < 1:
            raise ValueError(f"{path}: its header promises {header[2]} tokens")
        return np.dtype(dtype), int(header[2]), 1024
    if size % 2:
        raise ValueError(f"{path}: truncated or not raw uint16: it has {size} bytes, an odd number")
    return np.dtype("<u2"), size // 2, 0


# ---------------------------------------------------------------------------------------------
# Windows for evaluation


class Windows:
    """Windows of T tokens over a stream x of N, in which every target is scored exactly once.

    Window k has inputs x[s : s+T] and targets x[s+1 : s+T+1] with s = k·stride. It scores the
    targets that no earlier window reached: all T of them in the first, the last `stride` in the
    others, fewer in the last. So N - 1 targets are scored for any T and stride; N with `bos`, where
    the stream's BOS comes before x and the first token is scored too. A stride below T gives each
    target at least T - stride tokens of context (Hugging Face's and lm-eval's sliding window).
    """

    def __init__(self, n_tokens, seq_len, stride=None, bos=False):
        stride = seq_len if stride is None else stride
        if seq_len < 1 or not 1 <= stride <= seq_len:
            raise ValueError(
                f"need seq_len >= 1 and 1 <= stride <= seq_len, not seq_len {seq_len} and "
                f"stride {stride}: a larger stride would skip targets"
            )
        self.n_tokens, self.seq_len, self.stride, self.bos = n_tokens, seq_len, stride, bool(bos)
        self.n_targets = n_tokens - 1 + self.bos
        if self.n_targets < 1:
            raise ValueError(
                f"the data has {n_tokens} token(s), so there is nothing to score; "
                "give more text, or score the first token as well with --bos"
            )
        self._n = 1 + max(0, -(-(self.n_targets - seq_len) // stride))

    def __len__(self):
        return self._n

    def _scored_columns(self, ids):
        """Each window scores its columns low … high - 1; a dummy none."""
        low = np.where(ids > 0, self.seq_len - self.stride, 0)
        high = np.minimum(self.seq_len, self.n_targets - ids * self.stride)
        return low, np.where(ids < 0, 0, high)

    def target_span(self, ids):
        """Stream positions (first, last) [B] of the targets that the windows `ids` [B] score."""
        ids = np.asarray(ids, dtype=np.int64)
        low, high = self._scored_columns(ids)
        start = ids * self.stride - self.bos
        return start + 1 + low, start + high

    def batch(self, stream, ids):
        """The windows `ids` [B] as numpy arrays; id -1 is a dummy row in which nothing is scored.

        input_ids [B, T] int64, 0 where the stream has ended; targets [B, T] int64, -100 where not
        scored; first_target [B] int64, the stream position of target 0 of each row (of target j:
        first_target + j); n_scored [B] int64.
        """
        assert len(stream) == self.n_tokens, (len(stream), self.n_tokens)
        ids = np.asarray(ids, dtype=np.int64)
        assert ids.size == 0 or (-1 <= ids.min() and ids.max() < self._n), (ids, self._n)
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
        }


class RandomWindows:
    """rosetrainer's sampled windows, so that old numbers can be compared: N//T starts drawn by
    `random.Random(seed).sample`, T tokens each, of which T - 1 targets are scored. They overlap:
    about 63% of the tokens are covered. rosetrainer's figure is the mean over windows."""

    def __init__(self, n_tokens, seq_len, seed):
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

    def __len__(self):
        return len(self.starts)

    def target_span(self, ids):
        """As Windows.target_span."""
        starts = self.starts[np.asarray(ids)]
        return starts + 1, starts + self.seq_len - 1

    def batch(self, stream, ids):
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
# rosetrainer's torch datasets


class TextDatasetForCausalLM(Dataset):
    """rosetrainer's windows over text files: items `input_ids`, `labels`, `attention_mask`, each
    int64 [T]. `labels` equals `input_ids`; the model shifts. Without a seed each process draws its
    own windows."""

    def __init__(self, file_paths, tokenizer, seq_len, add_eos=True, max_tokens=None, seed=None):
        self.stream = open_stream("text", file_paths, tokenizer, max_tokens, add_eos)
        self.starts = RandomWindows(len(self.stream), seq_len, seed).starts
        self.seq_len = seq_len

    def __len__(self):
        return len(self.starts)

    def __getitem__(self, index):
        return _item(self.stream, self.starts[index], self.seq_len)


class FineWebNPYDataset(Dataset):
    """The same over shards. `random_start=False` takes the N//T disjoint windows in order."""

    def __init__(self, file_paths, seq_len, max_tokens=None, seed=None, random_start=True):
        self.stream = open_stream("fineweb_npy", file_paths, None, max_tokens)
        windows = RandomWindows(len(self.stream), seq_len, seed)
        self.starts = windows.starts if random_start else np.arange(len(windows)) * seq_len
        self.seq_len = seq_len

    def __len__(self):
        return len(self.starts)

    def __getitem__(self, index):
        return _item(self.stream, self.starts[index], self.seq_len)


def _item(stream, start, seq_len):
    ids = torch.from_numpy(stream.read(int(start), int(start) + seq_len))
    return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}


# ---------------------------------------------------------------------------------------------
# Batches for training


class TrainBatches:
    """Which windows each training step sees: a pure function of the step, so a run resumes exactly
    with no state but its step number.

    An epoch visits the (N-1)//T disjoint windows once, in an order drawn from (seed, epoch). Step
    `i` takes the next `batch_size` windows of that endless sequence of epochs: the same ones at any
    world size and any accumulation; only who computes which differs.
    """

    def __init__(self, n_tokens, seq_len, batch_size, seed, grad_accum_steps=1):
        """`batch_size`: windows per optimizer step, over all ranks and accumulation steps."""
        self.n_tokens, self.seq_len = n_tokens, seq_len
        self.batch_size, self.seed, self.grad_accum_steps = batch_size, seed, grad_accum_steps
        self.n_windows = (n_tokens - 1) // seq_len
        if self.n_windows < 1:
            raise ValueError(
                f"the training data has {n_tokens} tokens, but one window needs seq_len + 1 = "
                f"{seq_len + 1}; lower --seq-len or give more data"
            )
        if not 0 <= seed < 2**32:
            raise ValueError(f"the seed must lie in 0…2^32 - 1, not {seed}")
        self._order = functools.lru_cache(maxsize=2)(self._draw_order)

    def epoch(self, step):
        """The epoch, as a fraction, that `step` begins in."""
        return step * self.batch_size / self.n_windows

    def batch(self, stream, step, rank=0, world_size=1, micro_step=0):
        """(inputs, targets) of one rank's micro-batch, each int64 [B, T] with
        B = batch_size / (world_size * grad_accum_steps)."""
        assert len(stream) == self.n_tokens, (len(stream), self.n_tokens)
        assert 0 <= rank < world_size and 0 <= micro_step < self.grad_accum_steps, (
            (rank, world_size),
            (micro_step, self.grad_accum_steps),
        )
        B, rest = divmod(self.batch_size, world_size * self.grad_accum_steps)
        if rest or B < 1:
            raise ValueError(
                f"the global batch of {self.batch_size} windows does not divide by {world_size} "
                f"ranks x {self.grad_accum_steps} accumulation steps"
            )
        first = step * self.batch_size + (micro_step * world_size + rank) * B
        starts = self._windows(first, B) * self.seq_len
        rows = stream.rows(starts, self.seq_len + 1)
        return np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:])

    def _windows(self, first, count):
        """Windows number first … first + count - 1 of the endless sequence of epochs."""
        epochs, places = np.divmod(np.arange(first, first + count), self.n_windows)
        windows = np.empty(count, dtype=np.int64)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            here = epochs == epoch
            windows[here] = self._order(epoch)[places[here]]
        return windows

    def _draw_order(self, epoch):
        # RandomState, whose numbers NumPy has frozen (NEP 19): a run resumed on a newer NumPy sees
        # the same order. A million windows take about 10 ms, once an epoch.
        return np.random.RandomState([self.seed, epoch]).permutation(self.n_windows)
