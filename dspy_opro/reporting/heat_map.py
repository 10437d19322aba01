"""Examples against candidates: which examples the best candidate fixed or broke, and which nobody solves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from dspy_opro.search.tasks import Split
from dspy_opro.search.trajectory import Outcome, Trial

from .examples import ExampleText
from .result import OPROResult

T = TypeVar("T")

GROUPS = ("fixed", "broke", "never solved", "solved by others", "solved by both")
"""The figure shows the examples in this order."""
LEVELS = 5
"""Shades between the lowest and the highest score."""
MOST_EXAMPLES, MOST_CANDIDATES = 200, 24
"""The most examples of a split and the most candidates that are shown."""


@dataclass(frozen=True)
class Example:
    """One example that both compared trials were scored on: a column of the figure."""

    split: Split
    position: int
    group: str
    text: ExampleText
    score: float
    """The student's."""
    best_score: float
    """The best candidate's."""
    outcome: Outcome | None
    """The student's."""
    best_outcome: Outcome | None
    """The best candidate's."""


@dataclass(frozen=True)
class HeatMap:
    """The examples of one split, group by group, and the trials that were scored on them."""

    split: Split
    examples: Sequence[Example]
    counts: dict[str, int]
    """Group -> number of its examples, those that are not shown included."""
    trials: Sequence[tuple[int, Trial | None, Sequence[int | None]]]
    """Number of a trial, the trial and its level on each example: 0 is the lowest score, None is no score."""

    @property
    def groups(self) -> list[tuple[str, int, Sequence[Example]]]:
        """Each group that has examples: its name, the column of its first example, and the examples shown."""
        found: list[tuple[str, int, Sequence[Example]]] = []
        for name in self.counts:
            mine = [e for e in self.examples if e.group == name]
            if mine:
                found.append((name, self.examples.index(mine[0]), mine))
        return found

    def columns(self, width: float) -> list[tuple[float, float]]:
        """Left edge and width of each example's column. There is a gap between groups."""
        gap, size = 6.0, 0.0
        size = min(16.0, (width - gap * (len(self.groups) - 1)) / len(self.examples))
        names = [name for name, _, _ in self.groups]
        return [(i * size + gap * names.index(e.group), size) for i, e in enumerate(self.examples)]


def heat_maps(result: OPROResult, order: Sequence[int]) -> list[HeatMap]:
    """A map for each split with scores. `order` has the numbers of all trials, the best first."""
    return [found for split in ("train", "val", "unseen") if (found := _heat_map(result, order, split))]


def compared(result: OPROResult) -> Trial:
    """The trial that is compared with the student, as `result.gain` does. It need not be the returned trial.

    The run kept the outcomes of a trial that it confirmed, also if it returned another one.
    """
    student, best, returned = result.baseline, result.trajectory.best, result.best
    others = [t for t in (*result.trials, returned) if t.id != student.id]
    confirmed = [t for t in others if any(result.data.outcomes.get(t.id, {}).get("unseen", ()))]
    if confirmed or returned.id != student.id:
        return (confirmed or [returned])[-1]
    return next((t for t in others if t.id in result.data.outcomes and t.id != best.id), best)


def _heat_map(result: OPROResult, order: Sequence[int], split: Split) -> HeatMap | None:
    trials, best = result.trajectory.trials, compared(result)
    texts = result.data.texts.get(split, ())
    scores = {number: result.scores_of(trials[number], split) for number in order}
    number = next(i for i, trial in enumerate(trials) if trial.id == best.id)
    if not texts or not scores[0]:
        return None
    low, high = result.trajectory.score_range
    examples: list[Example] = []
    for position, text in enumerate(texts):
        mine, other = _at(scores[0], position), _at(scores[number], position)
        if mine is None or other is None:
            continue
        most = max(s for row in scores.values() if (s := _at(row, position)) is not None)
        group = _group(mine, other, most, low, high)
        outcomes = [
            _at(result.data.outcomes.get(t.id, {}).get(split, ()), position) for t in (trials[0], best)
        ]
        examples.append(Example(split, position, group, text, mine, other, outcomes[0], outcomes[1]))
    examples.sort(key=lambda e: GROUPS.index(e.group))
    counts = {name: n for name in GROUPS if (n := sum(e.group == name for e in examples))}
    if (total := len(examples)) > MOST_EXAMPLES:  # of every group the same share, and one at least
        groups = [[e for e in examples if e.group == name] for name in counts]
        examples = [e for group in groups for e in group[: max(1, len(group) * MOST_EXAMPLES // total)]]
    first = list(dict.fromkeys((0, number)))
    rows = [*first, *(n for n in order if n not in first and scores[n])][:MOST_CANDIDATES]
    levels = [(n, trials[n], [_level(_at(scores[n], e.position), low, high) for e in examples]) for n in rows]
    return HeatMap(split, examples, counts, levels) if examples else None


def _at(values: Sequence[T | None], position: int) -> T | None:
    return values[position] if position < len(values) else None


def _group(score: float, best_score: float, most: float, low: float, high: float) -> str:
    if score != best_score:
        return "fixed" if best_score > score else "broke"
    middle = (low + high) / 2
    if most < middle or most == 0 < high:
        return "never solved"
    return "solved by both" if score >= middle else "solved by others"


def _level(score: float | None, low: float, high: float) -> int | None:
    if score is None:
        return None
    return max(0, min(LEVELS - 1, round((LEVELS - 1) * (score - low) / (high - low or 1))))


def rectangles(
    levels: Sequence[int | None], columns: Sequence[tuple[float, float]], y: float, height: float
) -> Iterator[tuple[int, str]]:
    """The cells of one trial: each level with the path of its cells."""
    for level in range(LEVELS):
        cells = [column for column, mine in zip(columns, levels, strict=True) if mine == level]
        if cells:
            gap = 1 if columns[0][1] >= 4 else 0.3
            yield level, "".join(f"M{x:.4g} {y:g}h{w - gap:.3g}v{height:g}h-{w - gap:.3g}z" for x, w in cells)
