"""mmlu_eval.py: scores and tables against figures by hand and models whose answers are known, and
the command. The scores' oracle is tests/test_mmlu_oracle.py."""

import csv
import json
import math
import statistics

import choice_files
import numpy as np
import pytest
import torch
from builders import (
    CPU,
    PlainModel,
    error_of,
    save_model,
    saved_checkpoint,
    tiny_model,
    torchrun,
)

import checkpoint
import mmlu_eval
import results
import transformers_model
from mmlu_eval import evaluate_mmlu
from tasks.questions import LETTERS, read_data
from tasks.templates import load_template
from tokenizer import build_tokenizer

SHAPES = {
    "gpt2": ("gpt", {"n_heads": 4}),
    "llama": ("llama", {}),
    "mistral": ("gpt", {"n_heads": 4, "position": "rope", "sliding_window": 150}),
}


def make_model(shape="gpt2", context=4096, vocab_size=50257):
    kind, changes = SHAPES[shape]
    changes = changes | {"vocab_size": vocab_size, "max_position_embeddings": context}
    return tiny_model(kind, std=0.15, **changes).for_inference(torch.float32)


# ---------------------------------------------------------------------------------------------
# Scores


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("template", ["lm_eval", "continuation"])
def test_the_prefix_cache_changes_nothing(shape, template, gpt2, data_dir):
    model = make_model(shape)
    largest = 0.0
    logits = model.logits

    def watch(hidden):
        nonlocal largest
        out = logits(hidden)
        largest = max(largest, out.abs().max().item())
        return out

    model.logits = watch
    options = {"template": template, "subjects": ["anatomy", "sociology"], "limit": 8}
    cached, plain = (
        evaluate_mmlu(model, gpt2, data_dir / "mmlu", 3, no_prefix_cache=not use, **options)
        for use in (True, False)
    )
    assert cached["protocol"]["prefix_cache"] and not plain["protocol"]["prefix_cache"]
    assert cached["data"]["tokens"] < 0.6 * plain["data"]["tokens"]
    assert cached["cost"]["tokens_unshared"] == plain["data"]["tokens"]
    a, b = cached.arrays["logprobs"], plain.arrays["logprobs"]
    bound = 1e-5 * max(1.0, largest)
    assert np.abs(a - b).max() < bound
    ties = [i for i, row in enumerate(np.sort(b)) if row[-1] - row[-2] < 2 * bound]
    differing = np.flatnonzero(a.argmax(-1) != b.argmax(-1))
    assert set(differing.tolist()) <= set(ties), f"differ on {differing}, ties are {ties}"


def test_running_out_of_memory_halves_the_batches(gpt2, data_dir, monkeypatch, capsys):
    model = make_model()
    options = {"subjects": ["anatomy"], "limit": 20}
    wanted = evaluate_mmlu(model, gpt2, data_dir / "mmlu", 2, **options)
    hidden = model.hidden

    def small_memory(ids, cache=None):
        if ids.numel() > 400:
            raise torch.OutOfMemoryError
        return hidden(ids, cache=cache)

    monkeypatch.setattr(model, "hidden", small_memory)
    found = evaluate_mmlu(model, gpt2, data_dir / "mmlu", 2, batch_tokens=4096, **options)
    assert 128 <= found["protocol"]["batch_tokens"] <= 512 < wanted["protocol"]["batch_tokens"]
    assert "out of memory" in capsys.readouterr().out
    assert found["config_hash"] == wanted["config_hash"]  # what was asked for is the same
    assert np.abs(found.arrays["logprobs"] - wanted.arrays["logprobs"]).max() < 1e-4


class Oracle(PlainModel):
    """Any model's interface, with an answer chosen by looking at the prompt's tokens: `answer`
    maps the tokens before a position to the token that is almost certain there, or None."""

    max_positions = 10**6

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def hidden(self, ids, positions=None, cache=None):
        assert cache is None
        out = torch.zeros(*ids.shape, 1)
        for b, row in enumerate(ids.tolist()):
            for t in range(len(row)):
                token = self.answer(bytes(min(i, 255) for i in row[: t + 1]))
                out[b, t] = -1 if token is None else token
        return out

    def logits(self, hidden):
        return 9.0 * torch.nn.functional.one_hot(hidden[..., 0].long() + 1, 258)[..., 1:].float()

    def nll(self, hidden, targets):
        return torch.nn.functional.cross_entropy(self.logits(hidden), targets, reduction="none")


