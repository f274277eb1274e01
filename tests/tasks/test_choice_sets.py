"""tasks/choice_sets.py and tasks/layouts.py: each form in which a set is published gives the same
questions, what is wrong in a row or in a set's YAML is one line, and the fetch script lays files
where they are looked for. That prompts and figures are lm-eval's: tests/test_choice_oracle.py."""

import csv
import json
import os
import re
import subprocess
import zipfile

import choice_files
import pytest
from builders import ROOT, write_jsonl

from tasks.choice_sets import load_set
from tasks.questions import read_data
from tasks.templates import load_template

SETS = sorted(path.stem for path in (ROOT / "configs" / "choice_sets").glob("*.yaml"))
CASES = [(n, f) for n, forms in choice_files.FORMS.items() for f in range(len(forms))]


# ---------------------------------------------------------------------------------------------
# The sets


@pytest.mark.parametrize("name", choice_files.FORMS)
def test_every_form_gives_the_same_questions(name, tmp_path):
    layout, hashes = load_set(name).layout, set()
    for form in range(len(choice_files.FORMS[name])):
        root = tmp_path / str(form)
        files = choice_files.write(root, name, form)
        data = read_data(root, 3, layout=layout)
        hashes.add((data.hash, data.examples_hash))
        alone = read_data(files[layout.ask], layout=layout)
        assert alone.hash == data.hash and len(data.questions) == 12
        assert all(str(root) in q.where for q in data.questions)
    assert len(hashes) == 1


def test_what_the_rows_of_each_set_become(tmp_path):
    """Figures by hand, of one row of each set."""
    asked = {}
    for name in choice_files.FORMS:
        choice_files.write(tmp_path / name, name)
        data = read_data(tmp_path / name, layout=load_set(name).layout)
        by_id = sorted(data.questions, key=lambda q: int(re.findall(r"\d+", q.where)[-1]))
        asked[name] = by_id[1], choice_files.rows_of(name, load_set(name).layout.ask)[1]
    q, row = asked["arc_challenge"]  # its labels are 1, 2, 3, and it has three choices
    assert row["answerKey"] == "2" and q.answer == 1 and len(q.choices) == 3
    q, row = asked["hellaswag"]
    assert "[" in row["ctx_a"] and "[" not in q.question and row["ctx_b"].startswith("THE ")
    label, context = row["activity_label"].strip(), row["ctx_a"].replace("[header] ", "")
    end = row["ctx_b"].capitalize()
    assert q.question == f"{label}: {context} {end}".replace(" [title]", ". ").replace("  ", " ")
    assert [c.endswith("é.") and "[" not in c and c == c.strip() for c in q.choices] == [True] * 4
    q, row = asked["winogrande"]
    own = load_set("winogrande").own
    before, _, after = row["sentence"].partition("_")  # a second one stays
    assert own.render_question(q, index=1) == before + row["option2"] and "_free" in after
    assert own.render_answer(q, 1, "continuation") == " " + after.strip()
    assert q.answer == int(row["answer"]) - 1
    q, row = asked["boolq"]
    assert q.question.startswith(f"{row['title']} -- {row['passage']}\nQuestion: ")
    assert (q.choices, q.answer) == (("no", "yes"), int(row["answer"]))
    q, row = asked["mmlu_pro"]
    assert (q.subject, q.answer) == ("computer science", "ABCDEFGHIJ".index(row["answer"]))
    q, row = asked["piqa"]
    assert (q.choices, q.answer) == ((row["sol1"], row["sol2"]), 1)


