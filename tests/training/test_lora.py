"""training/lora.py beside PEFT on the same models: gradients, training, files both ways."""

import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from adapter_files import IDS, KINDS, adapted, logits, peft, save, saved_base, transformers
from builders import token_shard, torchrun
from small_models import tiny

import checkpoint
import train
from costs.memory import estimate_memory
from dataset import open_stream
from formats import naming, native
from model import GPTModel
from training import lora
from training.batches import Chopped, TrainBatches
from training.options import LoraOptions, parse

CPU = torch.device("cpu")
TARGETS = {
    "gpt2": ("c_attn", "c_proj"),
    "neox": ("query_key_value", "dense_4h_to_h"),
    "cohere": ("q_proj", "up_proj"),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {kind: saved_base(folder, kind) for kind in KINDS if kind != "opt"}


def ours(base, options, seed=0):
    """(model, adapters) over a base, in float32."""
    torch.manual_seed(seed)
    config = checkpoint.open(base).config
    model, adapters = lora.adapted(str(base), config, options, "float32", CPU)
    return model.eval(), adapters


def with_random_b(adapters, seed=1):
    """B is zero at first: nothing would be seen of A's gradients."""
    torch.manual_seed(seed)
    for p in adapters.parameters():
        p.data.add_(torch.randn_like(p) * 0.05)
    return adapters


def in_peft(base, adapters, folder, **options):
    """PEFT's model of what is written."""
    folder.mkdir()
    adapters.write(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(model, folder, is_trainable=True, **options)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "neox", "cohere", "gpt2"])
@pytest.mark.parametrize("whole", [False, True])
def test_gradients_and_files_are_pefts(kind, whole, bases, tmp_path):
    """All linear layers, or a few and the embeddings: logits, and every gradient by name."""
    targets = TARGETS.get(kind, ("q_proj", "v_proj", "up_proj")) if whole else None
    options = LoraOptions(
        lora_rank=3, lora_alpha=5, lora_targets=targets, lora_rs=whole, train_embeddings=whole
    )
    model, adapters = ours(bases[kind], options)
    with_random_b(adapters)
    theirs = in_peft(bases[kind], adapters, tmp_path / "lora")
    torch.testing.assert_close(model(IDS)[0], logits(theirs), rtol=1e-5, atol=1e-5)

    model(IDS, labels=IDS)[1].backward()
    theirs(input_ids=IDS, labels=IDS).loss.backward()
    for p in adapters.parameters():
        p.data = p.grad  # so that `tensors` names the gradients
    found = adapters.tensors()
    wanted = {
        name.removeprefix("base_model.model.")
        .replace(".default", "")
        .replace("modules_to_save.", ""): p.grad
        for name, p in theirs.named_parameters()
        if p.requires_grad
    }
    assert found.keys() == wanted.keys() and len(found) > 4
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6, msg=name)
        assert gradient.abs().max() > 1e-4, name


