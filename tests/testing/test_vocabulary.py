"""The vocabulary task follows its rule, and optimizers run on it unmodified."""

from __future__ import annotations

import re
import statistics
from typing import Any

import dspy
import pytest
from fakes_common import DSPY, raw

from dspy_opro.testing import (
    LMCall,
    ScriptedLM,
    SimulatedServer,
    VocabularyTask,
)
from dspy_opro.testing.vocabulary import WORDS


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_quality_counts_the_good_and_bad_among_the_first_twelve_words(seed: int) -> None:
    task = VocabularyTask(seed)
    good, bad = sorted(task.good), sorted(task.bad)
    neutral = sorted(set(WORDS) - task.good - task.bad)
    assert (len(good), len(bad), len(set(good + bad))) == (10, 12, 22)
    assert task.quality(task.student().signature.instructions) == 0.30
    assert task.quality(" ".join(good)) == pytest.approx(0.90)
    assert task.quality(f"{good[0].upper()}, {good[0]} and ({bad[0]})!") == pytest.approx(0.31)
    assert task.quality(" ".join(bad)) == 0.0
    assert task.quality(" ".join(neutral[:11] + good[:2])) == pytest.approx(0.36)


def test_seeds_give_different_tasks() -> None:
    assert VocabularyTask(0).good != VocabularyTask(1).good
    assert VocabularyTask(1).good == VocabularyTask(1).good


@pytest.mark.parametrize(
    "task",
    [
        VocabularyTask(seed=5),
        VocabularyTask(seed=5, signal=0.3, noise=0.15),
        VocabularyTask(seed=5, noise=0.8),
        VocabularyTask(seed=5, base=0.6, gain=0.005, loss=0.02),
        VocabularyTask(seed=5, noise=0.0),
    ],
)
def test_the_share_of_right_items_is_the_true_quality(task: VocabularyTask) -> None:
    items = [f"test-{number}" for number in range(4000)]
    good = sorted(task.good)
    for words in ([], good[:2], good[:5], good[:8], good, sorted(task.bad)[:2]):
        instruction = f"Mind {', '.join(words)}."
        share = statistics.fmean(task.is_right(instruction, item) for item in items)
        assert share == pytest.approx(task.true_quality(instruction), abs=0.025)


def test_the_true_quality_is_the_area_below_a_line() -> None:
    task = VocabularyTask(seed=5)
    # P(0.7 U + 0.3 V < c) for independent uniform U, V.
    assert task.true_quality("Plain.") == pytest.approx(0.30**2 / (2 * 0.7 * 0.3))
    assert task.true_quality(" ".join(sorted(task.good)[:5])) == pytest.approx((0.60 - 0.15) / 0.7)
    assert task.true_quality(" ".join(task.good)) == pytest.approx(1 - 0.10**2 / (2 * 0.7 * 0.3))
    assert task.true_quality(" ".join(task.bad)) == 0.0
    assert VocabularyTask(seed=5, base=0.9).true_quality(" ".join(task.good)) == 1.0


def test_signal_and_noise_are_what_they_are_called() -> None:
    strong, weak = VocabularyTask(seed=5), VocabularyTask(seed=5, signal=0.5)
    words = " ".join([*sorted(strong.good)[:4], min(strong.bad)])
    assert weak.quality(words) - weak.base == pytest.approx((strong.quality(words) - strong.base) / 2)
    items = [f"test-{number}" for number in range(2000)]
    texts = [f"Mind {', '.join(sorted(strong.good)[k : k + 4])}." for k in range(2)]
    unequal = []
    for noise in (0.15, 0.3, 1.0):
        task = VocabularyTask(seed=5, noise=noise, base=0.5, signal=0.0)
        answers = [[task.is_right(text, item) for item in items] for text in texts]
        unequal.append(statistics.fmean(a != b for a, b in zip(*answers, strict=True)))
    # For c in the middle: a third of noise / (1 - noise); and a half where all is noise.
    assert unequal == pytest.approx([0.15 / 0.85 / 3, 0.3 / 0.7 / 3, 0.5], abs=0.03)


