"""What the tests of adapters share: small models of transformers', adapters that PEFT writes."""

import warnings
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

IDS = torch.arange(40).view(2, 20) * 7 % 96
SIZES = dict(vocab_size=96, num_hidden_layers=2, num_attention_heads=4, hidden_size=32)
SIZES |= dict(max_position_embeddings=64, intermediate_size=48)
GROUPED = dict(num_key_value_heads=2)
KINDS = {  # class, its sizes
    "llama": ("Llama", SIZES | GROUPED),
    "qwen2": ("Qwen2", SIZES | GROUPED),
    "neox": ("GPTNeoX", SIZES),
    "cohere": ("Cohere", SIZES | GROUPED | dict(pad_token_id=None, eos_token_id=2, bos_token_id=1)),
    "gpt2": (
        "GPT2",
        dict(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64)
        | dict(bos_token_id=1, eos_token_id=1),
    ),
    "opt": (  # which transformers alone runs
        "OPT",
        dict(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
        | dict(word_embed_proj_dim=32, ffn_dim=48, max_position_embeddings=64),
    ),
}


def saved_base(folder, kind="llama", tie=False) -> Path:
    """folder/base-KIND: a small model of random weights, as transformers saves it."""
    title, sizes = KINDS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{title}Config")(**sizes, tie_word_embeddings=tie)
    head = "LMHeadModel" if kind == "gpt2" else "ForCausalLM"
    model = getattr(transformers, title + head)(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    path = Path(folder) / f"base-{kind}{'-tied' if tie else ''}"
    model.save_pretrained(path)
    return path


def adapted(base: Path, dtype=torch.float32, resized=0, seed=0, **options):
    """PEFT's model of random weights over a base; resized: to so many tokens."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        if resized:
            model.resize_token_embeddings(resized, mean_resizing=False)
        torch.manual_seed(seed)
        given = dict(r=4, task_type="CAUSAL_LM", init_lora_weights=False) | options
        model = peft.get_peft_model(model, peft.LoraConfig(**given))
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(torch.randn_like(p) * 0.05)
    return model.eval()


def saved_adapter(path, base: Path, **options) -> Path:
    """An adapter as PEFT saves it, over q and v unless told; the model is thrown away."""
    return save(adapted(base, **(dict(target_modules=["q_proj", "v_proj"]) | options)), path)


def save(model, path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(path)
    return Path(path)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    out = model(input_ids=IDS)
    return (out[0] if isinstance(out, tuple) else out.logits).float()
