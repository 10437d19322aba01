"""A run as one HTML page: its figures as plain data. `report.html.jinja` has the words and the layout."""

from __future__ import annotations

import base64
import difflib
import hashlib
import json
import math
import os
import platform
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib import metadata
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined

from dspy_opro.search.tasks import Failure
from dspy_opro.search.trajectory import Candidate, Trial

from .heat_map import compared, heat_maps, rectangles
from .result import NOT_ENDED, OPROResult, cost, counted

if TYPE_CHECKING:
    from .live import Live


MOST_SUBSCORES = 4
"""Columns for subscores."""


@dataclass(frozen=True)
class Row:
    """One trial: a row of the table and a point of the score figure."""

    number: int
    x: float
    """The round of the trial, less than half a round to the left or right: the trials of a round lie side by side."""
    trial: Trial
    kind: str
    """ "returned", "student", or the state of the trial."""
    score: float
    """An estimate is cut to the range of the scores in the run."""
    change: float
    """The score minus the student's score."""
    parent: Row | None

    @property
    def is_measured(self) -> bool:
        return self.trial.state == "complete"

    @property
    def order(self) -> tuple[float, bool, float, bool]:
        """The best row is the lowest: by valset score if there is one, full scores before estimates, by score.

        Of equal valset scores the returned row is the best.
        """
        valset, is_returned = self.trial.valset_score, self.kind == "returned"
        if valset is None:
            return math.inf, not self.is_measured, -self.score, not is_returned
        return -valset, not is_returned, -self.score, False


def make_rows(result: OPROResult) -> list[Row]:
    """The trials in the order of the search."""
    trials = result.trajectory.trials
    sizes, places = Counter(t.candidate.round for t in trials), Counter[int]()
    rows: list[Row] = []
    by_id: dict[str, Row] = {}
    for number, trial in enumerate(trials):
        round_ = trial.candidate.round
        places[round_] += 1
        row = Row(
            number=number,
            x=round_ + 0.7 * (places[round_] / (sizes[round_] + 1) - 0.5),
            trial=trial,
            kind="returned" if trial.id == result.best.id else trial.state if number else "student",
            score=(score := result.reward_of(trial)),
            change=score - result.baseline.reward,
            parent=by_id.get(trial.candidate.parent or ""),
        )
        rows.append(row)
        by_id.setdefault(trial.id, row)
    return rows


@dataclass(frozen=True)
class Axes:
    """A plane of rounds against values, in pixels."""

    num_rounds: int
    ticks: Sequence[float]
    """The marked values, ascending. The first and the last are the ends of the axis."""
    width: int
    height: int
    left, right, top, bottom = 46, 14, 16, 34  # margins

    def x(self, round_: float) -> float:
        step = (self.width - self.left - self.right) / (self.num_rounds + 1)
        return round(self.left + step * (round_ + 0.5), 1)

    def y(self, value: float) -> float:
        share = (value - self.ticks[0]) / (self.ticks[-1] - self.ticks[0])
        return round(self.height - self.bottom - (self.height - self.top - self.bottom) * share, 1)

    def rounds(self) -> range:
        """The rounds whose number is shown: there is room for each of them."""
        room = (self.num_rounds + 1) * 34 / self.width
        return range(0, self.num_rounds + 1, next(n for n in (1, 2, 5, 10, 20, 50, 100, 10**9) if n >= room))

    def staircase(self, values: Iterable[float]) -> str:
        """A path that keeps the value of each round until the next round."""
        first, *rest = ((self.x(r), self.y(value)) for r, value in enumerate(values))
        return " ".join([f"M{first[0]} {first[1]}", *(f"H{x} V{y}" for x, y in rest)])


def score_axes(result: OPROResult, rows: Sequence[Row], width: int, height: int) -> Axes:
    """Axes for the best score after each round and the score of every trial."""
    scores = [*result.curve, *(row.score for row in rows)]
    num_rounds = max(len(result.curve) - 1, *(row.trial.candidate.round for row in rows))
    return Axes(num_rounds, ticks(min(scores), max(scores)), width, height)


