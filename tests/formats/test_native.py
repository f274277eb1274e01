"""formats/native.py: what was saved comes back, opens in transformers, and survives kill -9."""

import itertools
import json
import os
import pathlib
import random
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from builders import die_at_file_operation
from checkpoint_files import (
    CONFIGS,
    IDS,
    ROOT,
    logits,
    make_model,
    step,
    trained,
)

import checkpoint
from checkpoint import (
    find_tokenizer,
    list_checkpoints,
    load_checkpoint,
    load_model,
    load_training_state,
    load_weights,
    save_checkpoint,
)
from formats import native, tensorfiles
from model import GPTModel
from tokenizer import build_tokenizer


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_and_loaded_again(tmp_path, name):
    model, optimizer, scheduler = trained(CONFIGS[name])
    extra = {
        "rng": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "generator": np.random.default_rng(1).bit_generator.state,
        "best": np.float64(2.5),
        "tokens": 640,
    }
    path = save_checkpoint(model, optimizer, scheduler, 1, 2, 2.5, tmp_path, extra=extra)
    assert path == tmp_path / "checkpoint-2"
    loaded = load_model(path, "float32")
    assert loaded.config == model.config and not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert torch.equal(logits(loaded), logits(model))
    state = load_training_state(path)
    assert torch.equal(state["extra"]["rng"], extra["rng"])
    assert state["extra"]["python"] == extra["python"]
    assert np.array_equal(state["extra"]["numpy"][1], extra["numpy"][1])
    said = checkpoint.open(path).describe()
    assert said["tokens"] == 640 and said["step"] == 2


@pytest.mark.parametrize("name", [n for n in CONFIGS if n != "gpt2 without biases"])
def test_transformers_opens_what_was_saved(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    model = make_model(CONFIGS[name])
    path = save_checkpoint(model, None, None, 0, 1, 1.0, tmp_path)
    theirs, told = transformers.AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        difference = (theirs.eval()(IDS).logits - logits(model)).abs().max().item()
    assert difference <= 1e-5


def test_tokenizer_goes_along(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = CONFIGS["gpt2"].replace(vocab_size=257)
    tokenizer = build_tokenizer("byte")
    path = save_checkpoint(GPTModel(config), None, None, 0, 1, 1.0, tmp_path, tokenizer=tokenizer)
    text = "naïve\n  <|endoftext|>"
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    split = theirs(text, split_special_tokens=True, add_special_tokens=False)["input_ids"]
    assert split == list(tokenizer.encode(text))
    assert find_tokenizer(path) == path
    assert json.loads((path / "config.json").read_text())["eos_token_id"] == 256
    assert list(build_tokenizer(path).encode(text)) == list(tokenizer.encode(text))


def test_config_without_hugging_face_form_keeps_native_names(tmp_path):
    model = make_model(CONFIGS["gpt2 without biases"])
    path = save_checkpoint(model, None, None, 0, 1, 1.0, tmp_path)
    written = json.loads((path / "config.json").read_text())
    assert "model_type" not in written and "native names" in written["note"]
    table = tensorfiles.open_safetensors(path / "model.safetensors")
    assert list(table) == [name for name, _ in model.named_parameters()]


def test_every_truncation_of_a_file_of_ours_is_noticed(tmp_path):
    path = save_checkpoint(make_model(), None, None, 0, 1, 1.0, tmp_path)
    weights = path / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1])
    with pytest.raises(ValueError, match="its manifest says"):
        load_model(path)
    weights.unlink()
    with pytest.raises(ValueError, match="its manifest says"):
        load_model(path)


def test_resume_is_exact(tmp_path):
    model, optimizer, scheduler = trained()
    path = save_checkpoint(model, optimizer, scheduler, 1, 2, 3.5, tmp_path)
    step(model, optimizer, scheduler)
    again = make_model(seed=1)
    optimizer2 = torch.optim.AdamW(again.parameters(), lr=1e-3)
    scheduler2 = torch.optim.lr_scheduler.LambdaLR(optimizer2, lambda step: 1 / (1 + step))
    assert load_checkpoint(path, again, optimizer2, scheduler2) == (1, 2, 3.5)
    step(again, optimizer2, scheduler2)
    for name, p in model.state_dict().items():
        assert torch.equal(p, again.state_dict()[name]), name
    assert scheduler.get_last_lr() == scheduler2.get_last_lr()


def test_wrapped_models_are_saved_bare_and_loaded_into(tmp_path):
    model = make_model()
    path = save_checkpoint(torch.compile(model), None, None, 0, 1, 1.0, tmp_path)
    again = make_model(seed=1)
    load_weights(path, torch.compile(again))
    assert torch.equal(logits(again), logits(model))