def test_a_model_that_knows_the_answers_scores_everything(data_dir):
    """Under several templates and every scoring, the model being told what follows each prompt."""
    tokenizer = build_tokenizer("byte")
    options = {"subjects": ["anatomy", "econometrics"], "limit": 3}
    data = read_data(data_dir / "mmlu", subjects=options["subjects"], limit=3)

    def knows(template, scored):
        texts = {}
        rendered = load_template(template)
        for q in data.questions:
            for r in range(4):
                answer = rendered.render_answer(q, (q.answer - r) % 4, scored, r)
                text = rendered.render_question(q, r) + answer + "\x00"
                texts[text.encode()] = None
        known = [t for t in texts]

        def answer(before):
            for text in known:
                start = text[:40]
                at = before.rfind(start)
                own = before[at:]
                if at >= 0 and text.startswith(own) and len(own) < len(text):
                    return text[len(own)]
            return None

        return answer

    for template, scored in (("lm_eval", "letter"), ("zh", "letter"), ("continuation", None)):
        scored = scored or "continuation"
        model = Oracle(knows(template, scored))
        record = evaluate_mmlu(
            model,
            tokenizer,
            data_path=data_dir / "mmlu",
            template=template,
            scoring=scored,
            **options,
        )
        accuracy = record["metrics"]["accuracy"]
        assert accuracy.items() >= {"value": 1.0, "stderr": 0.0, "n": 6}.items()
        assert record["metrics"]["accuracy_macro"]["value"] == 1.0
    model = Oracle(knows("lm_eval", "letter"))
    record = evaluate_mmlu(
        model, tokenizer, data_dir / "mmlu", scoring="generate", permute_choices=2, **options
    )
    assert record["metrics"]["accuracy"]["value"] == 1.0
    assert record["metrics"]["accuracy_permuted"]["value"] == 1.0
    assert record["metrics"]["same_answer"]["value"] == 1.0
    assert record["metrics"]["answered"]["value"] == 1.0


class Told(Oracle):
    """Looks each whole prompt up and answers after its last byte, which 0 pads on the right."""

    def hidden(self, ids, positions=None, cache=None):
        out = torch.full((*ids.shape, 1), -1.0)
        for b, row in enumerate(ids.tolist()):
            prompt = bytes(row).rstrip(b"\x00")
            out[b, len(prompt) - 1] = ord(self.answer(prompt))
        return out


def test_planted_models_on_all_of_mmlu(data_dir):
    """One that knows the answers has all right; one that says C has exactly the share of C."""
    data, template = read_data(data_dir / "mmlu"), load_template("lm_eval")
    known = {}
    for q in data.questions:
        head = template.render_head(q.subject, None, [], "letter")
        known[(head + template.render_question(q) + " ").encode()] = LETTERS[q.answer]
    tokenizer, options = build_tokenizer("byte"), {"batch_tokens": 32768}
    share = statistics.mean(q.answer == 2 for q in data.questions)
    for answer, wanted in ((known.__getitem__, 1.0), (lambda prompt: "C", share)):
        record = evaluate_mmlu(Told(answer), tokenizer, data_dir / "mmlu", **options)
        assert record["metrics"]["accuracy"]["n"] == 14042
        assert record["metrics"]["accuracy"]["value"] == pytest.approx(wanted, abs=1e-12)
    assert record["breakdown"]["letter"]["C"]["predicted"] == 1.0


def always_c(tokenizer):
    """A GPTModel that gives " C" a logit of 1 and every other token 0, whatever it reads."""
    model = make_model("llama")
    token = tokenizer.encode(" C")[0]
    with torch.no_grad():
        model.ln_f.weight.zero_()
    model.ln_f = torch.nn.LayerNorm(32).requires_grad_(False)
    model.ln_f.weight.zero_()
    model.ln_f.bias.copy_(torch.eye(32)[0])
    model.lm_head.weight.zero_()
    model.lm_head.weight[token, 0] = 1.0
    return model


