"""--shard from the command line: records of any number of ranks and groups are one, interrupted
work goes on at another number, and what cannot be cut is refused in one line."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from adapter_files import saved_adapter, saved_base
from builders import (
    PATIENCE,
    command,
    descendants,
    is_there,
    save_model,
    saved_checkpoint,
    small_humaneval,
    small_mmlu,
    started,
    tiny_model,
    token_shard,
    torchrun,
    wait_for,
)
from small_sweeps import flags as sweep_flags
from small_sweeps import small_data, small_run

import checkpoint
import eval
from backends import parallel
from backends.pipe import Pipe
from distributed import Dist

MODEL = ["--tokenizer-name", "byte", "--device", "cpu"]


def numbers(place) -> dict:
    """Of a results directory, by checkpoint, evaluation and template: what no run may change."""
    found = {}
    for path in sorted(place.rglob("*-*.json")):
        record = json.loads(path.read_text())
        with np.load(path.with_suffix(".npz")) as npz:
            arrays = {name: npz[name].tobytes() for name in npz.files}
        name = record["checkpoint"]["name"], record["evaluation"], path.name
        found[name] = record["metrics"], arrays, record["resume_key"]
    return found


def records(place) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(place.rglob("*-*.json"))]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("shard")
    saved_checkpoint(root / "run", 10, "llama", n_layers=4)
    token_shard(root / "x.npy")
    small_mmlu(root / "mmlu")
    small_humaneval(root / "problems.jsonl")
    return root


def commands(root) -> dict[str, list]:
    drawing = ["--max-new-tokens", 12, "--workers", 1, "--num-samples", 4, "--temperature", 0.8]
    drawing += ["--top-k", 20, "--k", 2, "--batch-size", 3]
    shard = ["--data-mode", "fineweb_npy", "--val-npy", root / "x.npy", "--seq-len", 32]
    mmlu = ["mmlu_eval.py", "--data-path", root / "mmlu"]
    return {
        "eval": ["eval.py", *shard, "--batch-size", 4],
        "rounded": [
            *("eval.py", *shard, "--batch-size", 4, "--reference", "first"),
            *("--quantise", "fp32", "rtn-w4-g16-asym", "fp8", "--quantise-embeddings"),
        ],
        "mmlu": [*mmlu, "--num-few-shot", 2, "--template", "lm_eval", "continuation"],
        "letters": [*mmlu, "--scoring", "generate", "letter"],
        "humaneval": ["humaneval_eval.py", "--data-path", root / "problems.jsonl", *drawing],
    }


def run(root, name, n, *more, results_dir):
    words = [*commands(root)[name], "--checkpoint-path", root / "run", *MODEL]
    return torchrun(n, *words, "--results-dir", results_dir, *more)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["eval", "rounded", "mmlu", "letters", "humaneval"])
def test_one_record_whatever_the_groups(root, tmp_path, name):
    run(root, name, 1, results_dir=tmp_path / "one")
    wanted = numbers(tmp_path / "one")
    assert wanted and all("shard" not in r["cost"] for r in records(tmp_path / "one"))
    for n, size in ((2, 2), (4, 2), (4, 4)):
        place = tmp_path / f"{n}-{size}"
        run(root, name, n, "--shard", size, results_dir=place)
        assert numbers(place) == wanted, (n, size)
        for record in records(place):
            assert (record["cost"]["world_size"], record["cost"]["shard"]) == (n, size)


@pytest.mark.slow
def test_journals_go_on_at_another_number_of_ranks_to_a_model(root, tmp_path):
    """Half of the samples, drawn by two ranks that hold the model, and no record."""
    first = tmp_path / "first"
    run(root, "humaneval", 2, "--shard", 2, results_dir=first)
    wanted = numbers(first)
    journals = sorted(first.rglob("journal-*-rank*"))
    assert [path.name[-1] for path in journals] == ["0", "1"]
    lines = [path.read_bytes() for path in journals]
    assert all(lines), "both ranks drew"
    for path in [*first.rglob("*-*.json"), *first.rglob("*.npz")]:
        path.unlink()
    journals[1].unlink()
    for n, size in ((0, 1), (4, 4), (4, 2)):
        place = tmp_path / f"{n}-{size}"
        shutil.copytree(first, place)
        run(root, "humaneval", n, "--shard", size, results_dir=place)
        assert numbers(place) == wanted
        (record,) = records(place)
        assert 0 < record["cost"]["samples_resumed"] < 12


def ranks_of(process) -> dict[int, int]:
    """{rank: pid} of torchrun's workers; what they start themselves comes and goes."""
    found: dict[int, int] = {}
    for pid in descendants(process.pid):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            rank = next((int(word[5:]) for word in words if word.startswith(b"RANK=")), None)
            if rank is not None:
                found.setdefault(rank, pid)  # the parents come first
    return found


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGTERM to torchrun", "SIGINT to torchrun", "SIGKILL to a rank"])
def test_what_was_drawn_before_the_end_is_kept(root, tmp_path, how):
    """A run of two groups that ends in the midst of its work leaves no process and no record, names
    the rank that died, and goes on in one group of four, whose record is an undisturbed run's."""
    more = ["--num-samples", 16, "--max-new-tokens", 40]
    run(root, "humaneval", 0, *more, results_dir=tmp_path / "whole")
    place = tmp_path / "ended"
    words = [*commands(root)["humaneval"], "--checkpoint-path", root / "run", *MODEL, *more]
    words = command(4, *words, "--results-dir", place, "--shard", 2)
    with started(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        wait_for(lambda: sum(p.stat().st_size for p in place.rglob("journal-*")) > 500)
        pids = ranks_of(process)
        assert sorted(pids) == [0, 1, 2, 3]
        if how == "SIGKILL to a rank":
            os.kill(pids[2], signal.SIGKILL)
        else:
            process.send_signal(getattr(signal, how.split()[0]))
        _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0 and not any(map(is_there, pids.values())) and not records(place)
    assert ("rank      : 2 (local_rank: 2)" in err) == ("rank" in how), err
    run(root, "humaneval", 4, *more, "--shard", 4, results_dir=place)
    assert numbers(place) == numbers(tmp_path / "whole")
    assert 0 < records(place)[0]["cost"]["samples_resumed"] < 48


@pytest.mark.slow
def test_a_group_over_two_nodes(root, tmp_path):
    """Two agents of torchrun that meet on the loopback: four ranks hold one model, then two."""
    run(root, "eval", 0, results_dir=tmp_path / "one")
    for size in (4, 2):
        place = tmp_path / str(size)
        words = [*commands(root)["eval"], "--checkpoint-path", root / "run", *MODEL]
        words = command(2, *words, "--results-dir", place, "--shard", size)
        assert words[3] == "--standalone"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        nodes = ["--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}"]
        nodes += [f"--rdzv-id={size}", "--local-addr=127.0.0.1"]
        with contextlib.ExitStack() as stack:
            agents = [
                stack.enter_context(
                    started([*words[:3], *nodes, *words[4:]], stderr=subprocess.PIPE)
                )
                for _ in range(2)
            ]
            for agent in agents:
                _, err = agent.communicate(timeout=PATIENCE)
                assert agent.returncode == 0, err
        assert numbers(place) == numbers(tmp_path / "one")
        cost = records(place)[0]["cost"]
        assert (cost["world_size"], cost["shard"]) == (4, size)


@pytest.mark.slow
def test_a_checkpoint_that_one_rank_cannot_read_is_not_the_last(tmp_path):
    """In a sweep of groups: of a damaged tensor only the rank that needs it learns, and all go on
    with the next checkpoint."""
    data, run_dir = small_data(tmp_path), small_run(tmp_path / "run")
    broken = tiny_model(seed=3)
    broken.blocks[1].mlp.fc2.weight.data[0, 0] = torch.nan
    save_model(broken, run_dir, 20)
    out = torchrun(
        2, "sweep.py", *sweep_flags(run_dir, data, "two", "--shard", "2"), code=1, cold=True
    )
    assert out.stdout.count("hold NaN or Inf: transformer.h.1.mlp.c_proj.weight") == 2, out.stdout
    made = sorted((r["status"], r["checkpoint"]["name"]) for r in records(tmp_path / "two"))
    wanted = [("failed", "checkpoint-20"), ("ok", "checkpoint-10"), ("ok", "checkpoint-30")]
    assert made == sorted(2 * wanted), made


@pytest.mark.slow
def test_a_sweep_in_groups(tmp_path):
    data, run_dir = small_data(tmp_path), small_run(tmp_path / "run")
    torchrun(0, "sweep.py", *sweep_flags(run_dir, data, "one"))
    torchrun(2, "sweep.py", *sweep_flags(run_dir, data, "two", "--shard", "2"), cold=True)
    assert len(numbers(tmp_path / "one")) == 6
    assert numbers(tmp_path / "two") == numbers(tmp_path / "one")
    again = torchrun(
        2, "sweep.py", *sweep_flags(run_dir, data, "one", "--shard", "auto"), cold=True
    )
    assert "evaluations: 0 made, 6 done before, 0 failed" in again.stdout
    # two layers: each checkpoint fails with its reason, and no rank is left waiting
    words = sweep_flags(run_dir, data, "four", "--shard", "4")
    out = torchrun(4, "sweep.py", *words, code=1, cold=True)
    assert out.stdout.count("--shard 4 is more than the model's 2 layers") == 6, out.stdout


@pytest.mark.slow
def test_adapters_over_a_base_that_two_ranks_hold(tmp_path):
    """One over all modules, one that is for a single layer, one that unties."""
    base = saved_base(tmp_path, tie=True)
    saved_adapter(tmp_path / "all", base, seed=1)
    saved_adapter(tmp_path / "one", base, seed=2, layers_to_transform=[1])
    saved_adapter(tmp_path / "untied", base, target_modules=["q_proj", "lm_head", "embed_tokens"])
    ids = np.load(token_shard(tmp_path / "x.npy", n=700)) % 96
    np.save(tmp_path / "x.npy", ids)
    words = ["eval.py", "--data-mode", "fineweb_npy", "--val-npy", tmp_path / "x.npy"]
    words += ["--seq-len", 32, "--device", "cpu", "--checkpoint-path", base, "--adapter"]
    words += [tmp_path / name for name in ("all", "one", "untied")]
    torchrun(1, *words, "--results-dir", tmp_path / "whole")
    torchrun(2, *words, "--results-dir", tmp_path / "parts", "--shard", 2)
    assert len(numbers(tmp_path / "whole")) == 4
    assert numbers(tmp_path / "parts") == numbers(tmp_path / "whole")


def test_what_cannot_be_cut_is_one_line(root, tmp_path, capsys):
    words = ["--checkpoint-path", root / "run", *MODEL, "--results-dir", tmp_path]
    words = [str(word) for word in (*commands(root)["eval"][1:], *words, "--shard")]
    with pytest.raises(ValueError, match="--shard 2 needs 2 processes, or a multiple, not 1"):
        eval.main([*words, "2"])
    for wrong in ("0", "half"):
        with pytest.raises(SystemExit):
            eval.main([*words, wrong])
        assert f"--shard: needs a positive whole number, not '{wrong}'" in capsys.readouterr().err


def test_auto_is_one_where_there_is_no_gpu():
    alone = Dist(0, 1, 0, torch.device("cpu"))
    assert parallel.in_groups(alone, "auto", None, "float32").pipe is None


def test_a_model_of_transformers_is_not_cut(tmp_path):
    base = saved_base(tmp_path, "opt")
    dist = Dist(0, 2, 0, torch.device("cpu"))
    parts = Dist(0, 2, 0, torch.device("cpu"), pipe=Pipe(dist, 2))
    with pytest.raises(ValueError, match="is run by transformers, whose models --shard does not"):
        parallel.load(checkpoint.open(base), "float32", parts)


def test_flag_of_every_evaluation_and_not_with_an_endpoint(root):
    words = ["--endpoint", "http://localhost:1", "--shard", "2", *commands(root)["eval"][1:-2]]
    with pytest.raises(ValueError, match="--shard goes with checkpoints, not with --endpoint"):
        eval.main([str(word) for word in words])
