"""What a run spends is counted as the provider counts it, and no budget is exceeded by more than was in flight."""

from __future__ import annotations

import contextvars
import inspect
import math
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import dspy
import pytest

from dspy_opro import Halving, TooManyErrors, Usage
from dspy_opro.config.sizes import usual_first
from dspy_opro.testing import Fault, SimulatedModel, SimulatedServer
from tests.runs import TASK, TRAINSET, VALSET, TwoSteps, metric, optimize, propose, serve, teleprompter

FIRST_BLOCK = usual_first(len(TRAINSET))


def settle(server: SimulatedServer) -> Any:
    """The server's counters once nothing is in flight any more."""
    for _ in range(500):
        stats = server.stats()
        if stats.in_flight == 0:
            return stats
        time.sleep(0.01)
    return stats


# --- the ledger ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_threads", [16, 64])
def test_the_ledger_is_what_the_server_counted(num_threads: int) -> None:
    with serve(seconds=0.004) as server:
        usage = optimize(server, student=TwoSteps(), num_threads=num_threads, patience=1).opro_result.usage
        stats = settle(server)
        scorer, proposer = stats["scorer"], stats["proposer"]
        assert usage.scorer_calls == scorer.completions == scorer.requests
        assert usage.proposer_calls == proposer.completions == proposer.requests
        assert usage.prompt_tokens == scorer.prompt_tokens + proposer.prompt_tokens
        assert usage.completion_tokens == scorer.completion_tokens + proposer.completion_tokens
        assert usage.scorer_calls == 2 * usage.metric_calls
        assert usage.cached_calls == 0
        assert 1 < stats.max_in_flight <= num_threads


def test_cache_hits_are_counted_apart_in_the_midst_of_a_run(server: SimulatedServer) -> None:
    """The trainset has each item twice, and one thread, so every second call is a hit."""
    twice = [example for example in TRAINSET[:6] for _ in (0, 1)]
    usage = optimize(
        server, trainset=twice, valset=None, num_threads=1, task_model=server.lm("scorer", cache=True)
    ).opro_result.usage
    stats = server.stats()
    assert usage.scorer_calls == stats["scorer"].completions
    assert usage.cached_calls == usage.metric_calls - usage.scorer_calls > 6
    assert usage.prompt_tokens == stats["scorer"].prompt_tokens + stats["proposer"].prompt_tokens


def test_malformed_answers_are_paid_for(server: SimulatedServer) -> None:
    """Each of them costs a second call through JSONAdapter."""
    server.inject(Fault("malformed_answer", probability=0.6), model="scorer")
    result = optimize(server, num_rounds=1, failure_score=0.0).opro_result
    stats = server.stats()
    assert stats["scorer"].faults["malformed_answer"] > 3
    assert result.usage.scorer_calls == stats["scorer"].completions > result.usage.metric_calls
    assert result.num_failures > 0
    assert all("AdapterParseError" in failure.error for failure in result.failures)
    first = result.failures[0]
    assert first.split in ("train", "val")
    assert first.candidate in {trial.id for trial in result.trajectory.trials}


def test_retries_are_the_language_models_own(server: SimulatedServer) -> None:
    server.inject(Fault("status", status=429, count=3), Fault("status", status=500, count=3))
    result = optimize(
        server,
        num_rounds=1,
        num_threads=2,
        task_model=server.lm("scorer", num_retries=8),
        prompt_model=server.lm("proposer", num_retries=8),
    ).opro_result
    stats = server.stats()
    assert result.num_failures == 0
    assert stats["scorer"].faults == stats["proposer"].faults == {"status": 6}
    assert result.usage.scorer_calls == stats["scorer"].completions == stats["scorer"].requests - 6
    assert result.usage.proposer_calls == stats["proposer"].completions == stats["proposer"].requests - 6


