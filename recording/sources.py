"""Which code made a number: the hash of the sources that an evaluation depends on, and the commit.

    code_version("eval.py", ("formats/tensorfiles.py",))    # an edited README changes nothing
    keep()                                                  # from here on of the code as it is now
    running_code(__file__)                                  # remembered

Sources are read, not imported. Standard library only.
"""

import ast
import contextlib
import functools
import gc
import hashlib
import os
import re
import subprocess
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# What an evaluation's numbers do not depend on: how flags are read, modules loaded, lines printed
WITHOUT_NUMBERS = ("cli.py", "streams.py", "headstart.py", "installed.py")
# A door to rooms of which one is entered: its imports of those are left to `chosen`
DOORS: dict[str, tuple[str, ...]] = {"checkpoint.py": ("formats",), "tokenizer.py": ("formats",)}
DOORS |= {"evaluation.py": ("backends",), "command.py": ("backends", "formats", "quantisation")}


def statements_that_run(tree: ast.AST) -> Iterator[ast.AST]:
    """All statements of a tree, however deep, but what `if TYPE_CHECKING:` holds, which is for
    readers and checkers alone. Expressions hold no statements, so they are passed over."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting += node.orelse
            continue
        yield node
        for field in ("body", "orelse", "finalbody", "handlers", "cases"):
            inside = getattr(node, field, None)
            waiting += inside if isinstance(inside, list) else ()


PRINTING = re.compile(r"show|(show|print)_\w+|main")


_KEPT: dict[Path, bytes] = {}


def keep() -> None:
    """Remember every source as it is now, whatever is edited later: reading them takes a hundredth
    of the time that their hash does, which then need not hold up what comes first."""
    _KEPT.update({path: path.read_bytes() for path in source_files() if path not in _KEPT})


def _read(path: Path) -> bytes:
    return _KEPT[path] if path in _KEPT else path.read_bytes()


_ONE = threading.Lock()


@contextlib.contextmanager
def _parsing() -> Iterator[None]:
    """One thread of ours at a time, and no collections of garbage meanwhile: Python 3.11's parser
    counts its depth once for all threads, and loses count where a collection within it lets in
    another, of ours or of some library that reads its own kernels."""
    with _ONE:
        collects = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if collects:
                gc.enable()


@functools.cache  # by content, so an edit is seen
def _imports_and_hash(source: bytes) -> tuple[tuple[tuple[int, str, tuple[str, ...]], ...], str]:
    """What a source file imports, as (level, module, names), and the sha256 of what its numbers
    depend on: all but its functions that print (by their names, PRINTING) and what starts it."""
    tree = ast.parse(source)
    imports: list[tuple[int, str, tuple[str, ...]]] = []
    for node in statements_that_run(tree):
        if isinstance(node, ast.Import):
            imports += [(0, alias.name, ()) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = tuple(alias.name for alias in node.names)
            imports.append((node.level, node.module or "", names))
    lines = source.splitlines(keepends=True)
    for node in tree.body:
        prints = isinstance(node, ast.FunctionDef) and PRINTING.fullmatch(node.name)
        starts = isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
        if prints or starts:
            end = node.end_lineno or node.lineno
            lines[node.lineno - 1 : end] = [b""] * (end - node.lineno + 1)
    return tuple(imports), hashlib.sha256(b"".join(lines)).hexdigest()


def _imported_files(path: Path, root: Path) -> Iterator[Path]:
    """The files below `root` that a source file imports, at its top or inside a function: `import
    a.b`, `from a import b` and `from a.b import c`, and the packages' own files that come first."""
    within = path.parent.relative_to(root).parts if path.is_relative_to(root) else ()
    for level, module, names in _imports_and_hash(_read(path))[0]:
        package = ".".join(within[: len(within) - level + 1]) if level else ""
        module = ".".join(filter(None, (package, module)))
        for name in (module, *(f"{module}.{name}" for name in names)):
            parts = name.split(".")
            for depth in range(1, len(parts) + 1):
                place = os.path.join(root, *parts[:depth])
                for candidate in (place + ".py", os.path.join(place, "__init__.py")):
                    if parts[0] and os.path.isfile(candidate):
                        yield Path(candidate)


def code_files(
    module_file: str | Path, chosen: Iterable[str] = (), root: Path | None = None
) -> list[Path]:
    """The sources that an evaluation's numbers depend on: its script and all that it imports,
    directly or not, below `root`, the script's own directory unless given. Of the formats and
    backends behind DOORS only `chosen` count, paths relative to `root`, where programs that are
    started instead of imported are named too. Read from the AST, so nothing is imported."""
    module_file = Path(module_file).resolve()
    root = root or module_file.parent
    seen, waiting = set(), [module_file, *(root / name for name in chosen)]
    while waiting:
        path = waiting.pop()
        name = os.path.relpath(path, root)
        if path in seen or name in WITHOUT_NUMBERS:
            continue
        seen.add(path)
        behind = [root / folder for folder in DOORS.get(name, ())]
        waiting += [p for p in _imported_files(path, root) if p.parent not in behind]
    return sorted(seen)


def code_version(
    module_file: str | Path, chosen: Iterable[str] = (), root: Path | None = None
) -> str:
    """sha256 of `code_files`, without what prints: an edited README, table or flag's help changes
    nothing, an edited score everything."""
    root = root or Path(module_file).resolve().parent
    digest = hashlib.sha256()
    with _parsing():
        for path in code_files(module_file, chosen, root):
            content = _imports_and_hash(_read(path))[1]
            digest.update(f"{os.path.relpath(path, root)} {content}\n".encode())
    return digest.hexdigest()


running_code = functools.cache(code_version)  # the code that runs, whatever is edited meanwhile


def source_files() -> list[Path]:
    """Every script and room of the house, without tests, benchmarks and helpers of the shell."""
    rooms = [p.parent for p in ROOT.glob("*/__init__.py") if p.parent.name != "tests"]
    return sorted(p for folder in (ROOT, *rooms) for p in folder.glob("*.py"))


@functools.cache  # the code that runs is the code that was there at the start
def code_commit() -> str:
    """`git:COMMIT`, with `-dirty` when tracked files differ from it; without git a hash of the
    scripts."""
    command = ["git", "--no-optional-locks", "-C", str(ROOT), "describe"]
    command += ["--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        out = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        out = None
    if out and out.returncode == 0:
        return "git:" + out.stdout.strip()
    return "sources:" + hashlib.sha256(b"".join(p.read_bytes() for p in source_files())).hexdigest()
