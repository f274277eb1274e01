"""report.py: its statistics against scipy, and its page in a real browser."""

import csv
import importlib.util
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

import durable
import report
import results
import stats

ROOT = Path(report.__file__).parent
spec = importlib.util.spec_from_file_location("synthetic", ROOT / "benchmarks" / "report.py")
synthetic = importlib.util.module_from_spec(spec)
spec.loader.exec_module(synthetic)

HOSTILE = "</script><img src=x onerror=\"document.title='broken in'\"><b>&"


def save(
    directory, evaluation, metrics, arrays=None, *, run="base", step=1, samples=None, n=0, **more
):
    fields = {"protocol": {"window": 8, "stride": 8}, "data": {"hash": "d" * 64}} | more
    fingerprint = results.config_hash({"run": run, "step": step, "n": n})
    name = f"checkpoint-{step}"
    checkpoint = {"name": name, "step": step, "fingerprint": fingerprint, "path": name}
    protocol = fields.pop("protocol")
    record = results.new_record(
        evaluation, metrics, protocol, run=run, checkpoint=checkpoint, **fields
    )
    return results.save_record(directory, record, arrays, samples)


def loss_record(directory, nll, count, **more):
    value = float(nll.sum() / count.sum())
    stderr = stats.ratio_stderr(nll, count)
    metrics = {"loss": {"value": value, "stderr": stderr, "n": len(nll)}}
    return save(directory, "perplexity", metrics, {"nll": nll, "count": count}, **more)


def answers_record(directory, correct, arrays=None, **more):
    p = float(correct.mean())
    stderr = stats.proportion_stderr(p, len(correct))
    metrics = {"accuracy": {"value": p, "stderr": stderr, "n": len(correct)}}
    return save(directory, "mmlu", metrics, {"correct": correct} | (arrays or {}), **more)


