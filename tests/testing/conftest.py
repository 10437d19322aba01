"""The helpers of these tests are imported by their name, whatever pytest's import mode."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dspy_opro.testing import SimulatedServer

sys.path.insert(0, str(Path(__file__).parent))

from fakes_common import echo


@pytest.fixture
def server() -> Iterator[SimulatedServer]:
    with SimulatedServer(echo, own_process=False) as running:
        yield running
