from __future__ import annotations

import copy
import pickle
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import cloudpickle
import dspy
import pytest

from dspy_opro.reporting.attach import NAMES, attach
from dspy_opro.reporting.examples import Examples
from dspy_opro.reporting.result import NOT_ENDED, OPROResult
from dspy_opro.search.confidence import Gain, Interval
from dspy_opro.search.tasks import Failure
from dspy_opro.search.trajectory import Candidate, Trajectory, Usage
from tests.results import empty, result, trial


class Program(dspy.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.draft = dspy.Predict("question -> draft")
        self.answer = dspy.Predict("question, draft -> answer")

    def forward(self, question: str) -> dspy.Prediction:
        return self.answer(question=question, draft=self.draft(question=question).draft)


def build(candidate: Candidate, student: Any = None) -> Any:
    program = (student or Program()).deepcopy()
    for name, predictor in program.named_predictors():
        if name in candidate.instructions:
            predictor.signature = predictor.signature.with_instructions(candidate.instructions[name])
    return program


def attached(found: OPROResult | None = None, student: Any = None, track_stats: bool = True) -> Any:
    found = found or result()
    program = build(found.best.candidate, student)
    attach(program, found, lambda candidate: build(candidate, student), track_stats)
    return program


# -- the result ----------------------------------------------------------------------------------


def test_a_deep_copy_of_a_result_is_the_result() -> None:
    found = result()
    assert copy.deepcopy(found) is found


def test_a_result_survives_pickling() -> None:
    found = result()
    assert found.best.id  # what is computed once and kept is no obstacle
    assert pickle.loads(pickle.dumps(found)) == found
    assert pickle.loads(pickle.dumps(empty())) == empty()


def test_the_rows_say_what_happened_to_each_trial() -> None:
    rows = result().to_dicts()
    assert [row["number"] for row in rows] == [0, 1, 2, 3]
    assert rows[1]["state"] == "pruned" and rows[1]["num_scored"] == 2 and rows[1]["reward"] == 0.0
    assert rows[3]["parent"] == rows[0]["id"] and rows[3]["rewritten"] == "answer"
    assert rows[3]["instructions.answer"] == "Answer very well & briefly."
    assert empty().to_dicts() == []


def test_the_front_has_the_trials_that_no_other_beats_in_score_and_length() -> None:
    found = result()
    best, better, student = found.trials[3], found.trials[2], found.trials[0]
    assert found.pareto() == [best, better, student]
    longer = trial("Answer as well, in more words.", [1, 0, 1, 0], 2)
    assert found.pareto("length") == result(trajectory=found.trajectory.add(longer)).pareto("length")


def test_the_front_of_a_subscore() -> None:
    known = {"fast": (0.9, 0.5, 0.7, 0.8), "safe": (0.1, 0.9, 0.2, 0.3)}
    trials = result().trials
    measured = [
        replace(t, subscores={name: values[n] for name, values in known.items() if t.state == "complete"})
        for n, t in enumerate(trials)
    ]
    found = result(trajectory=Trajectory().add(*measured))
    assert [t.id for t in found.pareto("fast")] == [trials[3].id, trials[0].id]
    assert [t.id for t in found.pareto("safe")] == [trials[3].id]
    with pytest.raises(
        ValueError,
        match=r"by must be \"length\" or a subscore, but got 'slow'. Subscores: \['fast', 'safe'\]",
    ):
        found.pareto("slow")
    with pytest.raises(ValueError, match="Subscores: none"):
        result().pareto("fast")


def test_on_a_valset_its_score_counts_for_the_front() -> None:
    """A trial without a validation score is not compared."""
    trials = result().trials
    measured = [replace(t, valset_score=s) for t, s in zip(trials, (0.5, None, None, 0.2), strict=True)]
    found = result(trajectory=Trajectory().add(*measured), selected_on="valset")
    assert [t.id for t in found.pareto()] == [trials[0].id]


def test_the_table_has_a_row_a_trial() -> None:
    pandas = pytest.importorskip("pandas")
    frame = result().to_dataframe()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame["reward"]) == [0.25, 0.0, 0.5, 0.75]
    assert list(frame.columns) == list(result().to_dicts()[0])
    assert len(empty().to_dataframe()) == 0