def run_report(*arguments, **options):
    command = [sys.executable, str(ROOT / "report.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


# --- Tables


def test_table_ranks_marks_and_pairs(tmp_path):
    rng = np.random.default_rng(0)
    count = np.full(50, 16)
    base = rng.normal(3, 0.4, 50) * 16
    nll = {
        step: base + shift * 16 + rng.normal(0, 0.3, 50)
        for step, shift in ((1, 0.5), (2, 0.0), (3, 0.2))
    }
    for step, values in nll.items():
        loss_record(tmp_path, values, count, step=step)
    table = report.table_of(report.read(tmp_path)["ok"])
    assert [row[2] for row in table["rows"]] == ["2", "3", "1"]
    assert table["best"] == {(0, 3)} and table["rows"][0][4] == "best"
    expected = scipy.stats.ttest_rel(nll[3] / 16, nll[2] / 16).confidence_interval(0.95)
    difference = np.mean(nll[3] - nll[2]) / 16
    text = f"{difference:+.4f} [{expected.low:+.4f}, {expected.high:+.4f}]"
    assert table["rows"][1][4] == text
    by_step = report.table_of(report.read(tmp_path)["ok"], sort="step")
    assert [row[2] for row in by_step["rows"]] == ["1", "2", "3"]
    assert by_step["best"] == {(1, 3)}
    cut = report.table_of(report.read(tmp_path)["ok"], rows=1)
    assert len(cut["rows"]) == 1 and "2 more checkpoints" in cut["notes"][-1]


def test_differences_without_arrays_say_so(tmp_path):
    for step, value in ((1, 0.5), (2, 0.7)):
        metric = {"value": value, "stderr": 0.03, "n": 100}
        save(tmp_path, "mmlu", {"accuracy": metric}, step=step)
    table = report.table_of(report.read(tmp_path)["ok"])
    margin = 1.96 * 0.03 * 2**0.5
    assert table["rows"][1][4] == f"~-0.2000 [{-0.2 - margin:+.4f}, {-0.2 + margin:+.4f}]"
    assert "~" in table["notes"][0]


def test_other_protocols_and_data_are_other_tables(tmp_path):
    metrics = {"loss": 1.0}
    save(tmp_path, "perplexity", metrics)
    save(tmp_path, "perplexity", metrics, protocol={"window": 16})
    save(tmp_path, "perplexity", metrics, step=2, data={"hash": "e" * 64})
    save(tmp_path, "perplexity", metrics, step=3)
    groups = report.groups_of(report.read(tmp_path)["ok"])
    assert sorted(len(group) for group in groups) == [1, 1, 2]


def test_partial_and_odd_records_are_shown(tmp_path):
    """No metrics, plain numbers, null values, no step, unknown evaluations and breakdowns."""
    save(tmp_path, "mmlu", {})
    save(tmp_path, "mmlu", {"accuracy": None}, step=2)
    save(tmp_path, "mmlu", {"accuracy": float("nan")}, step=3)
    save(tmp_path, "gsm8k", {"exact_match": 0.25, "flag": True}, step=None)
    odd = {"depth": {"1": 0.5, "2": {"value": 0.6}}, "text": "x", "calibration": None}
    save(tmp_path, "gsm8k", {"exact_match": 0.5}, step=5, breakdown=odd)
    escape = save(tmp_path, "mmlu", {"accuracy": 0.5}, run="a\x1b[2Jb", step=7)
    record = json.loads(escape.read_text())
    record["checkpoint"]["step"], record["data"]["tokens"] = "seven", "many"  # edited by hand
    escape.write_text(json.dumps(record))
    out = run_report(tmp_path)
    assert out.returncode == 0, out.stderr
    assert "\x1b" not in out.stdout
    assert "0.5000 *" in out.stdout and "no metrics" not in out.stdout.split("gsm8k")[1]


def test_csv_holds_every_record_at_full_precision(tmp_path):
    value = 1 / 3
    save(tmp_path, "mmlu", {"accuracy": {"value": value, "stderr": 0.1, "n": 3}}, run='a,"b"')
    save(tmp_path, "mmlu", {}, step=2, status="failed", reason="torn,\nfile")
    assert run_report(tmp_path, "--no-html").returncode == 0
    rows = list(csv.DictReader(io.StringIO((tmp_path / "report.csv").read_text())))
    assert float(rows[0]["mmlu/accuracy"]) == value and rows[0]["run"] == 'a,"b"'
    assert rows[1]["status"] == "failed" and rows[1]["reason"] == "torn,\nfile"
    text = (tmp_path / "report.md").read_text()
    assert "**0.3333 ±0.1000**" in text and "torn, file" in text
    assert not (tmp_path / "report.html").exists()


def test_replaced_failed_and_unreadable_are_named(tmp_path):
    old = save(tmp_path, "mmlu", {"accuracy": 0.1}, n=1)
    record = json.loads(old.read_text())
    record["environment"]["time"] = "2020-01-01T00:00:00Z"
    old.write_text(json.dumps(record))
    save(tmp_path, "mmlu", {"accuracy": 0.2}, n=2)  # the same name, other content
    save(tmp_path, "mmlu", {}, step=9, status="failed", reason="weights hold NaN")
    (old.parent / "torn.json").write_text("{")
    out = run_report(tmp_path, "--no-html").stdout
    assert "0.2000 *" in out and "0.1000" not in out and "replace them: 1 records" in out
    assert "checkpoint-9 mmlu: weights hold NaN" in out and "torn.json: not JSON" in out


# --- Comparison


def test_compare_questions(tmp_path):
    rng = np.random.default_rng(0)
    n = 400
    gold = rng.integers(0, 4, n)
    a, b = rng.random(n) < 0.5, rng.random(n) < 0.6
    logprobs = [np.log(rng.dirichlet(np.ones(4), n)) for _ in range(2)]
    samples = [{"id": i, "subject": "law", "question": f"question {i}?"} for i in range(n)]
    paths = [
        answers_record(tmp_path, right, {"gold": gold, "logprobs": p}, step=step, samples=samples)
        for step, right, p in ((1, a, logprobs[0]), (2, b, logprobs[1]))
    ]
    (pair,) = report.pairs_of(*paths)
    out = report.compare(*pair, examples=5)
    only_b, only_a = int((b & ~a).sum()), int((a & ~b).sum())
    assert (out["better"], out["worse"]) == (only_b, only_a)
    assert out["both"] == int((a & b).sum())
    assert out["p"] == pytest.approx(scipy.stats.binomtest(only_b, only_a + only_b).pvalue)
    expected = scipy.stats.ttest_rel(b.astype(float), a.astype(float)).confidence_interval()
    assert (out["low"], out["high"]) == pytest.approx((expected.low, expected.high), rel=1e-4)
    assert out["verdict"] == ("B is better" if out["p"] < 0.05 else "not resolved")
    flipped = np.flatnonzero(a != b)
    moved = np.abs(logprobs[1][np.arange(n), gold] - logprobs[0][np.arange(n), gold])
    expected = flipped[np.argsort(-moved[flipped])][:5]
    assert [row["example"] for row in out["changed"]] == expected.tolist()
    text = report.compare_text(*pair, out)
    assert f"law: question {expected[0]}?" in text and "McNemar" in text


def test_compare_windows_and_folders(tmp_path):
    rng = np.random.default_rng(1)
    count = rng.integers(1, 9, 60)
    a = rng.normal(3, 0.3, 60) * count
    b = a - rng.normal(0.1, 0.05, 60) * count
    b[7] -= 0.8 * count[7]
    paths = [loss_record(tmp_path, x, count, step=i) for i, x in enumerate((a, b))]
    out = report.compare(*report.pairs_of(*[p.parent for p in paths])[0])
    assert out["difference"] == pytest.approx((b.sum() - a.sum()) / count.sum())
    assert out["verdict"] == "B is better" and out["changed"][0]["example"] == 7
    assert out["changed"][0]["what"] == "from token 56"
    low, high = out["bootstrap"]
    assert low < out["difference"] < high
    again = report.compare(*report.pairs_of(*paths)[0])
    assert again["bootstrap"] == out["bootstrap"]
    same = report.compare(*report.pairs_of(paths[0], paths[0])[0])
    assert same["verdict"] == "not resolved" and same["changed"] == []
    assert "to resolve" not in report.compare_text(*report.pairs_of(paths[0], paths[0])[0], same)


def test_compare_tasks(tmp_path):
    n = np.full(30, 10)
    c = np.array([3] * 30), np.array([5] * 15 + [3] * 14 + [10])
    paths = []
    for step, passed in enumerate(c):
        metrics = {f"pass@{k}": stats.pass_at_k_summary(n, passed, k) for k in (1, 10)}
        paths.append(save(tmp_path, "humaneval", metrics, {"n": n, "c": passed}, step=step))
    out = report.compare(*report.pairs_of(*paths)[0])
    assert out["difference"] == pytest.approx((c[1] - c[0]).mean() / 10)
    assert out["changed"][0]["example"] == 29 and out["better"] == 16
    assert "pass@1 " in report.compare_text(*report.pairs_of(*paths)[0], out)
    at_10 = stats.pass_at_k(n, c[1], 10) - stats.pass_at_k(n, c[0], 10)
    assert out["pass"]["pass@10"]["difference"] == pytest.approx(at_10.mean())
    for path in paths:  # only pass@10 was asked for: then that is compared
        record = results.load_record(path)
        del record["metrics"]["pass@1"]
        durable.write_json(path, record)
    out = report.compare(*report.pairs_of(*paths)[0])
    assert out["metric"] == "pass@10" and out["difference"] == pytest.approx(at_10.mean())


def test_compare_refuses_what_does_not_pair(tmp_path):
    count = np.full(5, 4)
    a = loss_record(tmp_path, count * 3.0, count)
    cases = {
        "different data": loss_record(tmp_path, count * 3.0, count, step=2, data={"hash": "x"}),
        "token counts differ": loss_record(tmp_path, count * 3.0, count + 1, step=3),
        "the same tokenizer": loss_record(tmp_path, np.ones(6), np.ones(6), step=4),
        "cannot compare": answers_record(tmp_path, np.array([True, False]), step=5),
        "no per-example": save(tmp_path, "perplexity", {"loss": 1.0}, step=6),
        "evaluation failed": save(tmp_path, "perplexity", {}, step=7, status="failed", reason="x"),
        "no such file": tmp_path / "nowhere",
        "not one of each": a.parent,
    }
    for reason, other in cases.items():
        out = run_report("--compare", a, other)
        assert out.returncode == 2 and reason in out.stderr, (reason, out.stderr)
        assert out.stderr.count("\n") == 1 and "Traceback" not in out.stderr
    out = run_report("--compare", a.parent, cases["different data"].parent)
    assert out.returncode == 2 and "share no evaluation" in out.stderr


# --- The command


def test_errors_are_one_line_and_exit_2(tmp_path):
    wrong = ["--rows", "-1"], ["--examples", "-1"], ["--watch", "0"], ["--watch", "nan"]
    for arguments in ([tmp_path / "nowhere"], ["--compare", "x", "y"], ["--sort"], *wrong):
        out = run_report(*arguments)
        assert out.returncode == 2 and out.stderr.count("\n") == 1, out.stderr
    save(tmp_path, "mmlu", {"accuracy": 0.5})
    out = run_report(tmp_path, "--sort", "acuracy")
    assert out.returncode == 2 and "there are step, accuracy" in out.stderr


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    save(tmp_path / "results", "mmlu", {"accuracy": 0.5})
    (tmp_path / "file").write_text("")
    out = run_report(tmp_path / "results", "--out", tmp_path / "file")
    assert out.returncode == 2 and out.stderr.count("\n") == 1 and "--out FOLDER" in out.stderr


def test_an_empty_directory_is_no_error(tmp_path):
    out = run_report(tmp_path)
    assert out.returncode == 0 and "no results yet" in out.stdout
    assert (tmp_path / "report.html").exists()


def test_without_plotly_the_install_command_is_named(tmp_path):
    save(tmp_path, "mmlu", {"accuracy": 0.5})
    code = (
        "import sys; sys.modules['plotly'] = sys.modules['plotly.offline'] = None\n"
        f"import cli, report; cli.run(lambda: report.main([{str(tmp_path)!r}]))"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 2 and "pip install plotly" in out.stderr
    assert (tmp_path / "report.csv").exists() and (tmp_path / "report.md").exists()
    out = run_report(tmp_path, "--no-html")
    assert out.returncode == 0


def test_watch_rewrites_the_report(tmp_path):
    save(tmp_path, "mmlu", {"accuracy": 0.5})
    command = [sys.executable, str(ROOT / "report.py"), str(tmp_path), "--no-html"]
    said = tmp_path / "said"
    with open(said, "w") as out:
        process = subprocess.Popen([*command, "--watch", "0.2"], stdout=out)
    try:
        wait_for(lambda: "0.5000 *" in read_text(said))
        save(tmp_path, "mmlu", {"accuracy": 0.75}, step=2)
        wait_for(lambda: "0.7500 *" in read_text(said))
        assert "0.7500" in read_text(tmp_path / "report.md")
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)
    assert process.returncode == 130


def read_text(path):
    return path.read_text() if path.exists() else ""


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.05)


def test_questions_answered_differently_are_listed(tmp_path):
    """By three scorings of one checkpoint: a line in the file for each pair that differs."""
    path = Path(save(tmp_path, "mmlu", {"accuracy": 0.5})).parent / "mmlu-differences-0a.jsonl"
    names = ("lm_eval/letter", "zh/letter", "lm_eval/generate")
    answers = {3: ("A", "B", "B"), 1: ("C", "C", None)}
    lines = []
    for i, given in answers.items():
        for a, b in itertools.combinations(range(3), 2):
            if given[a] != given[b]:
                line = {"id": i, "subject": "law", "where": f"law.csv:{i}", "gold": "A"}
                lines.append(json.dumps(line | {names[a]: given[a], names[b]: given[b]}) + "\n")
    path.write_text("".join(lines))
    text = report.write_report(tmp_path, tmp_path, html=True, sort=None, rows=0)
    assert "2 questions answered differently by" in text
    written = (tmp_path / "report.md").read_text()
    table = [line for line in written.splitlines() if "law.csv" in line]
    _, data = page_parts(tmp_path / "report.html")
    (found,) = data["differences"]
    assert sorted(found["columns"][3:]) == sorted(names) and found["total"] == 2
    order = [names.index(name) for name in found["columns"][3:]]
    for row, i, line in zip(found["rows"], (1, 3), table, strict=True):
        assert row == [f"law.csv:{i}", "law", "A", *(answers[i][k] for k in order)]
        assert line.split(" | ")[0] == f"| law.csv:{i}"
    path.write_text(lines[0] + '{"id": 4')
    text = report.write_report(tmp_path, tmp_path, html=False, sort=None, rows=0)
    assert "answered differently" not in text and "no list of differences" in text


# --- The page


def page_parts(path):
    """(html, data) of a written page."""
    html = Path(path).read_text()
    start = html.index('<script type="application/json" id="data">')
    start = html.index(">", start) + 1
    return html, json.loads(html[start : html.index("</script>", start)])


def test_page_data_is_what_the_records_say(tmp_path):
    breakdown = {"failure": {"timeout": 3}, "calibration": [{"low": 0.0}]}
    metrics = {"pass@1": {"value": 1 / 3, "stderr": 0.1, "n": 5}}
    for step in (20, 3):
        save(tmp_path, "humaneval", metrics, run=HOSTILE, step=step, breakdown=breakdown)
    assert run_report(tmp_path).returncode == 0
    html, data = page_parts(tmp_path / "report.html")
    (group,) = data["groups"]
    (series,) = group["series"]
    assert series["run"] == HOSTILE and series["step"] == [3, 20]
    assert series["metrics"]["pass@1"] == {"v": [0.33333333] * 2, "e": [0.1] * 2, "n": [5] * 2}
    assert series["breakdown"]["failure"]["timeout"]["value"]["v"] == [3, 3]
    assert HOSTILE not in html and "{{" not in html.replace("{{…}}", "")[:20_000]


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if not found:
        pytest.skip("needs Chromium")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=found, args=flags)
        yield browser
        browser.close()


