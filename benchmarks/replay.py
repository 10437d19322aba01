"""Races replayed on real scores: `python benchmarks/replay.py capo_scores.npz`.

One rule: nothing is simulated. Every score is a mean over 30 examples that a large language model answered under a real
prompt, as published with CAPO (arXiv 2504.16005, github.com/finitearth/capo, folder `results`). A block of 30 examples
is the smallest step, because the published scores have no smaller one.

The file has one array a run, with the key `set/data/model/optimizer/seed` and the shape (prompts, blocks). NaN stands
where CAPO's racing had dropped the prompt. Only rows without NaN are used, so the prompts are survivors of a race: they
are better and nearer to each other than new proposals are. On the first blocks alone more rows are complete: there is
a second table with less of this bias.
"""

from __future__ import annotations

import argparse
import random
import statistics
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np
import optuna
from scipy import stats

from dspy_opro import Halving
from dspy_opro.search.pruners import Pruner, Race, ScoreAll
from dspy_opro.storage.optuna_pruner import OptunaPruner

BLOCK = 30
"""Examples in one block."""
LEAST_BLOCKS = 4
"""With fewer there is nothing to race on."""


@cache
def _quantile(probability: float, freedom: int) -> float:
    """Of Student's t distribution."""
    return float(stats.t.ppf(probability, freedom))


@dataclass(frozen=True)
class PairedTest:
    """CAPO's racing: a candidate leaves once another one is better in a one-sided paired t-test.

    CAPO tests the single examples. Here the blocks are tested, so that it needs two of them.
    """

    alpha: float = 0.2
    """CAPO's default."""
    independent: ClassVar[bool] = True

    def checkpoints(self, num_examples: int, num_candidates: int) -> Sequence[int]:
        return range(1, num_examples + 1)

    def drop(self, race: Race) -> Mapping[str, str]:
        count = race.num_scored
        if count < 2:
            return {}
        rows = np.array([race.incumbent[:count], *race.scores.values()])
        differences = rows[:, None] - rows[None]  # (better, worse, block)
        errors = differences.std(axis=2, ddof=1) / count**0.5
        is_better = differences.mean(axis=2) > errors * _quantile(1 - self.alpha, count - 1)
        beaten = is_better.any(axis=0)[1:]
        return {
            name: "worse in a t-test"
            for name, is_beaten in zip(race.scores, beaten, strict=True)
            if is_beaten
        }

    def most_calls(self, num_examples: int, num_candidates: int) -> int:
        return num_examples * num_candidates


POLICIES: dict[str, Callable[[], Pruner]] = {
    "full evaluation": ScoreAll,
    "ours (first decision after 30 examples)": lambda: Halving(first=1),
    "ours (first decision after 60 examples)": lambda: Halving(first=2),
    "ours with slack of 1 standard error": lambda: Halving(first=2, slack=1.0),
    "CAPO's paired t-test (0.2)": PairedTest,
    "CAPO's paired t-test (0.05)": lambda: PairedTest(0.05),
    "Optuna's MedianPruner": lambda: OptunaPruner(
        optuna.pruners.MedianPruner(n_startup_trials=1), interval=1
    ),
    "Optuna's SuccessiveHalvingPruner": lambda: OptunaPruner(
        optuna.pruners.SuccessiveHalvingPruner(), interval=1
    ),
    "Optuna's WilcoxonPruner (0.1)": lambda: OptunaPruner(
        optuna.pruners.WilcoxonPruner(p_threshold=0.1), interval=1
    ),
}
"""Name -> a new pruner."""


def race(scores: np.ndarray, pruner: Pruner, num_candidates: int = 8) -> tuple[int, int]:
    """Rounds of so many candidates, one after the other, over the rows of a matrix.

    Args:
        scores: (prompts, blocks); the first row is the student's prompt.
        pruner: Says who leaves.
        num_candidates: Candidates in a round.

    Returns:
        The chosen row, and how many blocks were scored.
    """
    rows = [[float(score) for score in row] for row in scores]
    num_blocks = len(rows[0])
    chosen, cost = 0, num_blocks
    for start in range(1, len(rows), num_candidates):
        alive = list(range(start, min(start + num_candidates, len(rows))))
        num_started, done = len(alive), 0
        for end in pruner.checkpoints(num_blocks, num_started):
            cost += len(alive) * (end - done)
            done = end
            seen = Race(rows[chosen], {str(row): rows[row][:end] for row in alive}, num_started, bounded=True)
            dropped = pruner.drop(seen)
            if end < num_blocks:
                alive = [row for row in alive if str(row) not in dropped]
            if not alive:
                break
        chosen = max(
            [chosen, *alive], key=lambda row: statistics.fmean(rows[row])
        )  # among equals the earlier
    return chosen, cost


