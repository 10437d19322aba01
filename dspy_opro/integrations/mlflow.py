"""MLflow: OPRO's search on prompts of its registry, whatever framework uses them, and whole runs in its tracking.

Read in MLflow 3.18. Before 3.10 an evaluation does not have the scores of single scorers.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import dspy
import mlflow
from mlflow.genai.optimize.optimizers.base import BasePromptOptimizer
from mlflow.genai.optimize.types import EvaluationResultRecord, PromptOptimizerOutput

from dspy_opro.programs.compat import canonical
from dspy_opro.reporting.autologging import log_result
from dspy_opro.teleprompter import OPROTeleprompter

__all__ = ["OPROPromptOptimizer", "autolog"]

Evaluate = Callable[[dict[str, str], list[dict[str, Any]]], list[EvaluationResultRecord]]

GATHERING_SECONDS = 0.02
"""How long a batch waits for further examples. It is short beside an LM call."""


class OPROPromptOptimizer(BasePromptOptimizer):
    """The `optimizer` of `mlflow.genai.optimize_prompts(...)`.

    Every prompt is a predictor of `OPROTeleprompter`. Every message of a chat prompt is a predictor of its own. The
    `{{variables}}` of a prompt stay word for word. MLflow shows scores on unseen examples if the run confirmed its
    result, and otherwise scores of the search. The scores of single scorers are always those of the search.

    Args:
        prompt_model: The LM that writes the prompts: a `dspy.LM`, or its name as DSPy ("openai/gpt-4o") or MLflow
            ("openai:/gpt-4o") writes it. None is the LM of `dspy.settings`.
        settings: Arguments of `OPROTeleprompter` except `metric`, `task_model` and `dry_run`. `num_threads` (default
            32) examples may wait for an evaluation, and MLFLOW_GENAI_EVAL_MAX_WORKERS of them run at a time.

    Raises:
        TypeError: A setting is unknown.
        ValueError: A setting's value is out of range, or the setting does not apply to MLflow.
    """

    def __init__(self, prompt_model: Any = None, **settings: Any) -> None:
        for name in ("metric", "task_model", "dry_run"):
            if settings.get(name):
                raise ValueError(
                    f"{name} is no setting here: MLflow runs predict_fn and the scorers. Leave it out."
                )
        if isinstance(prompt_model, str):
            prompt_model = dspy.LM(prompt_model.replace(":/", "/", 1))
        # The program calls no LM through DSPy, but `compile` wants to know one for it.
        models = {"prompt_model": prompt_model, "task_model": prompt_model}
        self.teleprompter = OPROTeleprompter(metric=metric, **{"num_threads": 32, **settings, **models})

    def optimize(
        self,
        eval_fn: Evaluate,
        train_data: list[dict[str, Any]],
        target_prompts: dict[str, str],
        enable_tracking: bool = True,
    ) -> PromptOptimizerOutput:
        """Search for better prompts.

        Args:
            eval_fn: Scores prompts on records. Only one call runs at a time.
            train_data: Records with `inputs`, and `expectations` or `outputs`.
            target_prompts: Prompt name -> its template; a chat prompt's template is JSON.
            enable_tracking: Whether to log rewards, gain, summary and report to the active MLflow run.

        Raises:
            ValueError: There are no records, or no scorer gives a number.
        """
        if not train_data or eval_fn is None:
            raise ValueError("OPRO needs train_data and scorers: it compares prompts by their scores.")
        if not target_prompts:
            raise ValueError("OPRO needs at least one prompt in prompt_uris.")
        templates = {name: _messages(template) for name, template in target_prompts.items()}
        student = PromptProgram(templates, Batches(eval_fn))
        callbacks = [*(self.teleprompter.config.callbacks or []), *([log_trial] if enable_tracking else [])]
        program = self.teleprompter.compile(
            student, trainset=[_example(record) for record in train_data], callbacks=callbacks
        )
        result = program.opro_result
        if enable_tracking:
            log_result(result, mlflow.active_run())
        before, after = _scores(result)
        return PromptOptimizerOutput(
            optimized_prompts=program.assemble(),
            initial_eval_score=before,
            final_eval_score=after,
            initial_eval_score_per_scorer=dict(result.baseline.subscores),
            final_eval_score_per_scorer=dict(result.best.subscores),
        )


class Request(dict[str, Any]):
    """A record's inputs. `record` is the whole record, which `eval_fn` needs."""

    def __init__(self, record: Mapping[str, Any]) -> None:
        super().__init__(record["inputs"])
        self.record = dict(record)

    def __reduce__(self) -> tuple[Any, ...]:
        return Request, (self.record,)


