"""tasks/questions.py: every layout gives the same questions, what is wrong is named by file and
line, and templates are compared with literals byte for byte."""

import csv
import gzip
import json
import os
import time
from collections import Counter

import pytest
from builders import ROOT

from tasks import questions as room
from tasks.questions import LETTERS, Question, read_data, subject_table
from tasks.templates import load_template

# ---------------------------------------------------------------------------------------------
# Questions

ASKED = [
    Question("physics", 'What is\nnull, "quoted"?', ("None", "NA", "nan", "null"), 2, ""),
    Question("physics", "1 + 1 =", ("0", "1", "2", "3"), 2, ""),
    Question("zoology", "雪豹?", ("a, b", " c ", "D", "é"), 0, ""),
]
SHOWN = [
    Question(s, f"Example of {s}?", ("w", "x", "y", "z"), 3, "") for s in ("physics", "zoology")
]


def write_csv(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def by_subject(questions):
    return {s: [q for q in questions if q.subject == s] for s in ("physics", "zoology")}


def layout_mmlu(root):
    for split, questions in (("dev", SHOWN), ("test", ASKED)):
        for subject, own in by_subject(questions).items():
            rows = [[q.question, *q.choices, LETTERS[q.answer]] for q in own]
            write_csv(root / split / f"{subject}_{split}.csv", rows)


def layout_header(root):
    for split, questions in (("dev", SHOWN), ("test", ASKED)):
        for subject, own in by_subject(questions).items():
            rows = [[q.question, *q.choices, q.answer] for q in own]
            names = ["question", "A", "B", "C", "D", "answer"]
            write_csv(root / split / f"{subject}.csv", [names, *rows])


def layout_one_csv(root):
    for split, questions in (("dev", SHOWN), ("test", ASKED)):
        rows = [[q.subject, q.question, json.dumps(q.choices), q.answer] for q in questions]
        write_csv(root / f"{split}.csv", [["subject", "question", "choices", "answer"], *rows])


def layout_cmmlu(root):
    for split, questions in (("dev", SHOWN), ("test", ASKED)):
        for subject, own in by_subject(questions).items():
            rows = [[i, q.question, *q.choices, LETTERS[q.answer]] for i, q in enumerate(own)]
            names = ["", "Question", "A", "B", "C", "D", "Answer"]
            write_csv(root / split / f"{subject}.csv", [names, *rows])


def layout_jsonl(root):
    for split, questions in (("dev", SHOWN), ("test", ASKED)):
        rows = [q._asdict() | {"choices": list(q.choices)} for q in questions]
        (root / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def layout_parquet(root):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    for split, questions in (("dev", SHOWN), ("test", ASKED)):
        for folder in ("all", "physics"):  # a data set's snapshot has each subject and all of them
            (root / folder).mkdir(exist_ok=True)
            rows = [q._asdict() | {"choices": list(q.choices)} for q in questions]
            rows = [{k: v for k, v in row.items() if k != "where"} for row in rows]
            table = pyarrow.Table.from_pylist(rows)
            parquet.write_table(table, root / folder / f"{split}-00000-of-00001.parquet")


LAYOUTS = [layout_mmlu, layout_header, layout_one_csv, layout_cmmlu, layout_jsonl, layout_parquet]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_every_layout_gives_the_same_questions(layout, tmp_path):
    layout(tmp_path)
    data = read_data(tmp_path, 1)
    assert [q[:4] for q in data.questions] == [q[:4] for q in ASKED]
    assert [q[:4] for s in data.subjects for q in data.examples[s]] == [q[:4] for q in SHOWN]
    assert all(str(tmp_path) in q.where for q in data.questions)
    again = tmp_path / "again"
    again.mkdir()
    layout_mmlu(again)
    assert read_data(again, 1).hash == data.hash  # told by the content, not by the layout
    assert [q.subject for q in read_data(tmp_path, subjects=["zoology"]).questions] == ["zoology"]
    assert len(read_data(tmp_path, limit=1).questions) == 2


def test_ceval_is_read_from_val(tmp_path):
    names = ["id", "question", "A", "B", "C", "D", "answer", "explanation"]
    for split, answer in (("val", "B"), ("test", "")):
        write_csv(
            tmp_path / split / f"law_{split}.csv", [names, [0, "问", *"wxyz", answer, "because"]]
        )
    assert read_data(tmp_path, split="val").questions[0][:4] == ("law", "问", tuple("wxyz"), 1)
    with pytest.raises(ValueError, match=r"law_test.csv:2: no answer .*--split val"):
        read_data(tmp_path)


BAD_ROWS = [
    ("q,a,b,c,d,A\n\nq,a,b,c,A\n", r"x_test.csv:3: 5 fields where 6 are expected"),
    ('q,a,b,c,d,A\n"two\nlines",a,b,c,d,E\n', r"x_test.csv:2: answer 'E' is none of A to D"),
    ("q,a,b,c,d,5\n", r"x_test.csv:1: answer '5' is none of A to D, nor 0 to 3 or 1 to 4"),
    ("q,a,b,c,d,0\nq,a,b,c,d,4\n", r"x_test.csv:2: answer 4 of four .* from 0 \(.*x_test.csv:1\)"),
    ("q,a,b,c,d,1\nq,a,b,c,d,3\n", r"x_test.csv:1: .* from 0 or from 1: .* write A to D"),
    ("q,a,b,c,d,2.5\n", r"x_test.csv:1: answer '2.5' is none of"),
    ("question,A,B,C,D,E,target\nq,a,b,c,d,e,A\n", r"x_test.csv:2: .*there is a choice E"),
    ("question,A,B,C,D,solution\nq,a,b,c,d,A\n", r"x_test.csv:2: no answer .*solution"),
    ("question,choices,answer\nq,['a' 'b' 'c' 'd'],A\n", r"four choices expected, not 1 in"),
    ("question,choices,answer\nq,__import__('os'),A\n", r"is not a list as JSON or Python"),
    ("question,choices,answer\nq," + "[" * 5000 + ",A\n", r"is not a list as JSON or Python"),
    ("  ,a,b,c,d,A\n", r"x_test.csv:1: question is empty"),
    ('q,a,b,c,d,A\nq,"a"b,c,d,A\n', r"x_test.csv:2: not CSV"),
    ("question,A,B,C,D,answer\nq,a,b,c,d,\n", r"x_test.csv:2: no answer"),
    ("id,question,A,B,C,D\n0,q,a,b,c,d\n", r"x_test.csv:2: no answer .*--split val"),
    ("", r"x_test.csv:1: no question in this file"),
    ("question,choices,answer\nq,[1],A\n", r"x_test.csv:2: four choices expected, not 1 in \[1\]"),
]


@pytest.mark.parametrize("content,message", BAD_ROWS)
def test_bad_csv_rows_are_named_by_file_and_line(content, message, tmp_path):
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "x_test.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_data(tmp_path)


@pytest.mark.parametrize(
    "row,message",
    [
        (
            {"question": "q", "choices": list("abcd"), "answer": 1},
            "subject is missing.*fields are question, cho",
        ),
        ({"question": None, "choices": list("abcd"), "answer": 1, "subject": "s"}, "question is"),
        (
            {"question": "q", "choices": [1, 2, 3, 4], "answer": 1, "subject": "s"},
            "A is missing or",
        ),
        ({"question": "q", "choices": list("abc"), "answer": 1, "subject": "s"}, "four choices"),
        ({"question": "q", "choices": list("abcd"), "answer": -1, "subject": "s"}, "answer '-1'"),
        (
            {"question": "q", "options": list("abcdefghij"), "answer": "I", "subject": "s"},
            "four choices expected, not 10 in",
        ),
        ([1], "an object"),
    ],
)
def test_bad_jsonl_rows_are_named_by_file_and_line(row, message, tmp_path):
    good = {"question": "q", "choices": list("abcd"), "answer": 1, "subject": "s"}
    (tmp_path / "test.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=rf"test.jsonl:2: {message}"):
        read_data(tmp_path)


def answers_of(root):
    return [q.answer for q in read_data(root).questions]


def rows_of(answers, header=None):
    rows = [f"q{i},one,two,three,four,{answer}\n" for i, answer in enumerate(answers)]
    return "".join([header or "", *rows])


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ("abcd", [0, 1, 2, 3]),
        ("AbCd", [0, 1, 2, 3]),
        (["(A)", "b.", "C)", " D "], [0, 1, 2, 3]),
        ("0123", [0, 1, 2, 3]),
        ("1234", [0, 1, 2, 3]),
        ("32140", None),
        ("123", None),
        ("4", [3]),
        ("0", [0]),
        (["0.0", "2.0"], [0, 2]),
        (["4.0", "2.0"], [3, 1]),
        (["2.0"], None),
        (["A", "4", "1"], [0, 3, 0]),
    ],
    ids=str,
)
def test_numbered_answers_are_never_one_off(answers, expected, tmp_path):
    (tmp_path / "test").mkdir()
    (tmp_path / "test/anatomy_test.csv").write_text(rows_of(answers))
    if expected is None:
        with pytest.raises(ValueError, match=r"anatomy_test\.csv:\d.*count from 0"):
            read_data(tmp_path)
    else:
        assert answers_of(tmp_path) == expected


def test_all_files_tell_where_numbers_begin(tmp_path):
    """A small subject, or the dev split, may have neither a 0 nor a 4 of its own."""
    for split in ("dev", "test"):
        (tmp_path / split).mkdir()
    (tmp_path / "test/anatomy_test.csv").write_text(rows_of("123"))
    (tmp_path / "test/zoology_test.csv").write_text(rows_of("2"))
    (tmp_path / "dev/anatomy_dev.csv").write_text(rows_of("21"))
    with pytest.raises(ValueError, match="neither a 0 nor a 4"):
        read_data(tmp_path)
    (tmp_path / "test/zoology_test.csv").write_text(rows_of("24"))
    data = read_data(tmp_path, 1, subjects=["anatomy"])
    assert [q.answer for q in data.questions] == [0, 1, 2]
    assert data.examples["anatomy"][0].answer == 1
    (tmp_path / "test/zoology_test.csv").write_text(rows_of("2"))
    (tmp_path / "dev/anatomy_dev.csv").write_text(rows_of("20"))
    assert answers_of(tmp_path) == [1, 2, 3, 2]
    (tmp_path / "test/zoology_test.csv").write_text(rows_of("4"))
    with pytest.raises(ValueError, match=r"zoology_test.csv:1: answer 4 .*anatomy_dev.csv:2"):
        read_data(tmp_path)


@pytest.mark.parametrize("name", ["answer", "Target", "label", "correct_answer", "answer_idx"])
def test_other_names_of_the_answer(name, tmp_path):
    (tmp_path / "test").mkdir()
    header = f"question,A,B,C,D,{name}\n"
    (tmp_path / "test/anatomy_test.csv").write_text(rows_of("DA", header))
    assert answers_of(tmp_path) == [3, 0]


def test_lists_as_python_and_json_print_them(tmp_path):
    rows = [["question", "choices", "answer"]]
    lists = ['["it\'s", "b", "c", "d"]', str(["it's", "b", "c", "d"]), "('it\\'s', 'b', 'c', 'd')"]
    write_csv(tmp_path / "test/anatomy_test.csv", [*rows, *(["q", text, 0] for text in lists[:2])])
    assert [q.choices for q in read_data(tmp_path).questions] == [("it's", "b", "c", "d")] * 2
    write_csv(tmp_path / "test/anatomy_test.csv", [*rows, ["q", lists[2], 0]])
    with pytest.raises(ValueError, match="four choices expected"):
        read_data(tmp_path)


def test_a_file_is_read_again_where_it_may_have_changed(tmp_path, monkeypatch):
    (tmp_path / "test").mkdir()
    path, read, rows = tmp_path / "test/anatomy_test.csv", [], room.rows_of

    def counted(path, layout):
        read.append(path)
        return rows(path, layout)

    monkeypatch.setattr(room, "rows_of", counted)
    for answers, age, times in (
        ("DA", 100, 1),  # checked, then planned
        ("AD", 99, 2),  # as long, at another time
        ("BC", 0, 4),  # just written: what is written in the same moment has the same time
    ):
        path.write_text(rows_of(answers))
        os.utime(path, (time.time() - age,) * 2)
        wanted = ["ABCD".index(letter) for letter in answers]
        assert answers_of(tmp_path) == answers_of(tmp_path) == wanted
        assert len(read) == times


def test_long_fields(tmp_path):
    (tmp_path / "test").mkdir()
    (tmp_path / "test/anatomy_test.csv").write_text("Q" * 200_000 + ",a,b,c,d,A\n")
    assert len(read_data(tmp_path).questions[0].question) == 200_000


def test_other_names_and_packings_of_files(tmp_path):
    rows = [q._asdict() | {"choices": list(q.choices)} for q in ASKED]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    for name, content in (
        ("test.ndjson", lines),
        ("test.JSONL", lines),
        ("test.jsonl.gz", gzip.compress(lines)),
        ("test.json", json.dumps(rows, indent=1).encode()),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_bytes(content)
        (folder / "dataset_info.json").write_text('{"features": 1}')
        assert [q[:4] for q in read_data(folder).questions] == [q[:4] for q in ASKED]
        assert [q[:4] for q in read_data(folder / name).questions] == [q[:4] for q in ASKED]
    (tmp_path / "csv/test").mkdir(parents=True)
    packed = gzip.compress(rows_of("abcd").encode())
    (tmp_path / "csv/test/anatomy_test.csv.gz").write_bytes(packed)
    assert read_data(tmp_path / "csv").subjects == ["anatomy"]


def test_missing_data_says_where_to_get_it(tmp_path):
    with pytest.raises(ValueError, match=r"no test questions.*scripts/fetch_mmlu.sh.*dev/SUBJECT"):
        read_data(tmp_path)
    layout_mmlu(tmp_path)
    with pytest.raises(ValueError, match="no 'chemistry'; it has physics, zoology"):
        read_data(tmp_path, subjects=["chemistry"])
    with pytest.raises(ValueError, match=r"2 few-shot examples asked for.* 1 of subject 'physics'"):
        read_data(tmp_path, 2)
    with pytest.raises(ValueError, match=r"0 of subject 'zoology' \(one file has no dev"):
        read_data(tmp_path / "test" / "zoology_test.csv", 1)
    (tmp_path / "test" / "zoology_test.csv").unlink()
    with pytest.raises(ValueError, match="test split has no question of zoology, which the dev"):
        read_data(tmp_path)
    assert read_data(tmp_path, subjects=["physics"]).subjects == ["physics"]


def test_all_of_mmlu_and_cmmlu_is_read(data_dir):
    data = read_data(data_dir / "mmlu", 5)
    assert (len(data.questions), len(data.subjects)) == (14042, 57)
    table = subject_table(data.subjects)["categories"]
    sizes = Counter(table[q.subject] for q in data.questions)
    # the original's group sizes; lm-evaluation-harness moves the 135 of anatomy from other to stem
    assert sizes == {"stem": 3018, "humanities": 4705, "social_sciences": 3077, "other": 3242}
    chinese = read_data(data_dir / "cmmlu", 5)
    assert len(chinese.subjects) == 10
    assert subject_table(chinese.subjects)["names"]["agronomy"] == "农学"


# ---------------------------------------------------------------------------------------------
# Prompts

CAPITAL = Question("world_facts", " Capital of France? ", ("Rome", "Paris", "Oslo", "Bern"), 1, "")
LISTED = "Capital of France? \nA. Rome\nB. Paris\nC. Oslo\nD. Bern\n"
PROMPTS = {
    "lm_eval": "The following are multiple choice questions (with answers) about world facts.\n\n"
    "Capital of France?\nA. Rome\nB. Paris\nC. Oslo\nD. Bern\nAnswer: B\n\n",
    "hendrycks": "The following are multiple choice questions (with answers) about  world facts."
    f"\n\n {LISTED}Answer: B\n\n",
    "continuation": "The following are questions (with answers) about world facts.\n\n"
    "Question: Capital of France?\nAnswer: Paris\n\n",
    "zh": f"以下是一道选择题，请选出正确答案。\n问题:  {LISTED}答案: B\n\n",
    "cmmlu": "以下是关于世界的单项选择题，请直接给出正确答案的选项。\n\n"
    f"题目： {LISTED}答案是：B\n\n",
}


@pytest.mark.parametrize("name", PROMPTS)
def test_templates_byte_for_byte(name):
    template = load_template(name)
    scored = template.scorings[0]
    assert template.render_head("world_facts", "世界", [CAPITAL], scored) == PROMPTS[name]


def test_the_chinese_template_is_the_one_asked_for():
    q = Question("s", "{题}", ("甲", "{b}", "丙", "丁"), 0, "")  # braces in a text are text
    wanted = "以下是一道选择题，请选出正确答案。\n问题: {题}\nA. 甲\nB. {b}\nC. 丙\nD. 丁\n答案: "
    assert load_template("zh").render_question(q).encode() == wanted.encode()


def test_template_hashes_differ_and_do_not_depend_on_the_name(tmp_path):
    hashes = {load_template(name).hash for name in PROMPTS}
    assert len(hashes) == len(PROMPTS)
    copy = tmp_path / "mine.yaml"
    copy.write_bytes((ROOT / "configs" / "prompts" / "zh.yaml").read_bytes())
    assert load_template(copy).hash == load_template("zh").hash
    copy.write_text(copy.read_text().replace("选出", "给出"))
    assert load_template(copy).hash not in hashes


@pytest.mark.parametrize(
    "change,message",
    [
        (("{question}", "{questoin}"), "a field in braces is unknown: 'questoin'"),
        (("answer:", "anwser:"), "field 'answer' is unknown or missing|field 'anwser'"),
        (("{letter}", "the answer"), "answer must have {letter} or {choice}"),
        (("strip_question: true", "strip_question: 'false'"), "must be true or false"),
        (('separator: "\\n\\n"', "separator: 3"), "separator must be text, not 3"),
        (("answer:", "strip_question: true\nanswer:"), "'strip_question' stands there twice"),
    ],
)
def test_bad_templates_are_one_line(change, message, tmp_path):
    path = tmp_path / "mine.yaml"
    text = (ROOT / "configs" / "prompts" / "lm_eval.yaml").read_text().split("\n", 1)[1]
    path.write_text(text.replace(*change))
    with pytest.raises(ValueError, match=message):
        load_template(path)
    with pytest.raises(ValueError, match="'nope' is none of cmmlu, continuation, hendrycks"):
        load_template("nope")
