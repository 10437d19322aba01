"""A script that built a built-in optimizer works with the class name changed."""

from __future__ import annotations

import copy
import inspect
import itertools
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import dspy
import numpy as np
import pytest
from dspy.teleprompt import (
    COPRO,
    GEPA,
    SIMBA,
    BootstrapFewShot,
    BootstrapFewShotWithRandomSearch,
    InferRules,
    KNNFewShot,
    LabeledFewShot,
    MIPROv2,
)

from dspy_opro import OPROTeleprompter
from dspy_opro.testing import ScriptedLM
from tests.conformance.programs import QA
from tests.conformance.test_language_models import Plugin
from tests.conformance.world import MAGIC, VERSION, metric, scripted, state, teleprompter, trainset
from tests.runs import is_proposal

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
    assert all(not is_proposal(call) for call in lm.calls)
    assert proposals.seen[0][0] == {"self": QA.instructions}
    example = proposals.seen[-1][1]["self"][0]
    assert set(example) == {"Inputs", "Generated Outputs", "Feedback"}
    assert example["Inputs"].keys() == {"question"}
    assert "Say 42." in example["Feedback"]


def test_num_trials_counts_candidates() -> None:
    best = teleprompter(num_rounds=None, num_candidates=3, auto=None, metric=lambda e, p: 0.0).compile(
        dspy.Predict(QA), trainset=trainset(), num_trials=5
    )
    assert len(best.opro_result.trajectory) == 1 + 5


def test_the_reflection_lm_proposes_and_the_other_one_scores(lm: Any) -> None:
    reflection = scripted()
    best = teleprompter(reflection_lm=reflection, num_rounds=2).compile(dspy.Predict(QA), trainset=trainset())
    others = [call for call in reflection.calls if not is_proposal(call)]
    assert [call.prompt for call in others] == ["Answer with OK."]  # the test request
    assert all(not is_proposal(call) for call in lm.calls)
    usage = best.opro_result.usage
    assert (usage.proposer_calls, usage.scorer_calls) == (reflection.num_calls, lm.num_calls)
    assert reflection.num_calls > 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_base_lm_proposes_at_its_own_temperature_and_without_a_rollout_id() -> None:
    lm = Plugin()
    best = teleprompter(prompt_model=lm, init_temperature=0.9).compile(dspy.Predict(QA), trainset=trainset())
    assert best.score == 100.0
    assert {settings.get("temperature") for settings in lm.seen} == {0.5}
    assert all("rollout_id" not in settings for settings in lm.seen)


@pytest.mark.parametrize("passes", [2, 5])
def test_max_full_evals_pays_for_as_many_passes_over_both_sets(passes: int) -> None:
    scored = []

    def random(example: Any, prediction: Any) -> float:
        scored.append(example)
        return len(scored) % 7 / 7

    valset = [e.copy(question=f"And {n}?").with_inputs("question") for n, e in enumerate(trainset(3))]
    best = OPROTeleprompter(metric=random, auto=None, max_full_evals=passes, confirm=False, **QUIET).compile(
        dspy.Predict(QA), trainset=trainset(5), valset=valset
    )
    assert (passes - 1) * 8 <= len(scored) <= passes * 8
    assert best.opro_result.usage.metric_calls == len(scored)


def test_without_auto_and_pruner_everything_is_scored_in_full_to_the_last_round() -> None:
    best = OPROTeleprompter(
        metric=lambda e, p: 0.5, auto=None, pruner=None, breadth=2, depth=6, **QUIET
    ).compile(dspy.Predict(QA), trainset=trainset())
    trials = best.opro_result.trajectory.trials
    assert best.opro_result.stop_reason == "num_rounds"
    assert {trial.num_scored for trial in trials} == {4}
    assert len(trials) == 1 + 2 * 6


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
    with pytest.warns(UserWarning, match="num_trials=2 overrides the number of rounds of auto='medium'"):
        teleprompter(num_rounds=None).compile(
            dspy.Predict(QA), trainset=trainset(), num_trials=2, auto="medium"
        )
    with pytest.warns(UserWarning, match="teacher is not used"):
        teleprompter().compile(dspy.Predict(QA), trainset=trainset(), teacher=[dspy.Predict(QA)])
    with pytest.warns(UserWarning, match="2 of 2 valset examples have the inputs of a trainset example"):
        teleprompter().compile(dspy.Predict(QA), trainset=trainset(), valset=trainset(2))


@pytest.mark.parametrize(
    ("constructor", "call", "warned"),
    [
        ({}, {}, False),
        ({"auto": "light"}, {}, False),
        ({"auto": "medium"}, {}, True),
        ({}, {"auto": "light"}, True),
    ],
)
def test_num_trials_beside_an_auto_warns_unless_it_is_the_constructors_default(
    constructor: dict[str, Any], call: dict[str, Any], warned: bool
) -> None:
    optimizer = OPROTeleprompter(metric=metric, **constructor, **QUIET)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.compile(dspy.Predict(QA), trainset=trainset(), num_trials=2, **call)
    assert any("num_trials=2 overrides" in str(w.message) for w in caught) is warned


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


def ours(student: Any) -> Any:
    return teleprompter().compile(student, trainset=trainset())


def copro(student: Any) -> Any:
    quiet = {"num_threads": 2, "display_progress": False}
    return COPRO(metric=metric, breadth=2, depth=1).compile(student, trainset=trainset(), eval_kwargs=quiet)


