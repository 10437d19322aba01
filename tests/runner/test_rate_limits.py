"""Rate limits and outages over HTTP: no failed example, the same run, and an end that can be resumed."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import dspy
import pytest

from dspy_opro import TooManyErrors
from dspy_opro.programs import pace
from dspy_opro.testing import Fault, Latency, RateLimit, SimulatedModel, SimulatedServer
from tests.runs import ASKS_AGAIN_AS_JSON, TASK, decisions, optimize, propose, serve

TRAINSET = TASK.trainset(60)
RUN = {"trainset": TRAINSET, "valset": None, "num_rounds": 3, "confirm": False, "auto": None}


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of the pauses, so that a test takes seconds and not minutes."""
    monkeypatch.setattr(pace, "FIRST_PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(pace, "LONGEST_PAUSE_SECONDS", 1.0)


@pytest.fixture(scope="module")
def expected() -> Iterator[Any]:
    """The run without any trouble."""
    with serve() as server:
        yield optimize(server, **RUN).opro_result


ONE_FORMAT = pytest.mark.skipif(ASKS_AGAIN_AS_JSON, reason="an error gives an answer in another format")


def faulty(server: SimulatedServer, num_retries: int = 0) -> dict[str, Any]:
    """LMs that try again by themselves so many times."""
    return {
        "task_model": server.lm("scorer", num_retries=num_retries),
        "prompt_model": server.lm("proposer", num_retries=num_retries),
    }


@ONE_FORMAT
@pytest.mark.parametrize("num_retries", [0, 3])
def test_a_rate_limit_costs_no_example_and_little_time(expected: Any, num_retries: int) -> None:
    """60 requests a minute, forty times as fast, and 64 threads: fewer than a slow machine can send."""
    limit = RateLimit(60, 1.5)
    scorer = SimulatedModel(TASK.scorer, Latency(0.02, 0.5), rate_limit=limit)
    proposer = SimulatedModel(propose, Latency(0.02, 0.5), rate_limit=limit)
    with serve(scorer=scorer, proposer=proposer) as server:
        started = time.monotonic()
        result = optimize(server, **RUN, num_threads=64, **faulty(server, num_retries)).opro_result
        seconds = time.monotonic() - started
        stats = server.stats()["scorer"]
    assert result.num_failures == 0
    assert decisions(result) == decisions(expected)
    assert result.usage.metric_calls == result.usage.scorer_calls == stats.completions
    assert stats.faults["status"] > 0
    least = (stats.completions - 1) // limit.num_requests * limit.seconds
    assert seconds < least / 0.9 + 1.0 + expected.seconds, (seconds, least, stats)


@pytest.mark.slow
def test_a_long_run_reaches_nine_tenths_of_the_limit() -> None:
    limit = RateLimit(120, 3.0)
    scorer = SimulatedModel(TASK.scorer, Latency(0.05, 0.5), rate_limit=limit)
    trainset = TASK.trainset(601)
    with serve(scorer=scorer) as server:
        started = time.monotonic()
        values = {"trainset": trainset, "valset": None, "auto": None, "confirm": False, "stop_at_score": -1.0}
        result = optimize(server, **values, num_threads=64, **faulty(server)).opro_result
        seconds = time.monotonic() - started
        stats = server.stats()["scorer"]
    assert (result.num_failures, stats.completions) == (0, 601)
    least = 600 // limit.num_requests * limit.seconds
    assert least > 0.9 * seconds
    assert stats.faults["status"] < 300


@ONE_FORMAT
def test_a_limit_of_the_proposer_does_not_slow_the_examples(expected: Any) -> None:
    proposer = SimulatedModel(propose, rate_limit=RateLimit(2, 0.5))
    with serve(proposer=proposer) as server:
        result = optimize(server, **RUN, **faulty(server)).opro_result
    assert decisions(result) == decisions(expected)


@ONE_FORMAT
def test_a_burst_of_failures_while_the_student_is_scored_changes_no_score(expected: Any) -> None:
    with serve() as server:
        server.inject(Fault("status", status=429, count=40), model="scorer")
        result = optimize(server, **RUN, num_threads=8, **faulty(server)).opro_result
        stats = server.stats()["scorer"]
    assert stats.faults["status"] == 40
    assert result.curve[0] == expected.curve[0]
    assert result.baseline.scores == expected.baseline.scores
    assert decisions(result) == decisions(expected)
    assert result.usage.metric_calls == result.usage.scorer_calls == stats.completions


@ONE_FORMAT
@pytest.mark.parametrize("fault", [Fault("status", status=500), Fault("status", status=503), Fault("reset")])
def test_failures_that_pass_are_no_scores(expected: Any, fault: Fault) -> None:
    """A fifth of all calls, drawn for each sample."""
    with serve() as server:
        server.inject(replace(fault, probability=0.2, count=60))
        result = optimize(server, **RUN, **faulty(server)).opro_result
    assert decisions(result) == decisions(expected)


def test_a_metric_that_asks_an_lm_is_tried_again_too(expected: Any) -> None:
    def judge(example: Any, prediction: Any) -> float:
        with dspy.context(lm=judging):
            judging("Is it right?")
        return TASK.metric(example, prediction)

    with serve(judge=SimulatedModel(lambda call: "yes", faults=(Fault(status=429, count=30),))) as server:
        judging = server.lm("judge", num_retries=0)
        result = optimize(server, **RUN, metric=judge).opro_result
    assert decisions(result) == decisions(expected)
    assert (
        result.usage.scorer_calls == 2 * result.usage.metric_calls + 30
    )  # the answers before the 30 failures


@ONE_FORMAT
def test_a_provider_that_is_down_for_a_while_is_waited_for(
    expected: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def break_down() -> None:
        while server.stats()["scorer"].completions < 5:  # of the student's 60
            time.sleep(0.002)
        server.inject(Fault("status", status=503))
        time.sleep(2.7)
        server.inject()

    with serve(seconds=0.005) as server:
        outage = threading.Thread(target=break_down, daemon=True)
        outage.start()
        result = optimize(server, **RUN, **faulty(server), max_outage_seconds=60).opro_result
        outage.join()
        faults = sum(model.faults.get("status", 0) for model in server.stats().models.values())
    assert decisions(result) == decisions(expected)
    assert 0 < faults < 60
    warnings = [record.message for record in caplog.records if "tried again" in record.message]
    assert len([message for message in warnings if "openai/scorer" in message]) == 1
    # A proposal meets the outage too if it is due at that time.
    assert len([message for message in warnings if "openai/proposer" in message]) <= 1
    assert len(warnings) <= 2


def test_a_provider_that_stays_down_ends_the_run_which_can_be_resumed(expected: Any, tmp_path: Path) -> None:
    with serve() as server:

        def stop_working(state: Any) -> None:
            if state.round == 1 and not ended:
                server.inject(Fault("reset"), model="scorer")  # proposals still come, and their trials begin

        ended: list[Any] = []
        values = {**RUN, **faulty(server), "log_dir": tmp_path, "stoppers": [stop_working]}
        started = time.monotonic()
        ended.append(optimize(server, **values, max_outage_seconds=1.0).opro_result)
        assert 0.5 < time.monotonic() - started < 20
        assert ended[0].stop_reason == "max_outage_seconds"
        assert ended[0].num_failures == 0
        assert len(ended[0].curve) >= 2
        server.inject()
        resumed = optimize(server, **values).opro_result
    assert decisions(resumed)["trials"] == decisions(expected)["trials"]
    assert resumed.num_failures == 0
    candidates = [trial.user_attrs["candidate_id"] for trial in resumed.study.trials]
    # What was under way at the outage went on as the same trial.
    assert len(candidates) == len(set(candidates))


def test_an_optimizer_lm_that_is_down_ends_the_run_with_the_student() -> None:
    with serve() as server:
        server.inject(Fault("status", status=503), model="proposer")
        values = {**RUN, **faulty(server), "max_outage_seconds": 1.0}
        result = optimize(server, **values).opro_result
    assert result.stop_reason == "max_outage_seconds"
    assert result.best.id == result.baseline.id


def test_a_provider_that_is_down_from_the_start_is_an_error() -> None:
    with serve() as server:
        lm = server.lm("scorer", num_retries=0)
        server.inject(Fault("status", status=503))
        with pytest.raises(TooManyErrors, match=r"no answer for max_outage_seconds=0\.5\. Last cause: .*503"):
            optimize(server, **RUN, task_model=lm, max_outage_seconds=0.5)


def test_one_example_that_the_provider_never_answers_is_a_failed_one() -> None:
    with serve(seconds=0.01) as server:
        server.inject(Fault("status", status=500, contains="item train-7?"), model="scorer")
        values = {**RUN, "num_rounds": 1, "num_candidates": 2}
        result = optimize(server, **values, **faulty(server), max_outage_seconds=1.0).opro_result
    assert result.stop_reason == "num_rounds"
    assert {failure.example for failure in result.failures} == {7}


@ONE_FORMAT
def test_the_last_example_that_the_provider_never_answers_is_a_failed_one_too() -> None:
    """With one thread its first call is the last of the student's."""
    with serve() as server:
        task = {**RUN, "trainset": TRAINSET[:8], "num_rounds": 1, "num_candidates": 2, "stop_at_score": -1.0}
        row = optimize(server, **task, num_threads=1).opro_result.examples()[-1]
        last = next(value for name, value in row.items() if name.startswith("inputs."))
        server.inject(Fault("status", status=500, contains=last), model="scorer")
        values = {**task, **faulty(server), "num_threads": 1}
        result = optimize(server, **values, max_outage_seconds=1.0).opro_result
    assert result.stop_reason == "stop_at_score"
    assert result.num_failures == 1


@pytest.mark.parametrize(
    ("fault", "num_threads"),
    [
        (Fault("status", status=429), 4),
        (Fault("status", status=429, retry_after_seconds=3600), 1),
        (Fault("status", status=503, retry_after_seconds=3600), 1),
    ],
)
def test_a_single_example_that_can_not_be_scored_in_time_ends_the_run(
    fault: Fault, num_threads: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody knows whether the others would be answered, and a rate limit is no failed example."""
    with serve() as server:
        server.inject(replace(fault, contains="item train-7?"), model="scorer")
        values = {**RUN, "trainset": TRAINSET[:8], "num_threads": num_threads, "timeout_seconds": 20.0}
        result = optimize(server, **values, **faulty(server), max_outage_seconds=1.0).opro_result
    assert (result.stop_reason, result.num_failures) == ("max_outage_seconds", 0)
    assert "no answer for max_outage_seconds=1, so the run ends" in caplog.text


@pytest.mark.parametrize("kind", [TimeoutError, ConnectionError])
def test_an_error_of_the_program_itself_is_tried_three_times_more(kind: type[Exception]) -> None:
    """A metric that runs code may raise these errors on one example, always."""
    calls = []

    def metric(example: Any, prediction: Any, trace: Any = None) -> float:
        if example is TRAINSET[7]:
            calls.append(example)
            raise kind("the code that was written takes too long")
        return TASK.metric(example, prediction)

    with serve() as server:
        values = {**RUN, "trainset": TRAINSET[:20], "num_rounds": 1, "stop_at_score": -1.0, "metric": metric}
        result = optimize(server, **values, **faulty(server)).opro_result
    assert result.stop_reason == "stop_at_score"
    assert [failure.example for failure in result.failures] == [7]
    assert len(calls) == 4


@pytest.mark.parametrize("status", [401, 402])
def test_a_key_that_is_refused_ends_the_run_and_is_no_score(status: int, tmp_path: Path) -> None:
    with serve() as server:

        def stop_working(state: Any) -> None:
            server.inject(Fault("status", status=status), model="scorer")

        values = {**RUN, **faulty(server), "log_dir": tmp_path, "lag": 0}
        with pytest.raises(Exception, match=f"simulated status {status}") as caught:
            optimize(server, **values, stoppers=[stop_working])
        result = caught.value.program.opro_result  # type: ignore[attr-defined]
        assert (result.stop_reason, result.num_failures) == ("error", 0)
        server.inject()
        assert optimize(server, **values).opro_result.num_failures == 0


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_permanent_errors_are_never_tried_again(status: int) -> None:
    with serve() as server:
        server.inject(Fault("status", status=status), model="scorer")
        with pytest.raises(TooManyErrors):
            optimize(server, **RUN, **faulty(server))
        assert server.stats()["scorer"].requests <= (30 if ASKS_AGAIN_AS_JSON else 10)


def test_the_progress_line_says_what_slows_the_run_down(capsys: pytest.CaptureFixture[str]) -> None:
    limit = RateLimit(5, 0.25)  # fewer than a slow machine can send
    scorer = SimulatedModel(TASK.scorer, rate_limit=limit)
    with serve(scorer=scorer) as server:
        values = {**RUN, "num_rounds": 1, "num_candidates": 2}
        optimize(server, **values, **faulty(server), num_threads=16, display_progress=True)
    assert "calls at a time" in capsys.readouterr().out


@ONE_FORMAT
@pytest.mark.parametrize("status", [402, 503])
def test_a_resumed_run_knows_what_examples_cost_that_gave_no_score(status: int, tmp_path: Path) -> None:
    """The metric's LM fails after the program's own call was paid for."""

    def judge(example: Any, prediction: Any) -> float:
        with dspy.context(lm=judging):
            judging("Is it right?")
        return TASK.metric(example, prediction)

    def break_down(state: Any) -> None:
        server.inject(Fault("status", status=status), model="judge")

    with serve(judge=SimulatedModel(lambda call: "yes")) as server:
        judging = server.lm("judge", num_retries=0)
        values = {**RUN, **faulty(server), "trainset": TRAINSET[:8], "metric": judge, "log_dir": tmp_path}
        values |= {"num_threads": 4, "lag": 0, "max_outage_seconds": 0.5, "stoppers": [break_down]}
        try:
            first = optimize(server, **values).opro_result
        except Exception as error:
            first = error.program.opro_result  # type: ignore[attr-defined]
        models = server.stats().models
        num_paid = {name: stats.completions for name, stats in models.items()}
        assert first.stop_reason == ("error" if status == 402 else "max_outage_seconds")
        assert num_paid["scorer"] > num_paid["judge"] == first.usage.metric_calls == 8
        assert first.usage.scorer_calls == num_paid["scorer"] + num_paid["judge"]
        assert first.usage.tokens == sum(s.prompt_tokens + s.completion_tokens for s in models.values())
        server.inject()
        assert optimize(server, **values | {"stoppers": []}).opro_result.earlier_usage == first.usage


@ONE_FORMAT
def test_of_examples_in_flight_the_paid_calls_count_where_a_refused_account_ends_the_run(
    tmp_path: Path,
) -> None:
    is_broken, is_over = threading.Event(), threading.Event()
    in_flight = threading.Barrier(4)
    is_asking = threading.Lock()

    def judge(example: Any, prediction: Any) -> float:
        if is_broken.is_set():
            in_flight.wait(10)
            if not is_asking.acquire(blocking=False):
                assert is_over.wait(30)
        with dspy.context(lm=judging):
            judging("Is it right?")
        return TASK.metric(example, prediction)

    def break_down(state: Any) -> None:
        server.inject(Fault("status", status=402), model="judge")
        is_broken.set()

    with serve(judge=SimulatedModel(lambda call: "yes")) as server:
        judging = server.lm("judge", num_retries=0)
        values = {**RUN, **faulty(server), "trainset": TRAINSET[:8], "metric": judge, "log_dir": tmp_path}
        values |= {"num_threads": 4, "lag": 0, "stoppers": [break_down]}
        try:
            with pytest.raises(Exception, match="402") as raised:
                optimize(server, **values)
        finally:
            is_over.set()
        first = raised.value.program.opro_result  # type: ignore[attr-defined]
        assert first.usage.metric_calls == 8
        assert first.usage.scorer_calls == 8 * 2 + 4  # 4 in flight had their answer, and waited for the judge
        server.inject()
        is_broken.clear()
        assert optimize(server, **values | {"stoppers": []}).opro_result.earlier_usage == first.usage
