from __future__ import annotations

import base64
import hashlib
import json
import platform
import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from importlib import metadata
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dspy_opro
from dspy_opro.reporting.examples import Examples
from dspy_opro.reporting.report import (
    Axes,
    Bar,
    Words,
    ancestry,
    causes,
    duration,
    effort_axes,
    effort_bars,
    lineage,
    make_rows,
    number,
    page,
    score_axes,
    signed,
    ticks,
    word_diff,
    write_report,
)
from dspy_opro.reporting.result import OPROResult
from dspy_opro.search.confidence import Gain, Interval
from dspy_opro.search.tasks import Failure
from dspy_opro.search.trajectory import Trajectory, Usage
from dspy_opro.storage.run_storage import RESUMABLE
from tests.results import empty, result, trial

finite = st.floats(-1e6, 1e6)

VOID = {"meta", "circle", "line", "rect", "path"}
"""Elements without content."""


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
    rows = make_rows(result())
    assert [(r.number, round(r.x), r.score, r.kind, r.is_measured) for r in rows] == [
        (0, 0, 0.25, "student", True),
        (1, 1, 0.0, "pruned", False),
        (2, 1, 0.5, "complete", True),
        (3, 2, 0.75, "returned", True),
    ]
    assert rows[1].x < rows[2].x
    axes = score_axes(result(), rows, 880, 320)
    assert (axes.num_rounds, axes.ticks[0], axes.ticks[-1]) == (3, 0.0, 0.8)


def with_estimates(*estimates: float, scores: Sequence[float] = (0.0, 1.0, 0.0, 1.0)) -> OPROResult:
    """A run of the student, and of candidates dropped after two examples with these rewards."""
    student = trial("Answer.", scores)
    dropped = [
        replace(trial(f"Answer {i}.", scores[:2], 1, "pruned", student.candidate), reward=estimate)
        for i, estimate in enumerate(estimates)
    ]
    return result(trajectory=Trajectory().add(student, *dropped), curve=(student.reward,) * 2)


def test_an_estimate_stays_within_the_scores_that_were_seen() -> None:
    found = with_estimates(1.5, -0.5, 0.25)
    rows = make_rows(found)
    assert [row.score for row in rows] == [0.5, 1.0, 0.0, 0.25]
    assert [row.change for row in rows] == [0.0, 0.5, -0.5, -0.25]
    axes = score_axes(found, rows, 880, 320)
    assert (axes.ticks[0], axes.ticks[-1]) == (0.0, 1.0)


def test_scores_of_another_range_have_their_own_axis() -> None:
    found = with_estimates(90.0, -9.0, scores=(20.0, 60.0, 0.0, 80.0))
    assert [row.score for row in make_rows(found)] == [40.0, 80.0, 0.0]
    axes = score_axes(found, make_rows(found), 880, 320)
    assert (axes.ticks[0], axes.ticks[-1]) == (0.0, 80.0)


@given(st.lists(finite, min_size=1, max_size=6))
def test_no_point_leaves_the_figure(estimates: list[float]) -> None:
    found = with_estimates(*estimates)
    rows = make_rows(found)
    axes = score_axes(found, rows, 880, 320)
    assert all(axes.top <= axes.y(row.score) <= axes.height - axes.bottom for row in rows)
    assert all(axes.left <= axes.x(row.x) <= axes.width - axes.right for row in rows)


def test_the_effort_figure_counts_examples_by_round_and_fate() -> None:
    bars = effort_bars(result().trajectory.trials)
    assert bars == [Bar(4, 0), Bar(4, 2), Bar(4, 0)]
    axes = effort_axes(bars, 880, 180)
    assert (axes.num_rounds, axes.ticks) == (2, [0, 2, 4, 6])


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("Answer.", "Answer.", [Words("Answer.", "Answer.", True)]),
        ("Say the word.", "Say it.", [Words("Say", "Say", True), Words(" the word.", " it.")]),
        ("a b", "a\n\nb", [Words("a b", "a\n\nb", True)]),
        ("", "new", [Words("", "new")]),
        ("old", "", [Words("old", "")]),
    ],
)
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
    axes = Axes(1, [0, 10], width=80, height=150)  # 10 pixels a round, 10 pixels a unit
    assert axes.staircase([5, 5, 2]) == "M51.0 66.0 H61.0 V66.0 H71.0 V96.0"
    assert axes.staircase([5]) == "M51.0 66.0"


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


