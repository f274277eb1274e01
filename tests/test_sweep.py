"""sweep.py: against the scripts' own records, and what goes wrong with checkpoints and results."""

import json
import os
import resource
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import yaml
from builders import (
    PATIENCE,
    ROOT,
    run_to_end,
    save_model,
    saved_checkpoint,
    small_mmlu,
    started,
    tiny_model,
    token_shard,
    torchrun,
)
from made_up_records import VERSION_1
from small_sweeps import (
    STEPS,
    expected,
    flags,
    numbers,
    run_sweep,
    start_words,
)

import checkpoint
import eval as perplexity_eval
import mmlu_eval
import results
import sweep
from dataset import build_tokenizer
from sweeping import ledger


def on_loading(monkeypatch, before=lambda path: None, after=lambda path: None):
    """Call before(path) and after(path) around the loading of each checkpoint's weights."""
    real = checkpoint.open

    def opened(path, *more):
        handle = real(path, *more)
        load = handle.load

        def watched(*where, **how):
            before(Path(path))
            model = load(*where, **how)
            after(Path(path))
            return model

        object.__setattr__(handle, "load", watched)
        return handle

    monkeypatch.setattr(checkpoint, "open", opened)


# ---------------------------------------------------------------------------------------------
# What it does


def work_of(record) -> tuple[str, str]:
    return record["checkpoint"]["fingerprint"], record["evaluation"]


def test_records_of_version_1_stay_and_are_listed(tmp_path, data, capsys):
    """The work is done again, beside them: the same numbers where the work is the same."""
    shutil.copytree(VERSION_1, tmp_path / "results")
    before = {r["_path"]: r for r in results.load_records(tmp_path / "results")}
    for step in (10, 20):
        saved_checkpoint(tmp_path / "tiny", step)
    small_mmlu(tmp_path / "mmlu")
    flags = yaml.safe_load((data / "e.yaml").read_text())
    flags["perplexity"]["batch-size"] = 4
    flags["mmlu"] = {"data-path": str(tmp_path / "mmlu"), "num-few-shot": 1}
    (tmp_path / "e.yaml").write_text(yaml.safe_dump(flags))
    only = ["--evaluations", str(tmp_path / "e.yaml")]
    code, after = run_sweep(tmp_path / "tiny", data, *only, "--lm-eval-json")
    assert code == 0 and "4 made, 0 done before" in capsys.readouterr().out
    found = {r["_path"]: r for r in after}
    assert len(before) == 6 and len(after) == 10
    for path, old in before.items():
        assert found[path] == old
        assert results.load_arrays(found[path]).keys() == results.load_arrays(old).keys()
    for new in (r for path, r in found.items() if path not in before):
        (old,) = (r for r in before.values() if work_of(r) == work_of(new))
        for name, metric in old["metrics"].items():
            assert metric["value"] == pytest.approx(new["metrics"][name]["value"], rel=1e-6)
    report = torchrun(0, "report.py", tmp_path / "results").stdout
    assert report.count("checkpoint-20") >= 3 and "humaneval" in report
    assert run_sweep(tmp_path / "tiny", data, *only)[0] == 0
    assert "0 made, 4 done before" in capsys.readouterr().out


def test_two_sets_of_data_are_two_evaluations(run_dir, data, tmp_path, capsys):
    token_shard(tmp_path / "y.npy", 500, seed=1)
    shard = {"data-mode": "fineweb_npy", "seq-len": 32}
    both = [shard | {"val-npy": str(path)} for path in (data / "x.npy", tmp_path / "y.npy")]
    (tmp_path / "both.yaml").write_text(yaml.safe_dump({"perplexity": both}))
    only = ["--evaluations", str(tmp_path / "both.yaml"), "--until-step", "10"]
    _, records = run_sweep(run_dir, data, *only)
    assert sorted(r["data"]["tokens"] for r in records) == [500, 1003]
    capsys.readouterr()
    run_sweep(run_dir, data, *only)
    assert "0 made, 2 done before" in capsys.readouterr().out


