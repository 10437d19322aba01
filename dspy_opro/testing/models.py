"""What a simulated server is told about a model: how it answers, how long it takes, how it fails.

One rule: every draw is a function of the request and a seed, so that a rerun meets the same server.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import Literal

from dspy_opro.testing.calls import Answer, LMCall, digest

FaultKind = Literal["status", "hang", "malformed_json", "malformed_answer", "reset"]


def uniform(*values: object) -> float:
    """A draw from [0, 1) that is fixed by the values."""
    return int.from_bytes(digest(*values)[:7], "big") / 2**56


@dataclass(frozen=True)
class Latency:
    """Service time, lognormal: the median is what a call usually takes, sigma how heavy the tail is."""

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
    """A way to fail, and the calls that it strikes.

    Args:
        kind: `status` answers with an HTTP error; `hang` never answers; `malformed_json` answers a body that
            is cut off; `malformed_answer` answers a completion in which no adapter finds a field; `reset`
            closes the connection without an answer.
        status: The HTTP status of `status`.
        count: How many calls it strikes; None for all.
        probability: The share of the calls it strikes, drawn per request and sample.
        contains: Strikes only calls whose prompt contains this text.
        retry_after_seconds: Sent as `Retry-After` with a status; 0 keeps a test's retries short, None sends
            none.
    """

    kind: FaultKind = "status"
    status: int = 500
    count: int | None = None
    probability: float = 1.0
    contains: str | None = None
    retry_after_seconds: float | None = 0.0

    def strikes(self, call: LMCall, seed: int) -> bool:
        """Whether this call is hit, the count apart."""
        if self.contains is not None and self.contains not in call.prompt:
            return False
        return self.probability >= 1 or uniform("fault", self, seed, *call_identity(call)) < self.probability


@dataclass(frozen=True)
class RateLimit:
    """So many requests in any time of so many seconds; all others get status 429 and `Retry-After`."""

    num_requests: int
    seconds: float


@dataclass(frozen=True)
class SimulatedModel:
    """One model of a simulated server."""

    answer: Answer
    """A function of the call, or an object with `__call__`; picklable if the server has its own process."""
    latency: Latency = field(default_factory=Latency)
    faults: tuple[Fault, ...] = ()
    """The first one that strikes decides."""
    rate_limit: RateLimit | None = None
    sends_usage: bool = True
    """Whether an answer says how many tokens it took. Many servers leave that out."""


def call_identity(call: LMCall) -> tuple[object, ...]:
    """What tells two calls apart."""
    return (call.model, call.messages, call.temperature, call.seed, call.sample)
