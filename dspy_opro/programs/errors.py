"""Errors, and other texts from outside, as texts for a log or a message."""

from __future__ import annotations

import logging
import re

from .program import shorten
from .secrets import without_password

_CONTROL = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"  # colours, cursor moves
    r"|\x1b[\]PX^_].*?(?:\x07|\x1b\\|$)"  # window titles, links, the clipboard
    r"|\x1b[ -/]*[0-~]?"
    r"|[\x00-\x08\x0b-\x1f\x7f-\x9f]",
    re.DOTALL,
)


def printable(text: str) -> str:
    """A text without the sequences that control a terminal. Tabs and ends of lines stay."""
    return _CONTROL.sub("", text)


def clean_record(record: logging.LogRecord) -> bool:
    """A logging filter: the record's text becomes printable."""
    record.msg, record.args = printable(record.getMessage()), ()
    return True


def in_brief(error: BaseException | None) -> str:
    """An error as a short text without secrets."""
    try:
        text = str(error)
    except Exception as failed:
        text = f"its text can't be read ({type(failed).__name__})"
    return printable(shorten(str(without_password(f"{type(error).__name__}: {text}")), 500))
