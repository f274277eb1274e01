"""compute.py: the command, what it prints, and the names that others import from it."""

import ast
import json
import subprocess
import sys

import pytest
from builders import ROOT, torchrun

import compute
from config import load_config
from costs import flops, formulas, gpus, memory, printed, time


def compute_command(*arguments):
    return torchrun(0, "compute.py", *arguments, code=None, cold=True)


def test_json_has_the_promised_fields():
    report = json.loads(compute_command("--config", "7b", "--seq-len", "2048", "--json").stdout)
    assert report["parameters"]["total"] == report["parameters"]["active"] == 6_738_415_616
    assert report["flops"]["forward"] == 29_261_612_187_648
    assert report["flops"]["forward_causal"] < report["flops"]["forward"]
    assert report["flops"]["training"] == 3 * report["flops"]["forward"]
    assert report["memory"]["peak_bytes"] == sum(report["memory"]["parts"].values())


def test_explain_prints_each_formula_with_numbers_that_give_its_value():
    lines = compute_command("--config", "qwen3-8b", "--explain", "--training").stdout.splitlines()
    shown = [i for i, line in enumerate(lines) if line.startswith("  ") and line[2] != " "]
    assert len(shown) > 50
    for i in shown:
        _, numbers, value = (line.strip("= ").split(" byte")[0] for line in lines[i + 1 : i + 4])
        names = {"pairs": formulas.pairs, "slack": formulas.slack, "max": max, "min": min}
        value = float(value.removesuffix(" FLOP").replace(",", ""))
        assert eval(numbers, names) == pytest.approx(value, rel=1e-9), lines[i]


def test_every_kind_of_input(tmp_path):
    load_config("gpt2").save_pretrained(tmp_path / "ours")
    (tmp_path / "my.yaml").write_text("n_layers: 2\nd_model: 64\nn_heads: 4\n")
    (tmp_path / "gpu.yaml").write_text(
        "bf16_flops: 1.0e+14\nfp32_flops: 1.0e+13\nbandwidth: 1.0e+12\nmemory: 5.0e+10\n"
    )
    for arguments in (
        ("--config", tmp_path / "ours"),
        ("--config", tmp_path / "ours" / "config.json", "--training"),
        ("--config", tmp_path / "my.yaml", "--gpu", tmp_path / "gpu.yaml"),
        ("--config", "7b", "--fits"),
        ("--params", "7e9"),
    ):
        result = compute_command(*map(str, arguments))
        assert result.returncode == 0 and len(result.stdout.splitlines()) > 5, result.stderr
    assert "124,439,808" in compute_command("--config", str(tmp_path / "ours")).stdout


def test_wrong_input_gets_one_line_and_exit_2(tmp_path):
    (tmp_path / "step.pt").write_bytes(b"")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "ckpt.pt").write_bytes(b"")
    (tmp_path / "bad.yaml").write_text("flops: 3\n")
    (tmp_path / "empty.yaml").touch()
    for arguments, expected in (
        (("--config", tmp_path / "step.pt"), f"python checkpoint.py inspect {tmp_path}/step.pt"),
        (("--config", tmp_path / "a b.pt"), f"python checkpoint.py inspect '{tmp_path}/a b.pt'`"),
        (("--config", tmp_path / "run"), f"python checkpoint.py inspect {tmp_path}/run"),
        (("--config", "8b"), "presets are"),
        (("--config", "7b", "--gpu", "z9"), "no GPU named 'z9'"),
        (("--config", "7b", "--gpu", tmp_path / "bad.yaml"), "bf16_flops"),
        (("--config", "7b", "--tp", "5"), "tp 5"),
        (("--config", "7b", "--dtype", "int8", "--training"), "add --lora-rank"),
        (("--config", "deepseek-v2-lite", "--kv-dtype", "int8"), "latents are not rounded"),
        (("--config", "7b", "--fsdp", "--zero", "1"), "contradicts"),
        (("--config", "7b", "--fsdp", "--zero", "0"), "contradicts"),
        (("--params", "7e9", "--batch-size", "1"), "--batch-size goes with --config"),
        (("--params", "7e9", "--json"), "--json goes with --config"),
        (("--config", "7b", "--json", "--explain"), "--json and --explain are two answers"),
        (("--config", "7b", "--fits", "--price", "2"), "--price goes with the summary"),
        (("--config", "7b", "--shard", "2", "--mfu", "0.4"), "--mfu goes with training"),
        (("--config", "7b", "--shard", "2", "--fits"), "--fits goes with one GPU"),
        (("--config", "7b", "--lora-targets", "q_proj"), "targets goes with --lora-rank"),
        (("--config", tmp_path / "empty.yaml"), "empty.yaml is empty"),
        (("--config", "nano", "--plot", tmp_path / "no/x.svg"), "--plot " + str(tmp_path)),
        (("--config", "7b", "--lora-rank", "8", "--lora-targets", "w1"), "'w1': known are c_attn"),
        (("--config", "deepseek-v3", "--lora-rank", "8", "--lora-targets", "q_proj"), "latent"),
        ((), "--config"),
    ):
        result = compute_command(*map(str, arguments))
        assert result.returncode == 2 and expected in result.stderr, (arguments, result.stderr)
        assert len(result.stderr.strip().splitlines()) == 1 and not result.stdout


