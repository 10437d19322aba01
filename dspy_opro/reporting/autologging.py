"""What MLflow's autologging leaves out of its runs: whose evaluation a run is, and what a `compile` gave.

MLflow only numbers the evaluations, and logs of a `compile` nothing but the plain arguments of the call (read in 3.17
and 3.18). Nothing here brings MLflow into a process that has not imported it.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .result import OPROResult

logger = logging.getLogger("dspy_opro")


def name_run(metric_key: str, name: str) -> None:
    """Name the run that MLflow has just started for an evaluation.

    Args:
        metric_key: With what MLflow's own name begins. The run of somebody else keeps its name.
        name: The new name.
    """
    run = _active_run("log_evals")
    if run is not None and run.info.run_name.startswith(metric_key):
        sys.modules["mlflow"].set_tag("mlflow.runName", name)


@contextmanager
def completes_run(arguments: Mapping[str, Any]) -> Iterator[Callable[[Any], Any]]:
    """The active run gets the result of a `compile`, also if an error ends it.

    Args:
        arguments: Those of the call. Once it has returned, MLflow logs those that are plain.

    Yields:
        What takes the compiled program, and gives it back.
    """
    plain = [name for name, value in arguments.items() if isinstance(value, (bool, int, float, str))]
    try:
        yield partial(_complete, plain)
    except Exception as error:
        _complete((), getattr(error, "program", None))
        raise


def _complete(left_out: Collection[str], program: Any) -> Any:
    result = getattr(program, "opro_result", None)
    try:
        if result is not None and _active_run("log_compiles") is not None:
            log_result(result, left_out)
    except Exception as error:  # as with a callback, the program is worth more than its record
        logger.warning("The run in MLflow is not complete: %s: %s", type(error).__name__, error)
    return program


def _active_run(option: str) -> Any:
    """MLflow's active run, if its autologging for DSPy is on with this option."""
    utils = sys.modules.get("mlflow.utils.autologging_utils")
    if utils is None or utils.autologging_is_disabled("dspy"):
        return None
    return sys.modules["mlflow"].active_run() if utils.get_autologging_config("dspy", option) else None


def log_result(result: OPROResult, left_out: Collection[str] = ()) -> None:
    """Log settings, spending, stop reason, gain and report to MLflow's active run.

    Args:
        result: Of a run.
        left_out: Settings that are not logged.
    """
    import mlflow

    active = mlflow.active_run()
    assert active is not None
    known = (
        mlflow.MlflowClient().get_run(active.info.run_id).data.params
    )  # MLflow refuses another value for a known one
    settings = {name: str(value)[:500] for name, value in result.config.items()}  # MLflow refuses long values
    mlflow.log_params({n: value for n, value in settings.items() if n not in known and n not in left_out})
    usage = result.usage
    metrics = {
        "metric_calls": usage.metric_calls,
        "scorer_calls": usage.scorer_calls,
        "proposer_calls": usage.proposer_calls,
        "tokens": usage.tokens,
        "cost": usage.cost,
    }
    if result.gain is not None:
        interval = result.gain.interval
        metrics |= {"gain": interval.estimate, "gain_low": interval.low, "gain_high": interval.high}
    if result.curve:
        metrics["best_score"] = result.best_score
    mlflow.log_metrics(metrics)
    mlflow.set_tag("stop_reason", result.stop_reason)
    mlflow.log_text(result.summary(), "opro_summary.txt")
    with TemporaryDirectory() as folder:
        path = Path(folder) / "opro_report.html"
        result.save_report(path)
        mlflow.log_artifact(str(path))
