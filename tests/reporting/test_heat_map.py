from __future__ import annotations

import re
import zlib
from dataclasses import replace
from itertools import count, pairwise
from pathlib import Path

import dspy
import pytest

from dspy_opro import OPROTeleprompter
from dspy_opro.reporting.examples import Examples, ExampleText
from dspy_opro.reporting.heat_map import MOST_EXAMPLES, compared, heat_maps, rectangles
from dspy_opro.reporting.recorded import find_runs
from dspy_opro.reporting.report import page
from dspy_opro.reporting.result import OPROResult
from dspy_opro.reporting.run_directory import RESULT
from dspy_opro.search.confidence import Gain, Interval
from dspy_opro.search.trajectory import Outcome, Trajectory
from dspy_opro.testing import LMCall, ScriptedLM
from tests.results import empty, result, trial

STUDENT, BEST = [0, 1, 0, 0, 1, 0], [1, 0, 0, 0, 1, 0]


def text(index: int) -> ExampleText:
    return ExampleText(index, {"question": f"q{index}"}, {"answer": f"a{index}"})


def compiled(texts: int = 6) -> OPROResult:
    """A student, a dropped one that alone solves the fourth example, and the best of equal score."""
    student = trial("Answer.", STUDENT)
    dropped = trial("Guess.", [0, 0, 0, 1], 1, "pruned", student.candidate)
    best = replace(trial("Think.", BEST, 1, parent=student.candidate), reward=0.5)
    outcomes = {
        t.id: {"train": [Outcome(s, f"answer: {t.candidate.round}", f"feedback {s}") for s in scores]}
        for t, scores in ((student, STUDENT), (best, BEST))
    }
    return result(
        trajectory=Trajectory().add(student, dropped, best),
        curve=(0.25, 0.5),
        data=Examples({"train": [text(10 * i) for i in range(texts)]}, outcomes),
    )


def test_examples_are_grouped_by_what_became_of_them() -> None:
    (found,) = heat_maps(compiled(), [2, 0, 1])
    assert [(e.text.index, e.group) for e in found.examples] == [
        (0, "fixed"),
        (10, "broke"),
        (20, "never solved"),
        (50, "never solved"),
        (30, "solved by others"),
        (40, "solved by both"),
    ]
    assert found.counts == {
        "fixed": 1, "broke": 1, "never solved": 2, "solved by others": 1, "solved by both": 1,
    }  # fmt: skip
    assert [(number, levels) for number, _, levels in found.trials] == [
        (0, [0, 4, 0, 0, 0, 4]),
        (2, [4, 0, 0, 0, 0, 4]),
        (1, [0, 0, 0, None, 4, None]),
    ]


def test_unseen_examples_have_a_map_of_the_two_that_were_compared() -> None:
    found = compiled()
    outcomes = {
        id_: {**by_split, "unseen": (Outcome(float(i)), Outcome(0.0), Outcome(1.0))}
        for i, (id_, by_split) in enumerate(found.data.outcomes.items())
    }
    texts = {**found.data.texts, "unseen": [text(i) for i in range(5)]}
    maps = heat_maps(replace(found, data=Examples(texts, outcomes)), [2, 0, 1])
    assert [m.split for m in maps] == ["train", "unseen"]
    assert [e.group for e in maps[1].examples] == ["fixed", "never solved", "solved by both"]
    assert [number for number, _, _ in maps[1].trials] == [0, 2]


def test_a_student_that_is_returned_is_compared_with_the_best_candidate() -> None:
    found = compiled()
    kept = replace(found, returned=found.baseline.id)
    assert compared(kept).id == compared(found).id != found.baseline.id