@dataclass(frozen=True)
class Bar:
    """Train examples scored in one round, for candidates that were scored in full and for dropped ones."""

    complete: int
    dropped: int


@dataclass(frozen=True)
class Lineage:
    """A column of candidates for each round, the best on top, and curves from parents to children."""

    rows: Sequence[Row]
    height: float
    places: Mapping[int, tuple[float, float]]
    """Number of a row -> its place in pixels."""
    curves: Sequence[tuple[str, bool]]
    """The path from a parent to its child, and whether it leads to the returned trial. Those that do come last."""
    axes: Axes


MOST_DRAWN = 300
"""Of more trials, the lineage shows only those that are scored in full or have children."""


def lineage(rows: Sequence[Row], width: int) -> Lineage:
    if len(rows) > MOST_DRAWN:
        parents = {row.parent.number for row in rows if row.parent is not None}
        rows = [row for row in rows if row.is_measured or row.number in parents]
    num_rounds = max(row.trial.candidate.round for row in rows)
    most = max(Counter(row.trial.candidate.round for row in rows).values())
    step = min(22.0, max(9.0, 400 / most))
    axes = Axes(num_rounds, (0, 1), width, round(most * step) + 50)
    places, used = dict[int, tuple[float, float]](), Counter[int]()
    for row in sorted(rows, key=lambda row: row.order):
        round_ = row.trial.candidate.round
        places[row.number] = axes.x(round_), round(axes.top + (used[round_] + 0.5) * step, 1)
        used[round_] += 1
    winners = {row.number for row in ancestry(rows)}
    curves = []
    for row in rows:
        if row.parent is not None:
            (x, y), (x2, y2) = places[row.parent.number], places[row.number]
            middle = round((x + x2) / 2, 1)
            curves.append((f"M{x} {y}C{middle} {y} {middle} {y2} {x2} {y2}", row.number in winners))
    return Lineage(rows, axes.height, places, sorted(curves, key=lambda curve: curve[1]), axes)


def ancestry(rows: Sequence[Row]) -> list[Row]:
    """The student, and the candidates that led to the returned one, in order."""
    row = next((row for row in rows if row.kind == "returned"), None)
    found: list[Row] = []
    while row is not None and row not in found:
        found.insert(0, row)
        row = row.parent
    return found


def effort_bars(trials: Sequence[Trial]) -> list[Bar]:
    """A bar for every round, from round 0."""
    scored: Counter[tuple[int, bool]] = Counter()
    for trial in trials:
        scored[trial.candidate.round, trial.state == "complete"] += trial.num_scored
    num_rounds = max(t.candidate.round for t in trials)
    return [Bar(scored[r, True], scored[r, False]) for r in range(num_rounds + 1)]


def effort_axes(bars: Sequence[Bar], width: int, height: int) -> Axes:
    highest = max(bar.complete + bar.dropped for bar in bars)
    return Axes(len(bars) - 1, ticks(0, highest, 3), width, height)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers that enclose `low` and `high`. If the two are equal they enclose 0 and 1, too."""
    if high - low <= max(1e-9 * abs(low), 1e-9 * abs(high), 1e-9):
        low, high = min(low, 0.0), max(high, 1.0)
    span = high - low
    magnitude = 10.0 ** math.floor(math.log10(span / count))
    step = next(s * magnitude for s in (1, 2, 2.5, 5, 10) if s * magnitude * count >= span * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


@dataclass(frozen=True)
class Words:
    """A run of words in the old and in the new text, with the white space before each word."""

    before: str
    after: str
    is_same: bool = False


def demos_of(candidate: Candidate, predictor: str) -> list[dict[str, str]]:
    """The predictor's demos, each as field -> text; none where only the number of the set is known."""
    demos = json.loads((candidate.demos or {}).get(predictor, "[]"))
    return [
        {
            name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            for name, value in demo.items() if name != "augmented"  # DSPy's mark of a bootstrapped demo
        }
        for demo in demos
    ]  # fmt: skip


