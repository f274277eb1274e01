"""formats/dcp.py: what torch.distributed.checkpoint writes, whole, damaged, hostile, half done."""

import io
import json
import pickle
import shutil
import warnings

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from builders import run_ranks, saved_checkpoint, tiny_model, token_shard
from checkpoint_files import CONFIGS, IDS, logits, make_model, refused
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

import checkpoint
import eval as perplexity
import results
import sweep
from checkpoint import inspect, is_complete, is_finished, list_checkpoints, load_model
from formats import layouts

# What the ranks save, in their own process group: FSDP2 over all of them with its optimizer, the
# same as accelerate lays it down, and DTensors on a mesh of two dimensions.
SAVE = """
import torch.distributed as td, torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
import checkpoint
if not td.is_initialized():
    td.init_process_group("gloo")
model = checkpoint.load_model(FOLDER + "/saved", "float32").requires_grad_()
full = {name: t.clone() for name, t in model.state_dict().items()}
for block in model.blocks:
    fully_shard(block)
fully_shard(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
model(torch.zeros(1, 4, dtype=torch.int64))[0].sum().backward()
optimizer.step()
weights, states = get_state_dict(model, optimizer)
class App:
    def state_dict(self):
        return {"model": weights, "optim": states}
    def load_state_dict(self, state):
        pass
dcp.save({"app": App(), "step": 3, "note": {"a": [1.5, "x"]}}, checkpoint_id=FOLDER + "/step-3")
dcp.save({"model": weights}, checkpoint_id=FOLDER + "/checkpoint-7/pytorch_model_fsdp_0")
dcp.save(states, checkpoint_id=FOLDER + "/checkpoint-7/optimizer_0")
if td.get_world_size() == 4:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
    kinds = [(Shard(0), Shard(1)), (Shard(1), Shard(0)), (Shard(0), Shard(0))]
    kinds.append((Replicate(), Shard(0)))
    cut = {}
    for i, (name, t) in enumerate(full.items()):
        kind = kinds[i % 4] if t.dim() == 2 else (Replicate(), Replicate())
        cut[name] = distribute_tensor(t, mesh, kind)
    dcp.save(cut, checkpoint_id=FOLDER + "/mesh-9")
    dcp.save(full, checkpoint_id=FOLDER + "/replicated-11")
"""


@pytest.fixture(scope="module", params=[pytest.param(2, marks=pytest.mark.slow), 4])
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"ranks{request.param}")
    model = make_model(CONFIGS["llama"])
    shutil.move(checkpoint.save_checkpoint(model, None, None, 0, 1, 1.0, folder), folder / "saved")
    run_ranks(request.param, folder, SAVE.replace("FOLDER", repr(str(folder))))
    shutil.copy(folder / "saved/config.json", folder / "checkpoint-7")
    (folder / "checkpoint-7/trainer_state.json").write_text('{"global_step": 7}')
    return folder, model


def test_what_ranks_saved(run):
    folder, model = run
    for name in ("step-3", "mesh-9", "replicated-11"):
        if not (folder / name).exists():
            continue
        ckpt = checkpoint.open(folder / name, model.config)
        assert (ckpt.kind, ckpt.step) == ("dcp", int(name[-2:].strip("-")))
        assert torch.equal(logits(ckpt.load("float32")), logits(model))
        assert not any(word in key for key in ckpt.tensors for word in ("optim", "exp_avg", "note"))
    pieces = [t.pieces for t in checkpoint.open(folder / "step-3", model.config).tensors.values()]
    assert max(map(len, pieces)) == len(list((folder / "step-3").glob("*.distcp")))
    with pytest.raises(ValueError, match="has no config"):
        load_model(folder / "step-3")


