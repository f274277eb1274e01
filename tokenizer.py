"""Tokenizers behind one interface: text to token ids, and how many bytes each token stands for.

    from tokenizer import build_tokenizer
    build_tokenizer("byte")                          # built in: 256 bytes and <|endoftext|>
    build_tokenizer("gpt2")                          # any tiktoken encoding
    build_tokenizer("checkpoints/checkpoint-1000")   # a local directory with tokenizer files
    build_tokenizer("model-Q4_K_M.gguf")             # a GGUF's own, or nanochat's tokenizer.pkl
    build_tokenizer("Qwen/Qwen2.5-0.5B")             # a Hugging Face hub name

Every tokenizer has
    name, vocab_size, eos_token_id (end of text), bos_token_id     the last two may be None
    special_ids: ids that no text encodes to       fingerprint: a hash of its definition
    adds_bos: whether transformers would put a BOS before a text, as for Llama; encode does not
    splits_at_newline: whether cutting a text at SAFE_BREAK is known to keep its tokens
    chat_templates: {name: Jinja text}, "default" among them, or none; special_tokens: {"bos_token":
    its text, …}, which templates write
    encode(text) -> ids, encode_batch(texts) -> arrays of ids, in threads, decode(ids) -> text
    token_bytes() -> [vocab_size] int32, the UTF-8 bytes that each id stands for; 0 for special ones
    save(directory): as Hugging Face files with the same ids for every text
Encoding adds no special tokens, and text that looks like one ("<|endoftext|>" in a document) is
encoded as the ordinary text it is, unless `specials` says that it is one, as in what a chat
template writes. tiktoken and transformers are imported only when asked for.
"""

import functools
import hashlib
import itertools
import json
import os
import re
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from cli import first_line
from tokenizing.byte_bpe import (
    BOS,
    BYTE_LEVEL,
    EOT,
    byte_alphabet,
    is_byte_tokenizer,
    mentions,
    save_bpe,
    save_ranks,
)
from tokenizing.chat_templates import CHAT_TEMPLATE, named_templates, settings_of, templates_beside

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model", "vocab.txt", "spiece.model")
# what tells how text is split, of which one must be there
SAYS_THE_CLASS: tuple[str, ...] = ("tokenizer.json", "tokenizer_config.json", "config.json")
# all that goes along with a copy
TOKENIZER_COPIES: tuple[str, ...] = (*TOKENIZER_FILES, "merges.txt", "tokenizer_config.json")
TOKENIZER_COPIES += ("special_tokens_map.json", "added_tokens.json", CHAT_TEMPLATE)
HOLD_TOKENIZERS = (".gguf", ".pkl")  # files of others that one lies in
# Where a long text can be cut without changing its tokens, for tokenizers that say so with
# `splits_at_newline`: after a newline between a visible character and a letter, digit or other
# non-ASCII character. There the patterns of GPT-2, cl100k, o200k, Llama 3, Qwen and DeepSeek all
# end a word: a lone newline joins at most the punctuation before it, and never what follows.
# (After any newline would be wrong: GPT-2 reads "\n\n" as one token, but "\n\nB" as "\n", "\n",
# "B".) In UTF-8, so that a file can be cut before it is decoded: the bytes refused before the
# newline, and C2, E1, E2, E3 80 after it, are those that Unicode's spaces end and begin with.
SAFE_BREAK = re.compile(
    rb"(?<=[!-~\x80-\xff])(?<!\xc2[\x85\xa0])(?<!\xe1\x9a\x80)(?<!\xe2\x80[\x80-\x8a\xa8\xa9\xaf])"
    rb"(?<!\xe2\x81\x9f)(?<!\xe3\x80\x80)\n(?=[A-Za-z0-9\xc3-\xdf\xe4-\xf4]|\xe3[\x81-\xbf])"
)
ACROSS_A_BREAK = "\n[A-Za-z0-9\xc3-\xf4]"  # in a token's bytes: it would reach over a cut


