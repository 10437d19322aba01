"""What the library itself costs, with an LM that answers at once: `python benchmarks/overhead.py --help`.

One rule: costs are CPU seconds of this process (all threads), taken in turns with what they are compared with, so
that other work on the machine falls on both.
"""

from __future__ import annotations

import argparse
import gc
import logging
import resource
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count

import dspy
from dspy.clients.base_lm import GLOBAL_HISTORY

from dspy_opro import OPROTeleprompter
from dspy_opro.programs.evaluator import ONE_EXAMPLE
from dspy_opro.search import Search
from dspy_opro.search.pruners import Halving
from dspy_opro.search.tasks import Plan, Proposal, ProposalTask, TaskResult
from dspy_opro.search.trajectory import Candidate, Outcome
from dspy_opro.testing import LMCall, ScriptedLM

_numbers = count()


def scorer(call: LMCall) -> Mapping[str, str]:
    """Right in half of the cases, at once."""
    return {"answer": "yes" if hash(call.user) % 2 else "no"}


def proposer(call: LMCall) -> Mapping[str, str]:
    """Something new each time."""
    return {"instruction": f"Answer with yes or no, variant {next(_numbers)}."}


def exact(example: dspy.Example, prediction: dspy.Prediction, trace: object = None) -> float:
    return float(example.answer == prediction.answer)


def data(size: int) -> list[dspy.Example]:
    return [
        dspy.Example(question=f"Question {n}?", answer="yes").with_inputs("question") for n in range(size)
    ]


@contextmanager
def language_model() -> Iterator[ScriptedLM]:
    """The scorer as DSPy's LM, without caches: every call is made."""
    dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=False)
    lm = ScriptedLM(scorer, keep_calls=False)
    with dspy.context(lm=lm):
        yield lm


# -- per example ---------------------------------------------------------------------------------


def bare(examples: list[dspy.Example], num_threads: int) -> None:
    program = dspy.Predict("question -> answer")
    for example in examples:
        exact(example, program(**example.inputs()))


def evaluate(examples: list[dspy.Example], num_threads: int) -> None:
    dspy.Evaluate(devset=examples, metric=exact, num_threads=num_threads, display_progress=False)(
        dspy.Predict("question -> answer")
    )


def opro(examples: list[dspy.Example], num_threads: int, num_rounds: int = 0) -> dspy.Module:
    """A run that scores every candidate in full; without rounds it is the student alone, as in the other two."""
    teleprompter = OPROTeleprompter(
        metric=exact,
        prompt_model=ScriptedLM(proposer, keep_calls=False),
        auto=None,
        **({"num_rounds": num_rounds} if num_rounds else {"max_metric_calls": len(examples)}),
        pruner=None,
        num_threads=num_threads,
        display_progress=False,
        track_stats=False,
    )
    return teleprompter.compile(dspy.Predict("question -> answer"), trainset=examples)


def per_example(size: int, repeats: int, num_threads: int) -> None:
    """CPU per scored example: a bare loop, `dspy.Evaluate` and ours, one after the other, several times."""
    examples, seconds = data(size), {"bare loop": [], "dspy.Evaluate": [], "OPRO": []}  # name -> per repeat
    runs: dict[str, Callable[[list[dspy.Example], int], object]] = {
        "bare loop": bare, "dspy.Evaluate": evaluate, "OPRO": opro
    }  # fmt: skip
    with language_model():
        for function in runs.values():
            function(examples[:20], num_threads)
        for _ in range(repeats):
            for name, function in runs.items():
                start = time.process_time()
                function(examples, num_threads)
                seconds[name].append(time.process_time() - start)
    print(f"\n{size} examples, {num_threads} threads, median of {repeats} turns\n")
    print("| | ms of CPU per example | times dspy.Evaluate, turn by turn |\n|---|---|---|")
    for name, values in seconds.items():
        ratios = [a / b for a, b in zip(values, seconds["dspy.Evaluate"], strict=True)]
        print(f"| {name} | {1e3 * statistics.median(values) / size:.2f} | {_spread(ratios)} |")


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


# -- growth --------------------------------------------------------------------------------------


