"""`OPROTeleprompter` in the simulated setting, with its defaults but for what a run's name says."""

from __future__ import annotations

from typing import Any

import dspy
from simulation import Setting

from dspy_opro import OPROTeleprompter


def opro(setting: Setting, *, validates: bool = False, **options: Any) -> dspy.Module:
    """A run without a preset; without a valset, as COPRO, unless it `validates`."""
    teleprompter = OPROTeleprompter(
        metric=setting.task.metric,
        prompt_model=setting.proposer,
        num_threads=setting.num_threads,
        seed=setting.seed,
        display_progress=False,
        **{"auto": None, **options},
    )
    valset = setting.valset if validates else None
    return teleprompter.compile(setting.task.student(), trainset=setting.trainset, valset=valset)
