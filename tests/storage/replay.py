"""A search over made-up answers, driven step by step, so that it can be killed between any two of them."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import optuna

from dspy_opro.search.pruners import Halving, Pruner
from dspy_opro.search import Search
from dspy_opro.search.trajectory import Usage
from dspy_opro.study import OptunaStore, recombine
from dspy_opro.search.trajectory import Candidate, Outcome
from dspy_opro.search.tasks import TaskResult, ProposalTask, ScoringTask, Plan, Proposal

PLAN = Plan(num_train=40, num_val=10, num_rounds=3, num_candidates=5, block_size=8)
STUDENT = Candidate({"retrieve": "Find it.", "answer": "Say it."})


class Killed(Exception):
    """The process is gone."""


def chance(*parts: object) -> float:
    """A number in [0, 1) that depends on the parts alone."""
    return int(hashlib.sha256(repr(parts).encode()).hexdigest()[:8], 16) / 2**32


def propose(ask: ProposalTask) -> tuple[Proposal, Usage]:
    known = len(ask.view.trajectory)
    texts = {name: f"{name}: {ask.round}.{ask.slot}.{ask.wave} after {known}" for name in ask.predictors}
    return Proposal(texts), Usage(proposer_calls=1, prompt_tokens=100)


def score(block: ScoringTask) -> tuple[tuple[Outcome, ...], Usage]:
    outcomes = []
    for position in range(block.start, block.stop):
        luck = chance(block.candidate.id, block.split, position)
        error = "ValueError: no answer" if luck > 0.9 else None
        outcomes.append(Outcome(float(luck < 0.5), "out" * 9, "fe\x00d\ud800", error, {"length": luck}))
    return tuple(outcomes), Usage(metric_calls=len(outcomes), scorer_calls=len(outcomes))


def drive(
    store: Any,
    *,
    plan: Plan = PLAN,
    pruner: Pruner | None = None,
    order: int = 0,
    steps: int | None = None,
) -> tuple[Search, int]:
    """Run a search to its end, or into `Killed` after so many steps; answers arrive in a seeded order.

    Returns:
        The search, and the number of answers that were not recalled.
    """
    load(store)
    search = Search(plan, STUDENT, pruner or Halving(), recombine=recombine)
    shuffle, waiting, num_paid = random.Random(order), [], 0
    while not search.done:
        while (work := search.next()) is not None:
            if not recall(store, search, work):
                waiting.append(work)
            emit(store, search)
        if search.done or not waiting:
            break
        if num_paid == steps:
            raise Killed
        num_paid += 1
        run(store, search, waiting.pop(shuffle.randrange(len(waiting))))
        emit(store, search)
    store.close(search.stop_reason)
    return search, num_paid


def load(store: Any) -> Any:
    """Take in all that was recorded."""
    while store.load_next() is not None:
        pass
    return store


def recall(store: Any, search: Search, work: ProposalTask | ScoringTask) -> bool:
    answer = store.recall(work)
    if answer is not None:
        tell(store, search, answer)
    return answer is not None


def run(store: Any, search: Search, work: ProposalTask | ScoringTask) -> None:
    answer = TaskResult(work, *(propose(work) if isinstance(work, ProposalTask) else score(work)))
    store.record([answer])
    tell(store, search, answer)


def tell(store: Any, search: Search, answer: TaskResult) -> None:
    store.told(answer)
    if isinstance(answer.work, ProposalTask):
        search.tell_proposal(answer.work, answer.content)
    else:
        search.tell_block(answer.work, answer.content)


def emit(store: Any, search: Search) -> None:
    for event in search.events():
        store.note(event)
    store.draw()


def shown(study: optuna.Study) -> list[Any]:
    """All that a study says of its trials but the time."""
    return [
        (t.number, t.state.name, t.value, t.user_attrs, t.intermediate_values)
        for t in study.get_trials(deepcopy=False)
    ]


def in_memory(**arguments: Any) -> tuple[Search, list[Any], Usage]:
    """The run that nobody disturbed."""
    store = OptunaStore()
    search, _ = drive(store, **arguments)
    return search, shown(store.study), store.used
