"""The seven rules that always hold, each on whole runs over HTTP through the real `dspy.LM`."""

from __future__ import annotations

import copy
import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cloudpickle
import dspy
import numpy
import pytest

from dspy_opro import MetricError, TooManyErrors
from dspy_opro.testing import Fault, SimulatedServer
from tests.runs import TASK, TRAINSET, VALSET, TwoSteps, decisions, metric, optimize, teleprompter


class Review(dspy.Signature):  # type: ignore[misc]
    """Name the code of the item."""

    question: str = dspy.InputField(desc="an item")
    answer: str = dspy.OutputField()


class Everything(dspy.Module):  # type: ignore[misc]
    """Predictors in every place, demos, an LM of its own, a frozen part, and attributes of other kinds."""

    def __init__(self, lm: Any = None) -> None:
        super().__init__()
        self.first = dspy.Predict(Review)
        self.first.demos = [dspy.Example(question="item demo", answer="code 1").with_inputs("question")]
        self.listed = [dspy.ChainOfThought(Review)]
        self.keyed = {"a": dspy.Predict(Review)}
        self.keyed["a"].lm = lm
        self.frozen = dspy.Predict(Review)
        self.inner = TwoSteps()
        self.inner._compiled = True
        self.again = self.first  # the same predictor by another name
        self.setting = {"threshold": 0.5}

    def forward(self, question: str) -> Any:
        self.first(question=question)
        self.listed[0](question=question)
        return self.keyed["a"](question=question)


def state(program: Any) -> dict[str, Any]:
    """Everything that a program consists of."""
    predictors = {}
    for name, predictor in program.named_predictors():
        predictors[name] = {
            "signature": predictor.signature,
            "instructions": predictor.signature.instructions,
            "fields": [str(field) for field in predictor.signature.fields.values()],
            "demos": copy.deepcopy(predictor.demos),
            "lm": predictor.lm,
            "config": dict(predictor.config),
        }
    dumped = json.dumps(program.dump_state(), default=plain, sort_keys=True)
    return {"predictors": predictors, "state": dumped, "attributes": list(vars(program))}


def plain(value: Any) -> Any:
    """What JSON does not know; DSPy 3.0.0 leaves demos examples in a state."""
    return dict(value.items()) if isinstance(value, dspy.Example) else str(value)


def lm_state(lm: Any) -> Any:
    return copy.deepcopy(lm.kwargs), lm.model, lm.cache, lm.num_retries, lm.dump_state()


# --- 1 and 2: nothing given is changed, names stay ------------------------------------------------------


@pytest.mark.parametrize("is_async", [False, True])
async def test_1_student_signatures_teleprompter_and_lms_are_unchanged(
    server: SimulatedServer, is_async: bool
) -> None:
    own, prompt_model, task_model = server.lm("scorer"), server.lm("proposer"), server.lm("scorer")
    student = Everything(own)
    optimizer = teleprompter(server, num_rounds=1, prompt_model=prompt_model, task_model=task_model)
    trainset, valset = list(TRAINSET[:6]), list(VALSET[:3])

    def everything() -> Any:
        signature = (Review.instructions, list(Review.fields), [str(f) for f in Review.fields.values()])
        lms = [lm_state(lm) for lm in (own, prompt_model, task_model)]
        data = [example.toDict() for example in (*trainset, *valset)]
        return (
            state(student),
            vars(student.inner),
            signature,
            lms,
            data,
            optimizer.get_params(),
            len(trainset),
        )

    before = everything()
    if is_async:
        program = await optimizer.acompile(student, trainset=trainset, valset=valset)
    else:
        program = optimizer.compile(student, trainset=trainset, valset=valset)
    assert everything() == before
    assert program is not student
    assert prompt_model.history == []
    assert program.first is not student.first
    assert program.first is program.again
    assert program.keyed["a"].lm.model == own.model
    assert [demo.toDict() for demo in program.first.demos] == [demo.toDict() for demo in student.first.demos]


def test_1_a_teleprompter_is_used_twice_with_the_same_result(server: SimulatedServer) -> None:
    optimizer = teleprompter(server, num_rounds=1)
    runs = [optimizer.compile(TASK.student(), trainset=TRAINSET).opro_result for _ in range(2)]
    assert decisions(runs[0]) == decisions(runs[1])


