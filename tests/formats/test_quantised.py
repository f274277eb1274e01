"""formats/quantised.py and the formats that need it: tiny Llamas that the libraries themselves
quantised, against the weights that they dequantise (tests/fixtures/make_quantised.py)."""

import json
import shutil

import pytest
import torch
from quantised_files import NAMES, changed, dense, one_line, source, wanted
from safetensors.torch import load_file

import checkpoint
from formats import quantised, stored

KINDS = {"gptq": "gptq", "awq": "awq", "bnb": "bitsandbytes", "fp8": "fp8"}
KINDS["compressed"] = "compressed-tensors"


@pytest.mark.parametrize("name", NAMES)
def test_matrices_are_the_librarys_own_bit_for_bit(name):
    """In the type in which it gives them, read in bands of any size; and as codes."""
    ckpt, theirs = checkpoint.open(source(name)), wanted(name)
    assert len(theirs) == 7
    for full, matrix in theirs.items():
        ours = ckpt.tensors[full]
        assert torch.equal(stored.read_whole(ours).to(matrix.dtype), matrix), full
        if name.startswith("bnb"):  # two products that round twice, or numbers of a table
            assert quantised.codes_of(ours) is None and not quantised.has_codes(ours)
        else:
            (codes,) = quantised.codes_of(ours)
            assert torch.equal(codes.dequantise(matrix.dtype), matrix), full
            assert codes.codes.shape == matrix.shape and codes.rule == ours.packed.rule


@pytest.mark.parametrize("name", NAMES)
def test_bands_do_not_show(name, monkeypatch):
    whole = dense(source(name))
    monkeypatch.setattr(quantised, "BAND", 700)
    assert all(torch.equal(whole[full], t) for full, t in dense(source(name)).items())


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(name):
    """Of the same config with the library's weights."""
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.from_pretrained(source(name))
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    theirs = transformers.LlamaForCausalLM(config).float().eval()
    plain = load_file(source(name) / "model.safetensors")
    plain = {full: t for full, t in plain.items() if full in theirs.state_dict()}
    state = {full: t.float() for full, t in (plain | wanted(name)).items()}
    theirs.load_state_dict(state)
    model = checkpoint.load_model(source(name), "float32")
    ids = torch.arange(24).view(2, 12) * 7 % 48
    with torch.no_grad():  # the library's products are rounded to float16 or bfloat16, ours are not
        difference = (model(ids)[0] - theirs(ids).logits).abs().max()
    kept = wanted(name)["model.layers.0.mlp.up_proj.weight"].dtype
    assert difference < {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}[kept]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_said_of_it(name):
    """In a record and to people, and its fingerprint is of all that decides the numbers."""
    ckpt = checkpoint.open(source(name))
    kind = KINDS[name.partition("-")[0]]
    said = ckpt.describe()["quantisation"]
    assert ckpt.kind == said["method"] == kind and said["matrices"] == 7
    assert said["activations"].startswith("not quantised")
    file = load_file(source(name) / "model.safetensors")
    floats = {full for full in file if full.endswith(("norm.weight", "embed_tokens.weight"))}
    others = ("input_scale", "weight_format", "weight_shape", "lm_head.weight")
    packed = [full for full in file if full not in floats and not full.endswith(others)]
    packed = [full for full in packed if "quant_state" not in full]
    assert said["weight_bytes"] == sum(file[full].nbytes for full in packed)
    assert said["bits_per_weight"] == round(said["weight_bytes"] * 8 / (7 * 3072 - 4 * 2048), 4)
    shown = checkpoint.inspect(source(name))
    assert shown["quantisation"] == said and shown["parameters"] == 13312 + 2 * 48 * 32 + 3 * 32
    assert set(said["rule"].split("+")) < set(shown["dtypes"])
    assert ckpt.format == f"formats/{'compressed' if 'tensors' in kind else kind}.py"


def test_a_file_beside_counts_in_the_fingerprint(tmp_path):
    name = "gptq-8bit-v1-beside"
    path = shutil.copytree(source(name), tmp_path / "a")
    before = checkpoint.fingerprint(path)
    beside = path / "quantize_config.json"
    beside.write_text(beside.read_text() + " ")
    assert checkpoint.fingerprint(path) != before
    (path / "model.safetensors").rename(path / "gptq_model-8bit-1g.safetensors")  # AutoGPTQ's name
    assert checkpoint.open(path).describe()["quantisation"]["rule"] == "gptq-w8-row-sym"


@pytest.mark.parametrize("name", ["gptq-4bit-v1", "bnb-4bit", "compressed-naive"])
def test_written_anew(name, tmp_path):
    """As ours and as Hugging Face's, in the type of what is not quantised."""
    full = "model.layers.0.mlp.down_proj.weight"
    ckpt = checkpoint.open(source(name))
    kept = ckpt.tensors["model.embed_tokens.weight"].dtype
    checkpoint.convert(source(name), tmp_path / "ours")
    checkpoint.main(["convert", str(source(name)), str(tmp_path / "hf"), "--to", "hf"])
    for path in (tmp_path / "ours", tmp_path / "hf"):
        state = load_file(path / "model.safetensors")
        assert torch.equal(state[full], wanted(name)[full].to(kept)) and state[full].dtype == kept
        again = checkpoint.open(path)
        assert "quantisation" not in again.facts
        assert "quantization_config" not in json.loads((path / "config.json").read_text())


