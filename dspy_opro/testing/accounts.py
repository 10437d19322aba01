"""What a simulated server counts, per model.

One rule: a request is counted when it has arrived in full, and its outcome before the answer is written.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class ModelStats:
    """The figures of one model since the start or the last reset."""

    requests: int = 0
    """Requests received in full, also those that failed."""
    completions: int = 0
    """Requests answered with a completion, also a malformed one."""
    faults: dict[str, int] = field(default_factory=dict)
    """Kind of fault -> the number of calls that failed. `error` counts those in which the answer function raised."""
    abandoned: int = 0
    """Requests whose client closed the connection before the answer."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    busy_seconds: float = 0.0
    """The time that all requests together were in service, also those in service now."""
    in_flight: int = 0
    max_in_flight: int = 0
    last_error: str = ""
    """The traceback of the last answer function that raised."""


@dataclass(frozen=True)
class ServerStats:
    """The figures of a server, read at one instant."""

    models: dict[str, ModelStats]
    """Model name, as requests gave it -> its figures."""
    max_in_flight: int
    """The most requests in service at once, over all models."""

    def __getitem__(self, name: str) -> ModelStats:
        """The figures of a model. All are 0 if nobody has called it."""
        return self.models.get(name, ModelStats())

    @property
    def requests(self) -> int:
        """Requests of all models."""
        return sum(model.requests for model in self.models.values())

    @property
    def busy_seconds(self) -> float:
        """Busy seconds of all models."""
        return sum(model.busy_seconds for model in self.models.values())

    @property
    def in_flight(self) -> int:
        """Requests in service now, of all models."""
        return sum(model.in_flight for model in self.models.values())


class Accounts:
    """The counters behind `ServerStats`."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._models: dict[str, ModelStats] = {}
        self._updated: dict[str, float] = {}  # model name -> when its busy_seconds were last up to date
        self._in_flight = 0
        self._max_in_flight = 0

    def _model(self, name: str) -> ModelStats:
        stats, now = self._models.setdefault(name, ModelStats()), self._clock()
        stats.busy_seconds += stats.in_flight * (now - self._updated.get(name, now))
        self._updated[name] = now
        return stats

    def entered(self, name: str) -> None:
        """A request has arrived in full."""
        stats = self._model(name)
        stats.requests += 1
        stats.in_flight += 1
        stats.max_in_flight = max(stats.max_in_flight, stats.in_flight)
        self._in_flight += 1
        self._max_in_flight = max(self._max_in_flight, self._in_flight)

    def left(self, name: str, *, abandoned: bool = False) -> None:
        """A request is no longer in service."""
        stats = self._model(name)
        stats.in_flight -= 1
        stats.abandoned += abandoned
        self._in_flight -= 1

    def completed(self, name: str, prompt_tokens: int, completion_tokens: int) -> None:
        """A request gets a completion."""
        stats = self._model(name)
        stats.completions += 1
        stats.prompt_tokens += prompt_tokens
        stats.completion_tokens += completion_tokens

    def faulted(self, name: str, kind: str, error: str = "") -> None:
        """A request is struck by a fault."""
        stats = self._model(name)
        stats.faults[kind] = stats.faults.get(kind, 0) + 1
        stats.last_error = error or stats.last_error

    def snapshot(self) -> dict[str, Any]:
        """The figures as JSON takes them."""
        models = {name: asdict(self._model(name)) for name in self._models}
        return {"models": models, "max_in_flight": self._max_in_flight}


def read(snapshot: dict[str, Any]) -> ServerStats:
    """`Accounts.snapshot` after its way over the wire."""
    models = {name: ModelStats(**figures) for name, figures in snapshot["models"].items()}
    return ServerStats(models, snapshot["max_in_flight"])
