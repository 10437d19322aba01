"""Demos: sets of them race together with the instructions, if they are asked for or a preset has enough examples."""

from __future__ import annotations

import asyncio
import enum
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy.teleprompt import BootstrapFewShot

from dspy_opro.testing import LMCall, ScriptedLM
from tests.conformance.programs import CASES, QA
from tests.conformance.world import MAGIC, metric, scripted, teleprompter, trainset
from tests.runs import is_proposal


def answer(call: LMCall) -> str | Mapping[str, Any]:
    """Half right when told to be precise, half right when shown an example, right with both."""
    if is_proposal(call):
        return {"instruction": f"{MAGIC} Mind {{product}}. Variant {hash(call.rollout_id) % 10_000}."}
    number = int("".join(filter(str.isdigit, call.inputs["question"])) or 0)
    is_shown = len(call.messages) > 2
    is_right = (MAGIC in call.system and number % 2 == 0) or (is_shown and number % 2 == 1) or number == 0
    return {name: "42" if name == "answer" and is_right else "unsure" for name in call.output_fields}


@pytest.fixture(autouse=True)
def lm() -> Iterator[ScriptedLM]:
    lm = ScriptedLM(answer)
    with dspy.context(lm=lm):
        yield lm


DEMOS = {"max_bootstrapped_demos": 1, "max_labeled_demos": 1, "num_rounds": 4, "num_candidates": 6}


def searches_demos(program: Any) -> bool:
    return any(t.candidate.demo_set is not None for t in program.opro_result.trajectory.trials)


@pytest.mark.parametrize("num_examples", [4, 70])
def test_the_students_demos_are_kept(num_examples: int) -> None:
    student = dspy.Predict(QA)
    student.demos = [dspy.Example(question="a", answer="b")]
    best = teleprompter().compile(student, trainset=trainset(num_examples))
    assert best.demos == student.demos
    assert not searches_demos(best)


@pytest.mark.parametrize(
    ("num_examples", "changes", "are_searched"),
    [
        (64, {}, True),
        (63, {}, False),  # a quarter of the examples is less than two sets of 4 and 4 demos
        (64, {"auto": "medium", "max_train_examples": 16}, True),
        (64, {"max_metric_calls": 100}, True),
        (64, {"auto": None}, False),
        (64, {"auto": "paper"}, False),
        (64, {"max_bootstrapped_demos": 0}, False),
        (31, {"max_labeled_demos": 0}, False),
        # A round of two has no room beside these.
        (64, {"initial_instructions": ["One {product}.", "Two {product}."]}, False),
    ],
)
def test_a_preset_searches_for_demos_where_they_need_not_be_scored_examples(
    num_examples: int, changes: Mapping[str, Any], are_searched: bool
) -> None:
    best = teleprompter(**changes).compile(dspy.Predict(QA), trainset=trainset(num_examples))
    assert searches_demos(best) is are_searched


@pytest.mark.parametrize("num_examples", [20, 64])
def test_a_preset_adds_bootstrapped_demos_to_labeled_ones_only_where_they_need_not_be_scored_examples(
    num_examples: int,
) -> None:
    optimizer = teleprompter(max_labeled_demos=2, num_candidates=4)
    best = optimizer.compile(dspy.Predict(QA), trainset=trainset(num_examples))
    assert searches_demos(best)
    trials = best.opro_result.trajectory.trials
    sets = [t.candidate.demos for t in trials if t.candidate.demo_set is not None]
    has_bootstrapped = any(demo.get("augmented") for demos in sets for demo in json.loads(demos["self"]))
    assert has_bootstrapped is (num_examples == 64)


def test_a_preset_bootstraps_from_the_users_teacher(recwarn: pytest.WarningsRecorder) -> None:
    teacher = dspy.Predict(QA.with_instructions(f"{MAGIC} Mind {{product}}."))
    best = teleprompter(num_candidates=4).compile(dspy.Predict(QA), trainset=trainset(64), teacher=teacher)
    assert searches_demos(best)
    assert not [str(w.message) for w in recwarn if "teacher" in str(w.message)]


