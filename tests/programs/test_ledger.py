"""A ledger that adds up exactly, and the budgets that are checked against it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from dspy_opro.programs.metering import Budget, Ledger, Meter
from dspy_opro.search.trajectory import Usage


@pytest.mark.parametrize(
    ("limits", "usage", "seconds", "reason"),
    [
        ({}, Usage(prompt_tokens=10**9, cost=1e9), 1e9, None),
        ({"max_tokens": 10}, Usage(prompt_tokens=5, completion_tokens=4), 0, None),
        ({"max_tokens": 10}, Usage(prompt_tokens=5, completion_tokens=5), 0, "max_tokens"),
        ({"max_cost": 0.5}, Usage(cost=0.49), 0, None),
        ({"max_cost": 0.5}, Usage(cost=0.5), 0, "max_cost"),
        ({"timeout_seconds": 3.0}, Usage(), 2.9, None),
        ({"timeout_seconds": 3.0}, Usage(), 3.0, "timeout_seconds"),
        ({"max_tokens": 1, "max_cost": 0.1}, Usage(cost=1.0, prompt_tokens=1), 0, "max_tokens"),
    ],
)
def test_budgets(limits: dict[str, Any], usage: Usage, seconds: float, reason: str | None) -> None:
    assert Budget(**limits).exhausted(usage, seconds) == reason


def test_the_ledger_loses_nothing_between_threads() -> None:
    ledger = Ledger()
    ledger.add(Usage(metric_calls=5))
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda n: ledger.add(Usage(metric_calls=1, prompt_tokens=n)), range(4000)))
    assert ledger.usage == Usage(metric_calls=4005, prompt_tokens=sum(range(4000)))


SOME = {"prompt_tokens": 3, "completion_tokens": 2}


@pytest.mark.parametrize(
    ("price", "usage", "cost", "dollars", "unpriced"),
    [
        (None, SOME, 0.25, 0.25, 0),
        (None, SOME, None, 0.0, 1),
        (None, SOME, 0.0, 0.0, 1),  # litellm says 0 of a model that its list has without a price
        ((1e6, 1e6), SOME, None, 5.0, 0),
        ((0.0, 0.0), SOME, None, 0.0, 0),
        ((0.0, 1e6), {"prompt_tokens": 3}, None, 0.0, 0),
        ((1e6, 1e6), {"prompt_tokens": 0}, None, 0.0, 1),  # the server sends no usage
        ((0.0, 0.0), {"prompt_tokens": 0}, None, 0.0, 0),
        (None, {}, 0.25, 0.0, 0),  # from the cache
        (None, {}, None, 0.0, 0),
    ],
)
def test_a_paid_call_without_a_known_price_is_counted(
    price: tuple[float, float] | None, usage: Any, cost: float | None, dollars: float, unpriced: int
) -> None:
    ledger = Ledger()
    meter = Meter("scorer", ledger.add, Usage(), {} if price is None else {"openai/m": price})
    meter.add("openai/m", usage, cost)
    assert (ledger.usage.cost, ledger.usage.unpriced_calls) == (dollars, unpriced)
