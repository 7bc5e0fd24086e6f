"""The page: in headless Chromium, with the network off."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from errata.bench.folder import RECORDS
from errata.cli import call
from errata.cli.report import read_run
from errata.report.figures import pictures
from errata.report.page import page
from errata.report.story import story
from errata.report.tables import Sheet
from tests.report.made import sequence, single

CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-sync"]
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian: apt-get install chromium)")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=[*QUIET, "--disable-component-update"])
        yield made
        made.close()


def opened(browser: Any, path: Path, width: int = 1200, **more: Any) -> tuple[Any, list[str]]:
    tab = browser.new_context(viewport={"width": width, "height": 800}, offline=True, **more).new_page()
    said: list[str] = []
    tab.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: None if request.url.startswith(("file:", "data:")) else said.append(request.url))
    tab.goto(path.as_uri())
    return tab, said


@pytest.fixture
def report(tmp_path: Path) -> Path:
    """A sequence under two methods, with a text that would like to be a script, beside single edits."""
    sequence(tmp_path / "S", {"memit": [0.0, 0.0, 1.0, 1.0], "rome": [1.0] * 4}, evil=True, also=True)
    single(tmp_path / "R", {"lora": [(1.0, True), (1.0, False)]})
    assert call(["report", str(tmp_path / "S"), str(tmp_path / "R"), "--to", str(tmp_path / "report.html")]) == 0
    return tmp_path / "report.html"


@needs_chromium
@pytest.mark.parametrize("width", [360, 1200])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_opens_without_a_word_and_fits(browser: Any, report: Path, width: int, scheme: str) -> None:
    tab, said = opened(browser, report, width, color_scheme=scheme)
    assert said == [] and tab.title() == "Corrections of tiny", "what a model wrote is text, and nothing else"
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    headings = tab.locator("h2").all_inner_texts()
    assert headings == [
        "What was edited?", "Did it work?", "What did it cost?", "How does it go on with more edits?", "The single cases", "Exactly how",
    ]  # fmt: skip
    assert tab.locator("figure [role=img]").count() == tab.locator("figure details table").count() == 8, "each picture in numbers too"
    ink = tab.evaluate("getComputedStyle(document.querySelector('figure svg text')).fill")
    assert (ink == "rgb(236, 236, 236)") == (scheme == "dark"), "the pictures' text is the page's"


@needs_chromium
def test_cases_are_searched_filtered_sorted_and_opened_by_keyboard(browser: Any, report: Path) -> None:
    tab, said = opened(browser, report)
    rows = tab.locator("#cases-table tbody tr")
    assert rows.count() == 10
    tab.fill("#search", "land 3")
    assert rows.count() == 2 and tab.inner_text("#count") == "2 of 10 cases"
    tab.fill("#search", "")
    tab.select_option("#line", "memit (S)")
    tab.select_option("#outcome", "missed")
    assert rows.count() == 2
    tab.select_option("#outcome", "all")
    tab.click("#cases-table th button[data-by=efficacy_top]")
    assert tab.locator("th[aria-sort=ascending]").inner_text() == "Efficacy"
    assert rows.locator("td:nth-child(6)").all_inner_texts() == ["0", "0", "100", "100"]
    tab.select_option("#line", "")
    tab.select_option("#outcome", "mirage")
    assert rows.count() == 1 and "Land 1" in rows.inner_text()
    assert "same subject, not to be: Town 0" not in tab.inner_text("#cases-table")
    rows.locator("button").focus()
    tab.keyboard.press("Enter")
    assert tab.locator("tr.open .token").all_inner_texts() == [" Town\n90 %", " 1\n100 %"] and "asked for: Town 1" in tab.inner_text(
        "tr.open"
    )
    assert tab.locator("button[aria-expanded=true]").count() == 1
    tab.keyboard.press("Enter")
    tab.select_option("#line", "rome (S)")
    tab.select_option("#outcome", "all")
    rows.first.locator("button").focus()
    tab.keyboard.press("Enter")
    tab.fill("#search", "the north")
    tab.fill("#search", "land 0 lies in")
    assert tab.locator("tr.open").count() == 1, "found by what was asked otherwise, and open still"
    assert tab.locator("button[aria-expanded=true]").get_attribute("aria-label") == "hide case c0"
    tab.fill("#search", "")
    assert "Land 0 lies in Town 0. — same subject, not to be: Town 0" in tab.inner_text("tr.open")
    rows.first.locator("button").focus()
    tab.keyboard.press("Enter")
    assert tab.locator("tr.open").count() == 0 and said == []


@needs_chromium
def test_controls_have_names_and_text_stands_out(browser: Any, report: Path) -> None:
    """WCAG: each control is labelled, and text has a contrast of 4.5 at least, in the light and in the dark."""
    for scheme in ("light", "dark"):
        tab, _ = opened(browser, report, color_scheme=scheme)
        unnamed = "[...document.querySelectorAll('input, select')].filter(one => !one.labels.length).length"
        assert tab.evaluate(unnamed) == 0 and tab.locator("html[lang=en]").count() == 1
        colours = "name => getComputedStyle(document.documentElement).getPropertyValue(name).trim()"
        paper, *inks = (tab.evaluate(colours, f"--{name}") for name in ("paper", "ink", "soft", "link", "good", "bad"))
        assert all(contrast(paper, ink) >= 4.5 for ink in inks), scheme


def contrast(one: str, other: str) -> float:
    def light(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    high, low = sorted((light(one), light(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_a_thousand_cases_stay_under_ten_megabytes(tmp_path: Path) -> None:
    methods = {f"method {i}": [float(case % 3 > 0) for case in range(1000)] for i in range(5)}
    text = page(story([read_run(sequence(tmp_path / "S", methods, also=True))]))
    assert len(text.encode()) < 10e6
    assert not re.findall(r"""(?:src|href)=["'](?!#|data:)""", text), "nothing is fetched"