class PromptProgram(dspy.Module):
    """A DSPy program whose predictors carry the prompts as their instructions. `eval_fn` calls the LMs.

    Args:
        templates: Prompt name -> its messages; a text prompt is one message without a role.
        batches: Evaluates records.
    """

    def __init__(self, templates: Mapping[str, Sequence[Mapping[str, Any]]], batches: Batches) -> None:
        super().__init__()
        self.templates = templates
        self.batches = batches
        self.prompts = {
            key: dspy.Predict(
                dspy.Signature("request: dict -> response: str", instructions=message["content"])
            )
            for key, message in self._texts()
        }

    def _texts(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        for name, messages in self.templates.items():
            for number, message in enumerate(messages):
                if isinstance(message["content"], str) and message["content"].strip():
                    yield _key(name, number, message), message

    def assemble(self) -> dict[str, str]:
        """Prompt name -> its template, as MLflow takes it."""
        prompts: dict[str, str] = {}
        for name, messages in self.templates.items():
            filled = [dict(message) for message in messages]
            for number, m in enumerate(filled):
                prompt = self.prompts.get(_key(name, number, m))
                # A signature changes white space. A prompt that was not rewritten keeps its own.
                if prompt is not None and prompt.signature.instructions != canonical(m["content"]):
                    m["content"] = prompt.signature.instructions
            is_text = "role" not in messages[0]
            prompts[name] = filled[0]["content"] if is_text else json.dumps(filled, ensure_ascii=False)
        return prompts

    def forward(self, request: Request) -> dspy.Prediction:
        found = self.batches.evaluate(self.assemble(), request.record)
        response = found.outputs if isinstance(found.outputs, str) else str(found.outputs)
        prediction = ScoredPrediction(response=response)
        prediction.scores = score(found)
        return prediction


class ScoredPrediction(dspy.Prediction):
    """A response, and beside its fields what the scorers said about it."""

    scores: Mapping[str, Any] = {}  # a class attribute, so that DSPy does not take it for a field


def score(found: EvaluationResultRecord) -> dict[str, Any]:
    """The scorers' aggregate, their rationales as feedback, and each scorer as a subscore.

    Raises:
        ValueError: The scorers gave no number.
    """
    if found.score is None:
        raise ValueError("The scorers gave no number. Pass scorers to optimize_prompts.")
    feedback = "\n".join(f"{name}: {text}" for name, text in found.rationales.items() if text)
    return {"score": found.score, "feedback": feedback, "subscores": dict(found.individual_scores)}


def metric(example: dspy.Example, prediction: ScoredPrediction) -> Mapping[str, Any]:
    """The metric of the search: `eval_fn` has scored the example already."""
    return prediction.scores


class Batches:
    """Gathers the records that the search's threads ask for, and evaluates them in one `eval_fn` call at a time.

    `eval_fn` replaces the templates of MLflow's prompts for all threads, so two calls must not overlap. It evaluates
    the records of one call in parallel.
    """

    def __init__(self, eval_fn: Evaluate) -> None:
        self._eval_fn = eval_fn
        self._waiting: list[tuple[dict[str, str], dict[str, Any], Future[EvaluationResultRecord]]] = []
        self._lock = threading.Lock()  # for `_waiting`
        self._running = threading.Lock()  # held during a call of `eval_fn`

    def __deepcopy__(self, memo: Any) -> Batches:
        return self  # every copy of the program shares the one evaluation

    def evaluate(self, prompts: dict[str, str], record: dict[str, Any]) -> EvaluationResultRecord:
        """The evaluation of one record. It waits for its turn.

        Raises:
            Exception: What `eval_fn` raised.
        """
        future: Future[EvaluationResultRecord] = Future()
        with self._lock:
            self._waiting.append((prompts, record, future))
        time.sleep(GATHERING_SECONDS)
        with self._running:
            if not future.done():  # no other thread's batch had it
                self._evaluate_as(prompts)
        return future.result()

    def _evaluate_as(self, prompts: dict[str, str]) -> None:
        with self._lock:
            batch = [entry for entry in self._waiting if entry[0] == prompts]
            self._waiting = [entry for entry in self._waiting if entry[0] != prompts]
        try:
            results = self._eval_fn(prompts, [record for _, record, _ in batch])
            if len(results) != len(batch):
                raise ValueError(f"eval_fn returned {len(results)} results for {len(batch)} records.")
        except BaseException as error:
            for _, _, future in batch:
                future.set_exception(error)
        else:
            for (_, _, future), result in zip(batch, results, strict=True):
                future.set_result(result)


def log_trial(study: Any, trial: Any) -> None:
    """An Optuna callback: log a candidate's reward to the active MLflow run."""
    if trial.value is not None:
        mlflow.log_metric("eval_score", trial.value, step=trial.number)


def autolog(**options: Any) -> None:
    """`mlflow.dspy.autolog` with what a `compile` needs: its run, and below it a run for each candidate.

    Args:
        options: Further arguments of `mlflow.dspy.autolog`. `log_compiles` and `log_evals` are on.
    """
    mlflow.dspy.autolog(**{"log_compiles": True, "log_evals": True, **options})


def _scores(result: Any) -> tuple[float, float]:
    """The scores of the student and of the returned prompts, on unseen examples where the run has them."""
    gain, is_student = result.gain, result.best.id == result.baseline.id
    if gain is None or gain.interval.basis != "fresh":
        return result.baseline.reward, result.best.reward
    return gain.student_score, gain.student_score if is_student else gain.candidate_score


def _key(name: str, number: int, message: Mapping[str, Any]) -> str:
    return f"{name}_{number}_{message['role']}" if "role" in message else name


def _messages(template: str) -> list[dict[str, Any]]:
    """A template's messages. MLflow hands chat prompts over as JSON."""
    try:
        messages = json.loads(template)
    except ValueError:
        messages = None
    is_list = isinstance(messages, list) and messages
    is_chat = is_list and all(isinstance(m, dict) and "role" in m for m in messages)
    return messages if is_chat else [{"content": template}]


def _example(record: Mapping[str, Any]) -> dspy.Example:
    expected = record.get("expectations") or record.get("outputs")
    return dspy.Example(request=Request(record), response=expected).with_inputs("request")
