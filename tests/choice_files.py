"""Small files in the exact forms in which choice sets are published, as their authors' and as
Hugging Face's: choice_files.write(folder, "arc_challenge") writes one form, and says its splits.

Rows are made of numbered words: what is asked does not matter, but lengths, spaces, brackets and
numbers of choices differ as they do in the real files.
"""

import json
import random
from pathlib import Path

WORDS = ("river", "stone", "winter", "melt", "copper", "signal", "garden", "engine", "harvest")
WORDS += ("mirror", "lantern", "frost", "wheel", "paper")


def words(i: int, n: int) -> str:
    return " ".join(random.Random(f"{i}, {n}").choices(WORDS, k=n))


def arc(i: int) -> dict:
    n = (4, 3, 5, 4)[i % 4]
    labels = "12345" if i % 3 == 1 else "ABCDE"
    choices = [{"text": words(i + 2 * c, 1 + (i + c) % 4), "label": labels[c]} for c in range(n)]
    return {
        "id": f"Mercury_{i}",
        "question": {"stem": f"Which of these is a {words(i, 5 + i % 4)}?", "choices": choices},
        "answerKey": labels[i % n],
    }


def arc_hub(i: int) -> dict:
    row = arc(i)
    choices = row["question"]["choices"]
    return row | {
        "question": row["question"]["stem"],
        "choices": {key: [c[key] for c in choices] for key in ("text", "label")},
    }


def openbookqa(i: int) -> dict:
    choices = [{"text": words(i + 3 * c, 1 + (i + c) % 3), "label": "ABCD"[c]} for c in range(4)]
    stem = f"The {words(i, 4)} is a source of "[: None if i % 2 else -1]
    return {
        "id": f"7-{i}",
        "question": {"stem": stem, "choices": choices},
        "answerKey": "ABCD"[i % 4],
    }


def openbookqa_hub(i: int) -> dict:
    row = openbookqa(i)
    choices = row["question"]["choices"]
    return {
        "id": row["id"],
        "question_stem": row["question"]["stem"],
        "choices": {key: [c[key] for c in choices] for key in ("text", "label")},
        "answerKey": row["answerKey"],
    }


def hellaswag(i: int) -> dict:
    heading = "[header] How to " if i % 2 else ""
    return {
        "ind": i,
        "activity_label": f" {words(i, 2).capitalize()}",
        "ctx_a": f"{heading}{words(i, 4)} [title] {words(i + 1, 5)}.",
        "ctx_b": ("THE " if i % 3 else "") + words(i + 2, 2) if i % 4 else "",
        "ctx": "",
        "split": "val",
        "split_type": "indomain",
        "endings": [f"{words(i + c, 2 + 2 * c)} [substeps] and  {words(c, 3)}é." for c in range(4)],
        "source_id": f"wikihow~{i}",
        "label": (i * 3) % 4,
    }


def hellaswag_hub(i: int) -> dict:
    row = hellaswag(i)
    return row | {"label": str(row["label"])}


def winogrande(i: int) -> dict:
    return {
        "qID": f"{i}-1",
        "sentence": f"The {words(i, 2)} passed the {words(i + 1, 3)} because the _ was "
        f"{words(i + 2, 2)}_free.",
        "option1": words(i, 1),
        "option2": words(i + 1, 2),
        "answer": "12"[i % 2],
    }


def piqa(i: int) -> dict:
    return {
        "goal": f"How do I {words(i, 5)}?",
        "sol1": f"Use a {words(i + 1, 4)} .",
        "sol2": f"Use a {words(i + 2, 3 + i % 4)}.",
    }


def piqa_hub(i: int) -> dict:
    return piqa(i) | {"label": i % 2}


def boolq(i: int) -> dict:
    return {
        "question": f"is a {words(i, 3)} part of the {words(i + 1, 2)}",
        "title": words(i, 2).capitalize(),
        "answer": i % 3 == 0,
        "passage": f"A {words(i + 3, 12)}. The {words(i, 9)}.",
    }


