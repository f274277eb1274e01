"""Packages that are not there, said in one line with the remedy: exit 2, no traceback.

    import installed    # the first import of a command, before numpy, torch and what imports them

Where the program is one of ours, what it fails to import ends so, before `cli.run` is reached as
well as within it. A module of our own that is not there is a fault of ours, and a traceback.
Standard library only.
"""

import shlex
import sys
import traceback
from pathlib import Path
from types import TracebackType

from launcher import rank

ROOT = Path(__file__).resolve().parent
ACTIVATE, INSTALL = ".venv/bin/activate", "scripts/install.sh"
# modules that we import: of requirements.txt and what it brings along, and others that few need
NEEDED = "huggingface_hub matplotlib numpy plotly safetensors tiktoken tokenizers torch tqdm"
NEEDED += " transformers triton urllib3 yaml"
OPTIONAL = {"sklearn": "scikit-learn"}  # by the name of the package, where it is another
OPTIONAL |= {name: name for name in ["lm_eval", "pyarrow", "sacrebleu", "scipy", "starlette"]}
OPTIONAL |= {name: name for name in ["tensorboard", "threadpoolctl", "uvicorn", "wandb"]}


def missing(error: BaseException) -> str | None:
    """What to say of an exception if it is that a package is not installed, else None: a part of a
    package that is there, or a misspelt module of ours."""
    name = error.name if isinstance(error, ModuleNotFoundError) else None
    if name is None or "." in name:
        return None
    importer = _importer(error.__traceback__)
    ours = importer.is_relative_to(ROOT) and "site-packages" not in importer.parts
    if ours and name in OPTIONAL:
        return f"{name} is not installed: pip install {OPTIONAL[name]}"
    if ours and name not in NEEDED.split():
        return None
    activate, install = (shlex.quote(str(ROOT / path)) for path in (ACTIVATE, INSTALL))
    return (
        f"{name} is not installed for {sys.executable}: activate the environment that has it "
        f"(source {activate}), or make it (bash {install})"
    )


def _importer(trace: TracebackType | None) -> Path:
    """The file whose import failed."""
    files = [frame.filename for frame in traceback.extract_tb(trace)]
    return Path([file for file in files if "importlib" not in file][-1])


def _end(kind: type, error: BaseException, trace: TracebackType | None) -> None:
    """In the place of sys.excepthook."""
    said = missing(error)
    if said is None or "--debug" in sys.argv:
        sys.__excepthook__(kind, error, trace)
    if said is not None:
        if rank() == 0:
            print(f"error: {said}", file=sys.stderr)
        sys.exit(2)


_program = getattr(sys.modules.get("__main__"), "__file__", None)
if _program and Path(_program).resolve().parent in (ROOT, ROOT / "scripts"):
    sys.excepthook = _end
