"""Tokenizers that lie in other files: in a GGUF's metadata, and in nanochat's tokenizer.pkl.

    definition, about = of_gguf(path)        # tokenizer.json's object, and {bos_token: …}
    ranks, specials, pattern = of_tiktoken_pickle(path)

A vocabulary alone does not say how text is split before its merges: a GGUF names the rule, and one
that is not known here is refused, since its tokens would be other ones. A pickle is read without
running it. Standard library only.
"""

from pathlib import Path
from typing import Any

from formats.gguf_file import parts
from formats.gguf_file import read as read_gguf
from formats.pickles import Names
from formats.pickles import read as read_pickle
from inputs import read_small
from tokenizing.byte_bpe import BYTE_LEVEL, added_token, bpe_definition, split_by

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # of tokenizer.ggml.token_type

GPT2 = [BYTE_LEVEL | {"use_regex": True}]
DIGITS = [{"type": "Digits", "individual_digits": True}, *GPT2]
ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS = rf"{ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|"
SIGNS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cased(ending: str, digits: str) -> str:
    """o200k's form: words of capitals and words of small letters."""
    lead, signs = r"[^\r\n\p{L}\p{N}]?", r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|"
    words = f"{lead}{UPPER}*{LOWER}+{ending}|{lead}{UPPER}+{LOWER}*{ending}|"
    return words + digits + signs + SPACES


SPLITS: dict[str, list[dict]] = {  # tokenizer.ggml.pre: how text is split before it is merged
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais"), GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell"), DIGITS),
    **dict.fromkeys(
        ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "dbrx", "smaug-bpe"),
        split_by(WORDS + r"\p{N}{1,3}" + SIGNS + SPACES),
    ),
    **dict.fromkeys(
        ("qwen2", "deepseek-r1-qwen", "stablelm2", "hunyuan", "megrez"),
        split_by(WORDS + r"\p{N}" + SIGNS + SPACES),
    ),
    **dict.fromkeys(("gpt-4o", "llama4"), split_by(_cased(ENDINGS + "?", r"\p{N}{1,3}"))),
    "tekken": split_by(_cased("", r"\p{N}")),
}
WHOLE_WORDS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "tekken")  # before merges
COMPOSED = ("qwen2", "deepseek-r1-qwen")  # NFC comes first


# ---------------------------------------------------------------------------------------------
# GGUF


def of_gguf(path: Path) -> tuple[dict, dict[str, Any]]:
    """(the object of a tokenizer.json, the names of its special tokens and its chat template) of a
    GGUF file. ValueError where it holds none, or one of a kind that is not known."""
    held = read_gguf(parts(path)[0]).metadata
    kind, tokens = held.get("tokenizer.ggml.model"), held.get("tokenizer.ggml.tokens")
    if kind not in ("gpt2", "llama") or not isinstance(tokens, list):
        what = f"of the kind {kind!r:.60}, which is not known here" if kind else "missing"
        raise ValueError(f"{path}: its tokenizer is {what}: name one with --tokenizer-name")
    vocab = {token: i for i, token in enumerate(tokens) if type(token) is str}
    types = held.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    if len(vocab) != len(tokens) or not isinstance(types, list) or len(types) != len(tokens):
        raise ValueError(f"{path}: its vocabulary holds a token twice, or not one type for each")
    bos = _token(held, "bos", tokens, path)
    added = [
        added_token(i, tokens[i], special=kind_of == CONTROL)
        for i, kind_of in enumerate(types)
        if kind_of in (CONTROL, USER_DEFINED)
    ]
    if kind == "gpt2":
        definition = _bpe(held, vocab, added, path)
    else:
        definition = _sentencepiece(held, vocab, added, path)
    usual = kind == "llama" or held.get("tokenizer.ggml.pre") in WHOLE_WORDS
    if bos is not None and held.get("tokenizer.ggml.add_bos_token", usual):
        definition["post_processor"] = _with_bos(bos, vocab[bos])
    about = {"bos_token": bos, "eos_token": _token(held, "eos", tokens, path)}
    template = held.get("tokenizer.chat_template")
    return definition, about | ({"chat_template": template} if type(template) is str else {})


def _token(held: dict, which: str, tokens: list[str], path: Path) -> str | None:
    """A special token, by the key of its id."""
    i = held.get(f"tokenizer.ggml.{which}_token_id")
    if i is None:
        return None
    if type(i) is not int or not 0 <= i < len(tokens):
        raise ValueError(f"{path}: its {which}_token_id {i!r:.50} is none of {len(tokens):,}")
    return tokens[i]


