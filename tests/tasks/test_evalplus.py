"""tasks/evalplus.py and agreement.py: EvalPlus's own verdicts on mutants of its solutions.

The verdicts are those of EvalPlus 0.3.1 (tests/fixtures/evalplus, made by make_evalplus.py in an
environment of its own); its data come from where ROSEVAL_DATA says.
"""

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from builders import PATIENCE, read_lines, write_jsonl
from mutants import mutants

from sandbox.judge import Sandbox
from tasks import agreement, evalplus
from tasks.problems import data_hash, has_plus, read_problems
from tasks.programs import JudgeOptions, judge_file, own_program, program_of, split_off

VERDICTS = Path(__file__).resolve().parent.parent / "fixtures" / "evalplus"
FILES = {"humaneval": "HumanEvalPlus-NoExtreme.jsonl.gz", "mbpp": "MbppPlus.jsonl.gz"}
N_PROBLEMS = {"humaneval": 164, "mbpp": 378}
N_MUTANTS = {"humaneval": 8, "mbpp": 4}
# tasks whose verdict EvalPlus 0.3.1 gives wrong whatever the program: of find_zero it counts no
# test, and calls every solution failed, the canonical one too
UNJUDGED = {"HumanEval/32"}
BIG = {"timeout": 20.0, "memory_mb": 4096}


def compare(name, problems, workers=2):
    """(mutants, [disagreements]) of EvalPlus's verdicts and the judge's on some problems: on base,
    and on plus of what passes base. Its `timeout` is left out: there the machine had the word."""
    theirs = json.loads((VERDICTS / f"{name}.json").read_text())
    with Sandbox(workers, **JudgeOptions().sandbox(problems)) as sandbox:
        tests, broken = evalplus.suites(problems, sandbox)
        assert not broken
        kept = {task: problem | tests[task] for task, problem in problems.items()}
        asked = []
        for task, problem in kept.items():
            own = problem["prompt"] + problem["canonical_solution"]
            texts = [own, *mutants(own, problem["entry_point"], N_MUTANTS[name], task)]
            assert len(texts) == len(theirs[task])
            for i, (text, row) in enumerate(zip(texts, theirs[task])):
                suites = zip(("base", "plus") if row[0] == "pass" else ("base",), row)
                asked += [(task, i, s, text, v) for s, v in suites if v != "timeout"]
        programs = (
            program_of(kept[task], {"solution": text}, suite) for task, _, suite, text, _ in asked
        )
        apart = []
        for at, verdict in sandbox.judge_many(programs):
            task, i, suite, _, wanted = asked[at]
            if task not in UNJUDGED and verdict.passed != (wanted == "pass"):
                apart.append((task, i, suite, wanted, verdict.result[:80]))
    return sum(i > 0 and suite == "base" for _, i, suite, *_ in asked), sorted(apart)


# ---------------------------------------------------------------------------------------------
# EvalPlus's verdicts

# one of each kind of rule and of arguments; all of them end soon
CHEAP = {
    "humaneval": [f"HumanEval/{i}" for i in (0, 2, 32)],
    "mbpp": [f"Mbpp/{i}" for i in (2, 7, 63, 75, 82, 106, 115, 124, 252, 259, 278)]
    + [f"Mbpp/{i}" for i in (164, 222, 295, 558, 581, 722, 737, 793)],
}


@pytest.mark.parametrize("name", FILES)
def test_some_verdicts_are_evalplus_own(data_dir, name):
    problems = read_problems(data_dir / FILES[name])
    n, apart = compare(name, {t: p for t, p in problems.items() if t in CHEAP[name]})
    assert apart == [] and n > 15


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_every_verdict_is_evalplus_own(data_dir, name):
    """Base and plus, of all mutants."""
    n, apart = compare(name, read_problems(data_dir / FILES[name]))
    print(f"{name}: {n} mutants, apart:", *apart, sep="\n")
    assert apart == [] and n >= 1000


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_every_canonical_solution_passes_base_and_plus(data_dir, name):
    """As humaneval_eval.py judges unless told otherwise: no task is left out, none is late."""
    problems = read_problems(data_dir / FILES[name])
    assert len(problems) == N_PROBLEMS[name]
    with Sandbox(2, **JudgeOptions().sandbox(problems)) as sandbox:
        tests, broken = evalplus.suites(problems, sandbox)
        asked = [(task, suite) for task in tests for suite in evalplus.SUITES]
        programs = (own_program(problems[t] | tests[t], "", suite) for t, suite in asked)
        verdicts = dict(sandbox.judge_many(programs))
    failed = {asked[i]: v.result for i, v in verdicts.items() if not v.passed}
    slowest = max(verdicts, key=lambda i: verdicts[i].seconds)
    print(f"{name}: {len(verdicts)} suites, slowest {asked[slowest]} {verdicts[slowest].seconds} s")
    assert (broken, failed, len(verdicts)) == ({}, {}, 2 * N_PROBLEMS[name])


