"""What a run says it gained against what it truly gained: `python benchmarks/honesty.py --help`.

One rule: the truth is the closed form that the task itself gives, no sample. The search is the real one, asked and
answered directly: what it does depends on the answers alone, so that neither threads nor time are needed.
"""

from __future__ import annotations

import argparse
import logging
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rows import Row, keep, load

from dspy_opro.compile import Job
from dspy_opro.config.arguments import make_config
from dspy_opro.search.tasks import ProposalTask, ScoringTask, TaskResult, urgency
from dspy_opro.search.trajectory import Outcome, Usage
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
KEY = ("landscape", "setting", "confirm", "num_train", "num_val", "seed")


def run(
    landscape: str, setting: str, seed: int, confirm: bool = True, num_train: int = 60, num_val: int = 0
) -> dict[str, Any]:
    """One run as a row; gains are differences of probabilities."""
    task = LANDSCAPES[landscape](seed)
    options: dict[str, Any] = {"auto": setting}
    if setting.isdigit():
        options = {"auto": None, "max_metric_calls": int(setting)}
    values = {
        "metric": task.metric,
        "trainset": task.trainset(num_train),
        "valset": task.valset(num_val) or None,
        "prompt_model": ScriptedLM(task.proposer, keep_calls=False),
        "task_model": ScriptedLM(task.scorer),
        "seed": seed,
        "display_progress": False,
        "confirm": confirm,
    }
    job = Job(make_config({**values, **options}), task.student())
    try:
        num_calls, num_proposals = answer(job, task)
    finally:
        job.close()
    search = job.queue.search
    student, best, gain = search.trajectory.trials[0], search.trajectory.best, search.gain
    row = dict(zip(KEY, (landscape, setting, confirm, num_train, num_val, seed), strict=True))
    row |= {"calls": num_calls, "proposals": num_proposals, "num_fresh": 0, "covered": None}
    row |= {"said": 0.0, "true": 0.0, "best_true": 0.0, "returned": False}
    if gain is None:  # the best one is the student
        return row
    before, after = (
        task.true_quality(next(iter(t.candidate.instructions.values()))) for t in (student, best)
    )
    true, interval, returned = after - before, gain.interval, search.returned.id == best.id
    return {
        **row,
        "num_fresh": interval.num_examples if interval.basis == "fresh" else 0,
        "said": gain.value if confirm else gain.candidate_score - gain.student_score,
        "true": true if returned else 0.0,
        "best_true": true,
        "low": interval.low,
        "high": interval.high,
        "basis": interval.basis,
        "returned": returned,
        "covered": interval.low - 1e-9 <= true <= interval.high + 1e-9,
    }


def answer(job: Job, task: VocabularyTask) -> tuple[int, int]:
    """Run the search of a job to its end: the examples that it scored, and the proposals that it asked for."""
    search, waiting, counts = job.queue.search, [], [0, 0]
    while not search.done:
        waiting += search.next_tasks()
        waiting.sort(key=urgency)
        work = waiting.pop(0)
        if not search.wants(work):
            continue
        counts[isinstance(work, ProposalTask)] += 1
        result = job.writer.write(work) if isinstance(work, ProposalTask) else outcome(job, task, work)
        search.tell(work, result)
    return counts[0], counts[1]


def outcome(job: Job, task: VocabularyTask, work: ScoringTask) -> TaskResult:
    """What the task answers, without a program."""
    (instruction,) = work.candidate.instructions.values()
    example = job.inputs.splits[work.split][work.position]
    item = example.question.removeprefix("Which code belongs to item ").removesuffix("?")
    right = task.is_right(instruction, item)
    said = f"answer: {task.answer(item) if right else 'code unknown'}"
    return TaskResult(Outcome(float(right), said), Usage(metric_calls=1))


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