def test_costs_are_those_of_the_price_list() -> None:
    """litellm's list of prices, as it is installed, knows the name."""
    with serve(**{"gpt-4o-mini": SimulatedModel(TASK.scorer)}) as server:
        usage = optimize(server, num_rounds=1, task_model=server.lm("gpt-4o-mini")).opro_result.usage
        stats = server.stats()["gpt-4o-mini"]
        expected = 0.15e-6 * stats.prompt_tokens + 0.60e-6 * stats.completion_tokens
        assert usage.cost == pytest.approx(expected)


# --- budgets ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_threads", [1, 8])
def test_max_tokens(server: SimulatedServer, num_threads: int) -> None:
    """A call of the scorer has fewer than 150 tokens, one of the proposer fewer than 1,000."""
    program = optimize(
        server, auto=None, num_rounds=None, max_tokens=6000, num_threads=num_threads, confirm=False
    )
    result = program.opro_result
    assert result.stop_reason == "max_tokens"
    assert 6000 <= result.usage.tokens <= 6000 + 1000 * num_threads
    stats = settle(server)
    assert result.usage.tokens == sum(m.prompt_tokens + m.completion_tokens for m in stats.models.values())


def test_max_cost() -> None:
    with serve(**{"gpt-4o-mini": SimulatedModel(TASK.scorer)}) as server:
        result = optimize(
            server,
            auto=None,
            num_rounds=None,
            max_cost=0.001,
            num_threads=2,
            task_model=server.lm("gpt-4o-mini"),
            confirm=False,
            prices={"openai/proposer": (0.0, 0.0)},
        ).opro_result
    assert result.stop_reason == "max_cost"
    assert 0.001 <= result.usage.cost < 0.0011


OWN_PRICES = {"openai/scorer": (2.0, 8.0), "openai/proposer": (10.0, 40.0)}


@pytest.mark.parametrize("is_recorded", [True, False])
def test_own_prices_count_where_no_price_is_known(server: SimulatedServer, is_recorded: bool) -> None:
    with dspy.context(disable_history=not is_recorded):
        usage = optimize(server, num_rounds=1, prices=OWN_PRICES).opro_result.usage
    scorer, proposer = server.stats()["scorer"], server.stats()["proposer"]
    expected = 2.0 * scorer.prompt_tokens + 8.0 * scorer.completion_tokens
    expected += 10.0 * proposer.prompt_tokens + 40.0 * proposer.completion_tokens
    assert usage.cost == pytest.approx(expected / 1e6)


FREE = {"openai/scorer": (0.0, 0.0), "openai/proposer": (0.0, 0.0)}
UNPRICED = r"no price is known for an LM of the program or the metric\. Pass prices, or max_tokens"


@pytest.mark.parametrize("is_recorded", [True, False])
@pytest.mark.parametrize(
    ("prices", "words"),
    [
        (FREE, r"\$0\.0000"),
        (OWN_PRICES, r"\$0\.\d{4}"),
        ({"openai/scorer": (2.0, 8.0)}, r"at least \$0\.\d{4} \((\d+) calls without a known price\)"),
        (None, "cost unknown"),
    ],
)
def test_the_summary_says_how_far_the_cost_is_known(
    server: SimulatedServer, prices: Any, words: str, is_recorded: bool
) -> None:
    with dspy.context(disable_history=not is_recorded):
        result = optimize(server, num_rounds=1, prices=prices).opro_result
    found = re.search(rf", \d[\d,]* tokens, {words}$", result.summary(), re.MULTILINE)
    assert found, result.summary()
    if found.groups():
        assert int(found[1]) == result.usage.unpriced_calls == server.stats()["proposer"].completions


