"""EvalPlus's own form of problems: inputs, base and plus, and a canonical solution for the answers.

    given = read_inputs(where, row)             # checked; MBPP's as tuples and sets, as they were
    tests, broken = suites(problems, sandbox)   # {task_id: {"test": …, "plus_test": …}}, why not

The expected answers are computed here, once: the canonical solution runs in the jail, as any
program does, and what it answers becomes the tests of everybody's. Where that is too long to write
down, or is late, tests ask the canonical solution themselves. When an answer agrees with it is
agreement.py's to say. JSON has no tuples, sets and complex numbers, so EvalPlus's MBPP+ has them as
lists and texts, task by task.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

from sandbox.judge import Sandbox
from tasks import agreement

SUITES = {"base": "test", "plus": "plus_test"}  # and the fields that their tests become
LONG = 1 << 20  # characters of a suite's answers
RULES = inspect.getsource(agreement)

# ---------------------------------------------------------------------------------------------
# Inputs


def _tuples(item: Any) -> Any:
    """Every list in it, however deep."""
    return tuple(map(_tuples, item)) if isinstance(item, list) else item


def _outer_two(item: list) -> tuple:
    """The lists in it, no deeper."""
    return tuple(tuple(part) if isinstance(part, list) else part for part in item)


def _inner(item: list) -> list:
    """A list of tuples."""
    return [tuple(part) for part in item]


def _sets(item: list) -> list:
    return [set(part) if isinstance(part, list) and part else {} for part in item]


def _of_values(item: dict) -> dict:
    return {key: tuple(value) for key, value in item.items()}


def _as_it_is(item: Any) -> Any:
    return item


# what MBPP's arguments were before they became JSON, the last for all that follow: by task
_KINDS: tuple[tuple[tuple[Callable, ...], str], ...] = (
    (
        (tuple,),
        "2 116 132 143 222 261 273 394 399 421 424 429 470 560 579 596 616 630 726 740 744 809",
    ),
    ((_inner,), "63 64 70 94 120 237 272 299 400 409 417 438 473 614 780"),
    ((_inner, _as_it_is), "75 413 444 753"),
    ((_as_it_is, tuple), "106 750"),
    ((_sets,), "115"),
    ((float, complex), "124"),
    ((tuple, _as_it_is), "250 307 405 446 617 720 763 808"),
    ((_outer_two,), "259 278 401 445"),
    ((_tuples,), "580 615 791"),
    ((_of_values, _as_it_is), "722"),
    ((complex,), "252"),
)
_ARGUMENTS = {int(task): kinds for kinds, tasks in _KINDS for task in tasks.split()}

COMBINATIONS = "Mbpp/255"
MOST = 1_000_000  # values of an answer


def is_beyond(task_id: str, args: list) -> bool:
    """Whether an input is not asked: its answer, up to 1,663,740 combinations of 77 values, is too
    large to be handed from one process to another. Five of the 109 of one task of MBPP+."""
    match args:
        case [list(values), int(n)] if task_id == COMBINATIONS and n > 0:
            return math.comb(len(values) + n - 1, n) * n > MOST
    return False


def is_mbpp(task_id: str) -> bool:
    return task_id.startswith("Mbpp/")


def read_inputs(where: str, row: dict) -> dict[str, list]:
    """{"base": inputs, "plus": inputs} of a row, each input a list of arguments. ValueError names
    the file and line of what is no such thing."""
    if type(row.get("atol", 0)) not in (int, float):
        raise ValueError(f"{where}: field 'atol' is no number")
    return {suite: _read_suite(where, row, f"{suite}_input") for suite in SUITES}


def _read_suite(where: str, row: dict, name: str) -> list:
    inputs = row.get(name) or []  # one of MBPP+'s is {}
    if not isinstance(inputs, list) or not all(isinstance(args, list) for args in inputs):
        raise ValueError(f"{where}: field {name!r} is no list of lists of arguments")
    inputs = [args for args in inputs if not is_beyond(row["task_id"], args)]
    number = row["task_id"].rpartition("/")[2]
    if not (is_mbpp(row["task_id"]) and number.isdecimal() and int(number) in _ARGUMENTS):
        return inputs
    kinds = _ARGUMENTS[int(number)]
    try:
        return [
            [kinds[min(i, len(kinds) - 1)](argument) for i, argument in enumerate(args)]
            for args in inputs
        ]
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{where}: field {name!r} is not what task {number} takes: {error}"
        ) from None


# ---------------------------------------------------------------------------------------------
# Tests


def suites(problems: dict[str, dict], sandbox: Sandbox, dist: Any = None) -> tuple[dict, dict]:
    """({task_id: its fields test and plus_test}, {task_id: why it has none}) of the problems with
    inputs. dist: the ranks that share the work."""
    own = [task for task, problem in problems.items() if "inputs" in problem]
    own = dist.mine(own) if dist else own
    tests: dict[str, dict[str, str]] = {}
    broken: dict[str, str] = {}
    programs = (_questions(problems[task]) for task in own)
    for i, verdict in sandbox.judge_many(programs):
        task, answers = own[i], verdict.said.split("\n")
        if verdict.kind == "timeout":  # a busy machine's, perhaps
            tests[task] = _tests_of(problems[task], dict.fromkeys(SUITES, ""))
        elif verdict.passed and len(answers) == len(SUITES):
            tests[task] = _tests_of(problems[task], dict(zip(SUITES, answers)))
        else:
            broken[task] = verdict.result
    for others, why in dist.gather((tests, broken)) if dist else []:
        tests, broken = tests | others, broken | why
    return tests, broken


def _questions(problem: dict) -> tuple[str, str, str, str]:
    """The canonical solution as a program, and tests that say what it answers, a line a suite."""
    suites = "".join(f"{agreement.write(problem['inputs'][suite])}, " for suite in SUITES)
    test = (
        f"{RULES}\nfrom math import inf, nan\ndef check(candidate):\n"
        f"    said = [answers_of(candidate, inputs, {_only_there(problem)}, {LONG})"
        f" for inputs in [{suites}]]\n"
        '    return "\\n".join(said)\n'
    )
    return problem["prompt"], problem["canonical_solution"], test, problem["entry_point"]


def _tests_of(problem: dict, answers: dict[str, str]) -> dict[str, str]:
    entry, atol = problem["entry_point"], problem["atol"]
    program = problem["prompt"] + problem["canonical_solution"]
    asked = f"expected_of({program!r}, {entry!r}, inputs(), {_only_there(problem)})"
    return {
        field: f"{RULES}\nfrom math import inf, nan\ndef inputs():\n"
        f"    return {agreement.write(problem['inputs'][suite])}\n"
        f"def check(candidate):\n    expected = {answers[suite] or asked}\n"
        f"    agree_all(candidate, {entry!r}, {is_mbpp(problem['task_id'])}, inputs(), expected, "
        f"{atol!r})\n"
        for suite, field in SUITES.items()
    }


def _only_there(problem: dict) -> bool:
    """Whether the answer is not compared, but only looked for."""
    return is_mbpp(problem["task_id"]) and problem["entry_point"] in agreement.ONLY_THERE
