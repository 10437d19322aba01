"""Figures as inline SVG: sizes and marks only; colours and fonts come from the style sheet."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from .figures import EffortFigure, Point, ScoreFigure, ticks
from .markup import Html, Node, tag

LEFT, RIGHT, TOP, BOTTOM = 46, 14, 16, 34
"""Margins around the axes, in pixels."""


@dataclass(frozen=True)
class Axes:
    """A plane of rounds against values."""

    width: int
    height: int
    num_rounds: int
    marks: Sequence[float]
    """The marked values, ascending; the first and the last are the ends of the axis."""

    def x(self, round: float) -> float:
        """The pixel of a round; half a round of room on either side."""
        step = (self.width - LEFT - RIGHT) / (self.num_rounds + 1)
        return LEFT + step * (round + 0.5)

    def y(self, value: float) -> float:
        low, high = self.marks[0], self.marks[-1]
        return self.height - BOTTOM - (self.height - TOP - BOTTOM) * (value - low) / (high - low)


def draw_scores(figure: ScoreFigure, width: int, height: int) -> Html:
    """The best score as a staircase, every trial as a mark that leads to its row."""
    axes = Axes(width, height, figure.num_rounds, ticks(figure.low, figure.high))
    corners = [(axes.x(r), axes.y(score)) for r, score in enumerate(figure.curve)]
    line = staircase(corners)
    # What was gained: the area between the line and the student's own score.
    floor = f" V{corners[0][1]:.1f} Z" if corners else ""
    # The best one last, so that nothing lies on top of it.
    points = sorted(figure.points, key=lambda p: (p.is_best, p.state == "complete"))
    return _svg(
        axes,
        "Best score and all candidates by round",
        lambda value: f"{value:.10g}".replace("-", "\N{MINUS SIGN}"),
        tag("path", d=line + floor, class_="area") if floor else None,
        tag("path", d=line, class_="curve") if floor else None,
        [_mark(axes, point) for point in points],
    )


def staircase(corners: Sequence[tuple[float, float]]) -> str:
    """A path that holds each value until the next one's place."""
    steps = [f"M{x:.1f} {y:.1f}" if i == 0 else f"H{x:.1f} V{y:.1f}" for i, (x, y) in enumerate(corners)]
    return " ".join(steps)


def _mark(axes: Axes, point: Point) -> Html:
    x, y = axes.x(point.x), axes.y(point.score)
    kind = "best" if point.is_best else point.state
    radius = {"best": 6.0, "complete": 4.5}.get(kind, 3.2)
    mark = tag("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=radius, class_=f"point {kind}")
    return tag("a", tag("title", point.label), mark, href=f"#trial-{point.number}")


def draw_effort(figure: EffortFigure, width: int, height: int) -> Html:
    """Stacked bars: examples on candidates scored in full, and on top those on candidates dropped early."""
    totals = [a + b for a, b in zip(figure.complete, figure.pruned, strict=True)]
    axes = Axes(width, height, len(totals) - 1, ticks(0, max(totals), 3))
    thickness = min(34.0, 0.7 * (axes.x(1) - axes.x(0)))
    bars = []
    for round_, (complete, total) in enumerate(zip(figure.complete, totals, strict=True)):
        x = axes.x(round_) - thickness / 2
        label = f"round {round_}: {complete:,} on complete candidates, {total - complete:,} on dropped ones"
        bars.append(
            tag(
                "g",
                tag("title", label),
                _bar(axes, x, thickness, 0, complete, "complete"),
                _bar(axes, x, thickness, complete, total, "pruned"),
            )
        )
    return _svg(axes, "Examples scored by round", "{:,.0f}".format, bars)


def _bar(axes: Axes, x: float, width: float, low: float, high: float, kind: str) -> Html | None:
    if high <= low:
        return None
    top = axes.y(high)
    size = {"x": f"{x:.1f}", "y": f"{top:.1f}", "width": f"{width:.1f}", "height": f"{axes.y(low) - top:.1f}"}
    return tag("rect", **size, class_=f"bar {kind}")


def _svg(axes: Axes, title: str, number: Callable[[float], str], *content: Node) -> Html:
    return tag(
        "svg",
        list(_grid(axes, number)),
        *content,
        viewBox=f"0 0 {axes.width} {axes.height}",
        role="group",
        aria_label=title,
    )


def _grid(axes: Axes, number: Callable[[float], str]) -> Iterator[Html]:
    for value in axes.marks:
        y = f"{axes.y(value):.1f}"
        yield tag("line", x1=LEFT, x2=axes.width - RIGHT, y1=y, y2=y, class_="grid")
        yield tag("text", number(value), x=LEFT - 8, y=y, class_="tick value")
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100, 10**9) if (axes.num_rounds + 1) / n <= axes.width / 34)
    for round_ in range(0, axes.num_rounds + 1, every):
        yield tag("text", round_, x=f"{axes.x(round_):.1f}", y=axes.height - BOTTOM + 16, class_="tick round")
    yield tag("text", "round", x=axes.width - RIGHT, y=axes.height - 3, class_="tick name")
