"""How sure mmlu_eval.py's answers are: figures beside scikit-learn's, P(True) beside the model's
own logits, a temperature beside an optimiser's, and leave to abstain counted by hand."""

import math
import shutil

import numpy as np
import pytest
import torch
from builders import PlainModel, run_ranks, small_mmlu, tiny_model
from made_up_records import run_report
from sklearn.metrics import log_loss, roc_auc_score

import certainty
import mmlu_eval
import resampling
from mmlu_eval import evaluate_mmlu
from reporting.compare import compare, compare_text, pairs_of
from tokenizer import build_tokenizer

BYTE = build_tokenizer("byte")
INFO = {"name": "checkpoint-1", "fingerprint": "f" * 64, "path": "here"}


@pytest.fixture
def data(tmp_path):
    folder = small_mmlu(tmp_path / "mmlu")
    shutil.copytree(folder / "test", folder / "val")
    for file in list((folder / "val").iterdir()):
        text = file.read_text().replace("What is", "Which was")
        (folder / "val" / file.name.replace("test", "val")).write_text(text)
        file.unlink()
    return folder


def make_model(seed=0):
    model = tiny_model("gpt", seed=seed, std=0.15, max_position_embeddings=2048)
    return model.for_inference(torch.float32)


def test_figures_are_those_of_other_implementations(data):
    record = evaluate_mmlu(make_model(), BYTE, data, num_few_shot=1)
    arrays, metrics = record.arrays, record["metrics"]
    p = certainty.softmax(arrays["logprobs"])
    right, top = arrays["correct"], p.max(axis=1)
    assert 0 < right.sum() < len(right) == 18
    value = {name: metric["value"] for name, metric in metrics.items()}
    assert value["auroc"] == pytest.approx(roc_auc_score(right, top))
    assert value["brier"] == pytest.approx(np.mean((top - right) ** 2))
    one_hot = np.eye(4)[arrays["gold"]]
    assert value["brier_classes"] == pytest.approx(((p - one_hot) ** 2).sum(axis=1).mean())
    accuracy = np.cumsum(right[np.argsort(-top)]) / np.arange(1, 19)
    assert value["aurc"] == pytest.approx(1 - accuracy.mean())
    for name in ("ece", "ece_mass", "brier", "brier_classes", "auroc", "aurc"):
        assert metrics[name]["stderr"] > 0 and metrics[name]["n"] == 18
    assert sum(b["n"] for b in record["breakdown"]["calibration"]) == 18
    assert record["breakdown"]["risk_coverage"][-1]["risk"] == pytest.approx(1 - right.mean())
    assert not {"abstain", "p_true", "temperature_split"} & record["protocol"].keys()


def test_what_is_not_defined_is_said_so(data, capsys):
    """All right or all wrong: there is nothing that an AUROC could tell apart. And a subject that
    is named twice is asked once."""
    one, two = (
        evaluate_mmlu(make_model(), BYTE, data, subjects=["anatomy"] * n, limit=1) for n in (1, 2)
    )
    assert one["config_hash"] == two["config_hash"] and one["words"] == two["words"]
    mmlu_eval.show([one])
    said = capsys.readouterr().out
    assert "AUROC undefined" in said and "nan" not in said


def test_p_true_is_the_models_own_word(data):
    model = make_model()
    record = evaluate_mmlu(model, BYTE, data, p_true=True)
    first = record.shown.questions[0]
    proposed = first.choices[record.arrays["predicted"][0]]
    listed = "".join(f"({c}) {text}\n" for c, text in zip("ABCD", first.choices))
    text = (
        f"Question: {first.question}\n{listed}Proposed answer: {proposed}\n"
        "Is the proposed answer:\nA. True\nB. False\nThe proposed answer is:"
    )
    ids = torch.tensor([list(BYTE.encode(text + " "))])
    with torch.inference_mode():
        logits = model(ids)[0][0, -1].double()
    expected = torch.softmax(logits[[ord("A"), ord("B")]], 0)[0].item()
    assert record.arrays["p_true"][0] == pytest.approx(expected, abs=1e-5)
    metrics, right = record["metrics"], record.arrays["correct"]
    assert metrics["p_true_auroc"]["value"] == pytest.approx(
        roc_auc_score(right, record.arrays["p_true"])
    )
    plain = evaluate_mmlu(model, BYTE, data)
    for name, metric in plain["metrics"].items():
        assert metrics[name] == metric, "asking further changes no other number"
    assert record["cost"]["tokens_unshared"] == plain["cost"]["tokens_unshared"]
    generated = evaluate_mmlu(model, BYTE, data, p_true=True, scoring="generate")
    assert "p_true_ece" in generated["metrics"] and "ece" not in generated["metrics"]


