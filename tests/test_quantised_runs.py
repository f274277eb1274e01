"""--quantise: several rules in one run, in a sweep, behind serve.py; the same bits on two ranks."""

import re

import numpy as np
import pytest
import torch
import yaml
from adapter_files import saved_adapter, saved_base
from builders import saved_checkpoint, token_shard, torchrun

import cli
import command
import eval
import results
import serve
import stats
import sweep
from distributed import Dist
from evaluation import Result
from formats import filling
from quantisation import comparison
from quantisation.apply import quantise_model
from quantisation.names import rule_of

FLAGS = ["--data-mode", "fineweb_npy", "--seq-len", "32", "--device", "cpu"]
RULES = ["fp32", "rtn-w8", "rtn-w4-g16-asym"]
NAMES = ["fp32", "rtn-w8-channel-sym-absmax", "rtn-w4-g16-asym-minmax"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    token_shard(folder / "x.npy", n=1400)
    saved_checkpoint(folder / "run", kind="llama")
    return folder


def argv_of(place, name, *words):
    where = ["--val-npy", place / "x.npy", "--results-dir", place / name]
    return [str(word) for word in (*FLAGS, *where, *words)]


def by_rule(folder):
    return {rule_of(record): record for record in results.load_records(folder)}


def test_several_rules_over_one_load(place, capsys, monkeypatch):
    """The weights are read once, and each record is that of its rule alone, key and place too."""
    path, read, fill = place / "run/checkpoint-10", [], filling.fill
    with monkeypatch.context() as patch:
        patch.setattr(filling, "fill", lambda *args: read.append(args) or fill(*args))
        eval.main(argv_of(place, "together", "--checkpoint-path", path, "--quantise", *RULES))
    assert len(read) == 1
    out = capsys.readouterr().out
    together = by_rule(place / "together")
    assert list(together) == NAMES or set(together) == set(NAMES)
    for rule, name in zip(RULES, NAMES):
        words = ["--checkpoint-path", path, "--quantise", rule]
        eval.main(argv_of(place, f"alone-{rule}", *words))
        alone = by_rule(place / f"alone-{rule}")[name]
        for field in ("metrics", "resume_key", "config_hash", "words"):
            assert alone[field] == together[name][field], (rule, field)
        assert name in alone["words"]
    eval.main(argv_of(place, "plain", "--checkpoint-path", path))
    plain = by_rule(place / "plain")[None]
    assert plain["metrics"] == together["fp32"]["metrics"]
    assert len({r["resume_key"] for r in (plain, *together.values())}) == 4
    sizes = [together[name]["protocol"]["quantisation"]["weight_bytes"] for name in NAMES]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3
    check_table(out, together)


def check_table(out, records):
    """One table: a line for each rule with its size, its metrics and their paired intervals."""
    table = out.split("difference to fp32 [95%], by example\n")[1].splitlines()
    table, below = table[: 1 + len(records)], table[1 + len(records) :]
    assert table[0].split()[:3] == ["weights", "bits", "tokens/s"]
    arrays = {name: results.load_arrays(record) for name, record in records.items()}
    for line, name in zip(table[1:], NAMES, strict=True):
        record = records[name]
        assert line.startswith(f"checkpoint-10 {name} ")
        loss = record["metrics"]["loss"]["value"]
        assert f" {loss:.5f}" in line
        held = record["protocol"]["quantisation"]
        assert f" {held['weight_bytes'] / 1e6:,.1f} MB " in line
        found = re.findall(r"([+-]\d+\.\d+) \[", line)
        assert len(found) == (0 if name == "fp32" else 1)
        if found:
            base, mine = arrays["fp32"], arrays[name]
            difference = stats.paired_difference(base["nll"], mine["nll"], mine["count"])
            assert found[0] == f"{difference['difference']:+.5f}"
            (line,) = (x for x in below if x.startswith(f"checkpoint-10 {name}: loss {found[0]} ["))
            perplexity = [float(np.exp(a["nll"].sum() / a["count"].sum())) for a in (base, mine)]
            told = float(re.search(r"perplexity ([+-]\S+)", line)[1])
            assert told == pytest.approx(perplexity[1] - perplexity[0], abs=1e-5)


def test_flips_are_of_answers(capsys):
    """Right to wrong and back by hand, and no such thing of losses or of weighted scores."""
    about = {"unit": "questions", "scores": {"acc": "right"}}
    metric = {"value": 0.5, "better": "higher", "unit": "share"}

    def result(rule, right, better="higher", **more):
        held = {"rule": rule, "weight_bytes": 4, "bits_per_weight": 8.0}
        record = {"evaluation": "e", "run": "r", "words": [rule], "config_hash": "x", "cost": {}}
        record |= {"checkpoint": {"name": "c", "path": "c"}, "protocol": {"quantisation": held}}
        record |= {"examples": about | more, "metrics": {"acc": metric | {"better": better}}}
        return Result(record, {"right": np.array(right)}, None, None)

    base = result("fp32", [1, 1, 1, 1, 0, 0])
    other = result("rtn-w8", [0, 0, 0, 1, 1, 0])
    comparison.print_rules([(base, base), (base, other)])
    header, first, second = capsys.readouterr().out.splitlines()[-3:]
    assert header.split("difference")[1].split() == ["flips", "-", "+", "p"]
    assert second.split("] ")[1].split() == ["3", "1", "0.62"] and first.endswith("50.00%")
    assert comparison.flips(base, other)["wrong_to_right"] == 1
    fewer = [result(r, x, "lower") for r, x in (("fp32", [0, 0, 1]), ("rtn-w8", [1, 0, 1]))]
    assert comparison.flips(*fewer)["right_to_wrong"] == 1
    assert comparison.flips(base, result("rtn-w8", [0.5, 0, 0, 1, 1, 0])) is None
    assert comparison.flips(base, result("rtn-w8", [0, 0, 0, 1, 1, 0], weight="n")) is None


def test_against_a_reference(place, capsys):
    """The table has the divergence of each rule from the weights as they were loaded."""
    path = place / "run/checkpoint-10"
    words = ["--checkpoint-path", path, "--reference", "first", "--quantise", *RULES]
    eval.main(argv_of(place, "against", *words, "--max-tokens", "500"))
    lines = capsys.readouterr().out.split(", by example\n")[1].splitlines()
    columns = ["loss", "difference", "perplexity", "kl", "kl_median", "kl_99", "same_top"]
    assert [c for c in lines[0].split() if c in columns] == columns
    records = by_rule(place / "against")
    assert records["fp32"]["metrics"]["kl"]["value"] == 0
    for line, name in zip(lines[1:4], NAMES):
        metrics = records[name]["metrics"]
        assert f" {metrics['same_top']['value']:.2%} " in line
        if name != "fp32":
            kl = metrics["kl"]["value"]
            assert kl > 0 and (f" {kl:.5f} " in line or f" {kl:.2e} " in line)


@pytest.mark.slow
def test_two_ranks_have_the_bits_of_one(place):
    words = ["--checkpoint-path", place / "run", "--quantise", "rtn-w4-g16-asym", "rtn-w8a8"]
    eval.main(argv_of(place, "one", *words))
    torchrun(2, "eval.py", *argv_of(place, "two", *words))
    one, two = by_rule(place / "one"), by_rule(place / "two")
    assert len(one) == 2
    for name in one:
        assert one[name]["metrics"] == two[name]["metrics"]
        assert one[name]["files"]["arrays"] == two[name]["files"]["arrays"]


def test_adapters_under_rules(tmp_path):
    """Each of base and adapter under each rule: merged first, then rounded, then both undone."""
    base = saved_base(tmp_path, tie=True)
    lora = saved_adapter(tmp_path / "lora", base)
    shard = np.load(token_shard(tmp_path / "x.npy", n=700))
    np.save(tmp_path / "x.npy", shard % 96)
    words = ["--checkpoint-path", base, "--adapter", lora, "--quantise", "rtn-w8", "rtn-w4"]
    eval.main(argv_of(tmp_path, "together", *words))
    together = results.load_records(tmp_path / "together")
    assert len(together) == 4
    eval.main(argv_of(tmp_path, "alone", "--checkpoint-path", lora, "--quantise", "rtn-w4"))
    (alone,) = results.load_records(tmp_path / "alone")
    keys = {r["resume_key"]: r["metrics"] for r in together}
    assert keys[alone["resume_key"]] == alone["metrics"]
    assert len({r["metrics"]["loss"]["value"] for r in together}) == 4


def test_a_sweep_of_rules(place, capsys):
    """`quantise` in an entry: the records of eval.py, each made once."""
    entry = {"data-mode": "fineweb_npy", "val_npy": str(place / "x.npy"), "seq-len": 32}
    entries = {"perplexity": [entry, entry | {"quantise": RULES[1:]}]}
    (place / "e.yaml").write_text(yaml.safe_dump(entries))
    argv = ["--device", "cpu", "--checkpoint-path", str(place / "run")]
    argv += ["--results-dir", str(place / "swept"), "--evaluations", str(place / "e.yaml")]
    sweep.main(argv)
    out = capsys.readouterr().out
    assert "perplexity quantise=rtn-w8-channel-sym-absmax: loss" in out
    swept = by_rule(place / "swept")
    path = place / "run/checkpoint-10"
    eval.main(argv_of(place, "as-swept", "--checkpoint-path", path, "--quantise", *RULES[1:]))
    for name, record in by_rule(place / "as-swept").items():
        assert swept[name]["metrics"] == record["metrics"]
        assert swept[name]["resume_key"] == record["resume_key"]
    assert swept.keys() == {None, *NAMES[1:]}
    capsys.readouterr()
    sweep.main(argv)
    assert "0 made, 3 done before, 0 failed" in capsys.readouterr().out
    (place / "e.yaml").write_text(yaml.safe_dump({"perplexity": entry | {"quantise": "int5"}}))
    with pytest.raises(ValueError, match=r"e.yaml: perplexity: there is no rule 'int5'"):
        sweep.main(argv)


def test_a_rule_that_fails_leaves_the_others_alone(place, tmp_path):
    """In a sweep: its failure is recorded, and the weights are whole again for the next."""
    words = {"data-mode": "fineweb_npy", "val-npy": str(place / "x.npy"), "seq-len": 32}
    words |= {"quantise": ["gguf-q8_0", "rtn-w8"]}  # rows of 48 columns have no block of 32
    (tmp_path / "e.yaml").write_text(yaml.safe_dump({"perplexity": words}))
    argv = ["--device", "cpu", "--checkpoint-path", str(place / "run")]
    argv += ["--results-dir", str(tmp_path / "r"), "--evaluations", str(tmp_path / "e.yaml")]
    with pytest.raises(SystemExit):
        sweep.main(argv)
    records = results.load_records(tmp_path / "r")
    failed = [r["reason"] for r in records if r["status"] == "failed"]
    assert len(failed) == 1 and "blocks.0.mlp.fc2: gguf-q8_0 has blocks of 32" in failed[0]
    eval.main(argv_of(place, "whole", "--checkpoint-path", place / "run", "--quantise", "rtn-w8"))
    (made,) = [r for r in records if r["status"] == "ok"]
    assert made["metrics"] == by_rule(place / "whole")[NAMES[1]]["metrics"]


def test_a_model_in_memory_has_the_key_of_its_rule(place):
    from checkpoint import load_model

    model = load_model(place / "run/checkpoint-10", "float32")
    given = dict(data_mode="fineweb_npy", val_npy=(str(place / "x.npy"),), seq_len=32)
    plain = eval.evaluate_perplexity(model, None, **given)
    quantise_model(model, "rtn-w4-g16-asym")
    held = eval.evaluate_perplexity(model, None, **given)
    assert held["metrics"]["loss"]["value"] != plain["metrics"]["loss"]["value"]
    assert held["config_hash"] != plain["config_hash"] and rule_of(held) == NAMES[2]


def test_every_script_has_the_flags_and_wrong_ones_end_in_a_line(place):
    for each in sweep.EVALUATIONS:
        p = cli.parser(None)
        command.add_flags(p, each)
        assert {"--quantise", "--quantise-embeddings", "--quantise-skip"} <= {
            flag for action in p._actions for flag in action.option_strings
        }, each.name
    for words, said in (
        (["--quantise", "int4"], "there is no rule 'int4'"),
        (["--quantise-skip", "*.fc2"], "go with --quantise RULE"),
        (["--quantise", "rtn-w8", "--quantise-skip", "*.down"], "no matrix has a name like it"),
        (["--quantise", "fp16", "--dtype", "bf16"], "cannot hold it: --dtype float32"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            eval.main(argv_of(place, "none", "--checkpoint-path", place / "run", *words))
    assert not list((place / "none").rglob("*.json"))


def test_serve_answers_with_rounded_weights(place):
    options = serve.Options(str(place / "run/checkpoint-10"), quantise="rtn-w4-g16-asym")
    precision = cli.PrecisionOptions()
    dist = Dist(0, 1, 0, torch.device("cpu"))
    served, _ = serve.open_model(options, precision, dist)
    assert served.name == "checkpoint-10-rtn-w4-g16-asym-minmax"
    with pytest.raises(ValueError, match="there is no rule"):
        serve.open_model(serve.Options(options.checkpoint_path, quantise="w4"), precision, dist)
