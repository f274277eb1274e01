"""formats/megatron.py: files made here by the rules that Megatron documents, of every number of
ranks and both generations of names, whole and damaged. What Megatron-Core itself wrote is in
test_trained.py."""

import argparse
import enum
import io
import json
import pathlib
import shutil
import sys
import types
import warnings

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from checkpoint_files import CONFIGS, SIZES, logits, make_model
from megatron_files import about, before_core, core_state, ranks, torch_dist
from trained_files import refusal

import checkpoint
from config import GPTConfig
from formats import megatron_args

LLAMA, GPT = CONFIGS["llama"], CONFIGS["gpt2"].replace(vocab_size=96)
KINDS = {
    "gpt": GPT,
    "llama": LLAMA,
    "qwen3": CONFIGS["qwen3"],
    "qwen2, deeper": CONFIGS["qwen2"].replace(n_layers=8, tie_embeddings=False),
    "nemotron": GPTConfig(
        **SIZES, position="rope", rotary_fraction=0.5, activation="relu2", norm_offset=True,
        bias=False, norm_bias=True, dropout=0.0, tie_embeddings=False, rope_theta=5e4,
    ),
    "scaled": LLAMA.replace(rope_scaling={"rope_type": "linear", "factor": 2.0}),
    "plain gelu": GPT.replace(activation="gelu"),
}  # fmt: skip


def right(path, config, given=None):
    ckpt = checkpoint.open(path, given)
    assert ckpt.config == config, (ckpt.config, config)
    assert ckpt.kind == "megatron" and ckpt.problem == ""
    return torch.equal(logits(ckpt.load("float32")), logits(make_model(config)))


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_ranks(kind, tmp_path):
    """Tensor and pipeline parallel, names of Megatron-Core, of Transformer Engine's modules and of
    before: the very same model."""
    config = KINDS[kind]
    state = core_state(make_model(config))
    for i, (T, P) in enumerate([(1, 1), (2, 1), (1, 2), (2, 2)]):
        path = ranks(tmp_path / f"{i}", state, config, T, P)
        assert right(path, config), (T, P)
        assert right(path.parent, config)
    fused = {fused_norm(name): t for name, t in state.items()}
    assert right(ranks(tmp_path / "fused", fused, config, 2, 2), config)
    if not config.qk_norm:
        old = ranks(tmp_path / "old", state, config, 2, 2, rename=before_core)
        assert right(old, config)


def fused_norm(name):
    name = name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
    return name.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")


def test_virtual_stages_and_uneven_ones(tmp_path):
    config = KINDS["qwen2, deeper"]
    state = core_state(make_model(config))
    assert right(ranks(tmp_path / "virtual", state, config, 2, 2, virtual=2), config)
    assert right(ranks(tmp_path / "uneven", state, config, 1, 3, cuts=[0, 1, 6, 8]), config)
    assert right(ranks(tmp_path / "heads", state, config, 1, 4, cuts=[0, 0, 5, 8, 8]), config)


@pytest.mark.parametrize("kind", KINDS)
def test_torch_dist(kind, tmp_path):
    """All layers stacked or each of its own, common.pt or the newer object, halves of gated MLPs
    joined or not."""
    config = KINDS[kind]
    state = core_state(make_model(config))
    for i, (stacked, common, halves) in enumerate([(1, 1, 0), (0, 1, 1), (1, 0, 1)]):
        path = torch_dist(tmp_path / f"{i}", state, config, stacked, common, halves)
        assert right(path, config), (stacked, common, halves)
        assert checkpoint.open(path).step == 100