def test_as_accelerate_lays_it_down(run, tmp_path, capsys):
    """config.json and the step from the directory above, for either of the two."""
    folder, model = run
    for path in (folder / "checkpoint-7", folder / "checkpoint-7/pytorch_model_fsdp_0"):
        ckpt = checkpoint.open(path)
        assert (ckpt.step, ckpt.config, ckpt.layout) == (7, model.config, "native")
        assert torch.equal(logits(ckpt.load("float32")), logits(model))
        assert is_finished(path) and is_complete(path)
    found = {c.name: (c.step, c.kind) for c in list_checkpoints(folder)}
    assert found["checkpoint-7"] == (7, "dcp") and found["step-3"] == (3, "dcp")
    checkpoint.main(["convert", str(folder / "checkpoint-7"), str(tmp_path / "out")])
    assert torch.equal(logits(load_model(tmp_path / "out", "float32")), logits(model))
    again = make_model(model.config, seed=1)
    checkpoint.load_weights(folder / "checkpoint-7", again)
    assert torch.equal(logits(again), logits(model))


# ---------------------------------------------------------------------------------------------
# One process, for what can be wrong


@pytest.fixture
def saved(tmp_path):
    """(directory, model) of a save by one process, under the names of Hugging Face."""
    model = make_model(CONFIGS["llama"])
    path = tmp_path / "step-5"
    save(dict(layouts.views(model, "llama")), path)
    return path, model


def save(state, path, **options):
    with warnings.catch_warnings(action="ignore"):
        writer = torch_dcp.FileSystemWriter(path, **options)
        torch_dcp.save(state, storage_writer=writer, no_dist=True)


def change(path, edit):
    """Edit .metadata as torch has it."""
    file = path / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    edit(metadata)
    file.write_bytes(pickle.dumps(metadata))


NAME = "model.layers.0.mlp.up_proj.weight"  # [48, 32]
INDEX = MetadataIndex(NAME, (0, 0))


def test_any_dtype_and_stride(tmp_path):
    model = make_model(CONFIGS["llama"])
    state = {n: t.contiguous().t().contiguous().t() for n, t in layouts.views(model, "llama")
             if t.dim() == 2}  # fmt: skip
    state |= {n: t.bfloat16() for n, t in layouts.views(model, "llama") if t.dim() == 1}
    save({"state_dict": state, "rng_state": torch.ones(3)}, tmp_path / "a")
    got = dict(layouts.views(load_model(tmp_path / "a", "float32", config=model.config), "llama"))
    assert all(torch.equal(got[n], t.to(got[n].dtype)) for n, t in state.items())


def test_several_threads_and_old_wrappers(tmp_path):
    model = make_model(CONFIGS["llama"])
    state = {f"_fsdp_wrapped_module.{n}": t for n, t in layouts.views(model, "llama")}
    save({"model": state}, tmp_path / "a", thread_count=3)
    assert len(list((tmp_path / "a").glob("*.distcp"))) == 3
    loaded = load_model(tmp_path / "a", "float32", config=model.config)
    assert torch.equal(logits(loaded), logits(model))


def test_a_save_in_progress_is_no_checkpoint_yet(saved):
    path, model = saved
    metadata = (path / ".metadata").read_bytes()
    (path / ".metadata").rename(path / ".metadata.tmp")
    assert [c.kind for c in list_checkpoints(path.parent)] == ["dcp"]
    assert is_finished(path) is False and not is_complete(path)
    refused(path, "no .metadata: the save is going on or was broken off", config=model.config)
    (path / "__0.metadata").write_bytes(metadata)  # each rank its own: no sign
    assert is_finished(path) is None and is_complete(path)
    assert torch.equal(logits(load_model(path, "float32", config=model.config)), logits(model))


