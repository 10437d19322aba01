"""Texts from outside, as they appear in a log."""

from __future__ import annotations

import logging

import pytest

from dspy_opro.programs.errors import clean_record, in_brief, printable


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain, ünïcödé, 漢字 and 🙂", "plain, ünïcödé, 漢字 and 🙂"),
        ("two\nlines and\ta tab", "two\nlines and\ta tab"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b[2J\x1b[1;1Hcleared", "cleared"),
        ("\x1b]0;title\x07after", "after"),
        ("\x1b]52;c;cGFzdGU=\x1b\\after", "after"),
        ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x1b]0;never ended", ""),
        ("\x1bcreset", "reset"),
        ("back\x08\x08over\rwritten\x00\x7f\x9b31m", "backoverwritten31m"),
        ("\x1b", ""),
    ],
)
def test_what_controls_a_terminal_is_left_out(text: str, expected: str) -> None:
    assert printable(text) == expected


def test_an_error_without_readable_text() -> None:
    class Wordless(Exception):
        def __str__(self) -> str:
            raise ValueError("no words")

    assert in_brief(Wordless()) == "Wordless: its text can't be read (ValueError)"
    assert in_brief(ValueError("\x1b[2Jgone")) == "ValueError: gone"


def test_every_record_of_our_log_is_clean(caplog: pytest.LogCaptureFixture) -> None:
    import dspy_opro.compile  # noqa: F401

    logger = logging.getLogger("dspy_opro")
    assert clean_record in logger.filters
    logger.warning("said %s, %d times", "\x1b[2J100%", 3)
    assert caplog.messages == ["said 100%, 3 times"]