def test_instructions_and_demos_are_raced_together() -> None:
    student = dspy.ChainOfThought(QA)
    best = teleprompter(**DEMOS).compile(student, trainset=trainset(8))
    assert best.score == 100.0
    assert best.predictors()[0].demos
    assert MAGIC in best.predictors()[0].signature.instructions
    assert student.predictors()[0].demos == []
    first = [t.candidate for t in best.opro_result.trajectory.trials if t.candidate.round == 1]
    alone = [c for c in first if c.demo_set is not None]
    assert len(alone) == 3 - sum("duplicate" in p for p in best.opro_result.problems)
    assert all(c.rewritten == () for c in alone)


def test_the_same_run_twice_and_with_more_threads_is_the_same() -> None:
    def ids(num_threads: int) -> list[str]:
        best = teleprompter(**{**DEMOS, "num_threads": num_threads}).compile(
            dspy.Predict(QA), trainset=trainset(8)
        )
        return [trial.id for trial in best.opro_result.trajectory.trials]

    assert ids(1) == ids(1) == ids(8)


def test_a_resumed_run_has_the_demos_of_the_first(tmp_path: Path, lm: ScriptedLM) -> None:
    values = {**DEMOS, "log_dir": tmp_path}
    first = teleprompter(**values).compile(dspy.Predict(QA), trainset=trainset(8))
    num_calls = lm.num_calls
    second = teleprompter(**values).compile(dspy.Predict(QA), trainset=trainset(8))
    assert lm.num_calls == num_calls
    assert [d.toDict() for d in second.demos] == [d.toDict() for d in first.demos]
    assert second.opro_result.instructions == first.opro_result.instructions


def test_labeled_demos_alone_need_no_calls(lm: ScriptedLM) -> None:
    best = teleprompter(max_labeled_demos=2, num_candidates=2).compile(dspy.Predict(QA), trainset=trainset(6))
    tried = [t for t in best.opro_result.trajectory.trials if t.candidate.demo_set is not None]
    assert tried
    assert best.opro_result.usage.scorer_calls == best.opro_result.usage.metric_calls


@pytest.mark.parametrize("bootstrapped", [0, 2])
def test_without_expected_outputs_there_are_no_labeled_demos(lm: ScriptedLM, bootstrapped: int) -> None:
    """Such demos would have inputs alone, which DSPy's adapters do not show."""
    inputs = [example.inputs() for example in trainset(24)]
    best = teleprompter(
        metric=lambda example, prediction: 1.0,
        max_bootstrapped_demos=bootstrapped,
        max_labeled_demos=4,
        num_candidates=4,
    ).compile(dspy.Predict(QA), trainset=inputs)
    result = best.opro_result
    assert (
        "ValueError: no labeled demo has an output field of a predictor: no example gives one"
        in result.problems
    )
    sets = [json.loads(t.candidate.demos["self"]) for t in result.trials if t.candidate.demos is not None]
    assert bool(sets) == bool(bootstrapped)
    assert all("answer" in demo for demos in sets for demo in demos)


class Color(enum.Enum):
    RED = "r"


class Paint(dspy.Signature):  # type: ignore[misc]
    """Name the color."""

    question: str = dspy.InputField()
    color: Color = dspy.OutputField()


def test_demos_show_values_as_adapters_do() -> None:
    data = [dspy.Example(question=f"Q{n}", color=Color.RED).with_inputs("question") for n in range(6)]
    lm = ScriptedLM(lambda call: {"color": "r"} if "color" in call.output_fields else answer(call))
    with dspy.context(lm=lm):
        best = teleprompter(metric=lambda e, p: p.color == e.color, pruner=None, **DEMOS).compile(
            dspy.Predict(Paint), trainset=data
        )
    sets = [c["program"].demos for c in best.candidate_programs if c["program"].demos]
    assert sets
    assert {demo["color"] for demos in sets for demo in demos} == {"r"}


