"""A script that built a built-in optimizer works with the class name changed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy.teleprompt import COPRO, BootstrapFewShot, BootstrapFewShotWithRandomSearch, LabeledFewShot, MIPROv2

from dspy_opro import OPROTeleprompter
from tests.conformance.programs import QA
from tests.conformance.world import MAGIC, VERSION, metric, scripted, state, teleprompter, trainset

QUIET = {"display_progress": False, "num_threads": 4}


@pytest.fixture(autouse=True)
def lm() -> Iterator[Any]:
    lm = scripted()
    with dspy.context(lm=lm):
        yield lm


def feedback(gold: Any, pred: Any, trace: Any, pred_name: Any, pred_trace: Any) -> Any:
    """GEPA's metric: five arguments, all required."""
    return dspy.Prediction(score=float(metric(gold, pred)), feedback="Say 42.")


# Optimizer -> the keywords of its constructor and of its compile, as their documentation has them.
LINES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "MIPROv2 auto": (
        {
            "metric": metric,
            "auto": "light",
            "num_threads": 4,
            "max_bootstrapped_demos": 0,
            "max_labeled_demos": 0,
        },
        {"requires_permission_to_run": False, "seed": 7, "minibatch_size": 2, "provide_traceback": True},
    ),
    "MIPROv2 by hand": (
        {
            "metric": metric,
            "auto": None,
            "num_candidates": 3,
            "init_temperature": 0.5,
            "verbose": False,
            "seed": 9,
        },
        {
            "num_trials": 4,
            "minibatch": False,
            "max_bootstrapped_demos": 0,
            "max_labeled_demos": 0,
            "valset": trainset(3),
        },
    ),
    "COPRO": (
        {
            "metric": metric,
            "breadth": 3,
            "depth": 2,
            "init_temperature": 1.4,
            "track_stats": True,
            "verbose": False,
        },
        {"eval_kwargs": {"num_threads": 4, "display_progress": False, "display_table": 0}},
    ),
    "GEPA auto": (
        {
            "metric": feedback,
            "auto": "light",
            "reflection_minibatch_size": 2,
            "track_stats": True,
            "num_threads": 4,
        },
        {"valset": trainset(3)},
    ),
    "GEPA budget": (
        {
            "metric": feedback,
            "auto": None,
            "max_full_evals": 4,
            "candidate_selection_strategy": "pareto",
            "seed": 0,
        },
        {"valset": trainset(3)},
    ),
    "BootstrapFewShot": (
        {
            "metric": metric,
            "max_bootstrapped_demos": 2,
            "max_labeled_demos": 2,
            "max_rounds": 1,
            "max_errors": 5,
        },
        {},
    ),
    "BootstrapFewShotWithRandomSearch": (
        {"metric": metric, "max_bootstrapped_demos": 1, "max_labeled_demos": 2, "num_candidate_programs": 4},
        {"valset": trainset(3), "labeled_sample": True},
    ),
    "SIMBA": (
        {"metric": metric, "bsize": 2, "num_candidates": 3, "max_steps": 2, "max_demos": 0, "num_threads": 4},
        {"seed": 0},
    ),
}


@pytest.mark.parametrize("name", LINES)
@pytest.mark.filterwarnings("error:.*has no meaning:UserWarning", "ignore:.*valset examples have:UserWarning")
def test_a_line_works_with_the_class_name_changed(name: str, lm: Any) -> None:
    constructor, call = LINES[name]
    extra = {"reflection_lm": lm} if name.startswith("GEPA") else {}
    student = dspy.ChainOfThought(QA)
    before = state(student)
    best = OPROTeleprompter(**constructor, **extra).compile(student, trainset=trainset(), **call)
    assert best(question="?").answer == "42"
    assert best.score == 100.0
    assert state(student) == before
    assert best.candidate_programs[0]["score"] == 100.0


