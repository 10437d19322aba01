"""What a run says it gained against what it truly gained: `python benchmarks/honesty.py --help`.

One rule: the truth is the closed form that the task itself gives, no sample. The search is the real one, asked and
answered directly: what it does depends on the answers alone, so that neither threads nor time are needed.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dspy_opro.racing import affordable_examples
from dspy_opro.setup import Setup, set_up
from dspy_opro.trajectory import Outcome
from dspy_opro.work import Ask, Block
from rows import Row, keep, load

from dspy_opro.config import make_config
from dspy_opro.search.confidence import judge
from dspy_opro.search.reserve import held_back, num_pairs
from dspy_opro.testing import ScriptedLM, VocabularyTask

LANDSCAPES: Mapping[str, Callable[[int], VocabularyTask]] = {
    "strong": VocabularyTask,
    "coin": lambda seed: VocabularyTask(seed, signal=0.0, noise=1.0, base=0.5),
    "real": lambda seed: VocabularyTask(seed, signal=0.3, noise=0.15),
    "flat": lambda seed: VocabularyTask(seed, base=0.6, gain=0.005, loss=0.02),
}
"""The task as it is; a metric that means nothing; the signal of language models; instructions that hardly matter."""

SETTINGS = ("200", "600", "1600", "light", "medium", "heavy")
"""Values of `max_metric_calls`, and presets."""
MOST_EXAMPLES = {"light": 100, "medium": 300, "heavy": 1000}
KEY = ("landscape", "setting", "confirm", "num_train", "num_val", "seed")


def run(
    landscape: str, setting: str, seed: int, confirm: bool = True, num_train: int = 60, num_val: int = 0
) -> dict[str, Any]:
    """One run as a row; gains are differences of probabilities."""
    task, budget = LANDSCAPES[landscape](seed), int(setting) if setting.isdigit() else None
    wanted = MOST_EXAMPLES[setting] if budget is None else affordable_examples(budget)
    data = num_val or num_train  # what decides
    reserved = held_back(data, data if num_val else min(data, wanted), budget) if confirm else 0
    options: dict[str, Any] = {"auto": setting}
    if budget is not None:
        options = {"auto": None, "max_metric_calls": budget - 2 * reserved}
    sizes = (num_train, num_val - reserved) if num_val else (num_train - reserved, 0)
    setup, num_calls, num_proposals = search(task, seed, *sizes, **options)
    split = "val" if num_val else "train"
    used = sizes[1] if num_val else setup.search.plan.num_train
    left = None if budget is None else budget - num_calls
    pairs = num_pairs(reserved, data - used, left) if confirm else 0
    trajectory = setup.search.trajectory
    student, best = trajectory.trials[0], trajectory.best
    row = dict(zip(KEY, (landscape, setting, confirm, num_train, num_val, seed), strict=True))
    row |= {"calls": num_calls, "proposals": num_proposals, "num_full": used, "num_fresh": pairs}
    row |= {"said": 0.0, "true": 0.0, "best_true": 0.0, "returned": False, "covered": None, "naive": 0.0}
    if best.id == student.id:
        return row
    texts = [next(iter(t.candidate.instructions.values())) for t in (student, best)]

    def differences(items: Iterable[str]) -> list[float]:
        return [float(task.is_right(texts[1], item)) - task.is_right(texts[0], item) for item in items]

    order = setup.inputs.orders[split]
    searched = differences(f"{split}-{order[position]}" for position in range(used))
    tried = [t for t in trajectory.trials[1:] if not num_val or t.valset_score is not None]
    share = 1.0 if num_val else statistics.fmean(t.num_scored for t in tried) / used
    # Which untouched examples is all the same here: items are drawn independently.
    fresh = differences(f"fresh-{number}" for number in range(pairs))
    verdict = judge(searched, len(tried), fresh, share=share)
    gain, interval = task.true_quality(texts[1]) - task.true_quality(texts[0]), verdict.interval
    naive = statistics.fmean(searched)
    returned = verdict.is_better or not confirm
    return {
        **row,
        "calls": num_calls + 2 * pairs,
        "said": verdict.gain if confirm else naive,
        "true": gain if returned else 0.0,
        "best_true": gain,
        "naive": naive,
        "fresh": interval.estimate,
        "low": interval.low,
        "high": interval.high,
        "basis": interval.basis,
        "returned": returned,
        "covered": interval.low - 1e-9 <= gain <= interval.high + 1e-9,
    }


def search(
    task: VocabularyTask, seed: int, num_train: int, num_val: int, **options: Any
) -> tuple[Setup, int, int]:
    """A search to its end, the examples that it scored, and the proposals that it asked for."""
    values = {
        "metric": task.metric,
        "trainset": task.trainset(num_train),
        "valset": task.valset(num_val) or None,
    }
    values |= {
        "prompt_model": ScriptedLM(task.proposer, keep_calls=False),
        "task_model": ScriptedLM(task.scorer),
    }
    values |= {"seed": seed, "display_progress": False}
    setup = set_up(make_config({**values, **options}), task.student(), is_async=False)
    try:
        return setup, *asyncio.run(_answer(setup, task))
    finally:
        setup.close()


async def _answer(setup: Setup, task: VocabularyTask) -> tuple[int, int]:
    num_calls = num_proposals = 0
    while not setup.search.done and (work := setup.search.next()) is not None:
        if isinstance(work, Ask):
            num_proposals += 1
            proposal, _ = await setup.executor.propose(work)
            setup.search.tell_proposal(work, proposal)
        else:
            num_calls += work.stop - work.start
            outcomes = [_outcome(setup, task, work, position) for position in range(work.start, work.stop)]
            setup.search.tell_block(work, outcomes)
    return num_calls, num_proposals


def _outcome(setup: Setup, task: VocabularyTask, block: Block, position: int) -> Outcome:
    (instruction,) = block.candidate.instructions.values()
    item = f"{block.split}-{setup.inputs.orders[block.split][position]}"
    right = task.is_right(instruction, item)
    return Outcome(float(right), f"answer: {task.answer(item) if right else 'code unknown'}")


def table(rows: Iterable[Row]) -> str:
    """One line for each group of runs."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in KEY[:-1]), []).append(row)
    titles = [*KEY[:-1], "runs", "calls", "fresh", "returned", "truly worse", "told", "true", "told - true",
              "true gain of the best", "interval covers"]  # fmt: skip
    lines = [titles, ["---"] * len(titles)]
    for values, group in groups.items():
        covered = [row["covered"] for row in group if row["covered"] is not None]
        lines.append([
            *map(str, values),
            str(len(group)),
            f"{_mean(row['calls'] for row in group):.0f}",
            f"{_mean(row['num_fresh'] for row in group):.0f}",
            f"{_mean(row['returned'] for row in group):.0%}",
            f"{_mean(row['true'] < 0 for row in group):.1%}",
            _points([row["said"] for row in group]),
            _points([row["true"] for row in group]),
            f"{100 * _mean(row['said'] - row['true'] for row in group):+.1f}",
            _points([row["best_true"] for row in group]),
            f"{_mean(covered):.1%} of {len(covered)}" if covered else "",
        ])  # fmt: skip
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(map(float, values))


