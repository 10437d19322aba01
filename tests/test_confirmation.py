"""What a run returns and says of it stands on examples that the search never used, where there are some."""

from __future__ import annotations

import time
from typing import Any

import pytest

from dspy_opro import OPROTeleprompter
from dspy_opro.testing import LMCall, ScriptedLM, VocabularyTask
from tests.runs import is_proposal


class Seen:
    """Which questions the scorer answers, in order."""

    def __init__(self, task: VocabularyTask) -> None:
        self.task = task
        self.questions: list[str] = []

    def __call__(self, call: LMCall) -> Any:
        if is_proposal(call):
            return self.task.proposer(call)
        self.questions.append(call.inputs["question"])
        return self.task.scorer(call)


def compiled(task: VocabularyTask, num_train: int, **options: Any) -> tuple[Any, Seen]:
    seen = Seen(task)
    lm = ScriptedLM(seen, keep_calls=False)
    values: dict[str, Any] = {"metric": task.metric, "prompt_model": lm, "task_model": lm, "num_threads": 4}
    valset = options.pop("valset", None)
    teleprompter = OPROTeleprompter(**{**values, "display_progress": False, **options})
    return teleprompter.compile(task.student(), trainset=task.trainset(num_train), valset=valset), seen


def test_student_and_winner_are_scored_on_examples_that_the_search_never_used() -> None:
    task = VocabularyTask(1)
    program, seen = compiled(task, 60, max_metric_calls=600)
    result = program.opro_result
    gain = result.gain
    assert gain.interval.basis == "fresh"
    assert gain.is_proven
    assert result.best.id != result.baseline.id
    rows = result.examples()
    by_split: dict[str, set[str]] = {}
    for row in rows:
        by_split.setdefault(row["split"], set()).add(row["inputs.question"])
    assert not by_split["train"] & by_split["unseen"]
    assert len(by_split["unseen"]) == gain.interval.num_examples
    assert all(seen.questions.count(question) == 2 for question in by_split["unseen"])
    assert len(seen.questions) == len(rows)
    assert result.usage.metric_calls <= 600
    assert result.summary().startswith("unseen examples: ")
    assert gain.interval.low <= gain.interval.estimate <= gain.interval.high


def test_a_valset_confirms_the_result_and_the_search_does_not_see_it() -> None:
    task = VocabularyTask(1)
    program, seen = compiled(task, 40, valset=task.valset(60), num_rounds=4)
    result = program.opro_result
    assert result.selected_on == "trainset"
    assert result.baseline.num_scored == 40
    assert all(trial.valset_score is None for trial in result.trials)
    gain = result.gain
    assert (gain.interval.basis, gain.interval.num_examples) == ("fresh", 40)
    asked = {example.question for example in task.valset(60)} & set(seen.questions)
    assert asked == {row["inputs.question"] for row in result.examples() if row["split"] == "unseen"}
    assert all(seen.questions.count(question) == 2 for question in asked)


def test_a_third_of_the_valset_does_not_select_among_demos() -> None:
    """Train examples are demos, so train scores flatter candidates with demos."""
    task = VocabularyTask(1)
    program, _ = compiled(task, 40, valset=task.valset(60), num_rounds=2, max_labeled_demos=6)
    result = program.opro_result
    assert result.selected_on == "valset"
    assert len(result.baseline.valset_scores) == 40
    assert result.gain is None or result.gain.interval.num_examples == 20


def test_a_metric_that_means_nothing_rarely_replaces_the_student() -> None:
    replaced, told = 0, 0.0
    for seed in range(8):
        program, _ = compiled(
            VocabularyTask(seed, signal=0.0, noise=1.0, base=0.5), 40, max_metric_calls=200, seed=seed
        )
        result = program.opro_result
        replaced += result.best.id != result.baseline.id
        told += 0.0 if result.gain is None else result.gain.value
        if result.best.id == result.baseline.id and result.gain is not None:
            assert "No instruction was reliably better than yours" in result.summary()
    assert replaced <= 3
    assert told / 8 < 0.06


def test_without_confirmation_nothing_is_held_back_and_the_best_is_returned() -> None:
    task = VocabularyTask(1)
    program, seen = compiled(task, 60, num_rounds=4, confirm=False)
    result = program.opro_result
    assert result.best == result.trajectory.best
    assert len(set(seen.questions)) == 60
    assert result.gain is None or result.gain.interval.basis == "selected"