def _bpe(held: dict, vocab: dict[str, int], added: list[dict], path: Path) -> dict:
    """Byte-level merges, as GPT-2 has them."""
    pre, merges = held.get("tokenizer.ggml.pre"), held.get("tokenizer.ggml.merges")
    if type(pre) is not str or pre not in SPLITS:
        raise ValueError(
            f"{path}: its tokenizer splits text as {pre!r:.60}, which is not known here: name a "
            "directory with the model's tokenizer.json (--tokenizer-name)"
        )
    if not isinstance(merges, list) or not all(type(m) is str for m in merges):
        raise ValueError(f"{path}: its tokenizer lacks merges")
    definition = bpe_definition(vocab, merges, SPLITS[pre], added, pre in WHOLE_WORDS)
    if pre in COMPOSED:
        definition["normalizer"] = {"type": "NFC"}
    return definition


def _sentencepiece(held: dict, vocab: dict[str, int], added: list[dict], path: Path) -> dict:
    """SentencePiece's BPE, as Llama 2 has it: pairs merge in the order of their piece's score."""
    scores = held.get("tokenizer.ggml.scores")
    numbers = scores if isinstance(scores, list) else []
    if len(numbers) != len(vocab) or any(type(score) is not float for score in numbers):
        raise ValueError(f"{path}: its tokenizer lacks a score for each of {len(vocab):,} pieces")
    of = dict(zip(vocab, numbers))
    known = {token["content"] for token in added}
    pairs = [
        (-of[piece], vocab[piece[:cut]], vocab[piece[cut:]], [piece[:cut], piece[cut:]])
        for piece in vocab
        if len(piece) > 1 and piece not in known
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    decoders: list[dict] = [back, {"type": "ByteFallback"}, {"type": "Fuse"}]
    normalizers = [spaces]
    if held.get("tokenizer.ggml.add_space_prefix", True):
        normalizers = [{"type": "Prepend", "prepend": "▁"}, spaces]
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unknown = held.get("tokenizer.ggml.unknown_token_id")
    tokens = list(vocab)
    definition = bpe_definition(vocab, [pair for *_, pair in sorted(pairs)], [], added, False)
    definition["normalizer"] = {"type": "Sequence", "normalizers": normalizers}
    definition["decoder"] = {"type": "Sequence", "decoders": decoders}
    unk = tokens[unknown] if type(unknown) is int and 0 <= unknown < len(tokens) else None
    definition["model"] |= {"byte_fallback": True, "fuse_unk": True, "unk_token": unk}
    return definition


def _with_bos(bos: str, i: int) -> dict:
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    a, b = ({"Sequence": {"id": which, "type_id": n}} for n, which in enumerate("AB"))
    tokens = {bos: {"id": bos, "ids": [i], "tokens": [bos]}}
    single, pair = [first, a], [first, a, {"SpecialToken": {"id": bos, "type_id": 1}}, b]
    kind = {"type": "TemplateProcessing", "single": single, "pair": pair}
    return kind | {"special_tokens": tokens}


# ---------------------------------------------------------------------------------------------
# A pickled tiktoken.Encoding

MAX_PICKLE = 64 << 20  # one of 100,000 tokens has 2 MB


def of_tiktoken_pickle(path: Path) -> tuple[dict[bytes, int], dict[str, int], str]:
    """(ranks, special tokens, the pattern that splits text) of a pickled tiktoken.Encoding."""
    names: Names = {"tiktoken.core.Encoding": None}
    encoding = read_pickle(read_small(path, MAX_PICKLE), str(path), names)
    state = getattr(encoding, "state", None)
    if not isinstance(state, dict) or encoding.name != "tiktoken.core.Encoding":
        raise ValueError(f"{path} is no pickled tiktoken.Encoding")
    wanted: tuple[tuple[str, type, type, type], ...]
    wanted = (("mergeable_ranks", dict, bytes, int), ("special_tokens", dict, str, int))
    for name, kind, key, value in wanted:
        held = state.get(name)
        plain = type(held) is kind and all(
            type(k) is key and type(v) is value for k, v in held.items()
        )
        if not plain:
            raise ValueError(f"{path}: its {name} are none of a tiktoken.Encoding")
    if type(state.get("pat_str")) is not str:
        raise ValueError(f"{path}: it does not say how text is split (pat_str)")
    ids = [*state["mergeable_ranks"].values(), *state["special_tokens"].values()]
    if not ids or len(set(ids)) < len(ids) or not 0 <= min(ids) <= max(ids) < 1 << 24:
        raise ValueError(f"{path}: its tokens have no ids, or two of them have the same")
    return state["mergeable_ranks"], state["special_tokens"], state["pat_str"]