class Says(PlainModel):
    """Answers the questions whose text holds a key with its letter, one after another text."""

    vocab_size = 257

    def __init__(self, letters, otherwise):
        super().__init__()
        self.letters, self.otherwise, self.rows = letters, otherwise, []

    def hidden(self, input_ids, positions=None, cache=None):
        self.rows = [bytes(i for i in row if i < 256).rstrip(b"\0") for row in input_ids.tolist()]
        return torch.arange(len(self.rows)).view(-1, 1, 1).expand(-1, input_ids.shape[1], 1).float()

    def logits(self, hidden):
        logits = torch.zeros(len(hidden), self.vocab_size)
        for out, i in zip(logits, hidden.flatten().long().tolist()):
            row = self.rows[i].decode()
            letter = next((v for k, v in self.letters.items() if k in row), self.otherwise)
            out[ord(letter)] = 4.0
        return logits

    def nll(self, hidden, targets):
        return torch.nn.functional.cross_entropy(self.logits(hidden), targets, reduction="none")


def test_a_temperature_is_fitted_on_questions_that_are_not_asked(data):
    """Two thirds are right, always by 4 nats: 2/3 = e^(4/T) / (e^(4/T) + 3) makes T 4 / ln 6."""
    shown = {f" {n} and test": "ABCD"[(n + (n % 3 == 0)) % 4] for n in range(10)}
    model = Says(shown, "A")
    record = evaluate_mmlu(model, BYTE, data, fit_temperature="val")
    metrics = {name: metric["value"] for name, metric in record["metrics"].items()}
    assert metrics["accuracy"] == pytest.approx(2 / 3)
    assert record["protocol"]["fitted_temperature"] == pytest.approx(4 / math.log(6))
    assert metrics["log_loss"] == pytest.approx(
        log_loss(
            record.arrays["gold"], certainty.softmax(record.arrays["logprobs"]), labels=range(4)
        )
    )
    scaled = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 9))
    assert metrics["log_loss_scaled"] == pytest.approx(scaled) and scaled < metrics["log_loss"]
    assert metrics["ece_scaled"] == pytest.approx(0, abs=1e-9) and metrics["ece"] > 0.2
    assert metrics["brier_scaled"] == pytest.approx(2 / 9)
    assert record["protocol"]["temperature_questions"] == 18
    plain = evaluate_mmlu(model, BYTE, data)
    assert all(record["metrics"][name] == metric for name, metric in plain["metrics"].items())
    evaluate_mmlu(model, BYTE, data, fit_temperature="dev")
    for options, said in (
        ({"fit_temperature": "val", "split": "val"}, "val: it is what is asked"),
        ({"fit_temperature": "dev", "num_few_shot": 1}, "what the examples are taken from"),
        ({"fit_temperature": "val", "scoring": "generate"}, "needs probabilities"),
    ):
        with pytest.raises(ValueError, match=said):
            evaluate_mmlu(model, BYTE, data, **options)
    for file in (data / "val").iterdir():
        shutil.copy(data / "test" / file.name.replace("val", "test"), file)
    with pytest.raises(ValueError, match="all of its questions are asked, too"):
        evaluate_mmlu(model, BYTE, data, fit_temperature="val")


