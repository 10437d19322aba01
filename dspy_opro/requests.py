"""What the proposer sees: a pure function of the work and the seed, so that a rerun asks the same."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from .exemplars import choose
from .options import Options
from .program import Program, describe
from .protocols import Exemplar, ProposalRequest, Style
from .trajectory import Outcome, percent
from .values import fields, shown
from .work import Ask, rng

STYLES: Sequence[Style] = ("explore", "refine", "extend")


class Requests:
    """Makes an `Ask` of the search the request that its proposer gets.

    Args:
        program: The student.
        trainset: Examples in the order of the race's positions.
        options: Sizes, seed, and whether the paper is followed.
    """

    def __init__(self, program: Program, trainset: Sequence[Any], options: Options) -> None:
        self._program = program
        self._trainset = trainset
        self._options = options

    def __call__(self, ask: Ask) -> ProposalRequest:
        options, view = self._options, ask.view
        style = self._style(ask)
        score_range = view.trajectory.score_range
        count = options.k_best if style == "explore" else min(3, options.k_best)
        # The paper draws one meta-prompt a step; here each proposal sees examples of its own.
        generator = rng(options.seed, "exemplars", ask.round, 0 if options.paper else ask.slot)
        positions = choose(view, options.num_exemplars, generator, at_random=options.paper)
        return ProposalRequest(
            predictors=ask.predictors,
            current={name: view.base.instructions[name] for name in ask.predictors},
            scored_instructions={name: _scored(ask, name, count) for name in ask.predictors},
            exemplars=[self._exemplar(view.outcomes[p], p, score_range) for p in positions],
            role="\n".join(self._program.parts[name].role for name in ask.predictors),
            fields={name: self._program.parts[name].fields for name in ask.predictors},
            style=style,
            round=ask.round,
            slot=ask.slot,
            wave=ask.wave,
            seed=_number(options.seed, ask.round, ask.slot, ask.wave, ask.predictors),
        )

    def _style(self, ask: Ask) -> Style:
        if self._options.paper:
            return "explore"
        styles = STYLES if len(ask.predictors) == 1 else STYLES[:2]
        return styles[(ask.round + ask.slot + ask.wave) % len(styles)]

    def _exemplar(self, outcome: Outcome | None, position: int, score_range: tuple[float, float]) -> Exemplar:
        example = self._trainset[position]
        inputs = fields(example.inputs())
        return Exemplar(
            inputs=describe(inputs),
            expected=describe(fields(example.labels())),
            input_fields={name: shown(value) for name, value in inputs.items()},
            prediction="" if outcome is None else outcome.output,
            outcome=outcome,
            score_range=score_range,
        )


def _scored(ask: Ask, name: str, count: int) -> list[tuple[str, int | None]]:
    """A predictor's best texts with their scores from 0 to 100, ascending."""
    trajectory = ask.view.trajectory
    texts = trajectory.top_texts(name, count)
    if not texts:
        return [(ask.view.base.instructions[name], None)]
    return [(text, percent(reward, *trajectory.score_range)) for text, reward in texts]


def _number(*parts: object) -> int:
    """A positive 31-bit number out of the parts, the same in every process."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big") >> 1
