"""reporting/page.py and page.html: the data, and the page in a real browser."""

import csv
import io
from pathlib import Path

import pytest
from builders import PATIENCE
from made_up_records import HOSTILE, odd_records, page_parts, run_report, save, synthetic

import results


def test_page_data_is_what_the_records_say(tmp_path):
    breakdown = {"failure": {"timeout": 3}, "calibration": [{"low": 0.0}]}
    metrics = {"pass@1": results.metric(1 / 3, 0.1, 5)}
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


def open_page(browser, path, **options):
    """(page, troubles): opened and drawn; console messages, errors and requests are gathered."""
    page, troubles = browser.new_page(**options), []
    page.set_default_timeout(1000 * PATIENCE)
    page.on("console", lambda message: troubles.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: troubles.append(f"error: {error}"))
    page.on("request", lambda r: troubles.append(r.url) if r.url != f"file://{path}" else None)
    page.goto(f"file://{path}")
    drawn(page)
    return page, troubles


def drawn(page):
    page.wait_for_selector("html[data-figures]", state="attached")


@pytest.fixture(scope="module")
def synthetic_page(tmp_path_factory):
    directory = tmp_path_factory.mktemp("synthetic") / "results"
    synthetic().make_results(directory, checkpoints=13, questions=570)
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
        "Stem",
        "By subject",
        "Calibration",
        "Risk coverage",
        "Letter",
        "pass@1",
        "pass@10",
        "Failure · baseline",
        "humaneval · Tokens per second",
        "mmlu · GPU-seconds",
    ):
        assert title in titles
    count = len(titles)
    assert page.locator("figure:visible .main-svg").count() >= count  # each has its drawing
    loss = page.locator("figure[aria-label='Loss, nats per token']")
    assert loss.locator(".scatterlayer .trace").count() == 7  # 3 runs with bands, 1 level
    page.click("button.chip:has-text('baseline')")
    drawn(page)
    assert loss.locator(".scatterlayer .trace").count() == 5
    assert not page.locator("figure[aria-label='Failure · baseline']").is_visible()
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
    metrics = {"accuracy": results.metric(0.5, 0.1, 5, unit=HOSTILE), HOSTILE: 1.0}
    breakdown = {"subject": {HOSTILE: {"accuracy": 0.5}}, "category": {HOSTILE: {"accuracy": 0.5}}}
    for step in (1, 2):
        save(tmp_path, "mmlu", metrics, run=HOSTILE, step=step, breakdown=breakdown,
             protocol={"template": HOSTILE}, words=[HOSTILE])  # fmt: skip
    save(tmp_path, "mmlu", {}, step=3, status="failed", reason=HOSTILE)
    assert run_report(tmp_path).returncode == 0
    page, troubles = open_page(browser, tmp_path / "report.html")
    assert page.locator("img").count() == 0 and "broken in" not in page.title()
    assert HOSTILE in page.locator("button.chip").first.inner_text()
    assert troubles == []


def test_page_of_odd_records(browser, tmp_path):
    odd_records(tmp_path)
    assert run_report(tmp_path).returncode == 0
    page, troubles = open_page(browser, tmp_path / "report.html")
    assert page.locator("figure:visible .main-svg").count() > 0 and troubles == []


@pytest.mark.slow
def test_a_thousand_checkpoints(browser, tmp_path):
    directory = tmp_path / "results"
    synthetic().make_results(directory, checkpoints=1000)
    assert run_report(directory).returncode == 0
    page, troubles = open_page(browser, directory / "report.html")
    loss = page.locator("figure[aria-label='Loss, nats per token']")
    points = page.evaluate(
        "node => node.data.filter(t => t.hoverinfo !== 'skip').map(t => t.x.length)",
        loss.locator(".plot").element_handle(),
    )
    assert sorted(points) == [333] * 4  # every checkpoint, and the level at each step
    rows = page.locator("#checkpoints tbody tr")
    assert rows.count() == 500  # the table's first
    page.click("button:text-is('show all 1,000 checkpoints')")
    assert rows.count() == 1000 and not page.locator("button:has-text('show all')").is_visible()
    page.click("button.chip:has-text('baseline')")
    drawn(page)
    assert troubles == []