def test_nemo_and_bridge(tmp_path):
    """Their YAML stands for the command line; NeMo's names begin with `module.`."""
    config = LLAMA
    state = {f"module.{n}": t for n, t in core_state(make_model(config)).items()}
    fields = {
        "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2,
        "ffn_hidden_size": 48, "seq_length": 32, "normalization": "RMSNorm",
        "layernorm_epsilon": 1e-5, "gated_linear_unit": True, "add_bias_linear": False,
        "activation_func": {"_target_": "torch.nn.functional.silu", "_partial_": True},
        "position_embedding_type": "rope", "rotary_base": 10000, "rotary_percent": 1.0,
        "share_embeddings_and_output_weights": False, "make_vocab_size_divisible_by": 128,
    }  # fmt: skip
    padded = config.replace(vocab_size=104)
    for section, target, file in (
        ("config", "nemo.collections.llm.gpt.model.llama.Llama2Config7B", "context/model.yaml"),
        ("model", "megatron.bridge.models.llama.LlamaModelProvider", "run_config.yaml"),
    ):
        nemo = file.startswith("context")
        name = "model--step=100" if nemo else "iter_0000100"
        path = tmp_path / section / name
        torch_dist(tmp_path / section / "x", state, config, 1, 1, 0, args=None)
        made = tmp_path / section / "x/iter_0000100"
        path.parent.mkdir(exist_ok=True)
        if nemo:
            path.mkdir()
        shutil.move(made, path / "weights" if nemo else path)
        (path / file).parent.mkdir(exist_ok=True)
        (path / file).write_text(text_of(section, fields | {"_target_": target}))
        ckpt = checkpoint.open(path)
        assert (ckpt.step, ckpt.config) == (100, padded) and checkpoint.is_finished(path)
        whole = logits(ckpt.load("float32"))  # nothing says which rows are padding
        assert torch.equal(whole[..., :97], logits(make_model(config)))
        (path / file).write_text(text_of(section, fields | {"_target_": "x.GemmaConfig2B"}))
        assert "what models of 'x.GemmaConfig2B' compute is not known" in refusal(path)
        (path / file).write_text(
            text_of(section, {k: v for k, v in fields.items() if "eps" not in k})
        )
        assert "do not say norm_eps" in refusal(path)
        (path / file).unlink()
        said = refusal(path)
        assert "vocab_size=104, d_model=32, n_layers=2, d_ff=48" in said and "not n_heads" in said
        given = checkpoint.load_model(path, "float32", config=padded)
        assert torch.equal(logits(given), whole)


def text_of(section, fields):
    return json.dumps({section: fields})


# ---------------------------------------------------------------------------------------------
# Settings


def test_vocabulary_is_cut_where_its_length_is_known(tmp_path):
    state = core_state(make_model(LLAMA))
    path = ranks(tmp_path / "a", state, LLAMA, 2, 1)
    assert checkpoint.open(path).tensors["lm_head.weight"].shape == (97, 32)
    unknown = ranks(tmp_path / "b", state, LLAMA, 2, 1, vocab_size=None)
    assert checkpoint.open(unknown).config.vocab_size == 104
    assert right(unknown, LLAMA, LLAMA)  # the given config's length fits the padding …
    said = refusal(unknown, LLAMA.replace(vocab_size=60))  # … this does not
    assert "vocab_size is 60 in the config, 104 in the tensors" in said


def test_interleaved_rotary_positions(tmp_path):
    """Channels (2i, 2i + 1) turn together: the same function with its rows in another order."""
    model = make_model(LLAMA)
    state, D = core_state(model), 8
    order = torch.arange(D).view(2, -1).t().flatten()  # theirs of ours
    for name, t in state.items():
        if "linear_qkv.weight" in name:
            groups = t.view(2, 4, D, 32).clone()
            groups[:, :3] = groups[:, :3, order]
            state[name] = groups.view(t.shape)
    path = ranks(tmp_path, state, LLAMA, 2, 2, rotary_interleaved=True)
    assert right(path, LLAMA)


def test_activation_of_fused_and_plain_gelu():
    """Fused with a bias it is the tanh approximation (megatron/core/fusions/fused_bias_gelu.py)."""
    sizes = {"vocab_size": 97, "d_model": 32, "n_layers": 2, "d_ff": 48}
    base = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "norm_epsilon": 1e-5,
            "max_position_embeddings": 32}  # fmt: skip
    for more, activation in (
        ({"bias_gelu_fusion": True}, "gelu_new"),
        ({"bias_gelu_fusion": False}, "gelu"),
        ({"bias_gelu_fusion": True, "add_bias_linear": False}, "gelu"),
        ({"openai_gelu": True, "bias_gelu_fusion": False}, "gelu_new"),
        ({"squared_relu": True}, "relu2"),
    ):
        assert megatron_args.config_of(base | more, sizes, "x").activation == activation
    with pytest.raises(ValueError, match=r"do not say activation \(bias_gelu_fusion\), and no"):
        megatron_args.config_of(base, sizes, "x")


@pytest.mark.parametrize(("name", "value"), [
    ("moe_latent_size", 8), ("multi_latent_attention", True), ("window_size", (128, 0)),
    ("position_embedding_type", "yarn"), ("softmax_type", "learnable"), ("spec", ["a", "b"]),
    ("quick_geglu", True), ("normalization", "Weird"), ("num_layers", "two"),
    ("num_attention_heads", -4), ("norm_epsilon", {}), ("hybrid_layer_pattern", "M*M*"),
])  # fmt: skip
def test_settings_without_a_native_form(name, value, tmp_path):
    """One line that names the setting."""
    path = ranks(tmp_path, core_state(make_model(LLAMA)), LLAMA, 1, 1, **{name: value})
    said = refusal(path)
    ours = {"num_layers": "n_layers", "num_attention_heads": "n_heads", "norm_epsilon": "norm_eps"}
    assert ours.get(name, name) in said
    assert checkpoint.inspect(path)["note"] == said and checkpoint.info_of(path).kind == "megatron"


