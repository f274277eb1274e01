"""What every family of Hugging Face's is compared by: ours against transformers' eager model."""

import copy
import functools
import json

import torch
import transformers

import checkpoint
from backends.kvcache import DecodeCache, PrefixCache
from config import GPTConfig
from model import GPTModel

V, T = 97, 40
SIZES = dict(
    vocab_size=V,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
IDS = torch.randint(0, V, (3, T), generator=torch.Generator().manual_seed(0))
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}


def tolerance(logits):
    return 1e-5 * max(1.0, logits.std().item())


def biases_of_choices(model):
    """What a router chooses by beside its weight: buffers of transformers'."""
    return {name: b for name, b in model.named_buffers() if name.endswith("_correction_bias")}


def make_pair(name, case, folder):
    """transformers' model of a family in a folder, and ours from there."""
    case = copy.deepcopy(case)  # transformers writes into it
    config = transformers.AutoConfig.for_model(name, **(SIZES | case))
    torch.manual_seed(1)
    theirs = transformers.AutoModelForCausalLM.from_config(config, **EAGER).eval()
    with torch.no_grad():
        for p in [*theirs.parameters(), *biases_of_choices(theirs).values()]:
            p.add_(torch.randn_like(p) * 0.12)
    theirs.save_pretrained(folder)
    return theirs, checkpoint.load_model(folder, "float32")


def pairs_of(cases, tmp_path_factory):
    """(name, i) -> (transformers' model of cases[name][i], its directory, ours from there), each
    made once."""

    @functools.cache
    def pair(name, i):
        folder = tmp_path_factory.mktemp(f"{name}-{i}")
        theirs, ours = make_pair(name, cases[name][i], folder)
        return theirs, folder, ours

    return pair


@torch.no_grad()
def check_logits(theirs, ours):
    """Of whole rows, and the nats of each token."""
    assert isinstance(ours, GPTModel)
    wanted = theirs(IDS).logits
    assert 0.1 < wanted.std() < 30, "logits of order 1, or the comparison says little"
    assert (ours(IDS)[0] - wanted).abs().max() <= tolerance(wanted)
    nats = ours.nll(ours.hidden(IDS)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    logprobs = wanted[:, :-1].log_softmax(-1).flatten(0, 1)
    assert (nats + logprobs.gather(1, IDS[:, 1:].reshape(-1, 1))[:, 0]).abs().max() < 1e-4


@torch.no_grad()
def check_padded_logits(theirs, ours, side):
    """Padding on one side: rows of three lengths."""
    real = torch.ones(3, T, dtype=torch.int64)
    for row, count in enumerate((0, 5, 17)):
        real[row, slice(None, count) if side == "left" else slice(T - count, None)] = 0
    positions = torch.arange(T).expand(3, T)  # ours count from the row's start, padding included
    wanted = theirs(IDS, attention_mask=real, position_ids=positions).logits
    difference = (ours(IDS, attention_mask=real)[0] - wanted)[real.bool()]
    assert difference.abs().max() <= tolerance(wanted)


@torch.no_grad()
def check_caches(theirs, ours):
    """Prompts of several lengths prefilled, then decoded; and rows after a shared prefix."""
    wanted, lengths, steps = theirs(IDS).logits, [21, 5, 13], 12
    decode = DecodeCache(ours, n_prompts=3, prompt_len=21, n_rows=3, max_len=steps, longest=T)
    filling = decode.filling([0, 1, 2], lengths)
    hidden = ours.hidden(IDS[:, :21], cache=filling)
    assert (ours.logits(hidden) - wanted[:, :21]).abs().max() <= tolerance(wanted)
    decode.assign([0, 1, 2])
    for step in range(steps):
        at = torch.tensor(lengths)[:, None] + step
        got = ours.logits(ours.hidden(IDS.gather(1, at), cache=decode))
        want = wanted.gather(1, at[..., None].expand(3, 1, V))
        assert (got - want).abs().max() <= 2 * tolerance(wanted), step
        decode.advance(torch.ones(3, dtype=torch.int32))
    rows = torch.cat((IDS[:1, :11].expand(3, -1), IDS[:, 11:]), dim=1)
    wanted = theirs(rows).logits
    prefix = PrefixCache(ours, 11, longest=T)
    ours.hidden(rows[:1, :11], cache=prefix.filling())
    got = ours.logits(ours.hidden(rows[:, 11:], cache=prefix))
    assert (got - wanted[:, 11:]).abs().max() <= tolerance(wanted)


@torch.no_grad()
def check_saved(theirs, ours, folder, simpler=None):
    """Written by us, read by transformers, written by it and read by us: bit for bit. simpler: the
    family as which it is written, where it has no feature of its own."""
    checkpoint.write_weights(ours, ours.config, folder)
    values = json.loads((folder / "config.json").read_text())
    again, names = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, **EAGER
    )
    assert not any(names.values()), names
    logits = theirs(IDS).logits
    assert (again(IDS).logits - logits).abs().max() <= tolerance(logits)
    state, wanted = again.state_dict(), theirs.state_dict()
    if simpler:
        assert values["model_type"] == simpler
    else:
        assert values["model_type"] == theirs.config.model_type and state.keys() == wanted.keys()
        assert all(torch.equal(state[key], wanted[key]) for key in wanted)
    ckpt = checkpoint.open(folder)
    assert ckpt.config == ours.config
    loaded = ckpt.load("float32")
    for (key, p), (_, q) in zip(loaded.named_parameters(), ours.named_parameters(), strict=True):
        assert torch.equal(p, q), key
    # config.json as transformers itself writes it again, and without our own fields
    again.config.save_pretrained(folder / "theirs")
    theirs_again = json.loads((folder / "theirs/config.json").read_text())
    theirs_again.pop("roseval", None)
    assert GPTConfig.from_json(theirs_again, "theirs") == ours.config
    del values["roseval"]
    assert GPTConfig.from_json(values, "ours") == ours.config