def test_records_are_those_of_the_scripts(run_dir, data, capsys):
    code, records = run_sweep(run_dir, data, "--log-samples", "--lm-eval-json")
    assert code == 0 and numbers(records).keys() == expected()
    shared = ["--checkpoint-path", str(run_dir), "--device", "cpu"]
    shared += ["--results-dir", str(run_dir.parent / "alone")]
    npy = ["--data-mode", "fineweb_npy", "--val-npy", str(data / "x.npy"), "--seq-len", "32"]
    perplexity_eval.main([*shared, *npy])
    mmlu_eval.main([*shared, "--data-path", str(data / "mmlu"), "--num-few-shot", "1"])
    alone = results.load_records(run_dir.parent / "alone")
    assert numbers(records) == numbers(alone)
    for record, other in zip(records, alone, strict=True):
        for name in ("run", "checkpoint", "protocol", "data", "breakdown", "config_hash"):
            assert record[name] == other[name], name
        assert len(results.load_samples(record)) == (9 if record["evaluation"] == "mmlu" else 0)
        path = Path(record["_path"])
        root = run_dir.parent / "results"
        place = root / "lm_eval" / path.parent.relative_to(root) / f"results_{path.name}"
        told = json.loads(place.read_text())["results"][record["evaluation"]]
        name = "acc,none" if record["evaluation"] == "mmlu" else "loss,none"
        own = record["metrics"]["accuracy" if record["evaluation"] == "mmlu" else "loss"]
        assert told[name] == own["value"]


def test_a_second_call_does_nothing_whatever_things_are_called(run_dir, data, capsys, monkeypatch):
    run_sweep(run_dir, data)
    before = {p: p.stat().st_mtime_ns for p in (run_dir.parent / "results").rglob("*.*")}
    (run_dir / "checkpoint-20").rename(run_dir / "checkpoint-the-best")
    on_loading(monkeypatch, before=lambda path: pytest.fail("loaded a model"))
    capsys.readouterr()
    code, _ = run_sweep(run_dir, data)
    said = capsys.readouterr().out
    assert code == 0 and "0 made, 6 done before, 0 failed" in said and "nothing was left" in said
    after = {p: p.stat().st_mtime_ns for p in (run_dir.parent / "results").rglob("*.*")}
    assert {p: t for p, t in after.items() if p.is_file()} == {
        p: t for p, t in before.items() if p.is_file()
    }
    monkeypatch.undo()
    run_sweep(run_dir, data, "--force")
    assert "6 made, 0 done before" in capsys.readouterr().out


def test_a_changed_configuration_is_other_work(run_dir, data, capsys):
    run_sweep(run_dir, data)
    other = yaml.safe_load((data / "e.yaml").read_text())
    other["perplexity"]["seq-len"] = 16
    (run_dir.parent / "other.yaml").write_text(yaml.safe_dump(other))
    capsys.readouterr()
    run_sweep(run_dir, data, "--evaluations", str(run_dir.parent / "other.yaml"))
    assert "3 made, 3 done before" in capsys.readouterr().out