# -- the page ------------------------------------------------------------------------------------


def test_the_page_shows_what_the_run_found() -> None:
    found = Page(page(result()))
    for words in (
        "0.250 → 0.750 +0.500 mean score on the trainset",
        "Answer very well & briefly.",
        "Answer <b>badly</b>.",
        "1 × ValueError: <none> trainset[7], 1 candidate",
        "2 × duplicate",
        "The run found no better candidate for as many rounds as patience allows.",
        "3,000",
        "$0.0123",
        "1 min 15 s",
        "The run scored 14 train examples. Every candidate in full would have taken 16 (88%).",
        "capitals",
    ):
        assert words.replace(" ", "") in found.text.replace(" ", ""), words
    assert len([a for a in found.all("tr") if a.get("id")]) == 4
    links = {str(a["href"]) for a in found.all("a")}
    assert links == {f"#trial-{i}" for i in range(4)}


def test_headings_skip_no_level() -> None:
    student = trial("Answer.", [0.0])
    with_one_predictor = Trajectory().add(student, trial("Answer well.", [1.0], 1, parent=student.candidate))
    for run in (result(), result(trajectory=with_one_predictor, curve=(0.0, 1.0))):
        levels = [int(level) for level in re.findall(r"<h([1-6])", page(run))]
        assert levels[0] == 1
        assert all(after <= before + 1 for before, after in pairwise(levels)), levels


def test_what_a_run_without_candidates_saved_is_left_out() -> None:
    alone = result(trajectory=Trajectory().add(result().baseline), curve=(0.25,))
    assert "train examples. Every candidate" not in Page(page(alone)).text


def test_a_result_on_record_does_not_know_how_long_a_call_took() -> None:
    on_record = result(data=Examples(has_texts=False))
    assert "Recorded time1 min 15 s" in Page(page(on_record)).text
    assert "Wall time of this call1 min 15 s" in Page(page(result())).text


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


def test_the_demos_of_the_returned_program_are_shown() -> None:
    student = trial("Answer.", [0.0])
    demos = {
        "answer": json.dumps(
            [{"augmented": True, "question": "<b>2 + 2?</b>", "answer": 4}, {"question": "3?"}]
        )
    }
    candidate = replace(student.candidate, round=1, demo_set=2, demos=demos)
    found = result(trajectory=Trajectory().add(student, replace(student, candidate=candidate, reward=1.0)))
    text = Page(page(found)).text
    assert "shows demos to the LM: demo set 2." in text
    assert "2 demos" in text
    assert "<b>2 + 2?</b>" in text
    assert "augmented" not in text
    assert "The returned program shows demos to the LM." in found.summary()
    assert "demos" not in Page(page(result())).text + result().summary()


def test_a_page_that_reloads_knows_the_demos_of_one_predictor_from_those_of_another() -> None:
    student = trial("Answer.", [0.0])
    demos = dict.fromkeys(("draft", "answer"), '[{"question": "3?"}]')
    candidate = replace(student.candidate, round=1, demo_set=2, demos=demos)
    found = result(trajectory=Trajectory().add(student, replace(student, candidate=candidate, reward=1.0)))
    details = [a.get("id") for a in Page(page(found)).all("details") if "id" in a]
    assert len(details) == len(set(details)) == 2


@pytest.mark.parametrize("reason", sorted(RESUMABLE | {"num_rounds", "patience", "stop_at_score"}))
def test_a_reason_after_which_a_run_can_go_on_has_words(reason: str) -> None:
    own = Page(page(result(stop_reason="my own reason"))).text
    assert "The run stopped for this reason: my own reason." in own
    known = Page(page(result(stop_reason=reason))).text
    assert "The run stopped for this reason" not in known
    assert f". ({reason})" in known


def test_the_winner_comes_first() -> None:
    found = Page(page(result(config={"prompt_model": "big-lm", "task_model": "small-lm"}))).text
    order = [
        "OPRO report",
        "mean score on",
        "Before",
        "After",
        "found no better candidate",
        "big-lm",
        "small-lm",
    ]
    order += ["Date of this page", "Scores", "Trials (4)", "Spending", "Settings"]
    assert sorted(order, key=found.index) == order