def test_files_that_are_missing_cut_or_of_another_save(saved):
    path, model = saved
    (file,) = path.glob("*.distcp")
    content = file.read_bytes()
    file.unlink()
    refused(path, "lacks __0_0.distcp, which holds a part of", config=model.config)
    file.write_bytes(content[:-5000])
    refused(path, "ends at byte .*, a part of it at", config=model.config)
    file.write_bytes(bytes(len(content)))
    refused(path, "no archive of torch.save", config=model.config)
    file.write_bytes(content)
    other = make_model(CONFIGS["llama"].replace(vocab_size=96), seed=1)
    save(dict(layouts.views(other, "llama")), path.parent / "step-6")
    shutil.copy(path.parent / "step-6/__0_0.distcp", file)
    refused(path, "not of one save|truncated|no archive|damaged|ends at", config=model.config)
    file.write_bytes(content)
    (piece,) = checkpoint.open(path, model.config).tensors[NAME].pieces
    flipped = bytearray(content)
    flipped[piece.offset + 100] ^= 1
    file.write_bytes(flipped)
    with pytest.raises(ValueError, match=r"__0_0\.distcp is damaged: the checksum at byte"):
        load_model(path, "float32", config=model.config)


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda m: m.state_dict_metadata[NAME].chunks.clear(), "knows of no part of"),
        (
            lambda m: m.state_dict_metadata[NAME].chunks.append(
                ChunkStorageMetadata((0, 0), (48, 32))
            ),
            "overlaps",
        ),
        (
            lambda m: setattr(m.state_dict_metadata[NAME], "size", torch.Size((50, 32))),
            "hold 1,536 of its 1,600",
        ),
        (
            lambda m: setattr(m.state_dict_metadata[NAME], "size", torch.Size((1 << 40, 1 << 20))),
            "hold 1,536 of its 1,152,921,504,606,846,976",
        ),
        (
            lambda m: setattr(m.state_dict_metadata[NAME].chunks[0], "sizes", torch.Size((32, 48))),
            r"holds torch.float32 \[48, 32\] at byte .* not of one save",
        ),
        (
            lambda m: setattr(m.state_dict_metadata[NAME].chunks[0], "offsets", torch.Size((1, 0))),
            r"does not say where .* \[1, 0\] lies",
        ),
        (lambda m: m.storage_data.pop(INDEX), "does not say where"),
        (lambda m: setattr(m.storage_data[INDEX], "relative_path", "../x"), "lie beside it"),
        (lambda m: setattr(m.storage_data[INDEX], "relative_path", "x.distcp"), "lacks x.distcp"),
        (lambda m: setattr(m.storage_data[INDEX], "offset", 1 << 60), "ends at byte"),
        (lambda m: setattr(m.storage_data[INDEX], "offset", -1), "ends at byte"),
        (lambda m: setattr(m.storage_data[INDEX], "length", 100), "truncated"),
        (lambda m: setattr(m.storage_data[INDEX], "offset", "0"), "at which byte"),
        (
            lambda m: setattr(m.storage_data[INDEX], "transform_descriptors", ["zstd"]),
            "an extension that is not read",
        ),
        (lambda m: setattr(m, "storage_data", None), "no metadata of torch.distributed"),
        (lambda m: m.state_dict_metadata.clear(), "holds no tensors of a model"),
        (lambda m: m.state_dict_metadata.pop(NAME), "1 missing: |not known here"),
    ],
)
def test_metadata_that_does_not_hold(saved, edit, match):
    path, model = saved
    change(path, edit)
    refused(path, match, config=model.config)


class Call:
    def __init__(self, function, *args):
        self.how = function, args

    def __reduce__(self):
        return self.how


@pytest.mark.parametrize(
    ("function", "name"),
    [(eval, "eval"), (shutil.rmtree, "rmtree"), (torch.load, "torch.serialization.load"),
     (io.open, "open"), (getattr, "getattr"), (torch.Tensor, "Tensor")],
)  # fmt: skip
def test_hostile_metadata(saved, tmp_path, function, name):
    path, model = saved
    change(path, lambda m: setattr(m, "planner_data", Call(function, str(tmp_path))))
    refused(path, f"{name}.*could run code", config=model.config)
    assert path.exists()


def pickled(*parts):
    return b"\x80\x04" + b"".join(parts)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "is empty"),
        (b"\x80\x04", "damaged or no pickle"),
        (pickled(b"X\xff\xff\xff\x7fabc."), "damaged or no pickle"),  # a text of 2 GB
        (pickled(b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f."), "damaged or no pickle"),
        (pickled(b"K\x01r\xff\xff\xff\x7f."), "no metadata of"),  # a memo of 2 billion places
        (pickled(b"h\x05."), "damaged or no pickle"),
        (pickled(b"(" * 1000, b"t" * 999, b"."), "no metadata of"),
        (pickled(b")" + b"\x85" * 100_000 + b"."), "no metadata of"),  # deep
        (
            pickled(b")" + b"2\x86" * 60 + b"."),
            "no metadata of",
        ),  # 2^60, if copied
        (pickled(b"}", b")" + b"q\x00h\x00\x86" * 60 + b"K\x01s."), "damaged or no pickle"),
        (pickled(b"cos\nsystem\nX\x04\x00\x00\x00true\x85R."), "os.system.*could run code"),
        (pickled(b"\x8c\x02os\x8c\x06system\x93."), "os.system.*could run code"),
        (pickled(b"\x82\x01."), "instruction 0x82"),  # the extension registry
        (pickled(b"(ios\nsystem\n."), "os.system.*could run code"),
        (b"<!DOCTYPE html>", "web page"),
        (b"not a pickle", "damaged|instruction"),
    ],
)
def test_broken_metadata(saved, content, match):
    path, model = saved
    (path / ".metadata").write_bytes(content)
    refused(path, match, config=model.config)


