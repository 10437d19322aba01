"""`OPROTeleprompter` in the simulated setting, with its defaults but for what a run's name says."""

from __future__ import annotations

from typing import Any

import dspy
from simulation import Setting

from dspy_opro import OPROTeleprompter


def opro(setting: Setting, max_metric_calls: int = 1600, **options: Any) -> dspy.Module:
    """A run that ends with its budget of scored examples; without a valset, as COPRO."""
    teleprompter = OPROTeleprompter(
        metric=setting.task.metric,
        prompt_model=setting.proposer,
        num_threads=setting.num_threads,
        max_metric_calls=max_metric_calls,
        seed=setting.seed,
        display_progress=False,
        **{"auto": None, **options},
    )
    return teleprompter.compile(setting.task.student(), trainset=setting.trainset)