def test_max_cost_needs_the_price_of_the_judge() -> None:
    """The metric calls an LM of its own."""
    judge = dspy.Predict("question -> answer")

    def judged(example: Any, prediction: Any) -> Any:
        judge(question=example.question)
        return metric(example, prediction)

    with serve(judge=SimulatedModel(TASK.scorer)) as server:
        judge.lm = server.lm("judge")
        with pytest.raises(ValueError, match=f"max_cost=1 can't be measured: {UNPRICED}"):
            optimize(server, metric=judged, num_rounds=1, max_cost=1.0, prices=OWN_PRICES)
        assert settle(server)["judge"].requests == 1
        prices = {**FREE, "openai/judge": (1.0, 1.0)}
        with pytest.warns(UserWarning, match="prices has 'openai/judge'"):
            usage = optimize(
                server, metric=judged, num_rounds=1, max_cost=1.0, prices=prices
            ).opro_result.usage
        stats = settle(server)["judge"]
    assert usage.unpriced_calls == 0
    assert 0 < usage.cost < (stats.prompt_tokens + stats.completion_tokens) / 1e6


def test_own_prices_replace_known_ones() -> None:
    with serve(**{"gpt-4o-mini": SimulatedModel(TASK.scorer)}) as server:
        lm, prices = server.lm("gpt-4o-mini"), {"openai/gpt-4o-mini": (0.0, 3.0)}
        usage = optimize(server, num_rounds=1, task_model=lm, prices=prices).opro_result.usage
        assert usage.cost == pytest.approx(3e-6 * server.stats()["gpt-4o-mini"].completion_tokens)


def test_max_cost_works_with_own_prices(server: SimulatedServer) -> None:
    result = optimize(
        server, auto=None, num_rounds=None, max_cost=0.02, num_threads=2, prices=OWN_PRICES, confirm=False
    ).opro_result
    assert result.stop_reason == "max_cost"
    assert 0.02 <= result.usage.cost < 0.05


def test_max_cost_works_with_a_free_scorer(server: SimulatedServer) -> None:
    prices = {"openai/scorer": (0.0, 0.0), "openai/proposer": (10.0, 40.0)}
    result = optimize(
        server, auto=None, num_rounds=None, max_cost=0.02, num_threads=2, prices=prices
    ).opro_result
    assert result.stop_reason == "max_cost"


@pytest.mark.parametrize("lag", [0, 2])
@pytest.mark.parametrize("price", [(0.15, 0.6), (0.0, 0.0)])
def test_a_proposal_that_cannot_be_measured_is_an_error(
    server: SimulatedServer, lag: int, price: tuple[float, float]
) -> None:
    rule = (
        r"max_cost=1 can't be measured: no price is known for the optimizer LM\. Pass prices, or max_tokens"
    )
    with pytest.raises(ValueError, match=rule):
        optimize(server, num_rounds=3, lag=lag, num_threads=2, max_cost=1.0, prices={"openai/scorer": price})
    assert settle(server)["proposer"].requests <= 2
    with serve(
        scorer=SimulatedModel(TASK.scorer), proposer=SimulatedModel(TASK.proposer, sends_usage=False)
    ) as silent:
        with pytest.raises(
            ValueError, match="max_tokens=100000 can't be measured: the provider sends no usage"
        ):
            optimize(silent, num_rounds=3, lag=lag, num_threads=2, max_tokens=100_000)
        assert settle(silent)["proposer"].requests <= 2


class InThreads(dspy.Module):  # type: ignore[misc]
    def __init__(self, keeps_context: bool) -> None:
        super().__init__()
        self.ask = TASK.student()
        self.keeps_context = keeps_context
        self.lm: Any = None

    def forward(self, **inputs: Any) -> Any:
        context = contextvars.copy_context()
        run = context.run if self.keeps_context else contextvars.Context().run
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(run, lambda: self.ask(**inputs)).result()


@pytest.mark.parametrize("keeps_context", [True, False])
def test_a_budget_does_not_run_without_what_it_counts(server: SimulatedServer, keeps_context: bool) -> None:
    student = InThreads(keeps_context)
    student.ask.set_lm(server.lm("scorer"))
    values = {"num_rounds": 1, "max_tokens": 100_000, "student": student}
    if keeps_context:
        assert optimize(server, **values).opro_result.usage.scorer_calls > 1
        return
    with pytest.raises(ValueError, match="no LM call of the program was counted"):
        optimize(server, **values)
    assert server.stats().requests == 1


