"""An evaluation as CONTRIBUTING.md says how to add one: is each line's last word the likeliest?

    python tests/last_word_eval.py --checkpoint-path checkpoints/run --data-path lines.txt

The form of LAMBADA (Paperno et al. 2016): a line's last word is right if each of its tokens is the
likeliest after what comes before. Its tests run it as a command, from Python and in a sweep.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# a script on top needs no such line
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cli
import command
import evaluation
import results
import stats
from backends import Backend, Facts
from backends.continuations import Continuations
from evaluation import Evaluation, Folder, Outcome, Plan
from recording.identity import rows_hash


@dataclass(frozen=True)
class Options:
    data_path: str = cli.option("", "a text, one passage a line", metavar="FILE")
    bos: str = evaluation.bos_option()
    batch_tokens: int = cli.option(4096, "padded tokens of a batch", type=cli.positive_int)

    def __post_init__(self):
        if not self.data_path:
            raise ValueError("--data-path FILE is needed")


def plan(options: Options, facts: Facts) -> Plan:
    lines = read_lines(options)
    bos = evaluation.resolve_bos(options.bos, facts.tokenizer)
    protocol = {
        "bos": bos,
        **facts.protocol,
        "batch_tokens": options.batch_tokens,
    }
    start = [facts.tokenizer.bos_token_id] * bos
    ids, targets = [], []
    for line in lines:
        before = facts.tokenizer.encode(line.rpartition(" ")[0])
        whole = facts.tokenizer.encode(line)
        targets.append(np.array(whole[len(before) :]))
        ids.append(np.array(start + whole[:-1]))
    nothing = np.zeros(0, dtype=np.int64)
    rows = Continuations([nothing], np.zeros(len(lines), dtype=np.int64), ids, targets)
    evaluation.check_vocabulary(rows.highest_token, facts)
    data = {"files": [Path(options.data_path).name], "hash": rows_hash(lines)}
    return Plan(protocol, data, (rows, lines), ("BOS",) * bos + (facts.dtype,))


def read_lines(options: Options) -> list[str]:
    lines = [line.strip() for line in Path(options.data_path).read_text().splitlines()]
    lines = [line for line in lines if " " in line]
    if not lines:
        raise ValueError(f"{options.data_path}: no line has two words")
    return lines


def run(backend: Backend, plan: Plan, folder: Folder) -> Outcome:
    rows, lines = plan.work
    scores = backend.score_rows(rows, plan.protocol["batch_tokens"], greedy=True)
    nll, count = -scores.targets, np.array([len(t) for t in rows.targets])
    loss, right = float(nll.sum() / count.sum()), scores.greedy
    return Outcome(
        metrics={
            "accuracy": results.share(int(right.sum()), len(right)),
            "loss": results.metric(loss, stats.ratio_stderr(nll, count), len(nll), "lower"),
        },
        arrays={"correct": right, "nll": nll, "count": count, "line": np.arange(len(lines))},
        examples={
            "unit": "lines",
            "scores": {"accuracy": "correct"},
            "labels": {"line": "line {}"},
        },
        samples=lambda: ({"id": i, "line": line} for i, line in enumerate(lines)),
    )


def show(records) -> None:
    for record in records:
        value = record["metrics"]["accuracy"]["value"]
        print(f"{record['checkpoint']['name']}: {value:.2%} of last words, record: {record.place}")


LAST_WORD = Evaluation("last_word", __file__, Options, plan, run, show, check=read_lines)


def main(argv=None):
    command.main(LAST_WORD, argv, __doc__)


if __name__ == "__main__":
    cli.run(main)
