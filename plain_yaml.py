"""YAML files of settings: small ones, in which every name stands once.

    load_yaml("configs/7b.yaml")        # {"vocab_size": 32000, …}
    find_yaml("gsm8k", CONFIGS_DIR / "word_problems", "--prompt")       # its path

A file may be made to fill memory with a few lines, by aliases of aliases or merges of merges, and a
name that stands there twice says two things: such files are refused, in one line.
"""

import itertools
import math
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from packed import require_file

LONGEST = 2**16  # bytes; PyYAML reads some 100 kB a second
DEEPEST = 64  # brackets in brackets, which PyYAML reads in the square of the time
MOST_VALUES = 10_000  # each counted as often as an alias repeats it
MOST_ALIASES, MOST_FIELDS = 1000, 1000  # of a file, and of a mapping with what it merges

# `field: value # why`, whose value is a number or a word
LINE = re.compile(r"([a-z][a-z0-9_]*): (\S+)(?: +#[ -~]*)?|(?:#[ -~]*)?", re.ASCII)
NUMBER = re.compile(r"-?(?:0|[1-9][0-9]{0,17})|-?[0-9]{1,20}\.[0-9]{1,20}(?:e[-+][0-9]{1,2})?")
WORD = re.compile(r"[a-z][a-z0-9_]*", re.ASCII)
NO_WORDS = {"null", "yes", "no", "on", "off"}


def find_yaml(name: str | Path, folder: Path, flag: str) -> Path:
    """The file of `folder` that has this name, or a YAML file of one's own by its path. ValueError
    names the flag and what there is."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        return path
    path = folder / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.yaml")))
        raise ValueError(f"{flag} {str(name)!r} is none of {known}, nor a YAML file")
    return path


def load_yaml(path: str | Path) -> dict:
    """A YAML file's mapping. Raises ValueError naming the file, and the line where known."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    require_file(path)
    with path.open("rb") as file:
        data = file.read(LONGEST + 1)
    if len(data) > LONGEST:
        raise ValueError(f"{path} has more than {LONGEST:,} bytes: it holds no settings")
    depths = itertools.accumulate((c in b"[{") - (c in b"]}") for c in data)
    if max(depths, default=0) > DEEPEST:
        raise ValueError(f"{path} is nested more than {DEEPEST} deep")
    if values := _of_lines(data):
        return values
    try:
        values = _loader(data.decode()).get_single_data()
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, a date in month 13
        raise ValueError(f"{path} is not YAML: {error}") from None
    except Exception as error:
        if not type(error).__module__.startswith("yaml."):
            raise
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if values is None:
        raise ValueError(f"{path} is empty: it must hold `field: value` lines")
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold `field: value` lines, not {type(values).__name__}")
    if _written_out(values, {}) > MOST_VALUES:
        raise ValueError(f"{path} holds more than {MOST_VALUES:,} values, aliases written out")
    return values


def check_fields(
    where: str | Path, values: dict, kinds: dict[str, type], optional: Collection[str] = ()
) -> None:
    """ValueError, naming the field, for one that is unknown, missing or of another kind; a list is
    one of texts."""
    missing = kinds.keys() - set(optional) - values.keys()
    wrong = sorted((values.keys() - kinds.keys()) | missing)
    if wrong:
        raise ValueError(f"{where}: field {wrong[0]!r} is unknown or missing; {sorted(kinds)}")
    for field, value in values.items():
        if type(value) is not kinds[field]:
            raise ValueError(f"{where}: {field} must be {kinds[field].__name__}, not {value!r:.40}")
    for field, value in values.items():
        if kinds[field] is list and not all(isinstance(text, str) and text for text in value):
            raise ValueError(f"{where}: {field} must be a list of texts")


def _of_lines(data: bytes) -> dict:
    """A file of such lines alone; {} for any other: PyYAML, which reads these to the same values,
    takes as long to import as compute.py has for all else."""
    values: dict = {}
    for line in data.decode("latin-1").split("\n"):
        if not (found := LINE.fullmatch(line)):
            return {}
        name, value = found.groups()
        if name is None:
            continue
        if name in values or {name, value} & NO_WORDS or name in ("true", "false"):
            return {}
        if NUMBER.fullmatch(value):
            values[name] = float(value) if "." in value else int(value)
        elif WORD.fullmatch(value):
            values[name] = value == "true" if value in ("true", "false") else value
        else:
            return {}
    return values if len(values) <= MOST_FIELDS else {}


def _loader(text: str) -> Any:
    """PyYAML's safe loader of a text, with a measure."""
    import yaml

    class Loader(yaml.SafeLoader):
        aliases = 0

        def compose_node(self, parent, index):
            self.aliases += self.check_event(yaml.AliasEvent)
            if self.aliases > MOST_ALIASES:
                raise yaml.YAMLError(f"more than {MOST_ALIASES:,} aliases")
            return super().compose_node(parent, index)

        def flatten_mapping(self, node):
            own = [key.value for key, _ in node.value if key.value != "<<"]
            twice = [str(name) for i, name in enumerate(own) if name in own[:i]]
            super().flatten_mapping(node)
            if twice or len(node.value) > MOST_FIELDS:
                what = f"{twice[0]!r} stands there twice" if twice else "too many fields"
                raise yaml.YAMLError(f"{what}, line {node.start_mark.line + 1} onwards")

    return Loader(text)


def _written_out(value: Any, known: dict[int, float]) -> float:
    """How many values a nested one has, written out; infinitely many where it holds itself."""
    if not isinstance(value, (dict, list)):
        return 1
    if id(value) not in known:
        known[id(value)] = math.inf
        inner = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_written_out(item, known) for item in inner)
    return known[id(value)]