def test_cached_answers_cost_nothing(server: SimulatedServer) -> None:
    twice = [example for example in TRAINSET[:6] for _ in (0, 1)]
    usage = optimize(server, trainset=twice, valset=None, num_threads=1, prices={"openai/scorer": (1e6, 0.0)},
                     num_rounds=1, task_model=server.lm("scorer", cache=True)).opro_result.usage  # fmt: skip
    assert usage.cached_calls > 6
    assert usage.cost == pytest.approx(server.stats()["scorer"].prompt_tokens)


def test_a_budget_that_cannot_be_measured_is_an_error_after_one_call(server: SimulatedServer) -> None:
    with pytest.raises(
        ValueError, match=r"max_cost=0\.001 can't be measured: no price is known .* max_tokens"
    ):
        optimize(server, num_rounds=1, max_cost=0.001)
    assert server.stats().requests == 1
    with serve(scorer=SimulatedModel(TASK.scorer, sends_usage=False)) as silent:
        with pytest.raises(
            ValueError, match="max_tokens=1000 can't be measured: the provider sends no usage"
        ):
            optimize(silent, auto=None, max_tokens=1000)
        assert silent.stats().requests == 1


ENGINES = ("auto", "litellm") if "engine" in inspect.signature(dspy.LM).parameters else (None,)


@pytest.mark.parametrize("settings", [{}, {"disable_history": True}])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("n", [1, 2])
def test_answers_without_usage_are_paid_and_cache_hits_are_not(
    engine: str | None, n: int, settings: dict[str, Any]
) -> None:
    """The trainset has each item twice, and one thread, so every second call is a hit."""
    twice = [example for example in TRAINSET[:6] for _ in (0, 1)]
    options: dict[str, Any] = {"engine": engine} if engine else {}
    if n > 1:
        options |= {"n": n, "temperature": 0.9}
    with serve(scorer=SimulatedModel(TASK.scorer, sends_usage=False)) as server, dspy.context(**settings):
        lm = server.lm("scorer", cache=True, **options)
        usage = optimize(server, trainset=twice, valset=None, num_threads=1, task_model=lm).opro_result.usage
        stats = server.stats()
    # DSPy 3.4's own engine sends a request for each of n answers.
    assert usage.scorer_calls == stats["scorer"].requests // (n if engine == "auto" else 1)
    if not settings:  # without a history DSPy says nothing of cached answers
        assert usage.cached_calls == usage.metric_calls - usage.scorer_calls > 6


@pytest.mark.parametrize("is_on", [False, True])
def test_the_usage_that_dspy_tracks_for_the_user_is_the_same_within_a_run(
    server: SimulatedServer, is_on: bool
) -> None:
    """With `track_usage` predictions have their usage; a tracker around the run has that of all its paid calls."""
    seen = []

    def metric(example: dspy.Example, prediction: dspy.Prediction, trace: Any = None) -> float:
        seen.append(bool(prediction.get_lm_usage()))
        return TASK.metric(example, prediction)

    with dspy.context(track_usage=is_on):
        optimize(server, metric=metric, num_rounds=1)
        assert set(seen) == {is_on}
        with dspy.track_usage() as tracker:
            usage = optimize(server, num_rounds=1).opro_result.usage
    total = sum(tokens["prompt_tokens"] for tokens in tracker.get_total_tokens().values())
    assert total == usage.prompt_tokens > 0


@pytest.mark.parametrize("budget", [20, 57, 120])
def test_max_metric_calls(server: SimulatedServer, budget: int) -> None:
    result = optimize(server, auto=None, num_rounds=None, max_metric_calls=budget).opro_result
    assert result.stop_reason == "max_metric_calls"
    assert result.usage.metric_calls <= budget
    assert result.usage.scorer_calls == server.stats()["scorer"].completions


def test_max_metric_calls_holds_with_several_predictors(server: SimulatedServer) -> None:
    result = optimize(server, TwoSteps(), auto=None, num_rounds=None, max_metric_calls=150).opro_result
    assert result.usage.metric_calls <= 150