def test_without_pandas_the_table_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"pip install 'dspy-opro\[report\]'"):
        result().to_dataframe()


def test_the_summary_has_the_figures_of_the_run() -> None:
    lines = result().summary().splitlines()
    assert lines[0] == "score on the trainset: 0.250 -> 0.750 (stop reason: patience)"
    assert lines[1] == "3 candidates in 3 rounds, 1 dropped early"
    for words in (
        "14 examples scored (this call took 75.0 s)",
        "20 scorer calls",
        "6 proposer calls",
        "3,400 tokens",
        "$0.0123",
    ):
        assert words in result().summary()
    assert lines[-1] == "1 example failed, first: ValueError: <none>"


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (3, "The program on record is returned."),
        (2, "No new instruction was reliably better. The program on record is returned."),
    ],
)
def test_a_resumed_run_without_proof_says_that_it_keeps_the_program_on_record(
    returned: int, words: str
) -> None:
    """An earlier process has confirmed it, and this one was cut short, for example by Ctrl-C."""
    found = result()
    unproven = Gain(False, 0.0, Interval(0.1, -0.2, 0.4, 0.95, 4, "selected"), 0.25, 0.75)
    changes: dict[str, Any] = {"gain": unproven, "returned": found.trials[returned].id}
    resumed = result(**changes, earlier_usage=Usage(metric_calls=9))
    assert resumed.verdict() == [words]
    for config in ({"confirm": False}, {"auto": "paper"}):
        chosen = result(**changes, earlier_usage=Usage(metric_calls=9), config=config)
        assert returned != 3 or chosen.verdict() == ["Expected gain, corrected for this choice: +0.000."]


@pytest.mark.parametrize(
    ("config", "stop_reason", "left"),
    [
        ({"max_metric_calls": 50}, "max_metric_calls", True),
        ({"max_metric_calls": 50, "confirm": False}, "max_metric_calls", False),
        ({"max_metric_calls": 50, "auto": "paper"}, "max_metric_calls", False),
        ({"max_metric_calls": 50}, "patience", False),
        ({}, "num_rounds", False),
    ],
)
def test_where_no_candidate_is_better_the_summary_says_so(
    config: dict[str, Any], stop_reason: str, left: bool
) -> None:
    trials = (trial("Answer.", [1.0, 1.0]), trial("Answer well.", [1.0, 0.0], 1))
    found = result(
        trajectory=Trajectory().add(*trials), curve=(1.0, 1.0), config=config, stop_reason=stop_reason
    )
    lines = found.summary().splitlines()
    assert lines[0] == "No instruction scored better than yours. The student is returned."
    assert ("Left of the budget: 36 examples. There was no gain to confirm." in lines) is left


def test_the_summary_of_a_run_that_is_not_over_has_no_verdict() -> None:
    assert result(trajectory=Trajectory().add(result().baseline), curve=(0.25,)).verdict() == []
    trials = (trial("Answer.", [1.0]), trial("Answer well.", [0.0], 1))
    unfinished = result(trajectory=Trajectory().add(*trials), curve=(1.0,), stop_reason=NOT_ENDED)
    assert unfinished.verdict() == []


def test_the_summary_of_a_run_without_a_score_says_so() -> None:
    assert "none, the run ended before the student was scored (stop reason: interrupted)" in empty().summary()


@pytest.mark.parametrize("name", ["best", "best_score", "baseline", "instructions"])
def test_without_a_score_there_is_no_best(name: str) -> None:
    with pytest.raises(ValueError, match=r"The run ended before the student was scored \(interrupted\)\."):
        getattr(empty(), name)


