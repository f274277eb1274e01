"""Tokenizers against independent ones: transformers for tiktoken, UTF-8 itself for byte counts."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenizer as module
from tokenizer import SAFE_BREAK, ByteTokenizer, HuggingFaceTokenizer, TiktokenTokenizer
from tokenizer import build_tokenizer as build

UGLY = [
    "",
    " ",
    "\n",
    "\r\n\r\n",
    "a\n\nb \n \n  c\t\n",
    "<|endoftext|>",
    "x<|endoftext|> y",
    "naïve café, 日本語 текст 🙂👩‍👩‍👧 e\u0301 \u00a0 \u2028",
    "don't DON'T we'LL 1234567890 3.14 ½ ²³",
    ";\n/path //x\n{}\n",
    "a" * 3000,
    " " * 700 + "x",
    "\x00\x01\x7f",
    "\ufeffBOM",
]


@pytest.fixture(scope="module")
def gpt2(data_dir):
    import os

    os.environ["TIKTOKEN_CACHE_DIR"] = str(data_dir / "tiktoken")
    return build("gpt2")


@pytest.fixture(scope="module")
def text(data_dir):
    return "".join(path.read_text() for path in sorted((data_dir / "text").glob("*.txt")))


def openai_encoding(name, gpt2, monkeypatch):
    """An OpenAI encoding's splitting pattern over GPT-2's vocabulary (its own is a download)."""
    import tiktoken
    from tiktoken_ext import openai_public

    ranks = gpt2.encoding._mergeable_ranks
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *args, **kwargs: ranks)
    pattern = getattr(openai_public, name)()["pat_str"]
    return TiktokenTokenizer(
        tiktoken.Encoding(
            name=f"{name}-over-gpt2",
            pat_str=pattern,
            mergeable_ranks=ranks,
            special_tokens={"<|endoftext|>": 50256},
        )
    )


# ---------------------------------------------------------------------------------------------
# Byte


@pytest.fixture(scope="module")
def saved_byte(tmp_path_factory):
    from transformers import AutoTokenizer

    directory = tmp_path_factory.mktemp("byte")
    ByteTokenizer().save(directory)
    return directory, AutoTokenizer.from_pretrained(str(directory), local_files_only=True)


@given(st.text())
def test_byte_ids_are_the_utf8_bytes(s):
    byte = build("byte")
    assert byte.encode(s) == list(s.encode())
    assert byte.encode_batch([s, "é"])[1].tolist() == [0xC3, 0xA9]
    assert byte.decode(byte.encode(s)) == s
    assert byte.token_bytes()[byte.encode(s)].sum() == len(s.encode())


def test_byte_specials():
    byte = build("byte")
    assert (byte.vocab_size, byte.eos_token_id, byte.bos_token_id) == (257, 256, None)
    assert list(byte.special_ids) == [256] and byte.token_bytes().tolist() == [1] * 256 + [0]
    assert byte.decode([104, 105, 256]) == "hi<|endoftext|>"
    assert byte.decode([0xC3, 300]) == "\ufffd\ufffd"
    assert byte.encode("\ud800x") == list("\ufffdx".encode())


@settings(max_examples=300, deadline=None)
@given(s=st.text())
def test_saved_byte_tokenizer_gives_the_same_ids_in_transformers(saved_byte, s):
    tok = saved_byte[1]
    split = {"add_special_tokens": False, "split_special_tokens": True}
    assert tok(s, **split).input_ids == list(s.encode())
    assert tok.decode(tok(s, **split).input_ids, clean_up_tokenization_spaces=False) == s


def test_saved_byte_tokenizer_knows_its_end_of_text(saved_byte):
    directory, tok = saved_byte
    assert tok.eos_token_id == 256 and tok.get_vocab()["<|endoftext|>"] == 256 and len(tok) == 257
    assert tok("a<|endoftext|>", add_special_tokens=False).input_ids == [97, 256]
    assert isinstance(build(str(directory)), ByteTokenizer)  # and ours opens it as what it is


def test_byte_text_of_special_token_is_ordinary(saved_byte):
    for s in UGLY:
        wrapped = HuggingFaceTokenizer(saved_byte[1], "byte by transformers")
        assert wrapped.encode(s) == build("byte").encode(s) == list(s.encode())
        assert (wrapped.token_bytes() == build("byte").token_bytes()).all()


# ---------------------------------------------------------------------------------------------
# tiktoken and transformers


def test_tiktoken_equals_transformers_on_real_text(gpt2, data_dir, text):
    hf = build(str(data_dir / "tokenizers" / "gpt2"))
    shakespeare = (data_dir / "text" / "tinyshakespeare.txt").read_text()
    assert len(gpt2.encode(shakespeare)) == 338025  # nanoGPT's count: 301,966 + 36,059
    assert hf.encode(text) == gpt2.encode(text)
    for s in UGLY:
        assert hf.encode(s) == gpt2.encode(s), s
        assert gpt2.decode(gpt2.encode(s)) == hf.decode(hf.encode(s)) == s
    for tok in (gpt2, hf):
        assert (tok.vocab_size, tok.eos_token_id) == (50257, 50256)
        assert list(tok.special_ids) == [50256]
        assert tok.encode("<|endoftext|>") == [27, 91, 437, 1659, 5239, 91, 29]
        batch = tok.encode_batch([*UGLY, text[:5000]])
        assert [b.tolist() for b in batch] == [tok.encode(s) for s in [*UGLY, text[:5000]]]


def test_texts_of_a_batch_are_encoded_apart(gpt2, monkeypatch):
    """Whatever one ends and the next begins with: halves of words, newlines, ends of text."""
    parts = ["", " ", "\n", "  \n", "a", "'", "'s", "é", "<|endof", "text|>", "<|endoftext|", ">"]
    parts += [
        ".\n",
        "ne",
        "w",
        "\r\n",
        "\u3000",
        "数据",
        "12",
        "345",
        " 🙂",
        "\ud800",
        "<|im_start|>",
    ]
    rng = random.Random(0)
    texts = ["".join(rng.choices(parts, k=rng.randrange(5))) for _ in range(3000)]
    whole = [text for text in texts if "<|endoftext|>" not in text]
    for tok in (gpt2, openai_encoding("o200k_base", gpt2, monkeypatch)):
        for batch in (whole, texts, ["", *whole[:20], ""], [""]):
            assert [ids.tolist() for ids in tok.encode_batch(batch)] == list(map(tok.encode, batch))


def test_token_bytes_add_up_to_the_text(gpt2, data_dir, text):
    hf = build(str(data_dir / "tokenizers" / "gpt2"))
    for tok in (gpt2, hf):
        counts = tok.token_bytes()
        assert counts.dtype == np.int32 and counts.shape == (50257,) and counts[50256] == 0
        for s in [text, *UGLY]:
            assert counts[tok.encode(s)].sum() == len(s.encode())
        eos = [*tok.encode("é"), tok.eos_token_id]
        assert counts[eos].sum() == 2


def test_tiktoken_decodes_any_id(gpt2):
    assert gpt2.decode([15496, 50256, 50300]) == "Hello<|endoftext|>\ufffd"
    assert gpt2.decode(np.array(gpt2.encode("é🙂")[:1])) == "é"


def test_saved_merges_are_gpt2s_own(gpt2, data_dir, tmp_path):
    gpt2.save(tmp_path)
    merges = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["merges"]
    published = (data_dir / "tokenizers" / "gpt2" / "merges.txt").read_text().split("\n")
    assert merges == [line for line in published if line and not line.startswith("#version")]


@pytest.mark.parametrize("pattern", ["r50k_base", "cl100k_base", "o200k_base"])
def test_saved_tiktoken_gives_the_same_ids_in_transformers(
    pattern, gpt2, text, tmp_path, monkeypatch
):
    tok = openai_encoding(pattern, gpt2, monkeypatch)
    tok.save(tmp_path)
    hf = build(str(tmp_path))
    assert isinstance(hf, HuggingFaceTokenizer) and hf.eos_token_id == 50256
    sample = text[:400_000] + text[-400_000:]
    assert hf.encode(sample) == tok.encode(sample)
    for s in UGLY:
        assert hf.encode(s) == tok.encode(s), s
    assert (hf.token_bytes() == tok.token_bytes()).all()

    @settings(max_examples=150, deadline=None)
    @given(st.text("ab Z9\n\r\t'.,/;é日\u0301\u00a0", max_size=40))
    def same(s):
        assert hf.encode(s) == tok.encode(s)

    same()


def test_saving_keeps_ids_with_gaps_and_a_special_token_inside(tmp_path):
    import tiktoken

    ranks = {bytes([b]): b for b in range(256)} | {b"ab": 256, b"abc": 258}
    tok = TiktokenTokenizer(
        tiktoken.Encoding(
            name="gaps",
            pat_str=r"\S+|\s+",
            mergeable_ranks=ranks,
            special_tokens={"<|endoftext|>": 257, "<|end|>": 261},
        )
    )
    assert tok.vocab_size == 262 and list(tok.special_ids) == [257, 259, 260, 261]
    tok.save(tmp_path)
    hf = build(str(tmp_path))
    assert hf.vocab_size == 262 and hf.eos_token_id == 257
    assert hf.encode("abcab\nxabc") == tok.encode("abcab\nxabc") == [258, 256, 10, 120, 258]
    assert hf.tok.convert_tokens_to_ids(["<|endoftext|>", "<|end|>"]) == [257, 261]
    assert (hf.token_bytes() == tok.token_bytes()).all()


@pytest.mark.parametrize("pattern", ["r50k_base", "cl100k_base", "o200k_base"])
def test_cutting_at_a_safe_break_keeps_the_tokens(pattern, gpt2, text, monkeypatch):
    tok = openai_encoding(pattern, gpt2, monkeypatch)

    def cut(s):
        data, pieces, start = s.encode(), [], 0
        for match in SAFE_BREAK.finditer(data):
            pieces.append(data[start : match.end()].decode())
            start = match.end()
        return [*pieces, data[start:].decode()]

    pieces = cut(text)
    assert len(pieces) > 10_000 and tok.splits_at_newline
    assert len(cut("一行。\n二行\n\u3000三行\u3000\nя\né\n\nあ\nあ")) == 4
    assert [i for ids in tok.encode_batch(pieces) for i in ids.tolist()] == tok.encode(text)

    @settings(max_examples=500, deadline=None)
    @given(st.text("aZ9 \n\n\r\t'./;é日。я한あ🙂\u0301\u3000\xa0\x85\u2028\x1f", max_size=40))
    def same(s):
        assert [i for piece in cut(s) for i in tok.encode(piece)] == tok.encode(s)

    same()


def test_no_break_beside_any_of_unicodes_spaces():
    spaces = [c for c in map(chr, range(0xD800)) if c.isspace()]
    assert len(spaces) == 29
    for c in spaces:
        assert not SAFE_BREAK.search(f"a{c}\nb".encode()), hex(ord(c))
        assert not SAFE_BREAK.search(f"a\n{c}b".encode()), hex(ord(c))


def test_transformers_tokenizer_that_may_not_be_split_says_so(gpt2, data_dir):
    from transformers import AutoTokenizer

    path = str(data_dir / "tokenizers" / "gpt2")
    assert build(path).splits_at_newline
    prefixed = AutoTokenizer.from_pretrained(path, add_prefix_space=True)
    assert not HuggingFaceTokenizer(prefixed, "prefixed").splits_at_newline
    assert build(path).encode("a\nb") == [64, 198, 65]
    tok = AutoTokenizer.from_pretrained(path)
    tok.add_tokens(["\nb"])
    assert not HuggingFaceTokenizer(tok, "a token across the cut").splits_at_newline


def test_vocabulary_that_merges_across_newlines_may_not_be_split(tmp_path):
    import tiktoken

    ranks = {bytes([b]): b for b in range(256)} | {b"\nb": 256}
    across = tiktoken.Encoding(
        name="across", pat_str=r"[\s\S]+", mergeable_ranks=ranks, special_tokens={}
    )
    assert not TiktokenTokenizer(across).splits_at_newline
    TiktokenTokenizer(across).save(tmp_path)
    hf = build(str(tmp_path))
    assert hf.encode("a\nb") == [97, 256] and not hf.splits_at_newline


def sentencepiece_like():
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    pieces += ["▁", "a", "b", "é", "▁a", "▁▁"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [("▁", "a"), ("▁", "▁")]
    tok = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    tok.normalizer = normalizers.Replace(" ", "▁")
    tok.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def test_token_bytes_of_a_sentencepiece_vocabulary():
    tok = HuggingFaceTokenizer(sentencepiece_like(), "sp")
    assert (tok.bos_token_id, tok.eos_token_id) == (1, 2) and not tok.splits_at_newline
    assert list(tok.special_ids) == [0, 1, 2]
    for s in ["a b", "  aé", "日本 a", "</s> a", "\n"]:
        assert tok.token_bytes()[tok.encode(s)].sum() == len(s.encode()), s
        assert not set(tok.encode(s)) & {0, 1, 2}


def test_truncation_and_padding_stored_in_a_tokenizer_are_ignored(tmp_path):
    tok = sentencepiece_like()
    tok.backend_tokenizer.enable_truncation(4)
    tok.backend_tokenizer.enable_padding(length=8)
    tok.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["truncation"]["max_length"] == 4
    reopened = build(str(tmp_path))
    assert len(reopened.encode("ab" * 50)) == 100 and len(reopened.encode("a")) == 1


def test_fingerprint_follows_the_definition(gpt2, data_dir, monkeypatch):
    prints = [build("byte").fingerprint, gpt2.fingerprint]
    prints.append(openai_encoding("cl100k_base", gpt2, monkeypatch).fingerprint)
    prints.append(build(str(data_dir / "tokenizers" / "gpt2")).fingerprint)
    assert len(set(prints)) == 4
    assert build("gpt2").fingerprint == gpt2.fingerprint


# ---------------------------------------------------------------------------------------------
# Names that lead nowhere


def one_line(name):
    with pytest.raises(ValueError) as caught:
        build(name)
    message = str(caught.value)
    assert "\n" not in message and repr(str(name)) in message
    return message


def test_missing_directories(tmp_path):
    assert "no such directory" in one_line(str(tmp_path / "nothing"))
    assert "no tokenizer files" in one_line(str(tmp_path))
    file = tmp_path / "tokenizer.model"
    file.write_text("x")
    assert "no such directory" in one_line(str(file))


def test_damaged_tokenizer_files(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    assert "transformers cannot open it" in one_line(str(tmp_path))


def test_a_vocabulary_alone_is_nobodys_bpe(tmp_path, data_dir):
    """vocab.json and merges.txt do not say how text is split: nobody guesses that as GPT-2."""
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((data_dir / "tokenizers/gpt2" / name).read_bytes())
    with pytest.raises(ValueError, match=r"no tokenizer\.json, and none of tokenizer_config\.json"):
        build(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert build(tmp_path).encode("a b")


def test_tiktoken_offline_names_the_file_and_the_remedy(monkeypatch, tmp_path):
    import requests
    import tiktoken.registry

    def offline(url, *args, **kwargs):
        raise requests.ConnectionError("no route", request=requests.Request("GET", url).prepare())

    monkeypatch.setattr(requests, "get", offline)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    message = one_line("o200k_base")
    assert "o200k_base.tiktoken" in message and f"TIKTOKEN_CACHE_DIR ({tmp_path})" in message


def test_hub_offline_is_one_quick_line(monkeypatch):
    import huggingface_hub

    def offline(self, name, **kwargs):
        raise OSError("no route\nmore words")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", offline)
    message = one_line("nobody/no-such-model")
    assert "the hub did not give it (OSError: no route)" in message and "pass DIR" in message


def test_byte_alphabet_is_gpt2s():
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    assert dict(enumerate(module.byte_alphabet())) == bytes_to_unicode()


def test_importing_or_using_byte_loads_nothing_heavy():
    import subprocess
    import sys

    code = (
        "import sys, tokenizer; tokenizer.build_tokenizer('byte').encode('x'); "
        "print([m for m in ('torch', 'transformers', 'tiktoken') if m in sys.modules])"
    )
    root = Path(module.__file__).parent
    out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert out.stdout.strip() == "[]", out
