"""transformers_model.py: what the fallback computes, and what it never runs."""

import json
import os

import pytest
import torch
import transformers
from builders import saved_checkpoint, torchrun

import checkpoint
import cli
from transformers_model import load_transformers

IDS = torch.randint(3, 97, (2, 40), generator=torch.Generator().manual_seed(0))
SIZES = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
# What their attention needs beyond queries, keys and values: soft caps, sinks, windows, ALiBi
FAMILIES: dict[str, dict] = {
    "gemma2": {"attn_logit_softcapping": 0.5, "sliding_window": 8},
    "vaultgemma": {"attn_logit_softcapping": 0.5, "sliding_window": 8},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    "gemma3_text": {"sliding_window": 8},
    "cohere2": {"sliding_window": 8},
    "granite": {"attention_multiplier": 0.1},
    "bloom": {"n_head": 4, "n_layer": 2},
}


def written(folder, family, **changes):
    """A tiny model of a family in a folder, sensitive to every weight; the config's class."""
    config = transformers.AutoConfig.for_model(family, **(SIZES | FAMILIES.get(family, {})))
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.4)
    model.save_pretrained(folder)
    return config


def fallback(folder):
    """transformers' model behind our interface, of families too that GPTModel runs by now."""
    return load_transformers(folder, torch.float32, "cpu", None)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_part_of_the_attention_is_dropped(family, tmp_path):
    """As the family's own plain attention has it, which is written out in its file."""
    written(tmp_path, family)
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", dtype=torch.float32
    )
    with torch.no_grad():
        wanted = plain(IDS).logits
        for model in (fallback(tmp_path), checkpoint.load_model(tmp_path, "float32")):
            got = model.logits(model.hidden(IDS))
            torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(model(IDS)[0], wanted, atol=1e-4, rtol=1e-4)


def test_what_sdpa_drops_is_seen_and_said(tmp_path, capsys):
    cli.note.cache_clear()
    written(tmp_path, "gemma2")
    fast = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    model = fallback(tmp_path)
    with torch.no_grad():
        assert (fast(IDS).logits - model(IDS)[0]).abs().max() > 0.1, "the case shows nothing"
    assert "sdpa attention drops softcap" in capsys.readouterr().err
    assert model.causal_lm.config._attn_implementation == "eager"


def test_any_argument_that_an_attention_function_ignores_counts(tmp_path, monkeypatch):
    """Not those of today's families alone: here it takes no scale."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions

    written(tmp_path, "granite")

    def attend(module, query, key, value, attention_mask, **kwargs):
        causal = torch.nn.functional.scaled_dot_product_attention(
            query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1), is_causal=True
        )
        return causal.transpose(1, 2).contiguous(), None

    monkeypatch.setitem(functions, "sdpa", attend)
    model = fallback(tmp_path)
    assert model.causal_lm.config._attn_implementation == "eager"


@pytest.mark.parametrize("family", ["gemma3_text", "granite"])
def test_what_drops_nothing_keeps_the_fast_attention(family, tmp_path, capsys):
    written(tmp_path, family)
    model = fallback(tmp_path)
    assert model.causal_lm.config._attn_implementation == "sdpa"
    assert "note:" not in capsys.readouterr().err


def test_a_model_that_sees_what_comes_later_is_refused(tmp_path):
    """BERT with a head for language is one that transformers calls causal."""
    written(tmp_path / "bert", "bert")
    with pytest.raises(ValueError, match="bert: what comes later changes"):
        checkpoint.load_model(tmp_path / "bert", "float32")
    written(tmp_path / "llama", "granite")
    values = json.loads((tmp_path / "llama/config.json").read_text()) | {"is_causal": False}
    (tmp_path / "llama/config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="granite: what comes later changes"):
        checkpoint.load_model(tmp_path / "llama", "float32")


# ---------------------------------------------------------------------------------------------
# Code of a checkpoint

EVIL = """
import pathlib
pathlib.Path({marker!r}).write_text(__name__)
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class C(LlamaConfig):
    model_type = "unheard_of"
class M(LlamaForCausalLM):
    config_class = C
class T(PreTrainedTokenizerFast):
    pass
def generate(model, **kwargs):
    return None
