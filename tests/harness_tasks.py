"""lm-eval's own task definitions over local files, as somebody without internet writes them."""

import csv
import json
from pathlib import Path

import lm_eval
import yaml

TASKS = Path(lm_eval.__file__).parent / "tasks"


def write_tasks(folder: Path, data: Path, n: int) -> list[str]:
    """YAML files in `folder` that put a known task's data where `data` (ROSEVAL_DATA) is, the first
    `n` documents of each; returns their names."""
    folder.mkdir(exist_ok=True)
    mmlu = {"anatomy": "mmlu/default/mmlu_anatomy.yaml"}
    for subject, own in mmlu.items():
        splits = {split: mmlu_rows(data / "mmlu", subject, split) for split in ("dev", "test")}
        rebase(folder, f"mmlu_{subject}", own, {"dev": splits["dev"], "test": splits["test"][:n]})
    gsm8k = {split: read_lines(data / f"gsm8k/{split}.jsonl") for split in ("train", "test")}
    rebase(folder, "gsm8k", "gsm8k/gsm8k.yaml", {s: rows[: 5 * n] for s, rows in gsm8k.items()})
    truthful = truthfulqa_rows(data / "truthfulqa/mc_task.json")[:n]
    for form in ("mc1", "mc2"):
        own = f"truthfulqa/truthfulqa_{form}.yaml"
        rebase(folder, f"truthfulqa_{form}", own, {"validation": truthful})
    for form, name in (("fewshot", "date_understanding"), ("cot_fewshot", "web_of_lies")):
        bbh = json.loads((data / f"bbh/{name}.json").read_text())["examples"][: n + 3]
        rebase(folder, f"bbh_{form}_{name}", f"bbh/{form}/{name}.yaml", {"test": bbh})
    lines = (data / "text/wikitext2-valid.txt").read_text().split("\n")
    texts = [" ".join(line.split()[:30]) for line in lines if len(line.split()) > 30]
    rebase(
        *(folder, "lambada_openai", "lambada/lambada_openai.yaml"),
        {"test": [{"text": text} for text in texts[:n]]},
    )
    pages = ["\n".join(lines[i : i + 30]) for i in range(0, 30 * n, 30)]
    rebase(
        *(folder, "wikitext", "wikitext/wikitext.yaml"),
        {split: [{"page": page} for page in pages] for split in ("train", "validation", "test")},
    )
    return sorted(path.stem for path in folder.glob("*.yaml"))


def rebase(folder: Path, task: str, own: str, splits: dict[str, list[dict]]) -> None:
    files = {}
    for split, rows in splits.items():
        path = folder / f"{task}_{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files[split] = str(path)
    values = {"include": str(TASKS / own), "task": task, "dataset_path": "json"}
    values |= {"dataset_name": None, "dataset_kwargs": {"data_files": files}}
    (folder / f"{task}.yaml").write_text(yaml.safe_dump(values))


def mmlu_rows(data: Path, subject: str, split: str) -> list[dict]:
    with open(data / split / f"{subject}_{split}.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    names = ("question", "choices", "answer", "subject")
    return [dict(zip(names, (r[0], r[1:5], "ABCD".index(r[5]), subject))) for r in rows]


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def truthfulqa_rows(path: Path) -> list[dict]:
    rows = json.loads(path.read_text(encoding="utf-8"))
    keys = ("mc1_targets", "mc2_targets")
    return [
        {"question": row["question"]}
        | {k: {"choices": list(row[k]), "labels": list(row[k].values())} for k in keys}
        for row in rows
    ]