def test_a_demo_that_fails_does_not_log_the_data(capfd: pytest.CaptureFixture[str]) -> None:
    def strict(example: Any, prediction: Any, trace: Any = None) -> float:
        if trace is not None:
            raise RuntimeError("no demo passes")
        return metric(example, prediction)

    data = [dspy.Example(question=f"Q{n}", answer="42", note="private " * 99) for n in range(6)]
    teleprompter(metric=strict, **DEMOS).compile(
        dspy.Predict(QA), trainset=[example.with_inputs("question") for example in data]
    )
    logged = capfd.readouterr().err
    assert "no demo passes" in logged
    for line in logged.splitlines():
        if "no demo passes" in line:  # DSPy names the example that failed, and no other
            assert line.count("private " * 99) <= 1


def test_the_teacher_bootstraps(lm: ScriptedLM) -> None:
    class Teacher(dspy.Predict):  # type: ignore[misc]
        calls = 0

        def forward(self, **inputs: Any) -> Any:
            type(self).calls += 1
            return super().forward(**inputs)

    teacher = Teacher(QA)
    teleprompter(max_bootstrapped_demos=1).compile(dspy.Predict(QA), trainset=trainset(), teacher=[teacher])
    assert Teacher.calls > 0


def test_an_optimized_teacher_bootstraps_for_a_plain_student() -> None:
    teacher = dspy.Predict(QA.with_instructions(f"{MAGIC} Be a teacher."))
    teacher._compiled = True
    best = teleprompter(max_bootstrapped_demos=2, num_candidates=4).compile(
        dspy.Predict(QA), trainset=trainset(), teacher=teacher
    )
    assert best.opro_result.problems == ()
    sets = [c["program"].demos for c in best.candidate_programs if c["program"].demos]
    assert sets and all(demo["answer"] == "42" for demos in sets for demo in demos)
    assert teacher.demos == []


def test_a_threshold_that_no_demo_passes_is_a_problem_on_record() -> None:
    best = teleprompter(max_bootstrapped_demos=1, num_candidates=4, metric_threshold=90).compile(
        dspy.Predict(QA), trainset=trainset()
    )
    assert any("no demo passed the metric with metric_threshold=90" in p for p in best.opro_result.problems)
    assert all(t.candidate.demo_set is None for t in best.opro_result.trajectory.trials)


def test_teacher_settings_hold_while_demos_are_made_and_not_for_candidates(lm: ScriptedLM) -> None:
    strong = ScriptedLM(answer)
    teleprompter(max_bootstrapped_demos=1, teacher_settings={"lm": strong}).compile(
        dspy.Predict(QA), trainset=trainset()
    )
    assert 0 < strong.num_calls <= 4
    assert lm.num_calls > 4


@pytest.mark.parametrize("max_rounds", [1, 3])
def test_max_rounds_are_the_attempts_at_one_example(max_rounds: int) -> None:
    asked: list[str] = []

    class Teacher(dspy.Predict):  # type: ignore[misc]
        def forward(self, **inputs: Any) -> Any:
            asked.append(inputs["question"])
            return super().forward(**{**inputs, "question": "What is 1?"})  # never right

    teleprompter(max_bootstrapped_demos=1, max_rounds=max_rounds, num_candidates=2).compile(
        dspy.Predict(QA), trainset=trainset(), teacher=Teacher(QA)
    )
    assert {asked.count(question) for question in asked} == {max_rounds}


