"""Bad input gets a clear error before anything is spent: it names argument, rule and value, and the remedy."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import dspy
import optuna
import pytest

from dspy_opro import OPRO, MetricError, ProposerFailed, TooManyErrors
from dspy_opro.search.pruners import ScoreAll
from dspy_opro.testing import LMCall, ScriptedLM
from tests.runs import TASK, TRAINSET, is_proposal, metric, propose


def answer(call: LMCall) -> Any:
    return propose(call) if is_proposal(call) else TASK.scorer(call)


class Halves(ScoreAll):
    def checkpoints(self, num_examples: int, num_candidates: int) -> Any:
        return [num_examples / 2, num_examples]


class Empty(dspy.Module):  # type: ignore[misc]
    def forward(self, question: str) -> Any:
        return dspy.Prediction(answer=question)


def frozen() -> Any:
    class Outer(dspy.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.inner = dspy.ChainOfThought("question -> answer")
            self.inner._compiled = True

    return Outer()


BARE = [dspy.Example(question="q", answer="a")]

CASES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no metric": (
        {"metric": None},
        ValueError,
        "metric must be given, to OPROTeleprompter(...) or to compile",
    ),
    "no trainset": (
        {"trainset": None},
        ValueError,
        "trainset must be given, to OPROTeleprompter(...) or to comp",
    ),
    "empty trainset": (
        {"trainset": []},
        ValueError,
        "trainset must have at least one example, but is empty.",
    ),
    "trainset of dicts": (
        {"trainset": [{"question": "q"}]},
        TypeError,
        "trainset[0] must be a dspy.Example, but is dict. Write dspy.Example(...).with_inputs(...).",
    ),
    "without inputs": (
        {"trainset": BARE},
        ValueError,
        "trainset[0] does not say which fields are inputs: call .with_inputs(...) on it.",
    ),
    "valset without inputs": (
        {"valset": BARE},
        ValueError,
        "valset[0] does not say which fields are inputs: call .with_inputs(...) on it.",
    ),
    "no module": ({"student": "program"}, TypeError, "student must be a dspy.Module, but is str."),
    "a class": (
        {"student": dspy.Predict},
        TypeError,
        "student must be a dspy.Module, but is the class Predict: pass an instance, Predict(...).",
    ),
    "a signature": (
        {"student": dspy.Signature("question -> answer", "Add.")},
        TypeError,
        "but is the class StringSignature: pass an instance, dspy.Predict(StringSignature).",
    ),
    "no predictors": (
        {"student": Empty()},
        ValueError,
        "Empty has no predictors to optimize: no dspy.Predict can",
    ),
    "all frozen": ({"student": frozen()}, ValueError, "are frozen (_compiled=True)."),
    "prompt_model by name": (
        {"prompt_model": "openai/gpt-4o"},
        TypeError,
        "prompt_model must be a dspy.LM, but is 'openai/gpt-4o'. Write prompt_model=dspy.LM(...).",
    ),
    "task_model by name": ({"task_model": "gpt"}, TypeError, "task_model must be a dspy.LM, but is 'gpt'."),
    "metric of one argument": (
        {"metric": lambda example: 1.0},
        MetricError,
        "metric must take (example, prediction, ...), but <lambda> takes 1 argument(s).",
    ),
    "metric with a keyword of its own": (
        {"metric": lambda example, prediction, *, judge: 1.0},
        MetricError,
        "but <lambda> also needs judge.",
    ),
    "too small a budget": (
        {"max_metric_calls": 11},
        ValueError,
        "max_metric_calls must be at least 12, to score the student on 12 train and 0 validation examples, but got 11.",
    ),
    "odd pruner": (
        {"pruner": "median"},
        ValueError,
        "pruner must be \"auto\", None, an Optuna pruner or a dspy_opro Pruner, but got 'median'.",
    ),
    "odd checkpoints": (
        {"pruner": Halves()},
        ValueError,
        "must ascend from at least 1 and end with all 12 examples, but Halves gave [6.0, 12].",
    ),
    "nothing ends it": ({"auto": None}, ValueError, "auto=None needs at least one bound"),
    "value out of range": ({"k_best": 0}, ValueError, "k_best must be at least 1, but got 0."),
    "a text for a list": ({"must_keep": "JSON"}, ValueError, "must_keep must be a list, but got 'JSON'."),
    "one price": (
        {"prices": {"lm": 1.5}},
        ValueError,
        "prices must hold pairs of numbers, but got 1.5.",
    ),
    "misspelt": (
        {"num_thread": 4},
        TypeError,
        "unexpected keyword argument 'num_thread'. Did you mean 'num_threads'?",
    ),
    "another's metric place": (
        {"metric": ScriptedLM(answer)},
        TypeError,
        "metric must be a function, but is an LM. Write prompt_model=... for the optimizer LM.",
    ),
    "proposer that is none": ({"proposer": "best"}, ValueError, "proposer must be callable, but got 'best'."),
}


def attempt(given: dict[str, Any], lm: Any, **more: Any) -> Any:
    values: dict[str, Any] = {
        "metric": metric,
        "trainset": TRAINSET,
        "num_rounds": 1,
        "display_progress": False,
    }
    values |= {"prompt_model": lm, "task_model": lm, **more, **given}
    student, teacher = values.pop("student", None) or TASK.student(), values.pop("teacher", None)
    with dspy.context(lm=lm):
        return OPRO(values.pop("metric"), **values).compile(student, teacher=teacher)


@pytest.mark.parametrize("case", CASES)
def test_bad_input_costs_nothing_and_leaves_nothing(case: str, tmp_path: Path) -> None:
    given, error, message = CASES[case]
    lm = ScriptedLM(answer)
    if "auto" in given:
        given = {**given, "num_rounds": None}
    with pytest.raises(error) as caught:
        attempt(given, lm, log_dir=tmp_path / "run")
    assert message in str(caught.value)
    assert lm.num_calls == 0
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("module", [dspy.Predict, dspy.ChainOfThought])
@pytest.mark.parametrize(("inputs", "is_other"), [(["text"], True), (["question", "text"], False)])
def test_inputs_with_other_names_than_the_fields_are_warned_of(
    module: Any, inputs: list[str], is_other: bool
) -> None:
    """DSPy itself only logs a line for every call, and the LM sees no input."""
    data = [dspy.Example(**dict.fromkeys(inputs, f"q{i}"), answer="a").with_inputs(*inputs) for i in range(4)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attempt(
            {"student": module("question -> answer"), "trainset": data, "metric": metric}, ScriptedLM(answer)
        )
    told = [str(warning.message) for warning in caught if "input fields" in str(warning.message)]
    message = (
        "trainset[0] has the inputs 'text', but the student's input fields are 'question'. Name them alike in the "
        "signature and in .with_inputs(...)."
    )
    assert told == [message] * is_other


def test_no_language_model_at_all() -> None:
    with pytest.raises(
        ValueError, match=r"No LM is configured for the program \(predictor 'self'\)\. Call dspy\.configure"
    ):
        attempt({}, None)


class OwnLM(dspy.Module):  # type: ignore[misc]
    """Its LM is no attribute of a predictor, so only a call shows whether it has one."""

    def __init__(self, lm: Any) -> None:
        super().__init__()
        self.own, self.answer = lm, dspy.ChainOfThought("question -> answer")

    def forward(self, question: str) -> Any:
        with dspy.context(lm=self.own or dspy.settings.lm):
            return self.answer(question=question)


def test_a_program_that_sets_its_language_model_itself_runs_without_a_global_one() -> None:
    prompt_model = ScriptedLM(answer)
    values = {"student": OwnLM(ScriptedLM(TASK.scorer)), "prompt_model": prompt_model, "task_model": None}
    assert attempt(values, None).opro_result.baseline.num_failures == 0
    with pytest.raises(TooManyErrors, match="No LM is loaded"):
        attempt({**values, "student": OwnLM(None)}, None)


def test_a_program_of_dspys_modules_alone_needs_a_language_model() -> None:
    student = dspy.BestOfN(dspy.ChainOfThought("question -> answer"), 2, lambda given, found: 1.0, 1.0)
    with pytest.raises(ValueError, match="No LM is configured for the program"):
        attempt({"student": student, "prompt_model": ScriptedLM(answer), "task_model": None}, None)


STORAGES: dict[Any, str] = {
    "foo": "storage 'foo' can't be opened: Could not parse",
    "postgres://me:secret@host/db?sslpassword=secret": "storage 'postgres://me:***@host/db?sslpassword=***' can't be "
    "opened: Can't load",
    "mysql://me:secret@host/db": "storage 'mysql://me:***@host/db' can't be opened: Failed to import DB access module",
    "sqlite:////no/such/folder/qa.db": "storage 'sqlite:////no/such/folder/qa.db' can't be opened: (sqlite3.Op",
    5: "storage 5 can't be opened: it is of type int.",
}


@pytest.mark.parametrize("storage", STORAGES)
def test_a_storage_that_cant_be_opened_is_an_error_at_once(
    storage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sleep(seconds: float) -> None:
        raise AssertionError("waited for a storage that can't be opened")

    monkeypatch.setattr("tenacity.nap.time.sleep", sleep)
    lm = ScriptedLM(answer)
    with pytest.raises(ValueError, match=re.escape(STORAGES[storage])) as caught:
        attempt({"storage": storage}, lm)
    assert "Write e.g. sqlite:///qa.db" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is not None
    assert lm.num_calls == 0


def test_a_database_that_is_just_starting_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("tenacity.nap.time.sleep", waits.append)
    get_storage = optuna.storages.get_storage

    def starting(storage: Any) -> Any:
        if len(waits) < 2:
            raise RuntimeError("the database system is starting up")
        return get_storage(storage)

    monkeypatch.setattr(optuna.storages, "get_storage", starting)
    attempt({"storage": f"sqlite:///{tmp_path / 'qa.db'}"}, ScriptedLM(answer))
    assert len(waits) == 2


def test_an_optimizer_lm_that_is_down_is_not_told_of_every_time(caplog: pytest.LogCaptureFixture) -> None:
    def down(call: LMCall) -> Any:
        if "answer" in call.output_fields:
            return TASK.scorer(call)
        raise RuntimeError("no such model")

    with pytest.raises(ProposerFailed, match="no such model") as caught:
        attempt({"num_rounds": 2, "lag": 0}, ScriptedLM(down))
    program = caught.value.program  # type: ignore[attr-defined]
    told = [message for message in caplog.messages if "proposal" in message]
    assert program.opro_result.stop_reason == "proposer_failed"
    assert len(program.opro_result.problems) == 24
    assert [message.partition(":")[0] for message in told] == [
        "A proposal failed",
        "10 proposals failed so far, the last one",
        "20 proposals failed so far, the last one",
    ]
    assert "no proposal was used, first problem: " in program.opro_result.summary()


def test_a_failed_example_is_logged_without_a_number_and_the_metrics_error_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    judged: list[Any] = []

    def judge(example: Any, prediction: Any) -> float:
        judged.append(example)
        if len(judged) == 4:
            raise KeyError("label")
        return metric(example, prediction)

    result = attempt({"metric": judge}, ScriptedLM(answer)).opro_result
    assert "Failed on an example: metric raised KeyError: 'label'" in caplog.messages
    assert TRAINSET[result.failures[0].example] is judged[3]


def test_no_language_model_for_the_proposals() -> None:
    student = TASK.student()
    student.lm = ScriptedLM(answer)
    with pytest.raises(ValueError, match=r"No LM is configured for the proposals\. Pass prompt_model"):
        attempt({"student": student}, None)
    assert student.lm.num_calls == 0


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        (
            lambda e, p: None,
            "metric must return a number, a dspy.Prediction or a dict with 'score', but returned None",
        ),
        (
            lambda e, p: "good",
            "metric must return a number, a dspy.Prediction or a dict with 'score', but returned 'g",
        ),
        (lambda e, p: float("nan"), "metric must return a finite number, but returned nan."),
        (lambda e, p: {"points": 1}, "metric returned {'points': 1}, which has no 'score'."),
        (lambda e, p: p.missing, "metric raised AttributeError"),
    ],
)
def test_a_metric_is_tried_on_one_example_first(judge: Any, message: str, tmp_path: Path) -> None:
    lm = ScriptedLM(answer)
    with pytest.raises(MetricError) as caught:
        attempt({"metric": judge}, lm, log_dir=tmp_path)
    assert message in str(caught.value)
    assert lm.num_calls == 1
    program = attempt({}, lm, log_dir=tmp_path)  # the metric is mended, and the run starts in the same place
    assert program.opro_result.stop_reason == "num_rounds"


def test_a_program_that_always_fails_is_an_error_with_the_cause() -> None:
    class Broken(dspy.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.inner = dspy.Predict("question -> answer")

        def forward(self, question: str) -> Any:
            raise RuntimeError("no index")

    with pytest.raises(TooManyErrors, match="First cause: RuntimeError: no index") as caught:
        attempt({"student": Broken()}, ScriptedLM(answer))
    result = caught.value.program.opro_result  # type: ignore[attr-defined]
    assert (result.trajectory.trials, result.curve) == ((), ())
    assert "the run ended before the student was scored" in result.summary()


def test_shared_examples_are_a_warning() -> None:
    lm = ScriptedLM(answer)
    with pytest.warns(UserWarning, match="2 of 4 valset examples have the inputs of a trainset example"):
        attempt({"valset": [*TRAINSET[:2], *TASK.valset(2)]}, lm)


def test_an_empty_valset_is_a_warning() -> None:
    with pytest.warns(UserWarning, match="valset is empty, so it counts as none"):
        program = attempt({"valset": []}, ScriptedLM(answer))
    assert program.opro_result.selected_on == "trainset"


FITTING = "teacher must have the student's predictors and fields {'self': ['question', 'answer']}"


@pytest.mark.parametrize(
    ("teacher", "error", "message"),
    [
        ("gpt-4o", TypeError, "teacher must be a dspy.Module, but is str."),
        ([7], TypeError, "teacher must be a dspy.Module, but is int."),
        (
            dspy.ChainOfThought("question -> answer"),
            ValueError,
            f"{FITTING}, but has {{'predict': ['question', 'reasoning', 'answer']}}.",
        ),
        (
            dspy.Predict("question -> reply"),
            ValueError,
            f"{FITTING}, but has {{'self': ['question', 'reply']}}.",
        ),
    ],
)
def test_a_teacher_whose_demos_would_not_fit(teacher: Any, error: type[Exception], message: str) -> None:
    lm = ScriptedLM(answer)
    with pytest.raises(error) as caught:
        attempt({"teacher": teacher}, lm, max_bootstrapped_demos=1)
    assert str(caught.value) == message
    assert lm.num_calls == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("teacher", TASK.student()),
        ("teacher_settings", {"lm": None}),
        ("metric_threshold", 0.5),
        ("max_rounds", 2),
    ],
)
def test_what_is_for_demos_alone_is_a_warning_without_them(name: str, value: Any) -> None:
    with pytest.warns(UserWarning, match=f"{name} is not used: it is for bootstrapping demos"):
        attempt({name: value}, ScriptedLM(answer))


@pytest.mark.parametrize(("scale", "warned"), [(1.0, True), (100.0, False)])
def test_a_score_in_percent_that_is_never_reached_is_a_warning(
    scale: float, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    attempt({"metric": lambda e, p: scale * metric(e, p)}, ScriptedLM(answer), stop_at_score=95)
    assert ("Write 0.95 for 95 percent" in caplog.text) is warned


def test_good_input_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        attempt({"valset": TASK.valset(8)}, ScriptedLM(answer))


def test_a_trainset_that_repeats_its_inputs_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="10 of 20 trainset examples repeat the inputs of another one"):
        compile_quickly(TASK.trainset(10) * 2)


def test_a_task_model_that_no_predictor_uses_is_warned_of() -> None:
    student = TASK.student()
    student.set_lm(ScriptedLM(answer))
    with pytest.warns(
        UserWarning, match="task_model is not used for .*: these predictors have an LM of their own"
    ):
        compile_quickly(TASK.trainset(10), student)


@pytest.mark.parametrize("name", ["scripted/lm", "scripted/teacher"])
def test_a_price_under_the_name_of_an_lm_is_fine(name: str) -> None:
    teacher = TASK.student()
    teacher.set_lm(ScriptedLM(answer, model="scripted/teacher"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        attempt(
            {"prices": {name: (1, 2)}, "teacher": teacher, "max_bootstrapped_demos": 1}, ScriptedLM(answer)
        )


def test_a_price_under_another_name_is_warned_of_once() -> None:
    with pytest.warns(UserWarning, match="prices has") as caught:
        attempt({"prices": {"lm": (1, 2), "scripted/lm": (1, 2), "other": (0, 0)}}, ScriptedLM(answer))
    (told,) = [str(warning.message) for warning in caught if "prices" in str(warning.message)]
    assert told == (
        "prices has 'lm', 'other', but no LM of the program or the optimizer has this name. Their names: "
        "'scripted/lm'. A price under another name counts only for an LM that the metric or the program itself calls."
    )


def compile_quickly(trainset: Any, student: Any = None) -> Any:
    lm = ScriptedLM(answer)
    optimizer = OPRO(metric=metric, prompt_model=lm, task_model=lm, num_rounds=1, num_candidates=2)
    return optimizer.compile(student or TASK.student(), trainset=trainset)


@pytest.mark.parametrize("name", ["config.json", "best.json", "report.html"])
def test_a_log_dir_with_files_of_the_user_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=f"log_dir .* has {name}, and no run wrote that"):
        OPRO(metric, log_dir=tmp_path, task_model=ScriptedLM(answer)).compile(
            TASK.student(), trainset=TRAINSET
        )
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "mine")]


def test_a_log_dir_may_begin_with_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert OPRO(metric, log_dir="~/runs").config.log_dir == str(tmp_path / "runs")
    assert OPRO(metric, log_dir=Path("~/runs")).config.log_dir == tmp_path / "runs"
