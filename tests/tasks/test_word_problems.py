"""tasks/word_problems.py: prompts against lm-eval's own templates, and files of every odd kind."""

import json
import subprocess
import sys
from pathlib import Path

import jinja2
import pytest
from builders import ROOT
from test_answers import lm_eval_task

from tasks.chat import Chat
from tasks.word_problems import load_prompt, read_problems


def write(path, *lines):
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def problem_line(question="How many?", answer="So 1 + 1 = 2.\n#### 2"):
    return json.dumps({"question": question, "answer": answer})


@pytest.mark.parametrize(
    "ours, theirs, language",
    [
        ("gsm8k", "gsm8k/gsm8k.yaml", "en"),
        ("gsm8k_cot", "gsm8k/gsm8k-cot.yaml", "en"),
        *(
            (f"mgsm_{mode}", f"mgsm/{mode}/mgsm_{mode}_{language}.yaml", language)
            for mode in ("direct", "native_cot")
            for language in ["bn", "de", "en", "es", "fr", "ja", "ru", "sw", "te", "th", "zh"]
        ),
    ],
)
def test_prompts_and_stop_strings_are_lm_evals(tmp_path, ours, theirs, language):
    lm_eval = pytest.importorskip("lm_eval")
    task = lm_eval_task(Path(lm_eval.__file__).parent / "tasks" / theirs)
    prompt = load_prompt(ours)

    def theirs_of(field, question, answer):
        # Hugging Face's rows of MGSM have no worked answer in the test split
        known = {"question": question, "answer": answer if "gsm8k/" in theirs else None}
        return jinja2.Template(task[field], keep_trailing_newline=True).render(**known)

    name = "test.jsonl" if "gsm8k/" in theirs else f"mgsm_{language}.tsv"
    text = problem_line("Wie viele { } \\n?") if name == "test.jsonl" else "Wie viele { }?\t18"
    (problem,) = read_problems(write(tmp_path / name, text))
    shots = []
    if ours == "gsm8k":
        write(tmp_path / "train.jsonl", problem_line("A?", "a\n#### 1"), problem_line("B?"))
        shots = prompt.shots_of(tmp_path, 2)
    wanted = "".join(
        f"{theirs_of('doc_to_text', s.question, s.solution)} "
        f"{theirs_of('doc_to_target', s.question, s.solution)}\n\n"
        for s in shots
    ) + theirs_of("doc_to_text", problem.question, problem.solution)
    assert prompt.render(problem, shots) == wanted
    assert list(prompt.of_language(language).stop) == task["generation_kwargs"]["until"]
    strict = [f for f in task["filter_list"] if f["name"] == "strict-match"]
    if strict:
        pattern = strict[0]["filter"][0]["regex_pattern"]
        assert prompt.of_language(language).strict == pattern


def test_the_eight_examples_come_as_lm_eval_shows_them(tmp_path):
    """Written by scripts/cot_shots.py from the installed harness."""
    lm_eval = pytest.importorskip("lm_eval")
    words = [sys.executable, ROOT / "scripts" / "cot_shots.py", tmp_path / "cot_shots.jsonl"]
    subprocess.run(words, check=True, capture_output=True)
    task = lm_eval_task(Path(lm_eval.__file__).parent / "tasks/gsm8k/gsm8k-cot.yaml")
    samples = task["fewshot_config"]["samples"]
    (problem,) = read_problems(write(tmp_path / "test.jsonl", problem_line("Now?")))
    for name, between in (("gsm8k_cot", "\n\n"), ("deepseek", "\n\n\n")):
        prompt = load_prompt(name)
        shown = [f"Q: {s['question']}\nA: {s['target']}" for s in samples]
        text = prompt.render(problem, prompt.shots_of(tmp_path))
        assert text == between.join([*shown, "Q: Now?\nA:"])


def test_llama_3s_words_as_turns_are_lm_evals(tmp_path):
    """Its own eight examples, each a question and an answer in turn, and where a sample ends."""
    lm_eval = pytest.importorskip("lm_eval")
    source = Path(lm_eval.__file__).parent / "tasks/gsm8k/gsm8k-cot-llama.yaml"
    script, out = ROOT / "scripts" / "cot_shots.py", tmp_path / "cot_llama_shots.jsonl"
    subprocess.run([sys.executable, script, out, source], check=True, capture_output=True)
    task, prompt = lm_eval_task(source), load_prompt("gsm8k_cot_llama")
    (problem,) = read_problems(write(tmp_path / "test.jsonl", problem_line("Now?")))
    told = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    question = jinja2.Template(task["doc_to_text"], keep_trailing_newline=True)
    wanted = [
        f"<user>{question.render(question=s['question'])}<assistant>{s['target']}"
        for s in task["fewshot_config"]["samples"]
    ] + [f"<user>{question.render(question='Now?')}"]
    text = prompt.render(problem, prompt.shots_of(tmp_path), Chat("theirs", told, {}))
    assert text == "".join(wanted)
    assert list(prompt.stop) == task["generation_kwargs"]["until"]
    assert len(wanted) - 1 == prompt.num_few_shot == task["num_fewshot"]