def build_tokenizer(name: str | os.PathLike) -> "Tokenizer":
    """The tokenizer called `name`: "byte", a tiktoken encoding, a local directory or file, or a hub
    name.

    A bare name of a tiktoken encoding means tiktoken even if a directory is called the same; write
    `./gpt2` for the directory. Raises ValueError, in one line, for a name that leads nowhere.
    """
    name = os.fspath(name)
    if name == "byte":
        return ByteTokenizer()
    import tiktoken

    if name in tiktoken.list_encoding_names():
        return TiktokenTokenizer(_tiktoken_encoding(name))
    if Path(name).is_dir():
        return _tokenizer_from_directory(Path(name))
    if Path(name).is_file() and Path(name).suffix in HOLD_TOKENIZERS:
        return _tokenizer_from_file(Path(name))
    if Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"tokenizer {name!r}: no such directory")
    return HuggingFaceTokenizer(_hub_tokenizer(name), name)


class ByteTokenizer:
    """One token per UTF-8 byte (its value is its id) and 256 for <|endoftext|>."""

    name = "byte"
    vocab_size = 257
    eos_token_id = 256
    bos_token_id = None
    special_ids = (256,)
    special_tokens: ClassVar[dict[str, str]] = {"eos_token": EOT}
    splits_at_newline = True
    adds_bos = False

    def __init__(self, chat_templates: dict[str, str] | None = None):
        self.chat_templates = chat_templates or {}

    @property
    def fingerprint(self) -> str:
        return _hash(b"byte", EOT.encode())

    def encode(self, text: str) -> list[int]:
        return list(utf8_bytes(text))

    def encode_batch(self, texts: list[str], specials: bool = False) -> list[np.ndarray]:
        if not specials:
            return [np.frombuffer(utf8_bytes(text), dtype=np.uint8) for text in texts]
        return [np.array(self._encode_chat(text), dtype=np.uint32) for text in texts]

    def _encode_chat(self, text: str) -> list[int]:
        parts = [[*utf8_bytes(part), self.eos_token_id] for part in text.split(EOT)]
        return list(itertools.chain(*parts))[:-1]

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(
            bytes([i]) if i < 256 else EOT.encode() if i == 256 else b"\xef\xbf\xbd" for i in ids
        ).decode("utf-8", errors="replace")

    def token_bytes(self) -> np.ndarray:
        return np.array([1] * 256 + [0], dtype=np.int32)

    def save(self, directory: str | os.PathLike) -> None:
        """A byte-level BPE without merges."""
        vocab = {letter: i for i, letter in enumerate(byte_alphabet())} | {EOT: 256}
        save_bpe(directory, vocab, [], [BYTE_LEVEL], specials={EOT: 256}, ignore_merges=False)
        if "default" in self.chat_templates:
            text = self.chat_templates["default"]
            (Path(directory) / CHAT_TEMPLATE).write_text(text, encoding="utf-8")


