"""tasks/code_prompts.py, problems.py: MBPP's forms, its prompt against lm-eval's template."""

import ast
from pathlib import Path
from types import SimpleNamespace

import jinja2
import pytest
import yaml
from builders import PATIENCE, write_jsonl

from sandbox.judge import Sandbox
from tasks.chat import Chat
from tasks.code_prompts import choose
from tasks.problems import has_plus, read_examples, read_problems
from tasks.programs import split_off


def row(i, **more):
    tests = [f"assert f{i}({x}) == {x + i}" for x in range(3)]
    code = f"def g(x):\n    return x\ndef f{i}(x):\n    return g(x) + {i}"
    return {"task_id": i, "text": f"Add {i}.", "code": code, "test_list": tests} | more


def test_mbpp_after_its_examples_as_lm_eval_asks_it(tmp_path):
    """The 500 of the test split, where the whole set is there."""
    lm_eval = pytest.importorskip("lm_eval")
    file = write_jsonl(tmp_path / "mbpp.jsonl", [row(i) for i in range(1, 975)])
    problems, examples = read_problems(file), read_examples(file, 3)
    assert list(problems) == [f"Mbpp/{i}" for i in range(11, 511)]
    prompt = choose("auto", problems, None)
    folder = Path(lm_eval.__file__).parent / "tasks" / "mbpp"
    text = (folder / "mbpp.yaml").read_text().replace("!function ", "")
    task = yaml.safe_load(text)

    def theirs(field, doc):
        return jinja2.Template(task[field], keep_trailing_newline=True).render(**doc)

    shots = [row(i) | {"is_fewshot": True} for i in (2, 3, 4)]
    wanted = [theirs("doc_to_text", s) + theirs("doc_to_target", s) for s in shots]
    wanted.append(theirs("doc_to_text", row(17)))
    assert prompt.render(problems["Mbpp/17"], examples) == "\n\n".join(wanted)
    assert list(prompt.stop) == task["generation_kwargs"]["until"]
    # the tasks of lm-eval's own examples, read from its source
    tree = ast.parse((folder / "utils.py").read_text())
    ids = [d.values[0].value for d in ast.walk(tree) if isinstance(d, ast.Dict)]
    assert [f"Mbpp/{i}" for i in ids] == [e["task_id"] for e in examples]


def test_mbpps_programs_are_judged_by_their_asserts(tmp_path):
    """Imports and set-up code of the tests, a second suite, and a solution that is wrong."""
    plus = "import math\nfor x in range(9):\n    assert f5(x) == x + 5, math.pi\n"
    rows = [
        row(5, test=plus, test_imports=["import math"]),
        row(6, test=plus.replace("f5(x) == x + 5", "f6(x) == x + 6"), code="def f6(x): return 7"),
        row(7, test="assert f7(1.5) == HALF\n", test_imports=[], test_setup_code="HALF = 8.5"),
    ]
    rows[2]["test"] = "HALF = 8.5\n" + rows[2]["test"]
    problems = read_problems(write_jsonl(tmp_path / "P", rows))
    assert has_plus(problems) and problems["Mbpp/5"]["entry_point"] == "f5"
    assert problems["Mbpp/5"]["prompt"] == '"""\nAdd 5.\nassert f5(0) == 5\n"""\n'
    with Sandbox(1, timeout=PATIENCE) as sandbox:
        kept, left_out = split_off(problems, sandbox)
    assert list(kept) == ["Mbpp/5", "Mbpp/7"] and list(left_out) == ["Mbpp/6"]


