"""Real text for benchmarks: the Python sources found on this machine, as GPT-2 tokens.

    python benchmarks/corpus.py --out /dev/shm/bench.npy --tokens 100_000_000

Writes one 1-D uint16 shard in FineWeb's layout, end-of-text before each document. Where a machine
has too few sources, they are repeated and the number of repetitions is printed.
"""

import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cli  # noqa: E402
from tokenizer import Tokenizer, build_tokenizer  # noqa: E402


def main(argv=None):
    p = cli.parser(__doc__)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--tokens", type=cli.positive_int, default=100_000_000)
    p.add_argument("--tokenizer-name", default="gpt2")
    args = p.parse_args(argv)
    start = time.perf_counter()
    ids = tokenise(build_tokenizer(args.tokenizer_name), args.tokens)
    repeats = -(-args.tokens // len(ids))
    np.save(args.out, np.tile(ids, repeats)[: args.tokens])
    seconds = time.perf_counter() - start
    print(f"{args.tokens:,} tokens, {len(ids):,} of them distinct text, in {seconds:.1f} s")


def tokenise(tokenizer: Tokenizer, wanted: int) -> np.ndarray:
    """The sources in the order of their paths, 512 at a time, until there are enough tokens."""
    roots = sorted({Path(entry).resolve() for entry in sys.path if Path(entry).is_dir()} - {ROOT})
    paths = list(dict.fromkeys(path for root in roots for path in sorted(root.rglob("*.py"))))
    pieces, count = [], 0
    for start in range(0, len(paths), 512):
        texts = [path.read_text(errors="ignore") for path in paths[start : start + 512]]
        for ids in tokenizer.encode_batch([text for text in texts if text.strip()]):
            pieces.append(np.array([tokenizer.eos_token_id, *ids], dtype=np.uint16))
            count += len(pieces[-1])
        if count >= wanted:
            break
    return np.concatenate(pieces)


if __name__ == "__main__":
    cli.run(main)