class TiktokenTokenizer:
    """A tiktoken.Encoding; the gaps in its ids are `special_ids` too."""

    adds_bos = False
    chat_templates: ClassVar[dict[str, str]] = {}

    def __init__(self, encoding: Any):
        self.encoding = encoding
        self.name = encoding.name
        self.vocab_size = encoding.n_vocab
        self.bos_token_id = encoding._special_tokens.get(BOS)
        self.eos_token_id = encoding._special_tokens.get(EOT, self.bos_token_id)
        texts = {i: text for text, i in encoding._special_tokens.items()}
        ids = {"bos_token": self.bos_token_id, "eos_token": self.eos_token_id}
        self.special_tokens = {name: texts[i] for name, i in ids.items() if i is not None}

    @functools.cached_property
    def splits_at_newline(self) -> bool:
        across = re.compile(ACROSS_A_BREAK.encode("latin-1"))
        return not any(map(across.search, self.encoding._mergeable_ranks))

    @functools.cached_property
    def special_ids(self) -> tuple[int, ...]:
        return tuple(np.flatnonzero(self.token_bytes() == 0).tolist())

    @functools.cached_property
    def fingerprint(self) -> str:
        ranks = sorted(self.encoding._mergeable_ranks.items(), key=lambda item: item[1])
        specials = json.dumps(sorted(self.encoding._special_tokens.items()))
        parts = [b"%d %s" % (rank, token.hex().encode()) for token, rank in ranks]
        return _hash(b"tiktoken", self.encoding._pat_str.encode(), specials.encode(), *parts)

    def encode(self, text: str) -> list[int]:
        return self.encoding.encode_ordinary(text)

    def encode_batch(self, texts: list[str], specials: bool = False) -> list[np.ndarray]:
        """uint32 arrays, made in threads: tiktoken drops the GIL."""
        n_threads = min(8, os.cpu_count() or 1, len(texts))
        if n_threads < 2:
            return self._encode_all(texts, specials)
        cuts = [len(texts) * i // n_threads for i in range(n_threads + 1)]
        shares = [texts[a:b] for a, b in itertools.pairwise(cuts)]
        with ThreadPoolExecutor(n_threads) as pool:
            encode = functools.partial(self._encode_all, specials=specials)
            return [ids for share in pool.map(encode, shares) for ids in share]

    def _encode_all(self, texts: list[str], specials: bool) -> list[np.ndarray]:
        """In one call, so that short texts do not wait for the GIL one by one: an end of text parts
        them, on either side of which tiktoken encodes anew."""
        texts, known = [utf8_bytes(text).decode() for text in texts], self.encoding._special_tokens
        together = not specials and EOT in known and not any(EOT in text for text in texts)
        allowed: Any = "all" if specials else {EOT} if together else set()
        encode = functools.partial(
            self.encoding.encode_to_numpy, allowed_special=allowed, disallowed_special=()
        )
        if not together:
            return [encode(text) for text in texts]
        ids = encode(EOT.join(texts))
        ends = [-1, *np.flatnonzero(ids == known[EOT]).tolist(), len(ids)]
        return [ids[before + 1 : end] for before, end in itertools.pairwise(ends)]

    @functools.cached_property
    def _bytes_of_id(self) -> dict[int, bytes]:
        """Of every ordinary token."""
        return {rank: token for token, rank in self.encoding._mergeable_ranks.items()}

    def decode(self, ids: Iterable[int]) -> str:
        specials = {i: token.encode() for token, i in self.encoding._special_tokens.items()}
        # an id beyond the vocabulary (a padded head can sample one) shows as U+FFFD
        pieces = (
            self._bytes_of_id.get(i) or specials.get(i, b"\xef\xbf\xbd") for i in map(int, ids)
        )
        return b"".join(pieces).decode("utf-8", errors="replace")

    def token_bytes(self) -> np.ndarray:
        counts = np.zeros(self.vocab_size, dtype=np.int32)
        for i, piece in self._bytes_of_id.items():
            counts[i] = len(piece)
        return counts

    def save(self, directory: str | os.PathLike) -> None:
        """A byte-level BPE, its merges found from tiktoken's ranks."""
        specials, ranks = dict(self.encoding._special_tokens), self.encoding._mergeable_ranks
        taken = {*ranks.values(), *specials.values()}
        # a tokenizer.json numbers added tokens densely, so gaps need a name
        specials |= {f"<|unused_{i}|>": i for i in range(self.vocab_size) if i not in taken}
        save_ranks(directory, ranks, specials, self.encoding._pat_str)


class HuggingFaceTokenizer:
    """A transformers tokenizer, fast ones through their Rust backend.

    `token_bytes` is exact for byte-level BPE (GPT-2, Llama 3, Qwen, …). For SentencePiece-like
    vocabularies "▁" counts as the one byte of its space and <0xAB> as one byte: right up to the
    space that such tokenizers put before a text (one byte too many per text encoded) and whatever
    a normaliser changes (NFKC, lower case).
    """

    def __init__(self, tok: Any, name: str):
        self.tok, self.name, self._encoding = tok, name, threading.Lock()
        self.backend = getattr(tok, "backend_tokenizer", None)
        self._definition = json.loads(self.backend.to_str()) if self.backend else {}
        if self.backend:  # a tokenizer.json may carry settings that would cut or pad every text
            self.backend.no_truncation()
            self.backend.no_padding()
        vocab = tok.get_vocab()
        self.vocab_size = max(vocab.values()) + 1
        self.eos_token_id, self.bos_token_id = tok.eos_token_id, tok.bos_token_id
        self.chat_templates = named_templates(getattr(tok, "chat_template", None))
        self.special_tokens = {name: str(text) for name, text in tok.special_tokens_map.items()}
        self._counts = self._count_bytes(vocab)
        self.special_ids = tuple(np.flatnonzero(self._counts == 0).tolist())
        self.splits_at_newline = self._splits_at_newline(vocab)

    @functools.cached_property
    def adds_bos(self) -> bool:
        return self.bos_token_id is not None and self.tok("A").input_ids[0] == self.bos_token_id

    @functools.cached_property
    def fingerprint(self) -> str:
        definition = self._definition or sorted(self.tok.get_vocab().items())
        text = json.dumps([definition, self.eos_token_id, self.bos_token_id], sort_keys=True)
        return _hash(b"transformers", text.encode())

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: list[str], specials: bool = False) -> list[np.ndarray]:
        """uint32 arrays; the backend spreads the texts over threads."""
        texts = [utf8_bytes(text).decode() for text in texts]
        if self.backend is None:
            options = {"add_special_tokens": False, "split_special_tokens": not specials}
            return [
                np.array(self.tok.encode(t, **options, verbose=False), dtype=np.uint32)
                for t in texts
            ]
        with self._encoding:  # the switch is the backend's
            self.backend.encode_special_tokens = not specials
            encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(e.ids, dtype=np.uint32) for e in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        ids = [int(i) for i in ids]
        return self.tok.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def token_bytes(self) -> np.ndarray:
        return self._counts.copy()

    def save(self, directory: str | os.PathLike) -> None:
        self.tok.save_pretrained(directory)

    def is_byte_level(self) -> bool:
        return mentions(self._definition.get("decoder"), "ByteLevel")

    def _count_bytes(self, vocab: dict[str, int]) -> np.ndarray:
        counts = np.zeros(self.vocab_size, dtype=np.int32)
        alphabet = set(byte_alphabet()) if self.is_byte_level() else None
        for token, i in vocab.items():
            if alphabet is not None and alphabet.issuperset(token):
                counts[i] = len(token)
            elif alphabet is None and re.fullmatch(r"<0x[0-9A-F]{2}>", token):
                counts[i] = 1
            else:
                counts[i] = len(token.replace("▁", " ").encode())
        for i, added in self.tok.added_tokens_decoder.items():
            counts[i] = 0 if added.special else len(added.content.encode())
        counts[list(self.tok.all_special_ids)] = 0
        return counts

    def _splits_at_newline(self, vocab: dict[str, int]) -> bool:
        pre_tokenizer, normalizer = map(self._definition.get, ("pre_tokenizer", "normalizer"))
        prefixed = mentions(pre_tokenizer, "ByteLevel", add_prefix_space=True)
        plain = normalizer is None or normalizer.get("type") == "NFC"  # NFKC can make spaces
        added = [token.content for token in self.tok.added_tokens_decoder.values()]
        # vocabularies that merge across spaces (SuperBPE) may have tokens that reach over the cut
        across = re.compile(ACROSS_A_BREAK.replace("\n", byte_alphabet()[ord("\n")]))
        reaching = any(map(across.search, vocab))
        local = not prefixed and plain and not reaching and "\n" not in "".join(added)
        return self.is_byte_level() and local


