"""The content of the meta-prompt: scored instructions, exemplars, and the predictor's place in the program."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from dspy_opro.programs.program import Fields, Program, describe
from dspy_opro.programs.tracing import Call, PredictorFeedback
from dspy_opro.programs.values import fields, shown
from dspy_opro.search.tasks import ProposalTask, View, rng
from dspy_opro.search.trajectory import Outcome, Trajectory, percent, scores_by_example, squared_distances

from .cleaning import OVERLONG

Style = Literal["explore", "refine", "extend", "induce"]
STYLES: Sequence[Style] = ("explore", "refine", "extend")
"""The styles of requests, in turn. `induce` comes beside them as long as the student alone is scored."""

SHORTEST_EXTENSION = 40
"""Characters that a sentence of instructions has at least."""


@dataclass(frozen=True)
class Exemplar:
    """One train example as the meta-prompt shows it."""

    inputs: str
    """The input fields, one a line."""
    expected: str
    """The expected output fields, one a line."""
    prediction: str
    """The output of the program under the best instructions; empty if the example was not run yet."""
    outcome: Outcome | None
    """What the best instructions got on the example; None if it was not run yet."""
    score_range: tuple[float, float]
    """Lowest and highest score seen, in the metric's own scale."""
    input_fields: Mapping[str, str] = field(default_factory=dict)
    """Input field -> its whole value, as text."""
    expected_fields: Mapping[str, Any] = field(default_factory=dict)
    """Expected output field -> its value."""
    calls: Mapping[str, Call] = field(default_factory=dict)
    """Predictor of the request -> its call, empty if the program did not call it. An example that was not run yet has
    no entries, nor has a program with one predictor that got and gave what the program did."""
    feedback: Mapping[str, str] = field(default_factory=dict)
    """Predictor of the request -> the metric's feedback on it, from a metric that takes `pred_name`."""


