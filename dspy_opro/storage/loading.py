"""The study of a run that is over, for Optuna's own tools: from its storage, or made again from its trials."""

from __future__ import annotations

from pathlib import Path

import optuna
from optuna.trial import create_trial

from dspy_opro.search.trajectory import Trial

from .opening import JOURNAL_NAME, journal_storage, opened, quiet_optuna
from .trials import STATES, candidate_attrs, result_attrs


def load_study(study_name: str, storage: str | None, log_dir: str | None) -> optuna.Study | None:
    """The study in the storage or in the directory of a run.

    Args:
        study_name: Its name.
        storage: A URL. It wins over `log_dir`, as in a run.
        log_dir: The directory of the run.

    Returns:
        None where it can't be read: there is no URL or no file any more, or the URL lacks its password.
    """
    try:
        with quiet_optuna():
            if storage is not None:
                file = Path(storage.partition("?")[0].removeprefix("sqlite:///"))
                is_gone = storage.startswith("sqlite:") and not file.exists()
                if "://" not in storage or "***" in storage or is_gone:
                    return None
                return optuna.load_study(study_name=study_name, storage=opened(storage))
            if log_dir is not None and (Path(log_dir) / JOURNAL_NAME).exists():
                return optuna.load_study(study_name=study_name, storage=journal_storage(log_dir))
    except Exception:  # whatever its driver raises where a server is gone
        return None
    return None


def study_of(study_name: str, trials: tuple[Trial, ...]) -> optuna.Study:
    """A study in memory with these trials. Of their checkpoints it has the last one."""
    with quiet_optuna():
        study = optuna.create_study(study_name=study_name or None, direction="maximize")
    for trial in trials:
        study.add_trial(
            create_trial(
                state=STATES[trial.state],
                value=None if trial.state == "failed" else trial.reward,
                user_attrs={**candidate_attrs(trial.candidate), **result_attrs(trial, ())},
                intermediate_values={trial.num_scored: trial.reward},
            )
        )
    return study
