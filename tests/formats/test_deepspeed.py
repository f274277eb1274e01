"""formats/deepspeed.py: files made here by the rules that DeepSpeed's own zero_to_fp32.py states,
whole and damaged. What DeepSpeed itself wrote is in test_trained.py."""

import enum
import itertools
import math
import shutil
import sys
import types

import pytest
import torch
from checkpoint_files import CONFIGS, logits, make_model
from trained_files import refusal

import checkpoint
from formats import layouts

CONFIG = CONFIGS["llama"]


@pytest.fixture
def theirs(monkeypatch):
    """Classes under DeepSpeed's names, so that its pickles can be made; they are gone again when
    the files are read."""
    made = types.ModuleType("deepspeed_settings")
    sys.modules[made.__name__] = made
    for name in ("Stage", "Scaler"):
        base = (enum.IntEnum,) if name == "Stage" else ()
        kind = enum.IntEnum("Stage", {"weights": 3}) if base else type(name, (), {})
        kind.__module__, kind.__qualname__ = made.__name__, name
        setattr(made, name, kind)
    yield made
    sys.modules.pop(made.__name__, None)


def weights(seed=0):
    return {n: t.clone() for n, t in layouts.views(make_model(CONFIG, seed), "llama")}


def zero3(folder, theirs, n, groups=3, frozen=(), step=30, state=None):
    """A tag of n ranks, each rank's vector cut in several."""
    state = state or weights()
    tag = folder / f"global_step{step}"
    tag.mkdir(parents=True)
    trained = {name: t for name, t in state.items() if name not in frozen}

    def share(t, rank):
        size = math.ceil(t.numel() / n)
        padded = torch.nn.functional.pad(t.flatten(), (0, size * n - t.numel()))
        return padded[rank * size : (rank + 1) * size].clone()

    half = len(trained) // 2
    names = list(trained)
    shapes = [{k: trained[k].shape for k in part} for part in (names[:half], names[half:])]
    for rank in range(n):
        module = {name: torch.empty(0) for name in state} | {"rotary.inv_freq": torch.ones(2)}
        said = {
            "module": module,
            "buffer_names": [],
            "param_shapes": shapes,
            "frozen_param_shapes": {name: state[name].shape for name in frozen} or None,
            "frozen_param_fragments": {name: share(state[name], rank) for name in frozen} or None,
            "shared_params": {},
            "global_steps": step,
            "ds_config": {"zero": theirs.Stage(3)},
            "scaler": theirs.Scaler(),
        }
        torch.save(said, tag / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        flat = torch.cat([share(t, rank) for t in trained.values()])
        flat = torch.cat([flat, torch.zeros(5)])  # aligned
        cut = [len(flat) * i // groups for i in range(groups + 1)]
        optimizer = {
            "zero_stage": theirs.Stage(3),
            "partition_count": [n, n],
            "fp32_flat_groups": [flat[a:b].clone() for a, b in itertools.pairwise(cut)],
            "optimizer_state_dict": {"state": {0: {"exp_avg": torch.zeros(len(flat))}}},
        }
        name = f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": optimizer, "ds_version": "0"}, tag / name)
    (folder / "latest").write_text(tag.name)
    del sys.modules[theirs.__name__]
    return tag


def right(path, config=CONFIG):
    loaded = checkpoint.load_model(path, "float32", config=config)
    return torch.equal(logits(loaded), logits(make_model(CONFIG)))


@pytest.mark.parametrize(("n", "groups"), [(1, 1), (2, 3), (3, 7), (8, 2), (61, 5)])
def test_shares_of_any_number_of_ranks(tmp_path, theirs, n, groups):
    """Ranges that begin and end within rows, over the borders of groups."""
    tag = zero3(tmp_path / "run", theirs, n, groups)
    assert right(tag) and right(tmp_path / "run")
    ckpt = checkpoint.open(tag, CONFIG)
    assert (ckpt.kind, ckpt.step) == ("deepspeed", 30)
    assert len(ckpt.fingerprint) == 64


def test_frozen_and_shared_parameters_and_buffers(tmp_path, theirs):
    state = weights()
    frozen = ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight")
    tag = zero3(tmp_path / "run", theirs, 3, frozen=frozen)
    assert right(tag)
    del state["lm_head.weight"]
    tied = zero3(tmp_path / "tied", make_again(theirs), 2, state=state)
    config = CONFIG.replace(tie_embeddings=True)
    loaded = checkpoint.load_model(tied, "float32", config=config)
    assert torch.equal(loaded.token_embedding.weight, state["model.embed_tokens.weight"])


def make_again(theirs):
    sys.modules[theirs.__name__] = theirs
    return theirs


def test_a_run_of_several_tags(tmp_path, theirs):
    (tmp_path / "zero_to_fp32.py").write_text("# DeepSpeed leaves it there")
    for step in (10, 200, 30):
        zero3(tmp_path, make_again(theirs), 2, step=step)
    shutil.copytree(tmp_path / "global_step200", tmp_path / "global_step400")  # latest says 30 …
    (tmp_path / "latest").write_text("global_step200\n")  # … and then 200
    found = checkpoint.list_checkpoints(tmp_path)
    assert [(c.step, c.kind) for c in found] == [(n, "deepspeed") for n in (10, 30, 200, 400)]
    finished = [checkpoint.is_finished(c.path) for c in found]
    assert finished == [True, True, True, False]
    assert checkpoint.expand_paths([tmp_path]) == [c.path for c in found]
    assert checkpoint.open(tmp_path, CONFIG).step == 200 and right(tmp_path)
    (tmp_path / "latest").write_text("../elsewhere")
    assert "no directory of the tag '../elsewhere'" in refusal(tmp_path, CONFIG)


def test_as_transformers_trainer_lays_it_down(tmp_path, theirs):
    """checkpoint-30/config.json beside its one tag; weights that were gathered come first."""
    path = tmp_path / "checkpoint-30"
    zero3(path, theirs, 2)
    CONFIG.save_pretrained(path)
    (path / "trainer_state.json").write_text('{"global_step": 30}')
    ckpt = checkpoint.open(path)
    assert (ckpt.kind, ckpt.step, ckpt.config) == ("deepspeed", 30, CONFIG) and right(path, None)
    assert right(path / "global_step30", None)
    saved = checkpoint.convert(path, tmp_path / "converted")
    shutil.copy(saved / "model.safetensors", path)
    assert checkpoint.open(path).kind == "huggingface" and right(path, None)


def test_a_tag_is_no_second_checkpoint(tmp_path, theirs, capsys):
    """A run with one tag is that tag, and so is a Trainer's directory, where weights were gathered
    too; a model beside a tag of another time is not."""
    zero3(tmp_path / "run", theirs, 1)
    (tmp_path / "run/zero_to_fp32.py").write_text("# DeepSpeed leaves it there")
    (found,) = checkpoint.list_checkpoints(tmp_path / "run")
    assert (found.path, found.step) == (tmp_path / "run", 30)
    assert checkpoint.expand_paths([tmp_path / "run"]) == [tmp_path / "run"]
    assert "left out" not in capsys.readouterr().err
    trained = tmp_path / "checkpoint-30"
    (tmp_path / "run").rename(trained)
    assert [c.path for c in checkpoint.list_checkpoints(trained)] == [trained]
    CONFIG.save_pretrained(trained)
    saved = checkpoint.convert(trained, tmp_path / "converted")
    shutil.copy(saved / "model.safetensors", trained)
    assert [c.kind for c in checkpoint.list_checkpoints(trained)] == ["huggingface"]
    trained.rename(tmp_path / "final")
    steps = [(c.kind, c.step) for c in checkpoint.list_checkpoints(tmp_path / "final")]
    assert steps == [("deepspeed", 30), ("huggingface", None)]
    assert checkpoint.expand_paths([tmp_path / "final"]) == [tmp_path / "final"]
    assert "such as global_step30, which are left out" in capsys.readouterr().err


def test_zero_2_and_universal(tmp_path, theirs):
    tag = tmp_path / "zero2/global_step5"
    tag.mkdir(parents=True)
    said = {"module": weights(), "global_steps": 5, "args": theirs.Scaler()}
    torch.save(said, tag / "mp_rank_00_model_states.pt")
    (tag / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"is not needed")
    del sys.modules[theirs.__name__]
    assert right(tag) and checkpoint.open(tag, CONFIG).step == 5
    universal = tmp_path / "run/global_step7_universal"
    for name, t in weights().items():
        (universal / "zero" / name).mkdir(parents=True)
        torch.save({"param": t, "cat_dim": 0}, universal / "zero" / name / "fp32.pt")
        torch.save(torch.zeros(3), universal / "zero" / name / "exp_avg.pt")
    (tmp_path / "run/latest_universal").write_text(universal.name)
    assert right(universal) and right(tmp_path / "run")
    ckpt = checkpoint.open(universal, CONFIG)
    assert ckpt.step == 7 and checkpoint.is_finished(universal)
    (universal / "zero/lm_head.weight/fp32.pt").write_bytes(b"PK\x03\x04")
    assert "truncated or still being written" in refusal(universal, CONFIG)


def test_ranks_that_are_missing_or_of_another_save(tmp_path, theirs):
    tag = zero3(tmp_path / "a", theirs, 3)
    other = zero3(tmp_path / "b", make_again(theirs), 2, step=40)

    def optim(rank):
        return f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"

    def model(rank):
        return f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"

    for name, match in (
        (optim(1), "lacks the optim states of rank 1"),
        (optim(2), "of 3 ranks, the optimizer's of 2"),
        (model(0), "lacks the model states of rank 0"),
    ):
        (tag / name).rename(tmp_path / "away")
        assert match in refusal(tag, CONFIG)
        (tmp_path / "away").rename(tag / name)
    for rank in (2,):
        for name in (optim(rank), model(rank)):
            (tag / name).rename(tmp_path / name)
    assert "ZeRO 3 with 3 ranks, there are files of 2" in refusal(tag, CONFIG)
    for name in (optim(2), model(2)):
        (tmp_path / name).rename(tag / name)
    shutil.copy(other / model(1), tag / model(1))
    assert f"{model(1)} is of step 40, {model(0)} of 30" in refusal(tag, CONFIG)
    shutil.copy(tag / model(2), tag / model(1))
    shutil.copy(other / optim(0), tag / optim(0))
    assert "with 2 ranks, there are files of 3" in refusal(tag, CONFIG)
    shutil.copy(tag / optim(1), tag / optim(1).replace("bf16_", "fp16_"))
    assert "two files of rank 1" in refusal(tag, CONFIG)


def test_truncated_damaged_and_hostile_files(tmp_path, theirs):
    tag = zero3(tmp_path / "a", theirs, 2)
    for file in sorted(tag.iterdir()):
        content = file.read_bytes()
        for bad, match in (
            (content[:-50], "truncated or still being written"),
            (content[: len(content) // 2], "truncated or still being written"),
            (b"", "is empty"),
            (b"<html>", "web page"),
            (b"\x80\x02}q\x00.", "no archive of torch.save"),  # torch's old form
            (content.replace(b"deepspeed_settings\nS", b"os\nsystem\nS"), "could run code"),
        ):
            if bad == content:
                continue
            file.write_bytes(bad)
            assert match in refusal(tag, CONFIG) or "damaged" in refusal(tag, CONFIG)
        file.write_bytes(content)
    (file,) = tag.glob("*_rank_1_*optim*")
    content = bytearray(file.read_bytes())
    (piece,) = [p for p in checkpoint.open(tag, CONFIG).tensors["lm_head.weight"].pieces
                if p.file == file and p.shape[0] > 2]  # fmt: skip
    content[piece.offset + 40] ^= 1
    file.write_bytes(content)
    assert "the checksum at byte" in refusal(tag, CONFIG)


@pytest.mark.parametrize("name", ["mp_rank_01_model_states.pt", "layer_03-model_00-model_states.pt",
                                  "layer_0_expert_3_mp_rank_01_model_states.pt"])  # fmt: skip
def test_parallel_forms_are_refused_by_name(tmp_path, name):
    tag = tmp_path / "global_step5"
    tag.mkdir()
    for file in ("mp_rank_00_model_states.pt", name):
        torch.save({"module": weights()}, tag / file)
    said = refusal(tag, CONFIG)
    assert name in said and "not joined here" in said


def test_placeholders_are_not_weights(tmp_path):
    """A module of empty tensors, as old versions left behind."""
    tag = tmp_path / "global_step5"
    tag.mkdir()
    empty = {name: torch.empty(0) for name in weights()}
    torch.save({"module": empty}, tag / "mp_rank_00_model_states.pt")
    assert "of another shape" in refusal(tag, CONFIG)
    torch.save({"other": empty}, tag / "mp_rank_00_model_states.pt")
    assert "has no 'module'" in refusal(tag, CONFIG)