def test_merged_by_our_reader_and_by_peft(bases, tmp_path):
    base, folder = bases["llama"], tmp_path / "lora"
    model, adapters = ours(base, LoraOptions(lora_rank=4, train_embeddings=True))
    with_random_b(adapters)
    merged = in_peft(base, adapters, folder).merge_and_unload()
    read = checkpoint.load_model(folder, "float32")
    checkpoint.convert(folder, tmp_path / "merged")
    again = checkpoint.load_model(tmp_path / "merged", "float32")
    for a, b in zip(read.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(logits(read), logits(again))
    torch.testing.assert_close(logits(read), logits(merged), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(read), model(IDS)[0], rtol=1e-5, atol=1e-5)


def test_pefts_files_are_gone_on_from(bases, tmp_path):
    """What PEFT made is loaded part by part, and a tied embedding stays one."""
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    theirs = adapted(bases["llama"], target_modules=targets, lora_alpha=8)
    save(theirs, tmp_path / "theirs")
    model, adapters = ours(bases["llama"], LoraOptions(lora_rank=4, lora_alpha=8))
    adapters.load(tmp_path / "theirs")
    torch.testing.assert_close(model(IDS)[0], logits(theirs), rtol=1e-5, atol=1e-5)
    _, others = ours(bases["llama"], LoraOptions(lora_rank=4, lora_alpha=9))
    with pytest.raises(ValueError, match=r"has other adapters .* rank 4, alpha 8, down_proj"):
        others.load(tmp_path / "theirs")

    tied = saved_base(tmp_path, tie=True)
    model, adapters = ours(tied, LoraOptions(lora_rank=2, train_embeddings=True))
    assert model.lm_head.weight is model.token_embedding.weight
    assert len(adapters.parameters()) == 1 + 2 * 4 * 2
    with_random_b(adapters)
    (tmp_path / "tied").mkdir()
    adapters.write(tmp_path / "tied")
    torch.testing.assert_close(
        logits(checkpoint.load_model(tmp_path / "tied", "float32")),
        model(IDS)[0],
        rtol=1e-5,
        atol=1e-5,
    )


def test_the_base_keeps_its_bits_and_dropout_is_of_the_branch_alone(bases):
    model, adapters = ours(bases["qwen2"], LoraOptions(lora_rank=2, lora_dropout=0.5))
    with_random_b(adapters)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(model(IDS, labels=IDS)[1])
    assert losses[0] == losses[1] != losses[2]
    losses[0].backward()
    optimizer.step()
    for name, p in model.named_parameters():
        assert name not in frozen or (torch.equal(p, frozen[name]) and p.grad is None)
    # the expectation over the masks of one layer is the layer without dropout
    layer = model.blocks[0].attn.out_proj
    x = torch.randn(1, 32)
    mean = layer(x.expand(20_000, 32)).mean(0, keepdim=True)
    torch.testing.assert_close(mean, layer.eval()(x), rtol=0, atol=0.03)


def test_bfloat16_is_pefts_autocast(bases):
    """The frozen weights in bfloat16, A and B in float32: as PEFT has them."""
    config = checkpoint.open(bases["llama"]).config
    torch.manual_seed(0)
    options = LoraOptions(lora_rank=4)
    model, adapters = lora.adapted(str(bases["llama"]), config, options, "bfloat16", CPU)
    kinds = {p.dtype for n, p in model.named_parameters() if p.requires_grad}
    assert kinds == {torch.float32}
    assert model.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(IDS, labels=IDS)[1]
    loss.backward()
    exact, _ = ours(bases["llama"], options)
    assert loss.item() == pytest.approx(exact(IDS, labels=IDS)[1].item(), rel=2e-2)
    assert all(p.grad.isfinite().all() for p in adapters.parameters())


@pytest.mark.parametrize(
    "kind, targets",
    [
        ("llama", None),
        ("llama", ("q_proj", "up_proj")),
        ("qwen2", None),
        ("gpt2", ("c_attn", "c_fc", "c_proj")),
        ("neox", ("query_key_value", "dense")),
    ],
)
@pytest.mark.parametrize("whole", [False, True])
def test_what_compute_counts_is_what_is_held(kind, targets, whole, bases):
    """Bytes of what trains and of what is frozen, to the last one."""
    config = checkpoint.open(bases[kind]).config
    options = LoraOptions(lora_rank=3, lora_targets=targets, train_embeddings=whole)
    model, adapters = lora.adapted(str(bases[kind]), config, options, "bfloat16", CPU)
    run = {"lora_rank": 3, "lora_targets": targets, "train_embeddings": whole}
    states = estimate_memory(config, 2, 8, "bf16", **run)["states"]
    trained = adapters.parameters()
    assert states["adapters"] == sum(p.nbytes for p in trained)
    assert states["optimizer"] == 2 * states["adapters"] == 2 * states["gradients"]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert states["weights"] == sum(p.nbytes for p in frozen)


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
def test_experts_have_no_adapters(kind):
    """All other linear layers have, by default; the experts' names are refused."""
    model = GPTModel(tiny(kind))
    adapters = lora.adapt(model, naming.of_family(kind), LoraOptions(lora_rank=3))
    assert not [name for name in adapters.places if "experts." in name.replace("_expert.", "")]
    states = estimate_memory(model.config, 2, 8, "fp32", lora_rank=3)["states"]
    assert states["adapters"] == sum(p.nbytes for p in adapters.parameters())
    with pytest.raises(ValueError, match="--lora-targets w1: no linear layer of the blocks"):
        lora.adapt(GPTModel(tiny(kind)), naming.of_family(kind), LoraOptions(3, None, 0.0, ("w1",)))


def test_deep_frozen_models_recompute_blocks_by_twos():
    """As compute.py has it: half of what blocks begin with is kept, and a block more is held."""
    config, held = tiny("llama", n_layers=24), []
    model = GPTModel(config)
    lora.adapt(model, "llama", LoraOptions(lora_rank=3))
    assert model.recomputed_together == 2
    for n in (26, 24):
        run = {"lora_rank": 3, "recompute": "full"}
        found = estimate_memory(config.replace(n_layers=n), 2, 64, "bf16", **run)
        held.append(found["parts"]["activations"])
    assert held[0] - held[1] == 2 * 64 * 4 * config.d_model  # one stream for two blocks


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--lora-alpha 4", "--lora-alpha needs --lora-rank"),
        ("--train-embeddings", "--train-embeddings needs --lora-rank"),
        ("--lora-rank 4 --lora-dropout 1", "--lora-dropout must be from 0 to below 1"),
    ],
)
def test_no_flag_is_ignored(flags, said):
    with pytest.raises(ValueError, match=said):
        parse(["--checkpoint-path", "x", "--init-from", "y", *flags.split()], "")