@pytest.mark.parametrize("where", ["--config", "beside"])
def test_the_config_that_was_used_is_a_part_of_the_work(where, data, tmp_path, capsys):
    """Of weights alone: one that does not fit, one that fits and is wrong, then the right one."""
    model, run = tiny_model("llama"), tmp_path / "run"
    run.mkdir()
    torch.save(model.state_dict(), run / "weights-1.pt")
    place = run / "config.json" if where == "beside" else tmp_path / "shape.yaml"
    more = ["--tokenizer-name", "byte", *(["--config", str(place)] if where == "--config" else [])]

    def sweep_under(**changes):
        config = model.config.replace(**changes)
        if where == "beside":
            config.save_pretrained(run)
        else:
            place.write_text(yaml.safe_dump(config.to_dict()))
        code, records = run_sweep(run, data, *more)
        return code, capsys.readouterr().out, [r for r in records if r["status"] == "ok"]

    code, said, _ = sweep_under(n_layers=3)
    assert code == 1 and "0 made, 0 done before, 2 failed" in said
    for i, base in enumerate((5e5, 1e4), 1):
        code, said, records = sweep_under(rope_theta=base)
        assert code == 0 and "2 made, 0 done before, 0 failed" in said
        assert len(records) == 2 * i
    losses = [r["metrics"]["loss"]["value"] for r in records if r["evaluation"] == "perplexity"]
    assert len(set(losses)) == 2
    for base in (5e5, 1e4):
        code, said, records = sweep_under(rope_theta=base)
        assert code == 0 and "0 made, 2 done before, 0 failed" in said and len(records) == 4


def test_copies_of_a_tokenizer_are_one_configuration(tmp_path, data, data_dir):
    """GPT-2's files in each checkpoint: a curve has one config_hash, and the path is no part."""
    gpt2 = build_tokenizer(str(data_dir / "tokenizers/gpt2"))
    for step in (1, 2):
        save_model(tiny_model(seed=step, vocab_size=50257), tmp_path / "run", step, gpt2)
    _, records = run_sweep(tmp_path / "run", data)
    assert len(records) == 4
    for evaluation in ("perplexity", "mmlu"):
        mine = [r for r in records if r["evaluation"] == evaluation]
        assert len({r["config_hash"] for r in mine}) == 1
        assert len({r["resume_key"] for r in mine}) == 2


def test_order(run_dir, data, capsys):
    def order(*more, name):
        run_sweep(run_dir, data, *more, name=name)
        lines = capsys.readouterr().out.splitlines()
        return [line.split()[0] for line in lines if "perplexity:" in line]

    steps = [f"checkpoint-{step}" for step in STEPS]
    assert order(name="a") == steps
    assert order("--newest-first", name="b") == steps[::-1]
    assert order("--until-step", "20", name="c") == steps[:2]


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("perplexity: {val-npy: x.npy, data-mode: fineweb_npy}", "no such file"),
        ("perplexity: {val-data: x.txt, striide: 3}", "--striide"),
        ("perplexity: {val-data: x.txt, seq-len: 3.5}", "--seq-len: needs a positive whole number"),
        ("perplexity: {val-data: x.txt, seed: one}", "--seed: needs a number, not 'one'"),
        (
            "perplexity: {val-data: x.txt, compile: maybe}",
            "--compile: must be one of auto,",
        ),
        ("perplexity: {data-mode: text}", "perplexity: --data-mode text needs --val-data FILE"),
        ("mmlu: {data-path: nowhere}", "nowhere"),
        ("mmlu: {data-path: x, dtype: bf16}", "command line"),
        ("mmlu: {data-path: x, truncate: 1}", "--truncate: needs true or false, not 1"),
        ("mmlu: {data-path: [x, y]}", "--data-path: needs one value"),
        ("mmlu: {data-path: x, seed: 1}", "no option --seed"),
        ("mmlu: {data-path: x, tokenizer-name: [1]}", "--tokenizer-name: needs one value"),
        ("arc: {data-path: x}", "'arc' is no evaluation"),
        ("mmlu: 3", "flag: value"),
        ("mmlu: {data-path: x, 1: 2}", "--1"),
        ("mmlu: {help: true}", "--help"),
        ("humaneval: {data-path: x, temperature: -1}", "--temperature must be 0 (greedy) or more"),
        ("{}", "no evaluation"),
    ],
)
def test_a_wrong_yaml_file_is_said_in_one_line(run_dir, data, tmp_path, text, wanted):
    (tmp_path / "wrong.yaml").write_text(text)
    with pytest.raises(ValueError) as error:
        run_sweep(run_dir, data, "--evaluations", str(tmp_path / "wrong.yaml"))
    assert wanted in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    "more, wanted",
    [
        (["--config", "nowhere"], "nowhere"),
        (["--tokenizer-name", "no/where"], "no/where"),
        (["--batch-size", "0"], "--batch-size: needs a positive whole number"),
        (["--seed", "1", "--evaluations", "{mmlu}"], "--seed: no evaluation that"),
        (["--compile", "on", "--evaluations", "{mmlu}"], "--compile: no evaluation that"),
        (["--timeout", "0"], "--timeout must be a positive number"),
        (["--quiet-seconds", "9"], "--quiet-seconds goes with --watch"),
        (["--poll-seconds", "0"], "--poll-seconds must be a positive number"),
        (["--lease-seconds", "nan"], "--lease-seconds must be a positive number"),
    ],
)
def test_a_wrong_flag_is_no_failure_of_checkpoints(run_dir, data, capsys, more, wanted):
    mmlu = run_dir.parent / "mmlu.yaml"  # it draws nothing, and is always eager
    mmlu.write_text(yaml.safe_dump({"mmlu": {"data-path": str(data / "mmlu")}}))
    more = [word.replace("{mmlu}", str(mmlu)) for word in more]
    try:
        code, said = run_sweep(run_dir, data, *more)[0], ""
    except ValueError as error:
        code, said = 2, str(error)
    except SystemExit as stop:
        code, said = stop.code, ""
    said += capsys.readouterr().err
    assert code == 2 and wanted in said
    assert not (run_dir.parent / "results").exists()


