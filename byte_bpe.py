"""Byte-level BPE as Hugging Face's files have it: its alphabet, its merges, and writing it.

    save_bpe(directory, vocab, merges, [BYTE_LEVEL], specials={EOT: 256}, ignore_merges=False)

Plain Python: tokenizer.py makes such files of its own tokenizers, for transformers and vLLM.
"""

import functools
import itertools
import json
import os
from pathlib import Path

EOT = "<|endoftext|>"
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
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [
        {"id": i, "content": token, "special": True} | flags
        for token, i in sorted(specials.items(), key=lambda item: item[1])
    ]
    definition = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre_tokenizers},
        "post_processor": None,
        "decoder": BYTE_LEVEL,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": ignore_merges},
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOT if EOT in specials else None,
        "clean_up_tokenization_spaces": False,
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(definition, ensure_ascii=False, indent=1) + "\n"
    (directory / "tokenizer.json").write_text(text, encoding="utf-8")
    text = json.dumps(config, indent=2) + "\n"
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")


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
