"""`compile` and `acompile` over HTTP: the same run whatever the threads, from wherever they are called."""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import dspy
import optuna
import pytest

from dspy_opro import OPROTeleprompter
from dspy_opro.testing import Fault, LMCall, ScriptedLM, SimulatedServer
from tests.runs import (
    TASK,
    TRAINSET,
    VALSET,
    TwoSteps,
    decisions,
    is_proposal,
    metric,
    optimize,
    serve,
    teleprompter,
)


def shown(study: optuna.Study) -> list[Any]:
    """All that a study says of its trials, time and spending apart."""
    trials = study.get_trials(deepcopy=False)
    attrs = [{k: v for k, v in t.user_attrs.items() if k != "usage"} for t in trials]
    return [
        (t.number, t.state.name, t.value, a, t.intermediate_values)
        for t, a in zip(trials, attrs, strict=True)
    ]


# --- the same run ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["all", "joint"])
def test_trials_are_the_same_with_1_5_and_64_threads_and_in_acompile(strategy: Any) -> None:
    """Latencies mix up the order in which answers arrive."""
    runs, studies = [], []
    with serve(seconds=0.003) as server:
        for num_threads, is_async in ((1, False), (5, False), (64, False), (5, True)):
            storage = optuna.storages.InMemoryStorage()
            optimizer = teleprompter(
                server,
                num_threads=num_threads,
                storage=storage,
                study_name="run",
                predictor_strategy=strategy,
                num_candidates=3,
                patience=1,
            )
            arguments = (TwoSteps(), TRAINSET[:8], metric)
            if is_async:
                program = asyncio.run(optimizer.acompile(*arguments, valset=VALSET[:4]))
            else:
                program = optimizer.compile(*arguments, valset=VALSET[:4])
            runs.append(decisions(program.opro_result))
            studies.append(shown(optuna.load_study(study_name="run", storage=storage)))
    assert runs[0] == runs[1] == runs[2] == runs[3]
    assert studies[0] == studies[1] == studies[2] == studies[3]
    assert len(runs[0]["trials"]) > 3


def test_another_seed_is_another_run(server: SimulatedServer) -> None:
    texts = [optimize(server, seed=seed, num_rounds=1).opro_result.trajectory.trials for seed in (0, 1, 0)]
    assert texts[0] == texts[2] != texts[1]


def test_seed_zero_in_compile_is_a_seed(server: SimulatedServer) -> None:
    program = teleprompter(server, seed=5, num_rounds=1).compile(TASK.student(), TRAINSET, seed=0)
    assert program.opro_result.config["seed"] == 0
    assert decisions(program.opro_result) == decisions(
        optimize(server, num_rounds=1, valset=None).opro_result
    )


def test_a_rerun_is_answered_from_the_cache(server: SimulatedServer) -> None:
    """Sampling works with DSPy's cache on, and costs nothing the second time."""
    models = {
        "prompt_model": server.lm("proposer", cache=True),
        "task_model": server.lm("scorer", cache=True),
    }
    first = optimize(server, **models).opro_result
    spent = server.stats().requests
    again = optimize(server, **models).opro_result
    assert decisions(again) == decisions(first)
    assert len(first.trajectory) > 5  # equal prompts were answered differently
    assert server.stats().requests == spent
    usage = again.usage
    assert (usage.scorer_calls, usage.proposer_calls, usage.tokens, usage.cost) == (0, 0, 0, 0.0)
    assert (
        usage.cached_calls == first.usage.scorer_calls + first.usage.proposer_calls + first.usage.cached_calls
    )
    assert usage.metric_calls == first.usage.metric_calls


# --- what comes out --------------------------------------------------------------------------------------


def test_a_program_becomes_better_over_http(server: SimulatedServer) -> None:
    program = optimize(
        server,
        trainset=TASK.trainset(20),
        valset=TASK.valset(20),
        num_rounds=5,
        num_candidates=16,  # with 8 about half of all seeds find nothing that is reliably better
        num_threads=16,
        confirm=False,
        seed=1,
    )
    result = program.opro_result
    assert result.best_score > result.curve[0]
    assert TASK.quality(program.signature.instructions) > TASK.quality(TASK.student().signature.instructions)
    assert program.signature.instructions == result.instructions["self"]
    assert result.selected_on == "valset"


