"""Latencies and faults are fixed by the request and the seed, and reach real LMs."""

from __future__ import annotations

import re
import statistics
from typing import Any

import pytest
from dspy.utils.exceptions import AdapterParseError
from fakes_common import DSPY, ask, echo, raw, settled, wire, without_fallback

from dspy_opro.testing import (
    Fault,
    Latency,
    LMCall,
    RateLimit,
    SimulatedModel,
    SimulatedServer,
)


def test_latency_is_lognormal_and_fixed_by_the_request_and_the_seed() -> None:
    latency = Latency(0.4, 0.6)
    calls = [LMCall("m", (("user", str(number)),)) for number in range(4000)]
    drawn = [latency.seconds(call, seed=1) for call in calls]
    assert drawn == [latency.seconds(call, seed=1) for call in calls]
    assert drawn != [latency.seconds(call, seed=2) for call in calls]
    logs = statistics.quantiles(drawn, n=100)
    assert statistics.median(drawn) == pytest.approx(0.4, rel=0.05)
    # One standard deviation of the logarithm above the median lies at the 84th percentile.
    assert logs[83] == pytest.approx(0.4 * 2.71828**0.6, rel=0.06)


@pytest.mark.parametrize("kwargs", [{"median_seconds": -1.0}, {"sigma": float("nan")}])
def test_latency_out_of_range_is_refused(kwargs: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(kwargs))} must be a finite number of at least 0"):
        Latency(**kwargs)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Fault("hangs"), "kind must be one of status, hang, .*, but got 'hangs'"),  # type: ignore[arg-type]
        (lambda: RateLimit(0, 1.0), "num_requests must be at least 1, but got 0"),
    ],
)
def test_a_fault_or_a_limit_that_does_not_exist_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# A fault, whether DSPy gets over it by asking again, and the requests that this takes.
FAULTS = [
    (Fault("status", status=429, count=2), True, 3),
    (Fault("status", status=500, count=1), True, 2),
    (Fault("status", status=400), False, 1),
    (Fault("reset", count=1), True, 2),
    (Fault("malformed_json"), False, 1),
    (Fault("malformed_answer"), False, 1),
    (Fault("hang"), False, 1),
]


@pytest.mark.skipif(DSPY < (3, 4), reason="what is retried how often is LiteLLM's decision before 3.4")
@pytest.mark.parametrize(
    ("fault", "recovers", "requests"), FAULTS, ids=lambda value: getattr(value, "kind", None)
)
def test_faults_reach_a_real_lm(server: SimulatedServer, fault: Fault, recovers: bool, requests: int) -> None:
    server.inject(fault)
    hangs = fault.kind == "hang"
    lm = server.lm("m", num_retries=0, timeout=0.5) if hangs else server.lm("m")
    if recovers:
        assert ask(lm, "still here?", without_fallback()) == "still here?"
    else:
        with pytest.raises(Exception) as caught:  # noqa: PT011 - which error it is, is the next line's matter
            ask(lm, adapter=without_fallback())
        assert isinstance(caught.value, AdapterParseError) == (fault.kind == "malformed_answer")
    stats = settled(server)["m"]
    struck = requests - recovers
    assert (stats.requests, stats.faults, stats.abandoned) == (requests, {fault.kind: struck}, int(hangs))
    assert stats.completions == int(recovers or fault.kind == "malformed_answer")


# kind of fault -> what the client reads: (pattern of the head, pattern of the body)
ON_THE_WIRE = {
    "status": (r"HTTP/1.1 503 .*Retry-After: 2\r\n.*", r'.*"simulated status 503".*'),
    "hang": ("hang", ""),
    "reset": ("reset", ""),
    "malformed_json": (r"HTTP/1.1 200 .*", r'\{"id": "simulated", "choices": \[\{"mess'),
    "malformed_answer": (r"HTTP/1.1 200 .*", r'.*"content": "I would rather not[^"]*".*\}'),
}


@pytest.mark.parametrize("kind", ON_THE_WIRE)
async def test_every_fault_on_the_wire(server: SimulatedServer, kind: Any) -> None:
    server.inject(Fault(kind, status=503, retry_after_seconds=2, count=1))
    head, body = await wire(server)
    patterns = ON_THE_WIRE[kind]
    assert re.fullmatch(patterns[0], head, re.DOTALL)
    assert re.fullmatch(patterns[1], body.decode(), re.DOTALL)
    assert settled(server)["m"].faults == {kind: 1}
    assert (await raw(server, "x"))[0]["choices"]  # the count is used up


async def test_the_calls_a_fault_strikes_are_fixed_by_their_content(server: SimulatedServer) -> None:
    server.inject(Fault("status", probability=0.3))

    async def struck() -> list[bool]:
        server.reset()
        server.inject(Fault("status", probability=0.3))
        return ["error" in body for body in await raw(server, *map(str, range(300)))]

    first = await struck()
    assert first == await struck()
    assert 60 <= sum(first) <= 120  # 90 expected, standard deviation 8


async def test_a_fault_may_be_bound_to_a_model_and_a_text(server: SimulatedServer) -> None:
    models = {"a": echo, "b": SimulatedModel(echo, faults=(Fault(contains="poison", count=1),))}
    with SimulatedServer(models, own_process=False) as server:
        failed = {
            (name, text): "error" in (await raw(server, text, model=name))[0]
            for name in ("a", "b")
            for text in ("poisoned", "sound")
        }
        assert failed == {
            ("a", "poisoned"): False,
            ("a", "sound"): False,
            ("b", "poisoned"): True,
            ("b", "sound"): False,
        }
        assert "choices" in (await raw(server, "poisoned", model="b"))[0]
        server.reset()
        assert "error" in (await raw(server, "poisoned", model="b"))[0]
        server.inject(model="b")
        assert "choices" in (await raw(server, "poisoned", model="b"))[0]