def word_diff(before: str, after: str) -> list[Words]:
    """The two texts as runs of words in reading order.

    A difference in white space alone is not a change: line breaks move when a model rewrites a text.
    """
    old, new = (re.findall(r"\s*\S+", text) for text in (before, after))
    bare_old, bare_new = ([word.strip() for word in words] for words in (old, new))
    matcher = difflib.SequenceMatcher(None, bare_old, bare_new, autojunk=False)
    return [
        Words("".join(old[i:j]), "".join(new[k:m]), kind == "equal")
        for kind, i, j, k, m in matcher.get_opcodes()
    ]


@dataclass(frozen=True)
class Cause:
    """Failed examples with the same error."""

    error: str
    count: int
    num_candidates: int
    examples: Mapping[str, Sequence[int]]
    """Split -> indices into the user's dataset."""


def causes(failures: Sequence[Failure]) -> list[Cause]:
    """The failures grouped by error, the most frequent error first."""
    found = []
    for error, count in Counter(f.error for f in failures).most_common():
        mine = [f for f in failures if f.error == error]
        splits = sorted({f.split for f in mine})
        examples = {s: sorted({f.example for f in mine if f.split == s}) for s in splits}
        found.append(Cause(error, count, len({f.candidate for f in mine}), examples))
    return found


def number(value: float) -> str:
    """A score with three decimals, from 100 on with one."""
    text = f"{value:.3f}" if abs(value) < 100 else f"{value:,.1f}"
    return text.replace("-0.000", "0.000").replace("-", "\N{MINUS SIGN}")


def signed(value: float) -> str:
    """A difference with its sign. 0 has none."""
    text = number(value)
    return f"+{text}" if value > 0 and text != "0.000" else text


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


TEMPLATES = Environment(
    loader=PackageLoader(__package__, ""),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.filters |= {"number": number, "signed": signed, "duration": duration}
TEMPLATES.filters |= {"counted": counted, "cost": cost}
TEMPLATES.globals |= {"score_axes": score_axes, "effort_axes": effort_axes, "effort_bars": effort_bars}
TEMPLATES.globals |= {"word_diff": word_diff, "causes": causes, "compared": compared, "demos_of": demos_of}
TEMPLATES.globals |= {
    "NOT_ENDED": NOT_ENDED,
    "lineage": lineage,
    "ancestry": ancestry,
    "rectangles": rectangles,
}


def page(result: OPROResult, live: Live | None = None) -> str:
    """The page as text. That of a run that is under way, which `live` describes, reloads itself."""
    from dspy_opro import __version__  # `dspy_opro/__init__.py` imports this folder

    style, script = ((files(__package__) / f"report.{kind}").read_text("utf-8") for kind in ("css", "js"))
    versions = {name: metadata.version(name) for name in ("dspy", "optuna")}
    rows, now = make_rows(result) if result.curve else [], datetime.now().astimezone()
    ranked = sorted(rows, key=lambda row: row.order)
    return TEMPLATES.get_template("report.html.jinja").render(
        result=result,
        live=live,
        rows=rows,
        ranked=ranked,
        maps=heat_maps(result, [row.number for row in ranked]) if rows else [],
        subscores=sorted({name for row in rows for name in row.trial.subscores})[:MOST_SUBSCORES],
        problems=Counter(result.problems).most_common(20),
        written=f"{now:%Y-%m-%d %H:%M:%S %Z}" if live else f"{now:%Y-%m-%d %H:%M %Z}",
        moment=now.timestamp(),
        versions={"dspy_opro": __version__, **versions, "python": platform.python_version()},
        style=style,
        script=script,
        # The browser runs only this script and loads nothing, whatever a model has written into the texts.
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def write_report(result: OPROResult, path: str | os.PathLike[str], live: Live | None = None) -> None:
    """Write the page, and make the directories on the way to the file."""
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    # The data may contain half of a surrogate pair, which UTF-8 can't encode.
    file.write_text(page(result, live), encoding="utf-8", errors="replace")
