"""humaneval_eval.py: models planted with known programs, OpenAI's own checker on the same samples,
interrupted runs, and the command line. Only canonical and harmlessly wrong programs run here."""

import json
import math
import subprocess
import sys
from fractions import Fraction
from typing import ClassVar

import numpy as np
import pytest
import torch
from builders import (
    PATIENCE,
    PROBLEM,
    ROOT,
    PlainModel,
    judge_as_openai,
    read_lines,
    run_ranks,
    saved_checkpoint,
    tiny_model,
    torchrun,
    write_jsonl,
)

import cli
import durable
import humaneval_eval
import results
from backends.local import facts_in_memory
from evaluation import EndpointOptions, ModelOptions
from humaneval_eval import Options, evaluate_humaneval
from sandbox.judge import Sandbox
from tasks.code_prompts import PROMPTS
from tokenizer import build_tokenizer

INFO = {"name": "checkpoint-1", "fingerprint": "f" * 64, "path": "here"}
# All programs here end by themselves.
JUDGED = {"workers": 1, "judge_timeout": PATIENCE}
JUDGING = ["--workers", "1", "--judge-timeout", str(PATIENCE)]


# ---------------------------------------------------------------------------------------------
# Drawing and judging


class Planted(PlainModel):
    """Goes on from a prompt with one of its texts, all equally likely, one byte a token."""

    vocab_size = 300

    def __init__(self, texts):
        super().__init__()
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
    """Texts for `five`: 23 always right, 53 always wrong, 13 right or not, 45 right with
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


TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}<assistant>{% endif %}"
PLUS = {
    "task_id": "HumanEval/0",
    "prompt": 'def f(x):\n    """Twice."""\n',
    "entry_point": "f",
    "canonical_solution": "    return 2 * x\n",
    "base_input": [[1], [2]],
    "plus_input": [[0.5], [-3]],
    "atol": 0,
}


def test_an_instruct_model_has_base_and_plus_verdicts(tmp_path):
    """Asked as EvalPlus asks; the program is found in what was drawn; both again from a journal."""
    data = write_jsonl(tmp_path / "P.jsonl", [PLUS])
    (tmp_path / "mine.jinja").write_text(TEMPLATE)
    begun = (
        "<user>Please provide a self-contained Python script that solves the following problem in "
        f"a markdown code block:\n```\n{PLUS['prompt'].strip()}\n```\n<end><assistant>Below is a "
        "Python script with a self-contained function that solves the problem and passes "
        "corresponding tests:\n```python\n"
    )
    replies = [
        "def f(x):\n\treturn g(x) + x\ndef g(x):\n    return x\nprint(f(1))\n```\nDone",
        "def f(x):\n    return 2 * abs(x)<end>",
        "I cannot",
    ]
    model, byte = Planted([begun + reply for reply in replies]), build_tokenizer("byte")
    options = {"chat_template": str(tmp_path / "mine.jinja"), "temperature": 1.0, "top_p": 1.0}
    options |= {**JUDGED, "results_dir": tmp_path / "results", "info": lambda: INFO}
    record = evaluate_humaneval(model, byte, data, 12, **options)
    found = {(s["solution"], s["passed"], s["plus_passed"]) for s in record.samples()}
    assert found == {
        ("def f(x):\n    return g(x) + x\ndef g(x):\n    return x", True, True),
        ("def f(x):\n    return 2 * abs(x)", True, False),
        ("I cannot", False, False),
    }
    c, plus = (int(record.arrays[name][0]) for name in ("c", "plus_c"))
    assert 12 > c > plus > 0
    assert record["metrics"]["pass@1"]["value"] == pytest.approx(c / 12)
    assert record["metrics"]["plus_pass@1"]["value"] == pytest.approx(plus / 12)
    assert record["data"]["first_prompt"] == begun
    protocol = record["protocol"]
    assert (protocol["prompt"], protocol["program"]) == ("evalplus_chat", "reply")
    assert {"<end>", "\n```\n"} <= set(protocol["stop"])
    assert protocol["judge_memory_mb"] == 4096
    calls = model.calls
    again = evaluate_humaneval(model, byte, data, 12, **options)
    assert again["metrics"] == record["metrics"] and model.calls == calls + 1
    lines = read_lines(next((tmp_path / "results").rglob("samples.jsonl")))
    assert {line["solution"] for line in lines} == {solution for solution, *_ in found}


class Counting(Sandbox):
    given: ClassVar[set] = set()  # one that is taken back is given again

    def _give(self, worker, job):
        self.given.add(job)
        super()._give(worker, job)


def test_planted_programs_give_the_known_pass_at_k(five, tmp_path, monkeypatch):
    path, chosen = five
    monkeypatch.setattr(humaneval_eval, "Sandbox", Counting)
    model, tokenizer, n = Planted(plant(chosen)), build_tokenizer("byte"), 6
    options = {"temperature": 1.0, "top_p": 1.0, "k": (2, 6), "results_dir": tmp_path}
    options |= {**JUDGED, "info": lambda: INFO, "workers": 2}
    record = evaluate_humaneval(model, tokenizer, path, n, **options)

    samples = list(record.samples())
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
    assert record.arrays["c"].tolist() == c and record.arrays["n"].tolist() == [n] * 5
    assert record.arrays["task_id"].tolist() == list(canonical)
    for k in (1, 2, 6):
        exact = sum(1 - Fraction(math.comb(n - x, k), math.comb(n, k)) for x in c) / 5
        assert record["metrics"][f"pass@{k}"]["value"] == pytest.approx(float(exact), abs=1e-12)
    assert set(record["metrics"]) == {"pass@1", "pass@2", "pass@6"}
    failures = record["breakdown"]["failure"]
    assert failures.pop("NameError") == n - right
    assert sum(failures.values()) == 2 * n and failures["wrong answer"] >= n
    # Two of the six texts are among the five problems' own solutions, which are judged first.
    assert len(Counting.given) == 5 + 4, "equal programs are judged once"
    assert record["breakdown"]["finish"].keys() == {"stop", "eos"}

    # OpenAI's own tool, on the very file
    files = list(tmp_path.rglob("samples.jsonl"))
    assert len(files) == 1 and files[0].read_bytes().isascii()
    scores, theirs = judge_as_openai(files[0], path, [1, 2])
    assert scores == {k: pytest.approx(record["metrics"][k]["value"]) for k in ("pass@1", "pass@2")}
    assert [line["passed"] for line in theirs] == [s["passed"] for s in samples]

    # again: everything is in the journal, the model is only asked whether it computes NaN
    calls = model.calls
    Counting.given.clear()
    again = evaluate_humaneval(model, tokenizer, path, n, **options)
    assert model.calls == calls + 1 and len(Counting.given) == 5
    assert list(again.samples()) == samples and again["cost"]["samples_resumed"] == 5 * n
    where = again.save(tmp_path)
    loaded = results.load_record(where)
    assert results.load_arrays(loaded)["c"].tolist() == c
    assert results.load_samples(loaded) == samples
    assert where.with_suffix("") == files[0].parent


@pytest.mark.parametrize("strip_prompt", [True, False])
def test_both_ways_of_prompting_judge_the_program_that_was_drawn(
    strip_prompt, five, tmp_path, capsys
):
    path, chosen = five
    texts = [p["prompt"] + p["canonical_solution"] for p in chosen.values()]
    options = {"strip_prompt": strip_prompt, "limit": 2, **JUDGED, "show": "HumanEval/23"}
    record = evaluate_humaneval(
        Planted(texts), build_tokenizer("byte"), path, results_dir=tmp_path, **options
    )
    wanted = [p["canonical_solution"] for p in list(chosen.values())[:2]]
    assert [s["completion"] for s in record.samples()] == wanted
    assert record["metrics"]["pass@1"]["value"] == 1
    assert record["protocol"]["strip_prompt"] is strip_prompt and record["protocol"]["limit"] == 2
    record.save(tmp_path)
    humaneval_eval.show([record])
    out = capsys.readouterr().out
    assert "A PART OF THE TASKS" in out and "all of its 1 samples passed" in out


def test_a_task_whose_own_solution_fails_is_neither_drawn_nor_counted(tmp_path, capsys):
    """For its tests, which look at what does not cross to them."""
    prompt = "def f{}(x):\n    # returns x\n"
    test = "def check(candidate):\n    assert {}\n"
    wants = ["hasattr(candidate(1), 'real_' + 'part')", "candidate(1) == 1", "candidate(2) == 2"]
    solutions = [
        "    return type('Own', (), {'real_part': 1})()\n",
        "    return x\n",
        "    return x\n",
    ]
    rows = [
        PROBLEM
        | {"task_id": f"T/{i}", "prompt": prompt.format(i), "test": test.format(want)}
        | {"entry_point": f"f{i}", "canonical_solution": solution}
        for i, (want, solution) in enumerate(zip(wants, solutions))
    ]
    path = write_jsonl(tmp_path / "p.jsonl", rows)
    texts = [row["prompt"] + row["canonical_solution"] for row in rows]
    record = evaluate_humaneval(
        Planted(texts), build_tokenizer("byte"), path, results_dir=tmp_path, **JUDGED
    )
    assert record["metrics"]["pass@1"] == results.metric(1.0, 0.0, 2, unit="share")
    assert list(record["data"]["left_out"]) == ["T/0"]
    assert (
        "wrong answer" not in record["breakdown"]["failure"]
        and "1 tasks left out" in record["words"]
    )
    assert [line["task_id"] for line in record.samples()] == ["T/1", "T/2"]
    record.save(tmp_path)
    humaneval_eval.show([record])
    out = capsys.readouterr().out
    assert "LEFT OUT, NOT COUNTED: 1 tasks" in out and "  T/0: failed: AssertionError" in out
    with pytest.raises(ValueError, match=r"no task can be judged: .*; T/0: failed"):
        alone = write_jsonl(tmp_path / "one.jsonl", rows[:1])
        evaluate_humaneval(Planted(texts), build_tokenizer("byte"), alone, **JUDGED)


def test_one_task_has_no_standard_error(five, tmp_path, capsys):
    options = {"limit": 1, **JUDGED, "max_new_tokens": 2, "results_dir": tmp_path}
    tokenizer = build_tokenizer("byte")
    record = evaluate_humaneval(Planted([]), tokenizer, five[0], **options)
    record.save(tmp_path)
    humaneval_eval.show([record])
    humaneval_eval.print_table([record])
    out = capsys.readouterr().out
    assert "pass@1      0.00%  (1 tasks)" in out and "nan" not in out


def test_the_newlines_taken_from_a_prompt_come_back_once():
    of = humaneval_eval.continuation_of
    assert of("def f():\n", "\n    return 1", True) == "    return 1"
    assert of("def f():\n", "\n\n    return 1", True) == "\n    return 1"
    assert of("def f():\n\n", "\n    return 1", True) == "\n    return 1"
    assert of("def f():\n", "  # why\n    return 1", True) == "  # why\n    return 1"
    assert of("def f():\n", "\n    return 1", False) == "\n    return 1"
    assert of("def f(): ", "return 1", True) == "return 1"


def test_a_damaged_journal_loses_only_the_damaged_lines(five, tmp_path):
    path, chosen = five
    options = {"temperature": 1.0, "results_dir": tmp_path, "info": INFO, **JUDGED}
    model, tokenizer = Planted(plant(chosen)), build_tokenizer("byte")
    first = evaluate_humaneval(model, tokenizer, path, 2, limit=3, **options)
    (journal,) = tmp_path.rglob("journal-*")
    lines = journal.read_bytes().split(b"\n")
    drawn = next(i for i, line in enumerate(lines) if b"completion" in line)
    lines[drawn] = lines[drawn].replace(b"completion", b"compIetion")
    elsewhere = journal.with_name(journal.name.replace("rank0", "rank7"))  # of a larger run
    elsewhere.write_bytes(b"\n".join(lines[:-1]) + b"\n0000")
    journal.unlink()
    again = evaluate_humaneval(model, tokenizer, path, 2, limit=3, **options)
    assert again["cost"]["samples_resumed"] == 5
    assert list(again.samples()) == list(first.samples())
    other = evaluate_humaneval(model, tokenizer, path, 2, limit=3, seed=1, **options)
    assert other["cost"]["samples_resumed"] == 0
    assert len({p.parent for p in tmp_path.rglob("journal-*")}) == 2


def test_compiled_and_eager_samples_never_share_a_journal(five, tmp_path):
    """What is compiled may round, and so draw, differently: another key."""
    path, _ = five
    tokenizer, options = build_tokenizer("byte"), {"limit": 1, **JUDGED, "max_new_tokens": 2}
    options |= {"results_dir": tmp_path, "info": INFO}
    found = [
        evaluate_humaneval(tiny_model(max_position_embeddings=1024), tokenizer, path, **options | c)
        for c in ({"compile": "off"}, {"compile": "auto"}, {"compile": "off"})
    ]
    assert [r["cost"]["samples_resumed"] for r in found] == [0, 0, 1]
    assert found[0]["resume_key"] == found[2]["resume_key"] != found[1]["resume_key"]
    assert [r["protocol"]["compile"] for r in found] == ["off", "auto", "off"]


def test_refused_before_anything_is_drawn(five):
    path, _ = five
    model, tokenizer = Planted([]), build_tokenizer("byte")
    with pytest.raises(ValueError, match="--k 3 needs at least 3 samples"):
        evaluate_humaneval(model, tokenizer, path, 2, temperature=0.5, k=(1, 3))
    with pytest.raises(ValueError, match="equal samples"):
        evaluate_humaneval(model, tokenizer, path, 2)
    with pytest.raises(ValueError, match="--top-p must be above 0 and at most 1, not 0"):
        evaluate_humaneval(model, tokenizer, path, top_p=0)
    for wrong in ({"temperature": -1}, {"temperature": math.nan}, {"top_k": -1}):
        with pytest.raises(ValueError, match=r"--t[eo].* must be 0 .*or more, not"):
            evaluate_humaneval(model, tokenizer, path, **wrong)
    with pytest.raises(ValueError, match="no BOS"):
        evaluate_humaneval(model, tokenizer, path, bos="on")
    path.write_text(json.dumps(PROBLEM | {"prompt": "\n"}))
    with pytest.raises(ValueError, match="task T/0: its prompt is empty"):
        evaluate_humaneval(model, tokenizer, path)
    path.write_text(json.dumps(PROBLEM))
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
    folder = tmp_path_factory.mktemp("random")
    return saved_checkpoint(folder, std=None, n_heads=4, max_position_embeddings=2048)


# A rank that is killed after its fifth sample, wherever it and its judges then are.
MORTAL = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import cli, durable, humaneval_eval
append, drawn = durable.Journal.append, []
def mortal(journal, entry):
    append(journal, entry)
    drawn.append("completion" in entry)
    if sum(drawn) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
durable.Journal.append = mortal
cli.run(humaneval_eval.main)
"""