@pytest.mark.parametrize("max_errors", [1, 3])
def test_max_errors_are_the_teachers_failures_that_end_a_set(max_errors: int) -> None:
    asked: list[str] = []

    class Broken(dspy.Predict):  # type: ignore[misc]
        def forward(self, **inputs: Any) -> Any:
            asked.append(inputs["question"])
            raise RuntimeError("no teacher today")

    best = teleprompter(max_bootstrapped_demos=1, max_errors=max_errors, num_candidates=2).compile(
        dspy.Predict(QA), trainset=trainset(), teacher=Broken(QA)
    )
    assert len(asked) == max_errors
    assert best.opro_result.num_failures == 0


@pytest.mark.parametrize("name", ["BestOfN", "Refine"])
def test_best_of_n_and_refine_have_labeled_demos_alone(name: str) -> None:
    """They call a copy of their program, whose answers BootstrapFewShot can't assign."""
    with dspy.context(lm=scripted()):
        theirs = BootstrapFewShot(metric=lambda e, p, t: True, max_labeled_demos=0).compile(
            CASES[name].make(), trainset=trainset()
        )
        ours = teleprompter(
            metric=lambda e, p: True, max_bootstrapped_demos=1, max_labeled_demos=1, pruner=None
        ).compile(CASES[name].make(), trainset=trainset())
    assert [p.demos for p in theirs.predictors()] == [[]]
    demos = [demo for c in ours.candidate_programs for p in c["program"].predictors() for demo in p.demos]
    assert demos
    assert not any(demo.get("augmented") for demo in demos)


@pytest.mark.parametrize(("num_examples", "are_others"), [(40, True), (8, False)])
def test_demos_are_of_examples_that_candidates_are_not_scored_on_where_there_are_enough(
    num_examples: int, are_others: bool
) -> None:
    scored: set[str] = set()
    bootstrapped: set[str] = set()

    def judge(example: Any, prediction: Any, trace: Any = None) -> bool:
        (scored if trace is None else bootstrapped).add(example.question)
        return True

    teleprompter(metric=judge, max_train_examples=8, **DEMOS).compile(
        dspy.Predict(QA), trainset=trainset(num_examples)
    )
    assert len(scored) == 8
    assert bootstrapped
    assert bootstrapped.isdisjoint(scored) is are_others


@pytest.mark.parametrize("valset", [None, trainset(120)[100:]])
def test_no_example_that_a_result_stands_on_is_a_demo(valset: Any) -> None:
    """A budget scores few of the train examples; those that confirm the result are no demos either."""
    scored: set[str] = set()

    def judge(example: Any, prediction: Any, trace: Any = None) -> bool:
        scored.add(example.question)
        return metric(example, prediction)

    changes = {
        "max_labeled_demos": 4,
        "max_metric_calls": 300,
        "confirm": True,
        "auto": None,
        "num_rounds": None,
    }
    data = trainset(100)
    best = teleprompter(metric=judge, num_candidates=8, **changes).compile(
        dspy.Predict(QA), trainset=data, valset=valset
    )
    assert best.opro_result.gain is not None and best.opro_result.gain.interval.basis == "fresh"
    demos = [t.candidate.demos for t in best.opro_result.trajectory.trials if t.candidate.demos]
    shown = {demo["question"] for found in demos for text in found.values() for demo in json.loads(text)}
    assert len(shown) > 8
    assert shown.isdisjoint(scored)


def test_every_other_set_has_labeled_demos_alone() -> None:
    most = {"max_bootstrapped_demos": 2, "max_labeled_demos": 2}
    best = teleprompter(metric=lambda e, p: True, num_candidates=12, **most).compile(
        dspy.Predict(QA), trainset=trainset(32)
    )
    kinds = {}
    for trial in best.opro_result.trajectory.trials:
        if trial.candidate.demos:
            (text,) = trial.candidate.demos.values()
            kinds[trial.candidate.demo_set] = {"augmented" in demo for demo in json.loads(text)}
    assert [number for number, kind in kinds.items() if kind == {False}] == [1, 3, 5]
    assert all(True in kinds[number] for number in (0, 2, 4))