@pytest.mark.parametrize("what", ["nan", "int"])
def test_what_boxes_hold(saved, what):
    path, model = saved
    state = dict(layouts.views(model, "llama"))
    if what == "nan":
        state[NAME] = state[NAME].clone()
        state[NAME][3, 4] = float("nan")
    if what == "int":
        state[NAME] = state[NAME].long()
    shutil.rmtree(path)
    save(state, path)
    match = {"nan": "1 of 21 tensors hold NaN", "int": "of a type that is not float32.*int64"}
    refused(path, match[what], config=model.config)


def test_inspect_reads_no_object(saved):
    path, model = saved
    said = inspect(path, model.config)
    assert said["parameters"] == sum(p.numel() for p in model.parameters())
    assert (said["kind"], said["step"], said["dtypes"]) == ("dcp", 5, ["float32"])
    assert "n_heads" in inspect(path)["note"]
    json.dumps(said)


def test_a_family_with_llamas_names_is_right_or_refused(tmp_path):
    """Cohere's rotary pairs are neighbours, and only config.json says so."""
    transformers = pytest.importorskip("transformers")
    config = transformers.CohereConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    theirs = transformers.CohereForCausalLM(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) * 0.2)
        wanted = theirs(IDS).logits
    save({"model": theirs.state_dict()}, tmp_path / "step-3")
    config.save_pretrained(tmp_path / "step-3")
    try:
        got = logits(load_model(tmp_path / "step-3", "float32"))
    except ValueError as error:
        assert "cohere" in str(error)
    else:
        assert torch.allclose(got, wanted, atol=1e-5)


def test_evaluations_and_sweeps_take_it_as_any_other(tmp_path, capsys):
    """The same loss as of our own checkpoint, by eval.py and by a sweep; a save that was broken off
    beside it is a failure with its reason."""
    ours = saved_checkpoint(tmp_path / "ours", 10, kind="llama")
    path = tmp_path / "run/step-10"
    save({"model": dict(layouts.views(tiny_model("llama", 10), "llama"))}, path)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ours / name, path)
    shutil.copytree(path, tmp_path / "run/step-20")
    (tmp_path / "run/step-20/.metadata").unlink()
    shard = token_shard(tmp_path / "x.npy")
    words = ["--data-mode", "fineweb_npy", "--val-npy", shard, "--seq-len", 32, "--device", "cpu"]
    words = [str(word) for word in words]
    for number, which in enumerate((ours, path)):
        out = ["--results-dir", str(tmp_path / f"results-{number}")]
        perplexity.main(["--checkpoint-path", str(which), *words, *out])
    one, two = (results.load_records(tmp_path / f"results-{n}")[0] for n in (0, 1))
    assert one["metrics"]["loss"] == two["metrics"]["loss"]
    assert two["checkpoint"]["step"] == 10 and two["checkpoint"]["name"] == "step-10"
    lines = f"perplexity: {{data-mode: fineweb_npy, val-npy: {shard}, seq-len: 32}}\n"
    (tmp_path / "e.yaml").write_text(lines)
    argv = ["--checkpoint-path", tmp_path / "run", "--evaluations", tmp_path / "e.yaml"]
    argv += ["--results-dir", tmp_path / "results-1", "--device", "cpu", "--poll-seconds", "0.1"]
    with pytest.raises(SystemExit):
        sweep.main([str(word) for word in argv])
    said = capsys.readouterr()
    assert "0 made, 1 done before, 1 failed" in said.out
    assert "the save is going on or was broken off" in said.out + said.err
