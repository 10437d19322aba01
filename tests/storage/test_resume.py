"""A run whose process is killed goes on in the next one as if nothing had happened."""

from __future__ import annotations

import gc
import json
import logging
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dspy
import pytest
from workers import MOST_IN_FLIGHT, NUM_TRAIN, NUM_VAL, OPTIONS, TASK, Worker, serve

from dspy_opro import OPROTeleprompter
from dspy_opro.config.arguments import make_config
from dspy_opro.config.preflight import check_inputs
from dspy_opro.testing import ScriptedLM, SimulatedServer

NUM_KILLS = int(os.environ.get("DSPY_OPRO_KILLS", "12"))
"""Kills over each of the three storages in the slow test. 67 make it 201 in all."""


@pytest.fixture(scope="module")
def server() -> Iterator[SimulatedServer]:
    with serve() as started:
        yield started


@pytest.fixture(scope="module")
def expected(server: SimulatedServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The run that nobody disturbed, and its calls: result, scorer calls, proposer calls."""
    server.reset()
    found = Worker(server, tmp_path_factory.mktemp("whole")).result()
    stats = server.stats()
    assert len(found["trials"]) > 8
    assert len(found["curve"]) == OPTIONS["num_rounds"] + 1
    return found, stats["scorer"].requests, stats["proposer"].requests


def run_with_kills(
    server: SimulatedServer, directory: Path, draw: random.Random, most: int, **place: Any
) -> tuple[dict[str, Any], int]:
    """Kill the run at random moments until it has ended or was killed often enough: its result, and how often."""
    num_kills = 0
    while True:
        worker = Worker(server, directory, **place)
        if num_kills == most:
            return worker.result(), num_kills
        if worker.is_over(draw.uniform(0.0, 1.6)):
            return worker.result(), num_kills
        worker.kill()
        num_kills += 1


def check(
    server: SimulatedServer, expected: Any, tmp_path: Path, num_kills: int, places: Iterator[dict[str, Any]]
) -> None:
    """Whatever number of runs it takes to kill so often, each of them ends like the undisturbed one."""
    whole, scorer_calls, proposer_calls = expected
    draw, done, twice = random.Random(0), 0, 0
    while done < num_kills:
        server.reset()
        found, kills = run_with_kills(server, tmp_path, draw, num_kills - done, **next(places))
        done += kills
        assert found == whole
        stats = server.stats()
        assert 0 <= stats["scorer"].requests - scorer_calls <= kills * MOST_IN_FLIGHT
        assert 0 <= stats["proposer"].requests - proposer_calls <= kills * OPTIONS["num_threads"]
        twice += stats["scorer"].requests - scorer_calls
    print(f"{done} kills, {twice} examples paid twice, {twice / done:.2f} a kill")


def in_journals(tmp_path: Path) -> Iterator[dict[str, Any]]:
    for number in range(1000):
        yield {"log_dir": str(tmp_path / f"run-{number}")}


def in_studies(url: str) -> Iterator[dict[str, Any]]:
    for number in range(1000):
        yield {"storage": url, "study_name": f"killed-{time.time()}-{number}"}


def test_killed_over_a_journal(server: SimulatedServer, expected: Any, tmp_path: Path) -> None:
    check(server, expected, tmp_path, 3, in_journals(tmp_path))


@pytest.mark.slow
def test_killed_over_sqlite(server: SimulatedServer, expected: Any, tmp_path: Path) -> None:
    check(server, expected, tmp_path, 2, in_studies(f"sqlite:///{tmp_path}/runs.db"))


@pytest.mark.slow
@pytest.mark.timeout(100 + 25 * NUM_KILLS)
@pytest.mark.parametrize("where", ["journal", "sqlite", "postgresql"])
def test_killed_again_and_again(
    server: SimulatedServer, expected: Any, tmp_path: Path, where: str, request: pytest.FixtureRequest
) -> None:
    if where == "journal":
        places = in_journals(tmp_path)
    elif where == "sqlite":
        places = in_studies(f"sqlite:///{tmp_path}/runs.db")
    else:
        places = in_studies(request.getfixturevalue("postgresql"))
    check(server, expected, tmp_path, NUM_KILLS, places)


def test_a_resume_says_what_a_killed_process_may_have_paid(server: SimulatedServer, tmp_path: Path) -> None:
    worker = Worker(server, tmp_path, log_dir=str(tmp_path / "run"))
    while not (tmp_path / "run" / "best.json").exists():
        assert not worker.is_over(0.02)
    worker.kill()
    Worker(server, tmp_path, log_dir=str(tmp_path / "run")).result()
    log = (tmp_path / "run" / "run.log").read_text()
    assert log.count("may have paid for up to 4 examples more than are on record: about ") == 1
    assert " tokens, cost unknown. The budgets leave room for that." in log


def test_the_summary_of_a_resumed_run_says_what_was_paid_now_and_in_all(tmp_path: Path) -> None:
    first = compile_(tmp_path, num_rounds=1).opro_result
    assert "this process" not in first.summary()
    again = compile_(tmp_path, num_rounds=1).opro_result
    assert again.usage == again.earlier_usage == first.usage
    assert "of that, this process: 0 calls paid, 0 tokens, $0.0000" in again.summary()
    log = (tmp_path / "run.log").read_text().splitlines()
    assert sum(f" process {os.getpid()} started, dspy_opro " in line for line in log) == 2
    assert sum("ended: num_rounds" in line for line in log) == 2


def test_no_connection_to_sqlite_stays_open(tmp_path: Path) -> None:
    compile_(tmp_path / "logs", storage=f"sqlite:///{tmp_path}/runs.db", num_rounds=1)
    gc.collect()
    files = [each.readlink().name for each in Path("/proc/self/fd").iterdir() if each.is_symlink()]
    assert "runs.db" not in files


# -- the files in log_dir ----------------------------------------------------------------------------


def compile_(log_dir: Path, **options: Any) -> dspy.Module:
    models = {"prompt_model": ScriptedLM(TASK.proposer), "task_model": ScriptedLM(TASK.scorer)}
    data = {"trainset": TASK.trainset(NUM_TRAIN), "valset": TASK.valset(NUM_VAL)}
    arguments = {"metric": TASK.metric, "log_dir": log_dir, **models, **data, **OPTIONS, **options}
    return OPROTeleprompter(**arguments).compile(TASK.student())


def test_a_run_that_has_ended_is_returned_without_a_call(tmp_path: Path) -> None:
    first = compile_(tmp_path)
    calls: list[str] = []
    lm = ScriptedLM(lambda call: calls.append(call.prompt) or "")
    again = compile_(tmp_path, prompt_model=lm, task_model=lm)
    assert calls == []
    assert again.opro_result.trajectory == first.opro_result.trajectory
    assert again.opro_result.stop_reason == first.opro_result.stop_reason == "num_rounds"
    assert again.opro_result.usage == first.opro_result.usage


def test_more_rounds_go_on(tmp_path: Path) -> None:
    short = compile_(tmp_path, num_rounds=1)
    longer = compile_(tmp_path)
    assert 1 == len(short.opro_result.curve) - 1 < len(longer.opro_result.curve) - 1 == OPTIONS["num_rounds"]
    known = len(short.opro_result.trajectory.trials)
    assert longer.opro_result.trajectory.trials[:known] == short.opro_result.trajectory.trials


def test_a_larger_budget_goes_on(tmp_path: Path) -> None:
    short = compile_(tmp_path, max_metric_calls=NUM_TRAIN + NUM_VAL)
    longer = compile_(tmp_path, max_metric_calls=400)
    assert short.opro_result.stop_reason == "max_metric_calls"
    assert len(longer.opro_result.curve) == OPTIONS["num_rounds"] + 1


def test_the_best_program_is_on_disk_for_the_students_class(tmp_path: Path) -> None:
    program = compile_(tmp_path, confirm=False)
    loaded = TASK.student()
    loaded.load(tmp_path / "best.json")
    assert (
        loaded.signature.instructions
        == program.signature.instructions
        != TASK.student().signature.instructions
    )
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["num_rounds"] == OPTIONS["num_rounds"]
    assert "round 3 decided" in (tmp_path / "run.log").read_text()


def test_best_json_is_replaced_at_once_and_while_the_run_goes_on(
    server: SimulatedServer, tmp_path: Path
) -> None:
    worker = Worker(server, tmp_path, log_dir=str(tmp_path / "run"), num_rounds=40, timeout_seconds=30.0)
    seen = set()
    deadline = time.monotonic() + 25
    while len(seen) < 2 and time.monotonic() < deadline:
        if (tmp_path / "run" / "best.json").exists():
            seen.add(json.loads((tmp_path / "run" / "best.json").read_text())["signature"]["instructions"])
        time.sleep(0.02)
    worker.kill()
    assert len(seen) == 2
    assert seen >= {TASK.student().signature.instructions}


def test_a_mismatch_names_what_differs(tmp_path: Path) -> None:
    compile_(tmp_path)
    with pytest.raises(ValueError, match="seed was '0' and is now '1'") as caught:
        compile_(tmp_path, seed=1)
    assert "trainset" not in str(caught.value)
    with pytest.raises(ValueError, match=r"failure_score was '0\.0' and is now '-1\.0'"):
        compile_(tmp_path, failure_score=-1.0)
    with pytest.raises(ValueError, match="max_instruction_chars was 'None' and is now '200'"):
        compile_(tmp_path, max_instruction_chars=200)
    kept = TASK.student().signature.instructions[:5]
    with pytest.raises(ValueError, match=r"must_keep was '\[\]' and is now"):
        compile_(tmp_path, must_keep=(kept,))
    compile_(tmp_path, must_keep=[])


def relabelled(data: list[Any], which: set[int]) -> list[Any]:
    """The data with another answer for some of the examples."""
    return [
        dspy.Example(question=e.question, answer="another one").with_inputs("question") if n in which else e
        for n, e in enumerate(data)
    ]


@pytest.mark.parametrize(("num_val", "demos"), [(0, 0), (0, 2), (NUM_VAL, 2)])
def test_other_labels_of_examples_that_score_no_candidate_are_other_data(
    num_val: int, demos: int, tmp_path: Path
) -> None:
    data = TASK.trainset(60)
    sizes = {"max_train_examples": 20, "max_labeled_demos": demos, "max_bootstrapped_demos": 0}
    options = {"auto": None, "num_rounds": 1, "valset": TASK.valset(num_val) or None, **sizes}
    config = make_config({"metric": TASK.metric, "task_model": ScriptedLM(TASK.scorer), **options})
    scored = set(check_inputs(config.model_copy(update={"trainset": data}), TASK.student()).orders["train"])
    compile_(tmp_path, trainset=data, **options)
    with pytest.raises(ValueError, match="trainset has as many examples as before, but others"):
        compile_(tmp_path, trainset=relabelled(data, {*range(60)} - scored), **{**options, "num_rounds": 2})
    longer = compile_(tmp_path, trainset=data, **{**options, "num_rounds": 2}).opro_result
    assert len(longer.curve) == 3


def test_an_error_leaves_the_directory_free_and_as_it_was(tmp_path: Path) -> None:
    compile_(tmp_path)
    config = (tmp_path / "config.json").read_text()
    handlers = list(logging.getLogger("dspy_opro").handlers)
    with pytest.raises(ValueError, match="seed was") as caught:  # which keeps the frames, as a notebook does
        compile_(tmp_path, seed=1)
    assert (tmp_path / "config.json").read_text() == config
    assert logging.getLogger("dspy_opro").handlers == handlers
    compile_(tmp_path)
    assert caught.value is not None


def test_a_file_named_stop_ends_the_run_and_the_next_process_goes_on(
    server: SimulatedServer, expected: Any, tmp_path: Path
) -> None:
    log_dir = tmp_path / "run"
    worker = Worker(server, tmp_path, log_dir=str(log_dir))
    while not (log_dir / "best.json").exists():
        assert not worker.is_over(0.02)
    (log_dir / "stop").touch()
    stopped = worker.result()
    assert stopped["stop_reason"] == "stop_file"
    assert not (log_dir / "stop").exists()
    assert 1 <= len(stopped["trials"]) < len(expected[0]["trials"])
    (log_dir / "stop").touch()  # too late
    assert Worker(server, tmp_path, log_dir=str(log_dir)).result() == expected[0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_gracefully_and_the_next_process_goes_on(
    server: SimulatedServer, expected: Any, tmp_path: Path, number: int
) -> None:
    log_dir = tmp_path / "run"
    worker = Worker(server, tmp_path, log_dir=str(log_dir))
    while not (log_dir / "best.json").exists():
        assert not worker.is_over(0.02)
    worker.signal(number)
    assert worker.result()["stop_reason"] == "interrupted"
    server.reset()
    assert Worker(server, tmp_path, log_dir=str(log_dir)).result() == expected[0]
    assert server.stats()["scorer"].requests < expected[1]


def test_a_callback_may_stop_the_study(tmp_path: Path) -> None:
    def stop(study: Any, trial: Any) -> None:
        if trial.number >= 2:
            study.stop()

    program = compile_(tmp_path, callbacks=[stop], num_rounds=50)
    assert program.opro_result.stop_reason == "callback"
    assert len(program.opro_result.curve) < 51


def test_stoppers_see_the_same_spending_when_the_run_is_taken_up_again(tmp_path: Path) -> None:
    states: list[list[Any]] = [[], []]
    for seen in states:

        def note(state: Any, seen: list[Any] = seen) -> None:
            seen.append((state.round, state.usage, state.seconds, state.best_score))

        compile_(tmp_path, stoppers=[note])
    assert states[0] == states[1]
    assert [row[0] for row in states[0]] == list(range(OPTIONS["num_rounds"] + 1))


def test_a_directory_in_use_is_an_error_that_names_the_way_out(
    server: SimulatedServer, tmp_path: Path
) -> None:
    worker = Worker(server, tmp_path, log_dir=str(tmp_path / "run"), num_rounds=50)
    while not (tmp_path / "run" / "lock").exists() or not (tmp_path / "run" / "lock").read_text():
        assert not worker.is_over(0.02)
    with pytest.raises(RuntimeError, match=rf"in use by process {worker.process.pid} .*use another log_dir"):
        compile_(tmp_path / "run")
    worker.kill()
    compile_(tmp_path / "run")  # the lock died with its process