@pytest.mark.parametrize(
    ("flag", "values"),
    [
        ("--params", ["0", "-1", "nan", "inf", "1e400", "7X", "", "B", "1e31", "9" * 400]),
        ("--tokens", ["0", "-1", "nan", "many"]),
        ("--price", ["-2", "nan", "0"]),
        ("--mfu", ["0", "-0.1", "1.1", "nan", "forty"]),
        ("--lora-rank", ["-1", "8.5", "nan", "9" * 30]),
        ("--batch-size", ["0", "nan", "9" * 30]),
        ("--dp", ["0", "9" * 30]),
    ],
)
def test_numbers_that_mean_nothing(flag, values, capsys):
    for value in values:
        model = [] if flag == "--params" else ["--config", "nano"]
        with pytest.raises((SystemExit, ValueError)) as caught:
            compute.main([*model, flag, value])
        said = capsys.readouterr().err + str(caught.value)
        assert flag in said and said.count("\n") <= 1 and "nan tokens" not in said


@pytest.mark.parametrize(
    ("text", "value"),
    [("7e9", 7e9), ("7B", 7e9), ("1.5b", 1.5e9), ("350M", 3.5e8), ("7_000", 7000)],
)
def test_numbers_of_parameters(text, value, capsys):
    compute.main(["--params", text])
    said = capsys.readouterr().out
    assert f"Rules of thumb for {printed.amount(value)} parameters" in said


def test_a_gpu_of_ones_own(tmp_path, capsys):
    gpu = {"bf16_flops": "989e12", "fp32_flops": 67e12, "bandwidth": "3.35e12", "memory": 8e10}

    def written(**changes):
        (tmp_path / "mine.yaml").write_text(json.dumps(gpu | changes).replace('"', ""))
        return ["--config", "nano", "--gpu", str(tmp_path / "mine.yaml"), "--json"]

    compute.main(written())  # PyYAML reads 989e12 as text
    assert json.loads(capsys.readouterr().out)["gpu"]["bf16_flops"] == 989e12
    for field, value in (("memory", 0), ("bandwidth", -1), ("memory", "lots"), ("memory", ".nan")):
        with pytest.raises(ValueError, match=rf"mine\.yaml: {field} must be"):
            compute.main(written(**{field: value}))
    with pytest.raises(ValueError, match="a GPU file has the fields"):
        compute.main(written(cores=3))


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "timeline.png"
    assert compute_command("--config", "gpt2", "--plot", str(path)).returncode == 0
    assert path.read_bytes().startswith(b"\x89PNG")


def test_little_is_loaded():
    """What makes the command quick."""
    program = "import sys, compute; compute.main(['--config', '7b']); print(*sys.modules)"
    out = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True
    )
    loaded = out.stdout.splitlines()[-1].split()
    assert "compute" in loaded and len(loaded) < 250
    assert not {"torch", "numpy", "matplotlib"} & set(loaded)


def test_neither_compute_nor_config_imports_torch():
    allowed = set(sys.stdlib_module_names) | {"config", "families", "costs"}
    allowed |= {"plain_yaml", "inputs", "packed", "matplotlib", "cli", "quantisation", "installed"}
    rooms = (*ROOT.glob("costs/*.py"), *ROOT.glob("families/*.py"))
    for path in (ROOT / "compute.py", ROOT / "config.py", *rooms):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found = {node.module.split(".")[0]}
            else:
                continue
            assert found <= allowed, (path, found)
    program = (
        "import compute, sys; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_names_that_others_import_from_compute_are_those_of_costs():
    rooms = (flops, formulas, gpus, memory, time)
    for name in set(compute.__all__) - {"load_gpu"}:
        owners = [room for room in rooms if getattr(room, name, None) is getattr(compute, name)]
        assert owners, name
