"""What the tests of the study share; `replay` is imported by its name."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    optuna.logging.disable_default_handler()
    yield
    optuna.logging.enable_default_handler()
