"""The next token of every row in one launch: what top-k and top-p keep, and the largest of what is
kept with its noise added.

    tokens = sample(logits, keys, position, (temperature, top_p, top_k), (True, False))    # [B]

backends/sampling.py has the definition, and the plain twin: some hundred launches a step, each over
all logits. Here a program has a row. It reads it once for every two bits of a cut, out of the cache
that is nearest, and once to draw; its random numbers never lie in memory. A row is added up in an
order of its own, whatever its neighbours are.

Shapes: B rows, V vocabulary
"""

import functools

import torch

BLOCK, WARPS = 2048, 8  # logits that a program takes at a time: two programs fit a multiprocessor


# The Triton kernel is built on first use, in three parts: there is no Triton where there is no GPU


@functools.cache
def _cutting():
    """What finds the smallest number that is kept, and what compares them."""
    import triton
    import triton.language as tl

    @triton.jit
    def order_of(x):
        """uint32 that sort as the numbers do."""
        bits = x.to(tl.int32, bitcast=True)
        bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
        return bits.to(tl.uint32, bitcast=True) ^ 0x80000000

    @triton.jit
    def weigh(row, V, kept, low, step, top, inverse, COUNT: tl.constexpr, BLOCK: tl.constexpr):
        """How many elements of at least `kept` are at or above low + step, low + 2 step and
        low + 3 step, or what they weigh."""
        one, two = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        three = tl.zeros([BLOCK], tl.float32)
        for start in range(0, V, BLOCK):
            column = start + tl.arange(0, BLOCK)
            x = tl.load(row + column, mask=column < V, other=float("-inf")).to(tl.float32)
            order = order_of(x)
            weight = tl.where(column < V, 1.0, 0.0)
            if not COUNT:
                weight = tl.exp((x - top) * inverse)
            weight = tl.where(order >= kept, weight, 0.0)
            one += tl.where(order >= low + step, weight, 0.0)
            two += tl.where(order >= low + 2 * step, weight, 0.0)
            three += tl.where(order >= low + 3 * step, weight, 0.0)
        return tl.sum(one, axis=0), tl.sum(two, axis=0), tl.sum(three, axis=0)

    @triton.jit
    def cut(
        row, V, kept, top, inverse, target,
        COUNT: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """The largest threshold such that what is at or above it weighs `target`, two bits of it
        a pass."""
        low = tl.full([], 0, tl.uint32)
        for i in range((PRECISION + 1) // 2):
            step = tl.full([], 1, tl.uint32) << (30 - 2 * i)
            one, two, three = weigh(row, V, kept, low, step, top, inverse, COUNT, BLOCK)
            steps = tl.where(one >= target, 1, 0) + tl.where(two >= target, 1, 0)
            steps += tl.where(three >= target, 1, 0)
            low += step * steps.to(tl.uint32)
        return low

    return order_of, weigh, cut


@functools.cache
def _randomness():
    """backends.sampling's threefry, and the noise that is made of its bits."""
    import triton
    import triton.language as tl

    @triton.jit
    def turned(a, b, turns: tl.constexpr):
        """One round for each of `turns`."""
        for i in tl.static_range(len(turns)):
            a += b
            b = ((b << turns[i]) | (b >> (32 - turns[i]))) ^ a
        return a, b

    @triton.jit
    def threefry(key0, key1, a, b):
        key2 = key0 ^ key1 ^ 0x1BD11BDA
        a, b = turned(a + key0, b + key1, (13, 15, 26, 6))
        a, b = turned(a + key1, b + key2 + 1, (17, 29, 16, 24))
        a, b = turned(a + key2, b + key0 + 2, (13, 15, 26, 6))
        return turned(a + key0, b + key1 + 3, (17,))

    @triton.jit
    def noise(bits):
        """Standard Gumbel noise of 32 random bits."""
        uniform = (bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10
        uniform = tl.minimum(uniform, 0.9999999403953552)
        rest = 1.0 - uniform
        # log1p(-uniform): what 1 - uniform lost in rounding, 1 - rest lost as well
        lost = uniform / tl.where(rest == 1.0, 1.0, 1.0 - rest)
        return -tl.log(tl.where(rest == 1.0, uniform, -tl.log(rest) * lost))

    return threefry, noise


@functools.cache
def _kernel():
    import triton
    import triton.language as tl

    order_of, weigh, cut = _cutting()
    threefry, noise = _randomness()

    @triton.jit
    def sample(
        logits, keys, position, temperature, top_p, top_k, tokens,
        V, stride, stride_keys,
        TOP_P: tl.constexpr, TOP_K: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """One program a row, which it reads from its first logit to its last for each purpose."""
        b = tl.program_id(0).to(tl.int64)
        row, t = logits + b * stride, tl.load(temperature + b)
        drawn, inverse = t > 0.0, 1.0 / tl.where(t > 0.0, t, 1.0)
        most = tl.full([BLOCK], float("-inf"), tl.float32)
        for start in range(0, V, BLOCK):
            column = start + tl.arange(0, BLOCK)
            x = tl.load(row + column, mask=column < V, other=float("-inf")).to(tl.float32)
            most = tl.maximum(most, x)
        top = tl.max(most, axis=0)
        zero = tl.full([], 0, tl.uint32)
        kept = zero
        if TOP_K:
            k = tl.load(top_k + b)
            if drawn & (k > 0):
                target = k.to(tl.float32)
                kept = cut(row, V, kept, top, inverse, target, True, PRECISION, BLOCK)
        if TOP_P:
            p = tl.load(top_p + b)
            if drawn & (p < 1.0):
                # its first sum is of all that is kept
                whole, _, _ = weigh(row, V, kept, kept, zero, top, inverse, False, BLOCK)
                own = cut(row, V, kept, top, inverse, whole * p, False, PRECISION, BLOCK)
                kept = tl.maximum(kept, own)
        key0 = tl.load(keys + b * stride_keys).to(tl.uint32, bitcast=True)
        key1 = tl.load(keys + b * stride_keys + 1).to(tl.uint32, bitcast=True)
        place = tl.load(position + b).to(tl.uint32, bitcast=True)
        half = (V + 1) // 2  # tokens t and t + half take the two words of one random number
        best, found = tl.full([BLOCK], float("-inf"), tl.float32), tl.zeros([BLOCK], tl.int32)
        for start in range(0, half, BLOCK):
            column = start + tl.arange(0, BLOCK)
            word = column.to(tl.uint32)
            words = threefry(key0, key1, place + tl.zeros_like(word), word)
            for second in tl.static_range(2):
                at = column + half * second
                inside = (column < half) & (at < V)
                x = tl.load(row + at, mask=inside, other=float("-inf")).to(tl.float32)
                value = (x - top) * inverse
                if drawn:
                    value += noise(words[second])
                value = tl.where(inside & (order_of(x) >= kept), value, float("-inf"))
                better = (value > best) | ((value == best) & (at < found))
                best, found = tl.where(better, value, best), tl.where(better, at, found)
        first = tl.where(best == tl.max(best, axis=0), found, V - 1)  # of equals
        tl.store(tokens + b, tl.min(first, axis=0).to(tl.int64))

    return sample


def sample(
    logits: torch.Tensor,
    keys: torch.Tensor,
    position: torch.Tensor,
    columns: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    features: tuple[bool, bool],
) -> torch.Tensor:
    """Tokens [B] int64 of logits [B, V] on a GPU, as backends.sampling.sample_tokens draws them.

    columns: temperature, top_p and top_k, each [B]; features: whether any row needs the last two.
    """
    # eager, the operator would first import torch's compiler, which takes seconds
    draw = _operator if torch.compiler.is_compiling() else _sample_triton
    return draw(logits, keys, position, *columns, *features)


def _sample_triton(
    logits: torch.Tensor,
    keys: torch.Tensor,
    position: torch.Tensor,
    temperature: torch.Tensor,
    top_p: torch.Tensor,
    top_k: torch.Tensor,
    by_top_p: bool,
    by_top_k: bool,
) -> torch.Tensor:
    B, V = logits.shape
    assert logits.stride(1) == keys.stride(1) == 1, (logits.stride(), keys.stride())
    tokens = torch.empty(B, dtype=torch.int64, device=logits.device)
    # how many bits of its float32 a number of this dtype can differ in
    precision = {torch.bfloat16: 16, torch.float16: 19}.get(logits.dtype, 32)
    _kernel()[(B,)](
        logits, keys, position, temperature, top_p, top_k, tokens,
        V, logits.stride(0), keys.stride(0),
        TOP_P=by_top_p, TOP_K=by_top_k, PRECISION=precision, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return tokens


_operator = torch.library.custom_op("roseval::sample", mutates_args=())(_sample_triton)


@_operator.register_fake
def _(logits, keys, position, temperature, top_p, top_k, by_top_p, by_top_k):
    return logits.new_empty(logits.shape[0], dtype=torch.int64)