class Proposals:
    """GEPA's `ProposalFn`, as an object."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __call__(
        self, candidate: dict[str, str], reflective_dataset: Any, components_to_update: list[str]
    ) -> dict[str, str]:
        self.seen.append((candidate, reflective_dataset))
        return {name: f"{MAGIC} Mind {{product}}. Nr. {len(self.seen)}" for name in components_to_update}


def test_an_instruction_proposer_of_gepa_proposes(lm: Any) -> None:
    proposals = Proposals()
    best = teleprompter(metric=feedback, num_rounds=2, lag=0, instruction_proposer=proposals).compile(
        dspy.Predict(QA), trainset=trainset()
    )
    assert best.score == 100.0
    assert all("instruction" not in call.output_fields for call in lm.calls)
    assert proposals.seen[0][0] == {"self": QA.instructions}
    example = proposals.seen[-1][1]["self"][0]
    assert set(example) == {"Inputs", "Generated Outputs", "Feedback"}
    assert "Say 42." in example["Feedback"]


def test_num_trials_counts_candidates() -> None:
    best = teleprompter(num_rounds=None, num_candidates=3, auto=None, metric=lambda e, p: 0.0).compile(
        dspy.Predict(QA), trainset=trainset(), num_trials=5
    )
    assert len(best.opro_result.trajectory) == 1 + 5


def test_compile_overrides_the_constructor_for_one_call() -> None:
    optimizer = teleprompter()
    first = optimizer.get_params()
    best = optimizer.compile(dspy.Predict(QA), trainset=trainset(), num_rounds=2, seed=None, num_candidates=1)
    assert best.opro_result.config["num_rounds"] == 2
    assert best.opro_result.config["seed"] == 0
    assert optimizer.get_params() == first


def test_the_data_may_come_with_the_constructor_or_as_devset() -> None:
    assert teleprompter(trainset=trainset()).compile(dspy.Predict(QA)).score == 100.0
    assert teleprompter().compile(dspy.Predict(QA), devset=trainset()).score == 100.0


def test_an_empty_valset_is_none_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="valset is empty"):
        best = teleprompter().compile(dspy.Predict(QA), trainset=trainset(), valset=[])
    assert best.opro_result.selected_on == "trainset"


def test_what_does_not_go_together_warns() -> None:
    with pytest.warns(UserWarning, match="num_trials=2 takes the place of the rounds of auto='medium'"):
        teleprompter(num_rounds=None).compile(
            dspy.Predict(QA), trainset=trainset(), num_trials=2, auto="medium"
        )
    with pytest.warns(UserWarning, match="teacher is not used"):
        teleprompter().compile(dspy.Predict(QA), trainset=trainset(), teacher=[dspy.Predict(QA)])
    with pytest.warns(UserWarning, match="2 of 2 valset examples have the inputs of a trainset example"):
        teleprompter().compile(dspy.Predict(QA), trainset=trainset(), valset=trainset(2))


def test_auto_none_without_a_bound_is_an_error() -> None:
    with pytest.raises(ValueError, match="auto=None needs at least one bound: num_rounds, num_trials"):
        OPROTeleprompter(metric=metric, auto=None).compile(dspy.Predict(QA), trainset=trainset())


@pytest.mark.parametrize(
    ("returned", "message"), [(None, "returned None"), ("yes", "returned 'yes'"), (float("nan"), "finite")]
)
def test_a_metric_without_a_score_is_an_error(returned: Any, message: str, lm: Any) -> None:
    with pytest.raises(TypeError, match=message):
        teleprompter(metric=lambda e, p: returned).compile(dspy.Predict(QA), trainset=trainset())
    assert lm.num_calls == 1


def test_subscores_are_kept_in_the_trials() -> None:
    trials = []
    teleprompter(
        metric=lambda e, p: {"score": float(metric(e, p)), "length": 3.0, "subscores": {"style": 0.5}},
        callbacks=[lambda study, trial: trials.append(trial)],
    ).compile(dspy.Predict(QA), trainset=trainset())
    assert trials[0].user_attrs["subscores"] == {"style": 0.5, "length": 3.0}


# -- chains with the built-in optimizers -------------------------------------------------------------------------


def copro(student: Any) -> Any:
    quiet = {"num_threads": 2, "display_progress": False}
    return COPRO(metric=metric, breadth=2, depth=1).compile(student, trainset=trainset(), eval_kwargs=quiet)


def mipro(student: Any) -> Any:
    optimizer = MIPROv2(
        metric=metric, auto=None, num_candidates=2, max_bootstrapped_demos=1, max_labeled_demos=1
    )
    quiet = {"requires_permission_to_run": False} if VERSION < (3, 1) else {}
    return optimizer.compile(
        student, trainset=trainset(), valset=trainset(), num_trials=1, minibatch=False, **quiet
    )


def bootstrap(student: Any) -> Any:
    return BootstrapFewShot(metric=metric, max_bootstrapped_demos=1).compile(student, trainset=trainset())


def random_search(student: Any) -> Any:
    optimizer = BootstrapFewShotWithRandomSearch(metric=metric, num_candidate_programs=1, num_threads=2)
    return optimizer.compile(student, trainset=trainset())


def labeled(student: Any) -> Any:
    return LabeledFewShot(k=2).compile(student, trainset=trainset())


OTHERS = [bootstrap, random_search, labeled, copro, mipro]
others = pytest.mark.parametrize("other", OTHERS, ids=lambda f: f.__name__)


@others
def test_our_output_is_the_student_of_another(other: Any) -> None:
    ours = teleprompter().compile(dspy.ChainOfThought(QA), trainset=trainset())
    after = other(ours)
    assert after(question="?").answer == "42"


@others
def test_their_output_is_our_student(other: Any) -> None:
    theirs = other(dspy.ChainOfThought(QA))
    demos = [copy.copy(p.demos) for p in theirs.predictors()]
    best = teleprompter(num_candidates=4).compile(theirs, trainset=trainset())
    assert best(question="?").answer == "42"
    assert [p.demos for p in best.predictors()] == demos
    assert best._compiled == theirs._compiled


def test_ensemble_over_the_candidate_programs() -> None:
    best = teleprompter().compile(dspy.Predict(QA), trainset=trainset())
    programs = [candidate["program"] for candidate in best.candidate_programs]
    ensemble = dspy.teleprompt.Ensemble(reduce_fn=dspy.majority, size=None).compile(programs)
    assert len(programs) > 1
    assert ensemble(question="?").answer == "42"


@pytest.mark.skipif(VERSION < (3, 2), reason="BetterTogether takes two optimizers of DSPy's own before 3.2")
@pytest.mark.parametrize("strategy", ["p -> b", "b -> p", "p -> p"])
def test_better_together_with_ours_as_a_step(strategy: str, lm: Any) -> None:
    student = dspy.ChainOfThought(QA)
    student.set_lm(lm)
    optimizer = dspy.BetterTogether(metric=metric, p=teleprompter(), b=BootstrapFewShot(metric=metric))
    best = optimizer.compile(
        student,
        trainset=trainset(12),
        valset=trainset(2),
        strategy=strategy,
        optimizer_compile_args={"p": {"num_candidates": 3, "minibatch_size": 4, "patience": 2}},
    )
    assert not best.flag_compilation_error_occurred
    assert best(question="?").answer == "42"
    assert MAGIC in best.predictors()[0].signature.instructions


# -- saving ----------------------------------------------------------------------------------------------------


def test_the_result_is_saved_and_loaded_in_every_form(tmp_path: Path) -> None:
    best = teleprompter().compile(dspy.ChainOfThought(QA), trainset=trainset())
    best.save(str(tmp_path / "program.json"))
    best.save(str(tmp_path / "program.pkl"))
    best.save(str(tmp_path / "whole"), save_program=True)
    unsafe = {"allow_pickle": True} if VERSION >= (3, 1) else {}
    for name in ("program.json", "program.pkl"):
        loaded = dspy.ChainOfThought(QA)
        loaded.load(str(tmp_path / name), **(unsafe if name.endswith("pkl") else {}))
        assert loaded(question="?").answer == "42"
    whole = dspy.load(str(tmp_path / "whole"), **unsafe)
    assert whole(question="?").answer == "42"
    assert whole.opro_result.best_score == 1.0
    assert copy.deepcopy(best).opro_result.best_score == best.deepcopy().opro_result.best_score == 1.0
