"""How the work of a run is done: settled once, out of the arguments, the program and `dspy.settings`."""

from __future__ import annotations

from dataclasses import dataclass

import dspy

from ._compat import defines
from .config import OPROConfig, paper
from .program import is_async_only


@dataclass(frozen=True)
class Options:
    """See `OPROTeleprompter` for what the names mean."""

    k_best: int
    num_exemplars: int
    temperature: float
    seed: int
    failure_score: float
    max_errors: int | None
    default_max_errors: int
    """Failures in rounds of nothing else that end a run where `max_errors` is None."""
    example_timeout_seconds: float | None
    provide_traceback: bool
    native_async: bool
    """Whether the program is awaited on the loop; otherwise it is called in a thread."""
    paper: bool
    """Whether proposals are asked for as in the paper."""


def options_of(config: OPROConfig, student: dspy.Module, is_async: bool) -> Options:
    """The options of a run.

    Args:
        config: The arguments, resolved.
        student: The program.
        is_async: Whether the caller waits in a loop of its own, as `acompile` does.
    """
    provide_traceback = config.provide_traceback
    if provide_traceback is None:
        provide_traceback = bool(dspy.settings.provide_traceback)
    return Options(
        k_best=config.k_best or 20,
        num_exemplars=config.num_exemplars,
        temperature=config.init_temperature,
        seed=config.seed,
        failure_score=config.failure_score,
        max_errors=config.max_errors,
        default_max_errors=dspy.settings.max_errors,
        example_timeout_seconds=config.example_timeout_seconds,
        provide_traceback=provide_traceback,
        native_async=is_async_only(student) or (is_async and defines(student, "aforward")),
        paper=paper(config),
    )