@pytest.mark.parametrize(
    ("values", "reason", "num_rounds"),
    [
        ({"stop_at_score": 0.0}, "stop_at_score", 0),
        ({"stoppers": [lambda state: "enough" if state.round == 1 else None]}, "enough", 1),
        ({"patience": 1, "min_delta": 2.0}, "patience", 1),
        ({"num_rounds": 2}, "num_rounds", 2),
    ],
)
def test_the_result_says_what_ended_the_run(
    server: SimulatedServer, values: dict[str, Any], reason: str, num_rounds: int
) -> None:
    result = optimize(server, **values).opro_result
    assert result.stop_reason == reason
    assert len(result.curve) == num_rounds + 1


def test_a_stopper_sees_what_was_spent(server: SimulatedServer) -> None:
    seen: list[Usage] = []
    result = optimize(server, stoppers=[lambda state: seen.append(state.usage)]).opro_result
    assert [usage.metric_calls for usage in seen] == sorted(usage.metric_calls for usage in seen)
    assert 0 < seen[0].scorer_calls <= seen[-1].scorer_calls <= result.usage.scorer_calls


def test_a_preset_says_beforehand_what_it_spends_at_most(
    server: SimulatedServer, capsys: pytest.CaptureFixture[str]
) -> None:
    program = optimize(server, display_progress=True, pruner=None)
    said = capsys.readouterr().out
    most = len(TRAINSET) + 2 * 4 * len(TRAINSET) + 2 * len(VALSET)  # student, two rounds, confirmation
    assert f"at most 8 candidates in 2 rounds, {most} examples scored and 8 proposals" in said
    assert program.opro_result.usage.metric_calls <= most


# --- time ------------------------------------------------------------------------------------------------


def test_a_connection_that_hangs_is_cut_by_the_time_of_an_example(server: SimulatedServer) -> None:
    server.inject(Fault("hang", contains="item train-3?"), model="scorer")
    started = time.monotonic()
    result = optimize(
        server, num_rounds=1, num_candidates=2, valset=None, example_timeout_seconds=1.0
    ).opro_result
    assert time.monotonic() - started < 30
    assert result.stop_reason == "num_rounds"
    assert {failure.example for failure in result.failures} == {3}
    assert all("example_timeout_seconds=1" in failure.error for failure in result.failures)


@pytest.mark.parametrize("model", ["scorer", "proposer"])
def test_connections_that_hang_are_cut_by_the_time_of_the_run(server: SimulatedServer, model: str) -> None:
    server.inject(Fault("hang"), model=model)
    started = time.monotonic()
    result = optimize(server, timeout_seconds=1.5, num_threads=16).opro_result
    assert time.monotonic() - started < 30
    assert result.stop_reason == "timeout_seconds"
    assert len(result.trajectory) == (0 if model == "scorer" else 1)


async def test_acompile_is_cut_too(server: SimulatedServer) -> None:
    server.inject(Fault("hang"), model="scorer")
    program = await teleprompter(server, timeout_seconds=1.0).acompile(TASK.student(), trainset=TRAINSET)
    assert program.opro_result.stop_reason == "timeout_seconds"
    assert program.signature.instructions == TASK.student().signature.instructions


SCRIPT = """
import sys, time
import dspy
from dspy_opro import OPRO
from dspy_opro.testing import VocabularyTask

task = VocabularyTask(seed=1)
lm, other = (
    dspy.LM(f"openai/{name}", api_base=sys.argv[1], api_key="unused", cache=False) for name in ("scorer", "proposer")
)
other("Hello.")  # LiteLLM imports at its first call; a thread that is left in the middle of it blocks the exit
program = OPRO(task.metric, prompt_model=lm, task_model=lm, timeout_seconds=1.0, display_progress=False).compile(
    task.student(), trainset=task.trainset(8))
print(program.opro_result.stop_reason, flush=True)
print(time.time(), flush=True)
"""


