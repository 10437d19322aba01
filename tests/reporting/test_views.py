"""What a result offers people: prompts, tables, files, figures, notebooks and Optuna's study."""

from __future__ import annotations

import pickle
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import cloudpickle
import optuna
import pytest

import dspy_opro.reporting
from dspy_opro.reporting.recorded import find_runs
from dspy_opro.reporting.result import OPROResult, cost
from dspy_opro.reporting.run_directory import RESULT
from dspy_opro.search.confidence import Gain, Interval
from dspy_opro.search.trajectory import Trajectory, Usage
from tests.results import empty, result, trial
from tests.runs import TASK, TRAINSET, VALSET, TwoSteps, metric, optimize, serve

STUDENT = trial("Answer.", [0, 0, 1, 0], subscores={"length": 0.25})


def overshot() -> OPROResult:
    """A dropped candidate whose estimate lies above every possible score."""
    dropped = trial("Guess.", [1, 1], 1, "pruned", STUDENT.candidate)
    return result(
        trajectory=Trajectory().add(STUDENT, replace(dropped, reward=1.25)), failures=(), num_failures=0
    )


# -- words ---------------------------------------------------------------------------------------


def test_the_repr_is_the_summary() -> None:
    lines = repr(result()).splitlines()
    assert lines[:2] == ["OPROResult:", "  score on the trainset: 0.250 -> 0.750 (stop reason: patience)"]
    assert len(lines) < 12 and max(map(len, lines)) < 120
    assert "interrupted" in repr(empty())


@pytest.mark.parametrize(
    ("usage", "words"),
    [
        (Usage(), "$0.0000"),
        (Usage(cached_calls=7), "$0.0000"),
        (Usage(scorer_calls=3, prompt_tokens=90, cost=0.5), "$0.5000"),
        (Usage(scorer_calls=3, prompt_tokens=90), "$0.0000"),
        (Usage(scorer_calls=3, prompt_tokens=90, unpriced_calls=3), "cost unknown"),
        (Usage(proposer_calls=3, unpriced_calls=3), "cost unknown"),
        (Usage(scorer_calls=3, cost=float("nan")), "cost unknown"),
        (
            Usage(scorer_calls=30, proposer_calls=17, cost=0.0327, unpriced_calls=17),
            "at least $0.0327 (17 calls without a known price)",
        ),
        (
            Usage(scorer_calls=2, cost=1234.5, unpriced_calls=1),
            "at least $1,234.5000 (1 call without a known price)",
        ),
    ],
)
def test_a_cost_says_how_far_it_is_known(usage: Usage, words: str) -> None:
    assert cost(usage) == words
    assert cost(usage, brief=True) == words.partition(" (")[0]


def test_estimates_stay_in_the_range_and_are_marked() -> None:
    student, dropped = overshot().to_dicts()
    assert (student["is_estimate"], student["reward"]) == (False, 0.25)
    assert (dropped["is_estimate"], dropped["reward"], dropped["num_scored"]) == (True, 1.0, 2)
    assert "≈ 1.000 (2 examples)" in overshot()._repr_html_()


def test_the_table_has_the_subscores() -> None:
    pytest.importorskip("pandas")
    frame = overshot().to_dataframe()
    assert frame["subscores.length"].dropna().tolist() == [0.25]


# -- notebooks -----------------------------------------------------------------------------------


def test_a_notebook_shows_what_changed_and_escapes_it() -> None:
    html = result()._repr_html_()
    assert "<del>Answer.</del><ins>Answer very well &amp; briefly.</ins>" in html
    assert "<b>draft</b> (unchanged)" in html
    assert "Answer &lt;b&gt;badly&lt;/b&gt;" in html and "<b>badly</b>" not in html
    assert html.index("<td>3</td>") < html.index("<td>2</td>") < html.index("<td>1</td>")
    assert "interrupted" in empty()._repr_html_()


def test_a_notebook_has_the_trials_in_the_order_of_the_report() -> None:
    """Below 0, too: a candidate without a valset score comes after those that have one."""
    student = replace(trial("Answer.", [-1, -1]), valset_score=-0.75)
    better = replace(trial("Better.", [-1, 0], 1), valset_score=-0.5)
    trials = Trajectory().add(student, trial("Other.", [-1, -0.5], 1), better)
    found = result(trajectory=trials, selected_on="valset", failures=(), num_failures=0)
    html = found._repr_html_()
    assert re.findall(r"<tr><td>(\d)</td>", html) == ["2", "0", "1"]


# -- files ---------------------------------------------------------------------------------------