def test_two_evaluations_of_a_kind_are_told_apart(run_dir, data, tmp_path, capsys, monkeypatch):
    flags = {"data-path": str(data / "mmlu"), "num-few-shot": 1}
    flags = {"mmlu": [flags | {"template": ["lm_eval", "continuation"]}, flags | {"limit": 3}]}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(flags))
    logged = []
    log = lambda record: logged.extend(results.scalars(record))  # noqa: E731
    monkeypatch.setattr(ledger, "open_trackers", lambda *asked: {"log": log})
    run_sweep(run_dir, data, "--evaluations", str(tmp_path / "two.yaml"), "--until-step", "10")
    labels = [line[22:].partition(":")[0] for line in capsys.readouterr().out.splitlines()[:3]]
    assert labels == [
        "mmlu template=lm_eval scoring=letter",
        "mmlu template=continuation scoring=continuation",
        "mmlu template=lm_eval scoring=letter limit=3",
    ]
    names = [label.replace(" ", "_") + "/accuracy" for label in labels]
    assert all(logged.count(name) == 1 for name in names)


def test_a_link_does_not_give_its_name(run_dir, data):
    (run_dir / "best").symlink_to("checkpoint-20")
    assert numbers(run_sweep(run_dir, data)[1]).keys() == expected()


def test_humaneval_is_swept_and_known_again(run_dir, tmp_path, data, capsys):
    path = str(data / "problems.jsonl")
    flags = {"data-path": path, "limit": 1, "max-new-tokens": 4, "workers": 1}
    flags = {"humaneval": flags | {"judge-timeout": PATIENCE}}
    (tmp_path / "h.yaml").write_text(yaml.safe_dump(flags))
    only = ["--evaluations", str(tmp_path / "h.yaml"), "--until-step", "20"]
    code, records = run_sweep(run_dir, data, *only)
    assert code == 0 and [r["metrics"]["pass@1"]["n"] for r in records] == [1, 1]
    assert len(results.load_samples(records[0])) == 1
    said = capsys.readouterr().out
    assert said.count("humaneval: pass@1 0  (") == 2 and "nan" not in said  # one task, no error
    assert run_sweep(run_dir, data, *only)[0] == 0
    assert "0 made, 2 done before" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------
# What goes wrong with checkpoints


