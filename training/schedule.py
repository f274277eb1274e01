"""Learning rates: a function of the step's number alone, so that a run resumes exactly.

    factor = schedule(options)          # what the learning rate is multiplied with
    factor(0), factor(1), …

A cycle warms up linearly, then follows its shape down to --min-lr-ratio at its end. The first cycle
begins at 0; each step of --rewarm begins another one where the one before ended, and the last ends
at --num-steps. `wsd` (warm up, stay, decay) stays at the top until its last --decay-steps: a run
that is stopped there can go on as if it had been planned longer.

Source: cosine: Loshchilov 2017; wsd: Hu et al. 2024 (MiniCPM); 1 - sqrt: Hägele et al. 2024;
re-warming: Gupta et al. 2023, Ibrahim et al. 2024.
"""

import itertools
import math
from collections.abc import Callable

from training.options import OptimizationOptions

SHAPES: dict[str, Callable[[float], float]] = {  # of the share that is done, from 1 down to 0
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done: 1 - done,
    "sqrt": lambda done: 1 - math.sqrt(done),
}


def schedule(options: OptimizationOptions) -> Callable[[int], float]:
    """f(step from 0 on): a plain function, for LambdaLR saves what other callables hold. ValueError
    for cycles that do not fit into the steps."""
    cycles = _cycles(options)

    def factor(step: int) -> float:
        n = max(i for i, (start, _) in enumerate(cycles) if i == 0 or step >= start)
        start, end = cycles[n]
        return _in_cycle(options, step - start, end - start, _ends_at(options) if n else 0.0)

    return factor


def _cycles(o: OptimizationOptions) -> list[tuple[int, int]]:
    """(first step, the step after its last) of each."""
    cycles = list(itertools.pairwise([0, *(o.rewarm or ()), o.num_steps]))
    for start, end in cycles if o.rewarm else ():
        if start >= end:
            raise ValueError(f"--rewarm: a cycle from step {start} to {end} has no steps")
    for start, end in cycles if o.lr_scheduler == "wsd" else ():
        decay = _decay_steps(o, end - start)
        if o.warmup_steps + decay > end - start:
            raise ValueError(
                f"--warmup-steps {o.warmup_steps} and --decay-steps {decay} do not fit into the "
                f"{end - start} steps of a cycle"
            )
    return cycles


def _in_cycle(o: OptimizationOptions, step: int, steps: int, begins_at: float) -> float:
    """Of step 0, 1, … of a cycle; after its last, what it ends with."""
    if step < o.warmup_steps:
        return begins_at + (1 - begins_at) * (step + 1) / o.warmup_steps
    if o.lr_scheduler == "constant":
        return 1.0
    top, shape, least = o.warmup_steps, o.lr_scheduler, o.min_lr_ratio
    if shape == "wsd":
        top, shape = steps - _decay_steps(o, steps), o.decay_shape or "sqrt"
    done = min(max(0, step - top) / max(1, steps - top), 1.0)
    if shape == "exponential":
        return least**done
    return least + (1 - least) * SHAPES[shape](done)


def _ends_at(o: OptimizationOptions) -> float:
    return 1.0 if o.lr_scheduler == "constant" else o.min_lr_ratio


def _decay_steps(o: OptimizationOptions, steps: int) -> int:
    return max(1, steps // 10) if o.decay_steps is None else o.decay_steps