Tokenizer = ByteTokenizer | TiktokenTokenizer | HuggingFaceTokenizer


# ---------------------------------------------------------------------------------------------
# Where a name leads


def _tiktoken_encoding(name: str):
    import tiktoken

    try:
        return tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:  # requests' errors are OSErrors
        cache = os.environ.get("TIKTOKEN_CACHE_DIR", "unset")
        url = getattr(getattr(error, "request", None), "url", None) or f"{name}.tiktoken"
        reason = first_line(error) if isinstance(error, ValueError) else type(error).__name__
        raise ValueError(
            f"tokenizer {name!r}: {url} is neither in TIKTOKEN_CACHE_DIR ({cache}) nor could it be "
            f"downloaded ({reason}); where there is internet run `TIKTOKEN_CACHE_DIR=DIR python -c "
            f"\"import tiktoken; tiktoken.get_encoding('{name}')\"` and bring DIR here, or pass a "
            "local tokenizer directory"
        ) from None


def _tokenizer_from_directory(path: Path) -> "Tokenizer":
    """transformers' tokenizer of a local directory, or the byte tokenizer if that is what it is."""
    if not any((path / file).is_file() for file in TOKENIZER_FILES):
        raise ValueError(
            f"tokenizer {str(path)!r}: the directory holds no tokenizer files (tokenizer.json, or "
            "vocab.json and merges.txt, or tokenizer.model); pass the name of the tokenizer that "
            "the model was trained with"
        )
    if is_byte_tokenizer(path / "tokenizer.json"):
        return ByteTokenizer(templates_beside(path))
    if not any((path / name).is_file() for name in SAYS_THE_CLASS):
        raise ValueError(
            f"tokenizer {str(path)!r}: no tokenizer.json, and none of "
            f"{', '.join(SAYS_THE_CLASS[1:])} says what kind its files are of: a vocabulary alone "
            "does not tell how text is split"
        )
    from transformers import AutoTokenizer

    try:
        return HuggingFaceTokenizer(
            AutoTokenizer.from_pretrained(
                str(path), local_files_only=True, trust_remote_code=False
            ),
            str(path),
        )
    except Exception as error:  # transformers raises anything, from TypeError to Rust's Exception
        code = settings_of(path).get("auto_map")
        why = (
            f"it names code of its own ({code}), which is never run" if code else first_line(error)
        )
        raise ValueError(f"tokenizer {str(path)!r}: transformers cannot open it: {why}") from error


