"""training/low_rank.py and adapters over packed weights: beside PEFT over weights that are rounded
by hand, what is held, resuming."""

import shutil

import numpy as np
import pytest
import torch
from adapter_files import IDS, adapted, logits, peft, save, saved_base, transformers
from builders import token_shard

import checkpoint
import train
from modeling.mlp import Linear
from quantisation.linear import PackedWeight
from training import lora
from training.low_rank import LowRank
from training.options import LoraOptions, parse

CPU = torch.device("cpu")
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return saved_base(tmp_path_factory.mktemp("base"), "llama")


def ours(base, **options):
    """(model, adapters) over a base, in float32, with B not zero."""
    torch.manual_seed(0)
    config, options = checkpoint.open(base).config, LoraOptions(4, **options)
    model, adapters = lora.adapted(str(base), config, options, "float32", CPU)
    for p in adapters.parameters():
        p.data.add_(torch.randn_like(p) * 0.05)
    return model.train(), adapters


def rounded_by_hand(weight, bits, group):
    """Symmetric, absmax over the largest code, halves to even, groups along a row; in numpy."""
    rows = weight.numpy().astype(np.float32)
    most = np.float32(2 ** (bits - 1) - 1)
    for row in rows:
        for start in range(0, len(row), group):
            part = row[start : start + group]
            scale = max(np.abs(part).max(), np.float32(1e-5)) / most
            row[start : start + group] = np.clip(np.rint(part / scale), -most - 1, most) * scale
    return torch.from_numpy(rows)


def grads_by_name(adapters):
    for p in adapters.parameters():
        p.data = p.grad  # so that `tensors` names the gradients
    return adapters.tensors()


@pytest.mark.parametrize("rule, bits, group", [("rtn-w4-g16", 4, 16), ("rtn-w8", 8, 10**6)])
@pytest.mark.parametrize("targets", [None, ("v_proj", "down_proj")])
def test_gradients_are_pefts_over_weights_rounded_by_hand(
    rule, bits, group, targets, base, tmp_path
):
    """All adapted, or gradients that pass through packed layers without adapters."""
    model, adapters = ours(base, quantise=rule, lora_targets=targets)
    adapters.write(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if name.split(".")[-2] in ALL:
                p.copy_(rounded_by_hand(p, bits, group))
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path, is_trainable=True)
    torch.testing.assert_close(model(IDS)[0], logits(theirs), rtol=1e-5, atol=1e-5)
    model(IDS, labels=IDS)[1].backward()
    theirs(input_ids=IDS, labels=IDS).loss.backward()
    found = grads_by_name(adapters)
    wanted = {
        name.removeprefix("base_model.model.").replace(".default", ""): p.grad
        for name, p in theirs.named_parameters()
        if p.requires_grad
    }
    assert found.keys() == wanted.keys() and len(found) >= 8
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6, msg=name)
        assert gradient.abs().max() > 1e-4, name


@pytest.mark.parametrize("rule", ["rtn-w4-g16-asym", "rtn-w3-g32", "fp8"])
def test_packed_is_its_dense_twin_to_the_bit_and_keeps_no_copy(rule, base):
    """Whatever packs: the loss and every gradient, and what waits for the backward pass."""
    packed, adapters = ours(base, quantise=rule, lora_dropout=0.2)
    dense, others = ours(base, lora_dropout=0.2)
    shapes = set()
    for name, module in packed.named_modules():
        if isinstance(module, LowRank):
            assert isinstance(module.packed, PackedWeight)
            twin = dense.get_submodule(name)
            assert not torch.equal(twin.weight, module.packed.dense(torch.float32))
            twin.weight.data.copy_(module.packed.dense(torch.float32))
            shapes.add(twin.weight.shape)
    assert len(shapes) == 4 and not shapes & {p.shape for p in packed.blocks.parameters()}
    kept, losses = [], []
    for model in (packed, dense):
        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            losses.append(model(IDS, labels=IDS)[1])
        if model is packed:  # the head is dense, and frozen
            assert not shapes & {t.shape for t in kept} and len(kept) > 20
        losses[-1].backward()
    assert torch.equal(*losses)
    for a, b in zip(adapters.parameters(), others.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad) and a.grad.abs().max() > 0


