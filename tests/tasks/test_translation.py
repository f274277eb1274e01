"""Segments in every form that they come in, and prompts beside lm-eval's."""

import gzip

import lm_eval.tasks
import pytest
import yaml
from builders import write_jsonl
from jinja2 import Template

from tasks.translation import Language, Segment, data_hash, load_prompt, read_segments

PAIRS = [("A cat.", "Eine Katze."), ("Two\u2028dogs\x85 {source}", "Zwei {reference} Hunde")]


def texts(path, lines, end="\n"):
    path.write_bytes("".join(line + end for line in lines).encode())
    return path


def test_every_form_holds_the_same(tmp_path):
    sources, references = zip(*PAIRS)
    forms = [
        (
            write_jsonl(
                tmp_path / "a.jsonl", [dict(zip(("source", "reference"), p)) for p in PAIRS]
            ),
        ),
        (
            write_jsonl(
                tmp_path / "b.jsonl", [{"translation": {"en": a, "de": [b]}} for a, b in PAIRS]
            ),
            (),
            ("translation.en", "translation.de"),
        ),
        (texts(tmp_path / "c.tsv", ["\t".join(pair) for pair in PAIRS]),),
        (texts(tmp_path / "src.txt", sources), [texts(tmp_path / "ref.txt", references)]),
        (texts(tmp_path / "d", sources, "\r\n"), [texts(tmp_path / "e", references, "\r\n")]),
        (
            texts(tmp_path / "mgsm_en.tsv", [f"{s}\t{i}" for i, s in enumerate(sources)]),
            [texts(tmp_path / "mgsm_de.tsv", [f"{r}\t{i}" for i, r in enumerate(references)])],
        ),
    ]
    packed = tmp_path / "f.txt.gz"
    packed.write_bytes(gzip.compress("\n".join(sources).encode()))
    forms.append((packed, [tmp_path / "ref.txt"]))
    read = [read_segments(*form) for form in forms]
    for segments in read:
        assert [(s.source, *s.references) for s in segments] == PAIRS
        assert len({s.name for s in segments}) == 2
    assert len({data_hash(segments) for segments in read}) == 1
    assert read_segments(*forms[0], limit=1) == read[0][:1]


def test_several_references_and_empty_ones(tmp_path):
    path = texts(tmp_path / "a.tsv", ["one\teins\t\tein", "two\tzwei"])
    assert [s.references for s in read_segments(path)] == [("eins", "ein"), ("zwei",)]
    others = [texts(tmp_path / "r1", ["", "zwei"]), texts(tmp_path / "r2", ["eins", "zwo"])]
    segments = read_segments(texts(tmp_path / "s", ["one", "two"]), others)
    assert [s.references for s in segments] == [("eins",), ("zwei", "zwo")]


@pytest.mark.parametrize(
    ("name", "lines", "others", "said"),
    [
        ("a.tsv", ["one\teins", "two"], [], r"a.tsv:2: a source and a reference"),
        ("a.tsv", ["\teins"], [], r"a.tsv:1: a source and a reference"),
        ("a.jsonl", ['{"source": "a", "target": "b"}'], [], r"jsonl:1: no field 'reference'; --fi"),
        ("a.jsonl", ['{"source": "a", "reference": 3}'], [], r"jsonl:1: source must be text"),
        ("a.jsonl", ['{"source": "a", "reference": []}'], [], r"jsonl:1: a source and a ref"),
        ("a.txt", ["one"], [], r"a.txt: a .jsonl or .tsv file .* with --references FILE"),
        ("a.txt", ["one", "two"], [["eins"]], r"r0 has 1 lines, .*a.txt 2: line by line"),
        ("a.txt", ["one"], [[" "]], r"a.txt:1: a source and a reference"),
        ("a.txt", [], [["x"]], r"a.txt is empty"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, name, lines, others, said):
    path = texts(tmp_path / name, lines)
    references = [texts(tmp_path / f"r{i}", own) for i, own in enumerate(others)]
    with pytest.raises(ValueError, match=said):
        read_segments(path, references)


def test_the_prompt_is_lm_evals_without_examples():
    folder = next(iter(lm_eval.tasks.__path__))
    with open(f"{folder}/translation/wmt16_en-de.yaml", encoding="utf-8") as file:
        theirs = yaml.safe_load(file)
    for source, target in PAIRS:
        segment = Segment("a/1", source, (target,), "a:1")
        ours = load_prompt("lm_eval").render(segment, [], "English", "German")
        doc = {"translation": {"en": source, "de": target}}
        assert ours == Template(theirs["doc_to_text"]).render(doc)
    assert load_prompt("lm_eval").stop == ("\n",)


def test_examples_come_before_and_braces_stay_as_they_are():
    segments = [Segment(f"a/{i}", s, (r, "other"), f"a:{i}") for i, (s, r) in enumerate(PAIRS)]
    text = load_prompt("lm_eval").render(segments[0], segments[1:], "English", "German")
    assert text == (
        "English phrase: Two\u2028dogs\x85 {source}\nGerman phrase: Zwei {reference} Hunde\n\n"
        "English phrase: A cat.\nGerman phrase:"
    )
    text = load_prompt("instruct").render(segments[0], [], "English", "German")
    assert text == ("Translate each text from English into German.\n\nEnglish: A cat.\nGerman:")
    assert not load_prompt("text_to_text").names_languages


def test_languages_by_code_or_by_name():
    assert Language.of("de", "--x") == ("de", "German")
    assert Language.of("zh_CN", "--x") == ("zh-cn", "Chinese")
    assert Language.of("gsw=Swiss German", "--x") == ("gsw", "Swiss German")
    for wrong in ("xx", "german", "=German", ""):
        with pytest.raises(ValueError, match="--x"):
            Language.of(wrong, "--x")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"question": "no field"}, "question needs {source}, once"),
        ({"answer": "{reference}{reference}"}, "answer needs {reference}, once"),
        ({"instruction": "Answer: {reference}"}, "instruction must not hold"),
        ({"stop": "x"}, "stop must be list"),
        ({"stop": [""]}, "stop must be a list of texts"),
        ({"num_few_shot": -1}, "must not be negative"),
        ({"more": 1}, "field 'more' is unknown or missing"),
    ],
)
def test_a_prompt_of_ones_own_is_checked(tmp_path, change, said):
    good = {"question": "{source}=", "answer": "{reference}", "separator": "\n", "stop": ["\n"]}
    good |= {"num_few_shot": 2}
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(good))
    assert load_prompt(str(path)).num_few_shot == 2
    path.write_text(yaml.safe_dump(good | change))
    with pytest.raises(ValueError, match=said):
        load_prompt(str(path))
    with pytest.raises(ValueError, match="instruct, lm_eval, text_to_text"):
        load_prompt("none")