def mipro(student: Any) -> Any:
    text = f"{MAGIC} Mind it as MIPROv2 does."
    proposer = ScriptedLM(lambda call: dict.fromkeys(call.output_fields, text))
    optimizer = MIPROv2(
        metric=metric,
        prompt_model=proposer,
        auto=None,
        num_candidates=2,
        max_bootstrapped_demos=1,
        max_labeled_demos=1,
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


def gepa(student: Any) -> Any:
    def judge(gold: Any, pred: Any, trace: Any = None, pred_name: Any = None, pred_trace: Any = None) -> Any:
        return feedback(gold, pred, trace, pred_name, pred_trace)

    text = f"{MAGIC} Mind it as GEPA does."
    reflection = ScriptedLM(  # asked through an adapter from DSPy 3.4 on
        lambda call: {"new_instruction": text} if call.output_fields else f"```\n{text}\n```"
    )
    optimizer = GEPA(metric=judge, max_metric_calls=20, reflection_lm=reflection, num_threads=2)
    return optimizer.compile(student, trainset=trainset(), valset=trainset())


def simba(student: Any) -> Any:
    chance = itertools.count()

    def lucky(example: Any, prediction: Any) -> float:  # SIMBA learns from what differs between two runs
        return float(metric(example, prediction) or next(chance) % 3 == 0)

    # DSPy 3.0.0 has no such argument yet.
    has_own_lm = "prompt_model" in inspect.signature(SIMBA).parameters
    advice = {"discussion": "It was vague.", "module_advice": {"predict": f"{MAGIC} So does SIMBA."}}
    optimizer = SIMBA(
        metric=lucky,
        bsize=4,
        num_candidates=2,
        max_steps=1,
        max_demos=1,
        num_threads=1,
        **({"prompt_model": ScriptedLM(lambda call: advice)} if has_own_lm else {}),
    )
    return optimizer.compile(student, trainset=trainset())


def infer_rules(student: Any) -> Any:
    optimizer = InferRules(metric=metric, num_candidates=1, num_threads=2, max_bootstrapped_demos=1)
    return optimizer.compile(student, trainset=trainset(), valset=trainset())


def knn(student: Any) -> Any:
    embedder = dspy.Embedder(lambda texts: np.array([[len(text), 1.0] for text in texts]))
    return KNNFewShot(k=2, trainset=trainset(), vectorizer=embedder).compile(student)


AGAIN = [random_search, labeled, copro, mipro, gepa, simba]
"""What improves its own result."""
ONCE = [bootstrap, infer_rules]
"""What refuses a compiled student."""


def named(functions: list[Any]) -> Any:
    return pytest.mark.parametrize("other", functions, ids=lambda f: f.__name__)


@named([*AGAIN, *ONCE, knn])
def test_our_output_is_the_student_of_another(other: Any) -> None:
    after = other(ours(dspy.ChainOfThought(QA)))
    assert after(question="?").answer == "42"


@named([*AGAIN, *ONCE])
def test_their_output_is_our_student(other: Any) -> None:
    theirs = other(dspy.ChainOfThought(QA))
    demos = [copy.copy(p.demos) for p in theirs.predictors()]
    best = teleprompter(num_candidates=4).compile(theirs, trainset=trainset())
    assert best(question="?").answer == "42"
    assert [p.demos for p in best.predictors()] == demos
    assert best._compiled == theirs._compiled


@named(AGAIN)
def test_a_chain_goes_on_in_turns(other: Any) -> None:
    program = dspy.ChainOfThought(QA)
    for seed in (1, 2):
        program = teleprompter(seed=seed).compile(program, trainset=trainset())
        assert program.score == 100.0
        program = other(program)
    assert program(question="?").answer == "42"


@named(ONCE)
@pytest.mark.parametrize("between", [copy.deepcopy, ours])
def test_what_refuses_a_compiled_student_does_so_with_us_in_between(other: Any, between: Any) -> None:
    compiled = between(other(dspy.ChainOfThought(QA)))
    with pytest.raises(AssertionError, match="Student must be uncompiled"):
        other(compiled)


def test_what_knn_few_shot_returns_runs_its_own_student_whatever_is_changed() -> None:
    best = ours(knn(dspy.ChainOfThought(QA)))
    assert len(best.opro_result.trajectory) > 1
    assert {trial.reward for trial in best.opro_result.trajectory.trials} == {0.0}


@named([ours, mipro])
def test_bootstrap_few_shot_refuses_an_optimized_teacher_for_a_plain_student(other: Any) -> None:
    student, teacher = dspy.ChainOfThought(QA), other(dspy.ChainOfThought(QA))
    with pytest.raises(AssertionError, match="must have the same signatures"):
        BootstrapFewShot(metric=metric).compile(student, teacher=teacher, trainset=trainset())


@pytest.mark.parametrize("track_stats", [True, False])
def test_the_result_is_opro_result_and_not_detailed_results(track_stats: bool) -> None:
    best = teleprompter(track_stats=track_stats).compile(dspy.Predict(QA), trainset=trainset())
    assert not hasattr(best, "detailed_results")
    assert best.opro_result.best_score == 1.0
    assert hasattr(best, "candidate_programs") == hasattr(best, "trial_logs") == track_stats


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


def test_plain_pickle_takes_no_changed_instructions_whoever_changed_them() -> None:
    by_hand = dspy.Predict(QA.with_instructions("Be brief."))
    for program in (ours(dspy.Predict(QA)), by_hand):
        with pytest.raises(pickle.PicklingError):
            pickle.dumps(program)
        assert cloudpickle.loads(cloudpickle.dumps(program)).signature.equals(program.signature)
