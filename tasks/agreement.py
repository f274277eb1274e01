"""When an answer agrees with the canonical solution's, as EvalPlus decides it.

This file is itself the beginning of tests: tasks/evalplus.py puts inputs and expected answers
behind it, and the sandbox runs it with no other file of ours beside it. So it imports nothing of
ours, and numpy only where two answers differ. The rules, exceptions by task included, are those of
EvalPlus (github.com/evalplus/evalplus, evalplus/eval): equal values, or floats within 1e-6 (or the
task's own tolerance) and 1e-7 of the expected value.
"""

import collections
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

# MBPP: any answer that is not None is right where the expected one is not
ONLY_THERE = ("check_str", "text_match_three", "text_starta_endb")
AS_SETS = (
    *("similar_elements", "find_char_long", "common_in_nested_lists", "extract_singly"),
    *("larg_nnum", "intersection_array", "find_dissimilar", "Diff"),
)
ROOTS = "find_zero"  # HumanEval: whatever is a root


def agree_all(
    candidate: Callable,
    entry_point: str,
    is_mbpp: bool,
    inputs: Iterable,
    expected: Iterable,
    atol: float,
) -> None:
    """AssertionError, or whatever comparing raises, at the first answer that does not agree."""
    for args, wanted in zip(inputs, expected, strict=True):
        answer = candidate(*args)
        if entry_point == ROOTS and not is_mbpp:
            value = sum(coefficient * math.pow(answer, i) for i, coefficient in enumerate(args[0]))
            assert abs(value) <= atol, f"no root of {args}: {answer}"
            continue
        same = answer == wanted
        if is_mbpp:
            same = same_in_mbpp(entry_point, answer, wanted, args, atol, same)
        if atol == 0 and is_floats(wanted):
            atol = 1e-6  # and for the inputs that follow: so it is there
        if not same and atol != 0:
            assert is_close(answer, wanted, atol), f"{answer} is not close to {wanted}"
        else:
            assert same, f"{answer} is not {wanted}"


def is_floats(value: Any) -> bool:
    """A float, or a list or tuple of nothing else."""
    if isinstance(value, (list, tuple)) and value:
        return all(isinstance(item, float) for item in value)
    return isinstance(value, float)


def is_close(answer: Any, wanted: Any, atol: float) -> bool:
    """Of the same type and length, and numpy's allclose."""
    import numpy

    if type(answer) is not type(wanted):
        return False
    if isinstance(wanted, (list, tuple)) and len(answer) != len(wanted):
        return False
    return numpy.allclose(answer, wanted, rtol=1e-7, atol=atol)


def same_in_mbpp(
    entry_point: str, answer: Any, wanted: Any, args: Any, atol: float, same: Any
) -> Any:
    """Tasks whose question has more than one right answer."""
    if entry_point == "are_equivalent":
        return True
    if entry_point == "sum_div":
        return same or answer == 0
    if entry_point == "surface_Area":  # height as the distance of the apex from the base
        edge, height = args
        area = round(edge**2 + 2 * edge * math.sqrt((edge / 2) ** 2 + height**2))
        return same or abs(answer - area) <= atol
    if entry_point == "digit_distance_nums":  # the shorter number with zeros before it
        texts = [str(number) for number in args]
        width = max(map(len, texts))
        pairs = zip(*(text.zfill(width) for text in texts), strict=True)
        return same or answer == sum(abs(int(a) - int(b)) for a, b in pairs)
    if entry_point in AS_SETS:
        return set(answer) == set(wanted)
    if entry_point in ONLY_THERE:
        return answer == wanted if isinstance(answer, bool) else wanted == (answer is not None)
    return same


def answers_of(candidate: Callable, inputs: Iterable, only_there: bool, most: int) -> str:
    """The answers as Python, "" where they are more than so many characters."""
    texts, length = [], 0
    for args in inputs:
        answer = candidate(*args)
        texts.append(write(answer is not None if only_there else answer))
        length += len(texts[-1])
        if length > most:
            return ""
    return f"[{', '.join(texts)}]"


def expected_of(program: str, entry_point: str, inputs: Iterable, only_there: bool) -> Iterator:
    """What a canonical solution answers, one input after the other."""
    scope: dict[str, Any] = {}
    exec(program, scope)
    for args in inputs:
        answer = scope[entry_point](*args)
        yield answer is not None if only_there else answer


def write(value: Any) -> str:
    """A value as Python that compiles to it everywhere: decimal digits of large numbers may be
    refused, hexadecimal ones are not."""
    kind = type(value)
    if kind is int and abs(value) >= 1 << 64:
        return hex(value)
    if value is None or kind in (bool, int, float, complex, str, bytes):
        return repr(value)
    if kind in (list, tuple, set, frozenset):
        items = ", ".join(map(write, value))
        if kind is list:
            return f"[{items}]"
        if kind is tuple:
            return f"({items},)" if value else "()"
        return f"{kind.__name__}([{items}])"
    if isinstance(value, dict) and kind.__module__ in ("builtins", "collections"):
        items = "{" + ", ".join(f"{write(k)}: {write(v)}" for k, v in value.items()) + "}"
        begin = "None, " if kind is collections.defaultdict else ""
        return items if kind is dict else f"collections.{kind.__name__}({begin}{items})"
    raise TypeError(f"an answer of type {kind.__name__} cannot be written down")
