"""A result as a notebook shows it: what came out, the instructions before and after, the best trials."""

from __future__ import annotations

from html import escape

from .report import make_rows, word_diff
from .result import OPROResult, counted

NUM_TRIALS = 10


def as_html(result: OPROResult) -> str:
    """HTML without colours of its own, so that it fits light and dark notebooks."""
    parts = [f"<pre>{escape(result.summary())}</pre>"]
    if not result.curve:
        return parts[0]
    for name, text in result.instructions.items():
        before = result.baseline.candidate.instructions[name]
        what = "unchanged" if text == before else "changes to the student's"
        parts.append(f"<p><b>{escape(name)}</b> ({what})</p>")
        parts.append("<pre style='white-space: pre-wrap; unicode-bidi: plaintext'>")
        for words in word_diff(before, text):
            if words.is_same:
                parts.append(escape(words.after))
            else:
                parts += [
                    f"<{tag}>{escape(w)}</{tag}>"
                    for tag, w in (("del", words.before), ("ins", words.after))
                    if w
                ]
        parts.append("</pre>")
    return "".join([*parts, _table(result)])


def _table(result: OPROResult) -> str:
    """The best trials, in the order of the report."""
    rows = sorted(make_rows(result), key=lambda row: row.order)
    has_valset = any(row.trial.valset_score is not None for row in rows)
    lines = []
    for row in rows[:NUM_TRIALS]:
        trial, about = row.trial, f"{row.score:.3f}"
        if not row.is_measured:
            about = f"≈ {about} ({counted(trial.num_scored, 'example')})"
        cells = [row.number, trial.candidate.round, trial.state, trial.reason, about]
        if has_valset:
            cells.append("" if trial.valset_score is None else f"{trial.valset_score:.3f}")
        lines.append("".join(f"<td>{escape(str(cell))}</td>" for cell in cells))
    names = ["trial", "round", "state", "reason", "train score", *(["valset score"] if has_valset else ())]
    head = "".join(f"<th>{name}</th>" for name in names)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    shown = (
        f"The best {NUM_TRIALS} of {counted(len(rows), 'trial')}" if len(rows) > NUM_TRIALS else "All trials"
    )
    note = f"{shown}; ≈ marks the estimate for a dropped candidate."
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table><p>{note}</p>"