def test_truthfulqa_is_told_apart_by_the_data(data_dir, tmp_path):
    rows = json.loads((data_dir / "truthfulqa" / "mc_task.json").read_text())
    for name, key in (("truthfulqa_mc1", "mc1_targets"), ("truthfulqa_mc2", "mc2_targets")):
        choice_set = load_set(name)
        data = read_data(data_dir / "truthfulqa", layout=choice_set.layout)
        assert len(data.questions) == 790
        assert choice_set.release_of(data) == "release of January 2025"
        for q, row in zip(data.questions, rows):
            assert list(q.choices) == list(row[key])
            assert [q.choices[i] for i in q.right] == [t for t, m in row[key].items() if m]
        (tmp_path / "mc_task.json").write_text(json.dumps([*rows, *rows[:27]]))
        older = read_data(tmp_path, layout=choice_set.layout)
        assert choice_set.release_of(older) == "release of 2021"
        (tmp_path / "mc_task.json").write_text(json.dumps(rows[:700]))
        part = read_data(tmp_path, layout=choice_set.layout)
        assert choice_set.release_of(part).startswith("700 questions, unlike the 817 of")
        assert choice_set.release_of(part).endswith(": not a score")
        with pytest.raises(ValueError, match=f"examples of {name} stand in its prompt"):
            read_data(data_dir / "truthfulqa", 1, layout=choice_set.layout)


def test_examples_are_of_each_subject_or_of_all(tmp_path):
    choice_files.write(tmp_path, "mmlu_pro")
    layout = load_set("mmlu_pro").layout
    rows = choice_files.rows_of("mmlu_pro", "val")
    for q in read_data(tmp_path, 3, layout=layout).questions:
        shown = read_data(tmp_path, 3, layout=layout).examples[q.subject]
        assert [s.question for s in shown] == [row["question"] for row in rows[:3]]
    with pytest.raises(
        ValueError, match="13 few-shot examples asked for, but the val split has 12"
    ):
        read_data(tmp_path, 13, layout=layout)
    with pytest.raises(ValueError, match="examples of mmlu_pro are what --split val asks"):
        read_data(tmp_path, 1, split="val", layout=layout)


@pytest.mark.parametrize("name", SETS)
def test_what_is_missing_says_where_it_comes_from(name, tmp_path):
    """And a set's own file names only splits, templates and figures that there are."""
    choice_set = load_set(name)
    assert choice_set.template(choice_set.own.name) == choice_set.own
    what = "fetch_mmlu.sh" if name == "mmlu" else f"fetch_choice_sets.sh {choice_set.layout.fetch}"
    with pytest.raises(ValueError, match=rf"no \w+ questions there; scripts/{what} downloads"):
        read_data(tmp_path, layout=choice_set.layout)
    script = (ROOT / "scripts" / "fetch_choice_sets.sh").read_text()
    assert name == "mmlu" or f"\n{choice_set.layout.fetch}() {{" in script
    card = (ROOT / "configs" / "choice_sets" / "README.md").read_text()
    assert f"`{name}`" in card