def test_nothing_is_printed_while_demos_are_made(capfd: pytest.CaptureFixture[str]) -> None:
    teleprompter(metric=lambda e, p: True, **DEMOS).compile(dspy.Predict(QA), trainset=trainset())
    assert capfd.readouterr() == ("", "")


def test_a_metric_sees_a_trace_while_it_chooses_demos() -> None:
    traces = []

    def strict(example: Any, prediction: Any, trace: Any = None) -> bool:
        traces.append(trace)
        return metric(example, prediction)

    teleprompter(metric=strict, max_bootstrapped_demos=1).compile(dspy.Predict(QA), trainset=trainset())
    assert any(trace is not None for trace in traces)
    assert any(trace is None for trace in traces)


@pytest.mark.parametrize(
    "name",
    [
        "aforward alone",
        "lists and dicts",
        "frozen submodule",
        "typed outputs",
        "image and history",
        "ReAct",
        "BestOfN",
        "uncopyable members inside",
    ],
)
def test_demos_of_other_programs(name: str) -> None:
    case = CASES[name]
    with dspy.context(lm=scripted()):
        best = teleprompter(metric=lambda e, p: True, **DEMOS).compile(
            case.make(), trainset=trainset(**case.inputs)
        )
        assert best.score == 100.0
    assert any(t.candidate.demo_set is not None for t in best.opro_result.trajectory.trials)


def test_a_failing_bootstrap_costs_only_its_candidates() -> None:
    class Broken(dspy.Predict):  # type: ignore[misc]
        def forward(self, **inputs: Any) -> Any:
            raise RuntimeError("no teacher today")

    best = teleprompter(max_bootstrapped_demos=1, num_candidates=4, max_errors=1).compile(
        dspy.Predict(QA), trainset=trainset(), teacher=Broken(QA)
    )
    assert any("no teacher today" in problem for problem in best.opro_result.problems)
    assert best.score > 25.0