# ---------------------------------------------------------------------------------------------
# Rules


def agrees(answers, expected, entry="f", mbpp=False, atol=0, args=None):
    given = iter(answers)
    inputs = args or [[] for _ in expected]
    try:
        agreement.agree_all(lambda *_: next(given), entry, mbpp, inputs, expected, atol)
    except Exception:
        return False
    return True


@pytest.mark.parametrize(
    "right, answers, expected, how",
    [
        (True, [1], [True], {}),
        (False, [1.0 + 2e-6], [1.0], {}),
        (True, [1.0 + 9e-7], [1.0], {}),
        (True, [1e9 + 50], [1e9], {}),
        (False, [1], [1.0 + 1e-9], {}),  # another type
        (True, [1], [1.0], {}),  # but equal
        (False, [[0.5, 0.5]], [[0.5]], {}),
        (False, [(0.5 + 1e-9,)], [[0.5]], {}),
        (True, [[0.5 + 1e-9]], [[0.5]], {}),
        (False, [[1, 0.5 + 1e-9]], [[1, 0.5]], {}),  # not all of them floats
        (True, [0.5, [1, 0.5 + 1e-9]], [0.5, [1, 0.5]], {}),  # a float came before
        (True, [[1, 0.5 + 1e-5]], [[1, 0.5]], {"atol": 1e-4}),
        (False, [math.nan], [math.nan], {}),
        (True, [math.inf], [math.inf], {}),
        (False, ["a"], ["b"], {"atol": 1e-4}),
        (False, [np.ones(2)], [[1.0, 1.0]], {}),
        (False, [None], [0.0], {}),
        (True, [2.00001], [9], {"entry": "find_zero", "atol": 1e-4, "args": [[[-2, 1]]]}),
        (False, [2.1], [2.1], {"entry": "find_zero", "atol": 1e-4, "args": [[[-2, 1]]]}),
        (
            False,
            [2.0],
            [9],
            {"entry": "find_zero", "atol": 1e-4, "args": [[[-2, 1]]], "mbpp": True},
        ),
        (True, [[1, 2, 2]], [(2, 1)], {"entry": "Diff", "mbpp": True}),
        (False, [[1, 2, 2]], [(2, 1)], {"entry": "Diff"}),
        (True, [object()], [True], {"entry": "check_str", "mbpp": True}),
        (False, [False], [True], {"entry": "check_str", "mbpp": True}),
        (False, [None], [True], {"entry": "check_str", "mbpp": True}),
        (True, [5], [False], {"entry": "are_equivalent", "mbpp": True}),
        (True, [0], [7], {"entry": "sum_div", "mbpp": True}),
        (True, [35], [0], {"entry": "surface_Area", "mbpp": True, "args": [[3, 4]]}),
        (False, [34], [0], {"entry": "surface_Area", "mbpp": True, "args": [[3, 4]]}),
        (True, [4], [0], {"entry": "digit_distance_nums", "mbpp": True, "args": [[123, 4]]}),
    ],
)
def test_when_answers_agree(right, answers, expected, how):
    assert agrees(answers, expected, **how) is right


def test_values_are_written_so_that_python_reads_them_back():
    values = [None, True, 10**30, -(10**5000), -0.0, 1e300, 2j, "é\n'\u2028", b"\0", [], (1,), ()]
    values += [{1, 2}, set(), frozenset([3]), {"a": [(2, {3: 4})]}, Counter("aab")]
    for value in values:
        text = agreement.write(value)
        back = eval(text, vars(agreement) | {"inf": math.inf, "nan": math.nan})
        assert back == value and type(back) is type(value) and "\n" not in text
    assert agreement.write(math.nan) == "nan" and agreement.write([-math.inf]) == "[-inf]"
    with pytest.raises(TypeError, match="of type object cannot be written"):
        agreement.write([object()])