@pytest.mark.parametrize("given", ["positional", "constructor", "metric in compile", "devset"])
def test_data_and_metric_are_taken_where_scripts_give_them(server: SimulatedServer, given: str) -> None:
    short = {"num_rounds": 1, "num_candidates": 2}
    if given == "positional":
        program = teleprompter(server, metric=None, **short).compile(TASK.student(), TRAINSET, metric)
    elif given == "constructor":
        data = {"trainset": TRAINSET, "valset": VALSET, "confirm": False}
        program = teleprompter(server, **data, **short).compile(TASK.student())
        assert program.opro_result.selected_on == "valset"
    elif given == "metric in compile":
        program = teleprompter(server, metric=lambda e, p: 0, **short).compile(
            TASK.student(), metric=metric, trainset=TRAINSET
        )
    else:
        program = teleprompter(server, **short).compile(TASK.student(), devset=TRAINSET)
    assert program.opro_result.baseline.num_scored == len(TRAINSET)
    assert max(t.reward for t in program.opro_result.trajectory.trials) > 0


def test_arguments_of_compile_hold_for_that_call_alone(server: SimulatedServer) -> None:
    optimizer = teleprompter(server, num_rounds=1, num_candidates=2)
    once = optimizer.compile(TASK.student(), trainset=TRAINSET, num_candidates=3)
    again = optimizer.compile(TASK.student(), trainset=TRAINSET)
    assert [len(p.opro_result.trajectory) for p in (once, again)] == [4, 3]


def test_callbacks_get_study_and_trial(server: SimulatedServer) -> None:
    seen: list[tuple[optuna.Study, optuna.trial.FrozenTrial]] = []
    # Without a confirmation the valset selects.
    program = optimize(server, callbacks=[lambda study, trial: seen.append((study, trial))], confirm=False)
    trials = program.opro_result.trajectory.trials
    assert [trial.user_attrs["candidate_id"] for _, trial in seen] == [t.id for t in trials]
    assert [trial.number for _, trial in seen] == list(range(len(trials)))
    study = seen[0][0]
    assert [t.user_attrs["candidate_id"] for t in study.trials] == [t.id for t in trials]
    assert [t.value for t in study.trials] == [t.reward for t in trials]
    first = study.trials[0]
    assert first.params == {}
    assert first.user_attrs["instructions"] == {"self": "Name the code of the item."}
    assert first.user_attrs["usage"]["scorer_calls"] == len(TRAINSET) + len(VALSET)


def test_nothing_is_printed_unless_asked_for(
    server: SimulatedServer, capsys: pytest.CaptureFixture[str]
) -> None:
    optimize(server, num_rounds=1)
    assert capsys.readouterr() == ("", "")
    optimize(server, num_rounds=1, display_progress=True)
    assert "OPRO" in capsys.readouterr().out


def test_an_lm_on_every_predictor_is_enough(server: SimulatedServer) -> None:
    student = TwoSteps()
    student.set_lm(server.lm("scorer"))
    program = teleprompter(server, num_rounds=1, task_model=None).compile(student, trainset=TRAINSET[:4])
    assert program.opro_result.num_failures == 0
    assert program.opro_result.config["task_model"] == "openai/scorer"


def test_proposals_that_quote_the_trainset_are_dropped(server: SimulatedServer) -> None:
    """Only what a proposer may have been shown counts: not examples beyond `max_train_examples`."""
    long = [
        f"the story of item train-{n} goes {' '.join(chr(97 + n) * k for k in range(1, 9))}" for n in range(8)
    ]
    trainset = [dspy.Example(question=text, answer="?").with_inputs("question") for text in long]

    class Quoting(dspy.Module):  # type: ignore[misc]
        def forward(self, request: Any) -> Any:
            return dspy.Prediction(
                instruction=f"Code {request.round}.{request.slot}. E.g. {long[request.slot]}."
            )

    values = {"num_candidates": 8, "num_rounds": 1, "proposer": Quoting(), "valset": None}
    all_of_it = optimize(server, trainset=trainset, **values).opro_result
    assert set(all_of_it.problems) == {"quotes the data"}
    assert len(all_of_it.trajectory) == 1
    half = optimize(server, trainset=trainset, max_train_examples=4, **values).opro_result
    assert len(half.trajectory) == 5


def test_the_language_models_are_resolved_when_compile_runs(server: SimulatedServer) -> None:
    optimizer = teleprompter(server, prompt_model=None, task_model=None, num_rounds=1, num_candidates=2)
    both = SimulatedServer({"both": _both}, own_process=False)
    with both, dspy.context(lm=both.lm("both")):
        result = optimizer.compile(TASK.student(), trainset=TRAINSET).opro_result
        assert both.stats()["both"].completions > len(TRAINSET)
    assert server.stats().requests == 0
    assert (result.config["prompt_model"], result.config["task_model"]) == ("openai/both", "openai/both")