def boolq_glue(i: int) -> dict:
    row = boolq(i)
    return {
        "question": row["question"],
        "passage": f"{row['title']} -- {row['passage']}",
        "idx": i,
        "label": int(row["answer"]),
    }


def mmlu_pro(i: int) -> dict:
    n = (10, 4, 7, 3, 9)[i % 5]
    return {
        "question_id": 70 + i,
        "question": f"What {words(i, 6)}?",
        "options": [words(i + c, 1 + (i * c) % 3) for c in range(n)],
        "answer": "ABCDEFGHIJ"[(i * 7) % n],
        "answer_index": (i * 7) % n,
        "cot_content": "",
        "category": ("law", "computer science")[i % 2],
        "src": "made",
    }


FORMS = {  # set: [(file by split, row)], the authors' form first, the hub's last
    "arc_challenge": [
        ({"test": "ARC-Challenge-Test.jsonl", "train": "ARC-Challenge-Train.jsonl"}, arc),
        (
            {
                "test": "ARC-Challenge/test-00000-of-00001.parquet",
                "train": "ARC-Challenge/train-00000-of-00001.parquet",
            },
            arc_hub,
        ),
    ],
    "arc_easy": [
        ({"test": "ARC-Easy/ARC-Easy-Test.jsonl", "train": "ARC-Easy/ARC-Easy-Train.jsonl"}, arc),
        ({"test": "ARC-Easy/test.parquet", "train": "ARC-Easy/train.parquet"}, arc_hub),
    ],
    "openbookqa": [
        ({"test": "Main/test.jsonl", "train": "Main/train.jsonl"}, openbookqa),
        ({"test": "main/test.parquet", "train": "main/train.parquet"}, openbookqa_hub),
    ],
    "hellaswag": [
        ({"val": "hellaswag_val.jsonl", "train": "hellaswag_train.jsonl"}, hellaswag),
        ({"val": "data/validation.parquet", "train": "data/train.parquet"}, hellaswag_hub),
    ],
    "winogrande": [
        ({"val": "winogrande_1.1/dev.jsonl", "train": "winogrande_1.1/train_xl.jsonl"}, winogrande),
        (
            {"val": "winogrande_xl/validation.parquet", "train": "winogrande_xl/train.parquet"},
            winogrande,
        ),
    ],
    "piqa": [
        ({"val": "valid.jsonl", "train": "train.jsonl"}, piqa),
        ({"val": "validation.json", "train": "train.json"}, piqa_hub),
    ],
    "boolq": [
        ({"val": "dev.jsonl", "train": "train.jsonl"}, boolq),
        ({"val": "BoolQ/val.jsonl", "train": "BoolQ/train.jsonl"}, boolq_glue),
    ],
    "mmlu_pro": [
        ({"test": "test.json", "val": "validation.json"}, mmlu_pro),
        (
            {
                "test": "data/test-00000-of-00001.parquet",
                "val": "data/validation-00000-of-00001.parquet",
            },
            mmlu_pro,
        ),
    ],
}


def rows_of(name: str, split: str, form: int = 0, n: int = 12) -> list[dict]:
    """Those that write() puts into a split; the few-shot split's are others than those asked."""
    files, make = FORMS[name][form]
    start = 100 * list(files).index(split)
    return [make(start + i) for i in range(n)]


def write(folder: Path, name: str, form: int = 0, n: int = 12) -> dict[str, Path]:
    """{split: its file} of a set in one of its forms."""
    written = {}
    for split, file in FORMS[name][form][0].items():
        path, rows = Path(folder) / file, rows_of(name, split, form, n)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            import pyarrow
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        elif path.suffix == ".json":
            path.write_text(json.dumps(rows, indent=1))
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        if name == "piqa" and form == 0:
            start = 100 * list(FORMS[name][form][0]).index(split)
            labels = "".join(f"{(start + i) % 2}\n" for i in range(n))
            path.with_name(f"{path.stem}-labels.lst").write_text(labels)
        written[split] = path
    return written