def launch(saved, data_dir, where, ranks, script="humaneval_eval.py", **options):
    words = ["--checkpoint-path", saved, "--device", "cpu"]
    words += ["--data-path", data_dir / "HumanEval.jsonl.gz", "--limit", "9"]
    words += ["--num-samples", "3", "--temperature", "1.0", "--max-new-tokens", "64"]
    words += ["--results-dir", where, *JUDGING, "--k", "2", "--show", "4"]
    return torchrun(ranks if ranks > 1 else 0, script, *words, **options)


def journaled(where):
    paths = where.rglob("journal-*")
    return [sum("completion" in e for e in durable.read_journal(p)[0]) for p in sorted(paths)]


def test_killed_on_two_ranks_resumed_on_three_is_as_run_on_one(saved, data_dir, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    out = launch(saved, data_dir, whole, 1).stdout
    assert "9 tasks: 3 samples, temperature 1, top-p 0.95, float32, limit 9" in out
    assert "A PART OF THE TASKS" in out and "pass@2" in out and "--- HumanEval/4, failing" in out

    (tmp_path / "mortal.py").write_text(MORTAL)
    killed = launch(saved, data_dir, parts, 2, tmp_path / "mortal.py", code=None, cold=True)
    before = journaled(parts)
    assert killed.returncode and len(before) == 2 and 5 <= sum(before) <= 10, before
    out = launch(saved, data_dir, parts, 3).stdout
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
    assert protocol["stop"] == list(PROMPTS["completion"].stop) and protocol["limit"] == 9
    assert protocol["sandbox_tier"][0] in "ABC" and protocol["judge_timeout"] == PATIENCE


@pytest.mark.slow
def test_humaneval_plus_has_the_same_bits_on_two_ranks(data_dir, tmp_path):
    """Canonical programs and their mutants, drawn and judged: base and plus are right by turns."""
    body = f"""
    from humaneval_eval import evaluate_humaneval
    from mutants import mutants
    from tasks.problems import read_problems
    from test_humaneval_eval import Planted
    from tokenizer import build_tokenizer
    path, texts = {str(data_dir / "HumanEvalPlus-Mini.jsonl.gz")!r}, []
    for task, p in read_problems(path, 8).items():
        begun = p["prompt"].strip() + chr(10)
        texts.append(begun + p["canonical_solution"])
        program = p["prompt"] + p["canonical_solution"]
        for mutant in mutants(program, p["entry_point"], 2, task):
            texts.append(begun + mutant)
    options = dict(limit=8, temperature=1.0, top_p=1.0, max_new_tokens=2000, workers=1, dist=dist)
    found = evaluate_humaneval(Planted(texts), build_tokenizer("byte"), path, 4, **options)
    keep = {{name: found[name] for name in ("metrics", "breakdown")}}
    samples = list(found.samples())
    arrays = [(name, a.tobytes().hex()) for name, a in found.arrays.items()]
    if dist.is_main:
        passed = [sum(s[name] for s in samples) for name in ("passed", "plus_passed")]
        say("PASSED", len(samples), *passed, dist.world_size)
        say("FOUND", keep, arrays, samples)
    """
    outs = [run_ranks(n, tmp_path, body).stdout for n in (1, 2)]
    said = [out.partition("FOUND")[2] for out in outs]
    n, base, plus, _ = map(int, outs[0].partition("PASSED")[2].split()[:4])
    assert n == 32 and n > base >= plus > 4, outs[0][:200]
    assert said[0] and said[0] == said[1]


# ---------------------------------------------------------------------------------------------
# Samples files, and flags


def test_canonical_solutions_all_pass_and_no_torch_is_loaded(problems, data_dir, tmp_path):
    rows = [
        {"task_id": task, "completion": p["canonical_solution"], "mine": i}
        for i, (task, p) in enumerate(reversed(problems.items()))
    ]
    path = write_jsonl(tmp_path / "S.jsonl", rows)
    flags = ["--samples-file", str(path), "--data-path", str(data_dir / "HumanEval.jsonl.gz")]
    flags += ["--judge-timeout", str(PATIENCE)]
    code = f"import sys, humaneval_eval; humaneval_eval.main({flags}); "
    code += "sys.exit('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "pass@1    100.00% ± 0.00%  (164 tasks)" in run.stdout
    wanted = [row | {"result": "passed", "passed": True} for row in rows]
    judged = read_lines(tmp_path / "S.jsonl_results.jsonl")
    assert {line.pop("sandbox_tier") for line in judged} < {"A", "B", "C"}
    assert judged == wanted


def test_flags_reach_the_judging_of_a_samples_file(tmp_path, capsys):
    data = write_jsonl(tmp_path / "P.jsonl", [PROBLEM, PROBLEM | {"task_id": "T/1"}])
    texts = ("    pass", "    return undefined")
    rows = [{"task_id": "T/0", "completion": text} for text in texts]
    file = write_jsonl(tmp_path / "S.jsonl", rows)
    flags = ["--samples-file", str(file), "--data-path", str(data), *JUDGING]
    with pytest.raises(ValueError, match="no samples of T/1, so this is no score of the 2 tasks"):
        humaneval_eval.main(flags)
    flags += ["--ignore-incomplete"]
    with pytest.raises(ValueError, match="--k 3: fewer samples of T/0"):
        humaneval_eval.main([*flags, "--k", "3"])
    with pytest.raises(ValueError, match="--show 2: no such task; there are T/0 to T/1"):
        humaneval_eval.main([*flags, "--show", "2"])
    with pytest.raises(ValueError, match="a sandbox of 1 workers, 0"):
        humaneval_eval.main([*flags, "--judge-timeout", "0"])
    humaneval_eval.main([*flags, "--k", "2", "--show", "0"])
    out = capsys.readouterr().out
    assert "2 samples of 1 tasks\nA PART OF THE TASKS" in out and "pass@2    100.00%" in out
    assert "--- T/0, failing sample 1 of 1" in out and "--- exception: NameError" in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "give --checkpoint-path or --endpoint to draw samples, or --samples-file"),
        ("--checkpoint-path c --samples-file s", "give --checkpoint-path"),
        ("--samples-file s --num-samples 1", "--num-samples goes with --checkpoint-path"),
        ("--samples-file s --limit 3", "--limit goes with --checkpoint-path"),
        ("--samples-file s --stop x", "--stop goes with --checkpoint-path"),
        ("--samples-file s --no-strip-prompt", "--strip-prompt goes with --checkpoint-path"),
        ("--checkpoint-path c --ignore-incomplete", "--ignore-incomplete goes with --samples-file"),
        ("--checkpoint-path c --k 0", "positive whole number"),
    ],
)
def test_flags_that_contradict(flags, message, capsys):
    with pytest.raises(SystemExit) as caught:
        humaneval_eval.main(["--data-path", "p", *flags.split()])
    assert caught.value.code == 2 and message in capsys.readouterr().err


