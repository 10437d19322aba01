"""Tables and a plot of the runs that `quality.py` stored.

One rule: an interval covers both the draw of the test examples and the draw of the seeds.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

Row = Mapping[str, Any]
Group = dict[str, list[Row]]
"""Optimizer -> its runs of one model on one task, by seed."""
STUDENT, OURS, OURS_WITH_DEMOS = "student", "OPRO", "OPRO, demos"


def report(rows: Iterable[Row]) -> str:
    """For each model: the gains on all tasks, and one table a task."""
    parts = []
    for models, by_task in grouped(rows).items():
        parts.append(f"## {models}\n")
        parts.append(overview(by_task))
        for task, group in by_task.items():
            parts.append(f"\n### {task}\n\n{task_table(group)}")
    return "\n".join(parts) or "The store is empty."


def grouped(rows: Iterable[Row]) -> dict[str, dict[str, Group]]:
    """Models and budget -> task -> optimizer -> runs."""
    found: dict[str, dict[str, Group]] = {}
    for row in rows:
        title = f"{row['model']}, optimizer LM {row['prompt_model']}, {row['budget']} scored examples"
        found.setdefault(title, {}).setdefault(row["task"], {}).setdefault(row["optimizer"], []).append(row)
    return found


def scores(row: Row) -> list[float]:
    """The test scores; an answer that can't be parsed has the score 0."""
    return [score or 0.0 for score in row["test"]]


def finished(runs: Iterable[Row]) -> list[Row]:
    return [row for row in runs if "error" not in row]


def gains(group: Group, optimizer: str, over: str = STUDENT) -> list[list[float]]:
    """Seed by seed, the difference of each test example to another optimizer with the same seed.

    The student does not depend on the seed, so its first run stands for seeds without one. If another machine made the
    runs of a seed, the student answers differently there.
    """
    others = {row["seed"]: scores(row) for row in finished(group.get(over, ()))}
    if over == STUDENT and others:
        first = next(iter(others.values()))
        others = {row["seed"]: others.get(row["seed"], first) for row in group.get(optimizer, ())}
    return [
        [a - b for a, b in zip(scores(row), others[row["seed"]], strict=True)]
        for row in finished(group.get(optimizer, ()))
        if row["seed"] in others
    ]


def interval(*tasks: Sequence[Sequence[float]], resamples: int = 1000) -> tuple[float, float]:
    """95% bootstrap interval of the mean over tasks; each task's seeds and test examples are drawn anew."""
    draws, means = random.Random(0), []
    for _ in range(resamples):
        drawn_means = []
        for differences in tasks:
            examples = range(len(differences[0]))
            seeds = draws.choices(differences, k=len(differences))
            drawn = draws.choices(examples, k=len(examples))
            drawn_means.append(statistics.fmean(statistics.fmean(seed[i] for i in drawn) for seed in seeds))
        means.append(statistics.fmean(drawn_means))
    means.sort()
    return means[int(0.025 * resamples)], means[int(0.975 * resamples) - 1]


