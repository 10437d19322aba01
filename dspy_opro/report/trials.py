"""The table of trials: a heading sorts, a text opens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dspy_opro.result import OPROResult
from dspy_opro.trajectory import Trial

from .figures import Words, word_diff
from .markup import Html, Node, tag
from .sections import section
from .words import number, signed


def trial_table(result: OPROResult) -> Html:
    """All trials; a heading sorts, a text opens."""
    trials = result.trajectory.trials
    texts = {trial.id: trial.candidate.instructions for trial in trials}
    columns = ["trial", "round", "state", "reward", "gain", "examples"]
    extra = {
        "valset": any(t.valset_score is not None for t in trials),
        "failed": any(t.num_failures for t in trials),
    }
    columns += [name for name, is_shown in extra.items() if is_shown]
    heads = [tag("th", tag("button", name, type="button"), scope="col") for name in columns]
    rows = [
        _row(place, trial, columns, result, texts.get(trial.candidate.parent or "", {}))
        for place, trial in enumerate(trials)
    ]
    table = tag(
        "table",
        tag("thead", tag("tr", heads, tag("th", "instructions", scope="col", class_="texts"))),
        tag("tbody", rows),
        class_="trials",
    )
    note = "A heading sorts, a text opens. Words that its parent did not have are marked."
    return section(f"Trials ({len(trials):,})", tag("p", note), table)


def _row(
    place: int, trial: Trial, columns: Sequence[str], result: OPROResult, parent: Mapping[str, str]
) -> Html:
    state = "returned" if trial.id == result.best.id else trial.state
    values = _values(place, trial, state, trial.reward - result.baseline.reward)
    cells = [tag("td", values[name][0], data_value=values[name][1], class_=name) for name in columns]
    texts = tag("td", _texts(trial, parent), class_="texts")
    return tag("tr", cells, texts, id=f"trial-{place}", class_=state)


def _values(place: int, trial: Trial, state: str, gain: float) -> dict[str, tuple[Node, object]]:
    """Column -> what it shows and what it sorts by."""
    valset = trial.valset_score
    return {
        "trial": (place, place),
        "round": (trial.candidate.round, trial.candidate.round),
        "state": (tag("span", state, class_=f"badge {state}"), state),
        "reward": (number(trial.reward), trial.reward),
        "gain": (tag("span", signed(gain), class_="up" if gain > 0 else "down") if place else "–", gain),
        "examples": (f"{trial.num_scored:,}", trial.num_scored),
        "valset": ("–" if valset is None else number(valset), "" if valset is None else valset),
        "failed": (trial.num_failures or "–", trial.num_failures),
    }


def _texts(trial: Trial, parent: Mapping[str, str]) -> Html:
    """The texts that this trial rewrote, the first words of them as the line to open."""
    names = trial.candidate.rewritten or tuple(trial.candidate.instructions)
    all_texts = trial.candidate.instructions
    demo_set = trial.candidate.demo_set
    demos = "" if demo_set is None else f"demo set {demo_set} with: "
    preview = demos + " ".join(all_texts[names[0]].split())
    blocks = []
    for name in names:
        text = all_texts[name]
        runs = word_diff(parent[name], text) if name in parent else [Words("same", text, text)]
        shown = [tag("ins", w.after) if w.change == "added" else w.after for w in runs]
        title = tag("h4", tag("code", name)) if len(all_texts) > 1 else None
        blocks.append((title, tag("p", shown, class_="text")))
    return tag("details", tag("summary", preview[:160]), blocks, tag("p", trial.reason, class_="what"))