def _both(call: Any) -> Any:
    from tests.runs import propose

    return propose(call) if is_proposal(call) else TASK.scorer(call)


# --- from anywhere ---------------------------------------------------------------------------------------


def short(server: SimulatedServer, **changes: Any) -> OPROTeleprompter:
    values = {"num_rounds": 1, "num_candidates": 2, "task_model": None, "num_threads": 4, **changes}
    return teleprompter(server, **values)


def check(program: Any) -> None:
    assert len(program.opro_result.trajectory) == 3
    assert program.opro_result.num_failures == 0


async def test_compile_in_a_running_loop(server: SimulatedServer) -> None:
    """As in a notebook, which waits meanwhile."""
    with dspy.context(lm=server.lm("scorer")):
        check(short(server).compile(TASK.student(), trainset=TRAINSET))


@pytest.mark.parametrize("how", ["configured", "context"])
def test_compile_in_another_thread(server: SimulatedServer, how: str) -> None:
    results: list[Any] = []

    def work() -> None:
        if how == "configured":
            results.append(short(server).compile(TASK.student(), trainset=TRAINSET))
        else:
            with dspy.context(lm=server.lm("scorer")):
                results.append(short(server).compile(TASK.student(), trainset=TRAINSET))

    if how == "configured":
        dspy.configure(lm=server.lm("scorer"))
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    check(results[0])


def test_compile_in_a_thread_of_dspys(server: SimulatedServer) -> None:
    def work(seed: int) -> Any:
        return short(server, seed=seed).compile(TASK.student(), trainset=TRAINSET)

    with dspy.context(lm=server.lm("scorer")):
        programs = dspy.Parallel(num_threads=2, disable_progress_bar=True)(
            [(work, {"seed": n}) for n in (0, 1)]
        )
    for program in programs:
        check(program)


async def test_two_runs_at_once_in_one_loop(server: SimulatedServer) -> None:
    with dspy.context(lm=server.lm("scorer")):
        runs = [short(server, seed=n).acompile(TASK.student(), trainset=TRAINSET) for n in (0, 1)]
        for program in await asyncio.gather(*runs):
            check(program)


async def test_acompile_leaves_the_loop_free(server: SimulatedServer) -> None:
    turns = 0

    async def tick() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0.001)

    ticking = asyncio.ensure_future(tick())
    with dspy.context(lm=server.lm("scorer")):
        check(await short(server).acompile(TASK.student(), trainset=TRAINSET))
    ticking.cancel()
    assert turns > 10


