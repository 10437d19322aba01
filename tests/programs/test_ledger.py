"""A ledger that adds up exactly, and the budgets that are checked against it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from dspy_opro.programs.metering import Budget, Ledger
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
