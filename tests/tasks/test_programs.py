"""tasks/programs.py: OpenAI's own checker on the same samples, and what files may hold. Only
canonical and harmlessly wrong programs run here."""

import gzip
import json
import math
import os
import resource
from collections import Counter
from fractions import Fraction
from pathlib import Path
from unittest import mock

import pytest
from builders import PATIENCE, PROBLEM, judge_as_openai, read_lines, write_jsonl

from sandbox.judge import Verdict
from tasks import programs
from tasks.problems import read_problems
from tasks.programs import count_cores, count_workers, judge_file, split_off
from tasks.scores import kind_of, summarise

PATIENT = {"timeout": PATIENCE}  # of a Sandbox: all programs here end by themselves

# ---------------------------------------------------------------------------------------------
# Samples files


def mixed_samples(chosen):
    """Three samples of each of five problems: right, mutated, something odd; all end."""
    rows = []
    for p in chosen.values():
        right = p["canonical_solution"]
        odd = {
            23: "",
            53: "    é = '雪' # \ud800",  # a lone surrogate: no such program can be written down
            13: "\treturn 1\n",
            45: "    return (",
            2: "    return number - (number - number % 1.0)\nnot_there",
        }[int(p["task_id"].rpartition("/")[2])]
        mutated = right.replace("return ", "return 1 + ").replace("% 1.0", "* 1.0")
        rows += [{"task_id": p["task_id"], "completion": text} for text in (right, mutated, odd)]
    return rows[::2] + rows[1::2]


def test_verdicts_are_those_of_openai_in_the_same_order(five, tmp_path, capsys):
    path, chosen = five
    rows = mixed_samples(chosen)
    ours, theirs = tmp_path / "ours.jsonl", tmp_path / "theirs.jsonl"
    for file in (ours, theirs):
        write_jsonl(file, rows)
    scores, wanted = judge_as_openai(theirs, path, [1, 2, 3])
    judge_file(ours, read_problems(path), PATIENT, ks=[1, 2, 3], show="HumanEval/45")
    out = capsys.readouterr().out
    found = read_lines(Path(f"{ours}_results.jsonl"))
    assert [(f["task_id"], f["completion"]) for f in found] == [
        (r["task_id"], r["completion"]) for r in rows
    ]
    assert [f["passed"] for f in found] == [w["passed"] for w in wanted]
    for k, score in scores.items():
        assert f"{k:9} {score:7.2%} ±" in out
    assert "--- HumanEval/45, failing sample 1 of 2" in out and "syntax error" in out


def test_solutions_of_evalplus_are_judged_whole(problems, tmp_path):
    """Its programs may leave the prompt out; some tests call the prompt's helpers none the less."""
    alone = "import math\n\ndef poly(xs, x):\n    return 'not the helper of the tests'\n\n"
    alone += (
        "def find_zero(xs):\n"
        "    def p(x):\n        return sum(c * x ** i for i, c in enumerate(xs))\n"
        "    a, b = -1.0, 1.0\n"
        "    while p(a) * p(b) > 0:\n        a, b = a * 2, b * 2\n"
        "    while b - a > 1e-10:\n"
        "        m = (a + b) / 2\n"
        "        a, b = (m, b) if p(m) * p(a) > 0 else (a, m)\n"
        "    return a\n"
    )
    rows = [{"task_id": "HumanEval/32", "solution": alone}]
    rows += [{"task_id": "HumanEval/32", "solution": "def find_zero(xs):\n    return 0\n"}]
    for task in ("HumanEval/32", "HumanEval/38", "HumanEval/50"):
        p = problems[task]
        rows.append(
            {"task_id": task, "solution": p["prompt"].strip() + "\n" + p["canonical_solution"]}
        )
    chosen = {row["task_id"]: problems[row["task_id"]] for row in rows}
    data = tmp_path / "P.jsonl.gz"
    data.write_bytes(gzip.compress("\n".join(map(json.dumps, chosen.values())).encode()))
    path = tmp_path / "S.jsonl.gz"
    path.write_bytes(gzip.compress("\n\n".join(map(json.dumps, rows)).encode()))
    judge_file(path, read_problems(data), PATIENT)
    found = read_lines(tmp_path / "S.jsonl.gz_results.jsonl")
    assert [line["passed"] for line in found] == [True, False, True, True, True]


