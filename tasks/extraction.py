r"""The program in a model's reply: EvalPlus's rule, without its parser.

    code = extract("Sure! Here it is:\n```python\ndef f(x):\n    return x\n```", "f")

The longest run of lines that is Python, and of that what the function asked for needs: imports, and
the functions, classes and variables at the top level that it reaches by name. Nothing is run here.
As in EvalPlus's sanitizer (github.com/evalplus/evalplus, evalplus/sanitize.py) functions without a
return, with a decorator, or of a name that is taken already are left out, and so is whatever else
stands at the top level; a reply with nothing of this kind is its longest run of lines.
"""

import ast
import warnings

DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def extract(reply: str, entry_point: str) -> str:
    """The program that is judged."""
    code = longest_code(reply)
    return (_needed(code, entry_point) if parses(code) else "").strip() or code


def longest_code(text: str) -> str:
    """The first run of two or more lines with the most lines that are not blank which is Python;
    the first line where there is none."""
    lines = text.split("\n")
    before = [0]  # lines that are not blank, before each
    for line in lines:
        before.append(before[-1] + bool(line.strip()))
    most, best = 0, (0, 0)
    for i in range(len(lines)):
        for j in range(len(lines) - 1, i, -1):
            length = before[j + 1] - before[i]
            if length < most or (length == most and best[0] != i) or not length:
                break
            if parses("\n".join(lines[i : j + 1])):
                most, best = length, (i, j)
    return "\n".join(lines[best[0] : best[1] + 1])


def parses(code: str) -> bool:
    """Whether it is Python."""
    return _parsed(code) is not None


def _parsed(code: str) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes
            return ast.parse(code)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None


def _needed(code: str, entry_point: str) -> str:
    tree = _parsed(code)
    assert tree is not None, code[:60]
    imports: list[ast.stmt] = []
    named: list[tuple[str | None, ast.stmt]] = []
    taken: set[str | None] = set()
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            is_future = isinstance(node, ast.ImportFrom) and node.module == "__future__"
            imports += [] if is_future else [node]
            continue
        if isinstance(node, DEFINITIONS):
            name: str | None = node.name
            returns = any(isinstance(inner, ast.Return) for inner in ast.walk(node))
            wanted = not node.decorator_list and (returns or isinstance(node, ast.ClassDef))
        else:
            name = _assigned(node)
            wanted = isinstance(node, (ast.Assign, ast.AnnAssign))
        if wanted and name not in taken:
            taken.add(name)
            named.append((name, node))
    names = {name: _names_in(node) for name, node in named}
    reached, waiting = {entry_point}, [entry_point]
    while waiting:
        new = names.get(waiting.pop(), set()) - reached
        reached |= new
        waiting += new
    kept = [*imports, *(node for name, node in named if name in reached)]
    source = code.encode()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    return "\n".join(_source_of(node, source, starts) for node in kept)


def _assigned(node: ast.stmt) -> str | None:
    """The name that EvalPlus takes an assignment to be of: what is assigned to, or else what."""
    match node:
        case ast.Assign(targets=[ast.Name(id=name), *_]) | ast.AnnAssign(target=ast.Name(id=name)):
            return name
        case ast.Assign(targets=[_], value=ast.Name(id=name)):
            return name
        case ast.AnnAssign(value=ast.Name(id=name)):
            return name
    return None


def _names_in(node: ast.AST) -> set[str]:
    """Every identifier in it, attributes and arguments among them."""
    found = set()
    for inner in ast.walk(node):
        for field in ("id", "attr", "arg", "name", "asname", "rest", "module"):
            value = getattr(inner, field, None)
            if isinstance(value, str):
                found |= set(value.split("."))
        found |= set(getattr(inner, "names", [])) if isinstance(inner, SCOPES) else set()
    return found


SCOPES = (ast.Global, ast.Nonlocal)


def _source_of(node: ast.stmt, source: bytes, starts: list[int]) -> str:
    assert node.end_lineno and node.end_col_offset is not None, "the parser says where it ends"
    begin = starts[node.lineno - 1] + node.col_offset
    return source[begin : starts[node.end_lineno - 1] + node.end_col_offset].decode()