def test_the_page_tells_the_versions() -> None:
    found = page(result())
    versions = {package: metadata.version(package) for package in ("dspy", "optuna")}
    versions |= {"dspy_opro": dspy_opro.__version__, "python": platform.python_version()}
    for name, version in versions.items():
        assert f"<dt>{name}</dt><dd>{version}</dd>" in found


def test_where_the_student_wins_the_page_says_so() -> None:
    text = "No candidate has a better score than the student. The run returned the student."
    assert text in Page(page(with_estimates(0.75))).text
    assert text not in Page(page(result())).text


def rows_of(text: str) -> list[str]:
    """The trial table's rows as HTML, in their order."""
    return re.findall(r'<tr id="trial-.*?</tr>', text, re.DOTALL)


def numbers_of(text: str) -> list[int]:
    return [int(n) for n in re.findall(r'<tr id="trial-(\d+)"', text)]


def test_the_best_trial_is_on_top_and_estimates_come_last() -> None:
    assert numbers_of(page(result())) == [3, 2, 0, 1]
    assert numbers_of(page(with_estimates(0.125, 0.75))) == [0, 2, 1]


def test_the_valset_orders_the_trials_where_there_is_one() -> None:
    trials = result().trajectory.trials
    with_valset = (
        replace(trials[0], valset_score=0.5),
        trials[1],
        replace(trials[2], valset_score=0.75),
        trials[3],
    )
    assert numbers_of(page(result(trajectory=Trajectory(with_valset), selected_on="valset"))) == [2, 0, 3, 1]


def test_of_equal_valset_scores_the_returned_trial_comes_first() -> None:
    trials = [replace(t, valset_score=0.5) for t in result().trajectory.trials]
    found = result(trajectory=Trajectory(tuple(trials)), returned=trials[2].id, selected_on="valset")
    assert numbers_of(page(found))[:2] == [2, 3]


def interval(basis: str, low: float = -0.1) -> Gain:
    return Gain(low > 0, 0.2, Interval(0.25, low, 0.6, 0.95, 40, basis), 0.3, 0.55)  # type: ignore[arg-type]


def test_the_headline_is_the_gain_on_unseen_examples_where_there_are_some() -> None:
    found = Page(page(result(gain=interval("fresh", 0.1)))).text
    assert "0.300 → 0.550 +0.250 mean score on 40 examples that the search never used" in found
    assert "With 95% confidence it lies between +0.100 and +0.600." in found
    assert "The search itself saw 0.250 → 0.750 on the trainset." in found


def test_a_curve_that_begins_with_the_best_program_on_record_does_not_change_the_students_score() -> None:
    resumed = {"curve": (0.5, 0.5, 0.75, 0.75)}  # round 0 scored the best program on record, too
    assert "0.250 → 0.750 +0.500 mean score on the trainset" in Page(page(result(**resumed))).text
    assert "The search itself saw 0.250 → 0.750" in Page(page(result(**resumed, gain=interval("fresh")))).text
    area, same = (
        re.search(r'd="[^"]* V([\d.]+) Z" class="area"', page(r)) for r in (result(**resumed), result())
    )
    assert area is not None and same is not None and area[1] == same[1]


def test_without_unseen_examples_the_gain_is_corrected() -> None:
    found = Page(page(result(gain=interval("selected", 0.1)))).text
    assert "0.250 → 0.750 +0.500 mean score on the trainset" in found
    assert "These examples also chose the result. Corrected for that, the gain is +0.250" in found


def test_a_candidate_that_is_equal_on_unseen_examples_is_returned_for_its_lead_in_the_search() -> None:
    equal = Gain(True, 0.0, Interval(0.0, -0.2, 0.2, 0.95, 40, "fresh"), 0.5, 0.5)
    found, reason = result(gain=equal), "returned for its lead in the search."
    assert f"The candidate equals the student on unseen examples. It is {reason}" in found.summary()
    assert f"It is {reason}" in Page(page(found)).text
    assert reason not in result(gain=interval("fresh", 0.1)).summary()


