"""A Hugging Face directory, whoever quantised its weights, or nobody.

    METHODS[name].open(path, config, values)    # of config.json, which is read once

A method that none of these files knows is refused by name in huggingface.py.
"""

from pathlib import Path

from config import GPTConfig
from formats import (
    Opened,
    awq,
    bitsandbytes,
    compressed,
    fp8,
    gptq,
    huggingface,
    quantised,
)

METHODS = {"gptq": gptq, "awq": awq, "bitsandbytes": bitsandbytes}
METHODS |= {compressed.METHOD: compressed} | dict.fromkeys(fp8.METHODS, fp8)
recognises = huggingface.recognises


def glance(path: Path) -> tuple[str, int | None]:
    """(kind, step), from the names of files and what is said of who quantised them."""
    try:
        settings = quantised.settings_of(path, huggingface.config_values(path))
    except ValueError:  # whoever opens it says what is wrong
        settings = None
    known = settings is not None and settings.method in METHODS
    return (settings.method, None) if settings and known else huggingface.glance(path)


def open(path: Path, config: GPTConfig | None = None) -> Opened:
    """As the format that knows the method, else huggingface.open."""
    values = huggingface.config_values(path)
    settings = quantised.settings_of(path, values)
    method = METHODS.get(settings.method) if settings else None
    return (method or huggingface).open(path, config, values=values)
