"""Whole runs of a program with two predictors: the meta-prompt shows the calls of the predictor that it is for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import dspy
import pytest

from dspy_opro import ProposalRequest
from dspy_opro.proposers.opro import OPROProposer, prompt_fields
from dspy_opro.testing import SimulatedServer
from tests.runs import TRAINSET, TwoSteps, decisions, metric, optimize, serve


@pytest.fixture(scope="module")
def server() -> Iterator[SimulatedServer]:
    with serve() as started:
        yield started


def _key(request: ProposalRequest) -> tuple[int, int, int, str]:
    return request.round, request.slot, request.wave, ",".join(request.predictors)


class Watched(OPROProposer):
    """The default proposer. It keeps the requests."""

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[ProposalRequest] = []

    def forward(self, request: Any) -> Any:
        self.requests.append(request)
        return super().forward(request)

    @property
    def shown(self) -> dict[tuple[int, int, int, str], str]:
        """Round, slot, wave and predictors -> the examples in the meta-prompt."""
        return {_key(r): prompt_fields(r)["examples"] for r in self.requests if r.style != "induce"}

    @property
    def prompts(self) -> dict[tuple[int, int, int, str], tuple[str, ...]]:
        """Round, slot, wave and predictors -> all texts of the request."""
        return {_key(r): tuple(prompt_fields(r).values()) for r in self.requests}


def run(server: SimulatedServer, **changes: Any) -> tuple[Watched, Any]:
    watched = Watched()
    # Without a lag every request comes after the round before it.
    options = {"valset": None, "lag": 0, "num_rounds": 2, "proposer": watched, **changes}
    return watched, optimize(server, options.pop("student", TwoSteps()), **options).opro_result


def asks_for_feedback(
    gold: Any, pred: Any, trace: Any = None, pred_name: Any = None, pred_trace: Any = None
) -> Any:
    own = "" if pred_trace is None else f"{pred_name} got {sorted(pred_trace[0][1])} of {gold.question}"
    return dspy.Prediction(score=metric(gold, pred), feedback=own)


def test_a_request_shows_what_its_own_predictor_got_and_gave(server: SimulatedServer) -> None:
    shown = run(server)[0].shown
    for (*_, name), text in shown.items():
        assert len(re.findall(rf"(?m)^input of step {name}:\nquestion: ", text)) == 3
        assert len(re.findall(rf"(?m)^output of step {name}:\n{name}: ", text)) == 3
        assert ("input of step note" in text) is (name == "note")
    assert {name for *_, name in shown} == {"note", "answer"}


def test_a_joint_request_shows_all_predictors(server: SimulatedServer) -> None:
    shown = run(server, predictor_strategy="joint")[0].shown
    assert all(
        text.count("output of step note:") == text.count("output of step answer:") == 3
        for text in shown.values()
    )


def test_the_metric_is_asked_about_the_shown_examples_only(server: SimulatedServer) -> None:
    asked: list[tuple[str, str]] = []

    def judge(gold: Any, pred: Any, trace: Any = None, pred_name: Any = None, pred_trace: Any = None) -> Any:
        if pred_name is not None:
            asked.append((gold.question, pred_name))
        return asks_for_feedback(gold, pred, trace, pred_name, pred_trace)

    watched, result = run(server, metric=judge, num_rounds=1)
    shown = {
        (exemplar.input_fields["question"], name)
        for request in watched.requests
        if request.style != "induce"
        for exemplar in request.exemplars
        for name in request.predictors
    }
    assert "induce" in {request.style for request in watched.requests}
    assert set(asked) == shown
    assert len(asked) == len(shown) < result.usage.metric_calls
    for (*_, name), text in watched.shown.items():
        assert len(re.findall(rf"(?m)^feedback on step {name}:\n{name} got ", text)) == 3


@pytest.mark.parametrize("judge", [metric, asks_for_feedback])
def test_a_resumed_run_makes_the_same_requests(server: SimulatedServer, tmp_path: Path, judge: Any) -> None:
    """The first process dies at its third request; the next one knows the calls of the student from the log alone."""

    class Dying(Watched):
        def forward(self, request: Any) -> Any:
            if len(self.requests) == 2:
                raise KeyboardInterrupt
            return super().forward(request)

    whole, expected = run(server, metric=judge)
    place = {"log_dir": tmp_path / "run", "metric": judge}
    with pytest.raises(RuntimeError, match="KeyboardInterrupt"):
        run(server, proposer=Dying(), num_threads=1, **place)
    resumed, result = run(server, **place)
    assert decisions(result) == decisions(expected)
    assert len(resumed.requests) == len(whole.requests) - 2
    assert resumed.prompts.items() < whole.prompts.items()


def test_an_executor_gives_the_same_requests(server: SimulatedServer) -> None:
    whole, expected = run(server, metric=asks_for_feedback)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as executor:
        remote, result = run(server, metric=asks_for_feedback, executor=executor)
    assert decisions(result) == decisions(expected)
    assert remote.shown == whole.shown


def test_the_number_of_threads_makes_no_difference(server: SimulatedServer) -> None:
    shown = [run(server, num_rounds=1, num_threads=threads)[0].shown for threads in (1, 8)]
    assert shown[0] == shown[1]


def test_a_program_with_one_predictor_shows_no_calls(server: SimulatedServer) -> None:
    watched, _ = run(server, student=None)
    assert watched.requests
    assert not any("of step" in text for text in watched.shown.values())
    assert not any(exemplar.calls for request in watched.requests for exemplar in request.exemplars)


def test_gepas_proposer_gets_the_predictors_own_inputs_and_outputs(server: SimulatedServer) -> None:
    seen: dict[str, list[Any]] = {}

    def propose(candidate: Any, reflective_dataset: Any, components_to_update: Any) -> dict[str, str]:
        for name in components_to_update:
            seen.setdefault(name, []).extend(reflective_dataset[name])
        return {name: f"{text} Again." for name, text in candidate.items()}

    run(server, proposer=propose, metric=asks_for_feedback, num_rounds=1)
    assert {tuple(each["Inputs"]) for each in seen["answer"]} == {("question", "note")}
    assert {tuple(each["Generated Outputs"]) for each in seen["note"]} == {("note",)}
    assert all("note got ['question'] of" in each["Feedback"] for each in seen["note"])


def test_calls_are_kept_of_the_incumbent_alone_and_not_in_the_result(server: SimulatedServer) -> None:
    result = run(server, num_rounds=1)[1]
    outcomes = [o for splits in result.data.outcomes.values() for each in splits.values() for o in each]
    assert len(outcomes) >= len(TRAINSET)
    assert all(outcome is None or outcome.calls is None for outcome in outcomes)