# every flag that says what is drawn, by which model, and where and how; a value that is no default
OF_DRAWING = {
    "prompt": "mbpp",
    "chat_template": "on",
    "system_prompt": "x",
    "fewshot_as_turns": "--no-fewshot-as-turns",
    "chat_template_args": "a=1",
    **{"config": "c", "base": "b", "tokenizer_name": "byte", "results_dir": "r", "run_name": "n"},
    **{"num_samples": "2", "max_new_tokens": "5", "temperature": "0.5", "top_p": "0.5"},
    **{"top_k": "3", "stop": "x", "seed": "7", "bos": "on", "limit": "3", "batch_size": "2"},
    **{"compile": "off", "dtype": "fp32", "bf16": "", "no_amp": "", "device": "cpu"},
    **{"timeout": "3", "strip_prompt": "--no-strip-prompt", "model": "m", "server": "vllm"},
    **{"concurrency": "3", "request_timeout": "5", "shard": "2", "kv_dtype": "int8"},
}


def test_judging_a_file_ignores_no_flag(capsys):
    kinds = ModelOptions, EndpointOptions, Options, cli.PrecisionOptions, cli.RunOptions
    offered = {name for kind in kinds for name in cli.option_names(kind)}
    models = {"checkpoint_path", "endpoint"}
    assert offered - models - set(humaneval_eval.JUDGING) == OF_DRAWING.keys()
    for name, value in OF_DRAWING.items():
        flag = cli.flag_of(name)
        words = value if value.startswith("--") else f"{flag} {value}"
        with pytest.raises(SystemExit):
            humaneval_eval.main(["--data-path", "p", "--samples-file", "s", *words.split()])
        err = capsys.readouterr().err
        assert f"error: {flag} goes with --checkpoint-path, not --samples-file" in err


def test_a_seed_counts_where_something_is_drawn(tmp_path):
    def key(**sampling):
        chosen = humaneval_eval.Sampling(4, **sampling)
        problems = write_jsonl(tmp_path / "P.jsonl", [PROBLEM])
        options = Options(data_path=str(problems), sampling=chosen)
        facts = facts_in_memory(tiny_model(), build_tokenizer("byte"))
        return humaneval_eval.plan(options, facts).config_hash

    assert key(seed=1) == key(seed=2) == key(seed=1, top_p=0.5, top_k=3)
    assert key(seed=1, temperature=0.5) != key(seed=2, temperature=0.5)


def test_stop_strings_are_written_with_their_escapes():
    p = cli.parser("")
    cli.add_options(p, Options)
    args = p.parse_args(["--data-path", "p", "--stop", "\\nclass", "```"])
    assert cli.read_options(Options, args).sampling.stop == ("\nclass", "```")
    args = p.parse_args(["--data-path", "p", "--stop"])
    assert cli.read_options(Options, args).sampling.stop == ()
    args = p.parse_args(["--data-path", "p"])
    assert cli.read_options(Options, args).sampling.stop == ()  # the prompt's own
