"""Every row of docs/from-synalinks.md."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import dspy

from dspy_opro import OPROTeleprompter, ProposalRequest
from dspy_opro.testing import LMCall, ScriptedLM

PAGE = Path(__file__).parent.parent / "docs" / "from-synalinks.md"
SEED = "Answer."
TRAINSET = [dspy.Example(question=f"q{n}", answer=f"a{n}").with_inputs("question") for n in range(12)]


def exact(example: Any, prediction: Any, trace: Any = None) -> bool:
    return bool(example.answer == prediction.answer)


def scorer(call: LMCall) -> dict[str, str]:
    """An instruction with the word `level N` gets the first N questions right."""
    number = int(call.inputs["question"][1:])
    level = re.search(r"level (\d+)", call.instructions)
    return {"answer": f"a{number}" if number < (int(level[1]) if level else 3) else "?"}


def proposing(*texts: str) -> ScriptedLM:
    return ScriptedLM(lambda call: {"instruction": texts[(call.rollout_id or 0) % len(texts)]})


def compiled(prompt_model: ScriptedLM, **settings: Any) -> Any:
    values: dict[str, Any] = {
        "num_rounds": 3,
        "num_candidates": 4,
        "num_threads": 2,
        "display_progress": False,
    }
    teleprompter = OPROTeleprompter(metric=exact, prompt_model=prompt_model, **{**values, **settings})
    student = dspy.Predict(dspy.Signature("question -> answer", SEED))
    with dspy.context(lm=ScriptedLM(scorer)):
        return teleprompter.compile(student, trainset=TRAINSET)


LEVELS = [f"Think at level {n}." for n in (4, 5, 6, 7, 8, 9)]


class Marked(dspy.Module):
    """A proposer with a setting and a state."""

    def __init__(self, mark: str) -> None:
        super().__init__()
        self.mark = mark
        self.write = dspy.Predict("best -> instruction")

    def forward(self, request: ProposalRequest) -> dspy.Prediction:
        (name,) = request.predictors
        return dspy.Prediction(
            instruction=f"{self.mark} {self.write(best=request.current[name]).instruction}"
        )


def shown(lm: ScriptedLM) -> list[list[tuple[str, int]]]:
    """The scored instructions of each meta-prompt, in the order of the prompt."""
    pattern = re.compile(r"text:\n(.+)\nscore:\n(\d+)")
    return [[(text, int(score)) for text, score in pattern.findall(call.user)] for call in lm.calls]


def test_the_page_has_a_row_for_each_part_of_the_predecessor() -> None:
    page = PAGE.read_text(encoding="utf-8")
    parts = ("language_model", "k_best", "program", "name", "description", "build", "optimize", "finalize",
             "get_config", "from_config", "predictions with rewards")  # fmt: skip
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| ")]
    assert [part for part in parts if not any(part in row for row in rows)] == []


def test_language_model_is_prompt_model_and_writes_the_instructions() -> None:
    lm = proposing(*LEVELS)
    program = compiled(lm)
    assert lm.num_calls > 0
    assert "level" in program.signature.instructions


def test_k_best_limits_the_scored_instructions() -> None:
    lm = proposing(*LEVELS)
    compiled(lm, k_best=2, num_rounds=4)
    assert max(len(pairs) for pairs in shown(lm)) == 2


def test_program_is_proposer() -> None:
    program = compiled(proposing(*LEVELS), proposer=Marked("Please."))
    assert program.signature.instructions.startswith("Please. Think")


def test_name_and_description_are_kept() -> None:
    result = compiled(proposing(*LEVELS), name="sums", description="adds numbers").opro_result
    assert result.study_name == "sums"
    assert result.config["description"] == "adds numbers"


def test_nothing_has_to_be_built_and_the_student_is_unchanged() -> None:
    student = dspy.Predict(dspy.Signature("question -> answer", SEED))
    teleprompter = OPROTeleprompter(metric=exact, num_rounds=1, display_progress=False)
    with dspy.context(lm=ScriptedLM(lambda call: scorer(call) if "answer" in call.output_fields
                                    else {"instruction": LEVELS[5]})):  # fmt: skip
        program = teleprompter.compile(student, trainset=TRAINSET)
    assert (student.signature.instructions, program.signature.instructions) == (SEED, LEVELS[5])


def test_a_round_is_an_optimization_step_with_several_proposals() -> None:
    result = compiled(proposing(*LEVELS), num_rounds=1).opro_result
    assert len({trial.id for trial in result.trajectory.trials if trial.candidate.round == 1}) > 1


def test_every_prediction_has_its_own_reward() -> None:
    """There the mean of a batch is the reward of each of its predictions."""
    lm = proposing(*LEVELS)
    result = compiled(lm).opro_result
    assert set(result.baseline.scores) == {0.0, 1.0}
    verdicts = {verdict for call in lm.calls for verdict in re.findall(r"result:\n(\w+)", call.user)}
    assert verdicts == {"correct", "wrong"}


def test_candidates_are_kept_after_the_run() -> None:
    """There `finalize` empties the list of candidates."""
    result = compiled(proposing(*LEVELS)).opro_result
    assert len(result.trajectory) == len(result.to_dicts()) > 2


def test_what_is_returned_was_scored() -> None:
    """There the last proposal is deployed and no step has scored it."""
    # Whoever has seen the good instruction proposes a bad one.
    lm = ScriptedLM(
        lambda call: {
            "instruction": f"Level 0, variant {len(call.prompt)}." if "level 9" in call.prompt else LEVELS[5]
        }
    )
    program = compiled(lm, confirm=False)
    best = program.opro_result.best
    assert program.signature.instructions == best.candidate.instructions["self"]
    assert "level 9" in program.signature.instructions
    assert best.state == "complete" and best.num_scored == len(best.scores) > 0


def test_rewards_that_are_compared_are_of_the_same_examples() -> None:
    """There each candidate has the mean of another batch."""
    result = compiled(proposing(*LEVELS)).opro_result
    counts = {trial.num_scored for trial in result.trials}
    assert len(counts) > 1  # the race dropped candidates early
    for trial in result.trials:
        has_score = [score is not None for score in trial.scores]
        assert has_score == sorted(has_score, reverse=True) and sum(has_score) == trial.num_scored


def test_the_order_is_ascending() -> None:
    """There the best instruction comes first."""
    lm = proposing(*LEVELS)
    compiled(lm)
    longest = max(shown(lm), key=len)
    scores = [score for _, score in longest]
    assert scores == sorted(scores) and len(set(scores)) > 2


def test_an_instruction_is_one_candidate_however_often_it_is_proposed() -> None:
    """There a repeated instruction is a further candidate."""
    result = compiled(proposing(LEVELS[0], f"  {LEVELS[0]}\n", LEVELS[0].replace(" ", "  "))).opro_result
    texts = [trial.candidate.instructions["self"] for trial in result.trajectory.trials]
    folded = [" ".join(text.split()) for text in texts]
    assert folded.count(LEVELS[0]) == 1 and len(set(folded)) == len(folded)


def test_a_custom_program_survives_the_configuration() -> None:
    """There `from_config` hands the serialized program over as it is."""
    proposer = Marked("Please.")
    proposer.write.signature = proposer.write.signature.with_instructions("Write briefly.")
    config = json.loads(json.dumps(OPROTeleprompter(metric=exact, proposer=proposer, k_best=7).get_config()))
    again = OPROTeleprompter.from_config(config)
    assert isinstance(again.config.proposer, Marked) and again.config.proposer.mark == "Please."
    assert again.config.proposer.write.signature.instructions == "Write briefly."
    assert (again.config.k_best, again.metric) == (7, exact)


def test_broken_answers_do_not_become_instructions() -> None:
    result = compiled(proposing("", "```never closed", LEVELS[2])).opro_result
    texts = {trial.candidate.instructions["self"] for trial in result.trajectory.trials}
    assert LEVELS[2] in texts and not any("```" in text or not text for text in texts)
    assert {"empty", "truncated"} & {
        word for problem in result.problems for word in re.findall(r"\w+", problem)
    }
