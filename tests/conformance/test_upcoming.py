"""What DSPy 3.5 makes the only way, and 3.4 offers already: native tools and reasoning, engines, and no LiteLLM."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dspy
import pytest

import dspy_opro
from dspy_opro.proposers.completion import CompletionProposer
from dspy_opro.testing import LMCall, ScriptedLM, SimulatedServer
from dspy_opro.testing.calls import render
from tests.conformance.programs import QA, calculate, search
from tests.conformance.world import MAGIC, VERSION, answer, scripted, teleprompter, trainset

PACKAGE = Path(dspy_opro.__file__).parent
ROOT = PACKAGE.parent

since_3_4 = pytest.mark.skipif(VERSION < (3, 4), reason="DSPy 3.4 and later")


class Engine:
    """A model with native tools and native reasoning, behind the interface of DSPy 3.4."""

    supports_function_calling = True
    supports_reasoning = True

    def __init__(self) -> None:
        self.requests: list[Any] = []

    def complete(self, request: Any) -> Any:
        from dspy import lm15

        self.requests.append(request)
        system = request.system
        parts = [system] if isinstance(system, str) else [part.text for part in system or ()]
        texts = [(m.role, "\n".join(p.text for p in m.parts if p.type == "text")) for m in request.messages]
        call = LMCall(request.model, (("system", "".join(parts)), *texts))
        result = "42" if MAGIC in call.prompt else "unsure"
        content: Sequence[Any]
        if request.tools:
            content = [
                lm15.ToolCallPart(id=f"call_{len(self.requests)}", name="submit", input={"answer": result})
            ]
        else:
            content = [lm15.TextPart(render(answer(call), call))]
        if request.config.reasoning is not None:
            content = [lm15.ThinkingPart("Let me think."), *content]
        return lm15.Response(
            id=None,
            model=request.model,
            message=lm15.Message(role="assistant", parts=tuple(content)),
            finish_reason="tool_call" if request.tools else "stop",
            usage=lm15.Usage(input_tokens=3, output_tokens=2, total_tokens=5),
        )

    def stream(self, request: Any) -> Any:
        from dspy import lm15

        return iter(lm15.response_to_events(self.complete(request)))

    def close(self) -> None: ...


class AsyncEngine(Engine):
    async def complete(self, request: Any) -> Any:
        return super().complete(request)

    async def aclose(self) -> None: ...


class Thinking(dspy.Signature):  # type: ignore[misc]
    """Answer the question."""

    question: str = dspy.InputField()
    if VERSION >= (3, 4):
        reasoning: dspy.Reasoning = dspy.OutputField()
    answer: str = dspy.OutputField()


@contextmanager
def announced() -> Iterator[list[str]]:
    """The warnings of whatever DSPy 3.5 removes, from all threads."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield found
    found += [
        str(w.message)
        for w in caught
        if issubclass(w.category, DeprecationWarning) and "3.5" in str(w.message)
    ]


# --- what becomes the default ----------------------------------------------------------------------------


@since_3_4
@pytest.mark.parametrize(
    "make",
    [
        lambda: dspy.Predict(QA),
        lambda: dspy.ChainOfThought(QA),
        lambda: dspy.ReAct(QA, tools=[search], max_iters=2),
        lambda: dspy.ReActV2(QA, tools=[search, calculate], max_iters=2),
        lambda: dspy.Predict(Thinking),
    ],
    ids=["Predict", "ChainOfThought", "ReAct", "ReActV2", "Reasoning"],
)
@pytest.mark.parametrize("is_native", [True, False])
def test_the_xml_adapter_works_with_native_tools_and_without(make: Any, is_native: bool) -> None:
    engine = Engine()
    adapter = dspy.XMLAdapter(use_native_function_calling=is_native)
    student = make()
    with (
        dspy.context(lm=dspy.LM("own/engine", engine=engine, cache=False), adapter=adapter),
        announced() as warned,
    ):
        best = teleprompter(prompt_model=scripted()).compile(student, trainset=trainset())
        assert best(question="?").answer == "42"
    assert best.score == 100.0
    assert best.opro_result.num_failures == 0
    assert any(request.tools for request in engine.requests) == (
        is_native and isinstance(student, dspy.ReActV2)
    )
    assert warned == []


@since_3_4
def test_the_xml_adapter_with_native_tools_writes_proposals() -> None:
    adapter = dspy.XMLAdapter(use_native_function_calling=True)
    with dspy.context(lm=dspy.LM("own/engine", engine=Engine(), cache=False), adapter=adapter):
        best = teleprompter().compile(dspy.ReActV2(QA, tools=[search], max_iters=2), trainset=trainset())
    assert best.score == 100.0
    assert "Use the supplied tools" in best.react.signature.instructions


@since_3_4
def test_native_reasoning_stays_a_field_of_the_prediction() -> None:
    engine = Engine()
    with dspy.context(lm=dspy.LM("own/engine", engine=engine, cache=False)):
        best = teleprompter(prompt_model=scripted()).compile(dspy.Predict(Thinking), trainset=trainset())
        prediction = best(question="?")
    assert (str(prediction.reasoning), prediction.answer) == ("Let me think.", "42")
    assert list(best.signature.fields) == ["question", "reasoning", "answer"]
    assert all(request.config.reasoning is not None for request in engine.requests)