class Program(dspy.Module):  # type: ignore[misc]
    """Says how it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = dspy.Predict(dspy.Signature("question -> answer", "Name the code of the item."))
        self.ways: set[str] = set()

    def __deepcopy__(self, memo: Any) -> Any:
        copied = type(self)()
        copied.inner = self.inner.deepcopy()
        copied.ways = self.ways
        return copied

    deepcopy = __deepcopy__


class Sync(Program):
    def deepcopy(self) -> Any:
        return self.__deepcopy__({})

    def forward(self, question: str) -> Any:
        self.ways.add("forward")
        return self.inner(question=question)


class Async(Program):
    def deepcopy(self) -> Any:
        return self.__deepcopy__({})

    async def aforward(self, question: str) -> Any:
        self.ways.add("aforward")
        return await self.inner.acall(question=question)


class Both(Sync, Async):
    pass


async def async_metric(example: Any, prediction: Any, trace: Any = None) -> float:
    await asyncio.sleep(0)
    return float(metric(example, prediction))


@pytest.mark.parametrize("judge", [metric, async_metric], ids=["metric", "async metric"])
@pytest.mark.parametrize(
    ("kind", "is_async", "way"),
    [
        (Sync, False, "forward"),
        (Sync, True, "forward"),
        (Async, False, "aforward"),
        (Async, True, "aforward"),
        (Both, False, "forward"),
        (Both, True, "aforward"),
    ],
)
def test_programs_and_metrics_are_sync_or_async(
    server: SimulatedServer, judge: Any, kind: Any, is_async: bool, way: str
) -> None:
    student = kind()
    optimizer = short(server, metric=judge)
    with dspy.context(lm=server.lm("scorer")):
        if is_async:
            program = asyncio.run(optimizer.acompile(student, trainset=TRAINSET))
        else:
            program = optimizer.compile(student, trainset=TRAINSET)
    check(program)
    assert student.ways == {way}


def test_a_program_with_more_threads_than_dspys_own_limit(server: SimulatedServer) -> None:
    """`dspy.asyncify` would hold back at `async_max_workers`, which is 8."""
    with serve(seconds=0.05) as slow:
        optimize(slow, num_rounds=1, num_threads=24, trainset=TASK.trainset(24))
        assert slow.stats().max_in_flight > 8


# --- small and cut runs ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"trainset": TRAINSET[:1], "valset": None},
        {"trainset": TRAINSET[:2], "valset": VALSET[:1], "num_exemplars": 0},
        {"k_best": 1, "num_exemplars": 20},
        {"minibatch_size": 1, "lag": 3},
        {"pruner": None, "auto": "paper"},
        {"pruner": optuna.pruners.MedianPruner(n_startup_trials=1)},
        {"init_temperature": 0.0},
    ],
    ids=" ".join,
)
def test_runs_of_every_size(server: SimulatedServer, changes: dict[str, Any]) -> None:
    program = optimize(server, **changes)
    assert program.opro_result.stop_reason in ("num_rounds", "no_new_proposals")
    assert program.opro_result.num_failures == 0


def test_a_failure_is_named_by_its_place_in_the_given_data(server: SimulatedServer) -> None:
    """Candidates are scored on a seeded choice of the trainset, in a seeded order."""
    server.inject(Fault("malformed_answer", contains="item train-7?"))
    try:
        seeds = range(4)
        runs = [
            optimize(server, max_train_examples=6, valset=None, num_rounds=1, seed=seed) for seed in seeds
        ]
    finally:
        server.inject()
    results = [program.opro_result for program in runs]
    assert {failure.example for result in results for failure in result.failures} == {7}
    assert 0 < sum(bool(result.failures) for result in results) < len(results)
    assert all(result.baseline.num_scored == 6 for result in results)


async def test_a_cancelled_acompile_leaves_nothing_behind() -> None:
    before = set(threading.enumerate()), signal.getsignal(signal.SIGINT)
    with serve(seconds=0.2) as slow:
        with dspy.context(lm=slow.lm("scorer")):
            run = asyncio.ensure_future(
                short(slow, num_rounds=50, auto=None).acompile(Sync(), trainset=TRAINSET)
            )
        await asyncio.sleep(0.5)
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
        others = asyncio.all_tasks() - {asyncio.current_task()}
        assert [task for task in others if "litellm" not in str(task)] == []  # it leaves its logging worker
        assert signal.getsignal(signal.SIGINT) == before[1]
        assert await no_threads_but(
            before[0] | {t for t in threading.enumerate() if "dspy_opro" not in t.name}
        )


def num_recorded(storage: Any) -> tuple[int, str]:
    """Examples on record of a run in this storage, and why it ended."""
    storage = optuna.storages.get_storage(storage)
    (name,) = [n for n in optuna.get_all_study_names(storage) if not n.endswith("/log")]
    log = optuna.load_study(study_name=f"{name}/log", storage=storage)
    records = [r for trial in log.get_trials() for r in trial.user_attrs.get("records", [])]
    study = optuna.load_study(study_name=name, storage=storage)
    return sum("outcome" in r for r in records), study.user_attrs["stop_reason"]


async def test_a_cancelled_acompile_keeps_the_results_of_calls_under_way(tmp_path: Path) -> None:
    scored: list[str] = []

    def judge(example: Any, prediction: Any) -> float:
        scored.append(example.question)
        return metric(example, prediction)

    storage = f"sqlite:///{tmp_path}/run.db"
    with serve(seconds=0.3) as slow:
        with dspy.context(lm=slow.lm("scorer")):
            optimizer = short(slow, num_rounds=50, auto=None, metric=judge, storage=storage)
            run = asyncio.ensure_future(optimizer.acompile(Sync(), trainset=TRAINSET))
        while len(scored) < 3:
            await asyncio.sleep(0.01)
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
    assert num_recorded(storage) == (len(scored), "interrupted")


async def test_an_acompile_that_is_cancelled_twice_does_not_wait_for_calls_that_hang() -> None:
    ended, count = threading.Event(), 0

    def answer(call: LMCall) -> Any:
        nonlocal count
        count += 1
        if count > 3:
            ended.wait(30)
        return TASK.scorer(call)

    lm = ScriptedLM(answer, cache=False)
    optimizer = OPROTeleprompter(
        metric=metric, prompt_model=lm, task_model=lm, auto=None, num_rounds=1, num_threads=4,
        display_progress=False,
    )  # fmt: skip
    run = asyncio.ensure_future(optimizer.acompile(Sync(), trainset=TRAINSET))
    while count < 4:
        await asyncio.sleep(0.01)
    run.cancel()
    await asyncio.sleep(0.3)
    assert not run.done()  # calls under way are waited for
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(run, 5)
    ended.set()


@pytest.mark.skipif(sys.version_info < (3, 11), reason="a task does not say that it was cancelled")
def test_calls_that_a_loop_cancels_at_its_end_are_no_failed_examples(tmp_path: Path) -> None:
    storage, scored = f"sqlite:///{tmp_path}/run.db", []

    def judge(example: Any, prediction: Any) -> float:
        scored.append(example.question)
        return metric(example, prediction)

    async def leave(optimizer: OPROTeleprompter) -> None:
        """Leave a run to the end of the loop."""
        run = asyncio.ensure_future(optimizer.acompile(Async(), trainset=TRAINSET))
        while len(scored) < 3:
            await asyncio.sleep(0.01)
        assert not run.done()

    with serve(seconds=0.3) as slow, dspy.context(lm=slow.lm("scorer")):
        asyncio.run(leave(short(slow, num_rounds=50, auto=None, metric=judge, storage=storage)))
    assert num_recorded(storage) == (len(scored), "interrupted")


async def no_threads_but(known: set[threading.Thread]) -> bool:
    """Whether all other threads of ours have ended, which may take until their call is over."""
    for _ in range(300):
        if not [t for t in threading.enumerate() if t not in known and "dspy_opro" in t.name]:
            return True
        await asyncio.sleep(0.02)
    return False


@pytest.mark.parametrize("is_shared", [False, True])
async def test_threads_end_with_the_run(server: SimulatedServer, is_shared: bool, tmp_path: Path) -> None:
    before = set(threading.enumerate())
    for number in range(3):
        storage = f"sqlite:///{tmp_path / str(number)}.db" if is_shared else None
        optimize(server, num_rounds=1, num_threads=16, storage=storage)
    assert await no_threads_but(before)


# --- exceptions that are no `Exception` ------------------------------------------------------------------


class Odd(BaseException):
    pass


class OddWords(BaseException):
    def __str__(self) -> str:
        raise RuntimeError("no words")


class OddSync(dspy.Module):  # type: ignore[misc]
    """Raises something odd on one item."""

    def __init__(self, kind: type[BaseException]) -> None:
        super().__init__()
        self.inner = dspy.Predict(dspy.Signature("question -> answer", "Name the code of the item."))
        self.kind = kind

    def forward(self, question: str) -> Any:
        if "train-7?" in question:
            raise self.kind("why")
        return self.inner(question=question)


class OddAsync(OddSync):
    async def aforward(self, question: str) -> Any:
        await asyncio.sleep(0)
        if "train-7?" in question:
            raise self.kind("why")
        return await self.inner.acall(question=question)


class Unreadable(Exception):
    """As an httpx error without a response."""

    @property
    def response(self) -> Any:
        raise RuntimeError("The response property has not been set.")


ODD = [
    KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError, StopIteration, StopAsyncIteration, Odd,
    OddWords, Unreadable,
]  # fmt: skip


@pytest.mark.parametrize("program", [OddSync, OddAsync])
@pytest.mark.parametrize("kind", ODD, ids=lambda kind: kind.__name__)
async def test_odd_exceptions_are_one_failed_example_in_acompile_as_in_compile(
    server: SimulatedServer, kind: type[BaseException], program: type[OddSync]
) -> None:
    with dspy.context(lm=server.lm("scorer")):
        results = [
            (await short(server).acompile(program(kind), trainset=TRAINSET)).opro_result,
            short(server).compile(program(kind), trainset=TRAINSET).opro_result,
        ]
    for result in results:
        assert result.stop_reason == "num_rounds"
        assert {failure.example for failure in result.failures} == {7}
        assert all(kind.__name__ in failure.error for failure in result.failures)
    assert decisions(results[0])["trials"] == decisions(results[1])["trials"]


@pytest.mark.parametrize("kind", ODD, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("is_async", [False, True])
async def test_odd_exceptions_of_a_metric_are_one_failed_example_too(
    server: SimulatedServer, kind: type[BaseException], is_async: bool
) -> None:
    def judge(example: Any, prediction: Any) -> float:
        if "train-3?" in example.question:
            raise kind("why")
        return metric(example, prediction)

    async def ajudge(example: Any, prediction: Any) -> float:
        return judge(example, prediction)

    with dspy.context(lm=server.lm("scorer")):
        optimizer = short(server, metric=ajudge if is_async else judge)
        result = (await optimizer.acompile(Sync(), trainset=TRAINSET)).opro_result
    assert {failure.example for failure in result.failures} == {3}
    assert all(failure.error.startswith("metric raised ") for failure in result.failures)
