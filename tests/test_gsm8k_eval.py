"""gsm8k_eval.py: planted solutions counted by hand, interrupted runs, any number of ranks."""

from collections import Counter

import numpy as np
import pytest
import torch
from builders import PlainModel, saved_checkpoint, tiny_model, torchrun, write_jsonl
from sklearn.metrics import roc_auc_score

import durable
import results
from gsm8k_eval import Options, evaluate_gsm8k
from tokenizer import build_tokenizer

INFO = {"name": "checkpoint-1", "fingerprint": "f" * 64, "path": "here"}
PROBLEMS = [("What is 20 + 9?", "29"), ("And 70 x 1000?", "70,000"), ("Half of 3?", "1.5")]
# one of these, all alike, whatever is asked: which rules call which right is written beside
SOLUTIONS = [
    " It is $29.00.\n#### 29\nQuestion: next",  # right by all three for the first
    " So $29.00",  # numbers alone read 29
    " So 29...",  # numbers alone
    " #### 70000",  # right by all three for the second
    " 3/2",  # numbers alone, for the third
    " I give up",
]


class Planted(PlainModel):
    """Goes on after `Answer:` with one of SOLUTIONS, all equally likely, one byte a token."""

    vocab_size = 257

    def __init__(self, texts=SOLUTIONS):
        super().__init__()
        self.texts, self.rows = [text.encode() for text in texts], []

    def hidden(self, input_ids, positions=None, cache=None):
        self.rows = [bytes(row).rstrip(b"\0") for row in input_ids.tolist()]
        return torch.arange(len(self.rows)).view(-1, 1, 1).expand(-1, input_ids.shape[1], 1).float()

    def logits(self, hidden):
        logits = torch.full((len(hidden), self.vocab_size), -50.0)
        for out, i in zip(logits, hidden.flatten().long().tolist()):
            begun = self.rows[i].rpartition(b"Answer:")[2]
            for text in self.texts:
                if text.startswith(begun):
                    out[text[len(begun)] if len(text) > len(begun) else 256] = 0.0
        return logits


@pytest.fixture
def data(tmp_path):
    (tmp_path / "gsm8k").mkdir()
    lines = [{"question": q, "answer": f"As one sees.\n#### {a}"} for q, a in PROBLEMS]
    write_jsonl(tmp_path / "gsm8k" / "test.jsonl", lines)
    write_jsonl(tmp_path / "gsm8k" / "train.jsonl", lines[::-1])
    return tmp_path / "gsm8k"


def test_three_rules_counted_by_hand(data):
    """Each problem under each solution, greedily."""
    wanted = {  # (accuracy, strict, flexible) of the problems that are right under a solution
        0: {0: (1, 1, 1)},
        1: {0: (1, 0, 0)},
        2: {0: (1, 0, 0)},
        3: {1: (1, 1, 1)},
        4: {2: (1, 0, 0)},
        5: {},
    }
    for i, text in enumerate(SOLUTIONS):
        record = evaluate_gsm8k(Planted([text]), build_tokenizer("byte"), data, num_few_shot=1)
        names = ("accuracy", "strict_match", "flexible_extract")
        rows = np.stack([record.arrays[name] for name in names], axis=1).astype(int).tolist()
        assert rows == [list(wanted[i].get(p, (0, 0, 0))) for p in range(3)], text
        for name, column in zip(names, zip(*rows)):
            assert record["metrics"][name]["value"] == pytest.approx(sum(column) / 3)
        finishes = {"stop": 3} if "Question:" in text else {"eos": 3}
        assert record["breakdown"]["finish"] == finishes
    assert record["protocol"]["num_few_shot"] == 1


TEMPLATE = (  # the planted model goes on after Answer:
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>Answer:{% endif %}"
)


def test_asked_as_a_chat(data, tmp_path):
    """The same solutions behind a template, whose turns end in a text that is no token."""
    (tmp_path / "mine.jinja").write_text(TEMPLATE)
    said, byte = (
        [f"{text}<end><user>And #### 7?" for text in SOLUTIONS[3:4]],
        build_tokenizer("byte"),
    )
    plain = evaluate_gsm8k(Planted(SOLUTIONS[3:4]), byte, data, num_few_shot=1)
    record = evaluate_gsm8k(
        Planted(said),
        byte,
        data,
        num_few_shot=1,
        chat_template=str(tmp_path / "mine.jinja"),
        system_prompt="Be brief.",
    )
    assert record["metrics"] == plain["metrics"]
    assert record["breakdown"]["finish"] == {"stop": 3}
    protocol = record["protocol"]
    assert protocol["stop"] == sorted([*plain["protocol"]["stop"], "<end>"])
    assert (protocol["chat_template"], protocol["system_prompt"]) == ("mine.jinja", "Be brief.")
    assert "chat template (mine.jinja)" in record["words"]
    assert record["data"]["first_prompt"] == (
        "<system>Be brief.<end><user>Question: Half of 3?\nAnswer:<end>"
        "<assistant>As one sees.\n#### 1.5<end>"
        "<user>Question: What is 20 + 9?\nAnswer:<end><assistant>Answer:"
    )
    assert record["config_hash"] != plain["config_hash"]
    with pytest.raises(ValueError, match=r"tokenizer byte has none\. Name a Jinja file"):
        evaluate_gsm8k(Planted(), byte, data, num_few_shot=1, chat_template="on")


