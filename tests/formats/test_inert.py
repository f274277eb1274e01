"""formats/inert.py: nothing that a pickle names is imported or called, wherever one may lie."""

import collections
import io
import os
import pickle
import sys
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from checkpoint_files import good_file, logits, make_model, rosetrainer_state

import checkpoint
from checkpoint import load_model, load_training_state, save_checkpoint
from formats import inert, pickles
from formats.inert import read_pickle
from tokenizer import build_tokenizer

ACTS = ("import", "exec", "compile", "os.system", "subprocess.Popen", "socket.connect")
SEEN: list[tuple] = []
WATCHING: list[bool] = []


def watch(event, args):
    if WATCHING and (event in ACTS or (event == "open" and "roseval-owned" in str(args[0]))):
        SEEN.append((event, str(args[0])[:80]))


sys.addaudithook(watch)


class Call:
    """Pickles as a call of a function by its name."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def owned(folder):
    return Call(os.system, f"touch {folder}/roseval-owned")


def torch_file(path, contents, pickled):
    """A file of torch.save whose structure is replaced by a pickle."""
    torch.save(contents, path)
    buffer = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(buffer, "w") as new:
        for info in old.infolist():
            replaced = info.filename.endswith("data.pkl")
            new.writestr(info.filename, pickled if replaced else old.read(info))
    path.write_bytes(buffer.getvalue())
    return path


@pytest.mark.parametrize("place", ["model", "among the weights", "beside", "top", "optimizer"])
def test_hostile_weights(tmp_path, place):
    hostile, state = owned(tmp_path), rosetrainer_state(make_model())
    path = tmp_path / "a.pt"
    if place == "model":
        torch.save({"model": hostile, "step": 1}, path)
    elif place == "among the weights":
        good_file(path, state | {"ln_f.weight": hostile})
    elif place == "beside":
        good_file(path, state, note=hostile)
    elif place == "optimizer":
        good_file(path, state, optimizer={"state": {0: hostile}})
    else:
        torch.save(hostile, path)
    for ask in (checkpoint.open, load_model, load_training_state, checkpoint.inspect):
        with pytest.raises(ValueError, match=r"a\.pt holds posix\.system: .*do not use it"):
            ask(path)
    assert [info.kind for info in checkpoint.list_checkpoints(tmp_path)] == ["unreadable"]
    assert not (tmp_path / "roseval-owned").exists()


def test_hostile_files_beside_the_weights(tmp_path):
    """trainer_state.pt is refused, and whatever else is a pickle in a directory is never opened."""
    model = make_model(checkpoint.open(good_file(tmp_path / "a.pt")).config.replace(vocab_size=257))
    path = save_checkpoint(
        model, None, None, 0, 1, 1.0, tmp_path, tokenizer=build_tokenizer("byte")
    )
    (path / "manifest.json").unlink()
    wanted = logits(load_model(path, "float32"))
    hostile = pickle.dumps(owned(tmp_path))
    for name in (
        "tokenizer.pkl",
        "training_args.bin",
        "optimizer.pt",
        "rng_state.pth",
        ".metadata",
    ):
        (path / name).write_bytes(hostile)
    torch.save(owned(tmp_path), path / "scheduler.pt")
    opened = set()
    sys.addaudithook(lambda event, args: event == "open" and opened.add(str(args[0])))
    ckpt = checkpoint.open(path)
    assert torch.equal(logits(ckpt.load("float32")), wanted) and len(ckpt.fingerprint) == 64
    assert build_tokenizer(ckpt.tokenizer).vocab_size == 257
    for name in (
        "tokenizer.pkl",
        "training_args.bin",
        "optimizer.pt",
        "rng_state.pth",
        ".metadata",
    ):
        assert str(path / name) not in opened
    torch.save({"optimizer": owned(tmp_path)}, path / "trainer_state.pt")
    with pytest.raises(ValueError, match=r"trainer_state\.pt holds posix\.system"):
        load_training_state(path)
    assert not (tmp_path / "roseval-owned").exists()


HOSTILE = {
    "eval": Call(eval, "__import__('os').system('touch roseval-owned')"),
    "exec": Call(exec, "open('roseval-owned', 'w')"),
    "import": Call(__import__, "this"),
    "getattr": Call(getattr, Call(__import__, "os"), "system"),
    "load": Call(torch.load, "roseval-owned"),
    "loads": Call(pickle.loads, pickle.dumps(Call(exec, "open('roseval-owned', 'w')"))),
    "hub": Call(torch.hub.load, "x", "y"),
    "numpy": Call(np.load, "roseval-owned"),
    "map": Call(map, eval, ["1"]),
}


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_is_imported_or_called(tmp_path, monkeypatch, name, protocol):
    monkeypatch.chdir(tmp_path)
    data = pickle.dumps({"model": {}, "x": [HOSTILE[name]]}, protocol)
    read_pickle(pickle.dumps("é", 0))  # text of protocol 0 has a codec of its own, loaded once
    SEEN.clear()
    WATCHING.append(True)
    try:
        read_pickle(data)
    except ValueError:
        pass
    finally:
        WATCHING.clear()
    assert not SEEN and not list(tmp_path.iterdir())


def test_plain_values_come_back():
    """As pickle itself would read them, over every protocol."""
    values = {
        "n": [0, -1, 2**70, True, None, 1.5, "é", b"\xff\x00", (1, (2, ())), {"a": {"b": []}}],
        (1, "x"): collections.OrderedDict(a=1),
        "long": list(range(3000)),
    }
    values["again"] = values["n"]
    for protocol in range(6):
        found, names = read_pickle(pickle.dumps(values, protocol))
        assert found == values and found["again"] is found["n"]
        assert all(map(inert.is_plain, names))
    number, _ = read_pickle(pickle.dumps([np.float64(2.5), np.int64(-3), np.bool_(True)], 2))
    assert number == [2.5, -3, True]


def bomb(*parts):
    return b"\x80\x02" + b"".join(parts) + b"."


NINES = b"J\xff\xff\xff\x7f"  # BININT 2**31 - 1
BOMBS = {
    "a bytearray by its size": bomb(b"cbuiltins\nbytearray\n", NINES, b"\x85R"),
    "many of them": bomb(b"(", b"cbuiltins\nbytearray\nJ\x00\xe9\xa4\x35\x85R" * 100, b"l"),
    "a tensor by its size": bomb(b"ctorch\nFloatTensor\n", NINES, b"\x85R"),
    "an array by its shape": bomb(
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n", NINES, b"\x85C\x01b\x87R"
    ),
    "text by its length": bomb(b"X\xff\xff\xff\x7f", b"a"),
    "bytes by their length": bomb(b"\x8e" + b"\xff" * 7 + b"\x00", b"a"),
    "a bytearray of protocol 5": bomb(b"\x96" + b"\xff" * 5 + b"\x00" * 3, b"a"),
    "a frame": bomb(b"\x95" + b"\xff" * 5 + b"\x00" * 3, b"]"),
    "a place in the memo": bomb(b"]r\xff\xff\xff\x7f"),
    "a number of a million digits": bomb(b"I" + b"9" * 10**6 + b"\n"),
    "empty lists without end": bomb(b"(", b"]" * 200_000, b"l"),
    "marks without end": bomb(b"(" * 200_000),
    "names without end": bomb(b"(", *(b"ca\n%d\n" % i for i in range(10_000)), b"l"),
    "a list in a list in a list": bomb(b"]" * 40_000, b"a" * 39_999),
    # each tuple holds the one before twice: its hash would take 2**60 steps
    "a key of tuples of tuples": bomb(b"})", b"q\x00h\x00\x86" * 60, b"Ns"),
    "a set of them": bomb(b"cbuiltins\nset\n])", b"q\x00h\x00\x86" * 60, b"a\x85R"),
    "a power set of an ordered dict": bomb(
        b"ccollections\nOrderedDict\n](])", b"q\x00h\x00\x86" * 60, b"aNaee\x85R"
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_cost_little(tmp_path, monkeypatch, name):
    """By themselves and as a file's structure: one line or a harmless value."""
    monkeypatch.setattr(pickles, "MAX_STEPS", pickles.MAX_STEPS // 50)
    tracemalloc.start()
    try:
        read_pickle(BOMBS[name])
    except ValueError as error:
        assert len(str(error)) < 1000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 << 20
    path = torch_file(tmp_path / "a.pt", {"x": torch.ones(2)}, BOMBS[name])
    with pytest.raises(ValueError, match=r"a\.pt") as error:
        load_model(path)
    assert "\n" not in str(error.value)


def test_a_bytearray_beside_good_weights(tmp_path):
    """900 MB by three bytes: read without it, and refused where a training state would make it."""
    path = good_file(tmp_path / "a.pt", buffers=[Call(bytearray, 900_000_000)] * 3)
    tracemalloc.start()
    assert torch.equal(logits(load_model(path, "float32")), logits(make_model()))
    with pytest.raises(ValueError, match=r"holds builtins\.bytearray: .*could run code"):
        load_training_state(path)
    assert tracemalloc.get_traced_memory()[1] < 50 << 20
    tracemalloc.stop()


def test_a_state_that_could_not_be_loaded_is_not_saved(tmp_path):
    model, extra = make_model(), {"seen": {1, 2}, "numpy": np.random.get_state()}
    path = save_checkpoint(model, None, None, 1, 2, 2.5, tmp_path, extra=extra)
    assert load_training_state(path)["extra"]["seen"] == {1, 2}
    with pytest.raises(ValueError, match="bytearray, which could not be loaded again"):
        save_checkpoint(model, None, None, 1, 3, 2.5, tmp_path, extra={"x": bytearray(3)})
