"""Lightning's .ckpt: a file of torch.save with state_dict, hyper-parameters and callbacks.

The names of the weights carry the attribute of the LightningModule that holds the model, which is
taken off. Whatever else is in it stays unread. A .ckpt that is a directory is dcp.py's (FSDP) or
deepspeed.py's.
"""

from pathlib import Path

from config import GPTConfig
from formats import Opened, archives, dialects, trained

FORMAT = "formats/lightning.py"
VERSION = "pytorch-lightning_version"


def recognises(path: Path) -> bool:
    """By the key that Lightning puts in every file."""
    return path.suffix == ".ckpt" and archives.mentions(path, (VERSION.encode(), b"state_dict"))


def open(path: Path, config: GPTConfig | None = None) -> Opened:
    """The structure of the file; the config from beside it."""
    said = archives.open_archive(path)
    if not isinstance(said, dict) or VERSION not in said:
        raise ValueError(f"{path} is no checkpoint of Lightning: it lacks {VERSION}")
    tensors = dialects.model_part(trained.weights(said.get("state_dict"), path))
    epoch = said["epoch"] if type(said.get("epoch")) is int else None
    step = said.get("global_step")
    return trained.opened(path, "lightning", FORMAT, tensors, config, step=step, epoch=epoch)
