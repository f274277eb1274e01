"""Choice sets against lm-evaluation-harness: its own task files render the prompts from the same
rows, its own scorer scores them with transformers on the same weights, in float32, and its own
tasks count what is right. The sets at hand are real (TruthfulQA, CMMLU, which also stands in for
C-Eval), the others small files of their exact form (choice_files.py).

Skipped without lm-eval, as test_mmlu_oracle.py says.
"""

import csv
import json
from pathlib import Path

import choice_files
import numpy as np
import pytest
from builders import write_jsonl
from test_mmlu_oracle import TASKS, make_checkpoint, offline

import checkpoint
from mmlu_eval import evaluate_mmlu
from tasks.choice_sets import load_set
from tasks.questions import read_data
from tokenizer import build_tokenizer

__all__ = ["offline"]
TASK_FILES = {
    "arc_challenge": "arc/arc_challenge.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "winogrande": "winogrande/default.yaml",
    "piqa": "piqa/piqa.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "mmlu_pro": "leaderboard/mmlu_pro/mmlu_pro.yaml",
    "truthfulqa_mc1": "truthfulqa/truthfulqa_mc1.yaml",
    "truthfulqa_mc2": "truthfulqa/truthfulqa_mc2.yaml",
    "ceval": "ceval/ceval-valid_law.yaml",
    "cmmlu": "cmmlu/cmmlu_agronomy.yaml",
}
TEMPLATES = {"cmmlu": "lm_eval_cmmlu"}  # the others' own are lm-eval's
CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ m.role | upper }}\n{{ m.content }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT\n{% endif %}"
)
CASES = [(name, shots) for name in TASK_FILES for shots in (0, 2)]
CASES = [(name, shots) for name, shots in CASES if not (shots and "truthful" in name)]


