"""What people hook up sees a whole run: DSPy's callbacks, usage tracking, Optuna's callbacks, OpenInference.

MLflow's autologging is in tests/integrations.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy.utils.callback import ACTIVE_CALL_ID, BaseCallback

from dspy_opro import OPROTeleprompter
from dspy_opro.programs.compat import HAS_COMPILE_CALLBACKS
from dspy_opro.testing import SimulatedServer
from tests.conformance.programs import QA
from tests.conformance.world import VERSION, answer, metric, scripted, teleprompter, trainset


class Spy(BaseCallback):  # type: ignore[misc]
    """Writes down (event, call id, parent, arguments, thread)."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str, str | None, dict[str, Any], int]] = []

    def _add(self, event: str, call_id: str, values: dict[str, Any]) -> None:
        self.events.append((event, call_id, ACTIVE_CALL_ID.get(), values, threading.get_ident()))

    def named(self, event: str) -> list[tuple[str, str, str | None, dict[str, Any], int]]:
        return [e for e in self.events if e[0] == event]

    def on_compile_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        self._add("compile", call_id, inputs)

    def on_compile_end(self, call_id: str, outputs: Any, exception: Any = None) -> None:
        self._add("compiled", call_id, {"outputs": outputs, "exception": exception})

    def on_evaluate_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        self._add("evaluate", call_id, {**inputs, "devset": instance.devset})

    def on_evaluate_end(self, call_id: str, outputs: Any, exception: Any = None) -> None:
        self._add("evaluated", call_id, {"outputs": outputs, "exception": exception})

    def on_adapter_format_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        self._add("adapter", call_id, {})

    def on_module_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        self._add("module", call_id, {"instance": instance})

    def on_lm_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        self._add("lm", call_id, inputs)


@pytest.fixture
def spy() -> Iterator[Spy]:
    spy = Spy()
    with dspy.context(lm=scripted(), callbacks=[spy]):
        yield spy


# -- DSPy's own callbacks ----------------------------------------------------------------------------------------


@pytest.mark.skipif(not HAS_COMPILE_CALLBACKS, reason="compile callbacks come with DSPy 3.3")
@pytest.mark.parametrize("demos", [{}, {"max_bootstrapped_demos": 1, "max_labeled_demos": 1}])
@pytest.mark.parametrize("is_async", [False, True])
def test_compile_is_told_once_with_its_arguments_by_name(
    spy: Spy, is_async: bool, demos: dict[str, Any]
) -> None:
    """Once: demos are bootstrapped by another optimizer's `compile`, which is no run of its own."""
    student, data = dspy.Predict(QA), trainset()
    optimizer = teleprompter(metric=lambda e, p: True, num_candidates=4, **demos)
    if is_async:
        best = asyncio.run(optimizer.acompile(student, data, num_trials=2))
    else:
        best = optimizer.compile(student, data, num_trials=2)
    has_demos = any(t.candidate.demo_set is not None for t in best.opro_result.trajectory.trials)
    assert has_demos is bool(demos)
    ((_, call_id, parent, inputs, _),) = spy.named("compile")
    ((_, end_id, _, outcome, _),) = spy.named("compiled")
    assert call_id == end_id
    assert parent is None
    assert inputs["student"] is student
    assert inputs["trainset"] is data
    assert inputs["num_trials"] == 2
    assert outcome == {"outputs": best, "exception": None}


@pytest.mark.skipif(not HAS_COMPILE_CALLBACKS, reason="compile callbacks come with DSPy 3.3")
def test_an_error_of_compile_is_told(spy: Spy) -> None:
    with pytest.raises(TypeError):
        teleprompter(metric=lambda e, p: None).compile(dspy.Predict(QA), trainset=trainset())
    ((*_, outcome, _),) = spy.named("compiled")
    assert isinstance(outcome["exception"], TypeError)


