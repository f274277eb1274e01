"""The next token of every row: what is kept of its logits, and random numbers by counter.

    tokens = sample_tokens(logits, keys, position, columns)           # [B] of logits [B, V]

A row's randomness is a function of (seed, key of its prompt, sample index, position), whatever its
neighbours are: no state is kept, and the bits are the same on every device. To add a parameter of
sampling: a field and its check in backends.Sampling, a column here, its lines in sample_plainly and
in gpu_kernels/token_sampling.py, which is the same in one kernel.

Shapes: B rows, V vocabulary
"""

import hashlib
from collections.abc import Iterable, Mapping

import numpy as np
import torch

from backends import Sampling
from gpu_kernels import token_sampling

# The parameters that the device knows of each row, by their names in Sampling: the type of the
# column [B], and the value at which the parameter does nothing
COLUMNS = {
    "temperature": (torch.float32, 0.0),
    "top_p": (torch.float32, 1.0),
    "top_k": (torch.int32, 0),
}
Pair = tuple[torch.Tensor, torch.Tensor]


def features_of(samplings: Iterable[Sampling]) -> frozenset[str]:
    """The columns that any of these needs: those at their idle value, and all of a greedy row's,
    cost a step nothing."""
    drawn = [s for s in samplings if s.temperature > 0]
    return frozenset(
        name for name, (_, idle) in COLUMNS.items() if any(getattr(s, name) != idle for s in drawn)
    )


def threefry(key: Pair, counter: Pair, rounds: int = 13) -> Pair:
    """Threefry-2x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

    key, counter: pairs of int32 tensors that broadcast. Returns two int32 tensors of random bits;
    13 rounds are the fewest that pass every test of the paper. Integer arithmetic wraps, so the
    bits are the same on every device.
    """
    keys = (*key, key[0] ^ key[1] ^ 0x1BD11BDA)
    a, b = counter[0] + keys[0], counter[1] + keys[1]
    for i in range(rounds):
        turn = (13, 15, 26, 6, 17, 29, 16, 24)[i % 8]
        a = a + b
        b = ((b << turn) | ((b >> (32 - turn)) & ((1 << turn) - 1))) ^ a
        if i % 4 == 3:
            n = i // 4 + 1
            a, b = a + keys[n % 3], b + keys[(n + 1) % 3] + n
    return a, b


def gumbel_noise(keys: torch.Tensor, position: torch.Tensor, V: int) -> torch.Tensor:
    """Standard Gumbel noise [B, V] of token `position` [B] in the streams with keys [B, 2]."""
    token = torch.arange((V + 1) // 2, dtype=torch.int32, device=keys.device)
    bits = torch.cat(threefry((keys[:, :1], keys[:, 1:]), (position[:, None], token[None])), dim=1)
    uniform = ((bits[:, :V].long() & 0xFFFFFFFF).float() + 0.5) * 2.0**-32
    # the largest noise comes from the smallest numbers, of which float32 has plenty
    return -torch.log(-torch.log1p(-uniform.clamp(max=1 - 2.0**-24)))


def sample_tokens(
    logits: torch.Tensor,
    keys: torch.Tensor,
    position: torch.Tensor,
    columns: Mapping[str, torch.Tensor],
    features: frozenset[str] = frozenset(COLUMNS),
) -> torch.Tensor:
    """The next token [B] int64 of each row of logits [B, V].

    keys [B, 2] int32 and position [B] int32: where in which random stream. columns: COLUMNS' names,
    each [B]. temperature 0 takes the likeliest token, the first of equals. top_k keeps the k
    likeliest; top_p then keeps the fewest likeliest tokens whose share reaches it. Tokens equal to
    the last one kept are kept too. features: the columns that any row needs.
    """
    if logits.is_cuda and "temperature" in features:
        parameters = columns["temperature"], columns["top_p"], columns["top_k"]
        wanted = "top_p" in features, "top_k" in features
        return token_sampling.sample(logits, keys, position, parameters, wanted)
    return sample_plainly(logits, keys, position, columns, features)


def sample_plainly(
    logits: torch.Tensor,
    keys: torch.Tensor,
    position: torch.Tensor,
    columns: Mapping[str, torch.Tensor],
    features: frozenset[str] = frozenset(COLUMNS),
) -> torch.Tensor:
    """`sample_tokens` in plain operations."""
    values = logits.float()
    if "temperature" not in features:
        return values.argmax(dim=-1)
    temperature, top_p, top_k = columns["temperature"], columns["top_p"], columns["top_k"]
    greedy = (temperature == 0)[:, None]
    scaled = (values - values.amax(dim=-1, keepdim=True)) / torch.where(
        greedy, 1.0, temperature[:, None]
    )
    bits = values.view(torch.int32)
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # sorts as the values do
    precision = {torch.bfloat16: 16, torch.float16: 19}.get(logits.dtype, 32)
    lowest = torch.full_like(top_k, -(2**31))[:, None]
    kept = lowest
    if "top_k" in features:
        cut = _tail_cut(order, torch.ones_like(scaled), top_k[:, None].float(), precision)
        kept = torch.where(top_k[:, None] > 0, cut, lowest)
    if "top_p" in features:
        weight = torch.where(order >= kept, scaled.exp(), 0.0)
        share = weight.sum(dim=-1, keepdim=True) * top_p[:, None]
        cut = _tail_cut(order, weight, share, precision)
        kept = torch.where(top_p[:, None] < 1, torch.maximum(cut, kept), kept)
    noisy = scaled + gumbel_noise(keys, position, logits.shape[1])
    noisy = torch.where(order >= kept, noisy, float("-inf"))
    return torch.where(greedy, values, noisy).argmax(dim=-1)


def _tail_cut(order, weight, target, precision: int):
    """The largest threshold [B, 1] such that elements at or above it weigh at least `target`.

    Found bit by bit: a pass over the row for each significant bit, where sorting a row of 32,000
    would cost more than the rest of the step's sampling.
    """

    def enough(threshold):
        return torch.where(order >= threshold, weight, 0.0).sum(dim=-1, keepdim=True) >= target

    zero = torch.zeros_like(order[:, :1])
    threshold = torch.where(enough(zero), zero, torch.full_like(zero, -(2**31)))
    for bit in range(30, 31 - precision, -1):
        higher = threshold + (1 << bit)
        threshold = torch.where(enough(higher), higher, threshold)
    return threshold


def stream_key(seed: int, key: object, sample_index: int) -> tuple[int, int]:
    """Two int32: the key of one sample's random stream. key: what names the prompt, as text."""
    name = repr((seed, str(key), sample_index)).encode()
    words = np.frombuffer(hashlib.blake2b(name, digest_size=8).digest(), dtype="<i4")
    return int(words[0]), int(words[1])


def top_logprobs(
    logits: torch.Tensor, tokens: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities under logits [B, V] as they are, in nats, float32, before temperature and
    cuts: token ids [B, 1 + k], the token drawn [B] and then the k likeliest, and their values."""
    logprobs = logits.float().log_softmax(dim=-1)
    values, ids = logprobs.topk(k, dim=-1)
    drawn = tokens[:, None]
    return torch.cat((drawn, ids), 1), torch.cat((logprobs.gather(1, drawn), values), 1)
