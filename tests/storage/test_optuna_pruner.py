"""Each of Optuna's pruners in a race: whom it drops, when, and that a replay decides the same."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest
from optuna.pruners import (
    BasePruner,
    HyperbandPruner,
    MedianPruner,
    NopPruner,
    PatientPruner,
    PercentilePruner,
    SuccessiveHalvingPruner,
    ThresholdPruner,
    WilcoxonPruner,
)

from dspy_opro.search.pruners import Race
from dspy_opro.storage.optuna_pruner import OptunaPruner

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")

NUM_EXAMPLES = 20
INCUMBENT = [1.0, 0.0] * 10
FIELD = {
    "better": [1.0] * 20,
    "equal": [1.0, 0.0] * 10,
    "worse": [1.0, 0.0, 0.0, 0.0] * 5,
    "worst": [0.0] * 20,
}


def run_race(pruner: OptunaPruner, field: dict[str, list[float]]) -> dict[str, int]:
    """Candidate -> the checkpoint at which it was dropped, in a race as the search runs it."""
    alive, dropped = dict(field), {}
    for end in pruner.checkpoints(NUM_EXAMPLES, len(field)):
        if not alive:
            break
        race = Race(INCUMBENT, {c: scores[:end] for c, scores in alive.items()}, len(field), True)
        for candidate in pruner.drop(race):
            dropped[candidate] = end
            del alive[candidate]
    return dropped


TABLE = [
    pytest.param(NopPruner, {}, id="Nop"),
    # The incumbent's mean is 0.6 after 5 examples; the median is taken over completed trials.
    pytest.param(lambda: MedianPruner(n_startup_trials=1), {"worse": 5, "worst": 5}, id="Median"),
    # Nobody is pruned before five trials are complete, and only the incumbent is.
    pytest.param(MedianPruner, {}, id="Median, as it comes"),
    pytest.param(
        lambda: MedianPruner(n_startup_trials=1, n_warmup_steps=9),
        {"worse": 10, "worst": 10},
        id="Median, warm",
    ),
    pytest.param(
        lambda: PercentilePruner(25.0, n_startup_trials=1), {"worse": 5, "worst": 5}, id="Percentile"
    ),
    pytest.param(lambda: ThresholdPruner(lower=0.3), {"worse": 15, "worst": 5}, id="Threshold"),
    # It waits until the last two reports are both below an earlier one; a flat line never is.
    pytest.param(
        lambda: PatientPruner(MedianPruner(n_startup_trials=1), patience=1),
        {"worse": 15},
        id="Patient",
    ),
    # The first rung is at 5 examples, the next at 10; half of those that reached a rung go on.
    pytest.param(
        lambda: SuccessiveHalvingPruner(min_resource=5, reduction_factor=2),
        {"equal": 5, "worse": 5, "worst": 5},
        id="SuccessiveHalving",
    ),
    # The same within three brackets, which candidates are assigned to by a hash of study name and number.
    pytest.param(
        lambda: HyperbandPruner(min_resource=5, max_resource=20, reduction_factor=2),
        {"worst": 5},
        id="Hyperband",
    ),
]


@pytest.mark.parametrize(("make", "expected"), TABLE)
def test_a_pruner_drops(make: Callable[[], BasePruner], expected: dict[str, int]) -> None:
    assert run_race(OptunaPruner(make()), FIELD) == expected


@pytest.mark.skipif(
    importlib.util.find_spec("scipy") is None,
    reason="Optuna's WilcoxonPruner needs SciPy, which is not installed",
)
def test_wilcoxon_pairs_example_by_example() -> None:
    """Of the signs that n differences can have only one is as bad, p = 2^-n: 1/16 after 4, 1/64 after 6."""
    steps = [0.01 * (position + 1) for position in range(20)]  # no ties: SciPy takes a second on twelve
    field = {
        "above": [i + s for i, s in zip(INCUMBENT, steps, strict=True)],
        "below": [i - s for i, s in zip(INCUMBENT, steps, strict=True)],
    }
    assert run_race(OptunaPruner(WilcoxonPruner(p_threshold=0.05), interval=4), field) == {"below": 8}
    assert run_race(OptunaPruner(WilcoxonPruner(p_threshold=0.05), interval=6), field) == {"below": 6}


@pytest.mark.parametrize("make", [row.values[0] for row in TABLE])
def test_a_replay_decides_the_same_over_several_races(make: Callable[[], BasePruner]) -> None:
    rounds = [{f"{c}{n}": s[n:] + s[:n] for c, s in FIELD.items()} for n in range(4)]
    first, second = OptunaPruner(make()), OptunaPruner(make())
    assert [run_race(first, field) for field in rounds] == [run_race(second, field) for field in rounds]


def test_the_given_pruner_keeps_no_trace_of_a_run() -> None:
    pruner = HyperbandPruner(min_resource=5, max_resource=20, reduction_factor=2)
    before = dict(vars(pruner))
    run_race(OptunaPruner(pruner), FIELD)
    assert vars(pruner) == before


@pytest.mark.parametrize(
    ("interval", "expected"), [(5, [5, 10, 15, 20]), (8, [8, 16, 20]), (20, [20]), (50, [20])]
)
def test_checkpoints_come_at_every_interval_and_at_the_end(interval: int, expected: list[int]) -> None:
    assert list(OptunaPruner(NopPruner(), interval).checkpoints(20, 3)) == expected


def test_an_interval_has_at_least_one_example() -> None:
    with pytest.raises(ValueError, match="interval must be at least 1, but got 0"):
        OptunaPruner(NopPruner(), 0)