def test_a_model_that_always_says_c_scores_the_share_of_c(gpt2, data_dir):
    model = always_c(gpt2)
    subjects = ["anatomy", "us_foreign_policy", "virology"]
    record = evaluate_mmlu(
        model, gpt2, data_dir / "mmlu", 1, subjects=subjects, limit=25, permute_choices=4
    )
    data = read_data(data_dir / "mmlu", subjects=subjects, limit=25)
    share = statistics.mean(q.answer == 2 for q in data.questions)
    metrics, breakdown = record["metrics"], record["breakdown"]
    assert metrics["accuracy"]["value"] == share
    assert 0.1 < share < 0.5
    assert breakdown["letter"]["C"]["predicted"] == 1.0
    assert metrics["accuracy_permuted"]["value"] == 0.25  # each choice is at C once
    assert metrics["same_answer"]["value"] == 0.0
    p = math.e / (math.e + 3)  # of C among the letters
    assert metrics["ece"]["value"] == pytest.approx(abs(p - share), abs=1e-6)
    brier = share * (1 - p) ** 2 + (1 - share) * p**2
    assert metrics["brier"]["value"] == pytest.approx(brier, abs=1e-6)
    full = 1 - math.log(math.e + 50256)
    assert record.arrays["logprobs"][:, 2] == pytest.approx(full, abs=1e-5)


def test_letters_of_several_tokens_are_scored_whole(data_dir):
    """Under the byte tokenizer the space before a letter is a token of its own."""
    model, byte = make_model("llama", vocab_size=257), build_tokenizer("byte")
    record = evaluate_mmlu(model, byte, data_dir / "mmlu", subjects=["anatomy"], limit=3)
    data, template = read_data(data_dir / "mmlu", subjects=["anatomy"]), load_template("lm_eval")
    for q, found in zip(data.questions, record.arrays["logprobs"]):
        head = template.render_head(q.subject, None, [], "letter") + template.render_question(q)
        for letter, ours in zip("ABCD", found):
            ids = torch.tensor([byte.encode(head + " " + letter)])
            with torch.no_grad():
                logs = model.logits(model.hidden(ids))[0].log_softmax(-1)
            wanted = logs[-3, ids[0, -2]] + logs[-2, ids[0, -1]]
            assert ours == pytest.approx(wanted.item(), abs=1e-4)


def test_figures_follow_from_the_questions_file(gpt2, data_dir, tmp_path):
    """Accuracy by subject, category, micro and macro, recomputed by hand from samples.jsonl."""
    subjects = ["anatomy", "virology", "sociology", "high_school_us_history", "marketing"]
    record = evaluate_mmlu(
        make_model(),
        gpt2,
        data_dir / "mmlu",
        2,
        subjects=subjects,
        limit=7,
        template="continuation",
    )
    loaded = results.load_record(record.save(tmp_path))
    samples = results.load_samples(loaded)
    arrays = results.load_arrays(loaded)
    assert len(samples) == 35 and [s["correct"] for s in samples] == arrays["correct"].tolist()
    by_subject, metrics = {}, loaded["metrics"]
    for s in samples:
        assert s["predicted"] == LETTERS[max(range(4), key=lambda i, s=s: s["logprobs"][i])]
        by_subject.setdefault(s["subject"], []).append(s["predicted"] == s["gold"])
    micro = statistics.mean(r for right in by_subject.values() for r in right)
    macro = statistics.mean(statistics.mean(right) for right in by_subject.values())
    assert metrics["accuracy"]["value"] == pytest.approx(micro, abs=1e-12)
    assert metrics["accuracy_macro"]["value"] == pytest.approx(macro, abs=1e-12)
    variances = [statistics.variance(right) / 7 for right in by_subject.values()]
    stderr = math.sqrt(sum(variances)) / len(variances)
    assert metrics["accuracy_macro"]["stderr"] == pytest.approx(stderr, abs=1e-12)
    for name, right in by_subject.items():
        cell = loaded["breakdown"]["subject"][name]["accuracy"]
        assert cell["value"] == pytest.approx(statistics.mean(right))
        assert cell["stderr"] == pytest.approx(math.sqrt(statistics.variance(right) / 7))
    other = by_subject["anatomy"] + by_subject["virology"] + by_subject["marketing"]
    cell = loaded["breakdown"]["category"]["other"]["accuracy"]
    assert (cell["value"], cell["n"]) == (pytest.approx(statistics.mean(other)), 21)
    normalised = [
        max(range(4), key=lambda i, s=s: s["logprobs"][i] / len(s["choices"][i])) for s in samples
    ]
    value = statistics.mean(LETTERS[i] == s["gold"] for i, s in zip(normalised, samples))
    assert metrics["accuracy_normalised"]["value"] == pytest.approx(value)
    assert loaded["protocol"]["limit"] == 7