def write_both(name, folder, data_dir, n):
    """(our directory of a set, {split: rows as lm-eval's task reads them}), of n questions."""
    root = folder / name
    if name in choice_files.FORMS:
        choice_files.write(root, name, n=n)
        last = len(choice_files.FORMS[name]) - 1
        splits = choice_files.FORMS[name][0][0]
        rows = {split: choice_files.rows_of(name, split, last, n) for split in splits}
        if name == "mmlu_pro":  # ours are asked category by category
            rows["test"].sort(key=lambda row: row["category"])
        return root, rows
    if name.startswith("truthfulqa"):
        rows = json.loads((data_dir / "truthfulqa" / "mc_task.json").read_text())
        rows = rows[:: len(rows) // n][:n]
        root.mkdir()
        (root / "mc_task.json").write_text(json.dumps(rows))
        for row in rows:
            for key in ("mc0_targets", "mc1_targets", "mc2_targets"):
                row[key] = {"choices": list(row[key]), "labels": list(row[key].values())}
        return root, {"val": rows}
    rows = {}
    for split in ("dev", "test"):
        with open(data_dir / "cmmlu" / split / "agronomy.csv", encoding="utf-8") as file:
            rows[split] = list(csv.DictReader(file))[:n]
    if name == "cmmlu":
        for split, own in rows.items():
            write_csv(root / split / "agronomy.csv", own)
        return root, rows
    lower = {"Question": "question", "Answer": "answer", "": "id"}
    rows = {s: [{lower.get(k, k): v for k, v in r.items()} for r in own] for s, own in rows.items()}
    rows = {"dev": rows["dev"], "val": rows["test"]}
    for split, own in rows.items():
        write_csv(root / split / f"law_{split}.csv", own)
    return root, rows


def write_csv(path, rows):
    path.parent.mkdir(parents=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def make_task(name, rows, shots, folder, draw=False, **chat):
    """lm-eval's task of its own file, on these rows; its examples the first, as ours are, or those
    that it draws. chat: build_all_requests' terms of a chat."""
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(Path(TASKS).parent / TASK_FILES[name])
    names = {"val": "validation", "test": "test"}
    files = {split: write_jsonl(folder / f"{name}_{split}.jsonl", rows[split]) for split in rows}
    asked = "test" if "test" in rows else "val"
    few = next((split for split in rows if split != asked), None)
    config |= {"dataset_path": "json", "dataset_name": None, "num_fewshot": shots}
    config["dataset_kwargs"] = {"data_files": {s: str(file) for s, file in files.items()}}
    for key in ("training_split", "validation_split", "test_split", "fewshot_split"):
        config.pop(key, None)
    config[f"{names[asked]}_split"] = asked
    if shots:
        sampler = "default" if draw else "first_n"
        config |= {"fewshot_split": few, "fewshot_config": {"sampler": sampler}}
    else:
        config.pop("fewshot_config", None)
    for key in ("tag", "group", "task_alias"):
        config.pop(key, None)
    task = ConfigurableTask(config=config)
    task.set_fewshot_seed(1234)  # its command's own
    task.build_all_requests(rank=0, world_size=1, **chat)
    return task


def by_question(instances, values):
    """[(document, the values of its requests in order)]"""
    found = {}
    for instance, value in zip(instances, values):
        found.setdefault(instance.doc_id, (instance.doc, []))[1].append((instance.idx, value))
    return [(doc, [v for _, v in sorted(own)]) for _, (doc, own) in sorted(found.items())]


@pytest.fixture(scope="module")
def models(data_dir, tmp_path_factory):
    """{shape: (our model, our tokenizer, lm-eval's wrapper)}, each of a random checkpoint made
    when it is first asked for."""
    pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.models.huggingface import HFLM

    made = {}

    def pair(shape):
        if shape not in made:
            directory = tmp_path_factory.mktemp(shape)
            make_checkpoint(shape, data_dir / "tokenizers" / "gpt2", directory)
            (directory / "chat_template.jinja").write_text(CHAT)
            path, size = str(directory), {"batch_size": 16, "max_length": 4096}
            theirs = HFLM(pretrained=path, device="cpu", dtype="float32", **size)
            made[shape] = checkpoint.load_model(directory, "float32"), build_tokenizer(path), theirs
        return made[shape]

    return pair


@pytest.mark.parametrize("name,shots", CASES)
def test_prompts_are_lm_evals_byte_for_byte(name, shots, data_dir, tmp_path):
    root, rows = write_both(name, tmp_path, data_dir, 8)
    choice_set = load_set(name)
    template = choice_set.template(TEMPLATES.get(name, choice_set.own.name))
    scoring = choice_set.scoring_of(template)
    data = read_data(root, shots, layout=choice_set.layout)
    names = data.table["names"]
    requests = make_task(name, rows, shots, tmp_path).instances
    asked = by_question(requests, [r.args for r in requests])
    assert len(asked) == len(data.questions) == 8
    for q, (_, found) in zip(data.questions, asked):
        examples = data.examples[q.subject]
        head = template.render_head(q.subject, names.get(q.subject), examples, scoring)
        wanted = [
            (
                head + template.render_question(q, 0, c),
                template.render_answer(q, c, scoring),
            )
            for c in range(len(q.choices))
        ]
        assert found == wanted


@pytest.mark.parametrize("name", ["arc_challenge", "winogrande", "hellaswag"])
def test_drawn_examples_are_lm_evals(name, data_dir, tmp_path):
    root, rows = write_both(name, tmp_path, data_dir, 9)
    choice_set = load_set(name)
    own, scoring = choice_set.own, choice_set.scoring
    data = read_data(root, 4, layout=choice_set.layout, draw=True)
    requests = make_task(name, rows, 4, tmp_path, draw=True).instances
    asked = by_question(requests, [r.args for r in requests])
    seen = set()
    for (subject, examples, (i,)), (_, found) in zip(data.groups, asked):
        q, head = data.questions[i], own.render_head(subject, None, examples, scoring)
        assert found[0] == (head + own.render_question(q), own.render_answer(q, 0, scoring))
        seen.add(tuple(e.question for e in examples))
    assert len(seen) > 5  # others for each question
    part = read_data(root, 4, limit=2, layout=choice_set.layout, draw=True)
    assert [g[1] for g in part.groups] == [g[1] for g in data.groups[:2]]
    with pytest.raises(ValueError, match="lm_eval: cmmlu is asked by subject"):
        read_data(data_dir / "cmmlu", 1, layout=load_set("cmmlu").layout, draw=True)


def compare(cases, models, shape, data_dir, tmp_path, n, as_turns=None):
    """Every case's log-probabilities, verdicts and figures; lm-eval's in one go. as_turns: in a
    chat, whose examples are turns or not."""
    model, tokenizer, theirs = models(shape)
    chat, options = {}, {}
    if as_turns is not None:
        chat = {"apply_chat_template": True, "fewshot_as_multiturn": as_turns}
        chat |= {"system_instruction": "Be brief.", "chat_template": theirs.apply_chat_template}
        options = {"chat_template": "on", "system_prompt": "Be brief."}
        options |= {"fewshot_as_turns": as_turns}
    tasks, records, requests = {}, {}, []
    for name, shots in cases:
        folder = tmp_path / f"{name}_{shots}"
        folder.mkdir()
        root, rows = write_both(name, folder, data_dir, n)
        tasks[name, shots] = make_task(name, rows, shots, folder, **chat)
        requests += tasks[name, shots].instances
        own = options | ({"template": TEMPLATES[name]} if name in TEMPLATES else {})
        records[name, shots] = evaluate_mmlu(
            model, tokenizer, root, num_few_shot=shots, set=name, **own
        )
    values = iter(theirs.loglikelihood(requests, disable_tqdm=True))
    for (name, shots), task in tasks.items():
        record, wanted = records[name, shots], by_question(task.instances, values)
        assert record["evaluation"] == name and record["protocol"]["shortened"] == 0
        assert len(wanted) == n == record["metrics"]["accuracy"]["n"]
        verdicts = [task.process_results(doc, found) for doc, found in wanted]
        for (_, found), ours in zip(wanted, record.arrays["logprobs"]):
            scores = np.array([value for value, _ in found])
            assert np.isneginf(ours[len(scores) :]).all()
            near = np.abs(ours[: len(scores)] - scores)
            assert (near < np.maximum(1e-4, 1e-6 * np.abs(scores))).all(), (name, shots, near)
            assert ours.argmax() == scores.argmax() and np.ptp(scores) > 1e-3
        figures = {"acc": "right_mass"} if name == "truthfulqa_mc2" else METRICS
        for theirs_name, ours_name in figures.items():
            if theirs_name in verdicts[0] and ours_name in record["metrics"]:
                figure = np.mean([v[theirs_name] for v in verdicts])
                value = record["metrics"][ours_name]["value"]
                assert value == pytest.approx(figure, abs=1e-5 if "mass" in ours_name else 1e-12)
        assert next(iter(record["metrics"])) == load_set(name).metric
        by_length = "acc_norm" in verdicts[0] and load_set(name).scoring == "continuation"
        assert by_length == ("accuracy_normalised" in record["metrics"])


METRICS = {"acc": "accuracy", "acc_norm": "accuracy_normalised"}


def test_scores_are_lm_evals(models, data_dir, tmp_path):
    few = {"winogrande", "mmlu_pro"}
    cases = [(name, 2 * (name in few)) for name in TASK_FILES if name not in ("arc_easy", "cmmlu")]
    compare(cases, models, "llama", data_dir, tmp_path, 2)


def test_chats_are_lm_evals(models, data_dir, tmp_path):
    """Letters, whole choices and a blank, with a description and without."""
    cases = [("mmlu_pro", 1), ("ceval", 1), ("arc_easy", 1), ("winogrande", 1)]
    compare(cases, models, "llama", data_dir, tmp_path, 2, as_turns=True)


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_more_scores_are_lm_evals(shape, models, data_dir, tmp_path):
    compare(CASES, models, shape, data_dir, tmp_path, 12)


@pytest.mark.slow
@pytest.mark.parametrize("as_turns", [True, False])
def test_more_chats_are_lm_evals(as_turns, models, data_dir, tmp_path):
    compare(CASES, models, "gpt2", data_dir, tmp_path, 8, as_turns)
