"""reporting/by_bytes.py: eval.py's records of one text under two tokenizers."""

import numpy as np
import pytest
from builders import save_model, tiny_model

import checkpoint
from eval import evaluate_perplexity
from reporting import by_bytes
from reporting.compare import compare, compare_text, pairs_of
from results import load_record
from tokenizer import build_tokenizer
from tokenizing.byte_bpe import EOT, save_ranks


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """made(name, tokenizer, **options): a tiny model's record on one text; its path."""
    folder = tmp_path_factory.mktemp("made")
    rng = np.random.default_rng(0)
    text = "".join(rng.choice(list("abcde fgh\n"), 3000))
    (folder / "text.txt").write_text(text)
    ranks = {bytes([i]): i for i in range(256)}
    ranks |= {pair.encode(): 256 + i for i, pair in enumerate(("ab", "cd", " f", "gh"))}
    save_ranks(folder / "pairs", ranks, {EOT: 260}, r"[^\n]+|\n")

    def make(name, tokenizer, seed=0, **options):
        tokenizer = build_tokenizer("byte" if tokenizer == "byte" else folder / tokenizer)
        model = tiny_model(vocab_size=tokenizer.vocab_size, seed=seed, std=0.05)
        path = save_model(model, folder / name, 1, tokenizer)
        record = evaluate_perplexity(
            checkpoint.load_model(path, "float32"),
            tokenizer,
            **{"val_data": [str(folder / "text.txt")], "seq_len": 128, "bos": "on"} | options,
            info=checkpoint.open(path).describe(),
            run=name,
        )
        return record.save(folder / "results")

    return make


def test_bits_per_byte_are_compared_and_nothing_else(made):
    a, b = made("bytes", "byte"), made("pairs", "pairs")
    [(first, second)] = pairs_of(a, b)
    out = compare(first, second)
    bits = [load_record(path)["metrics"]["bits_per_byte"]["value"] for path in (a, b)]
    assert out["metric"] == "bits_per_byte" and out["others"] == {}
    assert out["difference"] == pytest.approx(bits[1] - bits[0], abs=1e-9)
    assert out["low"] < out["difference"] < out["high"] and out["verdict"] == "B is better"
    said = compare_text(first, second, out)
    assert "losses per token do not compare, since a token is another piece" in said
    assert "perplexity" not in said.replace("perplexity ·", "") and "pieces of the text" in said
    # a folder of each finds the pair too
    assert [(x["run"], y["run"]) for x, y in pairs_of(a.parent, b.parent)] == [("bytes", "pairs")]


def test_pieces_are_by_hand(made):
    """Of a record with itself cut otherwise: what the coarser windows sum up to."""
    a, b = (
        load_record(made(n, "byte", seed=3, seq_len=size)) for n, size in (("x", 64), ("y", 256))
    )
    one, _, n_bytes = by_bytes.segments(a, b)
    assert len(n_bytes) == len(np.load(b["_path"].replace(".json", ".npz"))["nll"]) == 12
    fine = np.load(a["_path"].replace(".json", ".npz"))["nll"] / np.log(2)
    wanted = [fine[i : i + 4].sum() for i in range(0, len(fine), 4)]
    np.testing.assert_allclose(one[:-1], wanted[:-1], rtol=1e-9)
    assert 7 < wanted[-1] - one[-1] < 10  # the end of text, which has no bytes
    np.testing.assert_allclose(n_bytes[:-1], 256)
    assert one.sum() / n_bytes.sum() == pytest.approx(a["metrics"]["bits_per_byte"]["value"])


def test_another_text_is_refused(made):
    a, b = made("whole", "byte"), made("part", "pairs", max_tokens=500)
    with pytest.raises(ValueError, match="give both the same whole text"):
        compare(*pairs_of(a, b)[0])