def test_votes_and_passes_from_the_samples_themselves(data):
    n = 9
    record = evaluate_gsm8k(
        Planted(), build_tokenizer("byte"), data, n, num_few_shot=0, temperature=1.0, k=(3, 9)
    )
    samples = list(record.samples())
    assert len(samples) == n * len(PROBLEMS)
    shares, passed, voted = [], [], []
    for question, _ in PROBLEMS:
        own = [s for s in samples if s["question"] == question]
        right = [s["accuracy"] for s in own]
        shares.append(np.mean(right))
        passed.append(any(right))
        votes = Counter(s["number"] for s in own if s["number"] is not None)
        best = [answer for answer, count in votes.items() if count == max(votes.values())]
        voted.append(np.mean([answer == own[0]["gold"] for answer in best]))
    assert 0 < sum(shares)
    value = {name: metric["value"] for name, metric in record["metrics"].items()}
    assert value["accuracy"] == pytest.approx(np.mean(shares))
    assert value["pass@9"] == pytest.approx(np.mean(passed))
    assert value["maj@9"] == pytest.approx(np.mean(voted))
    assert value["pass@3"] <= value["pass@9"]
    assert set(value) >= {"maj@3", "vote_ece", "vote_brier"}
    assert "pass@1" not in value, "that is accuracy"


def test_p_true_is_the_models_own_word(data, tmp_path):
    """Of the first solution with most votes, by the logits of a model of the question's text."""
    byte, more = build_tokenizer("byte"), {"temperature": 1.0, "max_new_tokens": 6, "seed": 3}
    model = tiny_model("gpt", std=0.15, max_position_embeddings=1024).for_inference(torch.float32)
    (tmp_path / "mine.jinja").write_text(TEMPLATE)
    for chat in (False, True):
        more["chat_template"] = str(tmp_path / "mine.jinja") if chat else "off"
        record = evaluate_gsm8k(model, byte, data, 3, num_few_shot=1, p_true=True, **more)
        samples = list(record.samples())
        for i, (question, _) in enumerate(PROBLEMS):
            own = samples[3 * i : 3 * i + 3]
            votes = Counter(s["number"] for s in own if s["number"] is not None).most_common(1)
            asked = next((s for s in own if votes and s["number"] == votes[0][0]), own[0])
            assert record.arrays["p_true_sample"][i] == asked["sample"]
            assert record.arrays["p_true_right"][i] == asked["accuracy"]
            text = (
                f"Question: {question}\nProposed answer: {asked['completion'].strip()}\n"
                "Is the proposed answer:\nA. True\nB. False\nThe proposed answer is:"
            )
            text = f"<user>{text}<end><assistant>Answer:" if chat else f"{text} "
            with torch.inference_mode():
                logits = model(torch.tensor([list(byte.encode(text))]))[0][0, -1].double()
            expected = torch.softmax(logits[[ord("A"), ord("B")]], 0)[0].item()
            assert record.arrays["p_true"][i] == pytest.approx(expected, abs=1e-5)
        plain = evaluate_gsm8k(model, byte, data, 3, num_few_shot=1, **more)
        for part in ("metrics", "protocol"):
            same = {name: record[part][name] for name in plain[part]}
            assert repr(same) == repr(plain[part]), "asking further changes nothing else"
        assert {"p_true_ece", "p_true_brier", "p_true_auroc"} <= record["metrics"].keys()
        assert record["protocol"]["p_true_truncated"] == 0 and record["protocol"]["p_true"]
        assert record["config_hash"] != plain["config_hash"]
        assert record["cost"]["tokens"] == plain["cost"]["tokens"] > 0, "the cost is of drawing"


