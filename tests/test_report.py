from __future__ import annotations

import base64
import hashlib
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspy_opro.report import page, write_report
from dspy_opro.report.drawing import staircase
from dspy_opro.report.figures import Words, causes, effort_figure, score_figure, ticks, word_diff
from dspy_opro.report.markup import VOID, Html, tag
from dspy_opro.report.words import REASONS, duration, number, signed
from dspy_opro.study.store import RESUMABLE
from dspy_opro.trajectory import Trajectory
from dspy_opro.work import Failure
from tests.results import empty, result, trial

finite = st.floats(-1e6, 1e6)


class Page(HTMLParser):
    """A page taken apart; elements that do not close in order are an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((name, dict(attributes)))
        if name not in VOID:
            self.open.append(name)

    def handle_startendtag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((name, dict(attributes)))

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.texts).split())

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for found, attributes in self.elements if found == name]


# -- figures -------------------------------------------------------------------------------------


def test_the_score_figure_has_every_trial_at_its_round() -> None:
    figure = score_figure(result())
    assert [(p.number, round(p.x), p.score, p.state, p.is_best) for p in figure.points] == [
        (0, 0, 0.25, "complete", False),
        (1, 1, 0.0, "pruned", False),
        (2, 1, 0.5, "complete", False),
        (3, 2, 0.75, "complete", True),
    ]
    assert figure.points[1].x < figure.points[2].x
    assert (figure.num_rounds, figure.low, figure.high) == (3, 0.0, 0.75)


def test_the_effort_figure_counts_examples_by_round_and_fate() -> None:
    figure = effort_figure(result())
    assert (figure.complete, figure.pruned) == ([4, 4, 4], [0, 2, 0])
    assert (figure.num_scored, figure.num_full) == (14, 16)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("Answer.", "Answer.", [Words("same", "Answer.", "Answer.")]),
        ("Say the word.", "Say it.", [Words("same", "Say", "Say"), Words("removed", " the word."),
                                      Words("added", after=" it.")]),
        ("a b", "a\n\nb", [Words("same", "a b", "a\n\nb")]),
        ("", "new", [Words("added", after="new")]),
        ("old", "", [Words("removed", "old")]),
    ],
)  # fmt: skip
def test_a_diff_goes_word_by_word(before: str, after: str, expected: object) -> None:
    assert word_diff(before, after) == expected


texts = st.lists(st.sampled_from(["a", "b", " c", "\nd"])).map(" ".join)


@given(texts, texts)
def test_a_diff_gives_both_texts_back(before: str, after: str) -> None:
    runs = word_diff(before, after)
    assert "".join(w.before for w in runs) == before
    assert "".join(w.after for w in runs) == after


@given(finite, finite, st.integers(2, 8))
def test_ticks_enclose_the_values_and_are_few(one: float, other: float, count: int) -> None:
    low, high = sorted((one, other))
    marks = ticks(low, high, count)
    slack = 1e-6 * max(1.0, abs(low), abs(high))
    assert marks[0] <= low + slack and marks[-1] >= high - slack
    assert marks == sorted(set(marks)) and 2 <= len(marks) <= count + 2


@pytest.mark.parametrize(
    ("value", "low", "high"),
    [(0.0, 0.0, 1.0), (0.5, 0.0, 1.0), (1.0, 0.0, 1.0), (7.0, 0.0, 8.0), (-2.0, -2.0, 1.0)],
)
def test_scores_that_are_all_equal_have_an_axis_too(value: float, low: float, high: float) -> None:
    marks = ticks(value, value)
    assert (marks[0], marks[-1]) == (low, high)


def test_failures_are_grouped_by_cause() -> None:
    failures = [
        Failure("a", "train", 3, "boom"),
        Failure("b", "train", 3, "boom"),
        Failure("a", "val", 1, "bang"),
    ]
    assert [(c.error, c.count, c.num_candidates, c.examples) for c in causes(failures)] == [
        ("boom", 2, 2, {"train": [3]}),
        ("bang", 1, 1, {"val": [1]}),
    ]


def test_a_staircase_holds_each_value_until_the_next() -> None:
    assert staircase([(0, 5), (10, 5), (20, 2)]) == "M0.0 5.0 H10.0 V5.0 H20.0 V2.0"


@pytest.mark.parametrize(
    ("value", "plain", "with_sign"),
    [(0.5, "0.500", "+0.500"), (-0.25, "−0.250", "−0.250"), (0, "0.000", "0.000"), (-1e-9, "0.000", "0.000"),
     (1e-9, "0.000", "0.000"), (1234.56, "1,234.6", "+1,234.6")],
)  # fmt: skip
def test_numbers_read_well(value: float, plain: str, with_sign: str) -> None:
    assert (number(value), signed(value)) == (plain, with_sign)


@pytest.mark.parametrize(("seconds", "text"), [(3.21, "3.2 s"), (75, "1 min 15 s"), (7325, "2 h 2 min")])
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# -- markup --------------------------------------------------------------------------------------


def test_markup_escapes_texts_and_attributes_and_nothing_twice() -> None:
    inner = tag("b", "a < b", title='"q"')
    assert inner == '<b title="&quot;q&quot;">a &lt; b</b>'
    assert tag("p", [inner, None, 1], class_="x", hidden=False) == f'<p class="x">{inner}1</p>'
    assert isinstance(inner, Html)


@given(st.text())
def test_whatever_a_model_writes_stays_text(text: str) -> None:
    found = Page(tag("p", text, title=text))
    assert found.elements == [("p", {"title": text})]
    assert "".join(found.texts) == text


# -- the page ------------------------------------------------------------------------------------


def test_the_page_shows_what_the_run_found() -> None:
    found = Page(page(result()))
    for words in (
        "0.250 → 0.750 +0.500 mean score on the trainset",
        "Answer very well & briefly.",
        "Answer <b>badly</b>.",
        "1 × ValueError: <none> trainset[7], 1 candidate",
        "2 × duplicate",
        "no better program was found for as many rounds as patience allows",
        "3,000",
        "$0.0123",
        "1 min 15 s",
        "14 instead of 16 (88%)",
        "capitals",
    ):
        assert words.replace(" ", "") in found.text.replace(" ", ""), words
    assert len([a for a in found.all("tr") if a.get("id")]) == 4
    links = {str(a["href"]) for a in found.all("a")}
    assert links == {f"#trial-{i}" for i in range(4)}


def test_the_head_counts_candidates_without_the_student_and_names_the_data() -> None:
    found = Page(page(result(config={"trainset": 400, "prompt_model": "big-lm"})))
    assert "mean score on 4 of 400 train examples" in found.text
    assert "3candidates, 1 dropped early" in found.text
    assert "Calls of the optimizer LM (big-lm)" in found.text


def test_a_set_of_demos_is_told_from_the_student() -> None:
    student = trial("Answer.", [0.0])
    with_demos = replace(student, candidate=replace(student.candidate, round=1, demo_set=2))
    found = Page(page(result(trajectory=Trajectory().add(student, with_demos), curve=(0.0, 0.0))))
    assert found.text.count("demo set 2 with: ") == 1


def test_a_reason_after_which_a_run_can_go_on_has_words() -> None:
    assert REASONS.keys() >= RESUMABLE


def test_links_in_a_figure_are_not_hidden_in_an_image() -> None:
    assert {a.get("role") for a in Page(page(result())).all("svg")} == {"group"}


def colours(scheme: str) -> dict[str, tuple[float, ...]]:
    """Name -> red, green, blue and opacity, all from 0 to 1."""
    style = page(result()).partition("<style>")[2]
    block = re.findall(r":root \{(.*?)\}", style, re.DOTALL)[scheme == "dark"]
    found = dict(re.findall(r"--([\w-]+): #(\w+)", block))
    return {
        name: tuple(int(f"{code:f<8}"[i : i + 2], 16) / 255 for i in (0, 2, 4, 6))
        for name, code in found.items()
    }


def luminance(colour: Sequence[float]) -> float:
    red, green, blue = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3])
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(
    ("ink", "layers", "least"),
    [
        ("good", ["page", "good-tint"], 4.5),  # the gain
        ("good", ["card", "good-tint"], 4.5),  # new words
        ("good", ["card", "good-tint", "good-tint"], 4.5),  # new words in the row of the returned trial
        ("bad", ["card", "bad-tint"], 4.5),
        ("soft", ["page", "tint"], 4.5),
        ("soft", ["card", "good-tint"], 4.5),
        ("accent", ["card", "good-tint", "tint"], 4.5),
        ("card", ["good"], 4.5),
        ("faint", ["card"], 3.0),  # outlines
        ("faint", ["page"], 3.0),
    ],
)
def test_colours_can_be_told_apart(scheme: str, ink: str, layers: list[str], least: float) -> None:
    """Contrast as WCAG 2 has it: 4.5 for text, 3 for outlines."""
    known = colours(scheme)
    ground: tuple[float, ...] = (1.0, 1.0, 1.0)
    for name in layers:
        *top, opacity = known[name]
        ground = tuple(opacity * t + (1 - opacity) * g for t, g in zip(top, ground, strict=False))
    dark, bright = sorted((luminance(known[ink]), luminance(ground)))
    assert (bright + 0.05) / (dark + 0.05) >= least


def test_the_valset_gets_a_column_where_there_is_one() -> None:
    trials = result().trajectory.trials
    with_valset = Trajectory((replace(trials[0], valset_score=0.125), *trials[1:]))
    assert "0.125" not in page(result())
    assert "0.125" in page(result(trajectory=with_valset, selected_on="valset"))


def test_it_loads_nothing_and_runs_no_script_but_its_own() -> None:
    text = page(result())
    found = Page(text)
    assert not re.findall(r"(?:https?:)?//\w|@import|url\(", text)
    assert {name for name, _ in found.elements} & {"link", "img", "iframe", "base", "object"} == set()
    assert all(not {"src", "style"} & a.keys() for _, a in found.elements)
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(a["content"] for a in found.all("meta") if a.get("http-equiv"))
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(1)> \" ' & \x00 \ud800"


def test_hostile_texts_stay_texts_everywhere(tmp_path: Path) -> None:
    start = trial("Answer.", [0.0])
    bad = trial(EVIL, [1.0], 1, parent=start.candidate)
    write_report(
        result(
            trajectory=Trajectory().add(start, bad),
            curve=(0.0, 1.0),
            stop_reason=EVIL,
            failures=(Failure(bad.id, "train", 0, EVIL),),
            config={EVIL: EVIL, "name": EVIL, "description": EVIL},
            study_name=EVIL,
            problems=(EVIL,),
        ),
        tmp_path / "new" / "report.html",
    )
    found = Page((tmp_path / "new" / "report.html").read_text(encoding="utf-8"))
    assert len(found.all("script")) == 1
    assert found.all("img") == []


def test_a_run_without_a_score_has_a_page_too() -> None:
    found = Page(page(empty()))
    assert "The run ended before the student itself was scored." in found.text
    assert found.all("svg") == []


def test_a_thousand_trials_make_a_page_of_moderate_size() -> None:
    start = trial("Answer.", [0.0] * 10)
    many = [
        trial(f"Answer {i}. " + "Say why. " * 40, [0.0] * 5, 1 + i // 8, "pruned", start.candidate)
        for i in range(999)
    ]
    text = page(result(trajectory=Trajectory().add(start, *many), curve=(0.0,) * 126))
    assert len(text) < 3_000_000
    assert len([a for a in Page(text).all("tr") if a.get("id")]) == 1000


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no browser on this machine")
def test_a_browser_runs_the_script_under_the_policy(tmp_path: Path) -> None:
    write_report(result(), tmp_path / "report.html")
    flags = ["headless=new", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking"]
    flags += ["disable-component-update", "disable-sync", f"user-data-dir={tmp_path / 'profile'}", "dump-dom"]
    address = (tmp_path / "report.html").as_uri() + "#trial-2"
    done = subprocess.run(
        [str(BROWSER), *(f"--{flag}" for flag in flags), address],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    rows = re.findall(r'<tr id="trial-(\d)".*?</tr>', done.stdout, re.DOTALL)
    assert rows == ["0", "1", "2", "3"]
    opened = [m for m in re.findall(r"<tr id.*?</tr>", done.stdout, re.DOTALL) if "<details open" in m]
    assert len(opened) == 1 and "Answer" in opened[0]
