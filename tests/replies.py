"""Replies as instruct models write them, and traps for who takes the code out of them.

for reply in replies(functions, 500, seed=0): ...      # functions: canonical programs, by name
"""

import random
from collections.abc import Iterator

BEFORE = [
    "",
    "Sure! Here is a solution:\n\n",
    "```\nfoo\n```\nThe idea:\n",
    "x = 3\n",
    "# Solution\n",
]
BEFORE += ["1. Sort\n2. Count\n\n", "Below is a Python script\n", "Let n be a number\n\n", "\t\n"]
FENCES = ["```python\n{}\n```\n", "```\n{}\n```", "{}\n", "~~~py\n{}\n~~~\n", "```python\n{}"]
AFTER = [
    "",
    "This works.\n",
    "\nprint({name}(1))\n",
    "\nassert {name}(1) == 2\n",
    "Done\n```\nx\n```",
]
AFTER += ['\nif __name__ == "__main__":\n    {name}(3)\n', "\n{name}(4)\nWe have O(n).\n"]
EXTRAS = [
    "import math\nfrom typing import List\n",
    "from __future__ import annotations\nimport os, sys\n",
    "LIMIT = 10\nother = LIMIT\n",
    "table['a'] = LIMIT\n(a, b) = 1, 2\n",
    "def helper(x):\n    return x + LIMIT\n",
    "def shows(x):\n    print(x)\n",
    "class Tree:\n    left = None\n    def depth(self): return helper(1)\n",
    "@cached\ndef helper2(x):\n    return x\n",
    "async def later():\n    return await shows(1)\n",
    "helper: int = 5\nLIMIT += 1\n",
    "for i in range(3):\n    helper(i)\n",
    "try:\n    import numpy\nexcept ImportError:\n    numpy = None\n",
    "'''a text'''\n",
    "x = 1; import re\n",
    "def gen(n):\n    yield n\n",
    "lam = lambda q: helper(q)\n",
    "s = f'{LIMIT} é {helper(2)}'\n",
    "def {name}(x):\n    return {{helper(x): Tree}}\n",
    "def {name}(x, *, k=LIMIT) -> 'Tree':\n    def inner(): return lam\n    inner()\n",
]


FUNCTIONS = {
    "area": 'def area(w, h):\n    """Of a sheet."""\n    return w * h\n',
    "count": "import collections as co\n\ndef count(xs):\n    c = co.Counter(xs)\n\n    return c\n",
    "depth": "def depth(t):\n    if not t:\n        return 0\n    return 1 + max(map(depth, t))\n",
    "show": "def show(x):\n    print(helper(x))\n",
}


def replies(functions: dict[str, str], n: int, seed: int) -> Iterator[tuple[str, str]]:
    """(name of the function asked for, reply), n of them."""
    rng = random.Random(seed)
    for _ in range(n):
        name = rng.choice(list(functions))
        parts = [
            part.replace("{name}", name).replace("{{", "{").replace("}}", "}")
            for part in rng.sample(EXTRAS, rng.randint(0, 4))
        ]
        parts.append(functions[name])
        rng.shuffle(parts)
        code = "\n".join(parts)
        if rng.random() < 0.1:
            code = code[: rng.randint(0, len(code))]  # cut off by the limit of tokens
        if rng.random() < 0.1:
            code = code.replace("    ", "\t")
        fence = rng.choice(FENCES).format(code.replace("{", "{{").replace("}", "}}"))
        fence = fence.replace("{{", "{").replace("}}", "}")
        yield name, rng.choice(BEFORE) + fence + rng.choice(AFTER).replace("{name}", name)
    for odd in (
        "",
        "\n",
        "no code",
        "return 1",
        "def f(x): return x",
        "pass\n",
        "x=1\n\x00",
        "'''",
    ):
        yield "f", odd
