"""What a run spent, and the limits that hold before every call."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from dspy_opro.search.trajectory import Usage


class Ledger:
    """The one count of a run's spending. Any thread may add to it."""

    def __init__(self) -> None:
        self._usage = Usage()
        self._lock = threading.Lock()

    @property
    def usage(self) -> Usage:
        return self._usage

    def add(self, usage: Usage) -> None:
        with self._lock:
            self._usage = self._usage + usage


@dataclass(frozen=True)
class Budget:
    """Limits in tokens, dollars and seconds: no call is started once one of them is reached."""

    max_tokens: int | None = None
    max_cost: float | None = None
    timeout_seconds: float | None = None

    def exhausted(self, usage: Usage, seconds: float) -> str | None:
        """The limit that is reached, as a stop reason."""
        if self.max_tokens is not None and usage.tokens >= self.max_tokens:
            return "max_tokens"
        if self.max_cost is not None and usage.cost >= self.max_cost:
            return "max_cost"
        if self.timeout_seconds is not None and seconds >= self.timeout_seconds:
            return "timeout_seconds"
        return None
