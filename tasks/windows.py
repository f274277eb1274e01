"""The windows that published perplexities are measured with, beside dataset.Windows, which lose
nothing: their figures are comparable with tables alone.

    chunks = Chunks("gptq", len(stream), seq_len=2048, bos=tokenizer.adds_bos)

gptq       the text tokenised once, BOS at its very start where the tokenizer puts one; chunks of
           2,048 tokens side by side, the tail dropped, each with fresh context, so that its first
           token is not scored; the mean of the chunks' means (IST-DASLab/gptq: datautils.py,
           llama.py; so do AWQ, OmniQuant and llmc). WikiText-2 is then its rows, "\\n\\n" between.
llama.cpp  chunks of 512 tokens side by side, the tail dropped; BOS takes the place of each chunk's
           first token where the model wants one; of each only the second half is scored, from
           position 257 on (tools/perplexity). Two chunks at least.
"""

from collections.abc import Sequence

import numpy as np

from formats.tokens import TokenStream

LENGTHS = {"gptq": 2048, "llama.cpp": 512}


class Chunks:
    """Whole chunks of T tokens, for backends' score_windows as dataset.Windows. bos: whether the
    stream's BOS comes first. ValueError where the data has too few tokens."""

    mark = None  # documents are not told apart

    def __init__(self, kind: str, n_tokens: int, seq_len: int, bos: bool):
        assert kind in LENGTHS, f"{kind} is none of {LENGTHS}"
        self.halves = kind == "llama.cpp"
        self.n_tokens, self.seq_len, self.bos = n_tokens, seq_len, bool(bos)
        self.n_windows, least = (n_tokens + self.bos) // seq_len, 2 if self.halves else 1
        self.first = seq_len // 2 if self.halves else 0  # column of the first target
        if seq_len - 1 <= self.first or self.n_windows < least:
            raise ValueError(
                f"--windows {kind} needs {least} chunk(s) of --seq-len {seq_len} tokens, of which "
                f"the data has {n_tokens}: give more text, or shorter chunks"
            )
        self.n_targets = self.n_windows * (seq_len - 1 - self.first)

    def __len__(self) -> int:
        return self.n_windows

    def target_span(self, ids: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As dataset.Windows.target_span."""
        start = np.asarray(ids, dtype=np.int64) * self.seq_len - self.bos
        return start + 1 + self.first, start + self.seq_len - 1

    def batch(self, stream: TokenStream, ids: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """As dataset.Windows.batch; the last column of `targets` is -100 in every row."""
        from gpu_kernels.cross_entropy import IGNORE  # which loads torch

        ids = np.asarray(ids, dtype=np.int64)
        assert ids.size == 0 or (-1 <= ids.min() and ids.max() < len(self)), (ids, len(self))
        T, dummy = self.seq_len, ids < 0
        starts = ids * T - self.bos  # -1: BOS
        rows = stream.rows(np.where(dummy, self.n_tokens, np.maximum(starts, 0)), T)
        if self.bos:
            if stream.bos_id is None:
                raise ValueError("--windows: the tokenizer has no BOS to put first")
            rows[ids == 0, 1:] = rows[ids == 0, :-1]
            rows[~dummy if self.halves else ids == 0, 0] = stream.bos_id
        targets = np.full_like(rows, IGNORE)
        targets[~dummy, self.first : -1] = rows[~dummy, self.first + 1 :]
        return {
            "input_ids": rows,
            "targets": targets,
            "first_target": np.where(dummy, 0, starts + 1),
            "n_scored": np.where(dummy, 0, T - 1 - self.first),
        }
