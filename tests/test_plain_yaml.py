"""plain_yaml.py: settings are read, and what is made to fill memory is refused in one line."""

import os
import random
import tracemalloc

import pytest
import yaml
from builders import ROOT

import plain_yaml
from plain_yaml import LONGEST, find_yaml, load_yaml
from tasks import choice_sets, templates, translation, word_problems


def test_settings_are_read_with_their_aliases(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("base: &b {x: 1, y: [2, 3]}\none: *b\ntwo: {<<: *b, x: 5}\nall: {<<: [*b]}\n")
    base = {"x": 1, "y": [2, 3]}
    assert load_yaml(path) == {"base": base, "one": base, "two": base | {"x": 5}, "all": base}


PIECES = [
    *"aye10.-+_~:#'\"[é=%@!&*\t\r ",
    "on",
    "off",
    "yes",
    "null",
    "true",
    "false",
    "nan",
    ".inf",
]
PIECES += ["e-5", "e5", "0x1", "1_0", "1:20", "007", ".5", "5.", "2020-01-01", "<<", ".inf"]


def test_lines_of_numbers_and_words_are_read_as_pyyaml_reads_them():
    """Without it, then: every preset, and lines of whatever YAML might take for something else."""
    files = [path.read_bytes() for path in sorted((ROOT / "configs").rglob("*.yaml"))]
    assert sum(bool(plain_yaml._of_lines(data)) for data in files) >= 15
    rng = random.Random(0)

    def some(most):
        return "".join(rng.choice(PIECES) for _ in range(rng.randint(1, most)))

    for _ in range(20_000):
        files.append("\n".join(f"{some(2)}: {some(3)}" for _ in range(rng.randint(1, 2))).encode())
    read = [(data, values) for data in files if (values := plain_yaml._of_lines(data))]
    assert len(read) > 100
    for data, values in read:
        assert repr(values) == repr(yaml.safe_load(data)), data


def test_settings_are_found_by_name_or_by_path(tmp_path):
    """A name never leaves the folder of its kind for the working directory."""
    (tmp_path / "good.yaml").write_text("x: 1\n")
    assert find_yaml("good", tmp_path, "--x") == tmp_path / "good.yaml"
    assert find_yaml("other/mine.yml", tmp_path, "--x").parts == ("other", "mine.yml")
    with pytest.raises(ValueError, match="--x 'mine' is none of good, nor a YAML file"):
        find_yaml("mine", tmp_path, "--x")
    for load, flag, known in (
        (translation.load_prompt, "--prompt", "lm_eval"),
        (word_problems.load_prompt, "--prompt", "gsm8k"),
        (choice_sets.load_set, "--set", "arc_easy"),
        (templates.load_template, "--template", "hendrycks"),
    ):
        with pytest.raises(ValueError, match=f"{flag} 'nope' is none of .*{known}"):
            load("nope")
        with pytest.raises(ValueError, match=r"nope\.yaml does not exist"):
            load(str(tmp_path / "nope.yaml"))


def laughs(kind, levels=9, times=9):
    """Each line repeats the one before it several times."""
    lines = ["a0: &a0 {x0: 1}" if kind == "merge" else "a0: &a0 [lol]"]
    for i in range(1, levels + 1):
        refs = ", ".join([f"*a{i - 1}"] * times)
        inner = f"{{<<: [{refs}], x{i}: 1}}" if kind == "merge" else f"[{refs}]"
        lines.append(f"a{i}: &a{i} {inner}")
    return "\n".join(lines) + "\n"


HOSTILE = {
    "aliases": laughs("alias"),
    "merges": laughs("merge"),
    "merges of many": laughs("merge", 2, 900),
    "itself": "a: &a [*a]\n",
    "itself deeper": "a: &a {b: [1, {c: *a}]}\n",
    "deep": "a: " + "[" * 5000 + "]" * 5000,
    "deep mapping": "{a: " * 5000,
    "long": "a: " + "x" * LONGEST,
    "many": "a: [" + "1," * 11_000 + "]",
    "many aliases": "a: &a 1\nb: [" + "*a," * 2000 + "]",
    "long number": "a: " + "9" * 5000,
    "month 13": "a: 2024-13-45\n",
    "tag": "a: !!python/object/apply:os.system [touch /tmp/never]\n",
    "twice": "lr: 1\nother: 2\nlr: 3\n",
    "twice inside": "a:\n  lr: 1\n  lr: 1\n",
    "tab": "a:\n\tb: 1\n",
    "two documents": "a: 1\n---\nb: 2\n",
    "bytes": "a: \x00",
    "nothing": "",
    "list": "- a\n",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_one_line_and_cost_nothing(name, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(HOSTILE[name])
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"a\.yaml ") as caught:
        load_yaml(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(str(caught.value)) < 1000 + len(str(path)) and "\n" not in str(caught.value)
    assert peak < 2**27, "memory"


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    for path in (tmp_path / "pipe.yaml", "/dev/zero", tmp_path):
        with pytest.raises(ValueError, match="not a file"):
            load_yaml(path)
    (tmp_path / "b.yaml").write_bytes(b"a: \xff\n")
    with pytest.raises(ValueError, match=r"b\.yaml is not YAML: .*utf-8"):
        load_yaml(tmp_path / "b.yaml")