def open_page(browser, path, **options):
    """(page, troubles): opened and drawn; console messages, errors and requests are gathered."""
    page, troubles = browser.new_page(**options), []
    page.on("console", lambda message: troubles.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: troubles.append(f"error: {error}"))
    page.on("request", lambda r: troubles.append(r.url) if r.url != f"file://{path}" else None)
    page.goto(f"file://{path}")
    drawn(page)
    return page, troubles


def drawn(page):
    page.wait_for_selector("html[data-figures]", state="attached", timeout=60_000)


@pytest.fixture(scope="module")
def synthetic_page(tmp_path_factory):
    directory = tmp_path_factory.mktemp("synthetic") / "results"
    synthetic.make_results(directory, checkpoints=13, questions=570)
    assert run_report(directory).returncode == 0
    return directory / "report.html"


def test_page_in_a_browser(browser, synthetic_page):
    page, troubles = open_page(browser, synthetic_page, viewport={"width": 1280, "height": 900})
    titles = page.locator("figure h3").all_inner_texts()
    for title in (
        "Loss, nats per token",
        "Perplexity",
        "Bits per byte",
        "Accuracy",
        "STEM",
        "By subject",
        "Calibration",
        "Answer letters",
        "pass@1",
        "pass@10",
        "Failures · baseline",
        "HumanEval · Tokens per second",
        "MMLU · GPU-seconds",
    ):
        assert title in titles
    count = len(titles)
    assert page.locator("figure:visible .main-svg").count() >= count  # each has its drawing
    loss = page.locator("figure[aria-label='Loss, nats per token']")
    assert loss.locator(".scatterlayer .trace").count() == 7  # 3 runs with bands, 1 level
    page.click("button.chip:has-text('baseline')")
    drawn(page)
    assert loss.locator(".scatterlayer .trace").count() == 5
    assert not page.locator("figure[aria-label='Failures · baseline']").is_visible()
    assert "hide=baseline" in page.url
    page.click("text=tokens")
    drawn(page)
    assert "tokens" in loss.locator(".xtitle").text_content()
    page.click("button:text-is('dark')")
    drawn(page)
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == "rgb(16, 18, 22)"
    page.click("th button:has-text('Loss')")
    first = page.locator("#checkpoints tbody tr").first.inner_text()
    assert "★" in first
    with page.expect_download() as download:
        loss.locator(".top button").click()
    rows = list(csv.DictReader(io.StringIO(Path(download.value.path()).read_text())))
    assert len(rows) == 13 and {row["run"] for row in rows} >= {"baseline", "published"}
    page.reload()
    drawn(page)
    assert page.locator("button.chip[aria-pressed='false']").inner_text() == "baseline"
    assert troubles == []


