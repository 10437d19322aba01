"""A run as one HTML page. Figures are data first (`figures`), drawn second (`drawing`, `sections`)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from .page import page

if TYPE_CHECKING:
    from dspy_opro.result import OPROResult

__all__ = ["page", "write_report"]


def write_report(result: OPROResult, path: str | os.PathLike[str]) -> None:
    """Write one self-contained HTML page: curve, trials, instructions before and after, spending.

    It loads nothing from anywhere, so it can be mailed or archived as it is.

    Args:
        result: `program.opro_result`.
        path: The file; directories on the way to it are made.
    """
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    # A model may answer half of a surrogate pair, which UTF-8 can't hold.
    file.write_text(page(result), encoding="utf-8", errors="replace")