@pytest.mark.parametrize(
    "rows, words",
    [
        ([row(5, test_list=[])], "field 'test_list' is no list of texts"),
        ([row(5, code=3)], "code one is missing"),
        ([row(5, code="def h(): pass")], "field 'entry_point' is no name: ''"),
        ([row(5, test_list=["assert ("])], "field 'entry_point'|field 'test' is not Python"),
        ([row(5), row(5)], "task Mbpp/5 appears twice"),
        ([row(5), row(6, test="assert f6(0) == 6")], "some problems have EvalPlus's tests"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, rows, words):
    file = write_jsonl(tmp_path / "P", rows)
    with pytest.raises(ValueError, match=f"P(:{len(rows)})?: .*({words})"):
        read_problems(file)


def test_prompts_that_do_not_fit_are_refused(tmp_path):
    mbpp = read_problems(write_jsonl(tmp_path / "P", [row(11)]))
    plain = {"T/0": {"task_id": "T/0", "prompt": "def f():\n", "entry_point": "f", "test": ""}}
    with pytest.raises(ValueError, match="--prompt completion: MBPP's problems are no beginnings"):
        choose("completion", mbpp, None)
    with pytest.raises(ValueError, match="--prompt mbpp: these problems have no"):
        choose("mbpp", plain, None)
    with pytest.raises(ValueError, match="example Mbpp/2 is not there; --prompt evalplus needs"):
        read_examples(tmp_path / "P", 3)
    assert choose("auto", plain, None).name == "completion"


def test_what_of_a_reply_is_the_program():
    problem = {"task_id": "T/0", "prompt": "def f():\n", "entry_point": "f", "test": ""}
    chat = Chat("theirs", "{% for m in messages %}<{{ m.content | trim }}>{% endfor %}", {})
    asked = choose("auto", {"T/0": problem}, chat)
    text = asked.render(problem, (), chat)
    assert "\n```\ndef f():\n```>" in text and text.endswith(
        "passes corresponding tests:\n```python\n"
    )
    assert asked.program_in(problem, "def f():\n\treturn 1\n```\nDone") == {
        "solution": "def f():\n    return 1"
    }
    whole = choose("evalplus", {"T/0": problem}, None)
    assert whole.render(problem) == "def f():\n"
    assert whole.program_in(problem, "    return 2\nx = 1") == {
        "solution": "def f():\n    return 2"
    }
    assert choose("completion", {"T/0": problem}, None).program_in(problem, "  pass") == {}


INSTRUCT = {
    "humaneval_instruct": "humaneval/humaneval_instruct.yaml",
    "mbpp_instruct": "mbpp/mbpp_instruct.yaml",
    "mbpp_plus_instruct": "mbpp/mbpp_plus_instruct.yaml",
}
CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def lm_evals_task(file, shots):
    """(lm-eval's own task of a YAML, without its data and code, what ends its samples)"""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.config.task import FewshotConfig, TaskConfig

    values, path = {}, Path(lm_eval.__file__).parent / "tasks" / file
    while path:
        own = yaml.safe_load(path.read_text().replace("!function ", ""))
        values = own | values
        path = path.with_name(own["include"]) if "include" in own else None
    names = ("task", "doc_to_text", "doc_to_target", "gen_prefix", "target_delimiter")
    config = TaskConfig(
        **{n: values[n] for n in names if n in values}, output_type="generate_until"
    )
    task = object.__new__(ConfigurableTask)
    task._config, task.multiple_input, task.features, task.prompt = config, 0, [], None
    task.fewshot_cfg = FewshotConfig.from_dict(
        {},
        fewshot_delimiter=config.fewshot_delimiter,
        target_delimiter=config.target_delimiter,
        gen_prefix=config.gen_prefix,
        doc_to_text=config.doc_to_text,
        doc_to_target=config.doc_to_target,
    )
    task.sampler = SimpleNamespace(sample=lambda n, eval_doc: shots[:n])
    return task, values["num_fewshot"], values["generation_kwargs"]["until"]


@pytest.mark.parametrize("name", INSTRUCT)
def test_instruct_models_are_asked_as_lm_eval_asks_them(tmp_path, name):
    """By its own task: as turns, in one message, and as plain text."""
    from transformers.utils.chat_template_utils import render_jinja_template

    if name == "humaneval_instruct":
        plain = {"task_id": "T/0", "entry_point": "f", "test": "def check(f): pass\n"}
        doc = plain | {"prompt": '\ndef f(x):\n    """{text} of {x}."""\n\n'}
        shots, examples, problem = [], [], doc
    else:
        file = write_jsonl(tmp_path / "mbpp.jsonl", [row(i) for i in range(1, 975)])
        shots = [row(i) | {"is_fewshot": True} for i in (2, 3, 4)]
        doc, problem = row(17), read_problems(file)["Mbpp/17"]
        examples = read_examples(file, 3)
    task, n, until = lm_evals_task(INSTRUCT[name], shots)
    prompt = choose(name, {problem["task_id"]: problem}, None)
    assert (prompt.n_shots, list(prompt.stop)) == (n, until)

    def template(history, add_generation_prompt):
        how = {"add_generation_prompt": add_generation_prompt}
        how["continue_final_message"] = not add_generation_prompt
        return render_jinja_template([history], chat_template=CHATML, **how)[0][0]

    begun = task.doc_to_prefix(doc)
    for chat, turns in ((True, True), (True, False), (False, False)):
        wanted = task.fewshot_context(
            doc,
            n,
            apply_chat_template=chat,
            fewshot_as_multiturn=turns,
            chat_template=template if chat else None,
            gen_prefix=begun,
        )
        asks = Chat("theirs", CHATML, {}, as_turns=turns) if chat else None
        assert prompt.render(problem, examples[:n], asks) == wanted, (chat, turns)


def test_a_program_ends_with_its_block():
    problem = {"task_id": "T/0", "prompt": "def f():\n", "entry_point": "f", "test": ""}
    whole = choose("humaneval_instruct", {"T/0": problem}, None)
    reply = "    return 1\n```\nSo it is.\n```python\nx = 1\n```"
    assert whole.program_in(problem, reply) == {"solution": "def f():\n    return 1\n"}
    of_mbpp = problem | {"task_id": "Mbpp/11", "text": "?", "tests": ["assert f() == 1"]}
    found = choose("mbpp_instruct", {"Mbpp/11": of_mbpp}, None).program_in(of_mbpp, "def f(): 1```")
    assert found == {"solution": "def f(): 1"}
    with pytest.raises(ValueError, match="--prompt humaneval_instruct: MBPP's problems are no"):
        choose("humaneval_instruct", {"Mbpp/11": of_mbpp}, None)