@dataclass(frozen=True)
class Result:
    """The mean over orders of one run."""

    calls: float
    """Scored examples."""
    regret: float
    """What the best prompt of the run is better than the chosen one, on all blocks. All blocks were raced."""
    unseen: float
    """What the chosen prompt is better than the mean prompt, on the half of the blocks that was not raced."""


def replay(scores: np.ndarray, make: Callable[[], Pruner], num_orders: int, seed: int = 0) -> Result:
    """A policy on random orders of a run's prompts and blocks."""
    draws = random.Random(seed)
    calls, regrets, unseen = [], [], []
    for _ in range(num_orders):
        prompts = draws.sample(range(len(scores)), len(scores))
        blocks = draws.sample(range(scores.shape[1]), scores.shape[1])
        matrix = scores[prompts][:, blocks]
        chosen, cost = race(matrix, make())
        calls.append(BLOCK * cost)
        means = matrix.mean(axis=1)
        regrets.append(float(means.max() - means[chosen]))
        raced, kept = np.array_split(matrix, 2, axis=1)
        chosen, _ = race(raced, make())
        judged = kept.mean(axis=1)
        unseen.append(float(judged[chosen] - judged.mean()))
    return Result(*(statistics.fmean(values) for values in (calls, regrets, unseen)))


def complete_runs(path: str, least: int, blocks: int | None = None) -> Iterator[tuple[str, np.ndarray]]:
    """Key and complete rows of each run that has at least so many; a run that is published twice comes once.

    Args:
        path: The `.npz` file.
        least: Rows that a run must have.
        blocks: How many of the first blocks count; None for all.
    """
    known = set()
    with np.load(path) as arrays:
        for key in arrays.files:
            if key.startswith("steps/"):
                continue
            rows = arrays[key][:, :blocks]
            rows = rows[~np.isnan(rows).any(axis=1)]
            checksum = zlib.crc32(rows.tobytes())
            if len(rows) >= least and rows.shape[1] >= LEAST_BLOCKS and checksum not in known:
                known.add(checksum)
                yield key, rows


def table(
    runs: Sequence[tuple[str, np.ndarray]], num_orders: int, policies: Sequence[str] = tuple(POLICIES)
) -> Iterator[str]:
    """One line a policy: means over runs and their standard errors."""
    titles = ("policy", "scored examples", "share of full evaluation", "regret, points ±",
              "gain on unseen blocks, points ±", "more than full evaluation there, points ±")  # fmt: skip
    yield "| " + " | ".join(titles) + " |"
    yield "|---" * len(titles) + "|"
    full = [replay(rows, ScoreAll, num_orders, seed) for seed, (_, rows) in enumerate(runs)]
    for name in policies:
        results = [replay(rows, POLICIES[name], num_orders, seed) for seed, (_, rows) in enumerate(runs)]
        share = statistics.fmean(a.calls / b.calls for a, b in zip(results, full, strict=True))
        points = [[result.regret for result in results], [result.unseen for result in results]]
        points.append([a.unseen - b.unseen for a, b in zip(results, full, strict=True)])
        calls = statistics.fmean(result.calls for result in results)
        yield f"| {name} | {calls:.0f} | {share:.2f} | " + " | ".join(map(_mean, points)) + " |"


def spread(runs: Sequence[tuple[str, np.ndarray]]) -> str:
    """How hard the choice is."""
    prompts = statistics.fmean(len(rows) for _, rows in runs)
    deviation = 100 * statistics.fmean(float(rows.mean(axis=1).std()) for _, rows in runs)
    return f"{len(runs)} runs, {prompts:.0f} prompts a run; standard deviation between prompts {deviation:.1f} points."


def _mean(values: Sequence[float]) -> str:
    """Mean and standard error in points."""
    values = [100 * value for value in values]
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.fmean(values):.2f} ± {error:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", help="the .npz file")
    parser.add_argument(
        "--orders", type=int, default=20, help="random orders of the prompts and blocks of each run"
    )
    parser.add_argument("--least", type=int, default=9, help="complete rows that a run must have")
    parser.add_argument(
        "--blocks", type=int, nargs="+", default=[10, 5], help="a table for each number of blocks"
    )
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    for blocks in args.blocks:
        runs = list(complete_runs(args.path, args.least, blocks))
        if runs:
            print(f"## The first {blocks} blocks\n\n{spread(runs)}\n")
            for line in table(runs, args.orders, args.policies):
                print(line, flush=True)
            print()


if __name__ == "__main__":
    main()