def test_2_names_order_and_frozen_parts_stay(server: SimulatedServer) -> None:
    student = Everything()
    program = optimize(server, student, num_rounds=1, trainset=TRAINSET[:6], valset=None)
    names = [name for name, _ in student.named_predictors()]
    assert [name for name, _ in program.named_predictors()] == names
    assert names == ["first", "listed[0].predict", "keyed['a']", "frozen"]
    assert program.inner._compiled is True
    assert program.inner.note.signature.instructions == "Note what the item is."
    assert list(program.opro_result.instructions) == names
    assert len(program.opro_result.trajectory) > 1


@pytest.mark.parametrize("flag", [False, True])
def test_2_the_own_compiled_flag_stays(server: SimulatedServer, flag: bool) -> None:
    student = TASK.student()
    student._compiled = flag
    program = optimize(server, student, num_rounds=1, valset=None)
    assert program._compiled is flag
    assert all(entry["program"]._compiled is flag for entry in program.candidate_programs)


# --- 3: same seed, same run (threads and arrival: test_compile.py, test_search.py) -----------------------


def test_3_the_same_seed_is_the_same_run(server: SimulatedServer) -> None:
    runs = [optimize(server, num_rounds=1, num_threads=threads).opro_result for threads in (2, 16)]
    assert decisions(runs[0]) == decisions(runs[1])
    assert decisions(optimize(server, num_rounds=1, seed=1).opro_result) != decisions(runs[0])


def test_3_the_callers_random_numbers_do_not_matter(server: SimulatedServer) -> None:
    runs = []
    for seed in (1, 2):
        random.seed(seed)
        numpy.random.seed(seed)
        runs.append(decisions(optimize(server, TwoSteps(), num_rounds=1, valset=None).opro_result))
    assert runs[0] == runs[1]


SCRIPT = """
from tests.runs import TwoSteps, optimize, serve
with serve() as server:
    result = optimize(server, TwoSteps(), num_rounds=1, valset=None, seed=3).opro_result
print([(trial.id, trial.reward, trial.num_scored) for trial in result.trajectory.trials])
"""


def test_3_a_run_is_the_same_in_every_process(server: SimulatedServer) -> None:
    """Hashes of strings differ from process to process; nothing may depend on them."""
    result = optimize(server, TwoSteps(), num_rounds=1, valset=None, seed=3).opro_result
    here = [(trial.id, trial.reward, trial.num_scored) for trial in result.trajectory.trials]
    there = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": "."},
        timeout=100,
        check=False,
    )
    assert there.stdout == f"{here}\n", there.stderr
    assert len(here) > 2


# --- 4: metrics and failures (their forms: test_metric.py) -----------------------------------------------


def with_feedback(gold: Any, pred: Any, trace: Any, pred_name: Any, pred_trace: Any) -> Any:
    right = bool(metric(gold, pred))
    return dspy.Prediction(score=right, feedback="well done" if right else "another code is meant")


async def in_numpy(example: Any, prediction: Any) -> Any:
    return numpy.float32(metric(example, prediction))


def in_a_dict(example: Any, prediction: Any, trace: Any) -> Mapping[str, Any]:
    return {"score": int(metric(example, prediction)), "length": len(prediction.answer)}


@pytest.mark.parametrize("judge", [with_feedback, in_numpy, in_a_dict], ids=lambda judge: judge.__name__)
def test_4_metrics_of_every_form_give_the_same_run(server: SimulatedServer, judge: Any) -> None:
    plain = optimize(server, num_rounds=1, valset=None, proposer=Numbered()).opro_result
    other = optimize(server, num_rounds=1, valset=None, metric=judge, proposer=Numbered()).opro_result
    assert decisions(other) == decisions(plain)


class Numbered(dspy.Module):  # type: ignore[misc]
    """A proposer that does not look at anything."""

    def forward(self, request: Any) -> Any:
        words = sorted(TASK.good)[: request.slot + 1]
        return dspy.Prediction(instruction=f"Name the code {request.round}. {' '.join(words)}")


def test_4_feedback_reaches_the_proposer(server: SimulatedServer) -> None:
    seen: list[Any] = []

    class Looking(Numbered):
        def forward(self, request: Any) -> Any:
            seen.append(request)
            return super().forward(request)

    optimize(server, metric=with_feedback, proposer=Looking(), valset=None, lag=0)
    feedback = {e.outcome.feedback for request in seen for e in request.exemplars if e.outcome}
    assert feedback == {"well done", "another code is meant"}