# ---------------------------------------------------------------------------------------------
# Files

ROW = {
    "task_id": "HumanEval/0",
    "prompt": "def half(xs):\n",
    "entry_point": "half",
    "canonical_solution": "    return [x / 2 for x in xs]\n",
    "base_input": [[[1, 2]], [[]]],
    "plus_input": [[[3.0] * 10], [[1e300]]],
    "atol": 0,
}
LONG = ROW | {
    "task_id": "HumanEval/1",
    "prompt": "def many(n):\n",
    "entry_point": "many",
    "canonical_solution": "    return 'x' * n\n",
    "base_input": [[2]],
    "plus_input": [[2_000_000], [1_000_000]],
}


def test_base_and_plus_have_a_verdict_each(tmp_path, capsys):
    """One answer is too long to be written down: its tests ask the canonical solution."""
    data = write_jsonl(tmp_path / "P.jsonl", [ROW, LONG])
    problems = read_problems(data)
    assert has_plus(problems)
    solutions = [  # base, plus
        ("HumanEval/0", "def half(xs):\n    return [x / 2 for x in xs]", True, True),
        ("HumanEval/0", "def half(xs):\n    return [x / 2 for x in xs[:2]]", True, False),
        ("HumanEval/0", "def half(xs):\n    return xs", False, False),
        ("HumanEval/1", "def many(n):\n    return 'x' * n", True, True),
        ("HumanEval/1", "def many(n):\n    return 'x' * min(n, 1999999)", True, False),
        ("HumanEval/1", "def many(n):\n    return n", False, False),
    ]
    rows = [{"task_id": task, "solution": text} for task, text, *_ in solutions]
    file = write_jsonl(tmp_path / "S.jsonl", rows)
    judge_file(file, problems, BIG | {"timeout": PATIENCE}, workers=2)
    found = read_lines(tmp_path / "S.jsonl_results.jsonl")
    assert [(r["passed"], r["plus_passed"]) for r in found] == [s[2:] for s in solutions]
    out = " ".join(capsys.readouterr().out.split())
    assert "2 of 6 samples passed" in out and "plus_pass@1 33.33%" in out
    assert " pass@1 66.67%" in out


def test_a_solution_that_fails_is_named(tmp_path):
    rows = [
        ROW,
        ROW | {"task_id": "T/1", "canonical_solution": "    return object()\n"},
        ROW | {"task_id": "T/2", "canonical_solution": "    return undefined\n"},
    ]
    with Sandbox(1, **BIG) as sandbox:
        kept, left_out = split_off(read_problems(write_jsonl(tmp_path / "P", rows)), sandbox)
    assert list(kept) == ["HumanEval/0"] and left_out.keys() == {"T/1", "T/2"}
    assert "cannot be written down" in left_out["T/1"] and "undefined" in left_out["T/2"]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"base_input": 3}, "P:1: field 'base_input' is no list of lists"),
        ({"plus_input": [3]}, "P:1: field 'plus_input' is no list of lists"),
        ({"atol": "x"}, "P:1: field 'atol' is no number"),
        ({"canonical_solution": None}, "P:1: field 'canonical_solution' is missing"),
        ({"entry_point": "a b"}, "P:1: field 'entry_point' is no name"),
        ({"task_id": "Mbpp/124", "base_input": [[1, "x"]]}, "is not what task 124 takes"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, change, words):
    file = write_jsonl(tmp_path / "P", [ROW | change])
    with pytest.raises(ValueError, match=words):
        read_problems(file)


def test_what_decides_a_verdict_is_in_the_hash(tmp_path):
    changes = [{}, {"atol": 1}, {"plus_input": []}, {"canonical_solution": "    return 1\n"}]
    files = [write_jsonl(tmp_path / f"P{i}", [ROW | c]) for i, c in enumerate(changes)]
    assert len({data_hash(read_problems(file)) for file in files}) == len(changes)
