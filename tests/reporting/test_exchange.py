"""reporting/exchange.py: changes since the base, and what they cost, against plain numpy."""

import numpy as np
import pytest
from made_up_records import answers_record, loss_record

from report import main
from reporting.exchange import since
from reporting.groups import groups_of, read
from reporting.tables import markdown, terminal

WINDOWS = 40


@pytest.fixture
def folder(tmp_path):
    """A base and two checkpoints on two texts and some questions."""
    rng = np.random.default_rng(0)
    count = rng.integers(5, 9, WINDOWS)
    texts = {"domain": 3.0 * count + rng.random(WINDOWS), "general": 2.0 * count}
    right = rng.random(50) < 0.5
    for run, step, gain, loss in (
        ("base", 0, 0, 0),
        ("run", 200, 0.9, 0.2),
        ("run", 100, 0.5, -0.1),
    ):
        for name, nll in texts.items():
            change = -gain if name == "domain" else loss
            data = {"hash": name, "files": [f"data/{name}.txt"]}
            loss_record(tmp_path, nll + change * count, count, run=run, step=step, data=data)
        answers_record(tmp_path, right & (np.arange(50) >= step / 20), run=run, step=step)
    return tmp_path


def test_changes_in_the_order_of_steps_and_the_exchange(folder):
    table = since(groups_of(read(folder)["ok"]), "base/checkpoint-0", "domain.txt")
    names = ["mmlu accuracy", "perplexity loss domain.txt", "perplexity loss general.txt"]
    paid = [f"{names[0]} lost per gain", f"{names[2]} lost per gain"]
    assert table["header"] == ["run", "checkpoint", "tokens", *names, *paid]
    first, second = table["rows"]
    assert (first[1], second[1]) == ("checkpoint-100", "checkpoint-200")
    assert first[4].startswith("-0.5000 [") and second[5].startswith("+0.2000 [")
    assert "~" not in "".join(first[3:])  # paired
    lost = [np.load(p)["correct"].mean() for p in sorted(folder.rglob("mmlu*.npz"))]
    assert float(first[-1]) == pytest.approx(-0.1 / 0.5, abs=1e-4)
    assert float(second[-1]) == pytest.approx(0.2 / 0.9, abs=1e-4)
    assert float(second[-2]) == pytest.approx((max(lost) - min(lost)) / 0.9, abs=1e-4)
    assert "below 0: gained there too" in terminal(table)


def test_in_the_report(folder, capsys):
    main([str(folder), "--no-html", "--since", "base/checkpoint-0", "--domain", "general"])
    said = capsys.readouterr().out
    assert "since base/checkpoint-0" in said and "domain.txt lost per gain" in said
    text = (folder / "report.md").read_text()
    assert "## since base/checkpoint-0" in text
    found = read(folder)
    assert markdown([since(groups_of(found["ok"]), "base/checkpoint-0")], found)
    assert since(groups_of(found["ok"]), "base")["rows"]  # a run of one checkpoint
    for words, said in (
        (["--since", "nobody"], "--since nobody: no checkpoint of that name .* base/checkpoint-0"),
        (["--since", "base/checkpoint-0", "--domain", "zh"], "--domain zh is in 0 of: mmlu"),
        (["--since", "base/checkpoint-0", "--domain", "perplexity"], "is in 2 of"),
    ):
        with pytest.raises(ValueError, match=said):
            main([str(folder), "--no-html", *words])
    with pytest.raises(SystemExit):
        main([str(folder), "--domain", "x"])