@pytest.mark.parametrize("is_async", [False, True])
def test_every_candidate_is_an_evaluation_in_the_callers_thread(spy: Spy, is_async: bool) -> None:
    optimizer, data = teleprompter(num_rounds=2), trainset(12)
    if is_async:
        result = asyncio.run(optimizer.acompile(dspy.Predict(QA), trainset=data)).opro_result
    else:
        result = optimizer.compile(dspy.Predict(QA), trainset=data).opro_result
    starts, ends = spy.named("evaluate"), spy.named("evaluated")
    assert len(starts) == len(ends) == len(result.trajectory)
    order = [e[0] for e in spy.events if e[0] in ("evaluate", "evaluated")]
    assert order == ["evaluate", "evaluated"] * len(starts)  # never two open at once: mlflow keeps a stack
    assert {e[4] for e in starts + ends} == {threading.get_ident()}
    by_score = sorted(t.state for t in result.trajectory.trials)
    keys = sorted(e[3]["callback_metadata"]["metric_key"] for e in starts)
    assert keys == ["eval_full" if state == "complete" else "eval_minibatch" for state in by_score]
    for start, end in zip(starts, ends, strict=True):
        results = end[3]["outputs"].results
        assert len(results) == len(start[3]["devset"])
        assert all(prediction.answer in ("42", "unsure") for _, prediction, _ in results)
    scores = sorted(float(e[3]["outputs"].score) for e in ends)
    assert scores == sorted(round(100 * t.reward, 2) for t in result.trajectory.trials)


def test_a_valset_is_an_evaluation_of_its_own(spy: Spy) -> None:
    teleprompter().compile(dspy.Predict(QA), trainset=trainset(), valset=trainset(3))
    keys = [e[3]["callback_metadata"]["metric_key"] for e in spy.named("evaluate")]
    assert keys.count("eval_valset") == 2  # the student's and the new incumbent's


def test_calls_have_the_right_parents(spy: Spy) -> None:
    teleprompter().compile(dspy.Predict(QA), trainset=trainset())
    compiles = {e[1] for e in spy.named("compile")} or {None}
    evaluations = {e[1] for e in spy.named("evaluate")}
    modules = {e[1] for e in spy.named("module")}
    assert {e[2] for e in spy.named("evaluate")} == compiles
    for _, _, parent, values, _ in spy.named("module"):
        if "instruction" in getattr(getattr(values["instance"], "signature", None), "output_fields", ()):
            assert parent in modules  # within the proposer
        elif type(values["instance"]).__name__ == "OPROProposer":
            assert parent in compiles
        else:
            assert parent in evaluations
    assert len(spy.named("lm")) > 0
    assert {e[2] for e in spy.named("lm")} <= {e[1] for e in spy.events}


def test_a_callback_that_raises_does_not_end_the_run(spy: Spy) -> None:
    class Broken(BaseCallback):  # type: ignore[misc]
        def on_evaluate_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
            raise RuntimeError("broken")

    with dspy.context(callbacks=[Broken(), spy]):
        best = teleprompter().compile(dspy.Predict(QA), trainset=trainset())
    assert best.score == 100.0
    assert len(spy.named("evaluate")) == len(best.opro_result.trajectory)


# -- usage -------------------------------------------------------------------------------------------------------


def test_usage_tracking_around_compile_sees_what_was_spent() -> None:
    with SimulatedServer(answer, own_process=False) as server, dspy.context(lm=server.lm("world")):
        with dspy.track_usage() as tracker:
            best = teleprompter(num_rounds=2).compile(dspy.ChainOfThought(QA), trainset=trainset())
        stats = server.stats()["world"]
        total = tracker.get_total_tokens()["openai/world"]
    assert total["prompt_tokens"] == stats.prompt_tokens
    assert total["completion_tokens"] == stats.completion_tokens
    assert best.opro_result.usage.prompt_tokens == stats.prompt_tokens