def test_in_shards_of_torch_and_of_safetensors(tmp_path):
    name = "compressed-packed"
    state, whole = load_file(source(name) / "model.safetensors"), dense(source(name))
    for ending, save in (("bin", torch.save), ("safetensors", save_safetensors)):
        folder, where = tmp_path / ending, {}
        folder.mkdir()
        shutil.copy(source(name) / "config.json", folder)
        stem = "model" if ending == "safetensors" else "pytorch_model"
        for i in range(2):
            file = f"{stem}-{i + 1:05d}-of-00002.{ending}"
            part = {full: state[full] for full in sorted(state)[i::2]}
            save(part, folder / file)
            where |= dict.fromkeys(part, file)
        (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"weight_map": where}))
        found = dense(folder)
        assert all(torch.equal(found[full], t) for full, t in whole.items())


def save_safetensors(state, path):
    from safetensors.torch import save_file

    save_file(state, path)


def test_words_and_their_numbers():
    """The codes 0, 1, … 7 in a word, and a word whose sign is set."""
    words = torch.tensor([[0x76543210], [0x76543210 - (1 << 32) + 0x10000000]], dtype=torch.int32)
    assert quantised.unpack(words, 4).tolist() == [
        [0, 1, 2, 3, 4, 5, 6, 7],
        [0, 1, 2, 3, 4, 5, 6, 8],
    ]
    for bits in range(1, 9):
        numbers = torch.arange(64) * 5 % (1 << bits)
        whole = sum(int(n) << (bits * i) for i, n in enumerate(numbers))
        raw = whole.to_bytes(8 * bits, "little")
        line = torch.frombuffer(bytearray(raw), dtype=torch.int32)[None]
        assert torch.equal(quantised.unpack(line, bits)[0].long(), numbers)


@pytest.mark.parametrize(
    "method", ["bitnet", "mxfp4", "hqq", "quark", "modelopt", "torchao", "gptq_p", ""]
)
def test_methods_that_are_not_read_are_named(method, tmp_path):
    path = changed(tmp_path, "fp8-block", {"quant_method": method or None})
    one_line(path, rf"config\.json: the model is quantised \({method or 'nobody that it names'}\)")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gptq-4bit-v2-act-order", {"group_size": 2**64}),
        ("awq-gemm", {"group_size": 10**30}),
        ("fp8-block", {"weight_block_size": [128, 2**63]}),
        ("bnb-4bit", {"quant_method": "\x1b[2J\n\0"}),
    ],
)
def test_settings_beyond_all_measure_are_one_line(name, said, tmp_path):
    """Sizes that no tensor has, and a name that would move a terminal's cursor."""
    path = changed(tmp_path, name, said)
    with pytest.raises(ValueError) as error:
        checkpoint.open(path).load("float32")
    assert str(path) in str(error.value) and str(error.value).isprintable()


@pytest.mark.parametrize(
    "name", ["gptq-4bit-v1", "awq-gemm", "bnb-4bit", "bnb-int8", "fp8-block", "compressed-packed"]
)
def test_a_config_that_stayed_behind_and_one_that_is_lost(name, tmp_path):
    """Weights that somebody dequantised run as they are; without the config nobody knows."""

    def replace(state):
        kept = {full: t for full, t in state.items() if "proj" not in full}
        state.clear()
        state |= kept | wanted(name)

    path = changed(tmp_path / "behind", name, change=replace)
    assert "quantisation" not in checkpoint.open(path).describe()
    checkpoint.load_model(path, "float32")
    path = changed(tmp_path / "lost", name)
    values = json.loads((path / "config.json").read_text())
    del values["quantization_config"]
    (path / "config.json").write_text(json.dumps(values))
    one_line(
        path,
        "quantised by .* not all is there that reads them: a config.json whose quantization_config",
    )


LEAVES = {  # of a fixture: the tensors of one layer
    "gptq-4bit-v2-act-order": ["qweight", "qzeros", "scales", "g_idx"],
    "awq-gemm": ["qweight", "qzeros", "scales"],
    "awq-gemv": ["qweight", "qzeros", "scales"],
    "bnb-int8": ["weight", "SCB"],
    "bnb-4bit": ["weight", "weight.absmax", "weight.nested_absmax", "weight.quant_map"],
    "fp8-block": ["weight", "weight_scale_inv"],
    "compressed-packed": ["weight_packed", "weight_scale", "weight_shape", "weight_zero_point"],
    "compressed-naive": ["weight", "weight_scale"],
}


@pytest.mark.parametrize("name", LEAVES)
def test_damaged_tensors_are_named(name, tmp_path):
    """Gone, of another shape, and of another type: one line with the file and the tensor."""
    at = "model.layers.0.self_attn.q_proj"
    for leaf in LEAVES[name]:
        damages = {
            "gone": lambda state, full: state.pop(full),
            "longer": lambda s, full: s.update({full: torch.cat([s[full], s[full]])}),
            "float64": lambda s, full: s.update({full: torch.ones(3, 7, dtype=torch.float64)}),
        }
        for what, damage in damages.items():
            folder = tmp_path / f"{leaf} {what}"
            path = changed(folder, name, change=lambda s, f=damage, n=leaf: f(s, f"{at}.{n}"))
            one_line(path, r"q_proj|head_dim is 96 in the config|not all is there that reads them")


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    path = changed(tmp_path, "compressed-packed")
    ckpt = checkpoint.open(path)
    tensor = ckpt.tensors["model.layers.0.mlp.down_proj.weight"]
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:4000])
    with pytest.raises(ValueError, match=r"model\.safetensors became shorter"):
        stored.read_whole(tensor)
    one_line(path, r"truncated|became|changed")


def test_a_quantised_matrix_beside_a_plain_one(tmp_path):
    full = "model.layers.0.mlp.up_proj.weight"
    path = changed(tmp_path, "awq-gemm", change=lambda s: s.update({full: torch.ones(96, 32)}))
    one_line(path, "up_proj.qweight stands beside a weight")