@pytest.mark.parametrize(
    "text,letter",
    [(" B", 1), ("\n\nThe answer is (C).", 2), ("Because A", 0), ("BAD ABBA", -1), ("x\n\nA", -1)],
)
def test_first_letter_that_stands_alone(text, letter):
    assert mmlu_eval.first_letter(text) == letter


def test_a_small_vocabulary_is_refused(gpt2, data_dir):
    with pytest.raises(ValueError, match="the model has 300: name the tokenizer"):
        evaluate_mmlu(
            make_model(vocab_size=300), gpt2, data_dir / "mmlu", subjects=["anatomy"], limit=2
        )


# ---------------------------------------------------------------------------------------------
# The command


@pytest.fixture(scope="module")
def saved(gpt2, tmp_path_factory):
    return save_model(make_model("llama", context=1024), tmp_path_factory.mktemp("run"), 7, gpt2)


def command(saved, data_dir, out, *flags, ranks=0):
    where = ["--checkpoint-path", saved, "--device", "cpu", "--results-dir", out]
    return torchrun(ranks, "mmlu_eval.py", *where, "--data-path", data_dir / "mmlu", *flags)


def test_the_command_side_by_side(saved, data_dir, tmp_path):
    flags = ["--num-few-shot", "5", "--limit", "3", "--subjects", "anatomy", "virology"]
    flags += ["--log-samples", "--template", "lm_eval", "continuation", "zh"]
    flags += ["--scoring", "letter", "continuation"]
    done = command(saved, data_dir, tmp_path, *flags)
    columns = ["lm_eval/letter", "lm_eval/continuation", "continuation/continuation", "zh/letter"]
    assert all(name in done.stdout for name in [*columns, "zh/continuation"])
    assert "A PART OF THE QUESTIONS" in done.stdout and "micro" in done.stdout
    records = results.load_records(tmp_path)
    assert len(records) == 5 and all(r["checkpoint"]["name"] == "checkpoint-7" for r in records)
    assert {r["protocol"]["scoring"] for r in records} == {"letter", "continuation"}
    lines = next(tmp_path.rglob("mmlu-differences-*")).read_text().splitlines()
    differing = [json.loads(line) for line in lines]
    arrays = {mmlu_eval.column_of(r): results.load_arrays(r) for r in records}
    a, b = (arrays[name]["predicted"] for name in ("lm_eval/letter", "zh/letter"))
    listed = [d["id"] for d in differing if {"lm_eval/letter", "zh/letter"} <= d.keys()]
    assert listed == np.flatnonzero(a != b).tolist()


@pytest.mark.parametrize(
    "flags,message",
    [
        ("--template continuation --scoring letter", "shows no letters: --scoring continuation"),
        ("--template zh continuation --scoring letter", "with --template continuation, which"),
        ("--subjects alchemy", "no 'alchemy'"),
        ("--kv-dtype int8", "--kv-dtype goes with --scoring generate"),
        ("--permute-choices 5", "--permute-choices must be 1 to 4, not 5"),
    ],
)
def test_bad_values_are_refused(flags, message, saved, data_dir, tmp_path):
    common = ["--checkpoint-path", str(saved), "--data-path", str(data_dir / "mmlu")]
    with pytest.raises(ValueError, match=message):
        mmlu_eval.main([*common, "--device", "cpu", *flags.split()])


