"""`mlflow.genai.optimize_prompts` with OPRO, and autologged runs, over the real package and an SQLite store."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dspy
import pytest

mlflow = pytest.importorskip("mlflow", reason="pip install dspy-opro[integrations]")

from dspy_opro import OPROTeleprompter  # noqa: E402
from dspy_opro.integrations.mlflow import Batches, OPROPromptOptimizer, PromptProgram, Request, autolog  # noqa: E402
from dspy_opro.testing import LMCall, ScriptedLM  # noqa: E402
from tests.conformance.programs import QA  # noqa: E402
from tests.conformance.world import metric, scripted, teleprompter, trainset  # noqa: E402


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store without runs. Its many tables take seconds to create."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(autouse=True)
def _store(tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.chdir(tmp_path)
    shutil.copy(tables, tmp_path)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    mlflow.set_registry_uri(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = mlflow.create_experiment("opro", artifact_location=str(tmp_path / "artifacts"))
    mlflow.set_experiment(experiment_id=experiment)
    yield
    mlflow.dspy.autolog(disable=True)


def proposals(*texts: str) -> ScriptedLM:
    """An optimizer LM that writes one of these texts after the other."""
    lock, count = threading.Lock(), iter(range(10_000))

    def answer(call: LMCall) -> dict[str, str]:
        with lock:
            return {name: texts[next(count) % len(texts)] for name in call.output_fields}

    return ScriptedLM(answer)


def records(count: int = 40) -> list[dict[str, Any]]:
    return [
        {"inputs": {"question": f"What is {n} plus {n}?"}, "expectations": {"expected_response": str(2 * n)}}
        for n in range(count)
    ]


def answer(prompt: str, question: str) -> str:
    """A model that adds only when its prompt says so."""
    assert question in prompt  # the variable was filled in
    left = int(question.split()[2])
    return str(2 * left) if "Add the two numbers" in prompt else "42"


def optimize(optimizer: OPROPromptOptimizer, prompt: Any, predict: Any, **options: Any) -> Any:
    @mlflow.genai.scorers.scorer
    def exact(outputs: str, expectations: dict[str, Any]) -> mlflow.entities.Feedback:
        right = outputs == expectations["expected_response"]
        return mlflow.entities.Feedback(value=1.0 if right else 0.0, rationale=f"it is {expectations}")

    @mlflow.genai.scorers.scorer
    def short(outputs: str) -> float:
        return 1.0 if len(outputs) < 10 else 0.0

    return mlflow.genai.optimize_prompts(
        **{
            "predict_fn": predict,
            "train_data": records(),
            "prompt_uris": [prompt.uri],
            "optimizer": optimizer,
            "scorers": [exact, short],
            "aggregation": lambda scores: scores["exact"].value,
            **options,
        }
    )


@pytest.mark.slow
def test_a_text_prompt_gets_better_keeps_its_variables_and_is_tracked() -> None:
    prompt = mlflow.genai.register_prompt(name="sum", template="Answer: {{question}}")
    lm = proposals("No variable here.", "Add the two numbers. {{question}}", "Think. {{question}}")

    def predict(question: str) -> str:
        return answer(mlflow.genai.load_prompt(prompt.uri).format(question=question), question)

    result = optimize(OPROPromptOptimizer(lm, max_metric_calls=120, num_candidates=4), prompt, predict)
    (best,) = result.optimized_prompts
    assert best.template.endswith("Add the two numbers. {{question}}")
    assert best.version == prompt.version + 1
    assert result.optimizer_name == "OPROPromptOptimizer"
    assert result.initial_eval_score < 0.1
    assert result.final_eval_score == 1.0
    assert result.final_eval_score_per_scorer == {"exact": 1.0, "short": 1.0}
    (run,) = mlflow.search_runs(output_format="list")
    assert {"opro_report.html", "opro_summary.txt"} <= artifacts(run)
    assert run.data.metrics["gain"] > 0.9
    assert run.data.metrics["gain_low"] > 0
    assert run.data.metrics["metric_calls"] <= 120
    assert run.data.params["max_metric_calls"] == "120"
    assert run.data.tags["stop_reason"]


@pytest.mark.slow
def test_every_message_of_a_chat_prompt_is_rewritten_apart() -> None:
    messages = [
        {"role": "system", "content": "You answer."},
        {"role": "user", "content": "Q: {{question}}"},
    ]
    prompt = mlflow.genai.register_prompt(name="chat", template=messages)
    lm = proposals("Add the two numbers. {{question}}", "Add the two numbers.")

    def predict(question: str) -> str:
        filled = mlflow.genai.load_prompt(prompt.uri).format(question=question)
        return answer("\n".join(m["content"] for m in filled), question)

    result = optimize(OPROPromptOptimizer(lm, max_metric_calls=120, num_candidates=4), prompt, predict)
    (best,) = result.optimized_prompts
    assert [m["role"] for m in best.template] == ["system", "user"]
    assert "{{question}}" in best.template[1]["content"]
    assert any("Add the two numbers" in m["content"] for m in best.template)


def test_without_data_or_scorers_the_error_is_clear() -> None:
    prompt = mlflow.genai.register_prompt(name="sum", template="Answer: {{question}}")
    optimizer = OPROPromptOptimizer(proposals("x"), max_metric_calls=50)
    with pytest.raises(ValueError, match="train_data and scorers"):
        optimize(optimizer, prompt, lambda question: "", train_data=[], scorers=None)
    with pytest.raises(Exception, match="scorers gave no number"):
        optimize(optimizer, prompt, lambda question: "", scorers=None)


def test_unknown_settings_raise_at_once() -> None:
    with pytest.raises(TypeError, match="max_metric_calls"):
        OPROPromptOptimizer(max_metric_call=3)


@pytest.mark.parametrize("settings", [{"metric": len}, {"task_model": proposals("x")}, {"dry_run": True}])
def test_settings_that_mlflow_has_in_its_own_hands_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(settings))} is no setting here"):
        OPROPromptOptimizer(**settings)


def test_calls_of_eval_fn_never_overlap_and_hold_many_records() -> None:
    sizes: list[int] = []
    running = threading.Lock()

    def eval_fn(prompts: dict[str, str], batch: list[dict[str, Any]]) -> list[Any]:
        assert running.acquire(blocking=False), "two calls at a time"
        try:
            sizes.append(len(batch))
            time.sleep(0.05)
            return [SimpleNamespace(outputs=(prompts["p"], record["n"])) for record in batch]
        finally:
            running.release()

    batches, found = Batches(eval_fn), {}

    def work(number: int) -> None:
        prompts = {"p": f"prompt {number % 2}"}
        found[number] = batches.evaluate(prompts, {"n": number}).outputs

    threads = [threading.Thread(target=work, args=(n,)) for n in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: (f"prompt {n % 2}", n) for n in range(40)}
    assert sum(sizes) == 40
    assert len(sizes) < 10


def test_an_error_of_eval_fn_reaches_every_record_of_its_batch() -> None:
    def eval_fn(prompts: dict[str, str], batch: list[dict[str, Any]]) -> list[Any]:
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        Batches(eval_fn).evaluate({"p": "x"}, {"inputs": {}})


def test_a_missing_result_is_an_error_of_every_record_and_nobody_waits() -> None:
    batches, found = Batches(lambda prompts, batch: batch[1:]), []

    def work(number: int) -> None:
        with pytest.raises(ValueError, match=r"eval_fn returned \d results for \d records"):
            batches.evaluate({"p": "x"}, {"n": number})
        found.append(number)

    threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert sorted(found) == [0, 1, 2]


def test_a_copied_program_keeps_the_record_and_shares_the_evaluation() -> None:
    batches = Batches(lambda prompts, batch: [])
    template = json.dumps([{"role": "user", "content": "a {{b}}"}, {"role": "assistant", "content": ""}])
    messages = json.loads(template)
    program = PromptProgram({"chat": messages, "text": [{"content": "hi"}]}, batches)
    copy = program.deepcopy()
    assert copy.batches is batches
    assert copy.assemble() == {"chat": template, "text": "hi"}
    assert len(copy.named_predictors()) == 2
    record = {"inputs": {"question": "?"}, "outputs": "!"}
    assert dspy.Example(request=Request(record)).copy().request.record == record


@pytest.mark.parametrize("content", ["  One:\n    def f():\n\treturn {{q}}\n", "\n\nAnswer {{q}}\n"])
@pytest.mark.parametrize("is_chat", [False, True])
def test_a_prompt_that_is_not_rewritten_keeps_its_white_space(content: str, is_chat: bool) -> None:
    messages = [{"role": "user", "content": content}] if is_chat else [{"content": content}]
    program = PromptProgram({"p": messages}, Batches(lambda prompts, batch: []))
    assert program.assemble() == {"p": json.dumps(messages) if is_chat else content}
    (predictor,) = program.predictors()
    predictor.signature = predictor.signature.with_instructions("Say {{q}}")
    assert "Say {{q}}" in program.assemble()["p"]


# -- autologging -------------------------------------------------------------------------------------------------


def runs_of_compile() -> tuple[Any, list[Any]]:
    """The one run of a `compile`, and those below it."""
    runs = mlflow.search_runs(output_format="list")
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    (parent,) = [run for run in runs if run not in children]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} <= {parent.info.run_id}
    return parent, children


def artifacts(run: Any) -> set[str]:
    return {artifact.path for artifact in mlflow.MlflowClient().list_artifacts(run.info.run_id)}


@pytest.mark.parametrize(
    "turn_on", [autolog, partial(mlflow.dspy.autolog, log_compiles=True, log_evals=True)]
)
def test_the_run_of_a_compile_says_what_it_did_and_its_children_who_they_are(turn_on: Any) -> None:
    dspy.configure(lm=scripted())
    turn_on()
    turn_on()  # as in a notebook's cell that is run again
    optimizer = teleprompter(
        num_rounds=2, num_candidates=4, seed=3, prices={"scripted/lm": (1, 1)}, max_bootstrapped_demos=1
    )
    # MLflow itself logs the plain arguments of the call as they are: "5", where ours would say "5.0".
    best = optimizer.compile(dspy.Predict(QA), trainset=trainset(12), valset=trainset(40)[12:], max_cost=5)
    result = best.opro_result
    parent, children = runs_of_compile()
    sizes = {"train": 0, "val": 0}
    for run in children:
        number, size, split = re.fullmatch(
            r"candidate (\d+), (\d+) (train|val) examples?", run.info.run_name
        ).groups()
        scores = {
            "train": result.trials[int(number)].scores,
            "val": result.trials[int(number)].valset_scores,
        }[split]
        assert int(size) == len(scores)
        assert run.data.metrics["eval"] == pytest.approx(100 * sum(scores) / len(scores), abs=0.01)
        assert run.info.status == "FINISHED"
        sizes[split] += 1
    assert sizes == {"train": len(result.trials), "val": sum(bool(t.valset_scores) for t in result.trials)}
    params, metrics, tags = parent.data.params, parent.data.metrics, parent.data.tags
    assert params.keys() >= set(OPROTeleprompter(metric=metric).get_params())
    assert (params["seed"], params["num_rounds"], params["max_cost"]) == ("3", "2", "5")
    assert params["prompt_model"] == params["task_model"] == "scripted/lm"
    assert metrics["metric_calls"] == result.usage.metric_calls
    assert metrics["tokens"] == result.usage.tokens > 0
    assert metrics["cost"] == pytest.approx(result.usage.cost) != 0
    assert metrics["unpriced_calls"] == 0
    assert result.gain is not None
    interval = result.gain.interval
    assert (metrics["gain_low"], metrics["gain"], metrics["gain_high"]) == (
        *(interval.low, interval.estimate, interval.high),
    )
    assert tags["stop_reason"] == result.stop_reason
    names = "best_model.json", "opro_report.html", "opro_summary.txt", "trainset.json", "valset.json"
    assert artifacts(parent) == set(names)


@pytest.mark.slow
def test_the_traces_and_a_later_evaluation_are_those_of_mlflow() -> None:
    dspy.configure(lm=scripted())
    mlflow.dspy.autolog(log_compiles=True, log_evals=True, log_traces_from_compile=True)
    best = teleprompter().compile(dspy.Predict(QA), trainset=trainset(12))
    parent, _ = runs_of_compile()
    dspy.Evaluate(devset=trainset(), metric=metric)(best)
    (later,) = (run for run in mlflow.search_runs(output_format="list") if run.info.run_name == "eval")
    assert later.data.metrics["eval"] == 100.0
    assert "mlflow.parentRunId" not in later.data.tags
    assert len(mlflow.search_traces(locations=[parent.info.experiment_id], return_type="list")) > 0


@pytest.mark.slow
@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize(
    ("options", "is_logged"),
    [
        ({"log_compiles": True, "log_evals": True}, True),
        ({"log_compiles": True}, True),
        ({"log_evals": True}, False),
    ],
    ids=["all", "compiles", "evals"],
)
def test_a_run_of_the_user_keeps_its_name_and_gets_what_autologging_was_asked_for(
    options: dict[str, bool], is_logged: bool, is_async: bool
) -> None:
    dspy.configure(lm=scripted())
    mlflow.dspy.autolog(**options)
    optimizer = teleprompter(num_threads=3)
    with mlflow.start_run(run_name="mine") as mine:
        mlflow.log_param("num_threads", "many")  # MLflow would refuse another value
        if is_async:
            asyncio.run(optimizer.acompile(dspy.Predict(QA), trainset=trainset(), seed=5))
        else:
            optimizer.compile(dspy.Predict(QA), trainset=trainset(), seed=5)
    run = mlflow.get_run(mine.info.run_id)
    assert run.info.run_name == "mine"
    assert run.data.params["num_threads"] == "many"
    assert (run.data.params.get("max_rounds") == "1") is is_logged
    assert ("stop_reason" in run.data.tags) is is_logged
    assert ("opro_report.html" in artifacts(run)) is is_logged
    assert run.data.params.get("seed") == ("5" if is_logged else None)


def test_an_error_leaves_what_was_measured() -> None:
    def stopper(state: Any) -> None:
        if state.round:
            raise OSError("gone")

    dspy.configure(lm=scripted())
    mlflow.dspy.autolog(log_compiles=True, log_evals=True)
    with pytest.raises(OSError, match="gone"):
        teleprompter(stoppers=[stopper]).compile(dspy.Predict(QA), trainset=trainset(), seed=5)
    parent, _ = runs_of_compile()
    assert parent.info.status == "FAILED"
    assert parent.data.tags["stop_reason"] == "error"
    assert parent.data.params["seed"] == "5"
    assert parent.data.metrics["metric_calls"] > 0


def test_a_store_that_fails_ends_no_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    dspy.configure(lm=scripted())
    mlflow.dspy.autolog(log_compiles=True)
    monkeypatch.setattr(mlflow, "log_metrics", None)
    assert teleprompter().compile(dspy.Predict(QA), trainset=trainset()).score == 100.0
    assert "run in MLflow is not complete" in caplog.text


@pytest.mark.slow
def test_of_acompile_mlflow_sees_the_evaluations_alone() -> None:
    dspy.configure(lm=scripted())
    mlflow.dspy.autolog(log_compiles=True, log_evals=True)
    result = asyncio.run(teleprompter().acompile(dspy.Predict(QA), trainset=trainset(12))).opro_result
    runs = mlflow.search_runs(output_format="list")
    assert not any("mlflow.parentRunId" in run.data.tags for run in runs)
    names = [f"candidate {n}, {t.num_scored} train examples" for n, t in enumerate(result.trials)]
    assert sorted(run.info.run_name for run in runs) == names
