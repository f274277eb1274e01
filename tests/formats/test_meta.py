"""formats/meta.py: shards of any number, cut here by the documented rules from llama2.c's model,
whose names and arithmetic are Meta's."""

import json
import re
import shutil

import pytest
import torch
from trained_files import TRAINED, difference, refusal

import checkpoint
from config import load_config

NAME = "llama2c-untied"
PARAMS = {"dim": 16, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": -1}
PARAMS |= {"multiple_of": 8, "norm_eps": 1e-5, "max_seq_len": 32}
CUT_ROWS, CUT_COLUMNS = ("wq", "wk", "wv", "w1", "w3", "output"), ("wo", "w2")


def release(folder, n, embedding_dim=0, params=PARAMS):
    """consolidated.*.pth of n ranks."""
    state = torch.load(TRAINED / NAME / "ckpt.pt")["model"]
    state = {name.removeprefix("_orig_mod."): t for name, t in state.items()}
    folder.mkdir()
    for rank in range(n):
        shard = {"rope.freqs": torch.ones(2)}
        for name, t in state.items():
            kind = name.split(".")[-2]
            dim = 0 if kind in CUT_ROWS else 1 if kind in CUT_COLUMNS else None
            dim = embedding_dim if kind == "tok_embeddings" else dim
            shard[name] = t if dim is None else t.chunk(n, dim)[rank].clone()
        torch.save(shard, folder / f"consolidated.{rank:02}.pth")
    if params:
        (folder / "params.json").write_text(json.dumps(params))
    return folder


@pytest.mark.parametrize(("n", "dim"), [(1, 0), (1, 1), (2, 0), (2, 1)])
def test_shards_of_ranks(tmp_path, n, dim):
    path = release(tmp_path / "llama", n, dim)
    assert difference(path, NAME) <= 1e-5
    assert difference(path / "consolidated.00.pth", NAME) <= 1e-5
    ckpt = checkpoint.open(path)
    assert (ckpt.kind, ckpt.vocab_size, ckpt.config.d_ff) == ("meta", 61, 48)
    assert len(ckpt.tensors["blocks.1.mlp.fc2.weight"].pieces) == n
    assert [c.kind for c in checkpoint.list_checkpoints(tmp_path)] == ["meta"]


def test_what_params_do_not_say(tmp_path):
    missing = {k: v for k, v in PARAMS.items() if k != "max_seq_len"}
    assert "how many positions" in refusal(release(tmp_path / "a", 2, params=missing))
    scaled = PARAMS | {"use_scaled_rope": True}
    assert "use_scaled_rope, but not its factor" in refusal(
        release(tmp_path / "b", 2, params=scaled)
    )
    path = release(tmp_path / "c", 2, params=None)
    said = refusal(path)
    assert "vocab_size=61, d_model=16, n_layers=2, d_ff=48" in said
    assert "but not n_heads, n_kv_heads, rope_theta, norm_eps, max_position_embeddings" in said
    config = checkpoint.open(release(tmp_path / "d", 1)).config
    (tmp_path / "given.yaml").write_text(json.dumps(config.to_dict()))
    assert difference(path, NAME, load_config(tmp_path / "given.yaml")) <= 1e-5
    new = PARAMS | {"qk_clip": 2}
    assert "qk_clip = 2 is not known here" in refusal(release(tmp_path / "e", 1, params=new))


def test_missing_mixed_and_damaged_shards(tmp_path):
    path = release(tmp_path / "llama", 2)
    last = path / "consolidated.01.pth"
    content = last.read_bytes()
    last.unlink()
    assert re.search("of another shape|in the tensors", refusal(path))  # halves of matrices
    last.write_bytes(content)
    (path / "consolidated.00.pth").rename(tmp_path / "away")
    assert "lacks consolidated.00.pth" in refusal(path)
    shutil.copy(last, path / "consolidated.00.pth")
    (tmp_path / "away").replace(path / "consolidated.00.pth")
    last.write_bytes(content[:-3000])
    assert "truncated or still being written" in refusal(path)
    shard = torch.load(path / "consolidated.00.pth")
    torch.save(shard | {"more.weight": torch.ones(2)}, last)
    assert "one of them lacks more.weight" in refusal(path)
    torch.save({name: t.half() for name, t in shard.items()}, last)
    assert "do not go together" in refusal(path)
