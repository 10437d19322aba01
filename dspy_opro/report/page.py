"""The whole page: head, style and script around the sections, in the order in which one asks about a run."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files

from dspy_opro.result import OPROResult

from .markup import Html, join, tag
from .sections import failures, head, instructions, scores, settings, spending
from .trials import trial_table


def page(result: OPROResult) -> str:
    """The page as text."""
    style, script = (Html(_read(name)) for name in ("page.css", "page.js"))
    # Only this script runs and nothing is loaded, whatever a model has written into the texts below.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    # Optuna names a study that nobody named "no-name-" and a random number.
    study = "" if result.study_name.startswith("no-name-") else result.study_name
    title = str(result.config.get("name") or study or "Optimization run")
    measured = bool(result.trajectory.trials)
    return "<!doctype html>\n" + tag(
        "html",
        tag(
            "head",
            tag("meta", charset="utf-8"),
            tag("meta", http_equiv="Content-Security-Policy", content=policy),
            tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
            tag("meta", name="generator", content="dspy_opro"),
            tag("title", title),
            tag("style", style),
        ),
        tag(
            "body",
            tag(
                "main",
                head(result, title),
                join(scores(result), instructions(result)) if measured else None,
                spending(result),
                trial_table(result) if measured else None,
                failures(result),
                settings(result),
            ),
            tag("script", script),
        ),
        lang="en",
    )


def _read(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")