def test_a_limit_and_languages_choose_what_is_asked(tmp_path):
    for language in ("de", "zh"):
        write(tmp_path / f"mgsm_{language}.tsv", "a?\t1", "b?\t2,000", "c?\t3")
    everything = read_problems(tmp_path)
    assert [p.language for p in everything] == ["de"] * 3 + ["zh"] * 3
    assert everything[1].gold == 2000
    assert len({p.name for p in everything}) == 6
    assert [p.name for p in read_problems(tmp_path, ["zh"], 2)] == ["mgsm_zh/1", "mgsm_zh/2"]


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("test.jsonl", "", "no problem"),
        ("test.jsonl", "{", "test.jsonl:1"),
        ("test.jsonl", '{"question": "a?"}', "test.jsonl:1: fields question and answer"),
        ("test.jsonl", '{"question": "a?", "answer": 3}', "must be text"),
        ("test.jsonl", '{"question": "a?", "answer": "none"}', "a number"),
        ("test.jsonl", '{"question": " ", "answer": "3"}', "a question"),
        ("mgsm_de.tsv", "only a question", "mgsm_de.tsv:1: a question, a tab"),
        ("mgsm_de.tsv", "a?\t1\nb?\t2\t3", "mgsm_de.tsv:2: a question, a tab"),
        ("other.txt", "a?\t1", "fetch_gsm8k.sh"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, name, text, said):
    write(tmp_path / name, *text.split("\n"))
    with pytest.raises(ValueError, match=said):
        read_problems(tmp_path)


@pytest.mark.parametrize("mark", ["\u2028", "\x85", "\x0c", "\x1c"])
def test_only_a_newline_ends_a_line(tmp_path, mark):
    """str.splitlines would cut the question in two."""
    write(tmp_path / "mgsm_de.tsv", f"one{mark}two?\t1\r", "b?\t2")
    assert [p.question for p in read_problems(tmp_path)] == [f"one{mark}two?", "b?"]


def test_a_tsv_that_is_not_text_is_named(tmp_path):
    (tmp_path / "mgsm_de.tsv").write_bytes(b"\xff\xfe\t1\n")
    with pytest.raises(ValueError, match=r"mgsm_de\.tsv"):
        read_problems(tmp_path)


@pytest.mark.parametrize(
    "text, said",
    [
        ("question: 'x'", "unknown or missing"),
        ("strict: '('", "regular expression"),
        ("stop: 'Q:'", "stop must be list"),
        ("question: 'no field'", "needs {question}"),
        ("num_few_shot: five", "num_few_shot must be int"),
    ],
)
def test_a_prompt_of_ones_own_is_checked(tmp_path, text, said):
    fields = {
        "question": "question: 'Q {question}'",
        "answer": "answer: ' {solution}'",
        "separator": "separator: ''",
        "shots": "shots: none",
        "num_few_shot": "num_few_shot: 0",
        "stop": "stop: ['Q']",
        "strict": "strict: '[0-9]+'",
    }
    path = tmp_path / "own.yaml"
    if text == "question: 'x'":
        del fields["answer"]
    else:
        fields[text.partition(":")[0]] = text
    write(path, *fields.values())
    with pytest.raises(ValueError, match=said):
        load_prompt(str(path))


def test_unknown_names_are_answered_with_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="deepseek, deepseek_chat, gsm8k, gsm8k_cot"):
        load_prompt("gsm9k")
    write(tmp_path / "mgsm_de.tsv", "a?\t1")
    with pytest.raises(ValueError, match=r"--languages fr: .* has de"):
        read_problems(tmp_path, ["fr"])
    with pytest.raises(ValueError, match=r"cot_shots.jsonl: no such file of examples"):
        load_prompt("gsm8k_cot").shots_of(tmp_path)
    with pytest.raises(ValueError, match="no words in language 'xx'"):
        load_prompt("mgsm_direct").of_language("xx")