def test_tables_for_papers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    single(tmp_path / "R", {"ft-m": [(1.0, True), (0.5, False)], "a_b": [(1.0, True), (1.0, True)]})
    for name in ("t.md", "t.tex"):
        assert call(["report", str(tmp_path / "R"), "--to", str(tmp_path / name), "--json"]) == 0
    markdown, latex = ((tmp_path / name).read_text() for name in ("t.md", "t.tex"))
    assert "| ft-m | 2 | 75.0 (50.0 to 100.0) | 50.0 (0.0 to 100.0) |" in markdown
    assert r"a\_b & 2 & 100.0 (34.2 to 100.0)" in latex and latex.count(r"\toprule") == 6
    assert "Effort" in latex and "how sure" in markdown and "unedited" not in markdown and "too few cases" in markdown
    capsys.readouterr()


def test_what_cannot_be_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = single(tmp_path / "R", {"ft-m": [(1.0, True)]})
    for command, wrong in (
        ([str(run), str(run), "--to", "x.html"], "is given twice; give each run once"),
        ([str(run), "--to", "x.pdf"], "the name must end in .html, .md or .tex"),
        ([str(tmp_path), "--to", "x.html"], "holds no finished run (results.json is missing)"),
    ):
        assert call(["report", *command]) == 2
        assert wrong in capsys.readouterr().err


def test_failed_cases_are_among_the_cases(tmp_path: Path) -> None:
    folder = single(tmp_path / "R", {"ft-m": [(1.0, True)]})
    with open(folder / RECORDS, "a") as records:
        records.write(json.dumps({"method": "ft-m", "objective": "ce", "seed": 0, "case": "c9", "error": "the prompt is too long"}) + "\n")
    text = page(story([read_run(folder)]))
    assert "the prompt is too long" in text and "measured after each edit" in text


def test_blocks_of_edits_are_named_whatever_stands_beside(tmp_path: Path) -> None:
    """The middle of one block of all edits is that of the middle one of three."""
    several = [read_run(sequence(tmp_path / "A", {"memit": [1.0] * 4})), read_run(sequence(tmp_path / "B", {"locft": [1.0] * 4}))]
    for name, blocks in (("memit", [(1, 2), (3, 4), (5, 6)]), ("locft", [(1, 6)])):
        for run in several:
            for row in run.results["rows"]:
                if row["method"] == name:
                    row["metrics"]["checkpoints"][-1]["by_age"] = [
                        {"edits": list(block), "efficacy_top": 10.0 * block[0]} for block in blocks
                    ]
    (picture,) = [made for made in pictures(story(several))["goes-on"] if made.title == "Retention by age"]
    assert picture.headings == ("method", "1–2", "3–4", "5–6") and picture.rows == (("memit", "10.0", "30.0", "50.0"),)


def test_what_a_prompt_holds_breaks_no_table() -> None:
    sheet = Sheet("two\n\nlines", ("a", "b"), (("![i](http://x.y/z.png)", "$1 & <b> | ~"),))
    assert "**two lines**" in sheet.markdown() and r"\!\[i\](http" in sheet.markdown() and r"\$1 \& \<b\> \| \~" in sheet.markdown()
    assert r"\caption{two lines}" in sheet.latex() and r"\$1 \& $<$b$>$ \textbar{} \textasciitilde{}" in sheet.latex()