def test_bad_flags_are_one_line_and_exit_2(saved, tmp_path):
    where = ["--checkpoint-path", saved, "--device", "cpu", "--data-path"]
    assert "scripts/fetch_mmlu.sh" in error_of("mmlu_eval.py", *where, tmp_path)
    assert "--data-path PATH is needed" in error_of("mmlu_eval.py", *where[:-1])
    assert "--checkpoint-path" in error_of("mmlu_eval.py", "--data-path", tmp_path)
    for flag in ("--seed", "--compile"):  # they would do nothing
        assert flag in error_of("mmlu_eval.py", *where, tmp_path, flag, "1")


def test_other_sets_through_the_command(tmp_path, capsys):
    """Their name in records, table, report and file names; the figure that ranks checkpoints."""
    path = saved_checkpoint(tmp_path / "run", 3, "llama", max_position_embeddings=4096)
    common = [
        "--checkpoint-path",
        str(path),
        "--device",
        "cpu",
        "--results-dir",
        str(tmp_path / "r"),
    ]
    choice_files.write(tmp_path / "arc", "arc_challenge")
    flags = ["--set", "arc_challenge", "--data-path", str(tmp_path / "arc"), "--num-few-shot", "2"]
    mmlu_eval.main([*common, *flags, "--template", "arc_challenge", "letters", "--log-samples"])
    printed = capsys.readouterr().out
    assert "checkpoint-3: 12 questions of arc_challenge, 2-shot" in printed
    assert "12 questions, unlike the 1,172 of the test split" in printed and "macro" not in printed
    whole, letters = sorted(
        results.load_records(tmp_path / "r"), key=lambda r: r["protocol"]["template"]
    )
    assert whole["evaluation"] == letters["evaluation"] == "arc_challenge"
    assert next(iter(whole["metrics"])) == "accuracy_normalised"
    assert next(iter(letters["metrics"])) == "accuracy"
    assert any(words.endswith(": not a score") for words in whole["words"])
    rows = choice_files.rows_of("arc_challenge", "test")
    for record in (whole, letters):
        for row, sample, right in zip(
            rows, results.load_samples(record), results.load_arrays(record)["correct"]
        ):
            labels = [choice["label"] for choice in row["question"]["choices"]]
            assert sample["gold"] == "ABCDE"[labels.index(row["answerKey"])]
            assert len(sample["logprobs"]) == len(sample["choices"]) == len(labels)
            assert right == (sample["predicted"] == sample["gold"])
    (folder,) = (tmp_path / "r" / "run").iterdir()
    assert {path.name.partition("-")[0] for path in folder.iterdir()} == {"arc_challenge"}
    report = report_of(tmp_path / "r")
    assert "arc_challenge · " in report and "accuracy_normalised" in report


def test_answers_to_hand_in(tmp_path, capsys):
    """Of C-Eval's test split, whose answers only its site knows."""
    path = saved_checkpoint(tmp_path / "run", 3, "llama", max_position_embeddings=4096)
    for split, answer in (("dev", ",B"), ("test", "")):
        (tmp_path / split).mkdir()
        for subject in ("law", "logic"):
            head = "id,question,A,B,C,D" + ",answer" * bool(answer)
            rows = [f"{7 * i},问{subject}{i},甲,乙,丙{i},丁{answer}" for i in range(3)]
            text = "\n".join([head, *rows]) + "\n"
            (tmp_path / split / f"{subject}_{split}.csv").write_text(text, encoding="utf-8")
    where = [
        "--checkpoint-path",
        str(path),
        "--device",
        "cpu",
        "--results-dir",
        str(tmp_path / "r"),
    ]
    flags = ["--set", "ceval", "--data-path", str(tmp_path), "--split", "test"]
    mmlu_eval.main([*where, *flags, "--num-few-shot", "1", "--log-samples"])
    printed = capsys.readouterr().out
    (record,) = results.load_records(tmp_path / "r")
    assert list(record["metrics"]) == ["answered"] and record["examples"] is None
    samples = results.load_samples(record)
    assert all(s["gold"] is None and s["correct"] is None for s in samples)
    (file,) = (tmp_path / "r").rglob("*-submission.json")
    assert str(file) in printed
    wanted = {name: {} for name in ("law", "logic")}
    for i, sample in enumerate(samples):
        wanted[sample["subject"]][str(7 * (i % 3))] = sample["predicted"]
    assert json.loads(file.read_text()) == wanted
    assert report_of(tmp_path / "r")


