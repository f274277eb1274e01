"""formats/extension.py: rows of a new vocabulary by an independent computation."""

import json
import os
from pathlib import Path

import pytest
import torch
from builders import save_model, tiny_model

import checkpoint
from eval import evaluate_perplexity
from tokenizer import build_tokenizer
from tokenizing.pieces import inherited, pieces_of

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
from tokenizers import decoders, models, pre_tokenizers, trainers  # noqa: E402

EOT = "<|endoftext|>"
ENGLISH = ["the model that trains the tokens of the text, then the other one"] * 5
OTHER = ["模型的词表 模型的词表 训练 训练 the 词表", "naïve façade – the naïve façade"] * 5


def byte_level(folder, texts, size, specials=(EOT,)) -> Path:
    """A byte-level BPE trained on texts, as a Hugging Face directory."""
    tok = tokenizers.Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[*specials], initial_alphabet=letters, show_progress=False
    )
    tok.train_from_iterator(texts, trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tok, eos_token=specials[-1], clean_up_tokenization_spaces=False
    )
    fast.save_pretrained(folder)
    return Path(folder)


def spaced(folder, texts, size) -> Path:
    """A BPE of SentencePiece's kind: "▁" for a space, one before every text, bytes as <0xAB>."""
    tok = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tok.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=names, show_progress=False)
    tok.train_from_iterator(texts, trainer)
    definition = json.loads(tok.to_str())
    definition["added_tokens"] = definition["added_tokens"][:3]  # bytes are ordinary ones
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(definition)),
        eos_token="</s>",
        bos_token="<s>",
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(folder)
    return Path(folder)


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """(a checkpoint with its byte-level tokenizer, the tokenizer's directory)"""
    folder = tmp_path_factory.mktemp("old")
    words = byte_level(folder / "words", ENGLISH, 285)
    model = tiny_model("llama", vocab_size=285)
    return save_model(model, folder / "run", 7, tokenizer=str(words)), words


@pytest.mark.parametrize("tied", [False, True])
def test_rows_are_kept_or_means_of_old_pieces(old, tied, tmp_path, capsys):
    """By transformers' own tokenizers and token strings, in float64."""
    path, words = old
    if tied:
        model = tiny_model("llama", vocab_size=285, tie_embeddings=True, seed=3)
        path = save_model(model, tmp_path / "tied", 7, tokenizer=str(words))
    larger = byte_level(tmp_path / "larger", [*ENGLISH, *OTHER], 320, ("<pad>", EOT))
    checkpoint.main(["extend-vocab", *map(str, (path, tmp_path / "new", "--tokenizer", larger))])
    said = capsys.readouterr().out
    before, after = (checkpoint.load_model(p, "float32") for p in (path, tmp_path / "new"))
    assert after.config == before.config.replace(vocab_size=320)
    a, b = (transformers.AutoTokenizer.from_pretrained(p) for p in (words, tmp_path / "new"))
    assert b.get_vocab() == transformers.AutoTokenizer.from_pretrained(larger).get_vocab()
    known, kept, means = a.get_vocab(), 0, 0
    for module in ("token_embedding", "lm_head"):
        from_rows = getattr(before, module).weight.double()
        to_rows = getattr(after, module).weight
        for token, i in b.get_vocab().items():
            if token in known:
                assert torch.equal(to_rows[i], from_rows[known[token]].float()), token
                kept += 1
                continue
            letters = a.backend_tokenizer.decoder.decode([token])
            ids = a.encode(letters, add_special_tokens=False)
            if token != "<pad>" and "�" not in letters:
                wanted = from_rows[ids].mean(0).float()
                torch.testing.assert_close(to_rows[i], wanted, rtol=1e-6, atol=1e-7)
                means += len(ids) > 1
    pad = after.token_embedding.weight[b.convert_tokens_to_ids("<pad>")]
    torch.testing.assert_close(pad, before.token_embedding.weight.mean(0), rtol=1e-5, atol=1e-6)
    assert kept > 2 * 256 and means > 10
    assert f"320 tokens: {kept // 2} rows kept or copied, " in said and ", 1 of none" in said
    for (name, p), (_, q) in zip(before.named_parameters(), after.named_parameters(), strict=True):
        assert p.shape[0] in (285,) or torch.equal(p, q), name