@pytest.mark.parametrize("basis", ["fresh", "selected"])
def test_a_gain_that_is_not_proven_is_no_success(basis: str) -> None:
    student = result().baseline.id
    found = page(result(gain=interval(basis), returned=student))
    assert "No instruction was reliably better than yours. The student is returned." in Page(found).text
    # The large number is the score of what the run returned.
    score, other = ("0.300", "0.550") if basis == "fresh" else ("0.250", "0.750")
    assert f"{score} the student mean score on" in Page(found).text
    assert f"The best candidate has {other} and is not returned." in Page(found).text
    assert "No candidate is reliably better than the student." in Page(found).text


@pytest.mark.parametrize(("low", "is_confirmed"), [(0.1, True), (-0.1, False)])
def test_a_valset_that_refutes_a_candidate_has_not_confirmed_it(low: float, is_confirmed: bool) -> None:
    returned = result().trials[3 if is_confirmed else 0].id
    found = result(gain=interval("fresh", low), returned=returned, config={"valset": 40})
    assert ("The valset confirmed the result." in Page(page(found)).text) == is_confirmed


def test_a_returned_candidate_whose_interval_includes_no_gain_is_explained() -> None:
    gain = Gain(True, 0.08, Interval(0.1, -0.05, 0.25, 0.95, 40, "fresh"), 0.5, 0.6)
    found = result(gain=gain)
    for text in (found.summary(), Page(page(found)).text):
        assert "The interval includes no gain." in text
        assert "a gain is at least 75% probable." in text
        assert "Expected gain, corrected for this choice: +0.080." in text
    assert "includes no gain" not in result(gain=interval("fresh", 0.1)).summary()


# -- lineage -------------------------------------------------------------------------------------


def family() -> OPROResult:
    """Student -> one -> two, and a dropped child of one."""
    student = trial("a", [0.0, 0.0])
    one = trial("b", [0.0, 1.0], 1, parent=student.candidate)
    dropped = trial("c", [0.0], 2, "pruned", one.candidate)
    two = trial("d", [1.0, 1.0], 2, parent=one.candidate)
    return result(trajectory=Trajectory().add(student, one, dropped, two), curve=(0.0, 0.5, 1.0))


def test_the_way_to_the_returned_candidate_is_told_step_by_step() -> None:
    rows = make_rows(family())
    assert [row.number for row in ancestry(rows)] == [0, 1, 3]
    text = page(family())
    steps = Page(text.partition('<ol class="steps">')[2].partition("</ol>")[0])
    assert [a["href"] for a in steps.all("a")] == ["#trial-0", "#trial-1", "#trial-3"]
    assert "round 2: what changed in answer" in steps.text
    assert len(steps.all("del")) == len(steps.all("ins")) == 2


def test_lines_lead_from_parents_to_children_and_the_best_is_on_top() -> None:
    tree = lineage(make_rows(family()), 880)
    assert [leads for _, leads in tree.curves] == [False, True, True]
    (x, y), (x2, y2) = tree.places[3], tree.places[2]
    assert x == x2 and y < y2
    assert tree.places[0][0] < tree.places[1][0] < x
    assert all(path.startswith("M") for path, _ in tree.curves)
    assert "<title>trial 2: 0.000, estimate from 1 example. why c</title>" in page(family())


def test_of_very_many_trials_the_lineage_shows_those_that_count() -> None:
    student = trial("a", [0.0, 0.0])
    dropped = [trial(f"b{i}", [0.0], 1, "pruned", student.candidate) for i in range(400)]
    best = trial("c", [1.0, 1.0], 1, parent=student.candidate)
    found = result(trajectory=Trajectory().add(student, *dropped, best), curve=(0.0, 1.0))
    assert len(lineage(make_rows(found), 880).rows) == 2
    assert "the figure shows those that were scored in full" in Page(page(found)).text


def test_subscores_have_columns_that_sort() -> None:
    student, *others = result().trajectory.trials
    trials = (replace(student, subscores={"brief": 0.125, "x<y": 1.0}), *others)
    text = page(result(trajectory=Trajectory(trials)))
    assert re.findall(r'data-first="descending"><button type="button">(.*?)<', text)[-2:] == [
        "brief",
        "x&lt;y",
    ]
    (row,) = (r for r in rows_of(text) if 'id="trial-0"' in r)
    assert 'data-name="brief" data-value="0.125">0.125' in row


