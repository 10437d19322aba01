"""The figures of a result, with plotly."""

from __future__ import annotations

import textwrap
from html import escape

import plotly.graph_objects as go

from dspy_opro.search.trajectory import Trial

from .result import OPROResult, counted

SYMBOLS = {"scored in full": "circle", "dropped (estimate)": "circle-open", "returned": "star"}
"""Kind of a candidate -> its marker."""


def history(result: OPROResult) -> go.Figure:
    """The best score after each round, and every candidate."""
    best = go.Scatter(
        x=list(range(len(result.curve))),
        y=list(result.curve),
        mode="lines",
        line_shape="hv",
        name=f"best score on {result.deciding_data}",
    )
    data = ", train score" if result.selected_on == "valset" else ""
    figure = _figure([best, *_points(result, data)], "Best score after each round", "round", "mean score")
    return figure.update_xaxes(dtick=_step(result))


def lineage(result: OPROResult) -> go.Figure:
    """Every candidate by round and score, with a line to its parent."""
    by_id = {trial.id: trial for trial in reversed(result.trials)}  # the first one of each
    x: list[float | None] = []
    y: list[float | None] = []
    for trial in result.trials:
        parent = by_id.get(trial.candidate.parent or "")
        if parent is not None:
            x += [parent.candidate.round, trial.candidate.round, None]
            y += [result.reward_of(parent), result.reward_of(trial), None]
    lines = go.Scatter(
        x=x, y=y, mode="lines", line={"width": 1}, opacity=0.5, hoverinfo="skip", name="parent"
    )
    figure = _figure(
        [lines, *_points(result)], "Which candidate came from which", "round", "mean train score"
    )
    return figure.update_xaxes(dtick=_step(result))


def examples(result: OPROResult) -> go.Figure:
    """A heat map: the best candidate on top, dropped ones below, the hardest example on the right."""
    scored = (t for t in result.trials if t.num_scored)
    trials = sorted(scored, key=lambda t: (t.state == "complete", result.reward_of(t)))
    scores = [t.scores_by_position for t in trials]
    most = max((t.num_scored for t in trials), default=0)
    columns = [[row[i] for row in scores if i in row] for i in range(most)]
    order = sorted(range(most), key=lambda i: -sum(columns[i]) / len(columns[i]))
    rows = [[row.get(i) for i in order] for row in scores]
    texts = [_example(result, i) for i in order]
    low, high = result.trajectory.score_range
    numbers = {trial.id: number for number, trial in reversed(list(enumerate(result.trials)))}
    heat = go.Heatmap(
        z=rows,
        x=[name for name, _ in texts],
        y=[f"trial {numbers[t.id]}" for t in trials],
        zmin=low,
        zmax=high,
        colorscale="RdBu",
        colorbar_title="score",
        xgap=1,
        ygap=1,
        text=[[inputs for _, inputs in texts]] * len(rows),
        hovertemplate="%{y}, example %{x}: %{z}<br>%{text}<extra></extra>",
    )
    has_places = result.data.has_texts and "train" in result.data.texts
    where = "place in the trainset" if has_places else "position in the run's order"
    figure = _figure([heat], "Scores by candidate and train example", where, "")
    figure.update_layout(height=max(360, 180 + 15 * len(trials)), plot_bgcolor="#d9d9d9")  # grey: not scored
    figure.update_xaxes(type="category", showgrid=False, dtick=max(1, most // 40))
    return figure.update_yaxes(type="category", showgrid=False, dtick=1)


def _example(result: OPROResult, position: int) -> tuple[str, str]:
    """Name and inputs of a train example. Results made by hand may have no texts."""
    texts = result.data.texts.get("train", ())
    if position >= len(texts):
        return str(position), ""
    inputs = "; ".join(f"{name}: {value}" for name, value in texts[position].inputs.items())
    return str(texts[position].index), "<br>".join(map(escape, textwrap.wrap(inputs[:400], 80)))


def _step(result: OPROResult) -> int:
    """Rounds between two labels: whole numbers, at most a dozen labels."""
    return 1 + max((trial.candidate.round for trial in result.trials), default=0) // 12


def _points(result: OPROResult, data: str = "") -> list[go.Scatter]:
    """Candidates scored in full, dropped ones, whose scores are estimates, and the returned one.

    `data` follows their names in the legend.
    """
    groups: dict[str, list[tuple[int, Trial]]] = {name: [] for name in SYMBOLS}
    for number, trial in enumerate(result.trials):
        is_full = trial.state == "complete"
        is_returned = bool(result.curve) and trial.id == result.best.id
        name = "returned" if is_returned else "scored in full" if is_full else "dropped (estimate)"
        groups[name].append((number, trial))
    return [
        go.Scatter(
            x=[t.candidate.round for _, t in group],
            y=[result.reward_of(t) for _, t in group],
            mode="markers",
            marker={"symbol": SYMBOLS[name], "size": 14 if name == "returned" else 9},
            name=name + data,
            text=[_hover(result, n, t) for n, t in group],
            hovertemplate="%{text}<extra></extra>",
        )
        for name, group in groups.items()
    ]


def _hover(result: OPROResult, number: int, trial: Trial) -> str:
    """A trial for the mouse. plotly reads simple HTML, so all texts are escaped."""
    about = "" if trial.state == "complete" else f", estimate from {counted(trial.num_scored, 'example')}"
    lines = [f"trial {number}: {result.reward_of(trial):.3f}{about}", escape(trial.reason)]
    names = trial.candidate.rewritten or trial.candidate.instructions
    for name in names:
        wrapped = textwrap.wrap(
            f"{name}: {trial.candidate.instructions[name]}", 80, max_lines=8, placeholder=" …"
        )
        lines += map(escape, wrapped)
    return "<br>".join(lines)


def _figure(data: list[go.BaseTraceType], title: str, x: str, y: str) -> go.Figure:
    legend = {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0}
    figure = go.Figure(data, {"title": {"text": title}, "legend": legend, "template": "plotly_white"})
    return figure.update_xaxes(title_text=x).update_yaxes(title_text=y)
