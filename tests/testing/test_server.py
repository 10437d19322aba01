"""The simulated server speaks HTTP to real LMs, and its counters are exact."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dspy
import pytest
from fakes_common import INPUTS, PROGRAM, VALUES, adapters, echo, http_body, http_request, raw, settled

from dspy_opro.testing import (
    Fault,
    Latency,
    LMCall,
    SimulatedModel,
    SimulatedServer,
    VocabularyTask,
)


@adapters
async def test_a_real_lm_talks_to_it_under_every_adapter(adapter: Any) -> None:
    with SimulatedServer(lambda call: VALUES, own_process=False) as server:
        with dspy.context(lm=server.lm("scorer", temperature=0.3), adapter=adapter):
            answers = [PROGRAM(**INPUTS), await PROGRAM.acall(**INPUTS)]
        assert [answer.toDict() for answer in answers] == [VALUES, VALUES]
        assert server.stats()["scorer"].requests == 2


def test_the_answer_sees_the_request() -> None:
    seen: list[LMCall] = []

    def answer(call: LMCall) -> str:
        seen.append(call)
        return f"sample {call.sample}"

    with SimulatedServer(answer, own_process=False) as server:
        lm = server.lm("m", temperature=0.7, top_p=0.8, rollout_id=3)
        assert [lm("x")[0], lm("x")[0]] == ["sample 0", "sample 1"]
    first = seen[0]
    assert (first.model, first.messages, first.temperature) == ("m", (("user", "x"),), 0.7)
    assert first.request["top_p"] == 0.8
    assert first.rollout_id is None


def test_counters_are_exact_under_32_threads_and_equal_dspys_usage() -> None:
    task = VocabularyTask(seed=2)
    models = {"scorer": task.scorer, "slow": SimulatedModel(task.scorer, Latency(0.02, 0.5))}
    with SimulatedServer(models) as server:
        lms = [server.lm("scorer"), server.lm("slow")]
        student, trainset = task.student(), task.trainset(400)

        def score(number: int) -> dict[str, Any]:
            example = trainset[number]
            with dspy.context(lm=lms[number % 2]), dspy.track_usage() as tracker:
                student(**example.inputs())
            return dict(tracker.get_total_tokens())

        with ThreadPoolExecutor(32) as pool:
            usages = list(pool.map(score, range(400)))
        stats = server.stats()
    for name in ("scorer", "slow"):
        counted = stats[name]
        told = [usage[f"openai/{name}"] for usage in usages if f"openai/{name}" in usage]
        assert counted.requests == counted.completions == len(told) == 200
        assert counted.prompt_tokens == sum(each["prompt_tokens"] for each in told)
        assert counted.completion_tokens == sum(each["completion_tokens"] for each in told)
        assert (counted.in_flight, counted.abandoned, counted.faults) == (0, 0, {})
    assert 1 < stats.max_in_flight <= 32
    assert stats.requests == 400


async def test_256_connections_are_served_at_once() -> None:
    model = SimulatedModel(VocabularyTask().proposer, Latency(0.5))
    with SimulatedServer(model) as server:
        start = time.perf_counter()
        await asyncio.gather(*(raw(server, "a", "b") for _ in range(256)))
        wall, stats = time.perf_counter() - start, server.stats()
    assert stats["m"].completions == 512
    assert stats.max_in_flight == 256
    assert stats.busy_seconds == pytest.approx(512 * 0.5, rel=0.2)
    assert wall < 4  # twice half a second of service, and the rest for 512 requests


async def test_it_serves_more_than_400_requests_a_second() -> None:
    with SimulatedServer(VocabularyTask().proposer) as server:
        start = time.perf_counter()
        await asyncio.gather(*(raw(server, *map(str, range(100))) for _ in range(16)))
        assert 1600 / (time.perf_counter() - start) > 400


async def test_requests_may_arrive_in_pieces_or_pipelined(server: SimulatedServer) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    both = http_request("first") + http_request("second")
    for piece in (both[:20], both[20:90], both[90:]):
        writer.write(piece)
        await writer.drain()
        await asyncio.sleep(0.01)
    bodies = [await http_body(reader), await http_body(reader)]
    writer.close()
    assert [body["usage"]["prompt_tokens"] for body in bodies] == [1, 1]
    assert server.stats()["m"].completions == 2


async def test_one_request_may_ask_for_several_completions() -> None:
    with SimulatedServer(lambda call: f"sample {call.sample}", own_process=False) as server:
        (body,) = await raw(server, "x", n=3)
    assert [choice["message"]["content"] for choice in body["choices"]] == [
        "sample 0",
        "sample 1",
        "sample 2",
    ]
    assert body["usage"] == {"prompt_tokens": 1, "completion_tokens": 6, "total_tokens": 7}


def test_an_answer_takes_its_latency_and_the_server_is_busy_for_it() -> None:
    latency = Latency(0.05, 0.4)
    with SimulatedServer(SimulatedModel(echo, latency), seed=3, own_process=False) as server:
        lm = server.lm("m")
        start = time.perf_counter()
        for number in range(10):
            lm(str(number))
        wall, stats = time.perf_counter() - start, server.stats()
    due = sum(latency.seconds(LMCall("m", (("user", str(number)),)), seed=3) for number in range(10))
    assert due <= stats["m"].busy_seconds <= wall
    assert stats["m"].busy_seconds == pytest.approx(due, rel=0.3)


def test_an_answer_that_raises_is_an_http_error_with_its_message() -> None:
    def answer(call: LMCall) -> str:
        raise KeyError("no such item")

    with SimulatedServer(answer, own_process=False) as server:
        with pytest.raises(Exception, match="no such item"):
            server.lm("m", num_retries=0)("x")
        stats = server.stats()["m"]
    assert (stats.faults, stats.completions) == ({"error": 1}, 0)
    assert "KeyError: 'no such item'" in stats.last_error


async def test_only_the_named_models_exist() -> None:
    with SimulatedServer({"a": echo, "b": echo}, own_process=False) as server:
        (body,) = await raw(server, "x", model="c")
        assert "'c' does not exist" in body["error"]["message"]
        with urllib.request.urlopen(f"{server.api_base}/models") as response:
            assert [model["id"] for model in json.load(response)["data"]] == ["a", "b"]
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{server.url}/nothing")


async def test_reset_starts_counters_and_samples_anew() -> None:
    with SimulatedServer(lambda call: str(call.sample), own_process=False) as server:
        before = await raw(server, "x", "x")
        server.reset()
        assert server.stats().requests == 0
        after = await raw(server, "x", "x")
    assert before == after
    assert before[0] != before[1]


async def test_a_client_that_goes_away_is_counted(server: SimulatedServer) -> None:
    server.inject(Fault("hang"))
    _, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(http_request("x"))
    while server.stats().in_flight == 0:
        await asyncio.sleep(0.01)
    assert server.stats()["m"].busy_seconds > 0  # what is in service counts already
    writer.close()
    await writer.wait_closed()
    stats = settled(server)["m"]
    assert (stats.abandoned, stats.in_flight, stats.max_in_flight) == (1, 0, 1)


@pytest.mark.parametrize("own_process", [False, True])
def test_after_the_block_nothing_listens_and_it_can_start_again(own_process: bool) -> None:
    server = SimulatedServer(VocabularyTask().scorer, own_process=own_process)
    for _ in range(2):
        with server:
            port = server.port
            with pytest.raises(RuntimeError, match="running already"):
                server.start()
            server.lm("m", num_retries=0)("x")
            assert server.stats().requests == 1
        assert server.port == 0
        assert not listens(port)


def test_the_process_ends_with_its_parent() -> None:
    script = (
        "import os; from dspy_opro.testing import SimulatedServer, VocabularyTask\n"
        "print(SimulatedServer(VocabularyTask().scorer).start().port, flush=True); os._exit(1)"
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": root},
        timeout=60,
        check=False,
    )
    port, deadline = int(done.stdout), time.monotonic() + 10
    while listens(port) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not listens(port)


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def test_its_own_process_needs_models_that_can_be_sent_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"models must be picklable .* own_process=False"):
        SimulatedServer(lambda call: "x").start()
    main = type("Answer", (), {"__module__": "__main__", "__call__": lambda self, call: "x"})
    monkeypatch.setattr(sys.modules["__main__"], "Answer", main, raising=False)
    with pytest.raises(ValueError, match="must not be defined in __main__"):
        SimulatedServer(main()).start()


def test_faults_of_a_model_that_is_not_served_are_refused() -> None:
    with SimulatedServer({"scorer": echo, "proposer": echo}, own_process=False) as server:
        with pytest.raises(ValueError, match="model must be one of 'proposer', 'scorer', but got 'typo'"):
            server.inject(Fault("reset"), model="typo")
        server.inject(Fault("reset"), model="scorer")
    with SimulatedServer(echo, own_process=False) as server:  # it answers under every name
        server.inject(Fault("reset"), model="any")
