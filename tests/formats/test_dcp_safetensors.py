"""formats/dcp_safetensors.py: torch's own saves by three ranks, and parts that do not tile."""

import json
import shutil

import pytest
import torch
from builders import run_ranks
from checkpoint_files import CONFIGS, logits, make_model, safetensors_file
from safetensors.torch import load_file, safe_open, save_file
from trained_files import refusal

import checkpoint
from formats import layouts

SAVE = """
import torch.distributed as td, torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
if not td.is_initialized():
    td.init_process_group("gloo")
mesh = init_device_mesh("cpu", (3,))
state = torch.load(FOLDER + "/state.pt")
cut = {n: distribute_tensor(t, mesh, [Shard(i % 2) if t.dim() > 1 else Replicate()])
       for i, (n, t) in enumerate(state.items())}
for name, whole in (("parts-5", False), ("whole-6", True)):
    writer = dcp.HuggingFaceStorageWriter(
        FOLDER + "/" + name, save_distributed=True, enable_consolidation=whole
    )
    dcp.save(cut, storage_writer=writer)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    model = make_model(CONFIGS["llama"])
    torch.save({n: t.clone() for n, t in layouts.views(model, "llama")}, folder / "state.pt")
    run_ranks(3, folder, SAVE.replace("FOLDER", repr(str(folder))))
    return folder, model


def test_what_ranks_saved(run):
    folder, model = run
    for name, kind in (
        ("parts-5", "dcp-safetensors"),
        ("whole-6/sharded", "dcp-safetensors"),
        ("whole-6", "weights"),
    ):
        ckpt = checkpoint.open(folder / name, model.config)
        assert ckpt.kind == kind
        assert torch.equal(logits(ckpt.load("float32")), logits(model))
    assert [c.step for c in checkpoint.list_checkpoints(folder)][:2] == [5, 6]
    assert "has no config" in refusal(folder / "parts-5")


def test_parts_that_do_not_tile(run, tmp_path):
    folder, model = run
    path = tmp_path / "parts-5"
    shutil.copytree(folder / "parts-5", path)
    two = path / "shard-00002-model-00001-of-00001.safetensors"
    content, table = two.read_bytes(), load_file(two)
    with safe_open(two, "pt") as f:
        said = f.metadata()
    two.unlink()
    assert "elements" in refusal(path, model.config)
    two.write_bytes(content[:-100])
    assert "truncated, still being written" in refusal(path, model.config)
    name = max(table, key=lambda name: table[name].numel())
    starts = json.loads(said["DCP_SHARDING_INFO"])
    for start, match in (
        ([0, 0], "overlaps"),
        ([0], "begins at"),
        (["0", "0"], "begins at"),
        ([-5, 0], "outside|overlaps|elements"),
    ):
        starts[name]["saved_offsets"] = start
        save_file(table, two, said | {"DCP_SHARDING_INFO": json.dumps(starts)})
        assert any(word in refusal(path, model.config) for word in match.split("|"))
    save_file(table, two, {"format": "pt"})
    assert "does not say where its parts begin" in refusal(path, model.config)
    header = {"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    safetensors_file(two, header | {"__metadata__": {"DCP_SHARDING_INFO": "[]"}}, bytes(4))
    assert "does not say where its parts begin" in refusal(path, model.config)