def report_of(folder):
    """The report's text of a results directory."""
    import report

    report.main([str(folder)])
    return (folder / "report.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_torchrun_with_1_2_and_3_ranks_gives_the_same_bits(saved, data_dir, tmp_path):
    flags = ["--num-few-shot", "5", "--limit", "5", "--batch-tokens", "1024"]
    arrays = []
    for ranks in (1, 2, 3):
        command(saved, data_dir, tmp_path / str(ranks), *flags, ranks=ranks)
        arrays.append(next((tmp_path / str(ranks)).rglob("*.npz")).read_bytes())
    assert arrays[0] == arrays[1] == arrays[2]


@pytest.fixture(scope="module")
def trained(data_dir, tmp_path_factory):
    """A small model that train.py trained for a few steps on Shakespeare."""
    out = tmp_path_factory.mktemp("trained")
    flags = ["--train-data", data_dir / "text" / "tinyshakespeare.txt", "--seq-len", "128"]
    flags += ["--tokenizer-name", data_dir / "tokenizers" / "gpt2", "--num-steps", "12"]
    flags += ["--n-layers", "2", "--n-heads", "2", "--d-model", "64", "--d-ff", "128"]
    flags += ["--max-position-embeddings", "4096", "--batch-size", "4", "--max-tokens", "20000"]
    torchrun(0, "train.py", "--checkpoint-path", out, "--device", "cpu", *flags)
    return next(out.glob("checkpoint-*"))


@pytest.mark.slow
@pytest.mark.parametrize("name,template,n", [("mmlu", "lm_eval", 14042), ("cmmlu", "cmmlu", None)])
def test_all_questions_through_the_command(name, template, n, trained, data_dir, tmp_path):
    """Five-shot on what train.py wrote; micro and macro recomputed from the questions' file."""
    flags = ["--num-few-shot", "5", "--template", template, "--log-samples"]
    flags += ["--data-path", str(data_dir / name)]
    done = command(trained, data_dir, tmp_path, *flags)
    (record,) = results.load_records(tmp_path)
    samples = [(s["subject"], s["predicted"] == s["gold"]) for s in results.load_samples(record)]
    files = (data_dir / name / "test").glob("*.csv")
    lines = sum(len(list(csv.reader(open(f, encoding="utf-8")))) for f in files)  # noqa: SIM115
    assert len(samples) == (n or lines - len(record["breakdown"]["subject"]))
    micro = statistics.mean(right for _, right in samples)
    subjects = {name for name, _ in samples}
    macro = statistics.mean(
        statistics.mean(right for s, right in samples if s == name) for name in subjects
    )
    metrics = record["metrics"]
    assert metrics["accuracy"]["value"] == pytest.approx(micro, abs=1e-12)
    assert metrics["accuracy_macro"]["value"] == pytest.approx(macro, abs=1e-12)
    assert f"{micro:.2%}" in done.stdout and f"{macro:.2%}" in done.stdout
    assert abs(micro - 0.25) < 0.05  # it knows nothing
    print(done.stdout[-700:])


def test_the_transformers_fallback_scores_the_same(saved, gpt2, data_dir):
    """A model without a cache, transformers' own code, on the weights of a native one."""
    options = {"subjects": ["anatomy", "sociology"], "limit": 4}
    fallback = transformers_model.load_transformers(saved, torch.float32, CPU, None)
    assert not fallback.supports_cache
    found = evaluate_mmlu(fallback, gpt2, data_dir / "mmlu", 3, **options)
    native = checkpoint.load_model(saved, "float32")
    wanted = evaluate_mmlu(native, gpt2, data_dir / "mmlu", 3, **options)
    assert not found["protocol"]["prefix_cache"] and wanted["protocol"]["prefix_cache"]
    assert np.abs(found.arrays["logprobs"] - wanted.arrays["logprobs"]).max() < 1e-4
