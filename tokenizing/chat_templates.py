"""The chat templates in a tokenizer's directory, as text: rendering them is tasks/chat.py's.

templates_beside(path)              # {"default": Jinja text}, more by name, or nothing
"""

import json
from pathlib import Path
from typing import Any

from inputs import decode_utf8

CHAT_TEMPLATE = "chat_template.jinja"


def settings_of(path: Path) -> dict:
    """tokenizer_config.json, if there is one that can be read."""
    try:
        values = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def templates_beside(path: Path) -> dict[str, str]:
    """The chat templates of a tokenizer directory, as transformers reads them."""
    file = path / CHAT_TEMPLATE
    if file.is_file():
        return {"default": decode_utf8(file.read_bytes(), file)}
    return named_templates(settings_of(path).get("chat_template"))


def named_templates(value: Any) -> dict[str, str]:
    """One text, {name: text}, or as older files have it a list of {"name", "template"}."""
    if isinstance(value, list):
        pairs = [item for item in value if isinstance(item, dict)]
        value = {item.get("name"): item.get("template") for item in pairs}
    named = value if isinstance(value, dict) else {"default": value}
    return {
        name: text
        for name, text in named.items()
        if isinstance(name, str) and isinstance(text, str) and text
    }
