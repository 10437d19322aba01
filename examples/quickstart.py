"""A language model gets a better instruction. Run `make demo`, or `python examples/quickstart.py --help`.

Without arguments everything runs inside this process, on SmolLM2 with 135 million parameters. This model is the scorer
LM and the optimizer LM. `--model openai/gpt-4o-mini` takes another model, and `--api-base` a server of yours.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Literal

import dspy
from flags import parse

from dspy_opro import OPROTeleprompter

DATA = Path(__file__).parent / "data" / "reviews.jsonl"


class Judge(dspy.Signature):
    review: str = dspy.InputField()
    verdict: Literal["good", "bad"] = dspy.OutputField()


def load(split: str) -> list[dspy.Example]:
    rows = [json.loads(line) for line in DATA.read_text().splitlines()]
    return [
        dspy.Example(review=row["review"], verdict=row["verdict"]).with_inputs("review")
        for row in rows
        if row["split"] == split
    ]


def is_right(example: dspy.Example, prediction: dspy.Prediction, trace: Any = None) -> bool:
    return bool(example.verdict == prediction.verdict)


def accuracy(program: dspy.Module, examples: list[dspy.Example], num_threads: int) -> float:
    evaluate = dspy.Evaluate(devset=examples, metric=is_right, num_threads=num_threads)
    return evaluate(program).score / 100


def show(study: Any, trial: Any) -> None:
    """Print one line for each candidate when its race ends. The arguments are those of Optuna's callbacks."""
    about = trial.user_attrs
    text = about["instructions"]["self"]
    print(
        f"  round {about['round']}  {trial.value:.2f} on {about['num_scored']:3d} examples  {text[:90]!r}",
        flush=True,
    )


def main() -> None:
    start = time.perf_counter()
    flags = parse(__doc__, max_metric_calls=216)
    train, test = load("train"), load("test")
    student = dspy.Predict(Judge)
    print(f"{flags.model}: {len(train)} reviews to learn from, {len(test)} that the search never sees.\n")
    print(f"before: {student.signature.instructions!r}", flush=True)
    before = accuracy(student, test, flags.num_threads)
    print(f"test accuracy {before:.3f}\n", flush=True)
    tested = time.perf_counter()

    teleprompter = OPROTeleprompter(
        metric=is_right,
        proposer=flags.proposer,
        auto=None,
        init_temperature=0.7 if flags.is_embedded else 1.0,
        max_metric_calls=flags.max_metric_calls,
        max_train_examples=40,
        num_threads=flags.num_threads,
        seed=flags.seed,
        callbacks=[show],
        display_progress=False,
    )
    program = teleprompter.compile(student, trainset=train)
    searched = time.perf_counter()
    print(f"\n{program.opro_result.summary()}\n")
    print(f"after: {program.signature.instructions!r}", flush=True)
    after = accuracy(program, test, flags.num_threads)
    end = time.perf_counter()
    print(f"test accuracy {before:.3f} -> {after:.3f}\n")
    calls = program.opro_result.usage
    print(
        f"{end - start:.0f} s in all: {tested - start:.0f} s model and test before, {searched - tested:.0f} s search "
        f"({calls.scorer_calls} answers, {calls.proposer_calls} proposals), {end - searched:.0f} s test after."
    )
    program.save("quickstart.json")
    program.opro_result.save_report("quickstart.html")
    print("The program is in quickstart.json, what happened in quickstart.html.")


if __name__ == "__main__":
    main()