@since_3_4
async def test_async_engines_are_awaited() -> None:
    class Program(dspy.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.predict = dspy.Predict(QA)

        async def aforward(self, question: str) -> Any:
            return await self.predict.acall(question=question)

    engine = AsyncEngine()
    lm = dspy.LM("own/engine", engine=Engine(), async_engine=engine, cache=False)
    with dspy.context(lm=lm), announced() as warned:
        best = await teleprompter(prompt_model=scripted()).acompile(Program(), trainset=trainset())
    assert best.score == 100.0
    assert best.opro_result.usage.scorer_calls == len(engine.requests)
    assert warned == []


def test_an_lm_without_forward_needs_only_to_be_callable() -> None:
    class Bare(dspy.BaseLM):  # type: ignore[misc]
        def __call__(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
            texts = tuple((m["role"], m["content"]) for m in messages)
            call = LMCall(self.model, texts)
            return [render(answer(call), call)]

    with dspy.context(lm=Bare("bare/lm")):
        best = teleprompter(prompt_model=scripted()).compile(dspy.Predict(QA), trainset=trainset())
    assert best.score == 100.0


# --- what goes away --------------------------------------------------------------------------------------


@since_3_4
def test_a_run_uses_nothing_that_is_announced_to_go() -> None:
    """Over HTTP through the real LM: the test request, proposals and examples; then a fake, and plain completions."""
    with SimulatedServer(answer, own_process=False) as server, announced() as warned:
        with dspy.context(lm=server.lm("task")):
            teleprompter(prompt_model=server.lm("strong")).compile(dspy.Predict(QA), trainset=trainset())
        with dspy.context(lm=scripted()):
            teleprompter().compile(dspy.Predict(QA), trainset=trainset())
            completing = ScriptedLM(lambda call: "Say 42 about the {product}.")
            best = teleprompter(proposer=CompletionProposer(), prompt_model=completing).compile(
                dspy.Predict(QA), trainset=trainset()
            )
    assert completing.num_calls > 0
    assert len(best.opro_result.trajectory) > 1
    assert warned == []


@since_3_4
def test_what_is_announced_to_go_is_noticed() -> None:
    with announced() as warned:
        scripted()(messages=[{"role": "user", "content": "hello"}])
    assert len(warned) == 1


@since_3_4
def test_a_fake_answers_a_canonical_request() -> None:
    from dspy import lm15

    lm = ScriptedLM(lambda call: f"{call.user} {call.rollout_id}")
    request = lm15.Request(model=lm.model, messages=(lm15.Message.user("hello"),))
    with announced() as warned:
        response = lm(request, rollout_id=3)
    assert isinstance(response, lm15.Response)
    assert response.message.text == "hello 3"
    assert warned == []


@since_3_4
def test_a_fake_has_no_forward_of_its_own() -> None:
    assert ScriptedLM.forward is dspy.LM.forward
    assert ScriptedLM.aforward is dspy.LM.aforward


# --- without LiteLLM -------------------------------------------------------------------------------------


def imported(path: Path) -> set[str]:
    """The packages that a file imports anywhere, also by `importlib.import_module` and `__import__`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module or "")
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            names.update(arg.value for arg in node.args if isinstance(arg, ast.Constant))
    return {name.partition(".")[0] for name in names}


def test_litellm_and_openai_are_imported_for_old_versions_of_dspy_alone() -> None:
    files = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if imported(path) & {"litellm", "openai"}
    }
    assert files == {"local/forward.py"}
    tree = ast.parse((PACKAGE / "local" / "lm.py").read_text(encoding="utf-8"))
    (choice,) = [node for node in tree.body if isinstance(node, ast.If) and "forward" in ast.unparse(node)]
    assert "engine" in ast.unparse(choice.test)
    assert "forward" in ast.unparse(choice.orelse[0])
    others = [
        path for path in PACKAGE.rglob("*.py") if "local.forward" in path.read_text() and path.name != "lm.py"
    ]
    assert others == []


SCRIPT = """
import sys
for name in ("litellm", "openai", "mlflow"):
    sys.modules[name] = None  # an import is an ImportError
import dspy
import dspy_opro.local.lm
from dspy_opro.testing import SimulatedServer
from tests.conformance.programs import QA
from tests.conformance.world import answer, teleprompter, trainset
with SimulatedServer(answer, own_process=False) as server, dspy.context(lm=server.lm("task")):
    best = teleprompter(prompt_model=server.lm("strong")).compile(dspy.Predict(QA), trainset=trainset())
print(best.score, best.opro_result.usage.proposer_calls > 0)
"""


@since_3_4
def test_a_run_over_http_needs_no_litellm_openai_or_mlflow() -> None:
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=100,
        check=False,
    )
    assert run.stdout == "100.0 True\n", run.stderr
