"""What is printed and written of a choice set's records: their figures side by side, what they
answer differently, and the answers to hand in where the right ones are not published."""

import hashlib
import itertools
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import stats
from cli import printable
from durable import dumps, write_atomic, write_json
from tasks import confidence
from tasks.choices import name_of

if TYPE_CHECKING:
    from evaluation import Result

MOST_SHOWN = 10  # letters whose shares fit on a line
COLUMNS = {"accuracy": "", "accuracy_normalised": "/norm", "right_mass": "/mass", "answered": ""}


def column_of(record: "Result") -> str:
    return f"{record['protocol']['template']}/{record['protocol']['scoring']}"


def print_accuracies(records: list["Result"]) -> None:
    """Accuracy overall, by category and by subject, one column for each record of a checkpoint."""
    first = records[0]
    data, protocol = first.shown, first["protocol"]
    named = "" if first["evaluation"] == "mmlu" else f" of {printable(first['evaluation'])}"
    by_subject = data.layout.has_subjects
    n = len(data.subjects)
    subjects = f" of {n} subject{'s' * (n > 1)}" if by_subject else ""
    print(
        f"\n{printable(first['checkpoint']['name'])}: {len(data.questions):,} questions"
        f"{subjects}{named}, {protocol['shots']}-shot"
    )
    if protocol["limit"] or protocol["subjects"]:
        print("A PART OF THE QUESTIONS (--limit, --subjects): not a score of the set")
    if first["data"].get("release"):
        print(first["data"]["release"])
    names = list(COLUMNS)[:3] if "accuracy" in first["metrics"] else ["answered"]
    columns = [
        (r, n, column_of(r) + COLUMNS[n]) for r in records for n in names if n in r["metrics"]
    ]
    widths = [max(17, len(title)) + 2 for *_, title in columns]

    def line(label, cells):
        print(f"{label:38}" + "".join(f"{c:>{width}}" for c, width in zip(cells, widths)))

    def share_line(label, shares):
        line(label, map(stats.show_share, shares))

    line("", [title for *_, title in columns])

    share_line("micro (all questions)", [r["metrics"][n] for r, n, _ in columns])
    columns = [column for column in columns if column[1].startswith("accuracy")]
    if not by_subject or not columns:
        return
    macro = [r["metrics"][n.replace("accuracy", "accuracy_macro")] for r, n, _ in columns]
    share_line("macro (mean of subjects)", macro)
    for dimension in ("category", "subject"):
        for group in first["breakdown"][dimension]:
            shares = [r["breakdown"][dimension][group][n] for r, n, _ in columns]
            share_line(f"  {printable(group)}", shares)


def print_details(record: "Result") -> None:
    metrics, protocol, cost = record["metrics"], record["protocol"], record["cost"]
    letters = record["breakdown"]["letter"]
    bias = "  ".join(
        f"{k} " + "/".join(f"{v[name]:.1%}" for name in ("predicted", "gold") if name in v)
        for k, v in letters.items()
    )
    if len(letters) <= MOST_SHOWN:
        print(f"{column_of(record)}: letters predicted/gold  {bias}")
    else:
        print(f"{column_of(record)}:")
    if "ece" in metrics:
        print_confidence(record)
    ties = metrics.get("ties", {}).get("value")
    if ties:
        print(f"  ties between the best two answers, which go to the first: {ties:,}")
    print_further(metrics)
    if "answered" in metrics and "accuracy_answered" not in metrics:
        print(f"  gave a letter: {metrics['answered']['value']:.2%}")
    if "accuracy_permuted" in metrics:
        permuted, same = metrics["accuracy_permuted"], metrics["same_answer"]["value"]
        print(
            f"  over {protocol['permute_choices']} choice orders: {stats.show_share(permuted)}; "
            f"same answer in all of them: {same:.2%}"
        )
    if protocol["shortened"] or protocol["truncated"]:
        print(
            f"  context of {protocol['context']}: {protocol['shortened']:,} prompts lost few-shot "
            f"examples, {protocol['truncated']:,} were cut"
        )
    speed = f"{cost['tokens_per_second']:,.0f} tokens/s"
    mfu = "" if cost.get("mfu") is None else f", {cost['mfu']:.1%} of the arithmetic limit"
    print(
        f"  prepared in {cost['prepare_seconds']:.2f} s, scored in {cost['seconds']:.2f} s: "
        f"{speed}{mfu}"
    )