"""
AUTO_MAP = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoModel": "evil.M"}
# Notes what a process tries beyond its machine
WATCH = """
import os, sys
def watch(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        os.write(os.open(os.environ["WATCHED"], os.O_WRONLY | os.O_CREAT | os.O_APPEND), repr(
            (event, args[1:])).encode())
sys.addaudithook(watch)
"""


@pytest.fixture
def hostile(tmp_path):
    """(evaluate, heard): run eval.py on a folder, with a yes to every question; what came of it."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(WATCH)
    (tmp_path / "a.txt").write_text("the cat sat on the mat " * 30)
    (tmp_path / "yes").write_text("y\n" * 1000)

    def evaluate(folder, *argv, code):
        environment = dict(os.environ, PYTHONPATH=str(tmp_path / "site"), OMP_NUM_THREADS="1")
        environment |= {"WATCHED": str(tmp_path / "watched"), "HF_HOME": str(tmp_path / "home")}
        environment.pop("HF_HUB_OFFLINE", None)
        words = ["--val-data", tmp_path / "a.txt", "--results-dir", tmp_path / "r", *argv]
        with (tmp_path / "yes").open() as yes:
            out = torchrun(
                0, "eval.py", "--checkpoint-path", folder, *words, "--seq-len", 32, code=code,
                stdin=yes, env=environment, cwd=folder,
            )  # fmt: skip
        assert not (tmp_path / "marker").exists(), "the directory's code ran"
        assert not (tmp_path / "watched").exists(), (tmp_path / "watched").read_text()
        lines = [line for line in out.stderr.splitlines() if line.startswith("error: ")]
        return lines[0] if code else out.stdout

    return evaluate


def bring_code(folder, marker, **config):
    """Code in every place of a directory that a loader might take it from."""
    evil = EVIL.format(marker=str(marker))
    for name in ("evil.py", "modeling_evil.py", "__init__.py", "custom_generate/generate.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(evil)
    file = folder / "config.json"
    values = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(values | config))
    (folder / "generation_config.json").write_text(json.dumps({"custom_generate": "evil"}))
    (folder / "processor_config.json").write_text(
        json.dumps({"auto_map": {"AutoProcessor": "evil.T"}, "processor_class": "T"})
    )


def test_code_of_a_directory_never_runs(hostile, tmp_path):
    """An architecture of the directory's own is refused in one line; a yes on stdin changes
    nothing."""
    folder = saved_checkpoint(tmp_path / "run", kind="llama")
    (folder / "manifest.json").unlink()
    bring_code(folder, tmp_path / "marker", model_type="unheard_of", auto_map=AUTO_MAP)
    error = hostile(folder, "--tokenizer-name", "byte", code=2)
    assert "names code of its own" in error and "evil.M" in error and "never run" in error


def test_a_known_architecture_runs_without_the_code_beside_it(hostile, tmp_path):
    """Kernels of a hub, named where transformers reads them from, are not asked for either."""
    folder = tmp_path / "known"
    written(folder, "vaultgemma", vocab_size=257)
    kernel = "kernels-community/flash-attn"
    bring_code(
        folder, tmp_path / "marker", auto_map=AUTO_MAP, attn_implementation=kernel,
        experts_implementation=kernel, _attn_implementation=kernel, use_kernels=True,
        _attn_implementation_internal=kernel, kernel_config={"RMSNorm": kernel},
    )  # fmt: skip
    assert "avg_loss" in hostile(folder, "--tokenizer-name", "byte", code=0)


def test_code_of_a_tokenizer_never_runs(hostile, tmp_path):
    folder = saved_checkpoint(tmp_path / "run", kind="gpt")
    evil = tmp_path / "tokenizer"
    evil.mkdir()
    definition = json.loads((folder / "tokenizer.json").read_text())
    definition["model"]["vocab"]["zz"] = 257  # no longer the byte tokenizer
    (evil / "tokenizer.json").write_text(json.dumps(definition))
    settings = {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}}
    (evil / "tokenizer_config.json").write_text(json.dumps(settings))
    bring_code(evil, tmp_path / "marker", model_type="unheard_of", auto_map=AUTO_MAP)
    error = hostile(folder, "--tokenizer-name", evil, code=2)
    assert "names code of its own" in error and "never run" in error


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "fp8", "unheard_of"])
def test_a_quantisers_package_is_never_asked_for(method, tmp_path):
    written(tmp_path, "vaultgemma")
    values = json.loads((tmp_path / "config.json").read_text())
    quantised = {"quant_method": method, "bits": 4, "load_in_8bit": True}
    (tmp_path / "config.json").write_text(json.dumps(values | {"quantization_config": quantised}))
    with pytest.raises(ValueError, match=rf"is quantised \({method}\)"):
        checkpoint.load_model(tmp_path, "float32")


def test_offline_a_hub_name_is_one_line(tmp_path):
    folder = saved_checkpoint(tmp_path / "run")
    (tmp_path / "a.txt").write_text("text")
    words = ["--checkpoint-path", folder, "--val-data", tmp_path / "a.txt"]
    environment = dict(os.environ, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "home"))
    out = torchrun(0, "eval.py", *words, "--tokenizer-name", "some/name", code=2, env=environment)
    assert len(out.stderr.splitlines()) == 1 and "some/name" in out.stderr
