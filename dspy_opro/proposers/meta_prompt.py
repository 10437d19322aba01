"""What the optimizer LM gets to see: scored instructions, exemplars, and the predictor's place in the program."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from dspy_opro.programs.program import Fields, Program, describe
from dspy_opro.programs.values import fields, shown
from dspy_opro.search.tasks import ProposalTask, View, rng
from dspy_opro.search.trajectory import Outcome, Trajectory, percent

Style = Literal["explore", "refine", "extend"]
STYLES: Sequence[Style] = ("explore", "refine", "extend")


@dataclass(frozen=True)
class Exemplar:
    """One train example as the meta-prompt shows it."""

    inputs: str
    expected: str
    prediction: str
    """What the program answered under the best instructions; empty where it was not run yet."""
    outcome: Outcome | None
    score_range: tuple[float, float]
    """Lowest and highest score seen, in the metric's own scale."""
    input_fields: Mapping[str, str] = field(default_factory=dict)
    """Input field -> its whole value, as text."""


@dataclass(frozen=True)
class ProposalRequest:
    """What a proposer is asked for."""

    predictors: tuple[str, ...]
    """Names of the predictors to write for: one, or with `predictor_strategy="joint"` all of them."""
    current: Mapping[str, str]
    """Predictor name -> its text in the best program so far."""
    scored_instructions: Mapping[str, Sequence[tuple[str, int | None]]]
    """Predictor name -> (text, score from 0 to 100), ascending; the score is None before the first round."""
    exemplars: Sequence[Exemplar]
    role: str
    """The predictors' place in the program and their fields, in words."""
    fields: Mapping[str, Fields]
    """Predictor name -> its fields."""
    style: Style
    round: int
    slot: int
    """Which of the round's proposals this is."""
    wave: int
    """How often the round had to ask again before."""
    seed: int
    """Differs between all requests of a run and is the same when the run is repeated."""


@dataclass(frozen=True)
class MetaPrompt:
    """Makes the request that the proposer gets for a `ProposalTask` of the search."""

    program: Program
    """The student."""
    trainset: Sequence[Any]
    """Examples in the order of the race's positions."""
    k_best: int
    num_exemplars: int
    seed: int
    is_paper: bool
    """Whether the paper is followed: one style, exemplars at random."""

    def request(self, task: ProposalTask) -> ProposalRequest:
        """The request for a task: a pure function of task and seed, so that a rerun asks the same."""
        view = task.view
        style = self._style(task)
        score_range = view.trajectory.score_range
        count = self.k_best if style == "explore" else min(3, self.k_best)
        # The paper draws one meta-prompt a step; here each proposal sees examples of its own.
        generator = rng(self.seed, "exemplars", task.round, 0 if self.is_paper else task.slot)
        positions = choose(view, self.num_exemplars, generator, at_random=self.is_paper)
        return ProposalRequest(
            predictors=task.predictors,
            current={name: view.base.instructions[name] for name in task.predictors},
            scored_instructions={name: _scored(task, name, count) for name in task.predictors},
            exemplars=[self._exemplar(view.outcomes[p], p, score_range) for p in positions],
            role="\n".join(self.program.texts[name].role for name in task.predictors),
            fields={name: self.program.texts[name].fields for name in task.predictors},
            style=style,
            round=task.round,
            slot=task.slot,
            wave=task.wave,
            seed=_number(self.seed, task.round, task.slot, task.wave, task.predictors),
        )

    def _style(self, task: ProposalTask) -> Style:
        if self.is_paper:
            return "explore"
        styles = STYLES if len(task.predictors) == 1 else STYLES[:2]
        return styles[(task.round + task.slot + task.wave) % len(styles)]

    def _exemplar(self, outcome: Outcome | None, position: int, score_range: tuple[float, float]) -> Exemplar:
        example = self.trainset[position]
        inputs = fields(example.inputs())
        return Exemplar(
            inputs=describe(inputs),
            expected=describe(fields(example.labels())),
            input_fields={name: shown(value) for name, value in inputs.items()},
            prediction="" if outcome is None else outcome.output,
            outcome=outcome,
            score_range=score_range,
        )


def _scored(task: ProposalTask, name: str, count: int) -> list[tuple[str, int | None]]:
    """A predictor's best texts with their scores from 0 to 100, ascending."""
    trajectory = task.view.trajectory
    texts = trajectory.top_texts(name, count)
    if not texts:
        return [(task.view.base.instructions[name], None)]
    return [(text, percent(reward, *trajectory.score_range)) for text, reward in texts]


def _number(*parts: object) -> int:
    """A positive 31-bit number out of the parts, the same in every process."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big") >> 1


def choose(view: View, count: int, generator: random.Random, at_random: bool = False) -> list[int]:
    """Positions of up to `count` examples.

    Args:
        view: What is known when the proposals are asked for.
        count: How many to show.
        generator: Seeded; two slots of a round see different examples.
        at_random: The paper's choice (section 4.2): uniformly, whatever their scores.
    """
    positions = list(range(len(view.outcomes)))
    generator.shuffle(positions)
    scored = {p: o for p in positions if (o := view.outcomes[p]) is not None}
    if at_random or not scored:
        return positions[:count]
    spread = disagreement(view.trajectory, len(positions))
    # Of the examples that the leading candidates disagree on most, a random half: enough to differ by slot.
    ranked = sorted(scored, key=lambda p: spread[p] + 0.25 * generator.random(), reverse=True)
    ceiling = max(o.score for o in scored.values())
    failures = [p for p in ranked if scored[p].score < ceiling]
    successes = [p for p in ranked if scored[p].score >= ceiling]
    num_failures = min(len(failures), max((count + 1) // 2, count - len(successes)))
    return failures[:num_failures] + successes[: count - num_failures]


def disagreement(trajectory: Trajectory, num_positions: int, leaders: int = 8) -> list[float]:
    """Variance of the best candidates' scores, by position; 0 where fewer than two were scored there."""
    columns: list[list[float]] = [[] for _ in range(num_positions)]
    for trial in trajectory.top(leaders):
        for column, score in zip(columns, trial.scores, strict=False):
            column.append(score)
    return [_variance(column) for column in columns]


def _variance(values: Sequence[float]) -> float:
    if len(values) < 2:
        return 0.0
    average = sum(values) / len(values)
    return sum((v - average) ** 2 for v in values) / len(values)


def verdict(outcome: Outcome | None, low: float, high: float) -> str:
    """An outcome's score in the words of the meta-prompt."""
    if outcome is None:
        return "not scored yet"
    if outcome.error is not None:
        return f"failed: {outcome.error}"
    if high > low and outcome.score >= high:
        return "correct"
    return "wrong" if outcome.score <= low else f"score {100 * (outcome.score - low) / (high - low):.0f}"
