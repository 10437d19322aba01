"""What a simulated server is told about a model: how it answers, how long it takes, how it fails.

One rule: every draw is a function of the request and a seed, so that a rerun meets the same server.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import Literal, get_args

from dspy_opro.testing.calls import Answer, LMCall, digest

FaultKind = Literal["status", "hang", "malformed_json", "malformed_answer", "reset"]


def uniform(*values: object) -> float:
    """A draw from [0, 1) that is fixed by the values."""
    return int.from_bytes(digest(*values)[:7], "big") / 2**56


@dataclass(frozen=True)
class Latency:
    """How long a call takes. The time has a lognormal distribution.

    Args:
        median_seconds: The median. 0 means no latency.
        sigma: The standard deviation of the logarithm. A larger one gives more calls that are far above the median.
    """

    median_seconds: float = 0.0
    sigma: float = 0.0

    def __post_init__(self) -> None:
        for name in ("median_seconds", "sigma"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a finite number of at least 0, but got {value!r}.")

    def seconds(self, call: LMCall, seed: int) -> float:
        """The service time of this call."""
        if self.median_seconds == 0:
            return 0.0
        draw = random.Random(digest("latency", seed, *call_identity(call)))
        return self.median_seconds * math.exp(self.sigma * draw.gauss(0.0, 1.0))


@dataclass(frozen=True)
class Fault:
    """How calls fail, and which ones.

    Args:
        kind: `status` answers with an HTTP error. `hang` never answers. `malformed_json` answers with a body that is
            cut off. `malformed_answer` answers with a completion in which no adapter finds a field. `reset` closes the
            connection without an answer.
        status: The HTTP status, for the kind `status`.
        count: The number of calls that fail. None means all.
        probability: The share of the calls that fail, drawn for each request and sample.
        contains: Only calls whose prompt contains this text fail.
        retry_after_seconds: The header `Retry-After`, for the kind `status`. 0 keeps the retries of a test short. None
            sends no header.

    Raises:
        ValueError: There is no such kind.
    """

    kind: FaultKind = "status"
    status: int = 500
    count: int | None = None
    probability: float = 1.0
    contains: str | None = None
    retry_after_seconds: float | None = 0.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(FaultKind):
            raise ValueError(f"kind must be one of {', '.join(get_args(FaultKind))}, but got {self.kind!r}.")

    def strikes(self, call: LMCall, seed: int) -> bool:
        """Whether this call fails, if `count` allows it."""
        if self.contains is not None and self.contains not in call.prompt:
            return False
        return self.probability >= 1 or uniform("fault", self, seed, *call_identity(call)) < self.probability


@dataclass(frozen=True)
class RateLimit:
    """The server answers `num_requests` requests in any `seconds` seconds. Others get status 429 and `Retry-After`."""

    num_requests: int
    seconds: float

    def __post_init__(self) -> None:
        if self.num_requests < 1:
            raise ValueError(f"num_requests must be at least 1, but got {self.num_requests!r}.")


@dataclass(frozen=True)
class SimulatedModel:
    """One model of a simulated server."""

    answer: Answer
    """A function of the call, or an object with `__call__`. It must be picklable if the server has its own process."""
    latency: Latency = field(default_factory=Latency)
    faults: tuple[Fault, ...] = ()
    """The first one that fits a call decides how it fails."""
    rate_limit: RateLimit | None = None
    sends_usage: bool = True
    """Whether an answer says how many tokens it took. Many servers do not say it."""


def call_identity(call: LMCall) -> tuple[object, ...]:
    """What tells two calls apart."""
    return (call.model, call.messages, call.temperature, call.seed, call.sample)