def test_incomplete_files_are_named_not_averaged(five, tmp_path, capsys):
    path, chosen = five
    rows = [r for r in mixed_samples(chosen) if r["task_id"] != "HumanEval/13"]
    rows.remove(next(r for r in rows if r["task_id"] == "HumanEval/45"))
    file = write_jsonl(tmp_path / "S.jsonl", rows)
    wanted = read_problems(path)
    with pytest.raises(
        ValueError, match="no samples of HumanEval/13, so this is no score of the 5"
    ):
        judge_file(file, wanted)
    with pytest.raises(ValueError, match=r"--k 3: fewer samples of HumanEval/45 \(2\)"):
        judge_file(file, wanted, ks=[1, 3], ignore_incomplete=True)
    assert not Path(f"{file}_results.jsonl").exists()
    judge_file(file, wanted, PATIENT, workers=1, ignore_incomplete=True)
    out = capsys.readouterr().out
    assert "tasks with fewer samples than the 3 of others: HumanEval/45 (2)" in out
    assert "11 samples of 4 tasks\nA PART OF THE TASKS" in out and "(4 tasks)" in out


@pytest.mark.parametrize(
    ("problems", "samples", "message"),
    [
        ([], [], "P.jsonl is empty"),
        ([PROBLEM, PROBLEM], [], "P.jsonl:2: task T/0 appears twice"),
        ([PROBLEM | {"test": None}], [], "P.jsonl:1: field 'test' is missing"),
        ([PROBLEM | {"test": "def check(:"}], [], "P.jsonl:1: field 'test' is not Python"),
        (
            [PROBLEM | {"test": "assert f()"}],
            [],
            "P.jsonl:1: field 'test' defines no function check",
        ),
        (
            [PROBLEM | {"entry_point": "f()"}],
            [],
            "P.jsonl:1: field 'entry_point' is no name: 'f()'",
        ),
        (["{"], [], "P.jsonl:1: not a line of JSON"),
        (["[1]"], [], "P.jsonl:1: an object expected"),
        ([PROBLEM], [], "S.jsonl is empty"),
        ([PROBLEM], [{"task_id": "T/1", "completion": ""}], "S.jsonl:1: task 'T/1' is not among"),
        ([PROBLEM], [{"task_id": "T/0"}], "S.jsonl:1: neither 'completion' nor 'solution'"),
        ([PROBLEM], [{"task_id": ["T/0"], "completion": ""}], "S.jsonl:1: task"),
        ([PROBLEM], ["[" * 100_000], "S.jsonl:1: not a line of JSON"),
        ([PROBLEM], None, "S.jsonl: no such file of samples"),
        (None, [], "P.jsonl: no such file of problems; scripts/fetch_humaneval.sh"),
        (b"\x1f\x8b\x08damaged", [], "P.jsonl: damaged gzip"),
    ],
)
def test_bad_files_are_named_with_their_line(problems, samples, message, tmp_path):
    for name, rows in (("P", problems), ("S", samples)):
        if isinstance(rows, bytes):
            (tmp_path / f"{name}.jsonl").write_bytes(rows)
        elif rows is not None:
            text = "\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows)
            (tmp_path / f"{name}.jsonl").write_text(text)
    with pytest.raises(ValueError) as caught:
        judge_file(tmp_path / "S.jsonl", read_problems(tmp_path / "P.jsonl"))
    assert message in str(caught.value)


def test_tasks_whose_own_solution_fails_are_named_and_not_counted(tmp_path, capsys):
    def problem(name, solution, test="assert candidate(1) == 1"):
        return PROBLEM | {
            "task_id": name,
            "prompt": "def f(x):\n",
            "canonical_solution": solution,
            "test": f"def check(candidate):\n    {test}\n",
        }

    rows = [
        problem("good", "    return x\n"),
        problem("broken", "    return x + 1\n"),
        problem("of a form", "    print(x)\n", "import re; candidate(re.compile('a'))"),
        {name: text for name, text in problem("unknown", "").items() if "canonical" not in name},
    ]
    problems = read_problems(write_jsonl(tmp_path / "P.jsonl", rows))
    samples = [{"task_id": name, "completion": "    return x\n"} for name in problems]
    file = write_jsonl(tmp_path / "S.jsonl", samples)
    judge_file(file, problems, PATIENT, show="broken")
    out = capsys.readouterr().out
    assert "LEFT OUT, NOT COUNTED: 2 tasks" in out and "(2 tasks)" in out
    assert "  of a form: failed: the tests pass an argument of type Pattern" in out
    assert "--show broken: none of its samples was judged" in out
    found = {line["task_id"]: line["passed"] for line in read_lines(f"{file}_results.jsonl")}
    assert found == {"good": True, "broken": None, "of a form": None, "unknown": True}


