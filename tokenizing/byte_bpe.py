"""Byte-level BPE as Hugging Face's files have it: its alphabet, its merges, and writing it.

    save_bpe(directory, vocab, merges, [BYTE_LEVEL], specials={EOT: 256}, ignore_merges=False)
    bpe_definition(vocab, merges, split_by(pattern), added, ignore_merges=True)

Plain Python: tokenizer.py makes such files of its own tokenizers, for transformers and vLLM, and
tokenizers of vocabularies that lie in others' files.
"""

import functools
import itertools
import json
import os
import re
from pathlib import Path
from typing import Any

EOT = "<|endoftext|>"
BOS = "<|bos|>"  # nanochat's, which begins every document and stands between two
# tokenizer.json's component that maps bytes to printable characters and back, and does no more
BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": False,
}


def save_bpe(
    directory: str | os.PathLike,
    vocab: dict[str, int],
    merges: list[str],
    pre_tokenizers: list[dict],
    specials: dict[str, int],
    ignore_merges: bool,
) -> None:
    """tokenizer.json and tokenizer_config.json of a byte-level BPE, for transformers and vLLM."""
    by_id = sorted(specials.items(), key=lambda item: item[1])
    added = [added_token(i, token) for token, i in by_id]
    definition = bpe_definition(vocab, merges, pre_tokenizers, added, ignore_merges)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": next((token for token in (EOT, BOS) if token in specials), None),
        **({"bos_token": BOS} if BOS in specials else {}),
        "clean_up_tokenization_spaces": False,
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(definition, ensure_ascii=False, indent=1) + "\n"
    (directory / "tokenizer.json").write_text(text, encoding="utf-8")
    text = json.dumps(config, indent=2) + "\n"
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")


def save_ranks(
    directory: str | os.PathLike, ranks: dict[bytes, int], specials: dict[str, int], pattern: str
) -> None:
    """The same of tiktoken's ranks, from which merges are found, and its pattern."""
    alphabet = byte_alphabet()
    spell = {token: "".join(alphabet[b] for b in token) for token in ranks}
    vocab = {spell[token]: rank for token, rank in ranks.items()}
    merges = [
        " ".join(spell[part] for part in parts)
        for token in sorted(ranks, key=lambda token: ranks[token])
        if len(token) > 1 and len(parts := merge_of(token, ranks)) == 2
    ]
    # Hugging Face's regex engine reads "{1,3}+" as a repeated group and "$" as end of line
    pattern = re.sub(r"(\{[0-9,]+\})\+", r"\1", pattern).replace("$", r"\z")
    # tiktoken takes a word that is a token whole, before any merge; so does ignore_merges
    save_bpe(directory, vocab | specials, merges, split_by(pattern), specials, ignore_merges=True)


def bpe_definition(
    vocab: dict[str, int],
    merges: list,
    pre_tokenizers: list[dict],
    added: list[dict],
    ignore_merges: bool,
) -> dict:
    """The object of a tokenizer.json. added: tokens that text is cut at first, of added_token."""
    pre_tokenizer = {"type": "Sequence", "pretokenizers": pre_tokenizers}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer if pre_tokenizers else None,
        "post_processor": None,
        "decoder": BYTE_LEVEL,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": ignore_merges},
    }


def added_token(i: int, content: str, special: bool = True) -> dict:
    """An entry of a tokenizer.json's `added_tokens`."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": content, "special": special} | flags


def split_by(pattern: str) -> list[dict]:
    """Components that cut text into words by a pattern, and write them as bytes."""
    regex = {"pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return [{"type": "Split"} | regex, BYTE_LEVEL]


def merge_of(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The parts that BPE has just before it makes `token`: two, for a vocabulary BPE trained."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pair_ranks = [ranks.get(a + b, len(ranks) * 2) for a, b in itertools.pairwise(parts)]
        best = min(range(len(pair_ranks)), key=pair_ranks.__getitem__)
        if pair_ranks[best] >= ranks[token]:
            break
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts


@functools.cache
def byte_alphabet() -> tuple[str, ...]:
    """The printable character that stands for each byte in byte-level BPE files (GPT-2's table):
    visible Latin-1 characters for themselves, the other bytes for U+0100 onwards, in order."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in visible]
    table = {b: chr(b) for b in visible} | {b: chr(256 + i) for i, b in enumerate(others)}
    return tuple(table[b] for b in range(256))


def is_byte_tokenizer(path: Path) -> bool:
    """Whether a tokenizer.json is the byte tokenizer's."""
    try:
        definition = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    vocab = {letter: i for i, letter in enumerate(byte_alphabet())} | {EOT: 256}
    model = definition.get("model", {}) if isinstance(definition, dict) else {}
    if model.get("vocab") != vocab or model.get("merges"):
        return False
    added = {token.get("content") for token in definition.get("added_tokens") or []}
    # a post-processor may put a BOS before every text: then it is transformers' to say
    return added <= {EOT} and definition.get("post_processor") in (None, BYTE_LEVEL)


def mentions(part: Any, kind: str, **settings: Any) -> bool:
    """Whether a component of a tokenizer.json, or one inside it, is a `kind` so set."""
    if isinstance(part, list):
        return any(mentions(p, kind, **settings) for p in part)
    if not isinstance(part, dict):
        return False
    here = part.get("type") == kind and all(part.get(k) == v for k, v in settings.items())
    return here or any(mentions(p, kind, **settings) for p in part.values())
