"""A format as a newcomer would add it: this file, and one entry in readers.READERS.

run-40/toy.json                              {"step": 40, "config": {GPTConfig}, "names": {...}}
run-40/ranks/0/weights.bin, ranks/1/…        each rank's columns of every matrix, raw float32
"""

import json

import torch

from config import GPTConfig
from formats import Opened, naming
from formats.stored import Piece, joined


def recognises(path):
    return (path / "toy.json").is_file()


def open(path, config=None):
    said = json.loads((path / "toy.json").read_text())
    tensors = {}
    for name, entry in said["names"].items():
        pieces = [
            Piece(path / file, offset, tuple(start), tuple(shape))
            for file, offset, start, shape in entry["pieces"]
        ]
        tensors[name] = joined(name, torch.float32, entry["shape"], pieces)
    tensors, layout = naming.identify(tensors)
    return Opened(
        path=path,
        kind="toy",
        format="formats/toy.py",
        tensors=tensors,
        layout=layout,
        files=(path / "toy.json", *sorted(path.glob("ranks/*/weights.bin"))),
        config=config or GPTConfig.from_dict(said["config"], str(path / "toy.json")),
        step=said["step"],
        facts={"loss": said["loss"]},
    )
