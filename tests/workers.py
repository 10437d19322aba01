"""Processes that compile against a simulated server, to be started, killed and counted.

They are forked from a process that has imported everything and has no threads, so that a start costs no import.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dspy_opro.testing import Latency, LMCall, SimulatedModel, SimulatedServer, VocabularyTask

TASK = VocabularyTask(3)
CONTEXT = multiprocessing.get_context("forkserver")
# What an installation lacks is left out there without an error.
CONTEXT.set_forkserver_preload(
    ["workers", "dspy", "dspy_opro.teleprompter", "sqlalchemy.orm", "alembic.command", "psycopg2", "psycopg"]
)

OPTIONS: dict[str, Any] = {
    "auto": None, "num_rounds": 3, "num_candidates": 4, "num_threads": 4, "display_progress": False,
}  # fmt: skip
NUM_TRAIN, NUM_VAL = 24, 8
MOST_IN_FLIGHT = OPTIONS["num_threads"]
"""Examples that may be under way at once."""


@dataclass(frozen=True)
class PromptAlone:
    """Answers a prompt in the same way however often it is asked."""

    answer: Any

    def __call__(self, call: LMCall) -> Any:
        return self.answer(replace(call, sample=0))


def serve(median_seconds: float = 0.03) -> SimulatedServer:
    """A scorer and an optimizer LM whose answers depend on the prompt alone."""
    scorer = SimulatedModel(PromptAlone(TASK.scorer), Latency(median_seconds, 0.4))
    proposer = SimulatedModel(PromptAlone(TASK.proposer), Latency(2 * median_seconds, 0.4))
    return SimulatedServer({"scorer": scorer, "proposer": proposer})


def work(api_base: str, answer: str, options: dict[str, Any]) -> None:
    """What a process does: compile, and leave what it found in the file `answer`."""
    import dspy
    import optuna

    from dspy_opro import OPROTeleprompter
    from dspy_opro.storage import outage

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=False)
    limit_files(*options.pop("file_limit", (None, None)))
    outage.PATIENCE_SECONDS = options.pop("patience_seconds", outage.PATIENCE_SECONDS)
    outage.LAST_PATIENCE_SECONDS = min(outage.PATIENCE_SECONDS, outage.LAST_PATIENCE_SECONDS)
    make_storage = options.pop("make_storage", None)
    if make_storage is not None:
        options["storage"] = make_storage()

    def lm(name: str) -> dspy.LM:
        return dspy.LM(f"openai/{name}", api_base=api_base, api_key="unused", cache=False)

    teleprompter = OPROTeleprompter(
        metric=TASK.metric, prompt_model=lm("proposer"), task_model=lm("scorer"), **{**OPTIONS, **options}
    )
    program = teleprompter.compile(
        TASK.student(), trainset=TASK.trainset(NUM_TRAIN), valset=TASK.valset(NUM_VAL)
    )
    Path(answer).write_text(json.dumps(summary(program)), encoding="utf-8")


def limit_files(size: int | None, seconds: float | None) -> None:
    """Let no file of this process grow beyond a size, as on a full disk: for ever, or until that hurt for a while."""
    import resource

    class Lifting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if seconds is not None and record.getMessage().startswith("The storage fails"):
                threading.Timer(seconds, resource.setrlimit, (resource.RLIMIT_FSIZE, (most, most))).start()

    if size is not None:
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
        logging.getLogger("dspy_opro").addHandler(Lifting())


def summary(program: Any) -> dict[str, Any]:
    """All that must be alike."""
    result = program.opro_result
    return {
        "trials": [
            [t.id, t.reward, t.state, t.num_scored, t.reason, t.valset_score, list(t.scores)]
            for t in result.trajectory.trials
        ],
        "curve": list(result.curve),
        "best": {name: predictor.signature.instructions for name, predictor in program.named_predictors()},
        "stop_reason": result.stop_reason,
    }


class Worker:
    """A process that compiles.

    Args:
        server: Where its language models are.
        directory: For its answer.
        options: Arguments of the teleprompter.
    """

    num_started = 0

    def __init__(self, server: SimulatedServer, directory: Path, **options: Any) -> None:
        Worker.num_started += 1
        self._answer = directory / f"answer-{Worker.num_started}.json"
        self.process = CONTEXT.Process(target=work, args=(server.api_base, str(self._answer), options))
        self.process.start()

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.join()

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def is_over(self, seconds: float) -> bool:
        """Whether it ends by itself within this time."""
        self.process.join(seconds)
        return not self.process.is_alive()

    def result(self, seconds: float = 90.0) -> dict[str, Any]:
        """What it found."""
        assert self.is_over(seconds), "the process does not end"
        assert self.process.exitcode == 0
        found: dict[str, Any] = json.loads(self._answer.read_text(encoding="utf-8"))
        return found
