"""What the proposer sees: scored instructions ascending, exemplars with what happened, and a seed of its own."""

from __future__ import annotations

import enum
from collections import Counter
from dataclasses import replace
from typing import Any

import dspy
import pytest

from dspy_opro import ProposalRequest
from dspy_opro.programs.program import Program
from dspy_opro.proposers.meta_prompt import MetaPrompt
from dspy_opro.proposers.opro import OPROProposer
from dspy_opro.search.tasks import ProposalTask, View
from dspy_opro.search.trajectory import Candidate, Outcome, Trajectory, Trial

TRAINSET = [dspy.Example(question=f"{n}", answer=f"{n}").with_inputs("question") for n in range(8)]
STUDENT = dspy.Predict(dspy.Signature("question -> answer", "Repeat it."))


def meta_prompt(student: Any = STUDENT, **options: Any) -> MetaPrompt:
    values = {"k_best": 20, "num_exemplars": 2, "seed": 0, "is_paper": False}
    return MetaPrompt(Program(student), TRAINSET, **{**values, **options})


def request(of: MetaPrompt, **changes: Any) -> ProposalRequest:
    candidate = of.program.candidate
    view = View(Trajectory(), candidate, [None] * len(TRAINSET))
    predictors = tuple(candidate.instructions)
    values = {"round": 1, "slot": 0, "wave": 0, "predictors": predictors, "view": view}
    return of.request(ProposalTask(**{**values, **changes}))


def known() -> View:
    """The student and two others, scored on all examples."""
    rows = {"Repeat it.": [0, 1] * 4, "Worse.": [0] * 8, "Best.": [0, 1, 1, 1] * 2}
    trials = [
        Trial(Candidate({"self": text}), sum(row) / 8, 8, scores=[float(s) for s in row])
        for text, row in rows.items()
    ]
    outcomes = [Outcome(float(s), output=f"answer: {n}") for n, s in enumerate(rows["Best."])]
    return View(Trajectory().add(*trials), trials[2].candidate, outcomes)


def test_a_request_shows_scored_instructions_ascending_and_at_most_k_best() -> None:
    shown = request(meta_prompt(), view=known(), slot=2)
    assert shown.style == "explore"
    assert shown.scored_instructions == {"self": [("Worse.", 0), ("Repeat it.", 50), ("Best.", 75)]}
    assert shown.current == {"self": "Best."}
    fewer = request(meta_prompt(k_best=2), view=known(), slot=2)
    assert [text for text, _ in fewer.scored_instructions["self"]] == ["Repeat it.", "Best."]


@pytest.mark.parametrize("slot", [0, 1])
def test_the_text_to_rewrite_or_extend_comes_last_with_its_own_score(slot: int) -> None:
    """A candidate that the race has dropped may have a higher estimate."""
    view = known()
    lucky = Trial(Candidate({"self": "Lucky."}), 0.95, 2, "pruned", scores=[1.0, 1.0])
    view = replace(view, trajectory=view.trajectory.add(lucky))
    shown = request(meta_prompt(), view=view, slot=slot)
    assert shown.style != "explore"
    assert shown.scored_instructions == {
        "self": [("Worse.", 0), ("Repeat it.", 50), ("Lucky.", 75), ("Best.", 75)]
    }
    fewer = request(meta_prompt(k_best=2), view=view, slot=slot)
    assert fewer.scored_instructions == {"self": [("Lucky.", 75), ("Best.", 75)]}
    fewer = request(meta_prompt(k_best=1), view=view, slot=slot)
    assert fewer.scored_instructions == {"self": [("Best.", 75)]}


def test_a_text_that_is_nearly_as_long_as_allowed_is_not_extended() -> None:
    def styles(max_length: int) -> set[str]:
        of = meta_prompt(max_length=max_length)
        return {request(of, view=known(), slot=slot).style for slot in range(6)}

    assert styles(45) == {"explore", "refine", "extend"}
    assert styles(44) == {"explore", "refine"}