def _tokenizer_from_file(path: Path) -> "Tokenizer":
    """That of a GGUF file, or a tiktoken encoding that nanochat pickled."""
    from formats.vocabularies import of_gguf, of_tiktoken_pickle

    if path.suffix == ".pkl":
        import tiktoken

        ranks, specials, pattern = of_tiktoken_pickle(path)
        encoding = _made(
            lambda: tiktoken.Encoding(
                path.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials
            ),
            path,
        )
        return TiktokenTokenizer(encoding)
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    definition, about = of_gguf(path)
    text = json.dumps(definition)
    backend = _made(lambda: tokenizers.Tokenizer.from_str(text), path)
    tok = PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **about
    )
    return HuggingFaceTokenizer(tok, str(path))


def _made(make: Callable[[], Any], path: Path) -> Any:
    """What a library makes of a vocabulary that somebody else wrote."""
    try:
        return make()
    except BaseException as error:  # Rust's panics are no Exceptions
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        reason = str(error).partition("\n")[0][:300]
        raise ValueError(f"tokenizer {str(path)!r}: is damaged: {reason}") from None


def _hub_tokenizer(name: str):
    from huggingface_hub import HfApi
    from transformers import AutoTokenizer

    try:  # the cache first: it also works offline
        return AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError):
        pass  # not cached: ask the hub
    try:
        HfApi().model_info(name, timeout=10)  # offline it fails at once; from_pretrained retries
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # httpx, hub and transformers errors share no base class
        raise ValueError(
            f"tokenizer {name!r}: not 'byte', not a tiktoken encoding, not a local directory, and "
            f"the hub did not give it ({type(error).__name__}: {first_line(error)}); where there "
            f'is internet run `python -c "from transformers import AutoTokenizer as A; '
            f"A.from_pretrained('{name}').save_pretrained('DIR')\"` and pass DIR"
        ) from None


def utf8_bytes(text: str) -> bytes:
    """UTF-8 bytes of a str. A lone surrogate (JSON may hold one) becomes U+FFFD, as in tiktoken."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def _hash(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
