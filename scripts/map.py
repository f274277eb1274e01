"""Print the house: every file of code with its lines and the first sentence of what it says it is.

python scripts/map.py
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cli  # noqa: E402


def main() -> None:
    folders = sorted(path.parent for path in ROOT.glob("*/__init__.py"))
    for folder in (ROOT, *folders):
        if folder != ROOT:
            print(f"\n{folder.name}/  {summary(folder / '__init__.py')}")
        for path in sorted(folder.glob("*.py")):
            if path.name != "__init__.py":
                lines = len(path.read_text(encoding="utf-8").splitlines())
                print(f"  {path.name:<24}{lines:>5}  {summary(path)}")


def summary(path: Path) -> str:
    return (
        (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "")
        .split("\n\n")[0]
        .replace("\n", " ")
    )


if __name__ == "__main__":
    cli.run(main)