def test_a_script_ends_at_once_whatever_hangs(server: SimulatedServer) -> None:
    """No thread that waits for a hung connection keeps the interpreter."""
    server.inject(Fault("hang"), model="scorer")
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, server.api_base],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    ended = time.time()
    assert run.returncode == 0, run.stderr
    reason, last_line = run.stdout.split()
    assert reason == "timeout_seconds"
    assert ended - float(last_line) < 10


# --- failures --------------------------------------------------------------------------------------------


def test_a_broken_metric_costs_one_call_at_most(server: SimulatedServer) -> None:
    for value in (None, "good", math.nan):
        server.reset()
        with pytest.raises(TypeError, match="metric must return a"):
            optimize(server, metric=lambda e, p, value=value: value)
        assert server.stats().requests == 1


def test_max_errors_ends_the_run_at_once_with_cause_and_program(server: SimulatedServer) -> None:
    server.inject(Fault("malformed_json", probability=0.5), model="scorer")
    lm = server.lm("scorer", num_retries=0)
    with pytest.raises(TooManyErrors, match=r"failed on 5 examples \(max_errors=5\)\. First cause") as caught:
        optimize(server, trainset=TASK.trainset(200), max_errors=5, task_model=lm)
    assert caught.value.__cause__ is not None
    program = caught.value.program  # type: ignore[attr-defined]
    assert program.opro_result.stop_reason == "error"
    assert program.opro_result.usage.metric_calls < 100
    with dspy.context(lm=server.lm("scorer")):
        server.inject()
        assert "code" in program(question=TRAINSET[0].question).answer


def test_two_candidates_that_break_the_format_do_not_end_a_run() -> None:
    """All their examples fail, with one thread one after the other; the other candidates are fine."""

    def scorer(call: Any) -> Any:
        return (
            "no fields here"
            if "variant 0" in call.prompt or "variant 1" in call.prompt
            else TASK.scorer(call)
        )

    def proposer(call: Any) -> Any:
        return propose(call)

    class Variants(dspy.Module):  # type: ignore[misc]
        def forward(self, request: Any) -> Any:
            return dspy.Prediction(instruction=f"variant {request.slot} of round {request.round}")

    with serve(scorer=SimulatedModel(scorer), proposer=SimulatedModel(proposer)) as server:
        for num_threads in (1, 16):
            result = optimize(server, proposer=Variants(), num_threads=num_threads, num_rounds=1).opro_result
            assert result.stop_reason == "num_rounds"
            assert result.num_failures == 2 * FIRST_BLOCK


def test_a_provider_that_goes_down_ends_the_run_after_a_round(server: SimulatedServer) -> None:
    def stop_working(state: Any) -> None:
        server.inject(Fault("malformed_json"), model="scorer")

    lm = server.lm("scorer", num_retries=0)
    with pytest.raises(TooManyErrors, match="on each of the last") as caught:
        optimize(server, auto=None, num_rounds=50, stoppers=[stop_working], task_model=lm, lag=0, valset=None,
                 pruner=Halving(first=4))  # fmt: skip
    result = caught.value.program.opro_result  # type: ignore[attr-defined]
    assert result.baseline.num_failures == 0
    assert result.usage.metric_calls == len(TRAINSET) + 4 * 4
    assert len(result.trajectory) == 5


def test_a_proposer_that_goes_down_ends_the_run_with_its_best_program(server: SimulatedServer) -> None:
    def stop_working(state: Any) -> None:
        if state.round == 2:
            server.inject(Fault("malformed_json"), model="proposer")

    lm = server.lm("proposer", num_retries=0)
    program = optimize(server, auto=None, num_rounds=50, stoppers=[stop_working], prompt_model=lm)
    result = program.opro_result
    assert result.stop_reason == "proposer_failed"
    assert len(result.curve) >= 3
    assert program.signature.instructions == result.instructions["self"]
    assert any("JSON" in problem or "Error" in problem for problem in result.problems)
