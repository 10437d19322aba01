"""DSPy's own optimizers in the simulated setting: `python benchmarks/peers.py --help`.

One rule: they run as released, with the settings named here and nothing patched.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import dspy
from simulation import Optimize, Setting, measure


def copro(setting: Setting, breadth: int = 7, depth: int = 4) -> dspy.Module:
    optimizer = dspy.COPRO(
        prompt_model=setting.proposer,
        metric=setting.task.metric,
        breadth=breadth,
        depth=depth,
        init_temperature=1.0,
    )
    return optimizer.compile(
        setting.task.student(),
        trainset=setting.trainset,
        eval_kwargs={"num_threads": setting.num_threads, "display_progress": False},
    )


def miprov2(setting: Setting, num_candidates: int = 12, num_trials: int = 24) -> dspy.Module:
    optimizer = dspy.MIPROv2(
        metric=setting.task.metric,
        prompt_model=setting.proposer,
        task_model=setting.scorer,
        auto=None,
        num_candidates=num_candidates,
        max_bootstrapped_demos=0,
        max_labeled_demos=0,
        num_threads=setting.num_threads,
        seed=setting.seed,
    )
    return optimizer.compile(
        setting.task.student(),
        trainset=setting.trainset,
        valset=setting.valset,
        num_trials=num_trials,
        max_bootstrapped_demos=0,
        max_labeled_demos=0,
        seed=setting.seed,
    )


def gepa(setting: Setting, max_metric_calls: int = 1680) -> dspy.Module:
    def metric(
        example: dspy.Example,
        prediction: dspy.Prediction,
        trace: object = None,
        pred_name: object = None,
        pred_trace: object = None,
    ) -> dspy.Prediction:
        score = setting.task.metric(example, prediction)
        feedback = "Right." if score else f"Wrong; the right answer is: {example.answer}"
        return dspy.Prediction(score=score, feedback=feedback)

    optimizer = dspy.GEPA(
        metric=metric,
        max_metric_calls=max_metric_calls,
        reflection_lm=setting.proposer,
        num_threads=setting.num_threads,
        seed=setting.seed,
    )
    return optimizer.compile(setting.task.student(), trainset=setting.trainset, valset=setting.valset)


PEERS: dict[str, Optimize] = {
    "COPRO": copro,
    "MIPROv2": miprov2,
    "GEPA-630": lambda setting: gepa(setting, 630),
    "GEPA-1680": lambda setting: gepa(setting, 1680),
}


def run_peer(name: str, **kwargs: object) -> dict[str, str | int | float]:
    """One run of a peer; the keywords are those of `simulation.measure`."""
    with quiet():
        return measure(name, PEERS[name], **kwargs)  # type: ignore[arg-type]


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the optimizers' own reports and progress bars out of the table."""
    for name in ("dspy", "gepa", "optuna", "LiteLLM"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with ExitStack() as stack:
        nowhere = stack.enter_context(Path(os.devnull).open("w"))
        stack.enter_context(redirect_stdout(nowhere))
        stack.enter_context(redirect_stderr(nowhere))
        yield


COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("wall_seconds", "wall s", "{:.0f}".format),
    ("scorer_calls", "scorer calls", "{:.0f}".format),
    ("proposer_calls", "proposer calls", "{:.0f}".format),
    ("utilization", "busy / (threads x wall)", "{:.2f}".format),
    ("quality", "quality", "{:.3f}".format),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument("--time-scale", type=float, default=1.0)
    args = parser.parse_args()
    print("| optimizer | seed | " + " | ".join(title for _, title, _ in COLUMNS) + " |")
    print("|---" * (len(COLUMNS) + 2) + "|")
    for name in args.peers:
        rows = [
            run_peer(name, seed=seed, num_threads=args.threads, time_scale=args.time_scale)
            for seed in range(args.seeds)
        ]
        for row in rows:
            print(
                f"| {name} | {row['seed']} | " + " | ".join(show(row[key]) for key, _, show in COLUMNS) + " |"
            )
        means = [show(statistics.fmean(float(row[key]) for row in rows)) for key, _, show in COLUMNS]
        print(f"| {name} | mean | " + " | ".join(means) + " |", flush=True)


if __name__ == "__main__":
    main()