def confirmed(scores: list[float], returned: int = 0) -> OPROResult:
    """The best trial is the third. The fourth, which is shorter, was confirmed with these scores; trial 1 is older."""
    student, old = trial("Answer.", STUDENT), trial("Guess.", [0, 1, 1, 0, 0, 0], 1)
    best, shorter = trial("Think well.", [1, 1, 1, 0, 1, 0], 1), trial("Think.", [1, 1, 1, 0, 0, 0], 1)
    trials = (student, old, best, shorter)
    outcomes = {t.id: {"train": [Outcome(s) for s in t.scores]} for t in trials}
    for each, unseen in ((student, [0.0, 0.0, 1.0, 1.0]), (shorter, scores)):
        outcomes[each.id]["unseen"] = [Outcome(s) for s in unseen]
    gain = Gain(False, 0.0, Interval(0.0, -0.5, 0.5, 0.95, 40, "fresh"), 0.5, 0.55)
    texts = {"train": [text(i) for i in range(6)], "unseen": [text(i) for i in range(4)]}
    data = Examples(texts, outcomes)  # type: ignore[arg-type]
    found = Trajectory().add(*trials)
    return result(
        trajectory=found, curve=(0.33, 0.66), gain=gain, returned=trials[returned].id, data=data, failures=()
    )


@pytest.mark.parametrize("returned", [0, 1])
def test_the_confirmed_candidate_is_compared_also_if_another_trial_is_returned(returned: int) -> None:
    found = confirmed([0.0, 1.0, 1.0, 0.0], returned)
    assert compared(found).candidate.instructions["answer"] == "Think."
    train, unseen = heat_maps(found, [2, 3, 1, 0])
    assert unseen.counts == {"fixed": 1, "broke": 1, "never solved": 1, "solved by both": 1}
    assert [[number for number, _, _ in m.trials][:2] for m in (train, unseen)] == [[0, 3], [0, 3]]
    shown = " ".join(re.sub("<[^>]*>", " ", page(found)).split())
    assert "0.500 the student mean score on 40 examples" in shown
    assert "The best candidate has 0.550 and is not returned." in shown
    assert "The search itself saw 0.333 → 0.500 on" in shown


def test_an_example_that_one_of_the_two_was_not_scored_on_is_not_compared() -> None:
    """Idle threads score the student on unseen examples, and a limit may end the confirmation."""
    _, unseen = heat_maps(confirmed([0.0, 1.0]), [2, 3, 1, 0])
    assert [(e.position, e.group) for e in unseen.examples] == [(1, "fixed"), (0, "never solved")]


def test_the_highest_of_negative_scores_is_good_even_if_it_is_0() -> None:
    student, best = trial("a", [-1.0, 0.0, -1.0, -1.0]), trial("b", [0.0, 0.0, -1.0, -1.0], 1)
    third = trial("c", [-1.0, 0.0, 0.0, -1.0], 1)
    data = Examples({"train": [text(i) for i in range(4)]})
    found = result(trajectory=Trajectory().add(student, best, third), data=data, failures=())
    groups = {e.position: e.group for e in heat_maps(found, [1, 0, 2])[0].examples}
    assert groups == {0: "fixed", 1: "solved by both", 2: "solved by others", 3: "never solved"}


def test_a_run_on_record_keeps_what_the_confirmed_candidate_gave(tmp_path: Path) -> None:
    numbers = count()

    def propose(call: LMCall) -> dict[str, str]:
        number = next(numbers)
        return {"instruction": f"Rule {number}: " + "think " * (zlib.crc32(b"%d" % number) % 30 + 1)}

    def answer(call: LMCall) -> dict[str, str]:
        is_right = zlib.crc32(f"{call.instructions}{call.inputs['question']}".encode()) % 2
        return {"answer": "yes" if is_right else "no"}

    teleprompter = OPROTeleprompter(
        metric=lambda example, prediction: prediction.answer == "yes",
        prompt_model=ScriptedLM(propose),
        task_model=ScriptedLM(answer),
        num_rounds=1,
        num_candidates=6,
        num_threads=1,
        pruner=None,
        log_dir=tmp_path,
        display_progress=False,
    )
    trainset = [dspy.Example(question=f"q{i}").with_inputs("question") for i in range(36)]
    student = dspy.Predict(dspy.Signature("question -> answer", "Say yes."))
    found = teleprompter.compile(student, trainset=trainset, seed=1).opro_result
    (tmp_path / RESULT).unlink()
    (run,) = find_runs(str(tmp_path))
    recorded = run.result()
    assert found.best.id == found.baseline.id
    assert compared(recorded).id == compared(found).id != found.trajectory.best.id
    assert recorded.gain == found.gain
    pairs = [[(row["split"], row["trial"], row["score"]) for row in r.examples()] for r in (found, recorded)]
    assert pairs[0] == pairs[1]


