"""The user's constraints are in every request and hold; the user's own instructions race in the first round."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import dspy
import pytest
from proposers.test_proposer import REQUEST
from runs import TASK, TRAINSET, TwoSteps, is_proposal, metric

from dspy_opro import OPROTeleprompter, ProposalRequest
from dspy_opro.proposers import CompletionProposer, OPROProposer, PaperProposer, ReflectiveProposer
from dspy_opro.testing import LMCall, ScriptedLM

GUIDANCE = "Keep the tone formal."


def run(propose: Callable[[LMCall], str], student: Any = None, **changes: Any) -> tuple[Any, list[LMCall]]:
    """A result, and the calls of the optimizer LM."""

    def answer(call: LMCall) -> Any:
        if is_proposal(call):
            return {"instruction": propose(call)}
        return dict.fromkeys(call.output_fields, "x")

    lm = ScriptedLM(answer)
    values = {"num_rounds": 2, "num_candidates": 4, "display_progress": False, "num_threads": 4}
    with dspy.context(lm=lm):
        teleprompter = OPROTeleprompter(metric=metric, **{**values, **changes})
        result = teleprompter.compile(student or TASK.student(), trainset=TRAINSET).opro_result
    return result, [call for call in lm.calls if is_proposal(call)]


def texts(result: Any) -> set[str]:
    return {text for trial in result.trajectory.trials[1:] for text in trial.candidate.instructions.values()}


def test_every_request_shows_the_constraints() -> None:
    student = TASK.student().signature.instructions
    result, calls = run(
        lambda call: f"{student} Variant {call.rollout_id}.",
        guidance=GUIDANCE,
        max_instruction_chars=200,
        must_keep=[student],
    )
    assert len(calls) >= 8
    for call in calls:
        assert GUIDANCE in call.prompt
        assert "at most 200 characters" in call.prompt
        assert student in call.prompt
    assert len(result.trajectory) > 1


def test_without_constraints_the_request_is_as_before() -> None:
    _, calls = run(lambda call: f"Variant {call.rollout_id}.")
    assert all("rules hold" not in call.prompt for call in calls)


@pytest.mark.parametrize("proposer", [OPROProposer(), PaperProposer(), CompletionProposer()], ids=str)
def test_all_our_proposers_show_them(proposer: Any) -> None:
    request = replace(REQUEST, guidance=GUIDANCE)
    lm = ScriptedLM(lambda call: "New." if not call.output_fields else {"instruction": "New."})
    with dspy.context(lm=lm):
        proposer(request=request)
    assert GUIDANCE in lm.calls[0].prompt


def test_geps_proposal_functions_see_them_as_feedback() -> None:
    seen = []

    def propose(candidate: Any, reflective_dataset: Any, components_to_update: Any) -> dict[str, str]:
        seen.extend(reflective_dataset["step"])
        return {"step": "New."}

    ReflectiveProposer(propose)(replace(REQUEST, guidance=GUIDANCE))
    assert seen
    assert all(GUIDANCE in example["Feedback"] for example in seen)


def test_proposals_that_break_the_constraints_are_dropped() -> None:
    student = TASK.student().signature.instructions

    def propose(call: LMCall) -> str:
        kind = (call.rollout_id or 0) % 3
        return [f"{student} {call.rollout_id}", f"Other {call.rollout_id}", f"{student} {'x' * 300}"][kind]

    result, _ = run(propose, max_instruction_chars=150, must_keep=[student])
    assert texts(result)
    assert all(student in text and len(text) <= 150 for text in texts(result))
    assert {problem.partition(":")[0] for problem in result.problems} >= {
        "overlong",
        "loses a text of must_keep",
    }
    assert any(problem.endswith(" characters, max_instruction_chars=150") for problem in result.problems)


def test_after_an_overlong_answer_the_requests_say_the_limit() -> None:
    def propose(call: LMCall) -> str:
        return f"Short {call.rollout_id}." if "at most 4000 characters" in call.prompt else "x" * 4999

    result, calls = run(propose, num_rounds=3, lag=2, num_threads=1)
    assert result.problems[0] == "overlong: 4,999 characters, max_instruction_chars=4000"
    num_told = sum("at most 4000 characters" in call.prompt for call in calls)
    assert 0 < num_told == len(calls) - len(result.problems)
    assert len(texts(result)) == 12
    again, _ = run(propose, num_rounds=3, lag=2, num_threads=4)
    assert again.trajectory.trials == result.trajectory.trials


def test_later_rounds_know_of_overlong_answers_of_earlier_ones() -> None:
    def propose(call: LMCall) -> str:
        return f"Short {call.rollout_id}." if "at most 4000 characters" in call.prompt else "x" * 4999

    result, _ = run(propose, num_rounds=3, lag=0)
    assert len(result.problems) == 4  # the first request of each slot in round 1


def test_the_paper_s_requests_never_say_the_limit() -> None:
    result, calls = run(lambda call: "x" * 501, auto="paper", num_rounds=1)
    assert set(result.problems) == {"overlong: 501 characters, max_instruction_chars=500"}
    assert all("rules hold" not in call.prompt for call in calls)


def test_initial_instructions_race_in_round_one(tmp_path: Path) -> None:
    given = ["Be exact.", "  Be brief.\n"]
    result, calls = run(
        lambda call: f"Variant {call.rollout_id}.", initial_instructions=given, log_dir=tmp_path
    )
    first = [t.candidate for t in result.trajectory.trials if t.candidate.round == 1]
    assert [c.instructions["self"] for c in first[:2]] == ["Be exact.", "Be brief."]
    assert len(first) == 4
    again, more = run(lambda call: "", initial_instructions=given, log_dir=tmp_path)
    assert again.trajectory.trials == result.trajectory.trials
    assert (bool(calls), more) == (True, [])


def test_initial_instructions_come_before_demos() -> None:
    result, _ = run(
        lambda call: f"Variant {call.rollout_id}.",
        initial_instructions=["Be exact.", "Be brief."],
        max_labeled_demos=1,
        num_trials=2,
    )
    first = [trial.candidate for trial in result.trajectory.trials[1:]]
    assert [(c.instructions["self"], c.demo_set) for c in first] == [("Be exact.", None), ("Be brief.", None)]
    result, _ = run(
        lambda call: "",
        initial_instructions=["Be exact."],
        max_labeled_demos=1,
        num_trials=2,
        num_candidates=2,
    )
    exact, demos = (trial.candidate for trial in result.trajectory.trials[1:])
    assert (exact.instructions["self"], exact.demo_set, demos.demo_set) == ("Be exact.", None, 1)
    assert demos.demos


def test_a_first_round_without_room_for_initial_instructions_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    given = ["Be exact.", "Be brief.", "Be kind."]
    result, _ = run(lambda call: "", initial_instructions=given, num_trials=1)
    assert texts(result) == {"Be exact."}
    assert list(result.problems) == [
        f"initial_instructions[{index}]: the first round has no room" for index in (1, 2)
    ]
    assert "the last 2 of initial_instructions are not tried" in caplog.text


def test_initial_instructions_by_predictor() -> None:
    given = [{"note": "Note it."}, {"note": "Note all.", "answer": "Answer it."}]
    result, _ = run(lambda call: f"V {call.rollout_id}.", student=TwoSteps(), initial_instructions=given)
    own = {name: p.signature.instructions for name, p in TwoSteps().named_predictors()}
    first = [dict(t.candidate.instructions) for t in result.trajectory.trials if t.candidate.round == 1]
    assert first[:2] == [{**own, **texts} for texts in given]


@pytest.mark.parametrize(
    ("student", "changes", "rule"),
    [
        (None, {"initial_instructions": [{"nobody": "x"}]}, "has 'nobody', but the predictors are self"),
        (None, {"initial_instructions": ["x" * 30], "max_instruction_chars": 20}, "not usable: overlong"),
        (None, {"initial_instructions": list("abcdef")}, "must be at most 4"),
        (None, {"must_keep": ["never there"]}, "in no instruction of the student"),
        (None, {"must_keep": ["Name the code"], "max_instruction_chars": 5}, "longer than max_instruction_chars=5"),
        (TwoSteps(), {"initial_instructions": ["x"]}, "must be a dict"),
        (TwoSteps(), {"predictor_strategy": "joint", "proposer": CompletionProposer()},
         'predictor_strategy="joint" needs another proposer: CompletionProposer writes one'),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_an_error_before_anything_is_spent(
    student: Any, changes: Any, rule: str
) -> None:
    with pytest.raises(ValueError, match=rule):
        run(lambda call: "New.", student=student, **changes)


def test_the_names_of_gepas_proposer_mean_the_same() -> None:
    config = OPROTeleprompter(metric=metric, additional_instructions=GUIDANCE, max_chars=90).config
    assert (config.guidance, config.max_instruction_chars) == (GUIDANCE, 90)


def test_a_proposer_of_ones_own_gets_them() -> None:
    seen: list[str] = []

    def propose(request: ProposalRequest) -> str:
        seen.append(request.guidance)
        return f"New {request.slot}."

    run(lambda call: "", proposer=propose, guidance=GUIDANCE, num_rounds=1)
    assert set(seen) == {GUIDANCE}
