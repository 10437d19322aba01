"""What a run says it gained against what it truly gained: `python benchmarks/honesty.py --help`.

One rule: the truth is the closed form that the task itself gives, no sample. The search is the real one, asked and
answered directly: what it does depends on the answers alone, so that neither threads nor time are needed. What is kept
of a run is the evidence that its last word rests on: a change of the rule in `search/confidence.py` needs no new runs.

"interval covers" is a share of the runs. "expected" is what that share is on average over all draws of the fresh
examples, exactly computed from what the student and the best candidate truly are.
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from rows import Row, keep, load

from dspy_opro.compile import Job
from dspy_opro.config.arguments import make_config
from dspy_opro.search.confidence import compare, paired_interval
from dspy_opro.search.reserve import FEWEST_FRESH
from dspy_opro.search.search import Search
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
    row = dict(zip(KEY, (landscape, setting, confirm, num_train, num_val, seed), strict=True))
    row |= {"calls": num_calls, "proposals": num_proposals}
    if search.gain is None:  # the best one is the student
        return row
    student, best = search.trajectory.trials[0], search.chosen
    before, after = (
        task.true_quality(next(iter(t.candidate.instructions.values()))) for t in (student, best)
    )
    return {**row, "best_true": after - before, **evidence(search)}


def evidence(search: Search) -> dict[str, Any]:
    """What the search's last word rests on, so that another rule can be tried on the same runs."""
    student, best = search.trajectory.trials[0], search.chosen
    on_valset = best.valset_score is not None
    pairs = [search.outcomes(trial.candidate, "unseen") for trial in (student, best)]
    tried = [t for t in search.trajectory.trials[1:] if not on_valset or t.valset_score is not None]
    share = 1.0 if on_valset else statistics.fmean(t.num_scored for t in tried) / search.plan.num_train
    searched = (student.valset_scores, best.valset_scores) if on_valset else (student.scores, best.scores)
    return {
        "search": counts(*searched),
        "num_tried": len(tried),
        "share": share,
        "fresh": counts(*([outcome.score for outcome in side if outcome] for side in pairs)),
        "said": search.gain.value if search.gain else 0.0,
    }


def counts(student: Sequence[float], candidate: Sequence[float]) -> tuple[int, int, int]:
    """Pairs that the candidate wins, that it loses, and that are equal."""
    signs = [(c > s) - (c < s) for s, c in zip(student, candidate, strict=True)]
    return signs.count(1), signs.count(-1), signs.count(0)


def differences(wins: int, losses: int, equal: int) -> list[float]:
    return [1.0] * wins + [-1.0] * losses + [0.0] * equal


def judged(row: Row) -> Row:
    """A row with what the rule makes of its evidence."""
    row = {"best_true": 0.0, "fresh": (0, 0, 0), **row}
    if "search" not in row:
        return {**row, "num_fresh": 0, "told": 0.0, "true": 0.0, "returned": False, "covered": None}
    fresh = differences(*row["fresh"])
    fresh = fresh if len(fresh) >= FEWEST_FRESH else []
    better, told, interval = compare(differences(*row["search"]), row["num_tried"], fresh, share=row["share"])
    covered = interval.low - 1e-9 <= row["best_true"] <= interval.high + 1e-9
    if not row["confirm"]:
        wins, losses, _ = row["search"]
        better, told, covered = True, (wins - losses) / sum(row["search"]), None
    true = row["best_true"] if better else 0.0
    return {
        **row,
        "num_fresh": len(fresh),
        "told": told,
        "true": true,
        "returned": better,
        "covered": covered,
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


@cache
def chances(landscape: str, gain: float) -> tuple[float, float]:
    """How probable it is that a candidate with this true gain wins a pair, and that it loses one."""
    task, steps = LANDSCAPES[landscape](0), 2000

    def right(quality: float) -> list[float]:
        """By difficulty of the item."""
        room = (quality - (1 - task.noise) * (step + 0.5) / steps for step in range(steps))
        return [min(1.0, max(0.0, r / task.noise)) for r in room]

    before, (low, high) = right(task.base), (-0.2, 1.5)  # qualities that the candidate's lies between
    for _ in range(40):
        middle = (low + high) / 2
        too_low = _mean(right(middle)) - _mean(before) < gain
        low, high = (middle, high) if too_low else (low, middle)
    after = before if gain == 0.0 else right(high)
    pairs = list(zip(before, after, strict=True))
    return _mean((1 - b) * a for b, a in pairs), _mean(b * (1 - a) for b, a in pairs)


@cache
def intervals(count: int) -> list[tuple[int, int, float, float]]:
    """Wins and losses among so many pairs, and the interval's ends."""
    outcomes = [(wins, losses) for wins in range(count + 1) for losses in range(count + 1 - wins)]
    found = [paired_interval(differences(wins, losses, count - wins - losses)) for wins, losses in outcomes]
    return [(*outcome, i.low, i.high) for outcome, i in zip(outcomes, found, strict=True)]


@cache
def coverage(landscape: str, gain: float, count: int) -> float:
    """The probability that the interval of so many fresh pairs holds the true gain."""
    won, lost = chances(landscape, gain)
    equal, total = max(0.0, 1 - won - lost), 0.0
    for wins, losses, low, high in intervals(count):
        if low - 1e-9 <= won - lost <= high + 1e-9:
            ways = math.comb(count, wins) * math.comb(count - wins, losses)
            total += ways * won**wins * lost**losses * equal ** (count - wins - losses)
    return total


def table(rows: Iterable[Row]) -> str:
    """One line for each group of runs."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in map(judged, rows):
        groups.setdefault(tuple(row[key] for key in KEY[:-1]), []).append(row)
    titles = [*KEY[:-1], "runs", "calls", "fresh", "returned", "truly worse", "told", "true", "told - true",
              "true gain of the best", "interval covers", "expected"]  # fmt: skip
    lines = [titles, ["---"] * len(titles)]
    for values, group in groups.items():
        covered = [row["covered"] for row in group if row["covered"] is not None]
        fresh = [row for row in group if row["num_fresh"]]
        expected = [coverage(row["landscape"], round(row["best_true"], 6), row["num_fresh"]) for row in fresh]
        lines.append([
            *map(str, values),
            str(len(group)),
            f"{_mean(row['calls'] for row in group):.0f}",
            f"{_mean(row['num_fresh'] for row in group):.0f}",
            f"{_mean(row['returned'] for row in group):.0%}",
            f"{_mean(row['true'] < 0 for row in group):.1%}",
            _points([row["told"] for row in group]),
            _points([row["true"] for row in group]),
            f"{100 * _mean(row['told'] - row['true'] for row in group):+.1f}",
            _points([row["best_true"] for row in group]),
            f"{_mean(covered):.1%} of {len(covered)}" if covered else "",
            f"{_mean(expected):.1%}" if expected else "",
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