def test_columns_stay_within_the_width_and_groups_are_apart() -> None:
    (found,) = heat_maps(compiled(), [2, 0, 1])
    columns = found.columns(60.0)
    assert columns[-1][0] + columns[-1][1] <= 60.001
    assert columns[2][0] > columns[1][0] + columns[1][1]
    assert columns[3][0] == pytest.approx(columns[2][0] + columns[2][1])


def test_each_cell_has_its_level_and_those_without_a_score_are_left_out() -> None:
    paths = dict(rectangles([0, None, 4, 0], [(0, 10), (10, 10), (20, 10), (30, 10)], 5, 13))
    assert paths == {0: "M0 5h9v13h-9zM30 5h9v13h-9z", 4: "M20 5h9v13h-9z"}


def test_of_many_examples_those_that_changed_are_shown() -> None:
    count = 3 * MOST_EXAMPLES
    student, best = trial("a", [1.0] * count), trial("b", [1.0] * (count - 1) + [0.0], 1)
    data = Examples({"train": [text(i) for i in range(count)]})
    (found,) = heat_maps(
        result(trajectory=Trajectory().add(student, best), returned=best.id, data=data), [0, 1]
    )
    assert len(found.examples) == MOST_EXAMPLES
    assert found.examples[0].group == "broke" and found.examples[0].text.index == count - 1
    assert found.counts == {"broke": 1, "solved by both": count - 1}


def test_scores_of_another_range_have_levels_too() -> None:
    student, best = trial("a", [0.0, 50.0, 100.0]), trial("b", [25.0, 50.0, 100.0], 1)
    data = Examples({"train": [text(i) for i in range(3)]})
    (found,) = heat_maps(
        result(trajectory=Trajectory().add(student, best), returned=best.id, data=data), [1, 0]
    )
    assert [levels for _, _, levels in found.trials] == [[0, 2, 4], [1, 2, 4]]


@pytest.mark.parametrize(("scores", "apart"), [([0.0, 0.0, 1.0], 1), ([1.0, 1.0, 1.0], 2)])
def test_the_rows_that_are_compared_are_set_apart(scores: list[float], apart: int) -> None:
    """The student alone if no candidate is better."""
    student, other, third = trial("a", [0.0, 1.0, 1.0]), trial("b", scores, 1), trial("c", [0.0, 0.0, 0.0], 1)
    data = Examples({"train": [text(i) for i in range(3)]})
    shown = page(result(trajectory=Trajectory().add(student, other, third), curve=(0.6, 1.0), data=data))
    figure = shown.partition('aria-label="Scores of candidates on examples"')[2].partition("</svg>")[0]
    rows = [float(y) for y in re.findall(r'y="([\d.]+)" class="tick value', figure)]
    assert [below - above for above, below in pairwise(rows)] == (
        [21.0, 15.0] if apart == 1 else [15.0, 21.0]
    )
    assert figure.count("tick value strong") == apart
    assert ("solved by both" in shown, "solved by the student" in shown) == (apart == 2, apart == 1)


def test_a_result_without_examples_has_no_map() -> None:
    assert heat_maps(result(), [3, 2, 0, 1]) == []
    assert 'id="examples"' not in page(result())
    assert 'id="examples"' not in page(empty())


def test_the_page_has_inputs_predictions_and_feedback_of_both() -> None:
    shown = page(compiled())
    article = shown.partition('<article class="example" id="train-0">')[2].partition("</article>")[0]
    for words in ("trainset[0]", "fixed", "q0", "a0", "answer: 0", "answer: 1", "feedback 0", "feedback 1"):
        assert words in article, words
    assert shown.count('<article class="example"') == 6