def test_a_request_shows_exemplars_with_what_happened() -> None:
    exemplars = request(meta_prompt(num_exemplars=4), view=known()).exemplars
    assert len(exemplars) == 4
    scores = [e.outcome.score for e in exemplars if e.outcome is not None]
    assert sorted(scores) == [0.0, 0.0, 1.0, 1.0]
    for exemplar in exemplars:
        number = exemplar.inputs.removeprefix("question: ")
        assert exemplar.expected == f"answer: {number}"
        assert exemplar.prediction == f"answer: {number}"


def test_before_the_first_round_the_own_text_has_no_score_yet() -> None:
    shown = request(meta_prompt())
    assert shown.scored_instructions == {"self": [("Repeat it.", None)]}
    assert all(exemplar.outcome is None and exemplar.prediction == "" for exemplar in shown.exemplars)


def test_a_request_is_a_function_of_the_task_and_the_seed() -> None:
    task = {"view": known(), "round": 3, "slot": 1}
    assert request(meta_prompt(), **task) == request(meta_prompt(), **task)
    assert request(meta_prompt(), **task).seed != request(meta_prompt(), **{**task, "slot": 2}).seed
    assert request(meta_prompt(), **task).seed != request(meta_prompt(seed=1), **task).seed


def test_styles_alternate_between_slots_rounds_and_waves() -> None:
    styles = [request(meta_prompt(), slot=slot).style for slot in range(3)]
    assert sorted(styles) == ["explore", "extend", "refine"]
    assert request(meta_prompt(), slot=0, wave=1).style == styles[1]
    assert request(meta_prompt(), slot=0, round=2).style == styles[1]


def test_without_a_history_half_of_the_requests_ask_for_the_rule() -> None:
    of = meta_prompt(induces=OPROProposer.induces)
    styles = [request(of, slot=slot).style for slot in range(12)]
    assert Counter(styles) == {"induce": 6, "explore": 2, "refine": 2, "extend": 2}
    assert "induce" in styles[::2] and "induce" in styles[1::2]  # an even slot rewrites all predictors
    assert sorted(request(of, slot=slot, view=known()).style for slot in range(3)) == [
        "explore",
        "extend",
        "refine",
    ]

    class Two(dspy.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = dspy.Predict("a -> b"), dspy.Predict("b -> c")

    for_all = meta_prompt(Two(), induces=True)
    assert {request(for_all, slot=slot).style for slot in range(4)} == {"explore", "refine"}


def test_without_expected_outputs_there_is_nothing_to_induce() -> None:
    of = meta_prompt(induces=True)
    assert request(of).style == "induce"
    unlabeled = replace(of, trainset=[dspy.Example(question="1").with_inputs("question")] * len(TRAINSET))
    assert "induce" not in {request(unlabeled, slot=slot).style for slot in range(6)}


def test_the_paper_shows_one_meta_prompt_a_step() -> None:
    paper = meta_prompt(is_paper=True)
    shown = [request(paper, view=known(), slot=slot) for slot in range(4)]
    assert {each.style for each in shown} == {"explore"}
    assert len({tuple(e.inputs for e in each.exemplars) for each in shown}) == 1
    assert len({each.seed for each in shown}) == 4


class Mood(enum.Enum):
    GOOD = "good"
    BAD = "bad"


def test_the_role_names_fields_types_and_descriptions() -> None:
    class Judge(dspy.Signature):  # type: ignore[misc]
        """Judge."""

        text: str = dspy.InputField(desc="a review")
        stars: int = dspy.OutputField()
        mood: Mood = dspy.OutputField()

    class Two(dspy.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.judge = dspy.Predict(Judge)
            self.other = dspy.Predict("a -> b")

    role = request(meta_prompt(Two()), predictors=("judge",)).role
    assert "the predictor 'judge', one of 2 in the program Two" in role
    assert "- input `text` (str): a review" in role
    assert "- output `stars` (int)" in role
    assert "- output `mood` (Mood: good, bad)" in role
    assert "`a`" not in role