def test_odd_targets_and_bases_are_refused(bases, tmp_path):
    for target, said in (
        ("qkv_proj", "--lora-targets qkv_proj: no linear layer of the blocks is called so; there "),
        ("lm_head", "q_proj, up_proj, v_proj; --train-embeddings trains"),
        ("proj", "are down_proj, gate_proj"),
    ):
        with pytest.raises(ValueError, match=said):
            ours(bases["llama"], LoraOptions(lora_rank=2, lora_targets=("q_proj", target)))
    save(adapted(bases["llama"], target_modules=["q_proj"]), tmp_path / "lora")
    with pytest.raises(ValueError, match="is an adapter: merge it into its base first"):
        lora.adapted(str(tmp_path / "lora"), None, LoraOptions(lora_rank=2), "float32", CPU)


# ---------------------------------------------------------------------------------------------
# train.py


@pytest.fixture(scope="module")
def flags_of(bases, tmp_path_factory):
    """flags_of(folder, *more): of a tiny run over the small Llama, on the CPU."""
    data = tmp_path_factory.mktemp("data")
    for name, n in (("train", 20_000), ("val", 500)):
        np.save(data / f"{name}.npy", (np.load(token_shard(data / "ids.npy", n)) % 96))

    def flags(folder, *more):
        words = ["--init-from", bases["llama"], "--tokenizer-name", "byte", "--device", "cpu"]
        words += ["--data-mode", "fineweb_npy", "--train-npy", data / "train.npy", "--seq-len", 32]
        words += ["--val-npy", data / "val.npy", "--log-steps", 1, "--lora-rank", 4]
        words += ["--warmup-steps", 2, "--lr", "1e-2", "--checkpoint-path", folder, *more]
        return [str(word) for word in words]

    flags.data = data
    return flags