def test_a_result_goes_to_json_and_back(tmp_path: Path) -> None:
    interval = Interval(0.25, 0.1, 0.4, 0.95, 12, "fresh")
    before = result(gain=Gain(True, 0.2, interval, 0.5, 0.75), messages={"answer": [{"role": "user"}]})
    before.save(tmp_path / "new" / "result.json")
    after = OPROResult.load(tmp_path / "new" / "result.json")
    assert (after.trajectory.trials[3].candidate, after.gain) == (before.trials[3].candidate, before.gain)
    assert (after.summary(), after.to_dicts()) == (before.summary(), before.to_dicts())
    assert (after.best.id, after.usage, after.prompts()) == (before.best.id, before.usage, before.prompts())
    after.save(tmp_path / "again.json")
    assert OPROResult.load(tmp_path / "again.json") == after


def test_half_a_surrogate_can_be_saved(tmp_path: Path) -> None:
    result(problems=("half \ud83d",)).save(tmp_path / "result.json")
    assert OPROResult.load(tmp_path / "result.json").problems == ["half ?"]


def test_a_file_without_a_result_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="trajectory"):
        OPROResult.load(tmp_path / "other.json")


def test_a_run_on_record_has_the_demos_of_its_candidates(tmp_path: Path) -> None:
    options = {"max_bootstrapped_demos": 2, "max_labeled_demos": 2, "num_rounds": 1, "log_dir": tmp_path}
    with serve() as server:
        found = optimize(server, trainset=TASK.trainset(40), valset=None, **options).opro_result
    (tmp_path / RESULT).unlink()
    (run,) = find_runs(str(tmp_path))
    recorded = run.result()
    assert any(t.candidate.demos for t in found.trials)
    assert [t.candidate.demos for t in recorded.trials] == [t.candidate.demos for t in found.trials]
    assert recorded.to_dicts() == found.to_dicts()  # a length counts the demos, too


# -- prompts -------------------------------------------------------------------------------------


def test_prompts_are_messages_or_one_text() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "See:"}, {"type": "image_url"}]},
    ]
    found = result(messages={"answer": messages})
    assert found.prompts() == {"answer": messages}
    assert found.prompts(format="text") == {"answer": "System:\nBe brief.\n\nUser:\nSee:\n<image_url>"}
    with pytest.raises(ValueError, match="format must be"):
        found.prompts(format="yaml")  # type: ignore[arg-type]


# -- the study -----------------------------------------------------------------------------------


def test_a_run_in_memory_has_a_study_made_of_its_trials() -> None:
    study = overshot().study
    assert study.study_name == "capitals"
    assert [t.state.name for t in study.trials] == ["COMPLETE", "PRUNED"]
    assert study.best_trial.user_attrs["instructions"]["answer"] == "Answer."


@pytest.mark.parametrize("where", ["memory", "log_dir", "url"])
def test_a_run_shows_its_study_and_its_prompts(tmp_path: Path, where: str) -> None:
    options: dict[str, Any] = {
        "memory": {},
        "log_dir": {"log_dir": tmp_path / "run"},
        "url": {"storage": f"sqlite:///{tmp_path}/qa.db", "study_name": "qa"},
    }[where]
    with serve() as server:
        program = optimize(server, TwoSteps(), **options)
    found = cloudpickle.loads(cloudpickle.dumps(program)).opro_result
    found.save(tmp_path / "result.json")
    for again in (found, pickle.loads(pickle.dumps(found)), OPROResult.load(tmp_path / "result.json")):
        study = again.study
        assert len(study.trials) == len(again.trials)
        assert study.best_value == max(t.reward for t in again.trials if t.state == "complete")
        assert len(study.trials[-1].intermediate_values) >= 1
        texts = again.prompts(format="text")
        assert texts.keys() == {"note", "answer"}
        assert again.instructions["answer"] in texts["answer"] and "{question}" in texts["answer"]
        assert again.summary() == found.summary()


def test_optunas_figures_draw_the_study() -> None:
    pytest.importorskip("plotly")
    study = result().study
    assert len(optuna.visualization.plot_optimization_history(study).data) >= 1
    assert len(optuna.visualization.plot_intermediate_values(study).data) == 4


# -- examples ------------------------------------------------------------------------------------


def exact(example: Any, prediction: Any, trace: Any = None) -> Any:
    return {"score": metric(example, prediction), "feedback": "because", "length": 0.5}


