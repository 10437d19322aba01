"""The page in a real browser, under its own content policy."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dspy_opro.reporting.examples import Examples, ExampleText
from dspy_opro.reporting.live import Limit, Live, Runner
from dspy_opro.reporting.report import write_report
from dspy_opro.reporting.result import OPROResult
from dspy_opro.search.trajectory import Trajectory
from tests.reporting.test_heat_map import compiled
from tests.results import result, trial

selenium = pytest.importorskip("selenium")
BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None or DRIVER is None, reason="no browser on this machine"),
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    options = ChromeOptions()
    options.binary_location = str(BROWSER)
    flags = ["headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "no-first-run"]
    flags += ["disable-background-networking", "disable-component-update", "disable-sync"]
    flags.append(f"user-data-dir={tmp_path_factory.mktemp('profile')}")
    for flag in flags:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = Chrome(options=options, service=Service(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


Show = Callable[..., Any]


@pytest.fixture
def show(browser: Any, tmp_path: Path) -> Show:
    """Opens the page of a result."""

    def opened(
        shown: OPROResult | None = None, place: str = "", width: int = 1200, scheme: str = "light"
    ) -> Any:
        write_report(result() if shown is None else shown, tmp_path / "report.html")
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        # Without smooth scrolling, so that a click meets what it aims at.
        features = [
            {"name": "prefers-color-scheme", "value": scheme},
            {"name": "prefers-reduced-motion", "value": "reduce"},
        ]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        browser.get("about:blank")
        browser.get_log("browser")
        browser.get((tmp_path / "report.html").as_uri() + place)
        return browser

    return opened


def numbers(browser: Any) -> list[int]:
    rows = browser.execute_script("return [...document.querySelectorAll('tbody tr')].map(row => row.id)")
    return [int(row.removeprefix("trial-")) for row in rows]


def hostile() -> OPROResult:
    evil = "<img src=x onerror=\"document.title='broken'\"></p></article><script>document.title='broken'</script>"
    evil += "W" * 500
    found = compiled()
    texts = [replace(t, inputs={evil: evil}, expected={evil: evil}) for t in found.data.texts["train"]]
    outcomes = {
        id_: {
            "train": [
                replace(o, output=evil, feedback=evil, error=evil, subscores={evil: 1.0})
                for o in by["train"]
                if o
            ]
        }
        for id_, by in found.data.outcomes.items()
    }
    data = replace(found.data, texts={"train": texts}, outcomes=outcomes)
    student, _, best = found.trajectory.trials
    evil_best = replace(best, subscores={evil: 0.5}, reason=evil)
    other = trial(evil, [0.0], 1, "pruned", student.candidate)
    return replace(
        found, trajectory=Trajectory().add(student, other, evil_best), stop_reason=evil, data=data,
        config={"name": evil, "prompt_model": evil}, problems=(evil,),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("clicks", "expected"),
    [
        ([], [3, 2, 0, 1]),  # the best first
        (["trial"], [0, 1, 2, 3]),
        (["trial", "trial"], [3, 2, 1, 0]),
        (["score"], [0, 2, 3, 1]),  # the estimate stays last
        (["round", "score"], [3, 2, 0, 1]),
        (["state"], [1, 3, 2, 0]),
    ],
)
def test_a_click_on_a_heading_sorts(show: Show, clicks: Sequence[str], expected: Sequence[int]) -> None:
    browser = show()
    for name in clicks:
        browser.find_element("xpath", f"//th/button[text()='{name}']").click()
    assert numbers(browser) == expected
    assert browser.get_log("browser") == []


def test_a_link_to_a_trial_opens_its_texts(show: Show) -> None:
    browser = show(place="#trial-2")
    opened = browser.execute_script(
        "return [...document.querySelectorAll('tr:has(details[open])')].map(r => r.id)"
    )
    assert opened == ["trial-2"]


def test_details_open_and_show_the_whole_text(show: Show) -> None:
    long = "Say why. " * 300 + "End."
    start = trial("Answer.", [0.0])
    browser = show(result(trajectory=Trajectory().add(start, trial(long, [1.0], 1, parent=start.candidate))))
    row = browser.find_element("id", "trial-1")
    assert long.strip() not in row.text
    row.find_element("tag name", "summary").click()
    assert row.find_elements("css selector", ".text")[1].text == long


def test_a_click_on_a_column_shows_the_example(show: Show) -> None:
    browser = show(compiled())
    assert not any(a.is_displayed() for a in browser.find_elements("css selector", "article"))
    column = browser.find_elements("css selector", ".wide .cell")[0]
    browser.execute_script("arguments[0].scrollIntoView()", column)
    column.find_element("css selector", "rect").click()
    shown = [a for a in browser.find_elements("css selector", "article") if a.is_displayed()]
    assert [a.get_attribute("id") for a in shown] == ["train-0"]
    for words in ("q0", "a0", "answer: 0", "answer: 1", "feedback 0", "feedback 1"):
        assert words in shown[0].text
    shown[0].find_element("link text", "next").click()
    assert browser.find_element("id", "train-1").is_displayed() and not shown[0].is_displayed()


@pytest.mark.parametrize("width", [320, 400, 700, 1200])
def test_nothing_scrolls_sideways(show: Show, width: int) -> None:
    browser = show(hostile(), place="#train-0", width=width)
    browser.execute_script("for (const d of document.querySelectorAll('details')) d.open = true")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


def test_a_hostile_text_runs_nothing(show: Show) -> None:
    browser = show(hostile())
    assert browser.title != "broken"
    assert browser.find_elements("tag name", "img") == []
    assert len(browser.find_elements("tag name", "script")) == 1


@pytest.mark.parametrize("place", [".winner .good .text", "#trial-1 summary", "#train-0 bdi"])
def test_a_text_from_right_to_left_reads_so(show: Show, place: str) -> None:
    """The full stop at its end is on the left of its first letter, although a Latin word stands before it."""
    arabic = "\u0623\u062c\u0628 good."
    student = trial("Answer.", [0.0])
    trials = Trajectory().add(student, trial(arabic, [1.0], 1, parent=student.candidate))
    data = Examples({"train": [ExampleText(0, {"question": arabic}, {})]})
    browser = show(result(trajectory=trials, curve=(0.0, 1.0), data=data, failures=()), "#train-0")
    script = """
        const walker = document.createTreeWalker(document.querySelector(arguments[0]), NodeFilter.SHOW_TEXT);
        const left = (character) => {
            for (walker.currentNode = walker.root; walker.nextNode();) {
                const at = walker.currentNode.data.indexOf(character), range = new Range();
                if (at < 0) continue;
                range.setStart(walker.currentNode, at);
                range.setEnd(walker.currentNode, at + 1);
                return range.getBoundingClientRect().left;
            }
        };
        return [left("."), left("\u0623")];
    """
    full_stop, first = browser.execute_script(script, place)
    assert full_stop < first


def test_dark_mode_follows_the_system(show: Show) -> None:
    grounds = []
    for scheme in ("light", "dark"):
        ground = show(scheme=scheme).execute_script("return getComputedStyle(document.body).backgroundColor")
        grounds.append(sum(map(int, re.findall(r"\d+", ground)[:3])) / 3)
    assert grounds[0] > 230 and grounds[1] < 40


def test_paper_is_white_in_dark_mode_too(show: Show) -> None:
    browser = show(scheme="dark")
    features = [{"name": "prefers-color-scheme", "value": "dark"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print", "features": features})
    ink = browser.execute_script("return getComputedStyle(document.body).color")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    assert sum(map(int, re.findall(r"\d+", ink)[:3])) < 200


def test_paper_has_every_instruction_whole(show: Show) -> None:
    browser = show(hostile(), width=400)
    cut = """return [...document.querySelectorAll("td.texts summary span")]
        .filter((text) => text.scrollHeight > text.clientHeight + 1).length"""
    assert browser.execute_script(cut) > 0
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    on_paper = browser.execute_script(cut)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    assert on_paper == 0


def live_page(path: Path, round: int) -> None:
    found = result()
    runners = [Runner(t.candidate, 2, 0.5) for t in found.trajectory.trials]
    part = path.with_name("part")
    write_report(found, part, Live(round, 4, runners, [Limit("rounds", round, 9, 60.0)]))
    part.replace(path)


def test_a_live_page_reloads_and_the_reader_stays_where_they_were(show: Show, tmp_path: Path) -> None:
    from selenium.webdriver import Keys

    browser, path = show(width=500), tmp_path / "live.html"
    live_page(path, 1)
    browser.get(path.as_uri())
    browser.find_element("xpath", "//th/button[text()='trial']").click()
    browser.execute_script("document.querySelector('#trial-2 details').open = true; scrollTo(0, 900)")
    browser.switch_to.active_element.send_keys(Keys.TAB)  # from "trial" to "round"
    browser.execute_script("scrollTo(0, 900)")
    before = browser.execute_script("return [scrollY, location.href]")
    live_page(path, 2)
    until = time.monotonic() + 20
    while "Round 2 is decided" not in browser.page_source and time.monotonic() < until:
        time.sleep(0.2)
    assert "Round 2 is decided" in browser.page_source
    assert browser.execute_script("return [scrollY, location.href]") == before
    assert numbers(browser) == [0, 1, 2, 3]
    assert browser.switch_to.active_element.text == "round"
    opened = browser.execute_script(
        "return [...document.querySelectorAll('details[open]')].map(d => d.closest('tr').id)"
    )
    assert opened == ["trial-2"]
    write_report(result(), path)  # the end
    until = time.monotonic() + 20
    while "as patience allows" not in browser.page_source and time.monotonic() < until:
        time.sleep(0.2)
    assert "as patience allows" in browser.page_source
    assert browser.execute_script("return document.body.dataset.live") is None