def growth_in_trials(sizes: list[int], num_examples: int = 20) -> None:
    """The search alone: its time and memory per trial must not grow with their number."""
    print(f"\nThe search alone, {num_examples} examples, 8 candidates a round\n")
    print(
        "| trials | examples | µs of CPU per trial | MB at the end | MB at the most |\n|---|---|---|---|---|"
    )
    for size in sizes:
        search = Search(
            Plan(num_examples, num_rounds=-(-size // 8), num_trials=size), Candidate({"p": "0"}), Halving()
        )
        num_scored, seconds = drive(search)
        tracemalloc.start()
        kept = Search(search.plan, search.student, search.pruner)
        drive(kept)
        now, peak = (figure / 1e6 for figure in tracemalloc.get_traced_memory())
        tracemalloc.stop()
        trials = len(search.trajectory)
        print(f"| {trials:,} | {num_scored:,} | {1e6 * seconds / trials:.0f} | {now:.1f} | {peak:.1f} |")


def drive(search: Search) -> tuple[int, float]:
    """Perform all tasks on the spot. Every output is a text of its own, so that keeping them would show."""
    num_scored, start, numbers = 0, time.process_time(), count(1)
    while tasks := search.next_tasks():
        for task in tasks:
            if isinstance(task, ProposalTask):
                search.tell(
                    task, TaskResult(Proposal({name: f"{next(numbers)}" for name in task.predictors}))
                )
            else:
                score = float(hash((task.candidate.id, task.position)) % 97 < 40)
                text = f"{task.candidate.id} {task.position}" * 4
                search.tell(task, TaskResult(Outcome(score, text), ONE_EXAMPLE))
                num_scored += 1
        search.events()
    return num_scored, time.process_time() - start


def growth_in_examples(sizes: list[int]) -> None:
    """Whole runs over trainsets of growing size: a round of 8 candidates, all scored in full like the student."""
    print("\nWhole runs, student and 8 candidates scored in full\n")
    print("| examples | scored | ms of CPU per scored example | MB kept by the result | peak RSS, MB |")
    print("|---|---|---|---|---|")
    with language_model() as lm:
        opro(data(20), 8, num_rounds=1)
        for size in sizes:
            examples = data(size)
            gc.collect()
            tracemalloc.start()
            program = opro(examples, 8, num_rounds=1)
            lm.history.clear()  # DSPy keeps the last 10,000 calls in full, whoever makes them
            GLOBAL_HISTORY.clear()
            gc.collect()
            kept = tracemalloc.get_traced_memory()[0] / 1e6
            tracemalloc.stop()
            del program
            start = time.process_time()
            num_scored = opro(examples, 8, num_rounds=1).opro_result.usage.metric_calls
            seconds = time.process_time() - start
            rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(
                f"| {size:,} | {num_scored:,} | {1e3 * seconds / num_scored:.2f} | {kept:.1f} | {rss:.0f} |",
                flush=True,
            )


# -- import --------------------------------------------------------------------------------------


def import_time(repeats: int) -> None:
    """`import dspy_opro` in a process that has imported dspy already."""
    code = (
        "import dspy, time; wall, cpu = time.perf_counter(), time.process_time(); import dspy_opro; "
        "print(time.perf_counter() - wall, time.process_time() - cpu)"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
            for _ in range(repeats)]  # fmt: skip
    walls, cpus = zip(*([float(v) for v in run.stdout.split()] for run in runs), strict=True)
    print(f"\nimport dspy_opro after import dspy, {repeats} processes\n")
    print("| s of wall time, median (least to most) | s of CPU |\n|---|---|")
    print(f"| {_spread(list(walls))} | {_spread(list(cpus))} |")


PARTS = ("per-example", "trials", "examples", "import")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--size", type=int, default=1600, help="examples in a turn")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--trials", type=int, nargs="+", default=[100, 1000, 10_000])
    parser.add_argument("--examples", type=int, nargs="+", default=[50, 500, 5000])
    args = parser.parse_args()
    logging.getLogger("dspy").setLevel(logging.ERROR)
    if "per-example" in args.parts:
        for num_threads in args.threads:
            per_example(args.size, args.repeats, num_threads)
    if "trials" in args.parts:
        growth_in_trials(args.trials)
    if "examples" in args.parts:
        growth_in_examples(args.examples)
    if "import" in args.parts:
        import_time(args.repeats)


if __name__ == "__main__":
    main()
