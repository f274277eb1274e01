"""Programs that are nearly right: canonical solutions with one thing in them changed.

    for text in mutants(program, entry_point, n=3, seed="HumanEval/0"):
        ...

One operator, comparison, constant, condition, slice or statement of the function is another one.
The same arguments give the same mutants, under every Python that parses the program alike. Plain
standard library: the script that asks a peer for its verdicts runs this in the peer's environment.
"""

import ast
import copy
import random

COMPARISONS = (ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Eq, ast.NotEq)
ARITHMETIC = (ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Mod)


def mutants(program: str, entry_point: str, n: int, seed: str) -> list[str]:
    """Up to n different programs, each a whole one. What the tests never reach may still pass."""
    tree, rng = ast.parse(program), random.Random(seed)
    ways = [(i, way) for i, node in enumerate(ast.walk(tree)) for way in range(n_changes(node))]
    rng.shuffle(ways)
    found, known = [], {ast.unparse(tree)}
    for i, way in ways:
        changed = copy.deepcopy(tree)
        change(list(ast.walk(changed))[i], way)
        try:
            text = ast.unparse(ast.fix_missing_locations(changed)) + "\n"
            compile(text, "<mutant>", "exec")
        except (SyntaxError, ValueError):
            continue
        if text.strip() not in known:
            known.add(text.strip())
            found.append(text)
        if len(found) == n:
            break
    return found


def n_changes(node: ast.AST) -> int:
    """In how many ways `change` can change it."""
    match node:
        case ast.Compare(ops=[op]) if isinstance(op, COMPARISONS):
            return 2
        case ast.BinOp(op=op) if isinstance(op, ARITHMETIC):
            return 2
        case ast.Constant(value=bool()):
            return 1
        case ast.Constant(value=int() | float()):
            return 3
        case ast.Constant(value=str(text)) if text and "\n" not in text:
            return 2
        case ast.If() | ast.IfExp() | ast.BoolOp() | ast.Return(value=ast.expr()):
            return 2
        case ast.While():
            return 1
        case ast.Tuple(elts=[_, _, *_], ctx=ast.Load()) | ast.List(elts=[_, *_], ctx=ast.Load()):
            return 1
    return 0


def change(node: ast.AST, way: int) -> None:
    """In place."""
    match node:
        case ast.Compare(ops=[op]):
            at = next(i for i, kind in enumerate(COMPARISONS) if isinstance(op, kind))
            node.ops = [COMPARISONS[at ^ 1 if way == 0 else (at + 3) % len(COMPARISONS)]()]
        case ast.BinOp(op=op):
            at = next(i for i, kind in enumerate(ARITHMETIC) if isinstance(op, kind))
            node.op = ARITHMETIC[(at + 1 + way) % len(ARITHMETIC)]()
        case ast.Constant(value=bool(value)):
            node.value = not value
        case ast.Constant(value=int(value) | float(value)):
            node.value = (value + 1, value - 1, float(value) if type(value) is int else -value)[way]
        case ast.Constant(value=str(text)):
            node.value = (text.swapcase() + " ", "")[way]
        case ast.If() | ast.IfExp() | ast.While():
            node.test = ast.UnaryOp(ast.Not(), node.test) if way == 0 else ast.Constant(True)
        case ast.BoolOp(op=op):
            if way == 0:
                node.op = ast.Or() if isinstance(op, ast.And) else ast.And()
            else:
                node.values = node.values[:1] * 2
        case ast.Return(value=ast.expr() as value):
            node.value = ast.List([value], ast.Load()) if way == 0 else ast.Constant(None)
        case ast.Tuple(elts=elts) | ast.List(elts=elts):
            node.elts = elts[::-1] if len(elts) > 1 else []