def test_keep(tmp_path):
    model = make_model()
    for number, loss in enumerate((3.0, 0.9, 1.1, float("nan"), 1.0), start=1):
        save_checkpoint(model, None, None, 0, number, loss, tmp_path, keep=2)
    assert [c.step for c in list_checkpoints(tmp_path)] == [2, 4, 5]
    # after a resume from an old one, the one just written is not the one to go
    save_checkpoint(model, None, None, 0, 3, 1.0, tmp_path, keep=1)
    assert [c.step for c in list_checkpoints(tmp_path)] == [2, 3, 5]
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"checkpoint-{n}" for n in (2, 3, 5)]
    with pytest.raises(ValueError, match="keep"):
        save_checkpoint(model, None, None, 0, 9, 1.0, tmp_path, keep=0)


def test_saving_a_step_again_replaces_it(tmp_path):
    for seed in (0, 1):
        model = make_model(seed=seed)
        path = save_checkpoint(model, None, None, 0, 1, 1.0, tmp_path)
    assert torch.equal(logits(load_model(path, "float32")), logits(model))
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]


def test_a_save_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    model = make_model()
    path = save_checkpoint(model, None, None, 0, 1, 1.0, tmp_path)
    with pytest.raises(ValueError, match="PurePosixPath"):
        extra = {"path": pathlib.PurePosixPath("x")}
        save_checkpoint(make_model(seed=1), None, None, 0, 1, 1.0, tmp_path, extra=extra)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]
    assert torch.equal(logits(load_model(path, "float32")), logits(model))
    # without an atomic exchange (some network file systems) the result is the same
    monkeypatch.setattr(native, "_exchange", lambda a, b: False)
    other = make_model(seed=2)
    save_checkpoint(other, None, None, 0, 1, 1.0, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]
    assert torch.equal(logits(load_model(path, "float32")), logits(other))


def kill_while_saving(directory, rounds, seed):
    """kill -9 at random file operations of saving new steps and old ones again, with old ones
    removed; then everything listed must be whole. Returns how many rounds left something half done
    behind."""
    directory, rng, half_done = pathlib.Path(directory), random.Random(seed), 0
    torch.set_num_threads(1)  # so that a fork is safe
    model, optimizer, scheduler = trained(CONFIGS["llama"])
    save_checkpoint(model, optimizer, scheduler, 0, 0, 1.0, directory)
    for _ in range(rounds):
        child = os.fork()
        if not child:
            die_at_file_operation(rng.randint(1, 100))
            for n in itertools.count():
                number = n % 5 if n % 2 else n
                save_checkpoint(model, optimizer, scheduler, 0, number, 1.0, directory, keep=2)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        half_done += any(p.name.startswith(".") for p in directory.iterdir())
        found = list_checkpoints(directory)
        assert found and all(info.kind == "roseval" for info in found), found
        for info in found:
            native.check_manifest(info.path, content=True)
            load_model(info.path, "float32")
            assert load_training_state(info.path)["step"] == info.step
    save_checkpoint(model, None, None, 0, 10**6, 1.0, directory)
    assert not [p for p in directory.iterdir() if p.name.startswith(".")]
    return half_done


def kill_in_a_process_of_its_own(directory, rounds, seed):
    call = f"print(test_native.kill_while_saving({str(directory)!r}, {rounds}, {seed}))"
    command = [sys.executable, "-c", f"import test_native; {call}"]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests/formats")))
    }
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_kill_while_saving(tmp_path):
    assert kill_in_a_process_of_its_own(tmp_path, 10, seed=0) >= 3


@pytest.mark.slow
def test_kill_while_saving_many_times(tmp_path):
    assert kill_in_a_process_of_its_own(tmp_path, 500, seed=1) >= 150


def test_a_manifest_of_somebody_else_is_none_of_ours(tmp_path):
    path = save_checkpoint(make_model(), None, None, 0, 1, 1.0, tmp_path)
    (path / "manifest.json").write_text('{"files": ["a"], "name": "web app"}')
    assert [info.kind for info in list_checkpoints(tmp_path)] == ["huggingface"]
    load_model(path)
    (path / "manifest.json").write_text('{"files": ')
    with pytest.raises(ValueError, match=r"manifest\.json is not JSON"):
        load_model(path)


@pytest.mark.slow
def test_lm_eval_opens_what_was_saved(tmp_path):
    """lm-eval's HFLM from the directory alone: the log-likelihood that our own model gives."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    tokenizer = build_tokenizer("byte")
    model = make_model(CONFIGS["llama"].replace(vocab_size=257))
    path = save_checkpoint(model, None, None, 0, 1, 1.0, tmp_path, tokenizer=tokenizer)
    theirs = HFLM(pretrained=str(path), device="cpu", dtype="float32", batch_size=1)
    context, continuation = "The capital", " of France"
    request = Instance("loglikelihood", {}, (context, continuation), 0)
    ((wanted, _),) = theirs.loglikelihood([request], disable_tqdm=True)
    ids = torch.tensor([list(tokenizer.encode(context + continuation))])
    with torch.no_grad():
        logprobs = model(ids)[0].log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
    assert logprobs[len(context) - 1 :].sum().item() == pytest.approx(wanted, abs=1e-3)
