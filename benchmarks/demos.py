"""What a search for demos is worth: `python benchmarks/demos.py`, and `... --published FOLDER` for real prompts.

One rule: instructions alone and instructions with demos have the same budget, the same data and the same seeds.

The first table is simulated, as in `rehearsal.py`: it is known what the returned program truly gained.

The other one is of real language models. CAPO's authors published the test scores of real prompts with up to five demos
(arXiv 2504.16005, github.com/finitearth/capo). FOLDER is a clone of that repository.
"""

from __future__ import annotations

import argparse
import csv
import logging
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rehearsal import Demos, rehearse
from rows import Row, keep, load, table

SEARCHES: Mapping[str, Demos | None] = {
    "instructions alone": None,
    "demos too, which harm": Demos(-0.06, 0.04),
    "demos too, which change nothing": Demos(),
    "demos too, half of which harm": Demos(0.0, 0.04),
    "demos too, which help a little": Demos(0.05, 0.04),
    "demos too, which help much": Demos(0.15, 0.05),
}
"""What is searched, and what a set of demos adds to the quality of an instruction."""
KEY = "search", "budget", "seed"


def run(search: str, budget: int, seed: int) -> Row:
    """One run, and what it truly gained."""
    demos = SEARCHES[search]
    most: dict[str, Any] = {"max_bootstrapped_demos": 4, "max_labeled_demos": 4}
    found = rehearse(
        seed, num_examples=100, signal="real", max_metric_calls=budget,
        **({} if demos is None else {"demos": demos, **most}),
    )  # fmt: skip
    shares = {"worse": 100 * (found.gain < 0), "demos": 100 * found.has_demos}
    return {"search": search, "budget": budget, "seed": seed, "gain": 100 * found.gain, **shares}


def simulated(rows: Iterable[Row]) -> str:
    columns = [
        ("gain", "gain, points ±", "{:.1f}".format),
        ("worse", "worse than the student, %", "{:.0f}".format),
        ("demos", "has demos, %", "{:.0f}".format),
    ]
    return table(rows, KEY[:-1], columns)


class Prompt(NamedTuple):
    """A prompt of CAPO's runs."""

    instruction: str
    demos: tuple[str, ...]


def published(folder: Path) -> dict[tuple[str, str], dict[Prompt, float]]:
    """Data set and model -> prompt -> its score on the test examples.

    A prompt is an instruction and its demos, each after an empty line and "Input:".
    """
    csv.field_size_limit(sys.maxsize)
    found: dict[tuple[str, str], dict[Prompt, float]] = defaultdict(dict)
    for path in sorted(folder.glob("results/*_results/*/*/CAPO*/**/*eval.csv")):
        data, model = path.relative_to(folder).parts[2:4]
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                instruction, *demos = row["prompt"].split("\n\nInput:")
                answered = tuple(demo for demo in demos if demo.partition("Output:")[2].strip())
                if row["test_score"]:
                    found[data, model].setdefault(
                        Prompt(instruction.strip(), answered), float(row["test_score"])
                    )
    return found


def of_real_prompts(folder: Path) -> str:
    """What demos add to the same instruction, and how much sets of demos differ under it."""
    titles = (
        "data", "model", "instructions with and without demos", "demos add, points ±",
        "standard deviation of the sets, points", "degrees of freedom",
    )  # fmt: skip
    lines: list[Sequence[str]] = [titles, ["---"] * len(titles)]
    for (data, model), prompts in sorted(published(folder).items()):
        scores: dict[str, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
        for prompt, score in prompts.items():
            scores[prompt.instruction][bool(prompt.demos)].append(100 * score)
        added = [
            statistics.fmean(few) - statistics.fmean(zero) for zero, few in scores.values() if zero and few
        ]
        freedom = sum(max(0, len(few) - 1) for _, few in scores.values())
        squares = sum(statistics.variance(few) * (len(few) - 1) for _, few in scores.values() if len(few) > 1)
        spread = f"{(squares / freedom) ** 0.5:.1f}" if freedom else ""
        lines.append([data, model, str(len(added)), _mean(added), spread, str(freedom)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _mean(values: list[float]) -> str:
    if not values:
        return ""
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):+.1f}{error}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budgets", type=int, nargs="+", default=[300, 640, 1600])
    parser.add_argument("--seeds", type=int, nargs=2, default=[0, 32], metavar=("FIRST", "END"))
    parser.add_argument(
        "--keep", metavar="FILE", help="append every run to this file; those in it are not run again"
    )
    parser.add_argument(
        "--published", type=Path, metavar="FOLDER", help="a clone of finitearth/capo; simulates nothing"
    )
    args = parser.parse_args()
    if args.published is not None:
        print(of_real_prompts(args.published))
        return
    logging.disable(logging.WARNING)
    known = load([args.keep]) if args.keep and Path(args.keep).exists() else []
    done = {tuple(row[name] for name in KEY): row for row in known}
    keys = [
        (search, budget, seed)
        for budget in args.budgets for search in SEARCHES for seed in range(*args.seeds)
    ]  # fmt: skip
    for key in keys:
        if key not in done:
            done[key] = run(*key)
            keep(args.keep, done[key])
    print(simulated(done[key] for key in keys))


if __name__ == "__main__":
    main()