def test_bad_checkpoints_are_recorded_and_the_sweep_goes_on(run_dir, data, capsys):
    whole = (run_dir / "checkpoint-20/model.safetensors").read_bytes()
    (run_dir / "checkpoint-20/model.safetensors").write_bytes(whole[:-100])  # torn
    model = tiny_model(seed=40)
    with torch.no_grad():  # computes NaN, on all ranks, in the midst of an evaluation
        model.ln_f.weight.fill_(3e38)
    save_model(model, run_dir, 40)
    (run_dir / "foreign.pt").write_bytes(b"not a checkpoint at all")
    torch.save({"weights_of": "something else", "x": torch.zeros(3)}, run_dir / "other.pt")
    (run_dir / "notes.txt").write_text("hello")
    (run_dir / ".tmp-checkpoint-50-1").mkdir()  # what a killed trainer leaves
    code, records = run_sweep(run_dir, data)
    found = numbers(records)
    failed = {key for key, value in found.items() if value[0] == "failed"}
    bad = [(20, "model.safetensors"), (40, "NaN")]
    assert failed == expected([20, 40]) | {
        (name, e) for name in ("foreign", "other") for e in ("perplexity", "mmlu")
    }
    assert found.keys() - failed == expected([10, 30]) and code == 1
    for record in records:
        for step, reason in bad:
            if record["checkpoint"]["step"] == step and record["evaluation"] == "perplexity":
                assert reason in record["reason"]
    capsys.readouterr()
    code, again = run_sweep(run_dir, data)
    assert code == 1 and numbers(again) == found
    said = capsys.readouterr().out
    assert "0 made, 4 done before, 8 failed" in said
    assert said.count("failed before: ") == said.count("--retry-failed") == 8
    run_sweep(run_dir, data, "--retry-failed")
    said = capsys.readouterr().out
    assert said.count("failed: ") == 8 and "failed before" not in said

    # made whole again, with the manifest it always had
    (run_dir / "checkpoint-20/model.safetensors").write_bytes(whole)
    for name in ("foreign.pt", "other.pt"):
        (run_dir / name).unlink()
    shutil.rmtree(run_dir / "checkpoint-40")
    code, records = run_sweep(run_dir, data)
    assert code == 0 and {k for k, v in numbers(records).items() if v[0] == "ok"} == expected()
    assert ("checkpoint-20", "mmlu") not in {
        (r["checkpoint"]["name"], r["evaluation"]) for r in records if r["status"] == "failed"
    }


def test_a_checkpoint_replaced_while_it_is_read_is_read_again(run_dir, data, monkeypatch):
    loads = []

    def after(path):
        loads.append(path.name)
        if loads.count("checkpoint-20") == 1 and path.name == "checkpoint-20":
            saved_checkpoint(run_dir, 20, seed=999)

    on_loading(monkeypatch, after=after)
    code, records = run_sweep(run_dir, data)
    monkeypatch.undo()
    assert code == 0 and loads.count("checkpoint-20") == 2
    clean = run_sweep(run_dir, data, name="clean")[1]
    assert numbers(records) == numbers(clean) and len(records) == 6
    saved_checkpoint(run_dir, 20, seed=5)  # replaced after it was done: new content, new records
    assert len(run_sweep(run_dir, data)[1]) == 8


def test_a_checkpoint_that_vanishes_is_gone_not_failed(run_dir, data, monkeypatch, capsys):
    def before(path):
        if path.name == "checkpoint-10":  # the trainer's rotation, at the worst moments
            shutil.rmtree(run_dir / "checkpoint-20")
        if path.name == "checkpoint-30":
            shutil.rmtree(path)

    on_loading(monkeypatch, before=before)
    code, records = run_sweep(run_dir, data)
    assert code == 0 and numbers(records).keys() == expected([10])
    assert "2 checkpoints gone" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------
# What goes wrong with results


