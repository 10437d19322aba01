"""The optimizers of `quality.py`, each set up so that it scores about as many examples as the budget says.

One rule: DSPy's optimizers run as released. All have the same train and selection examples; an optimizer that takes no
selection examples of its own has them among its train examples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import dspy
from quality_tasks import BY_HAND, Task

from dspy_opro import OPROTeleprompter

MOST_DEMOS = 4
COPRO_BREADTH, COPRO_DEPTH = 5, 2


@dataclass(frozen=True)
class Run:
    """What an optimizer is given."""

    task: Task
    metric: Callable[..., float]
    """The task's metric, which counts."""
    prompt_model: dspy.LM
    task_model: dspy.LM
    proposer: Any
    """For ours: how the optimizer LM is asked; None for the usual way."""
    trainset: list[dspy.Example]
    valset: list[dspy.Example]
    budget: int
    num_threads: int
    seed: int

    @property
    def all_examples(self) -> list[dspy.Example]:
        return [*self.trainset, *self.valset]


def instructions_of(program: dspy.Module) -> dict[str, str]:
    """Predictor -> its instructions."""
    return {name: predictor.signature.instructions for name, predictor in program.named_predictors()}


def with_instructions(program: dspy.Module, texts: Mapping[str, str]) -> dspy.Module:
    """The program itself, with other instructions."""
    for name, predictor in program.named_predictors():
        predictor.signature = predictor.signature.with_instructions(texts[name])
    return program


def student(run: Run) -> dspy.Module:
    return run.task.student()


def by_hand(run: Run) -> dspy.Module:
    return with_instructions(run.task.student(), BY_HAND[run.task.name])


def copro(run: Run) -> dspy.Module:
    optimizer = dspy.COPRO(
        prompt_model=run.prompt_model,
        metric=run.metric,
        breadth=COPRO_BREADTH,
        depth=COPRO_DEPTH,
        init_temperature=1.0,
    )
    program = run.task.student()
    # With several predictors, COPRO scores earlier proposals again in the second step.
    num_predictors = len(program.predictors())
    evaluations = num_predictors * COPRO_BREADTH * (COPRO_DEPTH if num_predictors == 1 else 3)
    trainset = run.all_examples[: max(4, run.budget // evaluations)]
    return optimizer.compile(
        program, trainset=trainset, eval_kwargs={"num_threads": run.num_threads, "display_progress": False}
    )


def miprov2(run: Run, max_demos: int = 0) -> dspy.Module:
    demos = {"max_bootstrapped_demos": max_demos, "max_labeled_demos": max_demos}
    bootstrapping = run.budget // 5 if max_demos else 0
    # As `auto=` does below 50 selection examples: every trial scores all of them.
    num_trials = max(2, (run.budget - bootstrapping) // len(run.valset) - 1)
    optimizer = dspy.MIPROv2(
        metric=run.metric, prompt_model=run.prompt_model, task_model=run.task_model, auto=None,
        num_candidates=num_trials, num_threads=run.num_threads, seed=run.seed, **demos,
    )  # fmt: skip
    return optimizer.compile(
        run.task.student(), trainset=run.trainset, valset=run.valset, num_trials=num_trials, minibatch=False,
        seed=run.seed, **demos,
    )  # fmt: skip


def gepa(run: Run) -> dspy.Module:
    def metric(
        example: Any, prediction: Any, trace: Any = None, pred_name: Any = None, pred_trace: Any = None
    ) -> dspy.Prediction:
        # GEPA asks again for a predictor's feedback: the answer is known, so this call scores no example.
        metric = run.metric if pred_name is None else run.task.metric
        score = metric(example, prediction)
        return dspy.Prediction(score=score, feedback=run.task.feedback(example, prediction))

    optimizer = dspy.GEPA(
        metric=metric, max_metric_calls=run.budget, reflection_lm=run.prompt_model, num_threads=run.num_threads,
        seed=run.seed, track_stats=True,
    )  # fmt: skip
    return optimizer.compile(run.task.student(), trainset=run.trainset, valset=run.valset)


def random_search(run: Run) -> dspy.Module:
    # Three programs come first: the student, labelled demos and unshuffled bootstrapped demos.
    per_program = len(run.valset) + 2 * MOST_DEMOS
    optimizer = dspy.BootstrapFewShotWithRandomSearch(
        metric=run.metric, max_bootstrapped_demos=MOST_DEMOS, max_labeled_demos=MOST_DEMOS,
        num_candidate_programs=max(1, run.budget // per_program - 3), num_threads=run.num_threads,
    )  # fmt: skip
    return optimizer.compile(run.task.student(), trainset=run.trainset, valset=run.valset)


def opro(run: Run, **options: Any) -> dspy.Module:
    teleprompter = OPROTeleprompter(
        metric=run.metric, prompt_model=run.prompt_model, max_metric_calls=run.budget, num_threads=run.num_threads,
        seed=run.seed, display_progress=False, **{"auto": None, "proposer": run.proposer, **options},
    )  # fmt: skip
    return teleprompter.compile(run.task.student(), trainset=run.all_examples)


def paper(run: Run) -> dspy.Module:
    # As many examples as COPRO has: the paper scores every candidate on all.
    return opro(
        run, auto="paper", proposer=None, max_train_examples=run.budget // (COPRO_BREADTH * COPRO_DEPTH)
    )


OPTIMIZERS: dict[str, Callable[[Run], dspy.Module]] = {
    "student": student,
    "by hand": by_hand,
    "OPRO": opro,
    "COPRO": copro,
    "MIPROv2": miprov2,
    "GEPA": gepa,
    "OPRO, confirm=False": lambda run: opro(run, confirm=False),
    "OPRO, paper": paper,
    "OPRO, demos": lambda run: opro(run, max_bootstrapped_demos=MOST_DEMOS, max_labeled_demos=MOST_DEMOS),
    "MIPROv2, demos": lambda run: miprov2(run, MOST_DEMOS),
    "random search, demos": random_search,
}
"""Name in the tables -> how it optimizes."""
