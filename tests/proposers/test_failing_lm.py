"""An optimizer LM that can't be called ends the run early; one that fails every time ends it with an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from runs import TASK, TRAINSET, optimize, propose

from dspy_opro import OPROTeleprompter, ProposerFailed
from dspy_opro.programs.provider import is_unusable
from dspy_opro.testing import Fault, ScriptedLM, SimulatedServer


@pytest.mark.parametrize("status", [401, 402, 404])
@pytest.mark.parametrize("lag", [0, 2])
def test_a_wrong_key_or_model_costs_almost_nothing(
    server: SimulatedServer, lag: int, status: int, tmp_path: Path
) -> None:
    server.inject(Fault("status", status=status), model="proposer")
    settings: dict[str, Any] = {"lag": lag, "num_threads": 1, "log_dir": tmp_path}
    with pytest.raises(ProposerFailed, match="Check prompt_model") as caught:
        optimize(server, **settings)
    student = TASK.student().signature.instructions
    assert caught.value.program.signature.instructions == student  # type: ignore[attr-defined]
    assert caught.value.__cause__ is not None
    assert server.stats()["scorer"].requests <= 1
    server.inject()
    result = optimize(server, **settings).opro_result
    fresh = optimize(server, **{**settings, "log_dir": None}).opro_result
    assert result.trajectory.trials == fresh.trajectory.trials


def test_the_test_request_is_one_call_and_changes_nothing(server: SimulatedServer) -> None:
    first = optimize(server, lag=0).opro_result
    lm = server.lm("proposer", cache=False)
    assert first.usage.proposer_calls == 2 * 4 + 1
    with_both = optimize(server, lag=0, prompt_model=lm, task_model=lm, num_rounds=1)
    assert with_both.opro_result.usage.proposer_calls == 4


@pytest.mark.parametrize("lag", [0, 2])
def test_a_run_whose_every_proposal_failed_raises_and_goes_on_later(lag: int, tmp_path: Path) -> None:
    is_down = True

    def answer(call: Any) -> Any:
        if "answer" in call.output_fields:
            return TASK.scorer(call)
        if is_down:
            raise RuntimeError("the provider is down")
        return propose(call)

    def run(**changes: Any) -> Any:
        lm = ScriptedLM(answer)
        values = {
            "num_rounds": 2,
            "num_candidates": 4,
            "lag": lag,
            "display_progress": False,
            "num_threads": 2,
        }
        teleprompter = OPROTeleprompter(
            metric=TASK.metric, prompt_model=lm, task_model=lm, **values, **changes
        )
        return teleprompter.compile(TASK.student(), trainset=TRAINSET).opro_result

    for _ in range(2):
        with pytest.raises(ProposerFailed, match="the provider is down") as caught:
            run(log_dir=tmp_path)
        result = caught.value.program.opro_result  # type: ignore[attr-defined]
        assert len(result.trajectory) == 1
        assert result.usage.metric_calls <= len(TRAINSET)
    is_down = False
    once = run(log_dir=tmp_path)
    again = run(log_dir=tmp_path)
    assert once.trajectory.trials == again.trajectory.trials
    assert len(once.trajectory) > 4
    assert once.usage == again.usage


@pytest.mark.parametrize("given", ["demos", "initial_instructions"])
def test_demos_and_instructions_of_the_user_are_no_proposals_that_worked(given: str, tmp_path: Path) -> None:
    is_down = True

    def answer(call: Any) -> Any:
        if "answer" in call.output_fields:
            return TASK.scorer(call)
        if is_down:
            raise RuntimeError("400: unknown parameter")
        return propose(call)

    def run() -> Any:
        lm = ScriptedLM(answer, cache=False)
        values: dict[str, Any] = {"num_rounds": 2, "num_candidates": 4, "num_threads": 2, "log_dir": tmp_path}
        if given == "demos":
            values |= {"max_labeled_demos": 2, "max_bootstrapped_demos": 1, "confirm": False}
        else:
            values |= {"initial_instructions": ["Name its code, please."]}
        opro = OPROTeleprompter(
            metric=TASK.metric, prompt_model=lm, task_model=lm, display_progress=False, **values
        )
        return opro.compile(TASK.student(), trainset=TASK.trainset(30)).opro_result

    with pytest.raises(ProposerFailed, match="unknown parameter") as caught:
        run()
    assert len(caught.value.program.opro_result.trajectory) > 1  # type: ignore[attr-defined]
    is_down = False
    rewritten = [t for t in run().trajectory.trials if t.candidate.rewritten]
    assert len(rewritten) > 2


@pytest.mark.parametrize(
    ("status", "is_for_good"), [(400, False), (401, True), (404, True), (429, False), (500, False)]
)
def test_permanent_errors(server: SimulatedServer, status: int, is_for_good: bool) -> None:
    server.inject(Fault("status", status=status))
    with pytest.raises(Exception) as caught:  # noqa: PT011 # DSPy's versions raise different ones
        server.lm("scorer", num_retries=0, cache=False)("Hello.")
    assert is_unusable(caught.value) is is_for_good


@pytest.mark.parametrize("error", [None, ValueError("401"), TimeoutError()])
def test_other_errors_are_not_permanent(error: Exception | None) -> None:
    assert not error or not is_unusable(error)