def test_leave_to_abstain(data):
    """Questions 0 to 2 of each subject are answered A, the others not."""
    sure = {f"What is {i} and test": "A" for i in range(3)}
    options = {"template": "letters", "allow_abstain": True, "no_prefix_cache": True}
    record = evaluate_mmlu(Says(sure, "E"), BYTE, data, **options)
    questions = record.shown.questions
    assert all(q.choices[4] == "I don't know" and q.answer < 4 for q in questions)
    answered = [any(key in q.question for key in sure) for q in questions]
    right = [a and q.answer == 0 for a, q in zip(answered, questions)]
    metrics = record["metrics"]
    assert 0 < sum(right) < sum(answered) < len(questions)
    assert metrics["answered"]["value"] == pytest.approx(np.mean(answered))
    assert metrics["accuracy"]["value"] == pytest.approx(np.mean(right))
    assert metrics["accuracy_answered"]["value"] == pytest.approx(sum(right) / sum(answered))
    assert metrics["accuracy_answered"]["n"] == sum(answered)
    assert "may abstain" in record["words"] and record["protocol"]["abstain"] == "I don't know"
    # how sure it would have been: E does not count
    top = certainty.softmax(record.arrays["logprobs"][:, :4]).max(axis=1)
    assert record.arrays["confidence"] == pytest.approx(top)
    never = evaluate_mmlu(Says({}, "E"), BYTE, data, **options)["metrics"]
    assert never["answered"]["value"] == 0 and math.isnan(never["accuracy_answered"]["value"])
    with pytest.raises(ValueError, match=r"allow-abstain\): .* 4 choices, .*: --template letters"):
        evaluate_mmlu(Says({}, "E"), BYTE, data, allow_abstain=True)


def test_records_are_compared_and_drawn(data, tmp_path):
    for step in (1, 2):
        info = INFO | {"name": f"checkpoint-{step}", "step": step, "fingerprint": f"{step}" * 64}
        options = {"p_true": True, "fit_temperature": "val", "info": info}
        record = evaluate_mmlu(make_model(step), BYTE, data, num_few_shot=1, **options)
        record.save(tmp_path / "results")
    places = sorted(path.parent for path in (tmp_path / "results").rglob("mmlu-*.json"))
    (pair,) = pairs_of(*places)
    out = compare(*pair, seed=3)
    assert out["metric"] == "accuracy" and out["test"] == "McNemar"
    names = ("ece", "ece_mass", "brier", "auroc", "aurc", "selective_accuracy", "brier_classes")
    assert {*names, "p_true_auroc", "p_true_brier"} <= out["others"].keys()
    for name in ("auroc", "p_true_auroc", "ece"):
        own = [r["metrics"][name]["value"] for r in pair]
        assert out["others"][name]["difference"] == pytest.approx(own[1] - own[0])
    assert "auroc" in compare_text(*pair, out)
    said = run_report(tmp_path / "results", "--charts")
    assert said.returncode == 0, said.stderr
    (picture,) = (tmp_path / "results").glob("calibration-mmlu-*.png")
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.name in said.stdout


@pytest.mark.slow
def test_further_questions_have_the_same_bits_on_any_number_of_ranks(data, tmp_path):
    body = f"""
    from builders import tiny_model
    from mmlu_eval import evaluate_mmlu
    from tokenizer import build_tokenizer
    model = tiny_model("gpt", std=0.15, max_position_embeddings=2048)
    options = dict(p_true=True, fit_temperature="val", num_few_shot=1, dist=dist)
    found = evaluate_mmlu(model, build_tokenizer("byte"), {str(data)!r}, **options)
    values = [(name, m["value"], m.get("stderr")) for name, m in found["metrics"].items()]
    arrays = [a.tobytes().hex() for a in found.arrays.values() if a.dtype.kind in "fb"]
    if dist.is_main:
        say("FOUND", values, arrays)
    """
    said = [run_ranks(n, tmp_path, body).stdout.partition("FOUND")[2] for n in (1, 3)]
    assert said[0] and said[0] == said[1]


def test_scores_of_the_report_are_known_to_resampling():
    assert {"ece", "ece_mass", "auroc", "aurc", "selective_accuracy"} <= resampling.SCORES.keys()