def _points(values: Sequence[float]) -> str:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return f"{100 * statistics.fmean(values):+.1f} ± {100 * error:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--landscapes", nargs="+", choices=LANDSCAPES, default=list(LANDSCAPES))
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--seeds", type=int, nargs=2, default=[1000, 1100], metavar=("FIRST", "END"),
                        help="0 to 99 are those on which the rule was chosen")  # fmt: skip
    parser.add_argument("--train", type=int, default=60, help="train examples")
    parser.add_argument("--val", type=int, default=0, help="validation examples")
    parser.add_argument(
        "--without", action="store_true", help="nothing is held back and the best is returned"
    )
    parser.add_argument(
        "--keep", metavar="FILE", help="append every run to this file; those in it are not run again"
    )
    parser.add_argument("--show", nargs="+", metavar="FILE", help="run nothing; the table of what was kept")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    if args.show:
        print(table(load(args.show)))
        return
    known = load([args.keep]) if args.keep and Path(args.keep).exists() else []
    done = {tuple(row[key] for key in KEY): row for row in known}
    rows = []
    for landscape in args.landscapes:
        for setting in args.settings:
            for seed in range(*args.seeds):
                key = (landscape, setting, not args.without, args.train, args.val, seed)
                if key not in done:
                    done[key] = run(landscape, setting, seed, not args.without, args.train, args.val)
                    keep(args.keep, done[key])
                rows.append(done[key])
    print(table(rows))


if __name__ == "__main__":
    main()