def test_4_a_program_error_counts_and_is_shown(server: SimulatedServer) -> None:
    server.inject(Fault("malformed_answer", contains="item train-2?"))
    result = optimize(server, num_rounds=1, valset=None, failure_score=-1.0).opro_result
    assert {failure.example for failure in result.failures} == {2}
    assert result.num_failures == len(result.failures) > 0
    assert result.baseline.num_failures == 1
    assert min(result.baseline.scores) == -1.0
    assert f"{result.num_failures} example{'s' * (result.num_failures > 1)} failed" in result.summary()


@pytest.mark.parametrize(
    ("judge", "num_requests"), [(lambda e, p: None, 1), (lambda e, p: p.nothing, 1), (lambda e: 1, 0)]
)
def test_4_a_metric_without_a_score_raises_before_money_is_spent(
    server: SimulatedServer, judge: Any, num_requests: int
) -> None:
    with pytest.raises(MetricError):
        optimize(server, metric=judge)
    assert server.stats().requests == num_requests


# --- 5: nothing measured is lost (signals: test_interrupts.py; killed processes: test_resume.py) ---------


@pytest.mark.parametrize(
    "ends", ["max_tokens", "timeout_seconds", "proposer", "max_errors", "stopper raises"]
)
def test_5_whatever_ends_a_run_the_best_program_so_far_comes_back(server: SimulatedServer, ends: str) -> None:
    changes: dict[str, Any] = {"auto": None, "num_rounds": 1000, "valset": None, "lag": 0, "confirm": False}
    measured: list[Any] = []

    def after_a_round(state: Any) -> None:
        measured[:] = state.trajectory.trials
        if state.round == 2 and ends == "proposer":
            server.inject(Fault("malformed_json"), model="proposer")
        if state.round == 2 and ends == "max_errors":
            server.inject(Fault("malformed_json"), model="scorer")
        if state.round == 2 and ends == "timeout_seconds":
            server.inject(Fault("hang"))
        if state.round == 2 and ends == "stopper raises":
            raise ZeroDivisionError("in a stopper")

    changes["stoppers"] = [after_a_round]
    changes |= {"max_tokens": {"max_tokens": 20_000}, "timeout_seconds": {"timeout_seconds": 6.0}}.get(
        ends, {}
    )
    changes |= {"max_errors": 3} if ends == "max_errors" else {}
    lms = {f"{n}_model": server.lm(m, num_retries=0) for n, m in (("task", "scorer"), ("prompt", "proposer"))}
    try:
        program = optimize(server, **changes, **lms)
    except (TooManyErrors, ZeroDivisionError) as error:
        program = error.program  # type: ignore[union-attr]
    result = program.opro_result
    assert result.trajectory.trials[: len(measured)] == tuple(measured)
    assert len(measured) > 1
    assert program.signature.instructions == result.best.candidate.instructions["self"]
    assert result.best.reward == max(t.reward for t in result.trajectory.trials if t.state == "complete")
    reasons = {"proposer": "proposer_failed", "max_errors": "error", "stopper raises": "error"}
    assert result.stop_reason == reasons.get(ends, ends)


# --- 6: the student stays unless another is better ------------------------------------------------------


def instruct(*texts: str) -> Any:
    class Fixed(dspy.Module):  # type: ignore[misc]
        def forward(self, request: Any) -> Any:
            text = texts[request.slot % len(texts)]
            return dspy.Prediction(instruction=f"{text} {request.round}.{request.slot}")

    return Fixed()


@pytest.mark.parametrize("valset", [None, VALSET])
def test_6_the_student_is_returned_unless_another_is_better(server: SimulatedServer, valset: Any) -> None:
    worse = instruct(f"Name the code. {' '.join(sorted(TASK.bad))}")
    program = optimize(server, proposer=worse, valset=valset, confirm=valset is None)
    result = program.opro_result
    assert program.signature.instructions == TASK.student().signature.instructions
    assert result.best is result.baseline
    assert result.baseline.num_scored == len(TRAINSET)
    assert (result.baseline.valset_score is not None) is (valset is not None)
    assert set(result.curve) == {result.curve[0]}


def test_6_a_better_one_is_returned(server: SimulatedServer) -> None:
    better = instruct(f"Name the code. {' '.join(sorted(TASK.good))}")
    program = optimize(server, proposer=better, trainset=TASK.trainset(30), valset=None, confirm=False)
    result = program.opro_result
    assert (
        program.signature.instructions == result.instructions["self"] != TASK.student().signature.instructions
    )
    assert result.best.reward > result.baseline.reward
    # Paired: on the same examples, in the same order.
    assert len(result.best.scores) == len(result.baseline.scores) == 30


