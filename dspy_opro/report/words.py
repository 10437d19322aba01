"""How numbers and reasons read on the page."""

from __future__ import annotations

from collections.abc import Mapping

REASONS: Mapping[str, str] = {
    "num_rounds": "all rounds were played",
    "patience": "no better program was found for as many rounds as patience allows",
    "stop_at_score": "the score to stop at was reached",
    "max_metric_calls": "the budget of examples was used up",
    "max_tokens": "the budget of tokens was used up",
    "max_cost": "the budget of dollars was used up",
    "timeout_seconds": "the time was up",
    "stop_file": "a file named stop was put into its log_dir",
    "storage_lost": "its storage could not be reached any more",
    "interrupted": "it was interrupted",
    "callback": "a callback stopped the study",
    "no_new_proposals": "the optimizer LM proposed nothing new",
    "proposer_failed": "every call of the optimizer LM failed",
    "error": "an error ended it",
}
"""Stop reason -> what it means."""


def number(value: float) -> str:
    """A score with three decimals, a large one with fewer."""
    text = f"{value:.3f}" if abs(value) < 100 else f"{value:,.1f}"
    return text.replace("-0.000", "0.000").replace("-", "\N{MINUS SIGN}")


def signed(value: float) -> str:
    """A difference, with its sign where it has one."""
    text = number(value)
    return f"+{text}" if value > 0 and text != "0.000" else text


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