def test_a_save_without_settings(tmp_path):
    state = core_state(make_model(LLAMA))
    path = ranks(tmp_path, state, LLAMA, 2, 2, args=None)
    said = refusal(path)
    assert (
        "d_model=32, n_layers=2, d_ff=48" in said and "not n_heads" in said and "--config" in said
    )
    wide = LLAMA.replace(vocab_size=104)
    assert checkpoint.load_model(path, "float32", config=wide).config == wide
    wide.save_pretrained(path)
    assert checkpoint.open(path).config == wide  # Hugging Face's beside it


# ---------------------------------------------------------------------------------------------
# Runs, and what is wrong with files


def test_a_run_of_several_iterations(tmp_path):
    state = core_state(make_model(GPT))
    for step in (5, 200, 30):
        ranks(tmp_path, state, GPT, 1, 1, step=step)
    torch_dist(tmp_path, state, GPT, 1, 1, 0, step=400)
    other = ranks(tmp_path / "other", state, GPT, 1, 1, step=5).parent
    (other / "latest_checkpointed_iteration.txt").write_text("5")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("200\n")
    found = checkpoint.list_checkpoints(tmp_path)
    assert [(c.step, c.kind) for c in found] == [(n, "megatron") for n in (5, 30, 200, 400)]
    assert [checkpoint.is_finished(c.path) for c in found] == [True, True, True, False]
    assert checkpoint.expand_paths([tmp_path]) == [c.path for c in found]
    ckpt = checkpoint.open(tmp_path)
    assert ckpt.step == 200 and ckpt.config == GPT
    converted = checkpoint.convert(found[0].path, tmp_path / "converted")
    assert torch.equal(logits(checkpoint.load_model(converted, "float32")), logits(make_model(GPT)))
    assert len({checkpoint.fingerprint(c.path) for c in found}) == 4
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("../../etc")
    assert "has no directory '../../etc'" in refusal(tmp_path)
    (tmp_path / "run-2").mkdir()  # which lost its iterations: not passed over
    shutil.copy(tmp_path / "latest_checkpointed_iteration.txt", tmp_path / "run-2")
    assert checkpoint.is_checkpoint(tmp_path / "run-2") and not checkpoint.is_checkpoint(other)
    assert "has no directory" in refusal(tmp_path / "run-2")
    shutil.move(found[0].path, tmp_path / "release")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release")
    assert checkpoint.is_finished(tmp_path / "release") and right(tmp_path / "release", GPT)


def test_ranks_that_are_missing_or_of_another_save(tmp_path):
    state = core_state(make_model(LLAMA))
    path = ranks(tmp_path / "a", state, LLAMA, 2, 2)
    other = ranks(tmp_path / "b", state, LLAMA, 2, 2, step=7)
    alone = ranks(tmp_path / "c", state, LLAMA, 1, 1)

    def of(folder, rank):
        return folder / f"mp_rank_{rank}/model_optim_rng.pt"

    kept = of(path, "01_000").read_bytes()
    of(path, "01_000").unlink()
    assert "lacks the file of tensor rank 1, stage 0" in refusal(path)
    of(path, "01_000").write_bytes(of(other, "01_000").read_bytes())
    assert "is of iteration 7, the first rank's of 100" in refusal(path)
    of(path, "01_000").write_bytes(of(path, "01_001").read_bytes())
    assert "holds other weights than" in refusal(path)
    of(path, "01_000").write_bytes(kept)
    for rank in ("01_000", "01_001"):
        shutil.rmtree(path / f"mp_rank_{rank}")
    assert "tensor_model_parallel_size 2, there are files of 1" in refusal(path)
    (alone / "mp_rank_00").rename(alone / "mp_rank_00_000_001")
    assert "lacks the file of tensor rank 0, stage 0, rank 0 of experts" in refusal(alone)
    state.pop("decoder.layers.0.mlp.linear_fc2.weight")
    assert "1 missing: blocks.0.mlp.fc2.weight" in refusal(
        ranks(tmp_path / "d", state, LLAMA, 2, 1)
    )


def test_old_orders_of_rows_are_refused(tmp_path):
    state = core_state(make_model(GPT))
    for version in (0, 1.0, None):
        path = ranks(tmp_path / f"{version}", state, GPT, 1, 1, version=version)
        assert "checkpoint_version" in refusal(path) and "another order" in refusal(path)