@pytest.mark.parametrize(
    ("config", "selected_on", "data"),
    [
        ({"trainset": 400}, "trainset", "4 of 400 train examples"),
        ({"trainset": 4}, "trainset", "the trainset"),
        ({}, "trainset", "the trainset"),
        ({"trainset": 400}, "valset", "the valset"),
    ],
)
def test_the_summary_names_the_data_that_was_used(
    config: dict[str, Any], selected_on: str, data: str
) -> None:
    found = result(config=config, selected_on=selected_on)
    assert found.summary().startswith(f"score on {data}: 0.250 -> 0.750")


def test_the_summary_says_which_part_of_a_valset_the_budget_paid_for() -> None:
    student = replace(trial("Answer.", [0, 1]), valset_score=0.5, valset_scores=(0.0, 1.0))
    config = {"trainset": 2, "valset": 150}
    found = result(trajectory=Trajectory().add(student), config=config, selected_on="valset")
    assert found.deciding_data == "2 of 150 validation examples"
    assert replace(found, config={**config, "valset": 2}).deciding_data == "the valset"


def test_the_summary_has_one_line_of_an_error_and_one_of_each() -> None:
    student = trial("Answer.", [0.0])
    lines = (
        result(
            trajectory=Trajectory().add(student),
            curve=(0.0, 0.0),
            usage=Usage(1, 1, 1, 0, 1, unpriced_calls=2),
            failures=(Failure(student.id, "train", 0, "ValueError: no\nsecond line"),),
            problems=("AuthError: no key\nsecond line", "empty"),
        )
        .summary()
        .splitlines()
    )
    assert lines[1:] == [
        "0 candidates in 1 round, 0 dropped early",
        "1 example scored (this call took 75.0 s)",
        "1 scorer call and 1 proposer call paid",
        "0 from the cache, 1 token, cost unknown",
        "1 example failed, first: ValueError: no",
        "no proposal was used, first problem: AuthError: no key",
    ]
    assert "first problem" not in result().summary()


def test_a_row_tells_a_set_of_demos_from_the_student() -> None:
    student = trial("Answer.", [0.0])
    with_demos = replace(student, candidate=replace(student.candidate, round=1, demo_set=2))
    rows = result(trajectory=Trajectory().add(student, with_demos)).to_dicts()
    assert [row["demo_set"] for row in rows] == [None, 2]


# -- what hangs on the program -------------------------------------------------------------------


def test_the_program_carries_what_scripts_read() -> None:
    program = attached()
    assert program.score == 75.0
    assert program.total_calls == 14
    assert [c["score"] for c in program.candidate_programs] == [
        75.0,
        50.0,
        25.0,
    ]  # no estimates of dropped ones
    assert (
        program.candidate_programs[0]["program"].answer.signature.instructions
        == "Answer very well & briefly."
    )
    assert program.trial_logs[2]["reward"] == 0.5


def test_among_equal_candidates_the_returned_one_leads() -> None:
    first, second = trial("One.", [0.5]), trial("Two.", [0.5], 1)
    program = attached(result(trajectory=Trajectory().add(first, second), curve=(0.5, 0.5), failures=()))
    assert [c["id"] for c in program.candidate_programs] == [first.id, second.id]


def test_without_track_stats_only_the_result_hangs_there() -> None:
    program = attached(track_stats=False)
    assert program.opro_result.best_score == 0.75
    assert {"candidate_programs", "trial_logs"} & vars(program).keys() == set()


def test_a_run_that_scored_nothing_has_no_score() -> None:
    program = Program()
    attach(program, empty(), build)
    assert (program.score, program.candidate_programs) == (None, [])


def test_predictors_are_those_of_the_student() -> None:
    assert [n for n, _ in attached().named_predictors()] == ["draft", "answer"]
    assert attached().dump_state().keys() == {"draft", "answer"}


