"""Runs as rows: kept as JSON lines, shown as Markdown.

One rule: a table is made of rows that were measured and kept; nothing in it was typed.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
Column = tuple[str, str, Callable[[float], str]]
"""Key of a row, title, format."""


def keep(path: str | None, row: Row) -> None:
    """Append a row, with the load of the machine: other work on its cores lowers what was measured."""
    if path is None:
        return
    with Path(path).open("a") as file:
        file.write(json.dumps({**row, "load": os.getloadavg()[0], "cores": os.cpu_count()}) + "\n")


def load(paths: Iterable[str]) -> list[Row]:
    """The rows of earlier runs."""
    return [json.loads(line) for path in paths for line in Path(path).read_text().splitlines()]


def table(rows: Iterable[Row], by: Sequence[str], columns: Sequence[Column]) -> str:
    """One line for each group of rows, in the order in which the groups appear: the mean of every column.

    Args:
        rows: What was measured.
        by: Keys whose values make a group.
        columns: What is shown of it; a `±` behind a title adds the standard error.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in by), []).append(row)
    lines = [[*by, "seeds", *(title for _, title, _ in columns)]]
    for values, group in groups.items():
        cells = [_cell([float(row[key]) for row in group], title, show) for key, title, show in columns]
        lines.append([*map(str, values), str(len(group)), *cells])
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(values: Sequence[float], title: str, show: Callable[[float], str]) -> str:
    average = show(statistics.fmean(values))
    if not title.endswith("±") or len(values) < 2:
        return average
    return f"{average} ± {show(statistics.stdev(values) / len(values) ** 0.5)}"