def test_a_program_of_two_predictors_has_a_column_for_each() -> None:
    row = Page(next(r for r in rows_of(page(result())) if 'id="trial-3"' in r))
    assert row.text.index("draft unchanged") < row.text.index("answer Answer very well & briefly.")


def test_an_estimate_is_marked_as_one() -> None:
    text = page(with_estimates(0.7125))
    measured, dropped = (Page(row) for row in rows_of(text))
    assert "≈ 0.713 (2 examples)" in dropped.text and "≈ +0.213" in dropped.text
    assert "≈" not in measured.text
    assert text.count("<title>trial 1: 0.713, estimate from 2 examples</title>") == 2  # wide and narrow
    assert text.count("<title>trial 0: 0.500</title>") == 2


def test_a_row_has_whole_texts_its_parent_and_why_it_was_dropped() -> None:
    long = "Say why. " * 200 + "End."
    student = trial("Answer.", [0.0, 1.0])
    dropped = replace(trial(long, [0.0], 1, "pruned", student.candidate), reason="ranked 7 of 8")
    text = page(result(trajectory=Trajectory().add(student, dropped), curve=(0.5, 0.5)))
    row = Page(rows_of(text)[1])
    assert long in row.text
    assert "answer (new)" in row.text and "draft (unchanged)" in row.text and "Think." in row.text
    assert "Parent: trial 0. The run dropped this candidate: ranked 7 of 8." in row.text
    assert [a["href"] for a in row.all("a")] == ["#trial-0"]
    assert row.text.count("Copy") == 2
    assert "Parent" not in Page(rows_of(text)[0]).text


@pytest.mark.parametrize(
    ("usage", "cost"),
    [
        (Usage(14, 20, 6, 2, 3000, 400, 0.0, 26), "unknown"),
        (Usage(14, 20, 6, 2, 3000, 400, 0.0), "$0.0000"),  # of free LMs
        (Usage(14, 20, 6, 2, 3000, 400, 0.25), "$0.2500"),
        (Usage(14, 20, 6, 2, 3000, 400, 0.25, 6), "at least $0.2500"),
        (Usage(14, 0, 0, 26), "$0.0000"),  # all of it from the cache
    ],
)
def test_an_unknown_price_is_not_zero(usage: Usage, cost: str) -> None:
    text = page(result(usage=usage))
    assert f"<li><b>{cost}</b><span>cost</span></li>" in text
    calls = " (6 calls without a known price)" if cost.startswith("at least") else ""
    assert f"<dt>Cost</dt><dd>{cost}{calls}</dd>" in text


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
        ("level0", ["card"], 3.0),  # what is not solved
        ("level0", ["level4"], 3.0),  # from what is solved, whatever the eye makes of orange and blue
        ("accent", ["card"], 4.5),
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


def full_of(text: str) -> str:
    """A page with the text in every place that takes one."""
    start = trial("Answer.", [0.0, 0.0])
    new = replace(trial("x", [1.0, 1.0], 1, parent=start.candidate), reason=text)
    new = replace(new, candidate=replace(new.candidate, instructions={"draft": "Think.", "answer": text}))
    return page(
        result(
            trajectory=Trajectory().add(start, new),
            curve=(0.0, 1.0),
            stop_reason="x" + text,  # not one of the known reasons
            failures=(Failure(new.id, "train", 0, text),),
            config={"key" + text: text, "name": text, "prompt_model": text, "description": text},
            study_name="x" + text,
            problems=(text,),
        )
    )


@settings(max_examples=50, deadline=None)
@given(
    st.text(min_size=1).filter(str.strip) | st.sampled_from([EVIL, "{{ 7 * 7 }}", "{% raw %}", "<!--", "]]>"])
)
def test_whatever_a_model_writes_stays_text(text: str) -> None:
    # Where words are new depends on the text; all else of the page is the same as with a harmless one.
    found, harmless = (Page(full_of(t)) for t in (text, "harmless"))
    shapes = [
        [(name, sorted(a)) for name, a in one.elements if name not in ("ins", "del")]
        for one in (found, harmless)
    ]
    assert shapes[0] == shapes[1]
    everything = "".join(found.texts)
    assert everything.count(text) >= 9
    assert text in {a.get("title") for a in found.all("span")}


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
