"""tasks/chat.py: prompts against lm-eval's own for the same template, BOS once, refusals."""

import itertools
import json
from types import SimpleNamespace

import pytest

from tasks.chat import ChatOptions, encode, open_chat, starts_with_bos
from tokenizer import ByteTokenizer, build_tokenizer

CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe kind."
    "<|im_end|>\n{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRIMS = (  # its own BOS, and what is said without white space around it
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n\n{{ m.content | trim }}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
)
REFUSES = (  # a system turn
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Turns must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
DROPS = (  # a system turn, without a word
    "{% for m in messages if m.role != 'system' %}{{ m.role | upper }}: {{ m.content }}\n"
    "{% endfor %}{%- if add_generation_prompt %}ASSISTANT:{% endif %}"
)
MARKS = (  # generation blocks, loop controls, an argument, the date
    "{{ bos_token }}{% for m in messages %}{% if loop.index > 99 %}{% break %}{% endif %}"
    "{% if m.role == 'assistant' %}<|im_start|>{% generation %}{{ m.content }}<|im_end|>"
    "{% endgeneration %}{% else %}({{ strftime_now('%Y') | length }}) {{ m.content }}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>"
    "{{ '' if thinks is defined and not thinks else '<think>' }}{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "trims": TRIMS, "refuses": REFUSES, "drops": DROPS, "marks": MARKS}
SHOTS = [("1 + 1?\nAnswer:", " It is\n#### 2"), ("  2 + 2?\nAnswer:", " 4")]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A byte-level tokenizer of transformers' that adds BOS by itself, with tokens of ChatML."""
    from tokenizers import AddedToken, processors
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("byte")
    ByteTokenizer().save(folder)
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    tok = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    tok.add_special_tokens(
        {
            "bos_token": "<s>",
            "eos_token": "</s>",
            "additional_special_tokens": [AddedToken(t, special=True) for t in special[2:]],
        }
    )
    bos = tok.convert_tokens_to_ids("<s>")
    tok.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    folder = tmp_path_factory.mktemp("chat")
    tok.save_pretrained(folder)
    return folder


def with_template(directory, tmp_path, text):
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.jinja").write_text(text, encoding="utf-8")
    return build_tokenizer(tmp_path)


def lm_evals_prompt(tok, question, shots, description, begun, system, as_turns):
    """What lm-eval sends, by its own task and its own model class."""
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM

    task = object.__new__(ConfigurableTask)
    of = SimpleNamespace(doc_to_text=None, doc_to_choice=None, doc_to_target=None, gen_prefix=None)
    delimiters = SimpleNamespace(target_delimiter=" ", fewshot_delimiter="\n\n")
    task._config = SimpleNamespace(
        description=description, test_split="test", **vars(of) | vars(delimiters)
    )
    task.fewshot_cfg = SimpleNamespace(split="train", **vars(of) | vars(delimiters))
    docs = [{"q": q, "a": a.removeprefix(" ")} for q, a in shots]
    task.sampler = SimpleNamespace(sample=lambda n, eval_doc: docs[:n])
    task.multiple_input = 0
    task.resolve_field = lambda doc, field: field
    task.doc_to_text = lambda doc, *_: doc["q"]
    task.doc_to_target = lambda doc, *_: doc.get("a")
    model = SimpleNamespace(tokenizer=tok.tok, chat_template_args={})

    def template(history, add_generation_prompt):
        return HFLM.apply_chat_template(model, history, add_generation_prompt)

    return task.fewshot_context(
        {"q": question},
        len(shots),
        system_instruction=system,
        apply_chat_template=True,
        fewshot_as_multiturn=as_turns,
        chat_template=template,
        gen_prefix=begun or None,
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_are_lm_evals_and_so_are_their_tokens(directory, tmp_path, name):
    """Shots or none, in turn or in one, a description, a system prompt, an answer begun."""
    pytest.importorskip("lm_eval")
    tok = with_template(directory, tmp_path, TEMPLATES[name])
    n, rooms = 0, name in ("chatml", "trims", "marks")
    for shots, turns, description, begun, system in itertools.product(
        (SHOTS, []),
        (True, False),
        ("", "About sums.\n"),
        ("", "So, I think", "```python\n"),
        (None, "Be brief.") if rooms else (None,),
    ):
        asked = {"chat_template": "on", "system_prompt": system, "fewshot_as_turns": turns}
        chat = open_chat(ChatOptions(**asked), tok)
        text = chat.ask("3 + é?\nAnswer:", shots, description, begun)
        wanted = lm_evals_prompt(tok, "3 + é?\nAnswer:", shots, description, begun, system, turns)
        assert text == wanted, (shots, turns, description, begun, system)
        for bos in (True, False):
            ids = tok.tok(text, add_special_tokens=bos and not text.startswith("<s>"))["input_ids"]
            assert encode(tok, [text], add_bos=bos) == [ids]
            assert ids.count(tok.bos_token_id) == (bos or text.startswith("<s>"))
            assert starts_with_bos(tok, [ids]) == (ids[0] == tok.bos_token_id)
        n += 1
    assert n == (48 if rooms else 24)


def test_special_tokens_are_one_token_each(directory, tmp_path):
    tok = with_template(directory, tmp_path, CHATML)
    text = open_chat(ChatOptions("on"), tok).ask("hi")
    (ids,) = encode(tok, [text], add_bos=False)
    start = tok.tok.convert_tokens_to_ids("<|im_start|>")
    assert ids.count(start) == text.count("<|im_start|>") == 3
    assert tok.encode("<|im_start|>") != [start], "as text it is text"
    assert tok.decode(ids) == text


def test_an_answer_begun_keeps_its_end_where_its_rest_is_known(directory, tmp_path):
    tok = with_template(directory, tmp_path, TRIMS)
    chat = open_chat(ChatOptions("on"), tok)
    assert chat.ask("f?", begun="```python\n", rest="\n```\n").endswith("\n\n```python\n")
    assert chat.ask("f?", begun="```python\n").endswith("\n\n```python")


@pytest.mark.parametrize(
    "name, end",
    [("chatml", "<|im_end|>"), ("refuses", "</s>"), ("drops", ""), ("marks", "<|im_end|>")],
)
def test_where_a_turn_ends(directory, tmp_path, name, end):
    chat = open_chat(ChatOptions("on"), with_template(directory, tmp_path, TEMPLATES[name]))
    assert chat.turn_end == end


def test_where_templates_are_found(directory, tmp_path):
    """Beside the tokenizer, in its configuration, by name, in a file, of the byte tokenizer too."""
    tok = build_tokenizer(directory)
    assert tok.chat_templates == {} and open_chat(ChatOptions(), tok) is None
    file = tmp_path / "mine.jinja"
    file.write_text(CHATML, encoding="utf-8")
    mine = open_chat(ChatOptions(str(file)), tok)
    beside = with_template(directory, tmp_path, CHATML)
    assert open_chat(ChatOptions("on"), beside).template == mine.template == CHATML
    assert mine.source == "mine.jinja" and mine.protocol["chat_template"] == "mine.jinja"

    (tmp_path / "chat_template.jinja").unlink()
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    both = [{"name": "default", "template": CHATML}, {"name": "plain", "template": DROPS}]
    for value, names in ((CHATML, {"default"}), (both, {"default", "plain"})):
        settings["chat_template"] = value
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        own = build_tokenizer(tmp_path)
        assert own.chat_templates.keys() == names
    assert open_chat(ChatOptions("plain"), own).template == DROPS
    assert open_chat(ChatOptions("on"), own).template == CHATML

    ByteTokenizer({"default": DROPS}).save(tmp_path / "bytes")
    byte = build_tokenizer(tmp_path / "bytes")
    assert isinstance(byte, ByteTokenizer) and byte.chat_templates == {"default": DROPS}
    assert encode(byte, ["a<|endoftext|>b"], add_bos=False) == [[97, 256, 98]]


def test_checkpoints_of_one_tokenizer_and_two_templates_share_no_plan():
    from backends import Facts

    a, b = (ByteTokenizer({"default": text}) for text in (CHATML, DROPS))
    kinds = {Facts("m", 257, 64, "float32", tokenizer=tok).kind for tok in (a, b, ByteTokenizer())}
    assert len(kinds) == 3


@pytest.mark.parametrize(
    "template, asked, words",
    [
        (None, {}, "tokenizer byte has none. Name a Jinja file, or leave --chat-template out"),
        (None, {"chat_template": "tool"}, "--chat-template tool: no such template"),
        (CHATML, {"chat_template": "tool"}, "tokenizer byte has default"),
        ("{% if %}", {}, "chat template (the tokenizer's own): Expected an expression"),
        ("{{ messages[9].content.x }}", {}, "chat template (the tokenizer's own): list object has"),
        (
            "{{ ''.__class__.__mro__ }}",
            {},
            "access to attribute '__class__' of 'str'",
        ),
        ("{{ messages.append(1) }}", {}, "is unsafe"),
        ("{{ messages[0].content + 1 }}", {}, "chat template"),
        ("{{ 'x' * 10 ** 20 }}", {}, "chat template"),
        ("Hello", {}, "leaves out what is asked: is it a chat template?"),
        (REFUSES, {"system_prompt": "Be brief."}, "has no system turn: leave --system-prompt out"),
        (DROPS, {"system_prompt": "Be brief."}, "has no system turn: leave --system-prompt out"),
        (
            CHATML,
            {"chat_template": "off", "system_prompt": "x"},
            "--system-prompt goes with",
        ),
        (
            CHATML,
            {"chat_template": "off", "fewshot_as_turns": False},
            "--no-fewshot-as-turns goes with",
        ),
        (CHATML, {"chat_template_args": ("a b=1",)}, "--chat-template-args 'a b=1': NAME=VALUE"),
        (CHATML, {"chat_template_args": ("messages=1",)}, "chat template"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(template, asked, words):
    tok = ByteTokenizer({"default": template} if template else {})
    with pytest.raises(ValueError) as caught:
        open_chat(ChatOptions(**{"chat_template": "on"} | asked), tok)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_arguments_date_and_words():
    tok = ByteTokenizer({"default": MARKS.replace("%Y') | length", "%d %b %Y')")})
    chat = open_chat(ChatOptions("on", chat_template_args=("thinks=false", "who=me")), tok)
    assert chat.ask("hi") == "(26 Jul 2024) hi\n<|im_start|>"
    assert chat.protocol["chat_date"] == "2024-07-26" and chat.arguments == {
        "thinks": False,
        "who": "me",
    }
    assert chat.words == ('chat template (the tokenizer\'s own) with thinks=false, who="me"',)
    assert open_chat(ChatOptions("on"), tok).ask("hi").endswith("<think>")


def test_a_sweeps_yaml_may_say_on():
    import cli

    for value, read in ((True, "on"), (False, "off"), ("x.jinja", "x.jinja")):
        values = cli.convert_options(ChatOptions, {"chat_template": value}, "sweep.yaml")
        assert values == {"chat_template": read}
