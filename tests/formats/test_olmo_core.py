"""formats/olmo_core.py: its config.json, read strictly."""

import json
import re

import pytest
from trained_files import copied, difference, refusal

import checkpoint

NAME = "olmo-core-qk/step20"


@pytest.fixture
def path(tmp_path):
    return copied(NAME, tmp_path)


def edit(path, where, value):
    file = path / "config.json"
    said = json.loads(file.read_text())
    inside, *rest = said, *where[:-1]
    for key in rest:
        inside = inside[key]
    if value is None:
        del inside[where[-1]]
    else:
        inside[where[-1]] = value
    file.write_text(json.dumps(said))


BLOCK = ("model", "block")
ATTENTION = (*BLOCK, "sequence_mixer")


@pytest.mark.parametrize(
    ("where", "value", "match"),
    [
        ((*BLOCK, "name"), "reordered_norm", "block.name = 'reordered_norm'"),
        ((*ATTENTION, "use_head_qk_norm"), False, "use_head_qk_norm"),
        ((*ATTENTION, "attention_sinks"), True, "attention_sinks = True"),
        ((*ATTENTION, "sliding_window"), {"pattern": [4]}, "sliding_window"),
        ((*ATTENTION, "rope", "scaling"), {"factor": 8}, "rope.scaling"),
        ((*ATTENTION, "rope", "partial_rotary_factor"), 0.5, "partial_rotary_factor"),
        ((*ATTENTION, "qk_norm", "eps"), 1e-3, "qk_norm.eps"),
        ((*BLOCK, "layer_norm", "name"), "default", "layer_norm.name"),
        ((*BLOCK, "feed_forward_moe"), {"n": 8}, "feed_forward_moe"),
        (("model", "block_overrides"), {"0": {}}, "block_overrides"),
        (("model", "something_new"), 3, "something_new = 3"),
        (("model", "d_model"), None, "d_model"),
        (("model",), None, "no section 'model'"),
        (("train_module",), None, "max_sequence_length"),
        (("model", "n_layers"), 3, "missing|n_layers is 3"),
    ],
)
def test_what_has_no_native_form_is_refused_by_name(path, where, value, match):
    edit(path, where, value)
    assert re.search(match, refusal(path))


def test_older_names_a_given_config_and_a_save_in_progress(path):
    config = checkpoint.open(path).config
    file = path / "config.json"
    file.write_text(file.read_text().replace('"sequence_mixer"', '"attention"'))
    assert difference(path, NAME) <= 1e-5
    file.unlink()
    assert "has no config. Its shapes say vocab_size=61" in refusal(path)
    assert difference(path, NAME, config) <= 1e-5
    assert difference(path / "model_and_optim", NAME, config) <= 1e-5
    assert checkpoint.is_finished(path) is True
    (path / "model_and_optim/.metadata").unlink()
    assert checkpoint.is_finished(path) is False and "no .metadata" in refusal(path)