def print_confidence(record: "Result") -> None:
    """How sure the answers were, by the probability of the choice, then by the model's own word."""
    value = {name: metric["value"] for name, metric in record["metrics"].items()}
    # all answers right, or all wrong: nothing to tell apart
    auroc = "undefined" if math.isnan(value["auroc"]) else f"{value['auroc']:.3f}"
    print(
        f"  calibration error {value['ece']:.4f}, Brier {value['brier']:.4f}; bins of equal mass "
        f"{value['ece_mass']:.4f}, AUROC {auroc}, AURC {value['aurc']:.3f}"
    )
    if "log_loss_scaled" in value:
        protocol = record["protocol"]
        print(
            f"  at temperature {protocol['fitted_temperature']:.3f}, fitted on "
            f"{protocol['temperature_questions']:,} questions of {protocol['temperature_split']}: "
            f"calibration error {value['ece_scaled']:.4f}, Brier {value['brier_scaled']:.4f}, log "
            f"loss {value['log_loss']:.4f} -> {value['log_loss_scaled']:.4f}"
        )


def print_further(metrics: dict) -> None:
    """What was asked for beside the answers: whether they are true, and leave to give none."""
    if "p_true_ece" in metrics:
        print(f"  P(True): {confidence.show_figures(metrics, 'p_true_')}")
    if "accuracy_answered" in metrics:
        share, right = metrics["answered"], metrics["accuracy_answered"]
        print(f"  answered {stats.show_share(share)}, right of these {stats.show_share(right)}")


def print_differences(records: list["Result"]) -> None:
    """How many questions pairs of columns answer differently, and all of them in a file beside the
    records, which is named by theirs."""
    pairs = list(itertools.combinations(records, 2))
    found = [differences(a, b) for a, b in pairs]
    place, paths = "not saved", [record.path for record in records if record.path]
    if len(paths) == len(records):
        digest = hashlib.sha256(" ".join(path.name for path in paths).encode()).hexdigest()
        name = records[0]["evaluation"]
        file = paths[0].with_name(f"{name}-differences-{digest[:8]}.jsonl")
        write_atomic(file, "".join(dumps(line) + "\n" for lines in found for line in lines))
        place = str(file)
    for (a, b), lines in zip(pairs, found):
        print(f"{column_of(a)} and {column_of(b)} differ on {len(lines):,} questions")
    print(f"differences: {printable(place)}")


def differences(a: "Result", b: "Result") -> list[dict]:
    """What is said of each question that the two answer differently."""
    lines, questions = [], a.shown.questions
    ours, theirs = a.arrays["predicted"], b.arrays["predicted"]
    for i in np.flatnonzero(ours != theirs).tolist():
        q = questions[i]
        line = {"id": i, "subject": q.subject, "where": q.where, "gold": name_of(q.answer)}
        answers = {column_of(a): name_of(ours[i]), column_of(b): name_of(theirs[i])}
        lines.append(line | answers)
    return lines


def print_submission(record: "Result") -> None:
    """Of a split whose answers are not published: {subject: {id: letter}} in a file beside the
    record, in the form that C-Eval's site takes."""
    answers: dict[str, dict[str, str | None]] = {}
    for i, q in enumerate(record.shown.questions):
        own = answers.setdefault(q.subject, {})
        own[q.id or str(len(own))] = name_of(int(record.arrays["predicted"][i]))
    if record.path is None:
        print("the right answers are not published: to hand yours in, save the record")
        return
    file = Path(f"{record.path.with_suffix('')}-submission.json")
    write_json(file, answers)
    print(f"the right answers are not published; to hand in: {printable(file)}")
