"""A small real corpus from the Python standard library's own sources on this machine.

    python scripts/make_corpus.py                          # data/stdlib, byte tokenizer
    python scripts/make_corpus.py --tokenizer gpt2 --out data/stdlib-gpt2

writes, from the standard library's modules (not their tests, nor tables of text):

    OUT/stdlib_train_000000.npy …   token shards in FineWeb's layout: 1-D uint16 (uint32 where the
    OUT/stdlib_val_000000.npy …     vocabulary needs it), end-of-text before each document
    OUT/val_text/*.txt              the validation documents as plain text, for --data-mode text
    OUT/corpus.json                 how it was made; its presence means that OUT is complete

Files are split by a hash of their path, so the split is the same on every run and, file by file, on
every Python version. Running it again does nothing while sources and settings are the same. The new
corpus is built beside OUT and renamed into place: OUT is never half written.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import installed  # noqa: E402, F401

import numpy as np  # noqa: E402

import cli  # noqa: E402
import durable  # noqa: E402
from tokenizer import Tokenizer, build_tokenizer  # noqa: E402

# Installed packages are not the library; its tests are missing from some distributions; help
# texts and code pages are tables, and one of the former would be most of the validation split.
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
SKIPPED |= {"pydoc_data", "encodings", "__pycache__"}
BATCH = 64  # documents encoded at a time


def main():
    args = parse_args()
    if not 0 < args.val_fraction < 1:
        raise ValueError(f"--val-fraction must lie between 0 and 1, not {args.val_fraction}")
    durable.check_writable(args.out, "--out")
    documents = library_sources()
    made_from = {
        "tokenizer": args.tokenizer,
        "val_fraction": args.val_fraction,
        "shard_tokens": args.shard_tokens,
        "python": sysconfig.get_python_version(),
        "sources": hash_of(documents),
    }
    if is_up_to_date(args.out, made_from):
        print(f"{args.out} is already complete; delete it to build it anew")
        return
    partial = args.out.with_name(f".{args.out.name}.{os.getpid()}.partial")
    try:
        counts = write_corpus(
            partial, documents, args.tokenizer, args.val_fraction, args.shard_tokens
        )
        text = json.dumps(made_from | counts, indent=2) + "\n"
        (partial / "corpus.json").write_text(text, encoding="utf-8")
        replace_directory(partial, args.out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for split in ("train", "val"):
        print(f"{split}: {counts[split]['files']:,} files, {counts[split]['tokens']:,} tokens")
    print(f"written to {args.out}")


def parse_args() -> argparse.Namespace:
    p = cli.parser(__doc__)
    p.add_argument("--out", type=Path, default=ROOT / "data" / "stdlib")
    p.add_argument("--tokenizer", default="byte", help="as --tokenizer-name elsewhere (byte)")
    p.add_argument("--val-fraction", type=float, default=0.05, help="of the files (0.05)")
    p.add_argument("--shard-tokens", type=cli.positive_int, default=100_000_000)
    return p.parse_args()


def library_sources() -> list[tuple[str, str]]:
    """[(path within the library, text)] of every UTF-8 source file, sorted by path."""
    library = Path(sysconfig.get_path("stdlib"))
    documents = []
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library)
        if SKIPPED.isdisjoint(name.parts):
            try:
                text = path.read_bytes().decode("utf-8")
            except UnicodeDecodeError:
                continue  # a few files are Latin-1 on purpose
            if text.strip():
                documents.append((name.as_posix(), text))
    if not documents:
        raise ValueError(f"{library}: no Python sources; this Python ships its library compiled")
    return documents


def hash_of(documents: list[tuple[str, str]]) -> str:
    digest = hashlib.sha256()
    for name, text in documents:
        digest.update(f"{name}\0{len(text)}\0{text}".encode())
    return digest.hexdigest()


def is_validation(name: str, fraction: float) -> bool:
    value = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    return value < fraction * 2**64


def is_up_to_date(out: Path, made_from: dict) -> bool:
    """Whether OUT is the corpus wanted. Refuses an OUT that this script did not make."""
    if not out.exists():
        return False
    try:
        found = json.loads((out / "corpus.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ValueError(
            f"{out} exists but is no corpus of this script; choose another --out"
        ) from None
    return all(found.get(key) == value for key, value in made_from.items())


def write_corpus(
    directory: Path,
    documents: list[tuple[str, str]],
    tokenizer_name: str,
    val_fraction: float,
    shard_tokens: int,
) -> dict:
    """Write both splits; returns {"train": {"files": …, "tokens": …}, "val": …}."""
    tokenizer = build_tokenizer(tokenizer_name)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer {tokenizer_name!r} has no end-of-text token")
    (directory / "val_text").mkdir(parents=True)
    splits = {"train": [], "val": []}
    for name, text in documents:
        splits["val" if is_validation(name, val_fraction) else "train"].append((name, text))
    for name, text in splits["val"]:
        file = directory / "val_text" / (name.replace("/", "__") + ".txt")
        file.write_bytes(text.encode())
    counts = {}
    with cli.progress(len(documents), "tokenising", "files") as bar:
        for split, members in splits.items():
            if not members:
                raise ValueError(f"--val-fraction {val_fraction} leaves {split} empty")
            tokens = tokenise([text for _, text in members], tokenizer, bar)
            for i, start in enumerate(range(0, len(tokens), shard_tokens)):
                shard = tokens[start : start + shard_tokens]
                np.save(directory / f"stdlib_{split}_{i:06d}.npy", shard)
            counts[split] = {"files": len(members), "tokens": len(tokens)}
    return counts


def tokenise(texts: list[str], tokenizer: Tokenizer, bar) -> np.ndarray:
    """All documents as one array, end-of-text before each."""
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    eot, parts = np.array([tokenizer.eos_token_id], dtype=dtype), []
    for start in range(0, len(texts), BATCH):
        for ids in tokenizer.encode_batch(texts[start : start + BATCH]):
            parts += [eot, ids.astype(dtype)]
        bar.update(min(BATCH, len(texts) - start))
    return np.concatenate(parts)


def replace_directory(new: Path, old: Path) -> None:
    """Put `new` where `old` is. A kill between the two renames leaves no OUT, never a torn one."""
    discarded = old.with_name(f".{old.name}.{os.getpid()}.old")
    if old.exists():
        old.rename(discarded)
    new.rename(old)
    shutil.rmtree(discarded, ignore_errors=True)


if __name__ == "__main__":
    cli.run(main)
