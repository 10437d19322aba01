"""How good are the instructions that each optimizer tries? `python benchmarks/proposals.py --help`.

`quality.py` judges what an optimizer returns: its proposals and its choice among them. This script judges the
proposals alone. It runs each optimizer as `quality.py` does, takes the first `--most` instructions that it tried, and
scores all of them on the same examples: the train and selection examples and the first 50 of the test. COPRO and
MIPROv2 list what they tried with the best first, so `--most` should be at least as many as they try. GEPA lists only
what it kept after a look at a few examples.

A run of an optimizer is one line in the store and is not repeated. An optimizer that fails ends the script.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import dspy
from quality import KEY, Measurement, add_arguments, chosen_tasks, measurement, missing, prepare
from quality_optimizers import OPTIMIZERS, instructions_of, with_instructions
from quality_tasks import Task
from rows import Row, keep, load

PROPOSING = ("OPRO", "COPRO", "MIPROv2", "GEPA")
NUM_TEST = 50


def tried(program: dspy.Module) -> list[dict[str, str]]:
    """The instructions that an optimizer tried for the program that it returned, without repetitions."""
    found: Iterable[Mapping[str, str]]
    if hasattr(program, "opro_result"):
        found = [trial.candidate.instructions for trial in program.opro_result.trials]
    elif hasattr(program, "detailed_results"):  # GEPA
        found = map(instructions_of, program.detailed_results.candidates)
    else:  # COPRO, MIPROv2
        found = [instructions_of(candidate["program"]) for candidate in program.candidate_programs]
    distinct = {tuple(sorted(each.items())): dict(each) for each in found}
    return list(distinct.values())


def measure(measured: Measurement, task: Task, optimizer: str, seed: int, most: int) -> Row:
    """One run as a row, with the scores of the student and of each of the first proposals."""
    trainset, valset, testset = task.split(seed, measured.sizes)
    examples = [*testset[:NUM_TEST], *trainset, *valset]
    student = instructions_of(task.student())
    with dspy.context(lm=measured.model, adapter=dspy.JSONAdapter()):
        program = measured.optimize(task, optimizer, seed, task.metric)
        texts = [student, *[each for each in tried(program) if each != student][:most]]
        scores = [measured.test(with_instructions(task.student(), each), task, examples) for each in texts]
    pairs = [{"instructions": text, "scores": own} for text, own in zip(texts, scores, strict=True)]
    return {**measured.key(task.name, optimizer, seed), "most": most, "tried": pairs}


def table(rows: Iterable[Row]) -> str:
    """One line for each task and optimizer: the gains of its proposals over the student, in points."""
    titles = [
        "task",
        "optimizer",
        "runs",
        "proposals",
        "mean gain, points ±",
        "standard deviation",
        "best",
        "better",
    ]
    lines = [titles, ["---"] * len(titles)]
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["task"], row["optimizer"]), []).append(row)
    for (task, optimizer), group in groups.items():
        gains = [gain for row in group for gain in gains_of(row["tried"])]
        spread = statistics.stdev(gains) if len(gains) > 1 else 0.0
        lines.append([task, optimizer, str(len(group)), str(len(gains)),
                      f"{statistics.fmean(gains):+.1f} ± {spread / len(gains) ** 0.5:.1f}", f"{spread:.1f}",
                      f"{max(gains):+.1f}", f"{sum(gain > 0 for gain in gains)}"])  # fmt: skip
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def gains_of(pairs: Sequence[Mapping[str, Any]]) -> list[float]:
    """What each proposal scores more than the student, in points. An answer that can't be parsed has the score 0."""
    student, *others = (100 * statistics.fmean(score or 0.0 for score in pair["scores"]) for pair in pairs)
    return [other - student for other in others]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--optimizers", nargs="+", choices=sorted(OPTIMIZERS), default=list(PROPOSING))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--most", type=int, default=12, help="proposals of a run that are scored")
    parser.add_argument("--store", type=Path, default=Path(__file__).parent / "results" / "proposals.jsonl")
    parser.add_argument("--show", action="store_true", help="run nothing; the table of the store")
    args = parser.parse_args()
    stored = load([str(args.store)]) if args.store.exists() else []
    if not args.show:
        prepare(args)
        measured, found = measurement(args), chosen_tasks(args)
        make = cache(lambda name: found[name]())
        keys = [
            {**measured.key(task, optimizer, seed), "most": args.most}
            for task in found for seed in args.seeds for optimizer in args.optimizers
        ]  # fmt: skip
        for key in missing(stored, keys, (*KEY, "most")):
            row = measure(measured, make(key["task"]), key["optimizer"], key["seed"], args.most)
            keep(str(args.store), row)
            stored.append(row)
    print(table(stored))


if __name__ == "__main__":
    main()
