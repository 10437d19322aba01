"""The seams: what may be replaced from outside, and what the core asks of the edges."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from .racing import Pruner
from .stopping import Stopper, Usage
from .trajectory import Outcome
from .work import Answer, Ask, Block, Event, Proposal, Work

Callback = Callable[[Any, Any], None]
"""Optuna's convention: called with `(study, trial)` when a candidate's race has ended."""


Style = Literal["explore", "refine", "extend"]


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
class Fields:
    """The fields of one predictor's signature."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    choices: Mapping[str, tuple[str, ...]]
    """Output field -> the values that its type allows, where these can be listed."""


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


Unit = tuple[Block, int]
"""One example to score: the block and the position in it."""

Then = Callable[[Unit, Outcome, Usage], "Unit | None"]
"""Files what an example gave and answers with the next one for the same thread; may be called from any thread."""


class Executor(Protocol):
    """Does the work: one call of the proposer, examples through program and metric."""

    async def propose(self, ask: Ask) -> tuple[Proposal, Usage]:
        """Never raises for a failing LM: that is a `Proposal` with `error`."""

    async def score(self, unit: Unit, then: Then) -> None:
        """Score an example, and one after the other what `then` answers with.

        Never raises for a failing program: that is an `Outcome` with `error`.
        """


class Store(Protocol):
    """Keeps what was measured, so that nothing is paid twice."""

    def load_next(self) -> tuple[str, Usage] | None:
        """Take in the next record of the past: the `work_key` it answers, "" for none, and what that cost."""

    def recall(self, work: Work) -> Answer | None:
        """The answer to a piece of work, where the records loaded so far have it."""

    def parts(self, work: Work) -> Mapping[int, tuple[Outcome, Usage]]:
        """Position -> what is known of a block that is not complete."""

    def told(self, answer: Answer) -> None:
        """The search knows this answer now."""

    def note(self, event: Event) -> None:
        """Have an event shown by the next `draw`."""

    def record(self, answers: Sequence[Answer]) -> None:
        """Write answers down; waits, may raise, and may be called again with the same ones then."""

    def draw(self) -> None:
        """Show what was noted: make trials, report, tell, call the callbacks. Waits, may raise."""

    def close(self, stop_reason: str) -> None:
        """The run is over; trials that were under way are closed or left for the next process."""


class SharedStore(Store, Protocol):
    """A store on which several processes work at one run; see `sharing.py`."""

    @property
    def end(self) -> str | None:
        """The reason that ends the run for all workers."""

    @property
    def is_drained(self) -> bool:
        """Whether all workers that are there have told all they will."""

    @property
    def is_shown(self) -> bool:
        """Whether the visible study is complete."""

    @property
    def is_member(self) -> bool:
        """Whether the others know of this worker."""

    @property
    def leads(self) -> bool:
        """Whether this worker keeps the visible study."""

    @property
    def place(self) -> tuple[int, int]:
        """This worker's place among the workers, and how many there are."""

    @property
    def has_post(self) -> bool:
        """Whether something is not written yet."""

    def is_mine(self, work: Work) -> bool:
        """Whether this worker holds it."""

    def is_free(self, work: Work) -> bool:
        """Whether nobody holds it."""

    def post(self, answer: Answer) -> None: ...

    def claim(self, works: Iterable[Work]) -> None: ...

    def ask_to_end(self, reason: str) -> None: ...

    def drain(self) -> None: ...

    def conclude(self) -> None: ...

    def leave(self) -> None: ...

    def rejoin(self, held: Iterable[Work]) -> None: ...

    def exchange(self) -> None:
        """Write what was posted and read what is new. Waits, may raise, and may be called again then."""


__all__ = [
    "Callback",
    "Executor",
    "Exemplar",
    "Fields",
    "ProposalRequest",
    "Pruner",
    "SharedStore",
    "Stopper",
    "Store",
    "Style",
    "Then",
    "Unit",
]