@pytest.mark.parametrize(
    ("name", "value"),
    [("signal", -1.0), ("noise", 1.1), ("base", -0.1), ("gain", -1), ("loss", float("nan"))],
)
def test_arguments_have_their_range(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be "):
        VocabularyTask(**{name: value})  # type: ignore[arg-type]


def test_the_scorer_answers_over_http_as_the_task_decides() -> None:
    task = VocabularyTask(seed=1)
    student = task.student()
    student.signature = student.signature.with_instructions(f"Mind {', '.join(sorted(task.good)[:6])}.")
    instructions = student.signature.instructions
    examples = task.trainset(30) + task.valset(30)
    with SimulatedServer(task.scorer) as server, dspy.context(lm=server.lm("scorer")):
        scores = [task.metric(example, student(**example.inputs())) for example in examples]
        reasoned = dspy.ChainOfThought(student.signature)(**examples[0].inputs())
    items = [f"train-{n}" for n in range(30)] + [f"val-{n}" for n in range(30)]
    assert scores == [float(task.is_right(instructions, item)) for item in items]
    assert 0 < sum(scores) < 60
    assert task.metric(examples[0], reasoned) == scores[0]


def test_the_proposer_keeps_five_words_of_the_prompt_late_ones_more_often() -> None:
    task = VocabularyTask(seed=1)
    shown = list(WORDS[:20])
    prompt = (("system", "You improve instructions."), ("user", " ".join(shown)))
    taken = [set(task.proposer.propose(LMCall("p", prompt, sample=k))) & set(shown) for k in range(500)]
    counts = [sum(word in words for words in taken) for word in shown]
    # Three words are random, so more than five of the twenty can come up.
    assert all(5 <= len(words) <= 8 for words in taken)
    assert sum(counts[10:]) > 2 * sum(counts[:10])
    few = (("user", f"{WORDS[40]} {WORDS[41]} {WORDS[40]}"),)
    assert {WORDS[40], WORDS[41]} <= set(task.proposer.propose(LMCall("p", few)))
    assert len(task.proposer.propose(LMCall("p", (("user", "nothing"),)))) == 3


async def test_the_kth_equal_request_gets_the_kth_proposal_whatever_comes_between() -> None:
    with SimulatedServer(VocabularyTask(seed=1).proposer) as server:
        alone = [body["choices"] for body in await raw(server, *["same"] * 4)]
        server.reset()
        mixed = [body["choices"] for body in await raw(server, "x", "same", "same", "y", "same", "x", "same")]
    assert [mixed[at] for at in (1, 2, 4, 6)] == alone
    assert len({choices[0]["message"]["content"] for choices in alone}) == 4


def copro(task: VocabularyTask, lm: dspy.LM) -> dspy.Module:
    optimizer = dspy.COPRO(prompt_model=lm, metric=task.metric, breadth=4, depth=2)
    return optimizer.compile(task.student(), trainset=task.trainset(10), eval_kwargs={"num_threads": 2})


def miprov2(task: VocabularyTask, lm: dspy.LM) -> dspy.Module:
    optimizer = dspy.MIPROv2(
        metric=task.metric,
        prompt_model=lm,
        auto=None,
        num_candidates=6,
        max_bootstrapped_demos=0,
        max_labeled_demos=0,
    )
    kwargs = {"requires_permission_to_run": False} if DSPY < (3, 1) else {}
    data = {"trainset": task.trainset(20), "valset": task.valset(20)}
    return optimizer.compile(task.student(), **data, num_trials=8, minibatch=False, **kwargs)


def gepa(task: VocabularyTask, lm: dspy.LM) -> dspy.Module:
    def metric(example: Any, prediction: Any, *rest: Any) -> dspy.Prediction:
        return dspy.Prediction(score=task.metric(example, prediction), feedback="Mind the words.")

    optimizer = dspy.GEPA(metric=lambda a, b, c=None, d=None, e=None: metric(a, b), max_metric_calls=150,
                          reflection_lm=lm, num_threads=2)  # fmt: skip
    return optimizer.compile(task.student(), trainset=task.trainset(10), valset=task.valset(10))


@pytest.mark.parametrize("optimize", [copro, miprov2, gepa])
def test_dspys_own_optimizers_take_its_proposals(optimize: Any) -> None:
    task = VocabularyTask(seed=1)
    scorer, proposer = ScriptedLM(task.scorer), ScriptedLM(task.proposer, "scripted/proposer")
    with dspy.context(lm=scorer):
        optimize(task, proposer)
    tried = {call.instructions for call in scorer.calls}
    original = task.student().signature.instructions
    assert len(tried) >= 5
    assert original in tried
    assert all(re.fullmatch(rf"{original} Keep in mind: \w+(, \w+)+\.", text) for text in tried - {original})
