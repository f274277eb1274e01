"""The plan of the house: which room lies on which floor, and that imports go strictly downward."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = [
    [
        "config",
        "distributed",
        "cli",
        "jail",
        "lease",
        "results",
        "stats",
        "decode_attention",
        "cross_entropy",
    ],
    ["ledger", "sandbox", "model", "tokenizer", "formulas", "tensorfiles"],
    ["compute", "dataset", "layouts", "hf_model", "engine", "questions", "samples"],
    ["checkpoint", "scoring"],
    ["prompts"],
    ["train", "eval", "mmlu_eval", "humaneval_eval", "report"],
    ["sweep"],
]
NO_TORCH = (
    "config",
    "formulas",
    "compute",
    "cli",
    "results",
    "stats",
    "jail",
    "sandbox",
    "samples",
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def imported_rooms(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda p: p.stem)
def test_imports_go_strictly_downward(path):
    assert path.stem in FLOOR, f"{path.name} has no floor: give it one here"
    for name in imported_rooms(path) & FLOOR.keys():
        assert FLOOR[name] < FLOOR[path.stem], f"{path.stem} must not import {name}"


@pytest.mark.parametrize("room", NO_TORCH)
def test_rooms_that_never_load_torch(room):
    code = f"import sys, {room}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_importing_does_no_work():
    """No device is touched, nothing printed, by importing every script."""
    rooms = [room for room in FLOOR if (ROOT / f"{room}.py").exists() and room != "jail"]
    code = f"import torch, {', '.join(rooms)}; assert not torch.cuda.is_initialized()"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (out.returncode, out.stdout) == (0, ""), out.stderr
