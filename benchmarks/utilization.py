"""How busy an optimizer keeps the LM server: `python benchmarks/utilization.py --help`.

One rule: all optimizers meet the same latencies, and the server's own clock says how busy it was. Run it on an idle
machine: a DSPy call takes about 3 ms of interpreter time, and whatever else runs on the cores delays it.
"""

from __future__ import annotations

import argparse
from typing import Any

from ours import opro
from peers import PEERS, quiet
from rows import Column, keep, load, table
from simulation import Optimize, measure

from dspy_opro.testing import Latency

SETTINGS: dict[str, dict[str, Any]] = {
    "16 threads": {"num_threads": 16},
    "64 threads": {"num_threads": 64, "scorer_latency": Latency(1.0, 0.6)},
    "slow proposer": {"num_threads": 16, "proposer_latency": Latency(8.0, 0.4)},
}
"""Setting -> what differs from scorer 0.4 s (sigma 0.6), proposer 3 s (sigma 0.4), median and lognormal."""

OURS: dict[str, dict[str, Any]] = {
    "OPRO": {"max_metric_calls": 1600},
    "OPRO, valset": {"max_metric_calls": 1600, "validates": True},
    "OPRO, heavy, valset": {"auto": "heavy", "validates": True},
    "OPRO, 8 candidates": {"max_metric_calls": 1600, "num_candidates": 8},
    "OPRO, 5,000 examples": {"max_metric_calls": 5000},
    "OPRO, 10,000 examples": {"max_metric_calls": 10_000},
}
"""Name in the table -> the options that are not defaults."""

OPTIMIZERS: dict[str, Optimize] = {
    **PEERS,
    **{name: lambda setting, o=options: opro(setting, **o) for name, options in OURS.items()},  # type: ignore[misc]
}

DEFAULT = ["COPRO", "MIPROv2", "GEPA-630", "OPRO", "OPRO, valset", "OPRO, heavy, valset"]

COLUMNS: tuple[Column, ...] = (
    ("wall_seconds", "wall s", "{:.0f}".format),
    ("scorer_calls", "scorer calls", "{:.0f}".format),
    ("proposer_calls", "proposer calls", "{:.0f}".format),
    ("utilization", "busy / (threads × wall)", "{:.2f}".format),
    ("quality", "quality ±", "{:.2f}".format),
    ("cpu_share", "interpreter busy", "{:.2f}".format),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=["16 threads"])
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=DEFAULT)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--time-scale", type=float, default=1.0, help="multiplies all latencies")
    parser.add_argument("--keep", metavar="FILE", help="append every run to this file, as JSON lines")
    parser.add_argument("--show", nargs="+", metavar="FILE", help="run nothing; tables of what was kept")
    args = parser.parse_args()
    rows = load(args.show) if args.show else []
    for setting in [] if args.show else args.settings:
        for seed in args.seeds:
            for name in args.optimizers:
                rows.append(run(setting, name, seed, args.time_scale))
                keep(args.keep, rows[-1])
    print(table(rows, ("setting", "optimizer"), COLUMNS))


def run(setting: str, name: str, seed: int, time_scale: float = 1.0) -> dict[str, Any]:
    """One run as a row."""
    with quiet():
        row = measure(name, OPTIMIZERS[name], seed=seed, time_scale=time_scale, **SETTINGS[setting])
    return {"setting": setting, **row}


if __name__ == "__main__":
    main()