@dataclass(frozen=True)
class ProposalRequest:
    """A request for one proposal: everything that a proposer needs to know."""

    predictors: tuple[str, ...]
    """Names of the predictors to write instructions for: one, or with `predictor_strategy="joint"` all of them."""
    current: Mapping[str, str]
    """Predictor name -> its text in the best program so far."""
    scored_instructions: Mapping[str, Sequence[tuple[str, int | None]]]
    """Predictor name -> (text, score from 0 to 100), ascending; the score is None before the first round."""
    exemplars: Sequence[Exemplar]
    """The train examples to show, in the order to show them."""
    role: str
    """The predictors' place in the program and their fields, in words."""
    fields: Mapping[str, Fields]
    """Predictor name -> its fields."""
    style: Style
    """What to write; `docs/meta-prompt.md` says what the styles mean."""
    round: int
    """The round of the proposal, from 1."""
    slot: int
    """Index of this proposal within the round."""
    wave: int
    """How often the round has asked again, because proposals were rejected. 0 for the first requests."""
    seed: int
    """Different for every request of a run, and the same in a repeated run."""
    guidance: str = ""
    """The user's constraints in words."""

    def halved(self) -> ProposalRequest | None:
        """The request with the better half of the instructions and half of the examples; None if it has one of each."""
        scored = {name: texts[len(texts) // 2 :] for name, texts in self.scored_instructions.items()}
        exemplars = self.exemplars[: (len(self.exemplars) + 1) // 2]
        half = replace(self, scored_instructions=scored, exemplars=exemplars)
        return None if half == self else half


@dataclass(frozen=True, repr=False)  # a repr would have the whole data
class MetaPrompt:
    """Turns a `ProposalTask` of the search into the request for the proposer."""

    program: Program
    """The student."""
    trainset: Sequence[Any]
    """Examples by position in the run's order."""
    k_best: int
    num_exemplars: int
    seed: int
    is_paper: bool
    """Whether to follow the paper: one style, random exemplars."""
    guidance: str = ""
    guidance_on_length: str = ""
    """Replaces `guidance` once the LM has written a text that is too long: it also says how long a text may be."""
    feedback: PredictorFeedback | None = None
    """Asks the metric for feedback on single predictors. None asks for none."""
    induces: bool = False
    """Whether half of the requests for one predictor have the style `induce` as long as the student alone is scored."""
    max_length: float = math.inf
    """The most characters of an instruction. A text that has nearly as many is not extended."""

    def request(self, task: ProposalTask) -> ProposalRequest:
        """The request for a task. It depends only on task and seed, so a resumed run makes the same request."""
        view = task.view
        # The paper draws the exemplars once per step. Here every proposal sees other exemplars.
        generator = rng(self.seed, "exemplars", task.round, 0 if self.is_paper else task.slot)
        positions = choose(view, self.num_exemplars, generator, at_random=self.is_paper)
        style = self._style(task, positions)
        count = self.k_best if style in ("explore", "induce") else min(4, self.k_best)
        is_overlong = any(problem.startswith(OVERLONG) for problem in view.problems)
        return ProposalRequest(
            predictors=task.predictors,
            current={name: view.base.instructions[name] for name in task.predictors},
            scored_instructions={name: _scored(task, name, style, count) for name in task.predictors},
            exemplars=[self._exemplar(task, p, style) for p in positions],
            role="\n".join(self.program.texts[name].role for name in task.predictors),
            fields={name: self.program.texts[name].fields for name in task.predictors},
            style=style,
            round=task.round,
            slot=task.slot,
            wave=task.wave,
            seed=_request_seed(self.seed, task.round, task.slot, task.wave, task.predictors),
            guidance=self.guidance_on_length if is_overlong else self.guidance,
        )

    def _style(self, task: ProposalTask, positions: Sequence[int]) -> Style:
        turn = task.round + task.slot + task.wave
        if self.is_paper:
            return "explore"
        if len(task.predictors) > 1:
            return STYLES[turn % 2]  # an extension is for one instruction
        is_first = len(task.view.trajectory) <= 1
        is_turn = turn // 2 % 2 == 0  # two by two, because every other slot rewrites all predictors
        answers = [fields(self.trainset[p].labels()) for p in positions]
        if self.induces and is_first and is_turn and any(answers):
            return "induce"
        (name,) = task.predictors
        has_room = len(task.view.base.instructions[name]) + SHORTEST_EXTENSION <= self.max_length
        return STYLES[turn % (3 if has_room else 2)]

    def _exemplar(self, task: ProposalTask, position: int, style: Style) -> Exemplar:
        example, outcome = self.trainset[position], task.view.outcomes[position]
        inputs, expected = fields(example.inputs()), fields(example.labels())
        calls = outcome.calls if outcome is not None and outcome.calls and not self.is_paper else {}
        names = task.predictors if calls else ()
        said = {
            name: self.feedback.of((task.view.base.id, position, name), example, calls)
            for name in names
            if self.feedback is not None and style != "induce"
        }
        return Exemplar(
            inputs=describe(inputs),
            expected=describe(expected),
            input_fields={name: shown(value) for name, value in inputs.items()},
            expected_fields=expected,
            prediction="" if outcome is None else outcome.output,
            outcome=outcome,
            score_range=task.view.trajectory.score_range,
            calls={name: calls.get(name, {}) for name in names},
            feedback={name: text for name, text in said.items() if text},
        )


def guidance_text(guidance: str | None, max_chars: int | None, must_keep: Sequence[str]) -> str:
    """The user's constraints as a text for the optimizer LM; empty if there are none."""
    lines = [guidance.strip()] if guidance else []
    if max_chars is not None:
        lines.append(f"The whole instruction has at most {max_chars} characters.")
    if must_keep:
        lines.append("Keep these texts word for word where the best instruction has them:")
        lines += [f'"{text}"' for text in must_keep]
    return "\n".join(lines)


def _scored(task: ProposalTask, name: str, style: Style, count: int) -> list[tuple[str, int | None]]:
    """A predictor's best texts with their scores from 0 to 100, ascending.

    A request to rewrite or to extend the best program's text shows this text last. The reward of a dropped
    candidate is an estimate from few examples, so the others have at most the score of that text there.
    """
    trajectory, base = task.view.trajectory, task.view.base
    current = base.instructions[name]
    rewards = [trial.reward for trial in trajectory.trials if trial.id == base.id]
    if not rewards:
        return [(current, None)]
    texts = trajectory.top_texts(name, count)
    if style in ("refine", "extend"):
        others = [(text, min(reward, rewards[0])) for text, reward in texts if text != current]
        texts = [*others[max(0, len(others) - count + 1) :], (current, rewards[0])]
    return [(text, percent(reward, *trajectory.score_range)) for text, reward in texts]


def _request_seed(*parts: object) -> int:
    """A 31-bit hash of the parts, the same in every process."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big") >> 1


def choose(view: View, count: int, generator: random.Random, at_random: bool = False) -> list[int]:
    """Positions of up to `count` examples to show: failures and successes on which the best candidates disagree.

    `at_random` is the paper's choice (section 4.2): it draws uniformly and ignores the scores.
    """
    positions = list(range(len(view.outcomes)))
    generator.shuffle(positions)
    scored = {p: o for p in positions if (o := view.outcomes[p]) is not None}
    if at_random or not scored:
        return positions[:count]
    spread, (low, high) = disagreement(view.trajectory, len(positions)), view.trajectory.score_range
    # The random term changes the order enough that the slots of a round see different examples, in every scale.
    largest = (high - low) ** 2 / 4  # that a variance can be
    ranked = sorted(scored, key=lambda p: spread[p] + largest * generator.random(), reverse=True)
    ceiling = max(o.score for o in scored.values())
    failures = [p for p in ranked if scored[p].score < ceiling]
    successes = [p for p in ranked if scored[p].score >= ceiling]
    num_failures = min(len(failures), max((count + 1) // 2, count - len(successes)))
    return failures[:num_failures] + successes[: count - num_failures]


def disagreement(trajectory: Trajectory, num_positions: int, leaders: int = 8) -> list[float]:
    """Variance of the best candidates' scores by position; 0 for a position with fewer than two scores."""
    columns = scores_by_example(trajectory.top(leaders), num_positions)
    return [squared_distances(column) / max(1, len(column)) for column in columns]


def verdict(outcome: Outcome, low: float, high: float) -> str:
    """An outcome's score in words for the meta-prompt."""
    if outcome.error is not None:
        return f"failed: {outcome.error}"
    if outcome.score >= high and (high > low or high > 0.0):
        return "correct"
    return "wrong" if outcome.score <= low else f"score {100 * (outcome.score - low) / (high - low):.0f}"