@pytest.mark.parametrize("options", [{"confirm": False}, {"auto": "paper"}])
def test_without_confirmation_the_expected_gain_is_that_of_the_candidate(options: dict[str, Any]) -> None:
    runs = [compiled(VocabularyTask(seed), 20, num_rounds=3, **options)[0] for seed in range(4)]
    better = [run.opro_result for run in runs if run.opro_result.gain is not None]
    assert len(better) > 1
    for result in better:
        assert result.best == result.trajectory.best
        assert result.gain.value == result.gain.interval.estimate
        # The candidate is returned in any case, whether a gain is probable or not.
        assert result.verdict() == []


def test_too_few_examples_to_hold_any_back_give_a_corrected_interval() -> None:
    program, _ = compiled(VocabularyTask(1), 20, num_rounds=6)
    gain = program.opro_result.gain
    assert gain is not None
    assert gain.interval.basis == "selected"
    assert (
        "measured on the examples that also chose the candidate, and corrected for that"
        in program.opro_result.summary()
    )


@pytest.mark.parametrize("num_threads", [1, 16])
def test_the_confirmation_is_the_same_in_a_resumed_run(tmp_path: Any, num_threads: int) -> None:
    task = VocabularyTask(1)
    options: dict[str, Any] = {"max_metric_calls": 400, "log_dir": tmp_path, "num_threads": num_threads}
    first, _ = compiled(task, 60, **options)
    again, seen = compiled(task, 60, **options)
    assert seen.questions == []
    assert again.opro_result.gain == first.opro_result.gain
    assert again.opro_result.best.id == first.opro_result.best.id


@pytest.mark.parametrize("num_threads", [1, 8])
@pytest.mark.parametrize("budget", ["max_tokens", "timeout_seconds"])
def test_other_budgets_keep_a_share_for_the_confirmation_too(
    budget: str, num_threads: int, tmp_path: Any
) -> None:
    task = VocabularyTask(1)
    started = time.monotonic()
    compiled(task, 60, num_threads=num_threads, max_metric_calls=300)
    # The time of 1,800 examples on this machine, be it a slow one: 15% of it confirm with 40.
    limits = {"max_tokens": 150_000, "timeout_seconds": max(2.0, 6 * (time.monotonic() - started))}
    options = {"auto": None, "num_threads": num_threads, "log_dir": tmp_path, budget: limits[budget]}
    program, _ = compiled(task, 60, **options)
    result = program.opro_result
    assert result.stop_reason == budget
    assert result.gain.interval.basis == "fresh"
    if budget == "max_tokens":
        assert result.usage.tokens <= 150_000 * 1.02
        again, seen = compiled(task, 60, **options)
        assert seen.questions == []
        assert again.opro_result.gain == result.gain


def test_the_first_scores_may_use_all_of_a_token_budget() -> None:
    options: dict[str, Any] = {"auto": None, "lag": 0, "num_threads": 1}
    first, _ = compiled(VocabularyTask(1), 40, stop_at_score=0.0, **options)
    needed = first.opro_result.usage.tokens
    program, _ = compiled(VocabularyTask(1), 40, max_tokens=int(1.1 * needed), **options)
    result = program.opro_result
    assert result.stop_reason == "max_tokens"
    assert result.baseline == first.opro_result.baseline


@pytest.mark.parametrize(("num_train", "is_few"), [(3, True), (19, True), (20, False)])
def test_few_train_examples_are_warned_of(
    num_train: int, is_few: bool, caplog: pytest.LogCaptureFixture
) -> None:
    compiled(VocabularyTask(1), num_train, num_rounds=1)
    told = [text for text in caplog.messages if text.startswith(f"Train examples: only {num_train}.")]
    assert len(told) == is_few
    assert all("Give at least 20" in text for text in told)


def test_a_student_with_little_to_gain_is_said_to_be_one(caplog: pytest.LogCaptureFixture) -> None:
    task = VocabularyTask(1, base=0.85)
    program, _ = compiled(task, 20, num_rounds=1)
    score = program.opro_result.baseline.score
    assert 0.9 < score < 1.0
    said = f"Your program scores {score:.3f}, so it can gain at most {1 - score:.3f}."
    assert any(text.startswith(said) for text in caplog.messages)


def test_a_gain_within_noise_is_said_to_be_none() -> None:
    task = VocabularyTask(2, signal=0.0, noise=1.0, base=0.5)
    program, _ = compiled(task, 40, max_metric_calls=200, seed=5)
    result = program.opro_result
    assert 0.0 < result.gain.interval.estimate < result.gain.interval.high
    assert not result.gain.is_proven
    assert result.gain.value == 0.0
    assert result.best == result.baseline
    assert program.signature.instructions == task.student().signature.instructions
    assert "No instruction was reliably better than yours. The student is returned." in result.summary()


