"""A run with another plan never ends below the best program on record, and `best.json` never gets worse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import dspy
import optuna
import pytest
from optuna.pruners import PercentilePruner
from workers import PromptAlone

from dspy_opro import OPROTeleprompter
from dspy_opro.storage.opening import journal_storage
from dspy_opro.storage.run_storage import OPENED_BY
from dspy_opro.testing import ScriptedLM, VocabularyTask

HEAVY = {"auto": "heavy", "num_rounds": 3}


def compile_(
    task: VocabularyTask, log_dir: Path, num_val: int = 40, num_train: int = 60, **options: Any
) -> dspy.Module:
    teleprompter = OPROTeleprompter(
        metric=task.metric,
        log_dir=log_dir,
        prompt_model=ScriptedLM(PromptAlone(task.proposer)),
        task_model=ScriptedLM(PromptAlone(task.scorer)),
        num_threads=4,
        display_progress=False,
        **options,
    )
    data = {"trainset": task.trainset(num_train), "valset": task.valset(num_val) or None}
    return teleprompter.compile(task.student(), **data)


def on_disk(log_dir: Path) -> str:
    return str(json.loads((log_dir / "best.json").read_text())["signature"]["instructions"])


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("num_val", "confirm"), [pytest.param(40, False, marks=pytest.mark.slow), (40, True), (0, True)]
)
@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (2, 3, 4))])
def test_another_preset_never_ends_below_what_is_on_record(
    seed: int, num_val: int, confirm: bool, tmp_path: Path
) -> None:
    task, seen, same = VocabularyTask(seed), set(), {"num_val": num_val, "confirm": confirm}
    first = compile_(task, tmp_path, auto="light", **same)
    assert first.opro_result.best.id != first.opro_result.baseline.id
    second = compile_(task, tmp_path, callbacks=[lambda *_: seen.add(on_disk(tmp_path))], **HEAVY, **same)
    result = second.opro_result
    assert result.best_score >= first.opro_result.best_score
    assert on_disk(tmp_path) == second.signature.instructions
    ids = [trial.id for trial in result.trials]
    assert first.opro_result.best.id in ids
    assert len(set(ids)) == len(ids)
    for trial in (result.baseline, result.best, result.trajectory.best):  # their predictions are kept
        assert len(list(filter(None, result.data.outcomes[trial.id]["train"]))) == trial.num_scored
    is_selected_by_valset = num_val and not confirm
    scores = {
        t.candidate.instructions["self"]: t.valset_score if is_selected_by_valset else t.reward
        for t in result.trials
    }
    assert seen
    assert min(scores[text] for text in seen) >= first.opro_result.best_score


@pytest.mark.slow
def test_killed_with_the_other_plan_it_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    task, whole, copies = VocabularyTask(1), tmp_path / "whole", []

    def copy(study: Any, trial: Any) -> None:
        if trial.number % 25 == 0 or not copies:
            copies.append(shutil.copytree(whole, tmp_path / f"at-{trial.number}"))

    compile_(task, whole, auto="light")
    result = compile_(task, whole, callbacks=[copy], **HEAVY).opro_result
    assert len(copies) > 1
    for directory in (*copies, whole):
        again = compile_(task, directory, **HEAVY)
        assert again.opro_result.trials == result.trials
        assert again.opro_result.returned == result.returned
        assert on_disk(directory) == again.signature.instructions


def test_another_pruner_of_optuna_is_another_plan(tmp_path: Path) -> None:
    """A run with the first or the last of these pruners alone does not prove the gain, and returns the student."""
    same = {
        "num_val": 0,
        "num_train": 24,
        "auto": None,
        "num_rounds": 3,
        "num_candidates": 4,
        "minibatch_size": 4,
    }
    shares, returned = (80.0, 1.0, 1.0, 50.0), []
    for share in shares:
        pruner = PercentilePruner(share, n_startup_trials=0)
        result = compile_(VocabularyTask(3), tmp_path, pruner=pruner, **same).opro_result
        returned.append(result.returned)
    assert returned[0] == result.baseline.id
    assert returned[1:] == [result.trajectory.best.id] * 3


def test_fewer_rounds_and_a_return_to_the_first_plan_keep_the_best(tmp_path: Path) -> None:
    task = VocabularyTask(2)
    best = compile_(task, tmp_path, auto="light").opro_result.best_score
    for options in ({"auto": "light", "num_rounds": 1}, HEAVY, {"auto": "light"}):
        result = compile_(task, tmp_path, **options).opro_result
        assert result.best_score >= best
        best = result.best_score


def test_the_same_plan_and_more_rounds_carry_nothing(tmp_path: Path) -> None:
    task = VocabularyTask(2)
    first = compile_(task, tmp_path, auto=None, num_rounds=2, lag=0).opro_result
    more = compile_(task, tmp_path, auto=None, num_rounds=4, lag=0).opro_result
    assert more.trials[: len(first.trials)] == first.trials


def test_what_was_returned_without_a_confirmation_is_no_program_to_fall_back_on(tmp_path: Path) -> None:
    """Every instruction is as good as the student's, so a run without a confirmation returns a lucky one."""
    task, same = VocabularyTask(2, base=0.5, signal=0, noise=1), {"num_val": 0, "auto": None}
    first = compile_(task, tmp_path, confirm=False, num_rounds=3, **same).opro_result
    assert first.returned != first.baseline.id
    second = compile_(task, tmp_path, num_rounds=3, **same).opro_result
    assert second.gain is not None
    assert not second.gain.is_proven
    assert second.returned == second.baseline.id
    third = compile_(task, tmp_path, num_rounds=2, **same).opro_result
    assert third.gain is None or third.gain.is_proven or third.returned == third.baseline.id


