"""Problems with tests: HumanEval's form, EvalPlus's and MBPP's, read and brought to one.

    problems = read_problems("data/HumanEval.jsonl.gz")     # {task_id: problem}

A problem is a dict of HumanEval's fields: task_id, prompt (code, which a completion continues),
entry_point, test (it defines check(candidate)) and canonical_solution, if there is one. MBPP's have
in `prompt` the question as a docstring, as EvalPlus asks it, and `text` and `tests`, as MBPP does.
Where there are EvalPlus's tests beside the base ones, they are in `plus_test`. EvalPlus's own form
has `inputs` instead of tests: tasks/evalplus.py makes tests of them. What is wrong is named with
file and line.
"""

import ast
import warnings
from pathlib import Path

from inputs import read_jsonl
from recording.identity import rows_hash
from tasks import evalplus
from tasks.agreement import write

Problems = dict[str, dict]  # by task_id

FIELDS = ("task_id", "prompt", "entry_point", "test")
WHERE_TO_GET = (
    "scripts/fetch_humaneval.sh downloads HumanEval.jsonl.gz, scripts/fetch_evalplus.sh HumanEval+ "
    "and MBPP+"
)
MBPP_TEST_SPLIT = range(11, 511)  # of 974; before it lie the examples


def read_problems(path: str | Path, limit: int | None = None) -> Problems:
    """{task_id: problem} in the order of the file, the first `limit` of those that are scored."""
    return dict(list(_test_split(read_all(path)).items())[:limit])


def read_examples(path: str | Path, n: int) -> list[dict]:
    """MBPP's examples: its tasks 2, 3 and 4. ValueError where they are not in the file."""
    there, names = read_all(path) if n else {}, [f"Mbpp/{i}" for i in range(2, 2 + n)]
    for name in names:
        if "tests" not in there.get(name, {}):
            raise ValueError(f"{path}: example {name} is not there; --prompt evalplus needs none")
    return [there[name] for name in names]


def read_all(path: str | Path) -> Problems:
    """All of a file, those that are examples too."""
    problems: Problems = {}
    if not Path(path).exists():
        raise ValueError(f"{path}: no such file of problems; {WHERE_TO_GET}")
    for where, _, row in read_jsonl(path):
        problem = _of_row(where, row)
        if problem["task_id"] in problems:
            raise ValueError(f"{where}: task {problem['task_id']} appears twice")
        problems[problem["task_id"]] = problem
    if not problems:
        raise ValueError(f"{path}: holds no problems; {WHERE_TO_GET}")
    if not has_plus(problems) and any("inputs" in p or "plus_test" in p for p in problems.values()):
        raise ValueError(f"{path}: some problems have EvalPlus's tests, some have not: part them")
    return problems


def _of_row(where: str, row: dict) -> dict:
    if "test_list" in row:
        return _mbpp(where, row)
    own_form = "base_input" in row and "plus_input" in row
    needed = ("task_id", "prompt", "entry_point", "canonical_solution" if own_form else "test")
    for name in needed:
        if not isinstance(row.get(name), str):
            there = ", ".join(map(str, row))
            raise ValueError(
                f"{where}: field {name!r} is missing or not text; its fields are {there:.200}"
            )
    if own_form:
        problem = {name: row[name] for name in needed} | {"atol": row.get("atol", 0)}
        problem["inputs"] = evalplus.read_inputs(where, row)
        check_entry_point(where, problem)
        return problem
    check_tests(where, row)
    return row


def _mbpp(where: str, row: dict) -> dict:
    """A row of mbpp.jsonl, of sanitized-mbpp.json, or of EvalPlus's in their form."""
    text, tests, code = row.get("text", row.get("prompt")), row["test_list"], row.get("code")
    if not (isinstance(text, str) and isinstance(code, str) and type(row.get("task_id")) is int):
        raise ValueError(f"{where}: of MBPP's task_id, prompt or text, and code one is missing")
    if not (isinstance(tests, list) and tests and all(isinstance(t, str) for t in tests)):
        raise ValueError(f"{where}: field 'test_list' is no list of texts")
    before = [*row.get("test_imports", []), row.get("test_setup_code", "")]
    check = "def check(candidate):\n    pass\n"  # what is asserted is asserted before
    problem = {
        "task_id": f"Mbpp/{row['task_id']}",
        "prompt": f'"""\n{text}\n{tests[0]}\n"""\n',
        "entry_point": _called(code, tests[0]),
        "test": "\n".join([*before, *tests, check]),
        "canonical_solution": code,
        "text": text,
        "tests": tests,
    }
    if isinstance(row.get("test"), str):
        problem["plus_test"] = f"{row['test']}\n{check}"
    for name in ("test", "plus_test"):
        check_tests(where, problem, name)
    return problem


def _called(code: str, test: str) -> str:
    """Which of its functions a test calls; "" if none."""
    try:
        defined = {n.name for n in ast.walk(ast.parse(code)) if isinstance(n, ast.FunctionDef)}
        calls = [n.func for n in ast.walk(ast.parse(test)) if isinstance(n, ast.Call)]
    except (SyntaxError, ValueError):
        return ""
    return next((f.id for f in calls if isinstance(f, ast.Name) and f.id in defined), "")


def _test_split(problems: Problems) -> Problems:
    """MBPP's 500 that are scored, where its examples are there too."""
    own = {t: p for t, p in problems.items() if "plus_test" not in p and "tests" in p}
    if not {f"Mbpp/{i}" for i in (2, 3, 4, 11)} <= own.keys():
        return problems
    return {t: p for t, p in own.items() if int(t.partition("/")[2]) in MBPP_TEST_SPLIT}


def check_tests(where: str, problem: dict, name: str = "test") -> None:
    """ValueError for tests that no program could pass: the score would be a wrong 0, not low."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes in published tests
            code = compile(problem.get(name, "check"), "<tests>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{where}: field {name!r} is not Python: {error}") from None
    if "check" not in code.co_names:
        raise ValueError(f"{where}: field {name!r} defines no function check(candidate)")
    check_entry_point(where, problem)


def check_entry_point(where: str, problem: dict) -> None:
    if not problem["entry_point"].isidentifier():
        raise ValueError(f"{where}: field 'entry_point' is no name: {problem['entry_point']!r:.60}")


def has_plus(problems: Problems) -> bool:
    """Whether there are two verdicts on each sample."""
    return all("inputs" in p or "plus_test" in p for p in problems.values())


def data_hash(problems: Problems) -> str:
    """sha256 of what decides a verdict."""
    rows = []
    for problem in problems.values():
        row = [problem[name] for name in FIELDS if name in problem]
        if "inputs" in problem:
            row += [
                problem["canonical_solution"],
                *map(write, problem["inputs"].values()),
                problem["atol"],
            ]
        rows.append([*row, problem["plus_test"]] if "plus_test" in problem else row)
    return rows_hash(rows)


def find_task(problems: Problems, name: str) -> str:
    """The task that --show names, in full or by what follows the last slash."""
    tasks = list(problems)
    for task in tasks:
        if name in (task, task.rpartition("/")[2]):
            return task
    raise ValueError(f"--show {name}: no such task; there are {tasks[0]} to {tasks[-1]}")