def test_hidden_answers_are_hidden_where_the_set_says_so(tmp_path):
    names = ["id", "question", "A", "B", "C", "D"]
    (tmp_path / "test").mkdir()
    with open(tmp_path / "test" / "law_test.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([names, ["7", "问", *"wxyz"], ["9", "问?", *"wxyz"]])
    data = read_data(tmp_path, split="test", layout=load_set("ceval").layout)
    assert data.hidden and [(q.id, q.right) for q in data.questions] == [("7", ()), ("9", ())]
    with pytest.raises(ValueError, match="no answer among its fields"):
        read_data(tmp_path, layout=load_set("cmmlu").layout)
    row = choice_files.hellaswag(1)
    hidden = {key: value for key, value in row.items() if key != "label"}
    write_jsonl(tmp_path / "hellaswag_test.jsonl", [row, hidden])
    with pytest.raises(ValueError, match=r"test.jsonl:2: no answer, while others"):
        read_data(tmp_path, split="test", layout=load_set("hellaswag").layout)


# ---------------------------------------------------------------------------------------------
# Rows that are wrong


def changed(**values):
    return lambda row: row | values


BAD_ROWS = [
    ("arc_easy", changed(answerKey="Z"), r"answer 'Z' is none of A, B, C, D"),
    ("arc_easy", changed(answerKey=""), r"no answer among its fields"),
    ("arc_easy", changed(question={"stem": "q"}), r"there is no 'question.choices.text', which"),
    ("arc_easy", changed(question="q"), r"there is no 'question.choices.text'"),
    ("hellaswag", changed(label=4), r"answer '4' is none of A to D, nor 0 to 3"),
    ("hellaswag", changed(endings=["a"]), r"four choices expected, not 1 in \['a'\]"),
    ("hellaswag", changed(ctx_b=None), r"'ctx_b' is no text"),
    ("winogrande", changed(answer="0"), r"answer '0' is none of A to B, nor 1 to 2"),
    ("piqa", changed(sol2=3.5), None),
    ("piqa", changed(sol2=[1]), r"'sol2' is no text"),
    ("boolq", changed(answer="maybe"), r"answer 'maybe' is none of A to B, nor 0 to 1"),
    ("mmlu_pro", changed(options=["a", "b"]), r"3 to 10 choices expected, not 2 in"),
    ("mmlu_pro", changed(answer="Q"), r"answer 'Q' is none of A to"),
]


@pytest.mark.parametrize("name,change,message", BAD_ROWS)
def test_bad_rows_are_named_by_file_and_line(name, change, message, tmp_path):
    row = choice_files.FORMS[name][0][1](0)
    path = write_jsonl(tmp_path / "asked.jsonl", [row, change(row)])
    (tmp_path / "asked-labels.lst").write_text("0\n1\n")
    if message is None:
        assert len(read_data(path, layout=load_set(name).layout).questions) == 2
        return
    with pytest.raises(ValueError, match=rf"asked.jsonl:2: {message}"):
        read_data(path, layout=load_set(name).layout)


@pytest.mark.parametrize(
    "targets,message",
    [
        ({"a": 1, "b": 2}, "'mc2_targets' is no list of 0 and 1"),
        ({"a": 0, "b": 0}, "a 1 for one at least"),
        ({"choices": ["a", "b"], "labels": [1]}, "2 choices, of which 'mc2_targets.labels' marks"),
        ({"a": "yes", "b": "no"}, "is no list of texts"),
    ],
)
def test_bad_marks_are_named(targets, message, tmp_path):
    path = tmp_path / "mc_task.json"
    path.write_text(json.dumps([{"question": "q?", "mc2_targets": targets}]))
    with pytest.raises(ValueError, match=message):
        read_data(path, layout=load_set("truthfulqa_mc2").layout)


def test_answers_beside_must_be_as_many(tmp_path):
    files = choice_files.write(tmp_path, "piqa")
    (tmp_path / "valid-labels.lst").write_text("0\n" * 11)
    with pytest.raises(
        ValueError, match=r"valid-labels.lst: 11 answers to 12 rows of .*valid.jsonl"
    ):
        read_data(files["val"], layout=load_set("piqa").layout)


# ---------------------------------------------------------------------------------------------
# A set of one's own

MINE = """
files: {test: [mine]}
rows:
  - {question: "{q} ({a.b:upper})", choices: ["{wrong}", "{right}"], answer: "{right}"}
template: {question: "Q: {question}\\nA:", answer: " {choice}"}
"""


def test_a_set_of_ones_own(tmp_path):
    """The same from JSON, and from CSV and TSV, whose columns may have dots in their names."""
    (tmp_path / "own.yaml").write_text(MINE + r"rewrites: [['^ *\[.*?\]', '']]" + "\n")
    layout = load_set(str(tmp_path / "own.yaml")).layout
    row = {"q": "Why?", "a.b": "so", "wrong": "w", "right": "r"}
    for suffix, delimiter in ((".csv", ","), (".tsv", "\t")):
        with open(tmp_path / f"mine{suffix}", "w", newline="", encoding="utf-8") as file:
            csv.writer(file, delimiter=delimiter).writerows([row, row.values()])
    nested = {"q": "Why?", "a": {"b": "so"}, "wrong": "w", "right": " [x]r"}
    write_jsonl(tmp_path / "mine.jsonl", [nested])
    for suffix in (".csv", ".tsv", ".jsonl"):
        (q,) = read_data(tmp_path / f"mine{suffix}", layout=layout).questions
        assert q[:4] == ("own", "Why? (SO)", ("w", "r"), 1)


def test_a_place_that_is_always_right(tmp_path):
    for place, good in ((1, True), (2, False)):
        (tmp_path / f"own{place}.yaml").write_text(
            MINE.replace('answer: "{right}"', f"answer: {place}")
        )
        layout = load_set(str(tmp_path / f"own{place}.yaml")).layout
        row = {"q": "Why?", "a": {"b": "so"}, "wrong": "w", "right": "r"}
        path = write_jsonl(tmp_path / "mine.jsonl", [row])
        if good:
            assert read_data(path, layout=layout).questions[0].answer == 1
            continue
        with pytest.raises(ValueError, match=r"mine.jsonl:1: number 3 of 2 choices is said to be"):
            read_data(path, layout=layout)


def test_several_right_answers_by_letter(tmp_path):
    text = 'choices: [2, 4]\nrows: [{question: "{q}", choices: c, labels: l, answer: a}]\n'
    (tmp_path / "own.yaml").write_text(text + "template: letters\n")
    layout = load_set(str(tmp_path / "own.yaml")).layout
    row = {"q": "Which?", "c": ["w", "x", "y"], "l": ["A", "B", "C"], "a": ["C", "A"]}
    one = read_data(write_jsonl(tmp_path / "x.jsonl", [row]), layout=layout)
    other = read_data(write_jsonl(tmp_path / "x.jsonl", [row | {"a": "A"}]), layout=layout)
    assert (one.questions[0].right, other.questions[0].right) == ((0, 2), (0,))
    assert one.hash != other.hash


@pytest.mark.parametrize(
    "change,message",
    [
        (("rows:", "row:"), "'row' is unknown; a set has template, choices, files"),
        (('answer: "{right}"', "anwser: x"), "rows: 'anwser' is unknown; a form has question"),
        ((', answer: "{right}"', ""), "each form needs question, choices and either answer or"),
        ((":upper", ":shout"), "rows: question: 'shout' is none of strip, lower"),
        (('["{wrong}", "{right}"]', "3"), "rows: choices must be a path or a text, not 3"),
        (("{test: [mine]}", "{exam: [mine]}"), "files must have lists of names by split"),
        (("{test: [mine]}", "[mine]"), "files must be `key: value` lines, not"),
        (("files:", "ask: val\nfiles:"), "ask must be one of test, not 'val'"),
        (("files:", "few_shot: train\nfiles:"), "few_shot must be one of test, none, not 'train'"),
        (("files:", "choices: [5, 2]\nfiles:"), r"choices must be a number, or the least and"),
        (("files:", "choices: many\nfiles:"), "choices must be a whole number or a list, not"),
        (("files:", "metric: f1\nfiles:"), "metric must be one of accuracy, accuracy_normalised"),
        (("files:", "normalisation: token\nfiles:"), "normalisation must be one of characters"),
        (("files:", "scoring: letter\nfiles:"), "scoring must be continuation with its template"),
        (("files:", "rewrites: [['(', x]]\nfiles:"), "rewrites: .* cannot be applied"),
        (("files:", "rewrites: [x]\nfiles:"), r"rewrites must be .* pairs, not 'x'"),
        (("files:", "published: {many: all}\nfiles:"), "published must have `number of"),
        (("files:", "published: 3\nfiles:"), "published must be `key: value` lines, not 3"),
        (("files:", "answers_from: '1'\nfiles:"), "answers_from must be a whole number, not '1'"),
        (("files:", "for_all: 1\nfiles:"), "for_all must be true or false, not 1"),
        ((" {choice}", " {option}"), "template: a field in braces is unknown: 'option'"),
        (("template:", "templates:"), "'templates' is unknown"),
        (('{question: "Q: {question}\\nA:", answer: " {choice}"}', "nope"), "'nope' is none of"),
        (('A:",', 'A:", blank: _,'), "with a blank, question needs {choice} and answer {after}"),
        (("files:", "files:\nfiles:"), "'files' stands there twice"),
    ],
)
def test_bad_yaml_is_one_line_that_names_the_key(change, message, tmp_path):
    assert MINE.count(change[0]) == 1
    path = tmp_path / "own.yaml"
    path.write_text(MINE.replace(*change))
    with pytest.raises(ValueError, match=message) as found:
        load_set(str(path))
    assert "\n" not in str(found.value)
    assert str(path) in str(found.value) or "--template" in str(found.value)


def test_unknown_sets_are_named():
    with pytest.raises(ValueError, match="--set 'nope' is none of arc_challenge, arc_easy, boolq"):
        load_set("nope")
    with pytest.raises(ValueError, match=r"nope.yaml does not exist"):
        load_set("nope.yaml")


def test_templates_refuse_what_they_cannot_show(tmp_path):
    choice_files.write(tmp_path, "mmlu_pro")
    data = read_data(tmp_path, layout=load_set("mmlu_pro").layout)
    shown = next(q for q in data.questions if len(q.choices) == 10)
    with pytest.raises(
        ValueError, match="lm_eval shows 4 choices, the question has 10: --template"
    ):
        load_template("lm_eval").check(shown, "letter")
    load_template("letters").check(shown, "letter")
    many = shown._replace(choices=tuple("x" * 27))
    with pytest.raises(ValueError, match="no letters for 27 choices: --scoring continuation"):
        load_template("letters").check(many, "letter")
    load_template("letters").check(many, "continuation")
    with pytest.raises(ValueError, match="no '_' in the question, to put a choice in"):
        load_set("winogrande").own.check(shown, "continuation")


# ---------------------------------------------------------------------------------------------
# The fetch script, with a curl that copies from a folder

CURL = """#!/bin/sh
while [ $# -gt 2 ]; do [ "$1" = --output ] && to=$2; shift; done
cp "$SITE/$(basename "$2")" "$to"
"""


def test_what_is_fetched_is_found(tmp_path):
    """Archives as their authors pack them, of as many rows as they have."""
    site, data = tmp_path / "site", tmp_path / "data"
    for folder in (site, tmp_path / "bin"):
        folder.mkdir()
    (tmp_path / "bin" / "curl").write_text(CURL)
    (tmp_path / "bin" / "curl").chmod(0o755)
    packed = {
        "ARC-V1-Feb2018.zip": [
            ("ARC-V1-Feb2018-2/ARC-Easy/ARC-Easy-Test.jsonl", choice_files.arc, 2376),
            ("ARC-V1-Feb2018-2/ARC-Challenge/ARC-Challenge-Test.jsonl", choice_files.arc, 1172),
        ],
        "OpenBookQA-V1-Sep2018.zip": [
            ("OpenBookQA-V1-Sep2018/Data/Main/test.jsonl", choice_files.openbookqa, 500)
        ],
        "winogrande_1.1.zip": [("winogrande_1.1/dev.jsonl", choice_files.winogrande, 1267)],
        "dev.jsonl": [(None, choice_files.boolq, 3270)],
        "train.jsonl": [(None, choice_files.boolq, 9427)],
    }
    for name, members in packed.items():
        for member, make, n in members:
            row = json.dumps(make(1)) + "\n"
            if member is None:
                (site / name).write_text(row * n)
                continue
            with zipfile.ZipFile(site / name, "a") as archive:
                archive.writestr(member, row * n)
    names = ["arc", "openbookqa", "winogrande", "boolq"]
    environment = os.environ | {"SITE": str(site), "DATA": str(data)}
    environment["PATH"] = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    command = ["bash", str(ROOT / "scripts" / "fetch_choice_sets.sh")]
    subprocess.run([*command, *names], env=environment, check=True, capture_output=True)
    for name in ("arc_easy", "arc_challenge", "openbookqa", "winogrande", "boolq"):
        choice_set = load_set(name)
        found = read_data(data / choice_set.layout.fetch, layout=choice_set.layout)
        assert choice_set.release_of(found) in ("test split", "validation split"), name
    again = subprocess.run([*command, "arc"], env=environment, capture_output=True, text=True)
    assert again.returncode == 0 and "is already there" in again.stderr
    offline = subprocess.run(
        [*command, "hellaswag"], env=environment, capture_output=True, text=True
    )
    assert offline.returncode == 1 and "without internet here, fetch it elsewhere" in offline.stderr
