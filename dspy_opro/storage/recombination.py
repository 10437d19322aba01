"""One more candidate out of what is known: the best text of each predictor, put together by Optuna's TPE."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import TPESampler
from optuna.trial import create_trial

from dspy_opro.search.trajectory import Trajectory, normalise

from .opening import quiet_optuna

TOP_K = 10
"""Texts per predictor that may be combined."""
MAX_ASKS = 20
"""After so many samples without an untried combination it gives up."""


def recombine(trajectory: Trajectory, seed: int) -> dict[str, str] | None:
    """A combination of texts that was not tried yet, likely to score well by TPE over all trials.

    Args:
        trajectory: All trials so far, of a program with at least two predictors.
        seed: Equal seeds and trajectories give equal answers.

    Returns:
        Predictor name -> text, or None where every combination drawn was tried before.
    """
    if not len(trajectory):
        return None
    names = list(trajectory.trials[0].candidate.instructions)
    # Best first, so that equal trajectories give equal indices.
    texts = {name: [text for text, _ in reversed(trajectory.top_texts(name, TOP_K))] for name in names}
    if len(names) < 2 or all(len(choices) < 2 for choices in texts.values()):
        return None
    # The parameters are indices of texts.
    space: dict[str, BaseDistribution] = {
        name: CategoricalDistribution(range(len(choices))) for name, choices in texts.items()
    }
    study = _study(trajectory, texts, space, seed)
    tried = {_combination(t.candidate.instructions, names) for t in trajectory.trials}
    for _ in range(MAX_ASKS):
        trial = study.ask(space)
        combination = {name: texts[name][trial.params[name]] for name in names}
        if _combination(combination, names) not in tried:
            return combination
    return None


def _combination(texts: Mapping[str, str], names: list[str]) -> tuple[str, ...]:
    return tuple(normalise(texts[name]) for name in names)


def _study(
    trajectory: Trajectory, texts: dict[str, list[str]], space: dict[str, BaseDistribution], seed: int
) -> optuna.Study:
    """A study filled with the trials that consist of these texts."""
    with quiet_optuna(), warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # both flags, in Optuna 4.0 to 5.0
        # The constant liar keeps it from drawing again what was drawn before and found to be tried.
        sampler = TPESampler(seed=seed % 2**32, multivariate=True, constant_liar=True, n_startup_trials=0)
        study = optuna.create_study(direction="maximize", sampler=sampler)
    for trial in trajectory.trials:
        instructions = trial.candidate.instructions
        if all(instructions[name] in texts[name] for name in texts):
            params = {name: texts[name].index(instructions[name]) for name in texts}
            study.add_trial(create_trial(params=params, distributions=space, value=trial.reward))
    return study
