"""--adapter: a base and its adapters in one run; adapters as checkpoints of a sweep."""

import re
import shutil

import pytest
import torch
import yaml
from adapter_files import saved_adapter, saved_base
from builders import token_shard

import checkpoint
import command
import eval
import results
import sweep
from distributed import Dist
from formats import filling

FLAGS = ["--data-mode", "fineweb_npy", "--seq-len", "32", "--device", "cpu"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """base-llama, loras/checkpoint-10 and -20, one that unties, one over all, and tokens."""
    folder = tmp_path_factory.mktemp("place")
    base = saved_base(folder, tie=True)
    for step in (10, 20):
        saved_adapter(folder / f"loras/checkpoint-{step}", base, seed=step)
    saved_adapter(folder / "untied", base, target_modules=["q_proj", "lm_head"])
    import numpy as np

    shard = np.load(token_shard(folder / "x.npy", n=700))
    np.save(folder / "x.npy", shard % 96)
    return folder


def run(place, name, *words):
    argv = [*FLAGS, "--val-npy", str(place / "x.npy"), "--results-dir", str(place / name), *words]
    eval.main([str(word) for word in argv])
    return {r["checkpoint"]["name"]: r for r in results.load_records(place / name)}


def test_base_and_adapters_in_one_run(place, capsys, monkeypatch):
    """The numbers of each alone, to the bit; the base's weights are read once."""
    base, loras = place / "base-llama-tied", place / "loras"
    names = ["base-llama-tied", "checkpoint-10", "checkpoint-20", "untied"]
    read = []
    fill = filling.fill
    with monkeypatch.context() as patch:
        patch.setattr(filling, "fill", lambda *args: read.append(args[0].config) or fill(*args))
        words = ["--checkpoint-path", base, "--adapter", loras, place / "untied"]
        together = run(place, "together", *words)
    assert [config.tie_embeddings for config in read] == [True, False]  # the untied is another's
    out = capsys.readouterr().out
    assert list(together) == names or set(together) == set(names)
    for name, path in zip(
        names, [base, loras / "checkpoint-10", loras / "checkpoint-20", "untied"]
    ):
        alone = run(place, f"alone-{name}", "--checkpoint-path", place / path)[name]
        assert alone["metrics"] == together[name]["metrics"]
        assert alone["resume_key"] == together[name]["resume_key"]
    losses = {name: record["metrics"]["loss"]["value"] for name, record in together.items()}
    assert len(set(losses.values())) == 4
    told = dict(re.findall(r"^([\w-]+): loss ([+-]\d\.\d+) \[", out, re.M))
    assert told.keys() == set(names[1:])
    for name, text in told.items():
        assert abs(float(text) - (losses[name] - losses[names[0]])) < 2e-5
    assert out.count("checkpoint-10 ") and "difference to the base [95%], paired by example" in out


def test_the_base_is_itself_again(place):
    """After an adapter was taken out, before the next: bit for bit, transformers' models too."""
    opt = saved_base(place, "opt")
    over = saved_adapter(place / "opt-lora", opt, target_modules=["q_proj", "fc1"])
    pairs = [(place / "base-llama-tied", place / "loras/checkpoint-10"), (opt, over)]
    for base, lora in pairs:
        handle = checkpoint.open(base)
        loader, dist = command.Loader("bfloat16", keep=True), Dist(0, 1, 0, torch.device("cpu"))
        model = loader.load(handle, dist)
        before = {name: p.clone() for name, p in model.named_parameters()}
        changed = loader.load(checkpoint.open(lora, base=handle), dist)
        assert changed is model
        same = [torch.equal(p, before[name]) for name, p in model.named_parameters()]
        assert not all(same) and any(same)
        assert loader.load(handle, dist) is model
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_what_is_no_adapter_is_refused_before_anything_is_loaded(place, capsys):
    base = place / "base-llama-tied"
    with pytest.raises(ValueError, match="is no adapter: give it as --checkpoint-path"):
        run(place, "none", "--checkpoint-path", base, "--adapter", base)
    with pytest.raises(ValueError, match="which is an adapter itself"):
        words = ["--checkpoint-path", place / "loras/checkpoint-10", "--adapter", place / "untied"]
        run(place, "none", *words)
    with pytest.raises(ValueError, match="--base is for adapters"):
        run(place, "none", "--checkpoint-path", base, "--base", base)
    assert not list((place / "none").rglob("*.json"))


def test_a_sweep_of_adapters(place, tmp_path):
    """Once without their base, which is then named: those that failed are done."""
    loras = tmp_path / "run"
    shutil.copytree(place / "loras", loras)
    for step in (10, 20):
        file = loras / f"checkpoint-{step}/adapter_config.json"
        file.write_text(file.read_text().replace(str(place / "base-llama-tied"), "lost"))
        (file.parent / "trainer_state.json").write_text(f'{{"global_step": {step}}}')
    flags = {"data-mode": "fineweb_npy", "val_npy": str(place / "x.npy"), "seq-len": 32}
    (tmp_path / "e.yaml").write_text(yaml.safe_dump({"perplexity": flags}))
    argv = [
        "--device",
        "cpu",
        "--checkpoint-path",
        str(loras),
        "--results-dir",
        str(tmp_path / "r"),
    ]
    argv += ["--evaluations", str(tmp_path / "e.yaml"), "--poll-seconds", "0.1"]
    with pytest.raises(SystemExit):
        sweep.main(argv)
    failed = results.load_records(tmp_path / "r")
    assert ["give its path with --base" in r["reason"] for r in failed] == [True, True]
    sweep.main([*argv, "--base", str(place / "base-llama-tied"), "--watch", "--until-step", "20"])
    made = [r for r in results.load_records(tmp_path / "r") if r["status"] == "ok"]
    assert [r["checkpoint"]["step"] for r in made] == [10, 20]
    wanted = run(place, "swept", "--checkpoint-path", place / "loras/checkpoint-20")
    assert made[1]["metrics"] == wanted["checkpoint-20"]["metrics"]