def test_a_full_disk_ends_the_sweep_in_one_line_and_loses_nothing(run_dir, data):
    def no_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))  # leases fit, records do not

    out = run_to_end(start_words(run_dir, data), 2, preexec_fn=no_room)
    [line] = out.stderr.splitlines()
    assert line.startswith("error: ") and "nothing was written" in line
    assert run_sweep(run_dir, data)[1] != []
    again = run_sweep(run_dir, data)[1]
    assert numbers(again) == numbers(run_sweep(run_dir, data, name="clean")[1])


def test_a_results_directory_that_cannot_be_written(run_dir, data, monkeypatch):
    (run_dir.parent / "results").write_text("a file")
    on_loading(monkeypatch, before=lambda path: pytest.fail("too late"))
    with pytest.raises(ValueError, match=r"--results-dir .* cannot be written"):
        sweep.main(flags(run_dir, data))


def test_two_sweeps_share_the_work(tmp_path, data):
    for step in range(1, 9):
        saved_checkpoint(tmp_path / "run", step)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # a lease that no machine is too busy to keep
    words = start_words(tmp_path / "run", data, "--lease-seconds", str(100 * PATIENCE))
    with started(words, **pipes) as one, started(words, **pipes) as two:
        pair = one, two
        said = [p.communicate(timeout=PATIENCE) for p in pair]
    assert [p.returncode for p in pair] == [0, 0], said
    made = [line for out, _ in said for line in out.splitlines() if "(" in line and "±" in line]
    assert len(made) == len({tuple(line.split()[:2]) for line in made}) == 16, made
    records = results.load_records(tmp_path / "results")
    assert numbers(records).keys() == expected(range(1, 9))
    assert not any((tmp_path / "results/.leases").iterdir())


def test_the_launcher_runs_two_ranks_and_says_when_it_failed(run_dir, data):
    (run_dir / "checkpoint-30/model.safetensors").write_bytes(b"torn")
    more = flags(run_dir, data)
    more.remove("--checkpoint-path"), more.remove(str(run_dir))
    script = ["bash", str(ROOT / "scripts/sweep_checkpoints.sh")]
    environment = os.environ | {"PYTHON": sys.executable, "NPROC": "2"}
    out = run_to_end([*script, str(run_dir), *more], 1, env=environment)
    assert "4 made, 0 done before, 2 failed" in out.stdout, out.stderr
    records = results.load_records(run_dir.parent / "results")
    assert {r["cost"]["world_size"] for r in records if r["status"] == "ok"} == {2}
    assert subprocess.run(script, capture_output=True).returncode == 2


# ---------------------------------------------------------------------------------------------
# Trackers


def test_trackers_get_the_records_numbers(run_dir, data, monkeypatch):
    logged = []

    class Writer:
        def __init__(self, folder):
            self.folder = folder

        def add_scalar(self, name, value, step):
            logged.append((Path(self.folder).name, name, value, step))

        def flush(self):
            pass

    class Run:
        def define_metric(self, *_, **__):
            pass

        def log(self, values):
            step = values.pop("step")
            values.pop("tokens", None)
            logged.extend(("wandb", name, value, step) for name, value in values.items())

    tensorboard = types.SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **_: Run()))
    board = ["--tensorboard", str(run_dir.parent / "tb"), "--wandb", "project"]
    _, records = run_sweep(run_dir, data, *board)
    for name in ("run", "wandb"):
        mine = {(metric, step): value for who, metric, value, step in logged if who == name}
        wanted = {
            (metric, r["checkpoint"]["step"]): value
            for r in records
            for metric, value in results.scalars(r).items()
        }
        assert mine == wanted and ("mmlu/accuracy", 20) in mine


@pytest.mark.parametrize("flag", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed(run_dir, data, monkeypatch, flag):
    for module in ("wandb", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=f"pip install {flag}"):
        run_sweep(run_dir, data, f"--{flag}", "x")
