"""Quality of the result against scorer calls: `python benchmarks/search_efficiency.py --help`.

One rule: every point is a whole run that was given so many calls and no more, through DSPy and HTTP, with servers
that answer at once; quality is the true probability of a right answer under the instruction that came out.
There is one table for each signal: the task as it is, and one with the small differences that real prompts show.
`--rehearse` leaves DSPy, HTTP and the peers out, for many seeds in little time.
"""

from __future__ import annotations

import argparse
import logging
import statistics
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import optuna
from ours import opro
from peers import PEERS, quiet
from rehearsal import rehearse
from rows import Column, Row, keep, load, table
from simulation import SIGNALS, measure

BUDGETS = (210, 320, 430, 560, 770, 1100, 1600)

ABLATION: dict[str, dict[str, Any]] = {
    "all in full": {"pruner": None},
    "Wilcoxon (p = 0.1)": {"pruner": optuna.pruners.WilcoxonPruner(p_threshold=0.1), "minibatch_size": 5},
    "valset": {"validates": True},
    "no confirmation": {"confirm": False},
    "no lag": {"lag": 0},
    "8 candidates": {"num_candidates": 8},
    "k_best=8": {"k_best": 8},
}
"""Variant -> what differs from the defaults."""

COLUMNS: tuple[Column, ...] = (
    ("scorer_calls", "scorer calls", "{:.0f}".format),
    ("proposer_calls", "proposer calls", "{:.0f}".format),
    ("quality", "quality ±", "{:.3f}".format),
    ("gain", "gain ±", "{:+.3f}".format),
)


def run(
    optimizer: str, seed: int, budget: int | None, rehearsed: bool, signal: str, **options: Any
) -> dict[str, Any]:
    """One run as a row; `budget` None for a peer, which has its own."""
    with quiet():
        if rehearsed:
            row = vars(rehearse(seed, signal=signal, max_metric_calls=budget, **options)).copy()
        elif budget is None:
            row = measure(optimizer, PEERS[optimizer], seed=seed, time_scale=0.0, signal=signal)
        else:
            row = measure(
                optimizer,
                lambda setting: opro(setting, max_metric_calls=budget, **options),
                seed=seed,
                time_scale=0.0,
                signal=signal,
            )
    return {**row, "optimizer": optimizer, "seed": seed, "budget": budget or "", "signal": signal}


def calls_for(quality: float, ours: Sequence[tuple[float, float]]) -> float | None:
    """The calls at which the line through (calls, quality) of our runs first reaches a quality."""
    for (calls, before), (more, after) in pairwise(ours):
        if before >= quality:
            return calls
        if after >= quality:
            return calls + (more - calls) * (quality - before) / (after - before)
    return None


def comparison(rows: Iterable[Row]) -> str:
    """Per peer: its calls and quality, and what ours takes for that quality."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["optimizer"], str(row["budget"])), []).append(row)
    means = {key: [statistics.fmean(float(r[name]) for r in group) for name in ("scorer_calls", "quality")]
             for key, group in groups.items()}  # fmt: skip
    ours = sorted((calls, quality) for (name, _), (calls, quality) in means.items() if name == "OPRO")
    lines = ["| optimizer | scorer calls | quality | calls of OPRO for it | share |", "|---|---|---|---|---|"]
    for (name, _), (calls, quality) in means.items():
        if name in PEERS:
            needed = calls_for(quality, ours)
            shown = "more than tried | " if needed is None else f"{needed:.0f} | {needed / calls:.2f}"
            lines.append(f"| {name} | {calls:.0f} | {quality:.3f} | {shown} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--signals", nargs="+", choices=SIGNALS, default=list(SIGNALS))
    parser.add_argument("--budgets", type=int, nargs="*", default=list(BUDGETS))
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--ablation", nargs="*", choices=ABLATION, default=list(ABLATION))
    parser.add_argument("--ablation-budgets", type=int, nargs="+", default=[560, 1600])
    parser.add_argument("--rehearse", action="store_true", help="virtual time, without HTTP and peers")
    parser.add_argument("--keep", metavar="FILE", help="append every run to this file, as JSON lines")
    parser.add_argument("--show", nargs="+", metavar="FILE", help="run nothing; tables of what was kept")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    jobs: list[tuple[str, int | None, dict[str, Any]]] = [("OPRO", budget, {}) for budget in args.budgets]
    jobs += [(f"OPRO, {n}", b, ABLATION[n]) for n in args.ablation for b in args.ablation_budgets]
    jobs += [] if args.rehearse else [(name, None, {}) for name in args.peers]
    rows: list[Row] = load(args.show) if args.show else []
    for signal in [] if args.show else args.signals:
        for name, budget, options in jobs:
            for seed in range(args.seeds):
                rows.append(run(name, seed, budget, args.rehearse, signal, **options))
                keep(args.keep, rows[-1])
    for signal in dict.fromkeys(row["signal"] for row in rows):
        shown = [row for row in rows if row["signal"] == signal]
        print(
            f"## {signal} signal\n\n{table(shown, ('optimizer', 'budget'), COLUMNS)}\n\n{comparison(shown)}\n"
        )


if __name__ == "__main__":
    main()
