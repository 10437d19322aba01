"""Completes the runs of MLflow's autologging: names for evaluations, and the result of a `compile`.

MLflow numbers the evaluations. Of a `compile` it logs the plain arguments of the call and nothing else (read in 3.17
and 3.18). This module does not import MLflow unless the process has imported it already.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

from dspy_opro.programs.errors import in_brief

from .report import page
from .result import OPROResult, known_cost

logger = logging.getLogger("dspy_opro")


def name_run(metric_key: str, name: str) -> None:
    """Name the run that MLflow has just started for an evaluation. MLflow's own name begins with `metric_key`."""
    run = _active_run("log_evals")
    if run is not None and run.info.run_name.startswith(metric_key):
        sys.modules["mlflow"].set_tag("mlflow.runName", name)


@contextmanager
def completes_run(arguments: Mapping[str, Any]) -> Iterator[Callable[[Any], Any]]:
    """The active run gets the result of a `compile`, also if an error ends it.

    Args:
        arguments: Those of the call. Once it has returned, MLflow logs the plain ones and accepts no other value.

    Yields:
        A function that takes the compiled program and returns it.
    """
    try:
        yield partial(
            _complete, [n for n, value in arguments.items() if isinstance(value, (int, float, str))]
        )
    except Exception as error:
        _complete((), getattr(error, "program", None))
        raise


def _complete(left_out: Collection[str], program: Any) -> Any:
    result = getattr(program, "opro_result", None)
    try:
        if result is not None and (run := _active_run("log_compiles")) is not None:
            log_result(result, run, left_out)
    except Exception as error:  # as with a callback, the program is worth more than its record
        logger.warning("The run in MLflow is not complete: %s", in_brief(error))
    return program


def _active_run(option: str) -> Any:
    """MLflow's active run, if its autologging for DSPy is on with this option."""
    utils = sys.modules.get("mlflow.utils.autologging_utils")
    if utils is None or utils.autologging_is_disabled("dspy"):
        return None
    return sys.modules["mlflow"].active_run() if utils.get_autologging_config("dspy", option) else None


def log_result(result: OPROResult, run: Any, left_out: Collection[str] = ()) -> None:
    """Log settings, except those that are left out, spending, stop reason, gain and report to MLflow's active run."""
    import mlflow

    # MLflow refuses another value for a known parameter.
    known = {*left_out, *mlflow.get_run(run.info.run_id).data.params}
    settings = {name: str(value)[:500] for name, value in result.config.items()}  # MLflow refuses long values
    mlflow.log_params({name: value for name, value in settings.items() if name not in known})
    metrics = {**asdict(result.usage), "tokens": result.usage.tokens}
    if known_cost(result.usage) is None:
        del metrics["cost"]
    if result.gain is not None:
        interval = result.gain.interval
        metrics |= {"gain": interval.estimate, "gain_low": interval.low, "gain_high": interval.high}
        metrics["expected_gain"] = result.gain.value  # of the returned program, corrected for the choice
    if result.curve:
        metrics["best_score"] = result.best_score
        mlflow.set_tag("returned", "student" if result.best.id == result.baseline.id else "candidate")
    mlflow.log_metrics(metrics)
    mlflow.set_tag("stop_reason", result.stop_reason)
    mlflow.log_text(result.summary(), "opro_summary.txt")
    mlflow.log_text(page(result).encode(errors="replace").decode(), "opro_report.html")
