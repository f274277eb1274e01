"""tasks/extraction.py: what EvalPlus's sanitizer made of the same replies; nothing runs."""

import json
from pathlib import Path

from replies import FUNCTIONS, replies

from tasks.extraction import extract

FIXTURE = Path(__file__).resolve().parent.parent / "fixtures" / "evalplus" / "replies.json"


def test_programs_are_those_of_evalplus_to_the_character():
    theirs, apart, empty = json.loads(FIXTURE.read_text()), [], 0
    given = list(replies(FUNCTIONS, len(theirs) - 8, seed=0))
    assert len(given) == len(theirs)
    for (name, reply), wanted in zip(given, theirs):
        ours = extract(reply, name)
        empty += not ours.strip()
        if wanted is not None and ours != wanted:  # null: it fails itself, on a NUL
            apart.append((reply, wanted, ours))
    assert not apart, apart[0]
    assert empty < len(given) / 10 and theirs.count(None) <= 1


def test_a_reply_is_read_and_never_run(tmp_path):
    file = tmp_path / "made"
    run = f"open({str(file)!r}, 'w')\n"
    code = extract(f"```python\n{run}x = {run}def f():\n    return x\n```", "f")
    assert code.startswith("x = open(") and not file.exists()


def test_prose_around_code_of_one_line():
    assert extract("return it", "f") == "return it"
    assert extract("So:\n\n```python\ndef f(x):\n    return x\n```\nDone.", "f") == (
        "def f(x):\n    return x"
    )