def test_a_copy_shares_the_results_and_not_the_predictors() -> None:
    program = attached()
    other = program.deepcopy()
    assert other.opro_result is program.opro_result
    assert other.candidate_programs is not program.candidate_programs
    assert [a is b for a, b in zip(other.candidate_programs, program.candidate_programs, strict=True)] == [
        True
    ] * 3
    assert other.trial_logs[0] is program.trial_logs[0]
    assert other.answer is not program.answer


def test_best_of_n_runs_a_program_with_results() -> None:
    program = attached()
    copied = dspy.BestOfN(program, N=2, reward_fn=lambda args, prediction: 1.0, threshold=1.0).deepcopy()
    assert copied.module.opro_result is program.opro_result


@pytest.mark.parametrize("through", ["cloudpickle", "save_program"])
def test_program_and_results_survive_saving(through: str, tmp_path: Path) -> None:
    program = attached()
    if through == "cloudpickle":
        again = cloudpickle.loads(cloudpickle.dumps(program))
    else:
        program.save(tmp_path / "program", save_program=True)
        again = cloudpickle.loads((tmp_path / "program" / "program.pkl").read_bytes())
    assert again.opro_result == program.opro_result
    assert again.trial_logs == program.trial_logs
    assert [c["score"] for c in again.candidate_programs] == [75.0, 50.0, 25.0]
    assert again.dump_state() == program.dump_state()
    assert copy.deepcopy(again.candidate_programs)[0] is again.candidate_programs[0]


@pytest.mark.parametrize(("text", "what"), [("{}", "trajectory Field required"), ("no", "Invalid JSON")])
def test_a_file_without_a_result_is_an_error_of_one_line(text: str, what: str, tmp_path: Path) -> None:
    """A saved program is the likeliest one."""
    path = tmp_path / "program.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"A program is read with program\.load") as caught:
        OPROResult.load(path)
    assert str(caught.value).startswith(f"{path} holds no OPROResult ({what}")
    assert "\n" not in str(caught.value)


def test_the_state_alone_goes_to_json_and_into_a_fresh_program(tmp_path: Path) -> None:
    program = attached()
    program.save(tmp_path / "program.json")
    fresh = Program()
    fresh.load(tmp_path / "program.json")
    assert fresh.answer.signature.instructions == "Answer very well & briefly."
    assert vars(fresh).keys() & set(NAMES) == set()


class Grader(dspy.Module):  # type: ignore[misc]
    """A program with names of its own where the results would go."""

    def __init__(self) -> None:
        super().__init__()
        self.score = dspy.Predict("essay -> score")
        self.trial_logs = ["mine"]

    def total_calls(self) -> int:
        return 7

    def forward(self, essay: str) -> dspy.Prediction:
        return self.score(essay=essay)


def test_names_of_the_program_stay_the_programs(caplog: pytest.LogCaptureFixture) -> None:
    program = attached(student=Grader())
    assert isinstance(program.score, dspy.Predict)
    assert program.total_calls() == 7
    assert program.trial_logs == ["mine"]
    assert program.opro_result.best_score == 0.75
    assert isinstance(program.candidate_programs[0]["program"].score, dspy.Predict)
    assert "The program keeps its own attribute score. See program.opro_result instead." in caplog.messages


def test_a_second_run_replaces_the_first_ones_results_everywhere() -> None:
    first = attached()
    second = attached(result(stop_reason="num_rounds"), student=first, track_stats=False)
    assert second.opro_result.stop_reason == "num_rounds"
    assert "candidate_programs" not in vars(second)
    third = attached(student=first)
    assert all(vars(c["program"]).keys() & set(NAMES) == set() for c in third.candidate_programs)
    assert first.opro_result.stop_reason == "patience"


def test_a_result_on_record_says_for_how_long_it_was_recorded() -> None:
    assert "(recorded for 75.0 s)" in result(data=Examples(has_texts=False)).summary()
    assert "(this call took 75.0 s)" in result().summary()