def test_there_is_a_row_for_every_example_and_candidate(tmp_path: Path) -> None:
    with serve() as server:
        found = optimize(server, metric=exact).opro_result
    rows, best = found.examples(), found.trajectory.best
    number = next(n for n, t in enumerate(found.trials) if t.id == best.id)
    for n, each in enumerate(found.trials):
        for split, scores in (("train", each.scores), ("val", each.valset_scores)):
            mine = [r for r in rows if (r["trial"], r["split"]) == (n, split)]
            assert [r["score"] for r in mine] == list(scores)
            data = TRAINSET if split == "train" else VALSET
            assert all(r["inputs.question"] == data[r["example"]].question for r in mine)
            assert all(r["expected.answer"] == data[r["example"]].answer for r in mine)
            is_kept = n in (0, number)
            assert {r["feedback"] for r in mine} <= {"because" if is_kept else None}
            assert all(r.get("subscores.length") == (0.5 if is_kept else None) for r in mine)
    found.save(tmp_path / "result.json")
    assert OPROResult.load(tmp_path / "result.json").examples() == rows
    pytest.importorskip("plotly")
    figure = found.plot_examples()
    assert figure.layout.xaxis.title.text == "place in the trainset"
    assert sorted(map(int, figure.data[0].x)) == sorted({r["example"] for r in rows if r["split"] == "train"})
    assert figure.data[0].text[0][0].startswith("question: ")


def test_a_result_without_texts_has_no_rows() -> None:
    assert result().examples() == empty().examples() == []


# -- figures -------------------------------------------------------------------------------------


def test_the_history_has_the_curve_and_marks_estimates() -> None:
    pytest.importorskip("plotly")
    best, full, dropped, returned = overshot().plot_history().data
    assert list(best.y) == [0.25, 0.5, 0.75, 0.75]
    assert (list(full.y), list(returned.y)) == ([], [0.25])
    assert (list(dropped.y), dropped.marker.symbol) == ([1.0], "circle-open")
    assert "estimate from 2 examples" in dropped.text[0]
    names = [trace.name for trace in overshot().plot_history().data]
    assert names[1:] == ["scored in full", "dropped (estimate)", "returned"]
    line, *points = result(selected_on="valset").plot_history().data
    assert line.name.endswith("the valset") and all(p.name.endswith(", train score") for p in points)


def test_the_heat_map_has_a_row_a_candidate_and_no_score_where_there_is_none() -> None:
    pytest.importorskip("plotly")
    figure = result().plot_examples()
    (heat,) = figure.data
    assert figure.layout.xaxis.title.text == "position in the run's order"
    assert heat.y[-1] == "trial 3" and list(heat.z[-1]) == [1, 1, 1, 0]
    assert list(heat.z[heat.y.index("trial 1")]).count(None) == 2
    assert overshot().plot_examples().data[0].y[-1] == "trial 0"  # not the estimate above it


def test_the_lineage_joins_candidates_with_their_parents() -> None:
    pytest.importorskip("plotly")
    lines, *_ = result().plot_lineage().data
    assert list(lines.x) == [0, 1, None, 0, 1, None, 0, 2, None]
    assert "&lt;b&gt;badly&lt;/b&gt;" in result().plot_lineage().to_json().encode().decode("unicode_escape")


def test_a_run_without_a_score_has_empty_figures() -> None:
    pytest.importorskip("plotly")
    for figure in (empty().plot_history(), empty().plot_examples(), empty().plot_lineage()):
        assert figure.to_json()


def test_without_plotly_a_figure_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    monkeypatch.delitem(sys.modules, "dspy_opro.reporting.plots", raising=False)
    monkeypatch.delattr(dspy_opro.reporting, "plots", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'dspy-opro\[report\]'"):
        result().plot_history()


# -- GEPA's names --------------------------------------------------------------------------------


def test_the_names_of_gepas_results_are_there() -> None:
    found = result()
    assert found.val_aggregate_scores == [0.25, 0.5, 0.75]  # no estimate among them
    assert found.candidates[0]["answer"] == "Answer."
    assert found.candidates[found.best_idx] == found.best_candidate == found.instructions
    assert found.total_metric_calls == 14


def test_with_a_valset_gepas_names_have_its_scores() -> None:
    trials = [replace(STUDENT, valset_score=0.3), trial("One.", [1, 1, 1, 1], 1), trial("Two.", [0, 1], 1)]
    trials[2] = replace(trials[2], valset_score=0.4)
    found = result(trajectory=Trajectory().add(*trials), selected_on="valset", failures=())
    assert found.val_aggregate_scores == [0.3, 0.4]
    assert found.best_candidate["answer"] == "Two."