def test_tokens_of_any_kind_of_vocabulary(old, tmp_path):
    """Byte-level, SentencePiece's, bytes: a token is what it stands for."""
    _, words = old
    level, sentence = build_tokenizer(words), build_tokenizer(spaced(tmp_path, ENGLISH, 300))
    byte = build_tokenizer("byte")
    names = {piece.text: i for i, piece in enumerate(pieces_of(sentence)) if piece}
    values = {piece.value: i for i, piece in enumerate(pieces_of(level)) if not piece.special}

    sources = inherited(level, sentence)
    assert sources[names["▁the"]] == (values[b" the"],)
    assert sources[names["<0x41>"]] == (values[b"A"],)
    assert sources[names["</s>"]] == (level.eos_token_id,)  # by its part, not by its name
    assert sources[names["<s>"]] == sources[names["<unk>"]] == ()

    back = inherited(sentence, level)
    assert back[values[b" the"]] == (names["▁the"],)
    assert back[values[b"m"]] == (names["m"],)  # the letter, not its byte
    assert back[values[b"A"]] == (names["<0x41>"],)
    assert back[level.eos_token_id] == (sentence.eos_token_id,)

    by_byte = inherited(byte, level)
    assert by_byte[values[b" the"]] == tuple(b" the")
    assert by_byte[values[b"\xff"]] == (255,) and by_byte[level.eos_token_id] == (256,)
    text = "naïve 模型"
    for tokenizer in (level, byte):
        pieces = pieces_of(tokenizer)
        assert b"".join(pieces[i].value for i in tokenizer.encode(text)) == text.encode()


def test_random_rows_have_the_spread_of_the_old(old, tmp_path):
    path, _ = old
    larger = byte_level(tmp_path / "larger", [*ENGLISH, *OTHER], 320)
    words = ["extend-vocab", path, "--tokenizer", larger, "--new-rows", "random", "--seed"]
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        checkpoint.main([str(w) for w in (*words, seed, tmp_path / name)])
    a, b, c = (checkpoint.load_model(tmp_path / n, "float32").lm_head.weight for n in "abc")
    assert torch.equal(a, b) and not torch.equal(a, c)
    drawn = (a != c).any(1)
    assert 20 < drawn.sum() < 60
    assert a[drawn].std() == pytest.approx(a[~drawn].std().item(), rel=0.15)


def test_what_cannot_be_extended(old, tmp_path):
    path, words = old
    bare = save_model(tiny_model("llama", vocab_size=100), tmp_path, 1, tokenizer=None)

    for said, *argv in (
        ("has the vocabulary of", path, tmp_path / "x", "--tokenizer", words),
        ("name it with --old-tokenizer", bare, tmp_path / "x", "--tokenizer", words),
        (
            "has 100 rows, fewer than the 285 tokens",
            *(bare, tmp_path / "x", "--tokenizer", "byte", "--old-tokenizer", words),
        ),
        ("exists already", path, tmp_path, "--tokenizer", "byte"),
    ):
        with pytest.raises(ValueError, match=said):
            checkpoint.main(["extend-vocab", *map(str, argv)])


@pytest.mark.slow
def test_chinese_tokens_for_a_real_model(data_dir, tmp_path):
    """SmolLM2's vocabulary with merges trained on Chinese word problems: fewer tokens for the same
    text, English ones as they were, and a model whose rows are the means of theirs."""
    directory = os.environ.get("ROSEVAL_MODEL")
    if not directory:
        pytest.skip("needs a real model: set ROSEVAL_MODEL to a Hugging Face directory")
    lines = (data_dir / "mgsm/mgsm_zh.tsv").read_text(encoding="utf-8").splitlines()
    chinese = [line.partition("\t")[0] for line in lines]
    trained = byte_level(tmp_path / "zh", chinese[:200], 2000) / "tokenizer.json"
    larger = tmp_path / "larger"
    transformers.AutoTokenizer.from_pretrained(directory).save_pretrained(larger)
    definition = json.loads((larger / "tokenizer.json").read_text())
    vocab, merges = definition["model"]["vocab"], definition["model"]["merges"]
    for pair in json.loads(trained.read_text())["model"]["merges"]:
        if "".join(pair) not in vocab and set(pair) <= vocab.keys() and min("".join(pair)) > "~":
            vocab["".join(pair)] = len(vocab)
            merges.append(pair if isinstance(merges[0], list) else " ".join(pair))
    (larger / "tokenizer.json").write_text(json.dumps(definition))
    checkpoint.main(["extend-vocab", directory, str(tmp_path / "new"), "--tokenizer", str(larger)])
    old, new = build_tokenizer(directory), build_tokenizer(tmp_path / "new")
    text = "\n".join(chinese[200:])
    assert len(new.encode(text)) < 0.7 * len(old.encode(text))
    assert new.encode("The cat sat on the mat.") == old.encode("The cat sat on the mat.")
    (tmp_path / "zh.txt").write_text(text, encoding="utf-8")
    (tmp_path / "en.txt").write_text("The cat sat on the mat. " * 20, encoding="utf-8")
    for file in ("en.txt", "zh.txt"):
        bits = []
        for path, tokenizer in ((directory, old), (tmp_path / "new", new)):
            record = evaluate_perplexity(
                checkpoint.load_model(path, "float32"),
                tokenizer,
                val_data=[str(tmp_path / file)],
                seq_len=256,
                max_tokens=1024,
            )
            bits.append(record["metrics"]["bits_per_byte"]["value"])
        print(f"{file}: bits per byte {bits[0]:.4f} before, {bits[1]:.4f} after, untrained")
        if file == "en.txt":  # the new rows alone take some of the probability
            assert bits[0] <= bits[1] < bits[0] * 1.2