def overview(by_task: Mapping[str, Group]) -> str:
    """One line a task with the gains over the student in points, and their mean where an optimizer has all tasks."""
    names = [n for n in dict.fromkeys(n for group in by_task.values() for n in group) if n != STUDENT]
    lines = [["task: majority, student", *names], ["---"] * (1 + len(names))]
    for task, group in by_task.items():
        done = finished(group.get(STUDENT, ()))
        score = f"{statistics.fmean(statistics.fmean(scores(row)) for row in done):.3f}" if done else "–"
        majority = next((f"{r['majority']:.3f}" for runs in group.values() for r in finished(runs)), "–")
        lines.append([f"{task}: {majority}, {score}", *(_cell(group, name) for name in names)])
    complete = {
        name: [_with_failed(group, name) for group in by_task.values()]
        for name in names if all(gains(group, name) for group in by_task.values())
    }  # fmt: skip
    lines.append([f"mean of {len(by_task)}, a failed run counts 0",
                  *(_points(*complete[name]) if name in complete else "" for name in names)])  # fmt: skip
    for ours, title in ((OURS, "OPRO"), (OURS_WITH_DEMOS, "OPRO with demos")):
        if ours in names:
            lines.append([f"lead of {title}", *(_lead(by_task, ours, name) for name in names)])
            wins = (_wins(by_task, ours, name) for name in names)
            lines.append([f"tasks where {title} is better / equal / worse", *wins])
    lines.append(["runs worse than the student", *(_losses(by_task, name) for name in names)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _mean(differences: Sequence[Sequence[float]]) -> float:
    """The mean over seeds and test examples."""
    return statistics.fmean(map(statistics.fmean, differences))


def _points(*tasks: Sequence[Sequence[float]]) -> str:
    """The mean over tasks in points, and its interval."""
    low, high = interval(*tasks)
    return f"{100 * statistics.fmean(map(_mean, tasks)):+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def _cell(group: Group, name: str) -> str:
    """The gain on one task, and how many runs failed."""
    runs, differences = group.get(name, ()), gains(group, name)
    failed = len(runs) - len(finished(runs))
    parts = [_points(differences)] if differences else []
    return ", ".join(parts + ([f"{failed} of {len(runs)} failed"] if failed else []))


def _with_failed(group: Group, name: str) -> list[list[float]]:
    """The gains, and none for a run that failed: its user has the student."""
    found = gains(group, name)
    failed = len(group[name]) - len(finished(group[name]))
    return found + [[0.0] * len(found[0])] * failed


def _lead(by_task: Mapping[str, Group], ours: str, name: str) -> str:
    """By how much the mean of `ours` over the tasks is higher, over the seeds that both have on every task."""
    leads = [gains(group, ours, name) for group in by_task.values()]
    return _points(*leads) if name != ours and all(leads) else ""


def _wins(by_task: Mapping[str, Group], ours: str, name: str) -> str:
    """On how many tasks the mean of `ours` is better, equal and worse, over the seeds that both have."""
    leads = [_mean(seeds) for group in by_task.values() if (seeds := gains(group, ours, name))]
    return _counts(leads) if name != ours else ""


def _losses(by_task: Mapping[str, Group], name: str) -> str:
    """How many runs returned a program with a lower test score than the student's, and the largest loss in points."""
    by_run = [statistics.fmean(seed) for group in by_task.values() for seed in gains(group, name)]
    losses = [-gain for gain in by_run if gain < 0]
    most = f", by up to {100 * max(losses):.1f}" if losses else ""
    return f"{len(losses)} of {len(by_run)}{most}"


def _counts(differences: Sequence[float]) -> str:
    """How many are better, equal and worse."""
    signs = (
        sum(d > 0 for d in differences),
        sum(d == 0 for d in differences),
        sum(d < 0 for d in differences),
    )
    return " / ".join(map(str, signs))


def task_table(group: Group) -> str:
    """One line for each optimizer."""
    titles = ("optimizer", "seeds", "test score", "gain over the student", "better / equal / worse", "well-formed",
              "scored examples", "scorer calls", "proposer calls", "failed")  # fmt: skip
    lines = [titles, ("---",) * len(titles)]
    for optimizer, runs in group.items():
        done = finished(runs)
        failed = str(len(runs) - len(done))
        if not done:
            lines.append((optimizer, "0", *["–"] * (len(titles) - 3), failed))
            continue
        numbers = [
            f"{statistics.fmean(row[key] for row in done):.0f}"
            for key in ("scored", "scorer_calls", "proposer_calls")
        ]
        formed = statistics.fmean(score is not None for row in done for score in row["test"])
        mean = statistics.fmean(statistics.fmean(scores(row)) for row in done)
        lines.append(
            (
                optimizer,
                str(len(done)),
                f"{mean:.3f}",
                *_gain(group, optimizer),
                f"{formed:.0%}",
                *numbers,
                failed,
            )
        )
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    majority = next((row["majority"] for runs in group.values() for row in finished(runs)), None)
    return table if majority is None else f"The most frequent answer scores {majority:.3f}.\n\n{table}"


def _gain(group: Group, optimizer: str) -> tuple[str, str]:
    """The mean gain in points with its interval, and in how many seeds the optimizer is better than the student."""
    differences = gains(group, optimizer)
    if optimizer == STUDENT or not differences:
        return "", ""
    return _points(differences), _counts([statistics.fmean(seed) for seed in differences])


def plot(rows: Iterable[Row], width: int = 720) -> str:
    """An SVG picture: one line for each task and optimizer, with the gain over the student and its interval."""
    drawn: list[tuple[str, str, float, float, float]] = []
    for models, by_task in grouped(rows).items():
        for task, group in by_task.items():
            title = f"{task}, {models.partition(',')[0]}"
            drawn.extend(
                (title, name, 100 * _mean(differences), *(100 * x for x in interval(differences)))
                for name in group
                if name != STUDENT and (differences := gains(group, name))
            )
    low, high = (min((d[3] for d in drawn), default=0) - 2, max((d[4] for d in drawn), default=0) + 2)
    low, high = min(low, -5), max(high, 5)

    def x(points: float) -> float:
        return 190 + (points - low) / (high - low) * (width - 210)

    parts, y, last = [], 34, ""
    for title, name, mean, least, most in drawn:
        if title != last:
            y, last = y + 16, title
            parts.append(f'<text x="8" y="{y}" font-weight="bold">{escape(title)}</text>')
            y += 20
        colour = "#3949ab" if name.startswith(OURS) else "#757575"
        parts.append(f'<text x="180" y="{y + 4}" text-anchor="end">{escape(name)}</text>')
        parts.append(
            f'<line x1="{x(least):.1f}" x2="{x(most):.1f}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="2"/>'
        )
        parts.append(f'<circle cx="{x(mean):.1f}" cy="{y}" r="4" fill="{colour}"/>')
        y += 18
    step = 5 if high - low < 50 else 10
    ticks = [t for t in range(-100, 101, step) if low <= t <= high]
    axis = "".join(
        f'<line x1="{x(t):.1f}" x2="{x(t):.1f}" y1="26" y2="{y}" stroke="{"#000" if t == 0 else "#ddd"}"/>'
        f'<text x="{x(t):.1f}" y="20" text-anchor="middle">{f"{t:+d}" if t else 0}</text>'
        for t in ticks
    )
    size = f'viewBox="0 0 {width} {y + 10}" width="{width}" height="{y + 10}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">'
        f'<rect width="100%" height="100%" fill="#fff"/><text x="8" y="20">points over the student</text>{axis}'
        + "".join(parts) + "</svg>\n"
    )  # fmt: skip
