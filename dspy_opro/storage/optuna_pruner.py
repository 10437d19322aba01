"""`OptunaPruner`: any Optuna pruner in a race, with a study of its own, so that a replay decides the same."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import optuna
from optuna.pruners import BasePruner, WilcoxonPruner
from optuna.trial import TrialState, create_trial

from dspy_opro.search.pruners import Race
from dspy_opro.search.trajectory import mean

from .opening import quiet_optuna


class OptunaPruner:
    """Asks an Optuna pruner after every `interval` examples; fits `search.pruners.Pruner`. One instance serves one run.

    The incumbent is a completed trial before the first decision, as pruners compare with completed trials.

    Args:
        pruner: Sees the mean over the prefix at step = number of examples; a `WilcoxonPruner`, which pairs
            values by step, sees each example's score at step = its position.
        interval: Examples between two decisions, at least 1.
    """

    def __init__(self, pruner: BasePruner, interval: int = 5) -> None:
        if interval < 1:
            raise ValueError(f"interval must be at least 1, but got {interval}.")
        self.interval = interval
        self._name = type(pruner).__name__
        self._per_example = isinstance(pruner, WilcoxonPruner)
        with quiet_optuna():
            # HyperbandPruner assigns brackets by a hash of the study's name.
            self._study = optuna.create_study(
                study_name="race", direction="maximize", pruner=copy.deepcopy(pruner)
            )
        self._trials: dict[str, optuna.Trial] = {}  # candidate id -> its trial under way
        self._num_reported: dict[str, int] = {}
        self._completed: set[tuple[float, ...]] = set()  # score rows of completed trials

    def checkpoints(self, num_examples: int, num_candidates: int) -> Sequence[int]:
        return [*range(self.interval, num_examples, self.interval), num_examples]

    def drop(self, race: Race) -> Mapping[str, str]:
        incumbent = race.incumbent
        if tuple(incumbent) not in self._completed:
            self._study.add_trial(
                create_trial(value=mean(incumbent), intermediate_values=self._values(incumbent))
            )
            self._completed.add(tuple(incumbent))
        for candidate, scores in race.scores.items():
            self._report(candidate, scores)
        reason = f"{self._name} after {race.num_scored} examples"
        dropped = {candidate: reason for candidate in race.scores if self._trials[candidate].should_prune()}
        for candidate, scores in race.scores.items():
            if race.num_scored == race.num_examples:
                self._study.tell(self._trials.pop(candidate), mean(scores))
                self._completed.add(tuple(scores))
            elif candidate in dropped:
                self._study.tell(self._trials.pop(candidate), state=TrialState.PRUNED)
        return dropped

    def most_calls(self, num_examples: int, num_candidates: int) -> int:
        return num_examples * num_candidates

    def _values(self, scores: Sequence[float], start: int = 0) -> dict[int, float]:
        """Step -> value for what is new behind the first `start` examples."""
        if self._per_example:
            return {position: scores[position] for position in range(start, len(scores))}
        ends = [end for end in self.checkpoints(len(scores), 1) if end > start]
        return {end: mean(scores[:end]) for end in ends}

    def _report(self, candidate: str, scores: Sequence[float]) -> None:
        trial = self._trials.get(candidate)
        if trial is None:
            trial = self._trials[candidate] = self._study.ask()
        for step, value in self._values(scores, self._num_reported.get(candidate, 0)).items():
            trial.report(value, step)
        self._num_reported[candidate] = len(scores)