@pytest.mark.slow  # it compiles, for most of a minute
@pytest.mark.parametrize("rule", [None, "rtn-w4-g16", "rtn-w4-g16-asym"])
def test_compiled_blocks_give_the_same_gradients(rule, base):
    """In training and without gradients, with layers that nothing trained comes before."""
    model, adapters = ours(base, quantise=rule, lora_targets=("v_proj", "down_proj"))
    torch._dynamo.reset()
    found, quiet = [], []
    for compiled in (False, True):
        if compiled:
            for block in model.blocks:
                block.compile(dynamic=False, backend="aot_eager", fullgraph=True)
        model.zero_grad()
        model(IDS, labels=IDS)[1].backward()
        found.append([p.grad for p in adapters.parameters()])
        quiet.append(logits(model.eval()))
        model.train()
    torch.testing.assert_close(*quiet, rtol=1e-6, atol=1e-6)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_a_part_may_stay_dense_and_ends_train_whole(base):
    model, adapters = ours(base, quantise="rtn-w4", quantise_skip=("*.fc1",), train_embeddings=True)
    for block in model.blocks:
        assert block.mlp.fc1.held()[0] == ("", []) and block.mlp.fc2.held()[0][0] == "int4"
    model(IDS, labels=IDS)[1].backward()
    assert all(p.grad is not None for p in adapters.parameters())
    assert adapters.quantisation == {
        "rule": "rtn-w4-channel-sym-absmax",
        "embeddings": False,
        "skip": ["*.fc1"],
    }
    assert isinstance(model.blocks[0].mlp.fc1, Linear)


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--quantise rtn-w4", "--quantise needs --lora-rank"),
        ("--lora-rank 4 --quantise-skip x", "--quantise-skip goes with --quantise RULE"),
        ("--lora-rank 4 --quantise bf16", "packed by a rule of 8 bits or fewer"),
        ("--lora-rank 4 --quantise rtn-w8a8", "leaves activations alone"),
        ("--lora-rank 4 --quantise w4", "w4"),
    ],
)
def test_flags_that_do_not_go(flags, said):
    with pytest.raises(ValueError, match=said):
        parse(["--checkpoint-path", "x", "--init-from", "y", *flags.split()], "")


@pytest.mark.parametrize(
    "options, said",
    [
        ({"use_dora": True}, "has dora"),
        ({"rank_pattern": {"q_proj": 2}}, "has rank_pattern"),
        ({"alpha_pattern": {"q_proj": 2}}, "has alpha_pattern"),
        ({"layers_to_transform": [1]}, "other modules than these flags adapt: model.layers.0"),
    ],
)
def test_what_would_be_lost_is_not_gone_on_from(options, said, base, tmp_path):
    save(adapted(base, target_modules=list(ALL), lora_alpha=8, **options), tmp_path)
    _, adapters = ours(base, lora_alpha=8)
    with pytest.raises(ValueError, match=said):
        adapters.load(tmp_path)


def test_resuming_is_exact_and_the_rule_is_noted(base, tmp_path):
    """The adapter read again is merged into the base as it lies on disk, and says what it was
    trained over; another rule is refused."""
    np.save(tmp_path / "train.npy", np.load(token_shard(tmp_path / "ids.npy", 5000)) % 96)

    def start(folder, *more):
        words = ["--init-from", base, "--tokenizer-name", "byte", "--device", "cpu", "--lr", "1e-2"]
        words += ["--data-mode", "fineweb_npy", "--train-npy", tmp_path / "train.npy"]
        words += ["--seq-len", 32, "--batch-size", 2, "--num-steps", 4, "--eval-steps", 2]
        words += ["--lora-rank", 4, "--warmup-steps", 1, "--checkpoint-path", folder, *more]
        train.main([str(word) for word in words])

    whole, cut, rule = tmp_path / "whole", tmp_path / "cut", ("--quantise", "rtn-w4-g16")
    start(whole, *rule)
    cut.mkdir()
    shutil.copytree(whole / "checkpoint-2", cut / "checkpoint-2")
    start(cut, *rule, "--resume")
    folders = whole / "checkpoint-4", cut / "checkpoint-4"
    a, b = (torch.load(folder / "trainer_state.pt", weights_only=True) for folder in folders)
    flat = [torch.utils._pytree.tree_flatten(state)[0] for state in (a, b)]
    for x, y in zip(*flat, strict=True):
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
    a, b = ((folder / "adapter_model.safetensors").read_bytes() for folder in folders)
    assert a == b
    opened = checkpoint.open(whole / "checkpoint-4")
    full = "rtn-w4-g16-sym-absmax"
    assert opened.describe()["trained_over"] == full
    assert peft.PeftConfig.from_pretrained(whole / "checkpoint-4").r == 4
    merged, dense = opened.load("float32"), checkpoint.load_model(base, "float32")
    change = merged.blocks[0].mlp.fc2.weight - dense.blocks[0].mlp.fc2.weight
    assert 0 < torch.linalg.matrix_rank(change, rtol=1e-4) <= 4  # B A, and no rounding
    for more, now in ((("--quantise", "rtn-w8"), "under rtn-w8-"), ((), "as they are")):
        with pytest.raises(ValueError, match=f"trained over weights under {full}, not {now}"):
            start(cut, *more, "--resume")