@pytest.mark.parametrize(("before", "budget"), [(200, 400), (300, 320), (300, 200)])
def test_all_processes_together_keep_within_max_metric_calls(
    before: int, budget: int, tmp_path: Path
) -> None:
    task, same = VocabularyTask(3), {"num_val": 0, "auto": None}
    first = compile_(task, tmp_path, max_metric_calls=before, **same).opro_result
    second = compile_(task, tmp_path, max_metric_calls=budget, **same).opro_result
    assert first.usage.metric_calls <= before
    assert second.usage.metric_calls <= max(budget, first.usage.metric_calls)
    assert second.stop_reason == "max_metric_calls"
    assert {first.returned, first.trajectory.best.id} <= {trial.id for trial in second.trials}
    if budget == 400:
        assert len(second.trials) > len(first.trials)
    again = compile_(task, tmp_path, max_metric_calls=budget, **same).opro_result
    assert again.usage == second.usage
    assert (again.returned, again.gain) == (second.returned, second.gain)


def test_the_result_of_a_larger_budget_is_confirmed_within_it(tmp_path: Path) -> None:
    task, same = VocabularyTask(3), {"num_val": 0, "auto": None}
    compile_(task, tmp_path, max_metric_calls=200, **same)
    result = compile_(task, tmp_path, max_metric_calls=400, **same).opro_result
    assert result.gain is not None
    assert result.gain.interval.basis == "fresh"


def test_a_budget_that_does_not_pay_for_the_first_scores_is_an_error(tmp_path: Path) -> None:
    task, same = VocabularyTask(3), {"num_val": 0, "auto": None, "max_metric_calls": 200}
    first = compile_(task, tmp_path, **same).opro_result
    with pytest.raises(
        ValueError, match=r"The budget is 200 scored examples, but .* scored 199, and \d+ more"
    ):
        compile_(task, tmp_path, pruner=None, **same)
    attrs = optuna.load_study(study_name="opro", storage=journal_storage(tmp_path)).user_attrs
    assert (attrs["stop_reason"], attrs[OPENED_BY]) == (first.stop_reason, None)
    again = compile_(task, tmp_path, **same).opro_result
    assert again.usage == first.usage
    assert (again.trials, again.gain) == (first.trials, first.gain)


@pytest.mark.parametrize("num_val", [0, 40])
def test_examples_that_an_earlier_plan_chose_by_are_not_unseen(num_val: int, tmp_path: Path) -> None:
    """Without a confirmation all examples of the valset choose, or if there is none all of the trainset."""
    task, same = VocabularyTask(1), {"num_val": num_val, "auto": None, "num_candidates": 4, "lag": 0}
    compile_(task, tmp_path, confirm=False, num_rounds=3, **same)
    result = compile_(task, tmp_path, num_rounds=1, **same).opro_result
    assert result.gain is not None
    assert result.gain.interval.basis == "selected"


@pytest.mark.parametrize("before", [(), ("Name it first.",)])
@pytest.mark.parametrize("num_rounds", [1, 2])
def test_new_initial_instructions_are_tried_in_a_resumed_run(
    before: tuple[str, ...], num_rounds: int, tmp_path: Path
) -> None:
    task = VocabularyTask(3)
    good = f"Name the code. {' '.join(sorted(task.good))}"
    same = {"num_val": 0, "auto": None, "num_candidates": 4, "lag": 0}
    first = compile_(task, tmp_path, num_rounds=1, initial_instructions=before, **same).opro_result
    options = {"num_rounds": num_rounds, "initial_instructions": [good], **same}
    second = compile_(task, tmp_path, **options).opro_result
    tried = [trial.candidate.instructions["self"] for trial in second.trials]
    assert tried.count(good) == 1
    assert first.trajectory.best.id in [trial.id for trial in second.trials]
    again = compile_(task, tmp_path, **options).opro_result
    assert again.trials == second.trials
    assert again.usage == second.usage


@pytest.mark.slow
def test_a_candidate_with_demos_competes_too(tmp_path: Path) -> None:
    task, demos = VocabularyTask(2), {"max_labeled_demos": 2, "max_bootstrapped_demos": 0}
    first = compile_(task, tmp_path, auto="light", **demos).opro_result
    second = compile_(task, tmp_path, **HEAVY, **demos).opro_result
    assert second.best_score >= first.best_score
    again = compile_(task, tmp_path, **HEAVY, **demos).opro_result
    assert again.trials == second.trials