# -- Optuna's callbacks ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_optunas_mlflow_callback(tmp_path: Path) -> None:
    integration = pytest.importorskip("optuna_integration", reason="pip install dspy-opro[integrations]")
    mlflow = pytest.importorskip("mlflow", reason="pip install dspy-opro[integrations]")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    callback = integration.MLflowCallback(tracking_uri=uri, metric_name="reward")
    with dspy.context(lm=scripted()):
        best = teleprompter(callbacks=[callback], study_name="opro").compile(
            dspy.Predict(QA), trainset=trainset()
        )
    mlflow.set_tracking_uri(uri)
    runs = mlflow.search_runs(experiment_names=["opro"], output_format="list")
    assert sorted(r.data.metrics["reward"] for r in runs) == sorted(
        t.reward for t in best.opro_result.trajectory.trials
    )


@pytest.mark.slow
def test_optunas_weights_and_biases_callback_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    integration = pytest.importorskip("optuna_integration", reason="pip install dspy-opro[integrations]")
    wandb = pytest.importorskip("wandb", reason="pip install dspy-opro[integrations]")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
    callback = integration.WeightsAndBiasesCallback(
        metric_name="reward", wandb_kwargs={"project": "opro", "dir": str(tmp_path)}
    )
    rewards: list[float] = []
    others = [callback, lambda study, trial: rewards.append(trial.value)]
    with dspy.context(lm=scripted()):
        teleprompter(callbacks=others).compile(dspy.Predict(QA), trainset=trainset())
    summary = dict(wandb.run.summary)
    wandb.finish()
    assert summary["reward"] == rewards[-1]
    assert max(rewards) == 1.0
    assert list(tmp_path.glob("wandb/offline-run-*"))


# -- OpenTelemetry -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(VERSION < (3, 3), reason="run with the newest DSPy alone")
def test_openinference_has_complete_spans_of_proposals_and_evaluations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reason = "pip install dspy-opro[integrations]"
    instrumentation = pytest.importorskip("openinference.instrumentation.dspy", reason=reason)
    trace = pytest.importorskip("opentelemetry.sdk.trace", reason=reason)
    export = pytest.importorskip("opentelemetry.sdk.trace.export", reason=reason)
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter", reason=reason)
    exporter, provider = memory.InMemorySpanExporter(), trace.TracerProvider()
    provider.add_span_processor(export.SimpleSpanProcessor(exporter))
    # With its own wrappers openinference-instrumentation-dspy 0.1.48 removes DSPy's, and callbacks are not called.
    for owner in (dspy.LM, dspy.Module, dspy.Adapter, dspy.Tool):
        for name in ("__call__", "acall"):
            monkeypatch.setattr(owner, name, getattr(owner, name))
    instrumentor = instrumentation.DSPyInstrumentor()
    instrumentor.instrument(tracer_provider=provider)
    try:
        lm = scripted()
        with dspy.context(lm=lm):
            teleprompter().compile(dspy.ChainOfThought(QA), trainset=trainset())
    finally:
        instrumentor.uninstrument()
    spans = exporter.get_finished_spans()
    by_id = {span.context.span_id: span for span in spans}
    assert all(span.parent is None or span.parent.span_id in by_id for span in spans)
    calls = [s for s in spans if (s.attributes or {}).get("openinference.span.kind") == "LLM"]
    assert len(calls) == lm.num_calls
    assert all(span.parent is not None for span in calls)  # every call happens inside a module
    names = {span.name for span in spans}
    assert any(name.startswith("OPROProposer") for name in names)


def test_the_class_is_a_direct_teleprompter_with_its_own_compile() -> None:
    """What mlflow's autologging looks for: it patches the direct subclasses that it finds."""
    assert OPROTeleprompter in dspy.teleprompt.Teleprompter.__subclasses__()
    assert "compile" in vars(OPROTeleprompter)
    optimizer = OPROTeleprompter(metric=metric)
    assert optimizer.get_params() is not vars(optimizer)
