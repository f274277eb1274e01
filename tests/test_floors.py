"""The plan of the house: which room lies on which floor, and that imports go strictly downward."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
# Each room imports only from floors above its own, here; inside a folder, only from files named
# earlier.
FLOORS = [
    "cli stats durable distributed config tokenizer gpu_kernels/cross_entropy "
    "gpu_kernels/decode_attention sandbox/jail sweeping/lease",
    "results sandbox/judge costs/formulas formats/tensorfiles formats/shards formats/text model",
    "dataset transformers_model formats/layouts compute tasks/questions tasks/programs "
    "sweeping/ledger backends/engine",
    "checkpoint backends/scoring",
    "tasks/prompts training/batches training/log training/options",
    "train eval mmlu_eval humaneval_eval report",
    "sweep",
]
NO_TORCH = "cli stats durable config results costs/formulas compute sandbox/jail sandbox/judge"
NO_TORCH += " tasks/programs"
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms.split()}
ORDER = {room: i for i, room in enumerate(" ".join(FLOORS).split())}
ROOMS = sorted(
    p for folder in (ROOT, *(ROOT / name for name in PACKAGES)) for p in folder.glob("*.py")
)


def room_of(path: Path) -> str:
    return str(path.relative_to(ROOT).with_suffix(""))


def imported_rooms(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name.replace(".", "/") for name in names}


@pytest.mark.parametrize("path", ROOMS, ids=room_of)
def test_imports_go_strictly_downward(path):
    room = room_of(path)
    if path.name == "__init__.py":
        return
    assert room in FLOOR, f"{path.name} has no floor: give it one here"
    for name in imported_rooms(path) & FLOOR.keys():
        same_folder = Path(name).parent == Path(room).parent != Path()
        earlier = FLOOR[name] < FLOOR[room] or (same_folder and ORDER[name] < ORDER[room])
        assert earlier, f"{room} must not import {name}"


@pytest.mark.parametrize("room", NO_TORCH.split())
def test_rooms_that_never_load_torch(room):
    code = f"import sys, {room.replace('/', '.')}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_importing_does_no_work():
    """No device is touched, nothing printed, by importing every script."""
    rooms = [room.replace("/", ".") for room in FLOOR if (ROOT / f"{room}.py").exists()]
    code = f"import torch, {', '.join(rooms)}; assert not torch.cuda.is_initialized()"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (out.returncode, out.stdout) == (0, ""), out.stderr
