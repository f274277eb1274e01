"""bleu_eval.py: planted translations, sacrebleu's own command line, interrupted runs, ranks."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from builders import CPU, PlainModel, saved_checkpoint, torchrun, write_jsonl
from made_up_records import run_report

import checkpoint
import cli
import durable
import resampling
import results
from bleu_eval import Options, count, evaluate_bleu, in_one_line, read_task
from distributed import Dist
from reporting.compare import compare, compare_text, pairs_of
from tasks.corpus_scores import signature
from tokenizer import build_tokenizer

INFO = {"name": "checkpoint-1", "fingerprint": "f" * 64, "path": "here"}
PAIRS = [
    ("Where is the old cat sleeping today?", "Wo schläft die alte Katze denn heute?"),
    ("The cat sleeps on the red mat.", "Die Katze schläft auf der roten Matte."),
    ("It rains, and the dog wants to go out.", "Es regnet, und der Hund will hinaus."),
    ("Two birds sing in the high tree.", "Zwei Vögel singen im hohen Baum."),
]
NAMES = ("bleu", "chrf", "chrf++", "ter")


class Translator(PlainModel):
    """Writes after `phrase:` what `says` has for the source before it, one byte a token."""

    vocab_size = 257

    def __init__(self, says):
        super().__init__()
        self.says = {source.encode(): (" " + text).encode() for source, text in says.items()}
        self.rows = []

    def hidden(self, input_ids, positions=None, cache=None):
        self.rows = [bytes(row).rstrip(b"\0") for row in input_ids.tolist()]
        return torch.arange(len(self.rows)).view(-1, 1, 1).expand(-1, input_ids.shape[1], 1).float()

    def logits(self, hidden):
        logits = torch.full((len(hidden), self.vocab_size), -50.0)
        for out, i in zip(logits, hidden.flatten().long().tolist()):
            before, _, begun = self.rows[i].rpartition(b"German phrase:")
            text = self.says[before.rpartition(b"English phrase: ")[2].strip()]
            out[text[len(begun)] if len(text) > len(begun) else 10] = 0.0
        return logits


@pytest.fixture
def data(tmp_path):
    rows = [{"source": s, "reference": [r, r.replace("Katze", "Mieze")]} for s, r in PAIRS]
    return write_jsonl(tmp_path / "test.jsonl", rows)


def evaluate(says, data, **options):
    options = {"source_lang": "en", "target_lang": "de", "num_few_shot": 1} | options
    return evaluate_bleu(Translator(says), build_tokenizer("byte"), data, **options)


def test_planted_systems(data, tmp_path):
    perfect = evaluate(dict(PAIRS), data, results_dir=tmp_path / "r", info=INFO)
    values = {name: metric["value"] for name, metric in perfect["metrics"].items()}
    assert values == pytest.approx({"bleu": 100, "chrf": 100, "chrf++": 100, "ter": 0})
    assert [s["hypothesis"] for s in perfect.samples()] == [target for _, target in PAIRS[1:]]
    assert perfect["data"]["segments"] == 3, "the example is not scored"
    assert "they are not scored" in perfect["protocol"]["few_shot"]
    assert perfect["words"][:4] == ["en-de", "lm_eval", "1 shots", "tok:13a"]
    assert perfect["protocol"]["signatures"]["bleu"].startswith("nrefs:2|case:mixed|")
    turned = dict(zip([s for s, _ in PAIRS], [r for _, r in PAIRS[1:] + PAIRS[:1]]))
    shuffled = evaluate(turned, data)["metrics"]
    assert shuffled["bleu"]["value"] < 10 and shuffled["ter"]["value"] > 70
    silent = evaluate({source: "" for source, _ in PAIRS}, data)
    assert silent["metrics"]["bleu"]["value"] == 0 and silent.shown["empty"] == 3
    assert silent["metrics"]["ter"]["value"] == 100


def test_examples_of_another_file_leave_the_set_whole(data, tmp_path):
    other = write_jsonl(tmp_path / "dev.jsonl", [{"source": "Yes.", "reference": "Ja."}])
    record = evaluate(dict(PAIRS), data, few_shot_path=str(other))
    assert record["data"]["segments"] == 4
    assert record["protocol"]["few_shot"] == "the first of dev.jsonl, for every segment"
    limited = evaluate(dict(PAIRS), data, few_shot_path=str(other), limit=2)
    assert limited["data"]["segments"] == 2 and "limit 2: not a score" in limited["words"]
    with pytest.raises(ValueError, match="1 examples, --num-few-shot 2 asked for"):
        evaluate(dict(PAIRS), data, few_shot_path=str(other), num_few_shot=2)


def translations(folder):
    """Parallel German of MGSM, and what a bad system would have made of it."""
    text = (folder / "mgsm_de.tsv").read_text(encoding="utf-8")
    references = [line.partition("\t")[0] for line in text.split("\n") if line]
    rng = np.random.default_rng(0)

    def spoilt(words, share):
        kept = [w if rng.random() > share else w[::-1] for w in words if rng.random() > share / 4]
        return " ".join(kept)

    return references, [[spoilt(r.split(), s) for r in references] for s in (0.3, 0.26)]


def sacrebleu(folder, references, hypotheses, *flags):
    """What its command line prints."""
    paths = [folder / f"ref{i}" for i in range(len(references))]
    for path, lines in zip([*paths, folder / "hyp"], [*references, hypotheses]):
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    words = [sys.executable, "-m", "sacrebleu", *paths, "-i", folder / "hyp", "-w", "9", *flags]
    out = subprocess.run(words, capture_output=True, text=True, encoding="utf-8", check=True)
    found = json.loads(out.stdout)
    return found if isinstance(found, list) else [found]


def scored(folder, references, hypotheses, language, n=None):
    """(scores, signatures) of hypotheses as run counts them."""
    for i, lines in enumerate([references[0], *references]):
        (folder / f"side{i}").write_text("\n".join(lines[:n]) + "\n", encoding="utf-8")
    files = tuple(str(folder / f"side{i + 1}") for i in range(len(references)))
    options = Options(
        str(folder / "side0"), files, target_lang=language, prompt="text_to_text", num_few_shot=0
    )
    task = read_task(options)
    counts = count(Dist(0, 1, 0, CPU), task, hypotheses[:n])
    names = {"bleu": "bleu", "chrf": "chrf", "chrf++": "chrf", "ter": "ter"}
    return {name: resampling.score_of(names[name], counts[name]) for name in NAMES}, task


@pytest.mark.parametrize("language", ["de", "zh"])
def test_scores_are_those_of_sacrebleus_command_line(data_dir, tmp_path, language):
    references, (hypotheses, _) = translations(data_dir / "mgsm")
    flags = ["-m", "bleu", "chrf", "ter"]
    if language == "zh":  # characters of the same texts
        flags += ["--tokenize", "zh", "--ter-normalized", "--ter-asian-support"]
    n = 60
    ours, task = scored(tmp_path, [references], hypotheses, language, n)
    theirs = sacrebleu(tmp_path, [references[:n]], hypotheses[:n], *flags)
    plus = sacrebleu(
        tmp_path, [references[:n]], hypotheses[:n], "-m", "chrf", "--chrf-word-order", "2"
    )
    own = [[reference] for reference in references[:n]]
    for name, peer in zip(("bleu", "chrf", "ter", "chrf++"), [*theirs, *plus]):
        assert ours[name] == pytest.approx(peer["score"], abs=1e-8)
        assert signature(task.metrics[name], own) == peer["signature"]


def test_two_checkpoints_are_compared_by_resampling_both(data, tmp_path):
    worse = {source: target.replace("der", "den").replace("Die", "Das") for source, target in PAIRS}
    for step, says in ((1, worse), (2, dict(PAIRS))):
        info = INFO | {"name": f"checkpoint-{step}", "step": step, "fingerprint": f"{step}" * 64}
        record = evaluate(says, data, num_few_shot=0, results_dir=tmp_path / "r", info=info)
        record.save(tmp_path / "r")
    places = sorted(path.parent for path in (tmp_path / "r").rglob("bleu-*.json"))
    (pair,) = pairs_of(*places)
    out = compare(*pair, seed=12345)
    a, b = (results.load_arrays(record)["bleu_counts"] for record in pair)
    assert out["metric"] == "bleu" and out["difference"] == pytest.approx(
        pair[1]["metrics"]["bleu"]["value"] - pair[0]["metrics"]["bleu"]["value"]
    )
    assert (out["p"], out["bootstrap"]) == (
        (found := resampling.paired("bleu", a, b))["p"],
        (found["low"], found["high"]),
    )
    assert out["better"] == 2 and out["worse"] == 0 and len(out["changed"]) == 2
    assert out["changed"][0]["what"].startswith(tuple(source for source, _ in PAIRS))
    text = compare_text(*pair, out)
    assert "paired bootstrap p =" in text and "McNemar" not in text and "ter " in text
    report = run_report(tmp_path / "r", "--no-html").stdout
    assert "en-de" in report and "~" not in report.split("written")[0].split("Δ is")[0]


def test_an_interrupted_run_goes_on_where_it_stopped(data, tmp_path):
    options = {"results_dir": tmp_path / "r", "info": INFO}
    whole = evaluate(dict(PAIRS), data, **options)
    (journal,) = (tmp_path / "r").rglob("journal-*")
    entries, _ = durable.read_journal(journal)
    journal.unlink()
    with durable.Journal(journal) as begun:
        begun.append(entries[1])
    again = evaluate(dict(PAIRS), data, **options)
    assert again["cost"]["samples_resumed"] == 1
    assert again["metrics"] == whole["metrics"]


def test_turns_of_a_chat(data, tmp_path):
    (tmp_path / "mine.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    model = Translator({})
    model.logits = lambda hidden: torch.zeros(len(hidden), model.vocab_size)
    record = evaluate_bleu(
        model,
        build_tokenizer("byte"),
        data,
        source_lang="en",
        target_lang="de",
        num_few_shot=1,
        limit=1,
        max_new_tokens=2,
        chat_template=str(tmp_path / "mine.jinja"),
        prompt="instruct",
    )
    assert record["data"]["first_prompt"] == (
        "<system>Translate each text from English into German.</><user>English: "
        f"{PAIRS[0][0]}\nGerman:</><assistant>{PAIRS[0][1]}</><user>English: {PAIRS[1][0]}\n"
        "German:</><assistant>"
    )
    assert "</>" in record["protocol"]["stop"]


def test_hypotheses_are_lines():
    assert in_one_line("  a \r\n\n b\tc \n") == "a b\tc"
    assert in_one_line("a\u2028b") == "a\u2028b"


def test_the_command_on_two_ranks_gives_the_bits_of_one_process(tmp_path, data):
    path = saved_checkpoint(tmp_path / "run", max_position_embeddings=512)
    options = {"source_lang": "en", "target_lang": "th", "num_few_shot": 1, "max_new_tokens": 12}
    model = checkpoint.load_model(path, "float32")
    alone = evaluate_bleu(model, build_tokenizer("byte"), data, **options)
    flags = [word for name, value in options.items() for word in (cli.flag_of(name), str(value))]
    words = ["--checkpoint-path", path, "--data-path", data, "--results-dir", tmp_path / "r"]
    out = torchrun(2, "bleu_eval.py", *words, *flags)
    assert "tok:char" in out.stdout and "BLEU of characters" in out.stdout
    (record,) = results.load_records(tmp_path / "r")
    assert record["metrics"] == durable.plain(alone["metrics"])
    arrays = results.load_arrays(record)
    assert arrays.keys() == alone.arrays.keys()
    assert all(arrays[k].tobytes() == v.tobytes() for k, v in alone.arrays.items())
    assert results.load_samples(record) == list(alone.samples())


def test_what_is_wrong_is_said_before_anything_is_loaded(data, tmp_path):
    with pytest.raises(ValueError, match="--data-path PATH is needed"):
        Options()
    with pytest.raises(ValueError, match="--target-lang CODE is needed"):
        Options("x.tsv")
    Options("x.tsv", tokenize="13a")
    with pytest.raises(ValueError, match="names the languages: --source-lang CODE is needed"):
        read_task(Options(str(data), target_lang="de"))
    with pytest.raises(ValueError, match="4 segments, of which 5 are examples: none is left"):
        read_task(Options(str(data), source_lang="en", target_lang="de"))
