from __future__ import annotations

from typing import Any

import pytest

from dspy_opro.config import make_config
from dspy_opro.planning import make_search
from dspy_opro.trajectory import Candidate
from dspy_opro.work import Plan

STUDENT = Candidate({"self": "Answer."})


def plan(num_train: int = 60, num_val: int = 0, **options: Any) -> Plan:
    config = make_config({"metric": lambda example, prediction: 1.0, **options}).resolve()
    return make_search(config, STUDENT, num_train, num_val).plan


@pytest.mark.parametrize(
    ("options", "num_candidates", "lag"),
    [
        ({}, 8, 2),
        ({"auto": "medium"}, 16, 2),
        ({"auto": "heavy"}, 32, 2),
        ({"auto": "paper"}, 8, 0),
        ({"auto": None, "num_rounds": 50}, 8, 3),
        ({"auto": None, "max_metric_calls": 1200}, 8, 3),
        ({"auto": None, "max_metric_calls": 1600}, 16, 2),
        ({"auto": None, "max_metric_calls": 6400}, 32, 3),
        ({"auto": None, "max_metric_calls": 100_000}, 64, 3),
        ({"auto": None, "max_metric_calls": 1600, "num_rounds": 4}, 8, 1),
        (
            {"auto": None, "max_metric_calls": 1600, "num_val": 60},
            8,
            2,
        ),  # each round's winner is scored on them
        ({"auto": None, "max_metric_calls": 1600, "pruner": None}, 8, 0),
        ({"auto": None, "max_tokens": 1_000_000}, 16, 3),
        ({"auto": None, "max_metric_calls": 1600, "num_candidates": 5, "lag": 1}, 5, 1),
    ],
)
def test_a_long_run_has_larger_rounds_and_more_of_them_at_once(
    options: dict[str, Any], num_candidates: int, lag: int
) -> None:
    found = plan(**options)
    assert (found.num_candidates, found.lag) == (num_candidates, lag)


def test_trials_are_candidates_in_all() -> None:
    found = plan(num_trials=20)
    assert (found.num_trials, found.num_rounds, found.num_candidates) == (20, 3, 8)
