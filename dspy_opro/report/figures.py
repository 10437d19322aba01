"""What the page's figures show, as plain values; how they look is decided elsewhere."""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from dspy_opro.result import OPROResult
from dspy_opro.work import Failure

Change = Literal["same", "removed", "added"]


@dataclass(frozen=True)
class Point:
    """One trial in the score figure."""

    number: int
    x: float
    """Its round; the trials of one round lie side by side, less than half a round from it."""
    score: float
    state: str
    is_best: bool
    label: str


@dataclass(frozen=True)
class ScoreFigure:
    """Best score by round, and every trial."""

    curve: Sequence[float]
    """Best score after each round, from round 0."""
    points: Sequence[Point]
    num_rounds: int
    low: float
    high: float
    """The scores on the axis lie within these two."""


def score_figure(result: OPROResult) -> ScoreFigure:
    """The score figure's data; needs at least one trial."""
    trials = result.trajectory.trials
    best = result.best.id
    points = []
    for round_, group in groupby(enumerate(trials), key=lambda item: item[1].candidate.round):
        members = list(group)
        for place, (number, trial) in enumerate(members, start=1):
            x = round_ + 0.7 * (place / (len(members) + 1) - 0.5)
            label = f"trial {number}: {trial.reward:.3f}, {trial.state} after {trial.num_scored} examples"
            points.append(Point(number, x, trial.reward, trial.state, trial.id == best, label))
    scores = [*result.curve, *(p.score for p in points)]
    num_rounds = max(len(result.curve) - 1, max(t.candidate.round for t in trials))
    return ScoreFigure(result.curve, points, num_rounds, min(scores), max(scores))


@dataclass(frozen=True)
class EffortFigure:
    """Train examples scored by round."""

    complete: Sequence[int]
    """By round: on candidates that were scored in full."""
    pruned: Sequence[int]
    """By round: on candidates that were dropped."""
    num_full: int
    """Examples it would have taken to score every candidate in full."""

    @property
    def num_scored(self) -> int:
        return sum(self.complete) + sum(self.pruned)


def effort_figure(result: OPROResult) -> EffortFigure:
    """The effort figure's data; needs at least one trial."""
    trials = result.trajectory.trials
    num_rounds = max(t.candidate.round for t in trials)
    scored: Counter[tuple[int, bool]] = Counter()
    for trial in trials:
        scored[trial.candidate.round, trial.state == "complete"] += trial.num_scored
    rounds = range(num_rounds + 1)
    return EffortFigure(
        complete=[scored[r, True] for r in rounds],
        pruned=[scored[r, False] for r in rounds],
        num_full=len(trials) * result.baseline.num_scored,
    )


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers that enclose `low` to `high`, and 0 to 1 too where the two are one."""
    if high - low <= max(1e-9 * abs(low), 1e-9 * abs(high), 1e-9):
        low, high = min(low, 0.0), max(high, 1.0)
    span = high - low
    magnitude = 10.0 ** math.floor(math.log10(span / count))
    step = next(s * magnitude for s in (1, 2, 2.5, 5, 10) if s * magnitude * count >= span * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


@dataclass(frozen=True)
class Words:
    """A run of words that stay, go or come; white space stands before its word."""

    change: Change
    before: str = ""
    """As the old text has them."""
    after: str = ""
    """As the new text has them."""


def word_diff(before: str, after: str) -> list[Words]:
    """The two texts as runs of words in reading order.

    White space alone is no change: line breaks move when a model rewrites a text.
    """
    old, new = (re.findall(r"\s*\S+", text) for text in (before, after))
    matcher = difflib.SequenceMatcher(
        None, [w.strip() for w in old], [w.strip() for w in new], autojunk=False
    )
    runs = []
    for kind, i, j, k, m in matcher.get_opcodes():
        gone, come = "".join(old[i:j]), "".join(new[k:m])
        if kind == "equal":
            runs.append(Words("same", gone, come))
            continue
        if gone:
            runs.append(Words("removed", before=gone))
        if come:
            runs.append(Words("added", after=come))
    return runs


@dataclass(frozen=True)
class Cause:
    """Failed examples with the same error."""

    error: str
    count: int
    num_candidates: int
    examples: Mapping[str, Sequence[int]]
    """Split -> indices into the dataset as it was given."""


def causes(failures: Sequence[Failure]) -> list[Cause]:
    """Failures by their error, the most frequent first."""
    counts = Counter(f.error for f in failures)
    found = []
    for error, count in counts.most_common():
        mine = [f for f in failures if f.error == error]
        splits = {
            s: sorted({f.example for f in mine if f.split == s}) for s in sorted({f.split for f in mine})
        }
        found.append(Cause(error, count, len({f.candidate for f in mine}), splits))
    return found