@pytest.mark.parametrize("width, scheme", [(390, "light"), (1440, "dark")])
def test_page_fits_its_window_and_scheme(browser, synthetic_page, width, scheme):
    options = {"viewport": {"width": width, "height": 800}, "color_scheme": scheme}
    page, troubles = open_page(browser, synthetic_page, **options)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.documentElement.dataset.theme") == scheme
    outside = page.evaluate(
        """[...document.querySelectorAll('figure')].filter(f => {
          const svg = f.querySelector('.main-svg');
          return svg && svg.getBoundingClientRect().right > f.getBoundingClientRect().right + 1;
        }).length"""
    )
    assert outside == 0 and troubles == []


def test_page_prints_light_and_whole(browser, synthetic_page):
    page, troubles = open_page(browser, synthetic_page, color_scheme="dark")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("document.documentElement.dataset.theme") == "light"
    page.emulate_media(media="print")
    wide = page.evaluate(
        """[...document.querySelectorAll('figure .main-svg')].filter(svg =>
          svg.getBoundingClientRect().right > svg.closest('figure').getBoundingClientRect().right
        ).length"""
    )
    assert wide == 0
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    drawn(page)
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert page.pdf(format="A4")[:4] == b"%PDF" and troubles == []


def test_hostile_names_stay_text(browser, tmp_path):
    metrics = {"accuracy": {"value": 0.5, "stderr": 0.1, "n": 5}, HOSTILE: 1.0}
    breakdown = {"subject": {HOSTILE: {"accuracy": 0.5}}, "category": {HOSTILE: {"accuracy": 0.5}}}
    for step in (1, 2):
        save(tmp_path, "mmlu", metrics, run=HOSTILE, step=step, breakdown=breakdown,
             protocol={"template": HOSTILE})  # fmt: skip
    save(tmp_path, "mmlu", {}, step=3, status="failed", reason=HOSTILE)
    assert run_report(tmp_path).returncode == 0
    page, troubles = open_page(browser, tmp_path / "report.html")
    assert page.locator("img").count() == 0 and "broken in" not in page.title()
    assert HOSTILE in page.locator("button.chip").first.inner_text()
    assert troubles == []


def test_page_of_odd_records(browser, tmp_path):
    test_partial_and_odd_records_are_shown(tmp_path)
    page, troubles = open_page(browser, tmp_path / "report.html")
    assert page.locator("figure:visible .main-svg").count() > 0 and troubles == []


@pytest.mark.slow
def test_a_thousand_checkpoints(browser, tmp_path):
    directory = tmp_path / "results"
    synthetic.make_results(directory, checkpoints=1000)
    start = os.times()
    assert run_report(directory).returncode == 0
    end = os.times()
    used = end.children_user + end.children_system - start.children_user - start.children_system
    assert used < 5, f"the report of 3,000 records took {used:.1f} s of one core"
    page, troubles = open_page(browser, directory / "report.html")
    loss = page.locator("figure[aria-label='Loss, nats per token']")
    points = page.evaluate(
        "node => node.data.filter(t => t.hoverinfo !== 'skip').map(t => t.x.length)",
        loss.locator(".plot").element_handle(),
    )
    assert sorted(points) == [333] * 4  # every checkpoint, and the level at each step
    start = time.monotonic()
    page.click("button.chip:has-text('baseline')")
    drawn(page)
    assert time.monotonic() - start < 60 and troubles == []
