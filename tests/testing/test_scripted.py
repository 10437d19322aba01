"""A scripted LM is a `dspy.LM` in everything but the source of its text."""

from __future__ import annotations

import asyncio
import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dspy
import pytest
from fakes_common import DSPY, ask, echo

from dspy_opro.testing import (
    LMCall,
    ScriptedLM,
)


def test_calls_are_counted_exactly_by_32_threads() -> None:
    lm = ScriptedLM(echo)
    copies = [lm.copy(rollout_id=number, temperature=1.0) for number in range(8)]
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda n: ask(copies[n % 8], str(n // 16)), range(640)))
    assert answers == [str(number // 16) for number in range(640)]
    assert lm.num_calls == len(lm.calls) == 640
    # 8 rollouts, each asked 40 questions twice.
    assert sorted(call.sample for call in lm.calls) == [0] * 320 + [1] * 320


def test_a_copy_shows_its_settings_and_leaves_the_original_alone() -> None:
    lm = ScriptedLM(echo, temperature=0.2)
    before = dict(lm.kwargs)
    copy = lm.copy(rollout_id=7, temperature=0.9)
    for each in (lm, copy, lm.copy(rollout_id=0)):
        ask(each)
    assert [(call.temperature, call.rollout_id) for call in lm.calls] == [(0.2, None), (0.9, 7), (0.2, 0)]
    assert lm.kwargs == before
    assert [call.sample for call in copy.calls] == [0, 0, 0]


async def test_the_rollout_id_of_one_async_call_does_not_reach_another() -> None:
    async def answer(call: LMCall) -> str:
        await asyncio.sleep(0)
        return str(call.rollout_id)

    lm = ScriptedLM(answer)
    texts = await asyncio.gather(*(lm.acall("x", rollout_id=number, temperature=1.0) for number in range(20)))
    assert [text for (text,) in texts] == [str(number) for number in range(20)]


def test_several_completions_of_one_call_are_several_samples() -> None:
    lm = ScriptedLM(lambda call: f"sample {call.sample}")
    assert lm("x", n=3, temperature=1.0) == ["sample 0", "sample 1", "sample 2"]
    assert lm("x", temperature=1.0) == ["sample 3"]


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_what_the_answer_raises_fails_the_call(asynchronous: bool) -> None:
    def answer(call: LMCall) -> str:
        raise RuntimeError("out of order")

    lm = ScriptedLM(answer)
    with pytest.raises(Exception, match="out of order"):
        await lm.acall("x") if asynchronous else lm("x")
    assert lm.num_calls == 1


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_an_answer_that_is_none_is_named(asynchronous: bool) -> None:
    lm = ScriptedLM(lambda call: None)  # type: ignore[arg-type, return-value]
    with pytest.raises(Exception, match=r"answer must return a str or a mapping, but returned None\."):
        await lm.acall("x") if asynchronous else lm("x")


def test_a_coroutine_function_needs_an_asynchronous_call() -> None:
    async def answer(call: LMCall) -> str:
        return "late"

    with pytest.raises(Exception, match="coroutine function"):
        ScriptedLM(answer)("x")
    with pytest.raises(TypeError, match="answer must be a function of an LMCall, but got str"):
        ScriptedLM("not a function")  # type: ignore[arg-type]


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_usage_reaches_dspys_tracker(asynchronous: bool) -> None:
    lm = ScriptedLM(lambda call: "three short words")
    with dspy.track_usage() as tracker:
        for _ in range(2):
            await lm.acall("one two") if asynchronous else lm("one two")
    usage = tracker.get_total_tokens()["scripted/lm"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (4, 6, 10)


def test_programs_with_it_are_copied_and_saved(tmp_path: Path) -> None:
    program = dspy.Predict("question -> answer")
    program.set_lm(ScriptedLM(echo, temperature=0.5))
    copy = program.deepcopy()
    assert copy(question="deep").answer == "deep"
    assert program.get_lm().num_calls == 1  # the copy's calls are the script's
    assert json.loads(json.dumps(program.get_lm().dump_state()))["temperature"] == 0.5
    program.save(tmp_path / "program.json")
    dspy.Predict("question -> answer").load(tmp_path / "program.json")


def test_it_is_pickled_without_its_calls() -> None:
    lm = ScriptedLM(echo)
    ask(lm)
    again = pickle.loads(pickle.dumps(lm))
    assert again.num_calls == 0
    assert ask(again, "pickled") == "pickled"


@pytest.mark.skipif(DSPY < (3, 4), reason="the cache sits below `forward` before 3.4")
def test_dspys_cache_is_off_unless_asked_for() -> None:
    for cache, num_calls in ((False, 2), (True, 1)):
        lm = ScriptedLM(echo, cache=cache)
        assert [ask(lm, "cached?") for _ in range(2)] == ["cached?"] * 2
        assert lm.num_calls == num_calls


def test_calls_can_be_counted_without_being_kept() -> None:
    lm = ScriptedLM(echo, keep_calls=False)
    ask(lm)
    assert (lm.num_calls, lm.calls) == (1, [])
    lm.reset()
    assert lm.num_calls == 0


@pytest.mark.skipif(DSPY < (3, 4), reason="forward() cannot stream")
async def test_it_streams() -> None:
    stream = dspy.streamify(dspy.Predict("question -> answer"))
    with dspy.context(lm=ScriptedLM(echo)):
        chunks = [chunk async for chunk in stream(question="flowing")]
    assert chunks[-1].answer == "flowing"


def test_the_text_beside_an_image_is_read() -> None:
    signature = dspy.Signature("question, image: dspy.Image -> answer")
    lm = ScriptedLM(lambda call: {"answer": call.inputs["question"]})
    with dspy.context(lm=lm):
        answered = dspy.Predict(signature)(
            question="What is it?", image=dspy.Image(url="data:image/png;base64,AAAA")
        )
    assert answered.answer == "What is it?"