@pytest.mark.parametrize("confirm", [True, False])
def test_one_example_gives_no_interval(confirm: bool) -> None:
    program, _ = compiled(VocabularyTask(2), 1, num_rounds=4, num_candidates=16, confirm=confirm)
    result = program.opro_result
    assert result.baseline.score == 0.0
    assert result.trajectory.best.score == 1.0
    assert "interval" not in result.summary()
    assert ("No instruction was reliably better" in result.summary()) is confirm


def test_examples_that_were_kept_for_demos_confirm_a_program_without_demos() -> None:
    results = (compiled(VocabularyTask(seed), 64)[0].opro_result for seed in range(10))
    result = next(r for r in results if r.best.id != r.baseline.id and r.best.candidate.demo_set is None)
    places: dict[str, set[int]] = {}
    for row in result.examples():
        places.setdefault(row["split"], set()).add(row["example"])
    assert (len(places["train"]), len(places["unseen"])) == (32, 32)
    assert not places["train"] & places["unseen"]
    assert result.gain.interval.num_examples == 32


@pytest.mark.parametrize("num_val", [1, 7])
def test_a_valset_too_small_to_confirm_is_left_out_and_the_trainset_confirms(num_val: int) -> None:
    task = VocabularyTask(1)
    with pytest.warns(
        UserWarning, match=f"valset has {num_val} examples, and at least 8 are needed to confirm"
    ):
        program, seen = compiled(task, 60, max_metric_calls=600, valset=task.valset(num_val))
    without, _ = compiled(task, 60, max_metric_calls=600)
    result = program.opro_result
    assert result.gain == without.opro_result.gain
    assert result.gain.is_proven
    assert result.instructions == without.opro_result.instructions
    assert not set(seen.questions) & {example.question for example in task.valset(num_val)}


@pytest.mark.parametrize("num_val", [20, 40])
@pytest.mark.parametrize("max_metric_calls", [30, 60])
def test_a_valset_that_the_budget_does_not_pay_for_is_left_out(max_metric_calls: int, num_val: int) -> None:
    task = VocabularyTask(1)
    with pytest.warns(UserWarning, match="The budget does not pay for the valset. The run leaves it out"):
        program, _ = compiled(task, 60, max_metric_calls=max_metric_calls, valset=task.valset(num_val))
    without, _ = compiled(task, 60, max_metric_calls=max_metric_calls)
    assert program.opro_result.instructions == without.opro_result.instructions
    assert len(program.opro_result.trials) == len(without.opro_result.trials)
    assert (len(program.opro_result.trials) > 1) == (max_metric_calls == 60)


def test_a_valset_that_selects_among_demos_of_scored_examples_stays(recwarn: pytest.WarningsRecorder) -> None:
    task = VocabularyTask(1)
    program, _ = compiled(task, 20, valset=task.valset(20), max_metric_calls=600, max_labeled_demos=4)
    assert program.opro_result.selected_on == "valset"
    assert not [str(w.message) for w in recwarn if "valset" in str(w.message)]


def test_a_small_valset_chooses_the_result_if_nothing_is_to_be_confirmed() -> None:
    task = VocabularyTask(1)
    program, _ = compiled(task, 60, max_metric_calls=600, valset=task.valset(5), confirm=False)
    assert program.opro_result.selected_on == "valset"


@pytest.mark.parametrize(
    ("num_train", "options", "is_told"),
    [
        (30, {"max_metric_calls": 16}, True),
        (100, {"max_metric_calls": 150, "max_train_examples": 100}, True),
        (100, {"max_full_evals": 1}, True),
        (60, {"max_metric_calls": 100}, False),
    ],
)
def test_a_budget_that_pays_for_no_candidate_is_warned_of(
    num_train: int, options: Any, is_told: bool, recwarn: pytest.WarningsRecorder
) -> None:
    program, _ = compiled(VocabularyTask(1), num_train, **options)
    told = [str(w.message) for w in recwarn if "tries no candidate" in str(w.message)]
    assert len(told) == is_told
    budget = options.get("max_metric_calls", num_train)
    assert all(f"The budget pays for scoring {budget} examples." in message for message in told)
    assert (len(program.opro_result.trials) == 1) == is_told