@pytest.mark.parametrize("lag", [0, 2])
@pytest.mark.parametrize("budget", [60, 150, 400])
def test_examples_that_demos_try_count_towards_the_budget(budget: int, lag: int) -> None:
    """No demo passes the threshold, so every set tries as many examples as it may."""
    scored = []

    def counting(example: Any, prediction: Any, trace: Any = None) -> float:
        scored.append(example)
        return float(metric(example, prediction))

    changes = {**DEMOS, "num_rounds": None, "max_metric_calls": budget, "metric_threshold": 2.0, "lag": lag}
    changes |= {"max_labeled_demos": 0, "confirm": False}
    best = teleprompter(**{**changes, "metric": counting}).compile(dspy.Predict(QA), trainset=trainset(30))
    usage = best.opro_result.usage
    assert len(scored) == usage.metric_calls <= budget
    on_trials = sum(t.num_scored for t in best.opro_result.trajectory.trials)
    num_kept = 30 // 4
    assert usage.metric_calls - on_trials >= 3 * min(budget // 8 // 3, num_kept)


def test_a_resumed_run_counts_what_demos_tried_once(tmp_path: Path) -> None:
    values = {**DEMOS, "log_dir": tmp_path}
    first = teleprompter(**values).compile(dspy.Predict(QA), trainset=trainset(8)).opro_result
    second = teleprompter(**values).compile(dspy.Predict(QA), trainset=trainset(8)).opro_result
    assert first.usage == second.usage
    assert first.usage.metric_calls > sum(t.num_scored for t in first.trajectory.trials)


def test_a_failing_demo_does_not_log_the_data(caplog: pytest.LogCaptureFixture) -> None:
    secret = "a user's own words"

    def picky(example: Any, prediction: Any, trace: Any = None) -> float:
        if trace is not None:
            raise ValueError("no trace, please")
        return float(metric(example, prediction))

    examples = [example.copy(note=secret).with_inputs("question") for example in trainset(40)]
    teleprompter(**DEMOS, metric=picky).compile(dspy.Predict(QA), trainset=examples)
    lines = [record.getMessage() for record in caplog.records]
    assert any("no trace, please" in line for line in lines)
    assert max(map(len, lines)) < 2000
    assert all(line.count(secret) <= 1 for line in lines)


def test_no_teacher_is_an_argument_of_the_constructor_too() -> None:
    teleprompter(teacher=None, **DEMOS).compile(dspy.Predict(QA), trainset=trainset(8))


def test_negative_scores_bootstrap_no_demos() -> None:
    def negative(example: Any, prediction: Any, trace: Any = None) -> float:
        return -1.0 if prediction.answer == "unsure" else 0.0

    best = teleprompter(max_bootstrapped_demos=1, num_candidates=2, metric=negative).compile(
        dspy.Predict(QA), trainset=trainset()
    )
    assert not searches_demos(best)
    assert any("no demo passed the metric" in problem for problem in best.opro_result.problems)
    # With a threshold the user says which of them are good.
    best = teleprompter(
        max_bootstrapped_demos=1, num_candidates=2, metric=negative, metric_threshold=-0.5
    ).compile(dspy.Predict(QA), trainset=trainset())
    demos = [demo for c in best.candidate_programs for demo in c["program"].demos]
    assert {demo["answer"] for demo in demos} == {"42"}


@pytest.mark.parametrize("method", ["aforward", "forward"])
def test_async_metrics_and_programs_are_awaited_on_the_loop_of_the_run_for_demos_too(method: str) -> None:
    """The client of a provider belongs to one loop."""
    loops: set[int] = set()
    in_use: list[Any] = []  # so that no loop gets the address of another

    class Async(dspy.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.step = dspy.Predict(QA)

    async def run(self: Any, **inputs: Any) -> Any:
        note()
        return await self.step.acall(**inputs)

    setattr(Async, method, run)

    def note() -> None:
        in_use.append(asyncio.get_running_loop())
        loops.add(id(in_use[-1]))

    async def judge(example: Any, prediction: Any, trace: Any = None) -> bool:
        note()
        return metric(example, prediction)

    best = teleprompter(max_bootstrapped_demos=1, num_candidates=4, metric=judge).compile(
        Async(), trainset=trainset()
    )
    assert searches_demos(best)
    assert len(loops) == 1


def test_a_teacher_with_its_predictors_in_another_order_gives_each_its_own_demos() -> None:
    class Steps(dspy.Module):  # type: ignore[misc]
        def __init__(self, *names: str) -> None:
            super().__init__()
            for name in names:
                setattr(self, name, dspy.Predict("question -> answer"))

        def forward(self, question: str) -> Any:
            self.first(question=f"{question} first")
            return self.second(question=f"{question} second")

    best = teleprompter(max_bootstrapped_demos=1, num_candidates=4).compile(
        Steps("first", "second"), trainset=trainset(), teacher=Steps("second", "first")
    )
    assert searches_demos(best)
    for candidate in best.candidate_programs:
        for name, predictor in candidate["program"].named_predictors():
            assert all(demo["question"].endswith(name) for demo in predictor.demos)


def test_a_rate_limit_puts_a_set_of_demos_off() -> None:
    """BootstrapFewShot would take it for a wrong answer."""

    class RateLimited(Exception):
        status_code = 429

    num_refused = 0

    class Teacher(dspy.Predict):  # type: ignore[misc]
        def forward(self, **inputs: Any) -> Any:
            nonlocal num_refused
            if num_refused < 3:
                num_refused += 1
                raise RateLimited("slow down")
            return super().forward(**inputs)

    best = teleprompter(max_bootstrapped_demos=1, num_candidates=2).compile(
        dspy.Predict(QA), trainset=trainset(), teacher=Teacher(QA)
    )
    assert num_refused == 3
    assert searches_demos(best)
    assert best.opro_result.problems == ()
