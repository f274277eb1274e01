"""Published windows against the few lines that define them, and through eval.py."""

import math

import numpy as np
import pytest
import torch
from builders import saved_checkpoint, tiny_model

import eval
from dataset import Source, TokenStream, build_tokenizer
from tasks.windows import Chunks

BYTE = build_tokenizer("byte")


@torch.no_grad()
def nats(model, row) -> torch.Tensor:
    """Of row[1:], each after all before it."""
    ids = torch.tensor([row])
    logits = model(ids)[0][0, :-1].float()
    return torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")


def as_gptq(model, tokens, T, bos):
    """IST-DASLab/gptq, llama.py: the loss of each chunk times its length, over all lengths."""
    ids = ([bos] if bos is not None else []) + tokens
    losses = [nats(model, ids[i * T : (i + 1) * T]).mean() for i in range(len(ids) // T)]
    return float(torch.stack([loss * T for loss in losses]).sum() / (len(losses) * T))


def as_llama_cpp(model, tokens, T, bos):
    """tools/perplexity: logits from T/2 on, of chunks that begin with BOS."""
    ids = ([bos] if bos is not None else []) + tokens
    total, count = 0.0, 0
    for i in range(len(ids) // T):
        chunk = ids[i * T : (i + 1) * T]
        chunk[0] = chunk[0] if bos is None else bos
        of_second_half = nats(model, chunk)[T // 2 :]
        total, count = total + float(of_second_half.double().sum()), count + T - 1 - T // 2
        assert len(of_second_half) == T - 1 - T // 2
    return total / count


class WithBos:
    """The byte tokenizer, as one that puts a BOS before a text."""

    adds_bos, bos_token_id = True, 256

    def __getattr__(self, name):
        return getattr(BYTE, name)


@pytest.mark.parametrize("kind, oracle", [("gptq", as_gptq), ("llama.cpp", as_llama_cpp)])
def test_published_windows_are_their_definitions(kind, oracle, tmp_path):
    model, text = tiny_model("llama", seed=4), "All happy families are alike. " * 9
    (tmp_path / "x.txt").write_text(text[:250])
    tokens = list(text[:250].encode())
    for tokenizer, bos in ((BYTE, None), (WithBos(), 256)):
        for T in (24, 25, 32):
            result = eval.evaluate_perplexity(
                *(model, tokenizer),
                val_data=[str(tmp_path / "x.txt")],
                windows=kind,
                seq_len=T,
                batch_size=3,
            )
            wanted = oracle(model, tokens, T, bos)
            assert result["metrics"]["loss"]["value"] == pytest.approx(wanted, rel=1e-6), (T, bos)
            assert result["protocol"]["windows"] == kind
            assert result["protocol"]["bos"] == (bos is not None)
            assert f"{kind}'s windows" in result["words"]
            n = (len(tokens) + (bos is not None)) // T
            scored = T - 1 if kind == "gptq" else T - 1 - T // 2
            assert result["data"]["tokens_scored"] == n * scored


def test_every_scored_position_is_told_of_its_file():
    """Spans and batches agree on where each target lies, in two files and with a dummy row."""
    ids = np.arange(100, dtype=np.uint16)
    stream = TokenStream([Source("a", ids[:37]), Source("b", ids[37:])], bos_id=256)
    for kind in ("gptq", "llama.cpp"):
        for bos in (False, True):
            chunks = Chunks(kind, len(stream), 16, bos)
            batch = chunks.batch(stream, [*range(len(chunks)), -1])
            first, last = chunks.target_span(np.arange(len(chunks)))
            for row in range(len(chunks)):
                scored = np.flatnonzero(batch["targets"][row] >= 0)
                places = batch["first_target"][row] + scored
                assert (places[0], places[-1]) == (first[row], last[row])
                assert np.array_equal(batch["targets"][row][scored], places)  # id i lies at i
                assert batch["n_scored"][row] == len(scored)
            assert (batch["targets"][-1] == -100).all() and batch["n_scored"][-1] == 0
            n_bos = (batch["input_ids"][:-1, 0] == 256).sum()
            assert n_bos == (bos and (1 if kind == "gptq" else len(chunks)))


def test_what_they_refuse():
    with pytest.raises(ValueError, match=r"llama.cpp needs 2 chunk\(s\) of --seq-len 16 tokens"):
        Chunks("llama.cpp", 31, 16, False)
    with pytest.raises(ValueError, match="gptq needs 1 chunk"):
        Chunks("gptq", 15, 16, False)
    for wrong in ({"stride": 8}, {"bos": "on"}, {"bos": "off"}):
        with pytest.raises(ValueError, match="--windows gptq has no --stride and no --bos"):
            eval.Options(val_data=("x",), windows="gptq", **wrong)
    with pytest.raises(ValueError, match="tokenises text itself"):
        eval.Options(data_mode="fineweb_npy", val_npy=("x",), windows="gptq")


def test_the_command_takes_them(tmp_path, capsys):
    """2,048 and 512 unless told otherwise, within the model's context."""
    (tmp_path / "x.txt").write_text("abc " * 300)
    argv = ["--checkpoint-path", saved_checkpoint(tmp_path / "run"), "--device", "cpu"]
    argv += ["--val-data", tmp_path / "x.txt", "--results-dir", tmp_path / "r"]
    argv = list(map(str, argv))
    with pytest.raises(ValueError, match="2048 exceeds the model's 256 positions"):
        eval.main([*argv, "--windows", "gptq"])
    eval.main([*argv, "--windows", "gptq", "--seq-len", "256"])
    out = capsys.readouterr().out
    assert "tokens: 1,020 scored of 1,200" in out and math.isfinite(float(out.split()[3]))
