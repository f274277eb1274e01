"""A record of an evaluation and a metric that nobody here has heard of is ranked, tabled, compared
and drawn: the report knows none by name. And records of version 1 are shown like those of today."""

import shutil

import numpy as np
import pytest
import scipy.stats
from made_up_records import VERSION_1, run_report, save

import results
from reporting.compare import compare, compare_text, pairs_of
from reporting.groups import groups_of, read
from reporting.page import page_data
from reporting.tables import table_of

N = 40


def melodies(directory, step, off_key, right):
    """A record of a made-up evaluation: cents off key, lower is better, weighted by notes."""
    notes = np.arange(N) % 7 + 1
    value = float(off_key.sum() / notes.sum())
    return save(
        directory,
        "melody",
        {
            "cents": results.metric(value, 0.5, N, better="lower", unit="cents off key"),
            "tempo": results.metric(float(right.mean()), 0.1, N, better="higher", unit="share"),
        },
        {"off": off_key, "notes": notes, "right": right * notes, "song": np.arange(N) * 1000},
        step=step,
        protocol={"key": "C"},
        examples={
            "unit": "songs",
            "scores": {"cents": "off", "tempo": "right"},
            "weight": "notes",
            "labels": {"song": "song {:,}"},
        },
        words=["in C", "limit 40: not a score"],
        breakdown={
            "genre": {
                "folk": {"cents": results.metric(value, 0.1, 9, "lower")},
                "jazz": {"cents": 2.0},
            },
            "instrument": {"flute": {"heard": 0.5, "played": 0.25}, "harp": {"heard": 0.1}},
            "mistake": {"flat": 3, "sharp": 4},
        },
    )  # fmt: skip


@pytest.fixture
def two(tmp_path):
    rng = np.random.default_rng(0)
    off = rng.gamma(2.0, 3.0, N) * (np.arange(N) % 7 + 1)
    right = rng.random(N) < 0.5
    paths = [melodies(tmp_path, 1, off, right), melodies(tmp_path, 2, off * 0.8 - 0.1, ~right)]
    return tmp_path, paths


def test_it_is_ranked_and_tabled(two):
    folder, _ = two
    (group,) = groups_of(read(folder)["ok"])
    table = table_of(group)
    assert table["title"] == "melody · in C · limit 40: not a score"
    assert table["header"] == ["run", "checkpoint", "step", "cents", "Δ to best [95%]", "tempo"]
    assert [row[2] for row in table["rows"]] == ["2", "1"]  # fewer cents first
    assert (0, 3) in table["best"] and table["rows"][1][4].startswith("+")
    tempo = [float(row[5].split()[0]) for row in table["rows"]]
    assert (tempo.index(max(tempo)), 5) in table["best"]
    by_tempo = table_of(group, sort="tempo")
    assert float(by_tempo["rows"][0][5].split()[0]) == max(tempo)


def test_it_is_compared(two):
    _, paths = two
    (pair,) = pairs_of(*paths)
    out = compare(*pair, examples=3)
    assert out["metric"] == "cents" and out["unit"] == "songs" and "p" not in out
    assert out["better"] == N and out["verdict"] == "B is better"
    assert out["others"].keys() == {"tempo"}
    text = compare_text(*pair, out)
    assert f"song {out['changed'][0]['example'] * 1000:,}" in text
    assert "songs" in text and "B better on 40" in text


def test_a_lower_share_of_wrong_answers_is_tested_by_mcnemar(tmp_path):
    rng = np.random.default_rng(1)
    wrong = rng.random(200) < 0.5, rng.random(200) < 0.3
    paths = [
        save(
            tmp_path,
            "made up",
            {"error_rate": results.share(int(w.sum()), 200, better="lower")},
            {"wrong": w},
            step=step,
            examples={"unit": "trials", "scores": {"error_rate": "wrong"}},
        )
        for step, w in enumerate(wrong)
    ]
    out = compare(*pairs_of(*paths)[0])
    a, b = wrong
    assert out["flips"]["both_right"] == int((~a & ~b).sum())
    assert out["flips"]["wrong_to_right"] == out["better"] == int((a & ~b).sum())
    expected = scipy.stats.binomtest(out["better"], out["better"] + out["worse"]).pvalue
    assert out["p"] == pytest.approx(expected) and out["verdict"] == "B is better"


def test_it_is_drawn(two, browser):
    from test_page import open_page

    folder, _ = two
    (group,) = page_data(read(folder), "x")["groups"]
    assert group["lower"] == ["cents"] and group["units"]["tempo"] == "share"
    out = run_report(folder)
    assert out.returncode == 0, out.stderr
    page, troubles = open_page(browser, folder / "report.html")
    titles = page.locator("figure h3").all_inner_texts()
    assert titles == [
        "Cents, cents off key",
        "Tempo",
        "Folk",
        "Jazz",
        "Instrument",
        "Mistake · base",
    ]
    tile = page.locator(".tile").inner_text()
    assert "Lowest melody · Cents" in tile and "not a score" in tile
    assert page.locator("th button").all_inner_texts()[3:] == ["melody · Cents", "Tempo"]
    assert "%" in page.locator("#checkpoints tbody tr").first.inner_text()
    assert troubles == []


def test_version_1_is_tabled_compared_and_drawn(tmp_path):
    shutil.copytree(VERSION_1, tmp_path / "results")
    out = run_report(tmp_path / "results", "--out", tmp_path)
    assert out.returncode == 0 and "not readable" not in out.stdout, out.stderr
    assert "perplexity · window 32 · stride 32 · float32 · 1,003 tokens · x.npy" in out.stdout
    assert "6.9090 ±0.0547 *" in out.stdout and "~" not in out.stdout
    folders = sorted((tmp_path / "results/tiny").iterdir())
    out = run_report("--compare", *folders)
    assert out.returncode == 0 and out.stdout.count("verdict") == 3, out.stderr
    assert "McNemar" in out.stdout and "from token " in out.stdout
    assert "virology: What is 5 and test?" in out.stdout  # from the samples


def test_version_1_is_compared_with_version_2(tmp_path):
    """The same work by the code of then and of now."""
    (old,) = VERSION_1.glob("*/checkpoint-10-*/perplexity*.json")
    record = results.load_record(old)
    arrays = results.load_arrays(record)
    new = results.save_record(
        tmp_path, record | {"run": "again"}, arrays | {"nll": arrays["nll"] + 1}
    )
    assert results.load_record(new)["_version"] == 2
    out = compare(*pairs_of(old, new)[0])
    assert out["difference"] == pytest.approx(32 / 1002) and out["worse"] == 32
