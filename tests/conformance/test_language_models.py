"""Every adapter and every kind of language model works, on either side, and is left as it was."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import dspy
import pytest
from dspy.adapters.baml_adapter import BAMLAdapter

from dspy_opro.programs.compat import sampling_lm
from dspy_opro.testing import Fault, LMCall, ScriptedLM, SimulatedModel, SimulatedServer
from dspy_opro.testing.calls import render
from tests.conformance.programs import CASES, QA
from tests.conformance.world import VERSION, answer, scripted, teleprompter, trainset
from tests.runs import is_proposal


@pytest.fixture(scope="module")
def server() -> Iterator[SimulatedServer]:
    with SimulatedServer(answer, own_process=False) as server:
        yield server


IS_FIRST_RELEASE = dspy.__version__ == "3.0.0"

ADAPTERS = {
    "Chat": lambda lm: dspy.ChatAdapter(),
    "JSON": lambda lm: dspy.JSONAdapter(),
    "XML": lambda lm: dspy.XMLAdapter(),
    "TwoStep": lambda lm: dspy.TwoStepAdapter(lm),
    "BAML": lambda lm: BAMLAdapter(),
}


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("program", ["Predict", "ChainOfThought", "typed outputs"])
def test_an_adapter_works_for_program_and_proposals(name: str, program: str, server: SimulatedServer) -> None:
    if name == "TwoStep" and program == "typed outputs":
        pytest.skip("the simulated model's free text holds one field")
    if IS_FIRST_RELEASE and (name, program) == ("BAML", "typed outputs"):
        pytest.skip("DSPy 3.0.0's BAMLAdapter fails on Optional fields by itself")
    lm = server.lm("world")
    with dspy.context(lm=lm, adapter=ADAPTERS[name](server.lm("extractor"))):
        best = teleprompter(num_candidates=4, prompt_model=scripted()).compile(
            CASES[program].make(), trainset=trainset()
        )
        assert best(question="?").answer == "42"
    assert best.opro_result.num_failures == 0


@pytest.mark.parametrize("name", ADAPTERS)
def test_proposals_are_written_through_the_adapter(name: str, server: SimulatedServer) -> None:
    lm = server.lm("world")
    with dspy.context(lm=lm, adapter=ADAPTERS[name](server.lm("extractor"))):
        assert teleprompter().compile(dspy.Predict(QA), trainset=trainset()).score == 100.0


class Plugin(dspy.BaseLM):  # type: ignore[misc]
    """A language model of the old kind, as people wrote them: it hands all it is given to its provider."""

    def __init__(self) -> None:
        super().__init__(model="plug/in", temperature=0.5, max_tokens=100)
        self.lock = threading.Lock()  # which a deep copy can't take
        self.seen: list[dict[str, Any]] = []

    def forward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
        from dspy.dsp.utils.utils import dotdict

        with self.lock:
            self.seen.append({**self.kwargs, **kwargs})
        texts = tuple((m["role"], m["content"]) for m in messages or [{"role": "user", "content": prompt}])
        call = LMCall(self.model, texts)
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        message = dotdict(content=render(answer(call), call), tool_calls=None)
        return dotdict(
            choices=[dotdict(message=message, finish_reason="stop")], usage=usage, model=self.model
        )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("side", ["prompt_model", "task_model", "set_lm"])
def test_a_plugin_never_sees_a_rollout_id(side: str) -> None:
    lm = Plugin()
    before = dict(lm.kwargs)
    student = dspy.Predict(QA)
    arguments = {side: lm} if side != "set_lm" else {}
    if side == "set_lm":
        student.set_lm(lm)
    with dspy.context(lm=scripted()):
        best = teleprompter(**arguments).compile(student, trainset=trainset())
    assert best.score == 100.0
    assert lm.seen
    assert all("rollout_id" not in settings for settings in lm.seen)
    assert lm.kwargs == before


class AwaitedPlugin(dspy.BaseLM):  # type: ignore[misc]
    """The same, but it can only be awaited."""

    async def aforward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
        return Plugin().forward(prompt, messages)


def judge(example: Any, prediction: Any, trace: Any = None) -> float:
    return (1 + (prediction.answer == example.answer)) / 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("side", ["task_model", "set_lm", "settings"])
@pytest.mark.parametrize("is_async", [True, False])
def test_a_program_is_called_or_awaited_as_its_lm_can_be(is_async: bool, side: str) -> None:
    lm, student = Plugin() if is_async else AwaitedPlugin(model="plug/in"), dspy.Predict(QA)
    demos = {"max_bootstrapped_demos": 1, "max_labeled_demos": 0, "num_candidates": 4}
    arguments = {"prompt_model": scripted(), "metric": judge, "pruner": None, **demos}
    if side == "task_model":
        arguments["task_model"] = lm
    elif side == "set_lm":
        student.set_lm(lm)
    with dspy.context(lm=lm if side == "settings" else scripted()):
        if is_async:
            best = asyncio.run(teleprompter(**arguments).acompile(student, trainset=trainset()))
        else:
            best = teleprompter(**arguments).compile(student, trainset=trainset())
    assert best.score == 100.0
    assert any(candidate["program"].demos for candidate in best.candidate_programs)


@pytest.mark.skipif(VERSION < (3, 4), reason="engines come with DSPy 3.4")
def test_an_lm_with_an_engine_of_its_own() -> None:
    from dspy import lm15

    class Engine:
        requests: list[Any] = []  # noqa: RUF012

        def complete(self, request: Any) -> Any:
            self.requests.append(request)
            messages = [(m.role, m.text or "") for m in request.messages]
            system = request.system
            parts = [system] if isinstance(system, str) else [p.text for p in system or ()]
            call = LMCall("own/engine", (("system", "".join(parts)), *messages))
            text = lm15.TextPart(render(answer(call), call))
            message = lm15.Message(role="assistant", parts=(text,))
            usage = lm15.Usage(input_tokens=3, output_tokens=2, total_tokens=5)
            return lm15.Response(
                id=None, model="own/engine", message=message, finish_reason="stop", usage=usage
            )

    lm = dspy.LM("own/engine", engine=Engine(), cache=False)
    student = dspy.Predict(QA)
    student.set_lm(lm)
    with dspy.context(lm=lm):
        best = teleprompter().compile(student, trainset=trainset())
    assert best.score == 100.0
    assert best.opro_result.usage.prompt_tokens == 3 * len(Engine.requests)
    assert best.lm.kwargs == lm.kwargs


def test_a_model_that_refuses_a_temperature_is_asked_without_one() -> None:
    seen: list[float | None] = []

    def picky(call: LMCall) -> str | Mapping[str, Any]:
        seen.append(call.temperature)
        if call.temperature is not None:
            raise ValueError("Unsupported value: 'temperature' does not support 1.0 with this model.")
        return answer(call)

    lm = ScriptedLM(picky, temperature=None)
    with dspy.context(lm=lm):
        best = teleprompter(num_rounds=2, num_threads=1).compile(dspy.Predict(QA), trainset=trainset())
    assert best.score == 100.0
    assert best.opro_result.problems == ()
    with_one = [t for t in seen if t is not None]
    assert 0 < len(with_one) <= 2  # the first proposal, once more by the adapter's own second attempt


def test_a_reasoning_model_keeps_its_temperature() -> None:
    lm = dspy.LM("openai/o3-mini", temperature=1.0, max_tokens=20_000)
    assert sampling_lm(lm, 0.7, 5).kwargs["temperature"] == 1.0
    if IS_FIRST_RELEASE:
        return  # it takes no reasoning model without a temperature
    bare = dspy.LM("openai/o3-mini", temperature=None, max_tokens=None)
    assert sampling_lm(bare, 0.7, 5).kwargs["temperature"] == 1.0
    assert bare.kwargs["temperature"] is None


def test_the_lms_passed_in_are_unchanged(server: SimulatedServer) -> None:
    lm, task_lm = server.lm("world", temperature=0.3, max_tokens=500), server.lm("task", temperature=0.0)
    before = [dict(lm.kwargs), dict(task_lm.kwargs)]
    teleprompter(prompt_model=lm, task_model=task_lm).compile(dspy.Predict(QA), trainset=trainset())
    assert [lm.kwargs, task_lm.kwargs] == before


def test_the_cache_answers_a_rerun_and_cache_false_asks_again(server: SimulatedServer) -> None:
    for cache, repeats in ((True, False), (False, True)):
        lm = server.lm("world", cache=cache)
        with dspy.context(lm=lm):
            # No two texts of the simulated model are alike, so that only a cache gives the same ones.
            first = teleprompter().compile(dspy.Predict(QA), trainset=trainset()).opro_result
            second = teleprompter().compile(dspy.Predict(QA), trainset=trainset()).opro_result
        assert (second.usage.proposer_calls > 0) == repeats
        assert (first.instructions == second.instructions) != repeats


def test_settings_of_a_predictor_reach_the_model_untouched() -> None:
    lm = scripted()
    student = dspy.Predict(QA, temperature=0.25, max_tokens=77)
    with dspy.context(lm=lm):
        best = teleprompter(num_rounds=1).compile(student, trainset=trainset())
    program_calls = [call for call in lm.calls if not is_proposal(call)]
    assert {(c.temperature, c.request.get("max_tokens")) for c in program_calls} == {(0.25, 77)}
    assert best.config == student.config


def test_a_cut_off_answer_of_the_optimizer_lm_costs_one_proposal() -> None:
    with SimulatedServer(
        {"strong": SimulatedModel(answer, faults=(Fault("malformed_answer", count=1),)), "task": answer},
        own_process=False,
    ) as server:
        best = teleprompter(
            num_rounds=2, prompt_model=server.lm("strong"), task_model=server.lm("task")
        ).compile(dspy.Predict(QA), trainset=trainset())
    assert best.score == 100.0
