"""Which modules an adapter_config.json speaks of, and by which rank: peft's own functions say."""

import itertools
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from formats import adapter_config

peft = pytest.importorskip("peft")

MODULES = ["model.embed_tokens", "lm_head", "model.norm", "norm"]
MODULES += [
    f"model.layers.{i}.{inner}"
    for i, inner in itertools.product(
        (0, 1, 11),
        ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp", "input_layernorm"),
    )
]
ENDS = ["q_proj", "k_proj", "up_proj", "self_attn.q_proj", "layers.1.self_attn.k_proj", "mlp"]
ENDS += ["model.layers.1.self_attn.q_proj", "norm", "lm_head", "embed_tokens", "1.mlp.up_proj"]
PATTERNS = [
    r".*_proj",
    r"model\.layers\.\d+\.self_attn\..*",
    r".*layers\.(0|11)\..*q_proj",
    "q_proj",
]
RANKS = ["q_proj", r"layers\.1\..*", r"^model\.layers\.0\.mlp\.up_proj", "mlp.up_proj", "k_proj"]


def read(tmp_path, **values):
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({"peft_type": "LORA", "target_modules": ["q"]} | values))
    return adapter_config.read(file)


some = st.lists(st.sampled_from(ENDS), unique=True, max_size=4)
either = st.one_of(some.filter(bool), st.sampled_from(PATTERNS))


@given(
    targets=either,
    excluded=st.one_of(st.none(), some, st.sampled_from(PATTERNS)),
    saved=st.one_of(st.none(), some),
    layers=st.one_of(st.none(), st.integers(0, 11), st.lists(st.sampled_from([0, 1, 2, 11]))),
    pattern=st.sampled_from([None, [], "layers", ["h", "layers"]]),
)
def test_modules_are_those_of_peft(tmp_path_factory, targets, excluded, saved, layers, pattern):
    from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists

    if isinstance(targets, str):
        layers = pattern = None  # which peft refuses together
    values = dict(target_modules=targets, exclude_modules=excluded, modules_to_save=saved)
    values |= dict(layers_to_transform=layers, layers_pattern=pattern if layers else None)
    theirs = peft.LoraConfig(**values)
    ours = read(tmp_path_factory.mktemp("c"), **values)
    for module in MODULES:
        wanted = check_target_module_exists(theirs, module)
        wanted = bool(wanted) and not isinstance(wanted, _ExcludedModule)
        assert ours.changes(module, "linear") == wanted, module


def test_ranks_and_scales_are_those_of_peft(tmp_path):
    from peft.utils.other import get_pattern_key

    rng = random.Random(0)
    for _ in range(60):
        ranks = {name: rng.randint(1, 9) for name in rng.sample(RANKS, rng.randint(0, 4))}
        alphas = {name: rng.randint(1, 30) / 2 for name in rng.sample(RANKS, rng.randint(0, 4))}
        rs = rng.random() < 0.5
        values = dict(rank_pattern=ranks, alpha_pattern=alphas, use_rslora=rs, r=8, lora_alpha=16)
        config = read(tmp_path, **values)
        for module in MODULES:
            r = ranks.get(get_pattern_key(ranks.keys(), module), 8)
            alpha = alphas.get(get_pattern_key(alphas.keys(), module), 16)
            assert config.rank(module) == r
            assert config.scale(module) == (alpha / r**0.5 if rs else alpha / r)


def test_patterns_that_would_not_end(tmp_path):
    """Each takes peft's match minutes on the name of a module."""
    for pattern in (r"(a+)+$", r"(.*)*x", r"(\w+_?){9}!", r".*" * 9 + "x", "(", "a" * 3000):
        for values in (
            {"target_modules": pattern},
            {"exclude_modules": pattern},
            {"modules_to_save": [pattern]},
            {"rank_pattern": {pattern: 2}},
            {"layers_to_transform": [1], "layers_pattern": pattern},
        ):
            with pytest.raises(ValueError, match=r"adapter_config.json: .*(may take|no pattern)"):
                read(tmp_path, **values)