def test_p_true_tells_right_from_wrong_where_the_model_does(data):
    """A model that says A of what ends in 29, whatever was asked."""

    class Believes(Planted):
        def logits(self, hidden):
            logits = super().logits(hidden)
            for out, i in zip(logits, hidden.flatten().long().tolist()):
                if self.rows[i].rstrip().endswith(b"The proposed answer is:"):
                    out[ord("A")] = 3.0 if b"29" in self.rows[i] else -3.0
                    out[ord("B")] = 0.0
            return logits

        def nll(self, hidden, targets):
            logits = self.logits(hidden)
            return torch.nn.functional.cross_entropy(logits, targets, reduction="none")

    options = {"num_few_shot": 0, "temperature": 1.0, "p_true": True}
    record = evaluate_gsm8k(Believes(), build_tokenizer("byte"), data, 5, **options)
    right, p = record.arrays["p_true_right"], record.arrays["p_true"]
    first = next(iter(record.samples()))
    assert right.any() and not right.all(), first
    value = record["metrics"]["p_true_auroc"]["value"]
    assert value == pytest.approx(roc_auc_score(right, p))
    assert record["metrics"]["p_true_brier"]["value"] == pytest.approx(np.mean((p - right) ** 2))


def test_an_interrupted_run_goes_on_where_it_stopped(data, tmp_path):
    options = {"num_few_shot": 0, "temperature": 1.0, "results_dir": tmp_path, "info": INFO}
    model, tokenizer = Planted(), build_tokenizer("byte")
    whole = evaluate_gsm8k(model, tokenizer, data, 4, **options)
    (journal,) = tmp_path.rglob("journal-*")
    entries, _ = durable.read_journal(journal)
    assert len(entries) == 12
    journal.unlink()
    with durable.Journal(journal) as begun:
        for entry in entries[:5]:
            begun.append(entry)
    again = evaluate_gsm8k(model, tokenizer, data, 4, **options)
    assert again["cost"]["samples_resumed"] == 5
    assert again["metrics"] == whole["metrics"]
    assert list(again.samples()) == list(whole.samples())


def test_a_cache_of_8_bits_is_another_protocol(data, tmp_path):
    """Which takes up no journal of another's, and says its name; the model's own says none."""
    model = tiny_model("llama", max_position_embeddings=512).for_inference(torch.float32)
    options = {"num_few_shot": 0, "max_new_tokens": 4, "results_dir": tmp_path, "info": INFO}
    found = [
        evaluate_gsm8k(model, build_tokenizer("byte"), data, kv_dtype=kind, **options)
        for kind in (None, "int8", "fp8", "int8")
    ]
    assert [record["cost"]["samples_resumed"] for record in found] == [0, 0, 0, 3]
    assert len({record["config_hash"] for record in found}) == 3
    assert "kv_dtype" not in found[0]["protocol"] and "keys" not in str(found[0]["words"])
    for record, name in zip(found[1:], ("int8-token-head-sym-absmax", "fp8-e4m3-token-head")):
        assert record["protocol"]["kv_dtype"] == name
        assert f"keys and values {name}" in record["words"]


def test_the_command_gives_the_same_bits_on_any_number_of_ranks(tmp_path):
    path = saved_checkpoint(tmp_path / "run", max_position_embeddings=512)
    for language in ("de", "zh"):
        lines = [f"Wie viele Äpfel sind {i}?\t{i}" for i in range(1, 8)]
        text = "".join(line + "\n" for line in lines)
        (tmp_path / f"mgsm_{language}.tsv").write_text(text, encoding="utf-8")
    words = ["--checkpoint-path", path, "--data-path", tmp_path, "--prompt", "mgsm_native_cot"]
    words += ["--num-samples", "3", "--temperature", "1", "--max-new-tokens", "12", "--k", "2"]
    words += ["--p-true"]
    found = []
    for ranks in (0, 3):
        out = torchrun(
            ranks, "gsm8k_eval.py", *words, "--log-samples", "--results-dir", tmp_path / f"{ranks}"
        )
        assert "maj@2" in out.stdout and "de " in out.stdout
        (record,) = results.load_records(tmp_path / f"{ranks}")
        arrays = results.load_arrays(record)
        samples = results.load_samples(record)
        found.append((record["metrics"], {k: v.tobytes() for k, v in arrays.items()}, samples))
    assert found[0] == found[1]
    assert len(found[0][2]) == 2 * 7 * 3


def test_what_is_wrong_is_said_before_anything_is_loaded(data, tmp_path):
    with pytest.raises(ValueError, match="--data-path PATH is needed"):
        Options()
    with pytest.raises(ValueError, match="temperature 0 would be equal samples"):
        Options(data_path="x", num_samples=2)
    with pytest.raises(ValueError, match="--k 3 needs at least 3 samples"):
        evaluate_gsm8k(Planted(), build_tokenizer("byte"), data, 2, temperature=1.0, k=(3,))
    words = ["--checkpoint-path", "none", "--data-path", data / "none"]
    out = torchrun(0, "gsm8k_eval.py", *words, code=2)
    assert len(out.stderr.splitlines()) == 1
    assert "fetch_gsm8k.sh" in out.stderr
