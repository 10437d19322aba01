"""`benchmarks/replay.py` on small matrices whose answer is known."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dspy_opro import Halving
from dspy_opro.search.pruners import ScoreAll

ROOT = Path(__file__).parent.parent


@pytest.fixture
def replay(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.delitem(sys.modules, "replay", raising=False)  # that of tests/storage has the same name
    return importlib.import_module("replay")


STEADY = np.repeat(np.array([[0.5], [0.3], [0.7], [0.4], [0.6]]), 8, axis=1)
"""(5 prompts, 8 blocks) without noise: row 2 is the best."""


def test_full_evaluation_scores_every_block_and_finds_the_best(replay: Any) -> None:
    assert replay.race(STEADY, ScoreAll(), 2) == (2, 5 * 8)


def test_halving_scores_fewer_blocks(replay: Any) -> None:
    # Round 1 (rows 1, 2): row 1 leaves after a block, row 2 goes on: 2 + 7. Round 2 (rows 3, 4): both are behind: 2.
    assert replay.race(STEADY, Halving(first=1), 2) == (2, 8 + 9 + 2)


def test_the_paired_test_needs_two_blocks_and_a_difference(replay: Any) -> None:
    # Rows 1, 3 and 4 leave after two blocks each.
    assert replay.race(STEADY, replay.PairedTest(), 2) == (2, 8 + (2 + 8) + (2 + 2))
    draws = np.random.default_rng(0)
    equal = 0.5 + 0.2 * draws.standard_normal((3, 8))
    assert replay.race(equal, replay.PairedTest(1e-6), 2)[1] == 3 * 8


@pytest.mark.parametrize("name", ["Optuna's MedianPruner", "Optuna's SuccessiveHalvingPruner",
                                  "Optuna's WilcoxonPruner (0.1)"])  # fmt: skip
def test_optunas_pruners_keep_the_best(replay: Any, name: str) -> None:
    chosen, cost = replay.race(STEADY, replay.POLICIES[name](), 2)
    assert chosen == 2
    assert cost <= 5 * 8


def test_regret_is_zero_for_full_evaluation_alone(replay: Any) -> None:
    draws = np.random.default_rng(1)
    noisy = 0.6 + 0.05 * draws.standard_normal((17, 10))
    full = replay.replay(noisy, ScoreAll, 10)
    ours = replay.replay(noisy, lambda: Halving(first=1), 10)
    assert full.regret == 0.0
    assert full.calls == 17 * 10 * 30
    assert ours.regret > 0.0
    assert ours.calls < full.calls


def test_what_was_raced_does_not_judge(replay: Any) -> None:
    """Prompts that differ by noise alone gain nothing on unseen blocks, however large the best mean is."""
    draws = np.random.default_rng(2)
    results = [replay.replay(0.5 + 0.05 * draws.standard_normal((9, 10)), ScoreAll, 5) for _ in range(40)]
    assert abs(np.mean([result.unseen for result in results])) < 0.005


def test_rows_with_gaps_and_repeated_runs_are_left_out(replay: Any, tmp_path: Path) -> None:
    gap = STEADY.copy()
    gap[0, 5] = np.nan
    other = STEADY + 0.1
    np.savez(
        tmp_path / "s.npz",
        **{
            "a/x/m/CAPO/1": gap,
            "b/x/m/CAPO/1": gap,
            "c/x/m/no_racing/1": other,
            "steps/o": STEADY,
            "d/x/m/one": STEADY[:, :1],
        },
    )
    runs = dict(replay.complete_runs(str(tmp_path / "s.npz"), 4))
    assert list(runs) == ["a/x/m/CAPO/1", "c/x/m/no_racing/1"]
    assert runs["a/x/m/CAPO/1"].shape == (4, 8)
    assert not list(replay.complete_runs(str(tmp_path / "s.npz"), 6))
    on_the_first = dict(replay.complete_runs(str(tmp_path / "s.npz"), 4, 5))
    assert on_the_first["a/x/m/CAPO/1"].shape == (5, 5)  # the gap comes later


def test_the_table_has_a_line_for_each_policy(replay: Any) -> None:
    lines = list(
        replay.table([("a", STEADY), ("b", STEADY)], 2, ["full evaluation", "CAPO's paired t-test (0.2)"])
    )
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert cells[0][:4] == ["full evaluation", "1200", "1.00", "0.00 ± 0.00"]
    assert cells[1][0] == "CAPO's paired t-test (0.2)"
    assert float(cells[1][2]) < 1
    assert cells[0][4].startswith("20.00")  # 0.7 less the mean prompt's 0.5