def test_steps_are_pefts_with_adamw(flags_of, bases, tmp_path):
    """Five steps on the same windows, by hand: every trained number to 1e-5."""
    more = ["--num-steps", 5, "--eval-steps", 5, "--batch-size", 4, "--lora-alpha", 16]
    train.main(
        flags_of(tmp_path / "run", *more, "--train-embeddings", "--lr-scheduler", "constant")
    )
    _, start = ours(bases["llama"], LoraOptions(4, 16, train_embeddings=True), seed=42)
    theirs = in_peft(bases["llama"], start, tmp_path / "start").train()
    trained = [p for p in theirs.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    stream = open_stream("fineweb_npy", [flags_of.data / "train.npy"], None)
    batches = TrainBatches([Chopped(stream, 32)], 4, 42)
    for step in range(5):
        optimizer.param_groups[0]["lr"] = 1e-2 * min(1, (step + 1) / 2)
        inputs, targets = (torch.from_numpy(x) for x in batches.batch(step)[:2])
        out = theirs(input_ids=inputs).logits
        F.cross_entropy(out.flatten(0, 1), targets.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    opened = checkpoint.open(tmp_path / "run/checkpoint-5")
    assert opened.kind == "adapter" and (opened.step, opened.facts["tokens"]) == (5, 5 * 4 * 32)
    [info] = checkpoint.list_checkpoints(tmp_path / "run")
    assert (info.kind, info.step) == ("adapter", 5) and checkpoint.is_finished(info.path)
    save(theirs, tmp_path / "theirs")
    files = [
        tmp_path / name / "adapter_model.safetensors" for name in ("run/checkpoint-5", "theirs")
    ]
    a, b = map(safetensors.torch.load_file, files)
    assert a.keys() == b.keys()
    for name, wanted in b.items():
        torch.testing.assert_close(a[name], wanted, rtol=1e-5, atol=1e-5, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(
            logits(opened.load("float32")), logits(theirs.eval()), rtol=1e-4, atol=1e-4
        )


def test_a_truncated_adapter_of_ours_is_noticed(bases, tmp_path):
    _, adapters = ours(bases["llama"], LoraOptions(lora_rank=2))
    optimizer = torch.optim.AdamW(adapters.parameters())
    state = {"epoch": 0, "step": 3, "loss": 2.0, "extra": {"base": adapters.base_fingerprint}}
    state |= {"optimizer": optimizer.state_dict(), "scheduler": None}
    path = native.save_state(state, tmp_path, adapters.write, keep=None)
    assert adapters.resume(path, optimizer, None) == 3
    weights = path / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for content in (whole[:-1], whole + b"x", b""):
        weights.write_bytes(content)
        with pytest.raises(ValueError, match="its manifest says"):
            checkpoint.open(path)
        assert not checkpoint.is_complete(path)
    weights.write_bytes(whole)
    assert checkpoint.open(path).step == 3
    weights.rename(path / "adapter_model.bin")  # a file of which it knows nothing
    with pytest.raises(ValueError, match="its manifest says"):
        checkpoint.open(path)


def test_resuming_is_exact_and_two_ranks_learn_what_one_does(flags_of, bases, tmp_path):
    """Accumulation and the embeddings included, on one rank dropout too."""
    more = ["--num-steps", 6, "--eval-steps", 3, "--grad-accum-steps", 2, "--train-embeddings"]
    more += ["--lora-targets", "v_proj", "down_proj"]

    def start(folder, n, *flags):
        words = flags_of(folder, *more, "--batch-size", 2 if n == 0 else 1, *flags)
        return torchrun(n, "train.py", *words) if n else train.main(words)

    for n, flags in ((0, ["--lora-dropout", "0.1"]), (2, [])):
        whole, cut = tmp_path / f"whole-{n}", tmp_path / f"cut-{n}"
        start(whole, n, *flags)
        cut.mkdir()
        shutil.copytree(whole / "checkpoint-3", cut / "checkpoint-3")
        start(cut, n, *flags, "--resume")
        assert state_of(whole / "checkpoint-6") == state_of(cut / "checkpoint-6")

    start(tmp_path / "one", 0)
    folders = tmp_path / "one/checkpoint-6", tmp_path / "whole-2/checkpoint-6"
    a, b = (safetensors.torch.load_file(f / "adapter_model.safetensors") for f in folders)
    for name, wanted in a.items():
        torch.testing.assert_close(b[name], wanted, rtol=1e-3, atol=1e-4, msg=name)
    for said, *wrong in (
        ("has other adapters than these --lora-", "--resume", "--lora-alpha", 9),
        ("was trained over other weights", "--resume", "--init-from", bases["qwen2"]),
        ("--resume goes on from checkpoint-6", "--num-steps", 7),
    ):
        with pytest.raises(ValueError, match=said):
            start(tmp_path / "one", 0, *wrong)


def state_of(path):
    """Everything an adapter's checkpoint holds, as bytes."""
    state = torch.load(path / "trainer_state.pt", weights_only=True)
    flat = torch.utils._pytree.tree_flatten(state)[0]
    tensors = [t.numpy().tobytes() if isinstance(t, torch.Tensor) else t for t in flat]
    return tensors, (path / "adapter_model.safetensors").read_bytes()