def test_6_equal_ones_do_not_take_the_students_place(server: SimulatedServer) -> None:
    program = optimize(server, metric=lambda e, p: 1.0, proposer=Numbered())
    assert program.signature.instructions == TASK.student().signature.instructions


@pytest.mark.parametrize("valset", [None, VALSET])
def test_6_the_returned_program_leads_the_candidates(server: SimulatedServer, valset: Any) -> None:
    """`candidate_programs` goes by the data that decides, as scripts expect that take its first entry."""
    program = optimize(server, num_rounds=4, trainset=TASK.trainset(20), valset=valset, confirm=False)
    entries = program.candidate_programs
    assert entries[0]["id"] == program.opro_result.best.id
    assert entries[0]["score"] == program.score
    assert entries[0]["program"].signature.instructions == program.signature.instructions
    assert [e["score"] for e in entries] == sorted((e["score"] for e in entries), reverse=True)


# --- 7: results are data (more: test_result.py) ----------------------------------------------------------


@pytest.fixture(scope="module")
def compiled(shared: SimulatedServer) -> Any:
    better = instruct(f"Name the code. {' '.join(sorted(TASK.good))}")
    return optimize(
        shared, Everything(), proposer=better, num_rounds=1, trainset=TRAINSET[:6], valset=VALSET[:4]
    )


def answers(program: Any, server: SimulatedServer) -> Any:
    with dspy.context(lm=server.lm("scorer")):
        return [program(question=example.question).answer for example in VALSET[:3]]


def test_7_results_add_no_predictors(compiled: Any) -> None:
    assert [name for name, _ in compiled.named_predictors()] == [
        name for name, _ in Everything().named_predictors()
    ]
    assert not any(isinstance(value, dspy.Module) for value in vars(compiled.opro_result).values())


def test_7_the_state_goes_to_json_and_back(compiled: Any, server: SimulatedServer, tmp_path: Path) -> None:
    compiled.save(tmp_path / "program.json")
    fresh = Everything()
    fresh.load(tmp_path / "program.json")
    assert state(fresh)["state"] == state(compiled)["state"]
    assert fresh.first.signature.instructions == compiled.opro_result.instructions["first"]
    assert answers(fresh, server) == answers(compiled, server)


@pytest.mark.parametrize("how", ["deepcopy", "copy.deepcopy", "cloudpickle", "reset_copy"])
def test_7_copies_keep_program_and_result(compiled: Any, server: SimulatedServer, how: str) -> None:
    if how == "deepcopy":
        copied = compiled.deepcopy()
    elif how == "copy.deepcopy":
        copied = copy.deepcopy(compiled)
    elif how == "cloudpickle":
        copied = cloudpickle.loads(cloudpickle.dumps(compiled))
    else:
        copied = compiled.reset_copy()
    assert decisions(copied.opro_result) == decisions(compiled.opro_result)
    assert copied.first.signature.instructions == compiled.first.signature.instructions
    if how != "reset_copy":
        assert answers(copied, server) == answers(compiled, server)


LOAD = """
import sys, inspect, json, dspy
from dspy_opro.testing import VocabularyTask

options = {"allow_pickle": True} if "allow_pickle" in inspect.signature(dspy.load).parameters else {}
program = dspy.load(sys.argv[1], **options)
result = program.opro_result
lm = dspy.LM("openai/scorer", api_base=sys.argv[2], api_key="unused", cache=False)
with dspy.context(lm=lm):
    answers = [program(question=example.question).answer for example in VocabularyTask(seed=1).valset(3)]
print(json.dumps([dict(result.instructions), result.stop_reason, len(result.to_dicts()), answers]))
"""


def test_7_a_saved_program_works_in_a_fresh_process(
    compiled: Any, server: SimulatedServer, tmp_path: Path
) -> None:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    cloudpickle.register_pickle_by_value(sys.modules["tests.runs"])
    try:
        compiled.save(tmp_path / "program", save_program=True)
    finally:
        cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
        cloudpickle.unregister_pickle_by_value(sys.modules["tests.runs"])
    run = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path / "program"), server.api_base],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr
    result = compiled.opro_result
    expected = [
        dict(result.instructions),
        result.stop_reason,
        len(result.to_dicts()),
        answers(compiled, server),
    ]
    assert json.loads(run.stdout) == expected
