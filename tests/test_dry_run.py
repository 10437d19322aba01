"""An estimate before the run, for the price of a handful of examples."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dspy
import pytest

from dspy_opro import OPROTeleprompter, TooManyErrors
from dspy_opro.config.estimate import NUM_EXAMPLES, Estimate
from dspy_opro.search.pruners import Halving, Race
from dspy_opro.testing import Fault, LMCall, ScriptedLM, SimulatedModel, SimulatedServer
from dspy_opro.testing.models import uniform
from tests.conformance.world import VERSION
from tests.runs import TASK, TRAINSET, VALSET, TwoSteps, is_proposal, optimize, serve, teleprompter

PRICES = {"openai/scorer": (2.0, 8.0), "openai/proposer": (10.0, 40.0)}
MANY = {"trainset": TASK.trainset(120), "valset": None}


def estimated(server: SimulatedServer, student: Any = None, **changes: Any) -> Estimate:
    program = optimize(server, student, dry_run=True, **changes)
    found: Estimate = program.opro_estimate
    return found


def test_a_dry_run_spends_the_first_examples_alone(
    server: SimulatedServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student = TASK.student()
    program = optimize(server, student, dry_run=True, prices=PRICES, log_dir=tmp_path / "run")
    stats, estimate = server.stats(), program.opro_estimate
    assert stats["scorer"].completions == stats.requests == NUM_EXAMPLES == 5
    spent = estimate.spent
    assert (spent.examples, spent.calls) == (5, 5)
    assert spent.tokens == stats["scorer"].prompt_tokens + stats["scorer"].completion_tokens
    assert spent.dollars == pytest.approx(
        (2.0 * stats["scorer"].prompt_tokens + 8.0 * stats["scorer"].completion_tokens) / 1e6
    )
    assert capsys.readouterr().out == f"{estimate}\n"
    assert "expected: " in str(estimate) and "at most: " in str(estimate)
    assert list(tmp_path.iterdir()) == []
    assert program is not student
    assert program.signature.instructions == student.signature.instructions
    assert copy.deepcopy(program).opro_estimate == estimate


@pytest.mark.parametrize(
    "changes",
    [
        {"num_rounds": 4},
        {"num_rounds": None, "auto": None, "max_metric_calls": 400},
        {"num_rounds": 3, "student": TwoSteps()},
        {"num_rounds": 3, "trainset": TRAINSET, "valset": VALSET},
        pytest.param({"num_rounds": 3, "pruner": None, "num_candidates": 8}, marks=pytest.mark.slow),
    ],
    ids=lambda changes: " ".join(changes),
)
def test_a_run_spends_about_what_was_expected_and_never_more_than_the_most(
    server: SimulatedServer, changes: dict[str, Any]
) -> None:
    # With some seeds no simulated candidate is better, so the estimate has no confirmation.
    changes = {**MANY, "prices": PRICES, "seed": 2, **changes}
    estimate = estimated(server, **changes)
    usage = optimize(server, **changes).opro_result.usage
    expected, most = estimate.expected, estimate.most
    assert expected is not None and most is not None and most.dollars is not None
    assert usage.metric_calls <= most.examples
    assert usage.scorer_calls + usage.proposer_calls <= most.calls
    assert expected.examples == pytest.approx(usage.metric_calls, rel=0.5)
    assert expected.calls == pytest.approx(usage.scorer_calls + usage.proposer_calls, rel=0.5)


def test_the_limits_bound_the_estimate(server: SimulatedServer) -> None:
    estimate = estimated(server, **MANY, prices=PRICES, num_rounds=8, max_cost=0.2)
    assert estimate.most is not None and estimate.most.dollars == 0.2
    assert estimate.expected is not None and estimate.expected.dollars == pytest.approx(0.2, rel=0.2)
    by_tokens = estimated(server, auto=None, num_rounds=None, max_tokens=30_000)
    assert by_tokens.most is None
    assert by_tokens.expected is not None and by_tokens.expected.tokens == pytest.approx(30_000, rel=0.2)


def test_demo_sets_are_estimated_too(server: SimulatedServer) -> None:
    with_demos = estimated(server, **MANY, num_rounds=1, max_bootstrapped_demos=2, max_labeled_demos=2)
    without = estimated(server, **MANY, num_rounds=1, max_bootstrapped_demos=0)
    assert with_demos.expected is not None and without.expected is not None
    assert 0 < with_demos.expected.calls < 2 * without.expected.calls


def test_candidates_with_demos_need_more_tokens(server: SimulatedServer) -> None:
    def per_example(number: int) -> tuple[float, float]:
        demos = {"max_bootstrapped_demos": 0, "max_labeled_demos": number}
        estimate = estimated(server, **MANY, num_rounds=8, **demos)
        expected, most = estimate.expected, estimate.most
        assert expected is not None and most is not None
        return expected.tokens / expected.calls, most.tokens / most.calls

    without, few, many = map(per_example, (0, 4, 40))
    assert without[0] < 1.1 * few[0] < many[0]
    assert without[1] < 1.1 * few[1] < many[1]


@pytest.mark.parametrize("has_demos", [False, True])
def test_the_length_of_prompts_is_about_what_was_expected(has_demos: bool) -> None:
    """Either the instructions are long, or candidates with demos win."""
    rule = " Mind the rules of the house." * (1 if has_demos else 100)

    def answer(call: LMCall) -> Any:
        if is_proposal(call):
            return {"instruction": f"{call.rollout_id}{rule}"}
        good = 0.9 if call.prompt.count("reasoning ##") > 5 else 0.3
        return {"reasoning": "so " * 30, "answer": "a" if uniform(call.prompt) < good else "b"}

    examples = [
        dspy.Example(question=f"{n}{' word' * 50}", answer="a").with_inputs("question") for n in range(80)
    ]
    teleprompter = OPROTeleprompter(
        metric=lambda example, prediction, trace=None: prediction.answer == example.answer,
        prompt_model=ScriptedLM(answer),
        task_model=ScriptedLM(answer),
        num_rounds=6,
        max_bootstrapped_demos=4 * has_demos,
        display_progress=False,
    )
    student = dspy.ChainOfThought(dspy.Signature("question -> answer", f"Answer.{rule}"))
    expected = teleprompter.compile(student, trainset=examples, dry_run=True).opro_estimate.expected
    result = teleprompter.compile(student, trainset=examples).opro_result
    calls = result.usage.scorer_calls + result.usage.proposer_calls
    assert expected.tokens / expected.calls == pytest.approx(result.usage.tokens / calls, rel=0.25)


@pytest.mark.parametrize("bootstrapped", [0, 2])
def test_demo_sets_are_no_proposals_of_the_optimizer_lm(server: SimulatedServer, bootstrapped: int) -> None:
    demos = {"max_bootstrapped_demos": bootstrapped, "max_labeled_demos": 2, "num_candidates": 8}
    expected = estimated(server, **MANY, num_rounds=1, **demos).expected
    assert expected is not None
    assert expected.calls - expected.examples == 4  # every example is a call, and four slots have demos


def test_own_stoppers_see_no_simulated_scores(server: SimulatedServer) -> None:
    seen: list[Any] = []
    estimate = estimated(server, num_rounds=2, stop_at_score=0.0, stoppers=[lambda state: seen.append(state)])
    assert seen == []
    assert estimate.expected is not None and estimate.expected.examples > len(TRAINSET) + len(VALSET)


def test_a_run_without_an_end_has_no_estimate(server: SimulatedServer) -> None:
    estimate = estimated(server, auto=None, num_rounds=None, stop_at_score=1.0)
    assert estimate.expected is None is estimate.most
    assert "unknown" in str(estimate)


def test_what_is_unknown_is_said(server: SimulatedServer) -> None:
    estimate = estimated(server)
    assert estimate.spent.dollars is None
    assert "No price is known" in str(estimate)
    prices = {"openai/scorer": (2.0, 8.0)}
    assert "price of openai/proposer" in str(estimated(server, prices=prices))
    free = {"openai/proposer": (0.0, 0.0)}
    assert "The dollars leave out an LM of the program or the metric" in str(estimated(server, prices=free))
    task_model = server.lm("scorer", cache=True)
    optimize(server, num_rounds=1, task_model=task_model)
    assert "cache" in str(estimated(server, task_model=task_model))


def test_the_price_of_the_programs_own_lm_is_that_of_the_proposals() -> None:
    with serve(**{"gpt-4o-mini": SimulatedModel(TASK.scorer)}) as server:
        lm = server.lm("gpt-4o-mini")
        estimate = estimated(server, task_model=lm, prompt_model=server.lm("gpt-4o-mini"))
    assert "in prices" not in str(estimate)
    assert estimate.spent.dollars is not None and estimate.spent.dollars > 0


def test_a_broken_program_is_an_error_as_in_a_run(server: SimulatedServer) -> None:
    server.inject(Fault("status", status=401))
    with pytest.raises(TooManyErrors, match="student fails"):
        estimated(server, task_model=server.lm("scorer", num_retries=0))
    # One example. Up to DSPy 3.2 ChatAdapter repeats a failed call through JSONAdapter.
    assert server.stats().requests <= (1 if VERSION >= (3, 3) else 3)


def test_failed_examples_are_replaced_by_others(server: SimulatedServer) -> None:
    seen: list[str] = []

    class Shaky(dspy.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.predict = TASK.student()

        def forward(self, question: str) -> Any:
            seen.append(question)
            if len(seen) in (1, 2, 4):
                raise RuntimeError("not this one")
            return self.predict(question=question)

    estimate = estimated(server, student=Shaky())
    assert len(seen) == 8
    assert (estimate.spent.examples, estimate.spent.calls) == (8, 5)


def test_a_dry_run_shows_no_simulated_scores_to_a_pruner_of_the_user(server: SimulatedServer) -> None:
    class Never(Halving):
        def drop(self, race: Race) -> Mapping[str, str]:
            raise AssertionError

    estimate = estimated(server, pruner=Never(first=4))
    assert "with the default pruner in place of yours" in str(estimate)


# -- the estimate of a run ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shown", ["display_progress", "verbose"])
def test_a_run_says_once_what_it_will_spend_and_pays_nothing_for_it(
    server: SimulatedServer, capsys: pytest.CaptureFixture[str], shown: str
) -> None:
    changes = {**MANY, "prices": PRICES, "num_threads": 1}
    estimate = estimated(server, **changes)
    quiet = optimize(server, **changes).opro_result
    capsys.readouterr()
    before = server.stats().requests
    program = optimize(server, **changes, **{shown: True})
    printed = capsys.readouterr().out
    assert printed.count("Estimate, ") == printed.count("expected: ") == printed.count("at most: ") == 1
    assert f"Estimate, from {estimate.spent}" in printed
    assert f"  expected: {estimate.expected}" in printed
    assert f"  at most:  {estimate.most}" in printed
    start = printed.partition("Estimate, ")[0]
    assert "at most 8 candidates in 2 rounds" in start
    assert "round 1" not in start
    result = program.opro_result
    assert server.stats().requests - before == result.usage.scorer_calls + result.usage.proposer_calls
    assert result.usage == quiet.usage
    assert result.trajectory == quiet.trajectory
    assert not hasattr(program, "opro_estimate")


def test_failed_examples_are_no_base_of_an_estimate(
    server: SimulatedServer, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(example: Any, prediction: Any) -> bool:
        if number := next(calls) in (1, 2):
            raise RuntimeError(f"failed on {number}")
        return True

    calls = itertools.count()
    optimize(server, **MANY, metric=fails, num_threads=1, verbose=True)
    assert "Estimate, from 5 examples, 5 LM calls" in capsys.readouterr().out


def test_fewer_examples_than_usual_are_enough(
    server: SimulatedServer, capsys: pytest.CaptureFixture[str]
) -> None:
    optimize(server, trainset=TASK.trainset(3), valset=None, num_rounds=1, display_progress=True)
    assert "Estimate, from 3 examples" in capsys.readouterr().out


def test_a_resumed_run_and_one_without_an_end_say_nothing(
    server: SimulatedServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    optimize(server, num_rounds=1, log_dir=tmp_path / "run", display_progress=True)
    assert "Estimate, " in capsys.readouterr().out
    optimize(server, num_rounds=2, log_dir=tmp_path / "run", display_progress=True)
    assert "Estimate, " not in capsys.readouterr().out
    optimize(server, auto=None, num_rounds=None, stoppers=[lambda state: "enough"], display_progress=True)
    assert "Estimate, " not in capsys.readouterr().out


def test_a_pruner_of_the_user_sees_no_simulated_scores(
    server: SimulatedServer, capsys: pytest.CaptureFixture[str]
) -> None:
    class Counting(Halving):
        num_calls = 0

        def drop(self, race: Race) -> Mapping[str, str]:
            Counting.num_calls += 1
            return super().drop(race)

    counts = []
    for is_shown in (False, True):
        Counting.num_calls = 0
        optimize(server, **MANY, pruner=Counting(first=4), num_threads=1, display_progress=is_shown)
        counts.append(Counting.num_calls)
    assert counts[0] == counts[1] > 0
    assert "Estimate, " not in capsys.readouterr().out


class Async(dspy.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.predict = TASK.student()

    async def aforward(self, question: str) -> Any:
        return await self.predict.acall(question=question)


async def test_acompile_estimates_too(server: SimulatedServer) -> None:
    program = await teleprompter(server, dry_run=True).acompile(Async(), trainset=TRAINSET)
    assert program.opro_estimate.spent.examples == 5
    assert server.stats().requests == 5


async def test_acompile_says_what_it_will_spend(
    server: SimulatedServer, capsys: pytest.CaptureFixture[str]
) -> None:
    await teleprompter(server, display_progress=True).acompile(Async(), trainset=TRAINSET)
    assert capsys.readouterr().out.count("Estimate, from 5 examples") == 1