def test_a_save_that_goes_on(tmp_path):
    state = core_state(make_model(GPT))
    path = torch_dist(tmp_path, state, GPT, 1, 1, 0)
    metadata = (path / "metadata.json").read_bytes()
    (path / "metadata.json").unlink()
    assert "lacks metadata.json: the save is going on" in refusal(path)
    assert not checkpoint.is_complete(path) and checkpoint.is_finished(path) is False
    (path / ".metadata").rename(path / "later")
    (path / "metadata.json").write_bytes(metadata)
    assert "no .metadata" in refusal(path)
    (path / "later").rename(path / ".metadata")
    assert checkpoint.is_complete(path) and checkpoint.is_finished(path)
    (path / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    assert "Megatron's format 'zarr', which is not read" in refusal(path)
    for bad in ("[]", "{", '{"sharded_backend": 3}'):
        (path / "metadata.json").write_text(bad)
        refusal(path)


class Hostile:
    def __reduce__(self):
        return __import__("os").system, ("touch harmed",)


def test_pickles_are_read_as_data(tmp_path, monkeypatch):
    """Namespaces, enums, paths and classes of a trainer that is not there; and what would run."""
    monkeypatch.chdir(tmp_path)
    made = types.ModuleType("megatron_settings")
    sys.modules[made.__name__] = made
    made.Kind = enum.Enum("Kind", {"encoder": 1}, module=made.__name__)
    state = core_state(make_model(LLAMA))
    odd = {"kind": made.Kind.encoder, "save": pathlib.Path("x"), "dtype": torch.bfloat16,
           "nested": argparse.Namespace(a=[1]), "extra": io.BytesIO(b"state")}  # fmt: skip
    path = ranks(tmp_path / "a", state, LLAMA, 1, 1, **odd)
    stored = torch_dist(tmp_path / "b", state, LLAMA, 1, 1, 0, **odd)
    del sys.modules[made.__name__]
    assert right(path, LLAMA) and right(stored, LLAMA)
    for bad in ({"args": Hostile()}, {"rng_state": [Hostile()]}):
        contents = about(LLAMA, 1, 1, 100) | bad
        file = path / "mp_rank_00/model_optim_rng.pt"
        torch.save(contents | {"model": state}, file)
        assert "could run code" in refusal(path)
        torch.save(contents, stored / "common.pt")
        assert "could run code" in refusal(stored)
    assert not (tmp_path / "harmed").exists()


def test_damaged_files(tmp_path):
    """Cut, emptied, swapped; not a number."""
    state = core_state(make_model(LLAMA))
    path = ranks(tmp_path, state, LLAMA, 2, 1)
    for file in sorted(path.glob("*/*.pt")):
        content = file.read_bytes()
        for bad in (
            content[:-50],
            content[: len(content) // 2],
            b"",
            b"<html>",
            b"\x80\x02}q\x00.",
        ):
            file.write_bytes(bad)
            refusal(path)
        for contents in ([], {"model": {}}, {"model": 3}, {"model": {"a": 1}}, {"model": {1: 2}}):
            if isinstance(contents, dict):
                contents = about(LLAMA, 2, 1, 100) | contents
            torch.save(contents, file)
            refusal(path)
        file.write_bytes(content)
    assert right(path, LLAMA)
    for name in state:
        for odd in (torch.tensor(1.0), torch.ones(3), torch.ones(2, 2, dtype=torch.int64)):
            refusal(ranks(tmp_path / "odd", state | {name: odd}, LLAMA, 2, 1))
        left = {n: t for n, t in state.items() if n != name}
        refusal(ranks(tmp_path / "left", left, LLAMA, 2, 1))
        refusal(torch_dist(tmp_path / "odder", state | {name: odd}, LLAMA, 0, 1, 0))
    state["decoder.final_layernorm.weight"][3] = float("nan")
    assert "NaN or Inf: ln_f.weight" in refusal(ranks(tmp_path / "nan", state, LLAMA, 2, 1))


def test_fsdp_of_torch_alone(tmp_path):
    """torch_dcp: the names in a plain torch.distributed.checkpoint, read with --config."""
    state = core_state(make_model(LLAMA), padding=0)
    path = tmp_path / "iter_0000100"
    with warnings.catch_warnings(action="ignore"):
        torch_dcp.save({"model": state, "iteration": 100}, checkpoint_id=path, no_dist=True)
    model = checkpoint.load_model(path, "float32", config=LLAMA)
    assert torch.equal(logits(model), logits(make_model(LLAMA)))