def test_a_late_solution_leaves_no_task_out_and_a_failing_one_is_looked_at_twice():
    class Judge:
        """Answers with what is known of each task: the verdict of each look at it."""

        looks = {  # noqa: RUF012
            "late": ["timeout", "timeout"],
            "wrong": ["wrong answer", "wrong answer"],
            "once": ["sandbox", "passed"],
            "right": ["passed"],
        }

        def judge_many(self, programs):
            for i, (_, completion, _, _) in enumerate(programs):
                kind = self.looks[completion.split()[0]].pop(0)
                yield i, Verdict(kind == "passed", kind, kind, 0.1)

    names = list(Judge.looks)
    problems = {name: PROBLEM | {"canonical_solution": f"{name} "} for name in names}
    kept, left_out = split_off(problems, Judge())
    assert (list(kept), left_out) == (["late", "once", "right"], {"wrong": "failed: wrong answer"})


def test_samples_in_markdown_fences_are_remarked_on(tmp_path, capsys):
    problems = read_problems(write_jsonl(tmp_path / "P.jsonl", [PROBLEM]))
    row = {"task_id": PROBLEM["task_id"], "solution": "```python\ndef f(x):\n    return x\n```\n"}
    judge_file(write_jsonl(tmp_path / "S.jsonl", [row]), problems, PATIENT)
    assert "1 samples hold ```" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------
# Counting


def files_of(folder):
    problems = read_problems(write_jsonl(folder / "P.jsonl", [PROBLEM]))
    rows = [{"task_id": "T/0", "completion": "    pass"}]
    return write_jsonl(folder / "S.jsonl", rows), problems


@pytest.mark.parametrize("kind", ["a pipe", "a folder nobody can write to", "a folder"])
def test_where_no_results_can_be_written_nothing_is_judged(kind, tmp_path, monkeypatch):
    file, problems = files_of(tmp_path)
    monkeypatch.setattr(programs, "Sandbox", lambda *args, **more: pytest.fail("too late"))
    if kind == "a pipe":
        os.mkfifo(file := tmp_path / "pipe")
    elif kind == "a folder":
        (file := tmp_path / "folder").mkdir()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    if kind == "a folder nobody can write to":  # a full disk, or another's: the same refusal
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, limit[1]))
    try:
        with pytest.raises(
            ValueError, match=r"is no file, beside which|folder .* cannot be written"
        ):
            judge_file(file, problems)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def test_a_disk_that_fills_up_costs_no_scores(tmp_path, monkeypatch, capsys):
    file, problems = files_of(tmp_path)
    monkeypatch.setattr(
        programs.durable, "write_atomic", full := mock.Mock(side_effect=OSError(28))
    )
    with pytest.raises(OSError, match="28"):
        judge_file(file, problems, PATIENT, workers=1)
    assert "pass@1    100.00%" in capsys.readouterr().out and full.called


def test_pass_at_k_of_unequal_tasks_in_fractions():
    tally = {
        "a": Counter(passed=3, timeout=4),
        "b": Counter({"wrong answer": 5}),
        "c": Counter(passed=9),
    }
    metrics, breakdown, arrays = summarise(tally, [1, 2, 5])
    n, c = [7, 5, 9], [3, 0, 9]
    for k in (1, 2, 5):
        scores = [1 - Fraction(math.comb(x - y, k), math.comb(x, k)) for x, y in zip(n, c)]
        mean = sum(scores) / 3
        variance = sum((s - mean) ** 2 for s in scores) / 2
        assert metrics[f"pass@{k}"]["value"] == pytest.approx(float(mean), abs=1e-12)
        assert metrics[f"pass@{k}"]["stderr"] == pytest.approx(math.sqrt(variance / 3), abs=1e-12)
    assert breakdown["failure"] == {"wrong answer": 5, "timeout": 4}
    assert (arrays["n"].tolist(), arrays["c"].tolist()) == (n, c)


def test_kinds_of_failures():
    def kind(kind, detail=""):
        return kind_of(Verdict(kind == "passed", kind, detail, 0.0))

    assert kind("passed") == "passed" and kind("timeout", "timed out") == "timeout"
    assert kind("exception", "NameError: name 'x: y' is not defined") == "NameError"
    assert kind("exception", "KeyError") == "KeyError"
    assert kind("exception", "passed: forged") == kind("exception", "print") == "other exception"


def test_judges_share_the_cores_among_the_ranks_of_a_host(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "max 100000\n")
    assert (count_cores(), count_workers()) == (16, 15)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert (count_cores(), count_workers()) == (16, 3)
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "200000 100000\n")
    assert (count_cores(), count_workers()) == (2, 1)
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "50000 100000\n")
    assert (count_cores(), count_workers()) == (1, 1)
