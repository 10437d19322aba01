from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dspy
import hypothesis
import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.pruners import (
    BasePruner,
    HyperbandPruner,
    MedianPruner,
    NopPruner,
    PatientPruner,
    PercentilePruner,
    SuccessiveHalvingPruner,
    ThresholdPruner,
    WilcoxonPruner,
)

from dspy_opro import Halving, OPROTeleprompter
from dspy_opro.config.serialization import from_json, to_json
from dspy_opro.programs.compat import dump_lm
from dspy_opro.proposers.opro import OPROProposer
from dspy_opro.search.stoppers import Patience, StopAtScore
from dspy_opro.testing import VocabularyTask


def exact(example: Any, prediction: Any) -> bool:
    return bool(example.answer == prediction.answer)


class Judge:
    """A metric with settings."""

    def __init__(self, strictness: int = 1, *, words: tuple[str, ...] = ()) -> None:
        self.strictness = strictness
        self._words = words

    def __call__(self, example: Any, prediction: Any) -> float:
        return 1.0

    def gently(self, example: Any, prediction: Any) -> float:
        return 0.5

    @classmethod
    def always(cls, example: Any, prediction: Any) -> float:
        return 1.0


class Forgetful:
    def __init__(self, secret: int) -> None:
        self.answer = secret + 1

    def __call__(self, example: Any, prediction: Any) -> float:
        return 1.0


class HomeMadeLM(dspy.BaseLM):
    """An LM with something in it that is not JSON."""

    def __init__(self) -> None:
        super().__init__(model="home/made", something=object())


def there_and_back(**arguments: Any) -> OPROTeleprompter:
    """The teleprompter made of its config, which is checked to be JSON and to stay the same."""
    config = OPROTeleprompter(**arguments).get_config()
    text = json.dumps(config, allow_nan=False)
    again = OPROTeleprompter.from_config(json.loads(text))
    assert json.dumps(again.get_config()) == text
    return again


settings = st.fixed_dictionaries(
    {},
    optional={
        "auto": st.sampled_from(["light", "medium", "heavy", "paper"]),
        "num_rounds": st.integers(1, 100),
        "init_temperature": st.floats(0, 2),
        "max_cost": st.floats(0.01, 1e6),
        "stop_at_score": st.floats(allow_nan=False, allow_infinity=False),
        "failure_score": st.floats(allow_nan=False, allow_infinity=False),
        "seed": st.integers(),
        "name": st.text(),
        "log_dir": st.sampled_from(["runs", Path("runs") / "qa"]),
        "predictor_strategy": st.sampled_from(["all", "round_robin"]),
        "pruner": st.none() | st.builds(Halving, first=st.integers(1, 9), keep=st.floats(0.1, 0.9)),
        "stoppers": st.lists(
            st.builds(Patience, st.integers(1, 9)) | st.builds(StopAtScore, st.floats(0, 1))
        ),
        "verbose": st.booleans(),
        "storage": st.sampled_from(["sqlite:///runs.db", None]),
        "eval_kwargs": st.fixed_dictionaries({"num_threads": st.integers(1, 99)}),
    },
)


@given(settings)
def test_arguments_come_back_as_they_were(arguments: dict[str, Any]) -> None:
    again = there_and_back(metric=exact, **arguments)
    expected = OPROTeleprompter(metric=exact, **arguments).get_params()
    expected["log_dir"] = None if expected["log_dir"] is None else str(expected["log_dir"])
    assert again.get_params() == expected


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
fields = st.dictionaries(st.text("xyz", min_size=1), values, min_size=1)


@hypothesis.settings(max_examples=30)
@given(st.lists(st.tuples(fields, st.booleans()), max_size=4))
def test_datasets_come_back_as_they_were(rows: list[tuple[dict[str, Any], bool]]) -> None:
    data = [dspy.Example(**row).with_inputs(*(row if given else [])) for row, given in rows]
    again = there_and_back(metric=exact, trainset=data, valset=data[:1]).config
    assert again.trainset == data
    assert [e.inputs().toDict() for e in again.trainset or ()] == [e.inputs().toDict() for e in data]


def test_a_dataset_without_inputs_stays_without() -> None:
    (example,) = there_and_back(trainset=[dspy.Example(question="1 + 1?")]).config.trainset or ()
    with pytest.raises(ValueError, match="not been set"):
        example.inputs()


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize(
    "make_pruner",
    [
        lambda: MedianPruner(3, 2, n_min_trials=4),
        lambda: PercentilePruner(30.0),
        lambda: SuccessiveHalvingPruner(),
        lambda: SuccessiveHalvingPruner(3, 2, bootstrap_count=1),
        lambda: HyperbandPruner(2, 20),
        lambda: ThresholdPruner(upper=0.5),
        lambda: PatientPruner(MedianPruner(7), 3, 0.1),
        lambda: PatientPruner(None, 3),
        lambda: WilcoxonPruner(p_threshold=0.2),
        NopPruner,
    ],
)
def test_optuna_pruners_come_back_with_their_arguments(make_pruner: Callable[[], BasePruner]) -> None:
    pruner = make_pruner()
    again = there_and_back(metric=exact, pruner=pruner).config.pruner
    assert type(again) is type(pruner)
    own, theirs = ({k: v for k, v in vars(p).items() if k != "_wrapped_pruner"} for p in (again, pruner))
    assert own == theirs


def test_a_pruner_is_named_by_its_public_path() -> None:
    config = OPROTeleprompter(pruner=MedianPruner(n_startup_trials=7)).get_config()
    assert config["pruner"] == {"$new": "optuna.pruners:MedianPruner", "arguments": {"n_startup_trials": 7}}


@pytest.mark.parametrize("metric", [exact, Judge.always, VocabularyTask.metric, max])
def test_functions_go_by_their_import_path(metric: Any) -> None:
    assert there_and_back(metric=metric).config.metric == metric


def main_function(example: Any, prediction: Any) -> float:
    return 1.0


class MainJudge(Judge):
    pass


class MainLM(dspy.LM):  # type: ignore[misc]
    pass


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metric": main_function}, "metric can't be written to a config: it is main_function of __main__, which an"),
        ({"metric": MainJudge.always}, "metric can't be .* it is Judge.always of __main__"),
        ({"metric": MainJudge()}, "metric can't be .* it is MainJudge of __main__, .* Define it in a module"),
        ({"stoppers": [MainJudge().gently]}, r"stoppers\[0\] can't be .* it is MainJudge of __main__"),
        ({"prompt_model": MainLM("openai/x")}, "prompt_model can't be .* it is MainLM of __main__"),
    ],
)  # fmt: skip
def test_what_a_script_defines_is_refused(
    arguments: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another script would find something of its own by that name."""
    for value in (main_function, MainJudge, Judge.always.__func__, MainLM):
        monkeypatch.setattr(value, "__module__", "__main__")
        monkeypatch.setattr(sys.modules["__main__"], value.__name__, value, raising=False)
    with pytest.raises(ValueError, match=message):
        OPROTeleprompter(**arguments).get_config()


def test_objects_go_by_their_class_and_arguments() -> None:
    judge: Any = there_and_back(metric=Judge(3, words=("a", "b"))).config.metric
    assert (judge.strictness, judge._words) == (3, ("a", "b"))
    gently: Any = there_and_back(metric=Judge(5).gently).config.metric
    assert gently.__self__.strictness == 5
    partial: Any = there_and_back(metric=functools.partial(exact, prediction=float("inf"))).config.metric
    assert (partial.func, partial.keywords) == (exact, {"prediction": float("inf")})


def test_a_metric_of_dspy_comes_back_with_its_state() -> None:
    metric = dspy.evaluate.SemanticF1(threshold=0.5)
    predictor = metric.module.predictors()[0]
    predictor.signature = predictor.signature.with_instructions("Compare them.")
    again: Any = there_and_back(metric=metric).config.metric
    assert again.threshold == 0.5
    assert again.module.predictors()[0].signature.instructions == "Compare them."


def test_a_default_is_not_written_though_it_is_another_object() -> None:
    assert OPROTeleprompter(k_best=7, min_delta=0.0).get_config() == {"k_best": 7}


def test_a_proposer_comes_back_with_its_state_and_lm() -> None:
    proposer = OPROProposer()
    proposer.set_lm(dspy.LM("openai/strong", api_base="http://127.0.0.1:1/v1", api_key="key-1"))
    config = OPROTeleprompter(proposer=proposer).get_config()
    assert "key-1" not in json.dumps(config)
    again = there_and_back(proposer=proposer).config.proposer
    assert isinstance(again, OPROProposer)
    assert all(p.lm.kwargs["api_base"] == "http://127.0.0.1:1/v1" for p in again.predictors())


@pytest.mark.parametrize(
    "lm",
    [
        dspy.LM("openai/gpt-4o", temperature=0.3, api_base="http://127.0.0.1:1/v1", cache=False),
        dspy.LM("openai/o3", temperature=1.0, max_tokens=20_000),
        dspy.LM(
            "text-completion-openai/davinci", model_type="text", num_retries=7, rollout_id=3, temperature=1.0
        ),
    ],
    ids=lambda lm: str(lm.model),
)
def test_lms_come_back_without_their_secrets(lm: dspy.LM) -> None:
    lm = lm.copy()
    lm.kwargs["api_key"] = lm.kwargs["aws_secret_access_key"] = lm.kwargs["azure_ad_token"] = "key-1"
    lm.kwargs["extra_headers"] = {"Authorization": "Bearer key-1"}
    config = OPROTeleprompter(prompt_model=lm, task_model=lm).get_config()
    assert "key-1" not in json.dumps(config)
    again = there_and_back(prompt_model=lm).config.prompt_model
    assert dump_lm(again) == dump_lm(lm)


def local() -> Any:
    def metric(example: Any, prediction: Any) -> float:
        return 1.0

    return metric


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metric": lambda example, prediction: 1.0}, r"metric can't be .* is a lambda .* Define it with def"),
        ({"metric": local()}, r"metric can't be .* local\.<locals>\.metric, which exists inside a function only"),
        ({"metric": Forgetful(1)}, r"metric can't be .* Keep each argument of its constructor in an attribute"),
        ({"stoppers": [Patience(2), lambda state: None]}, r"stoppers\[1\] can't be written .* lambda"),
        ({"callbacks": [lambda study, trial: None]}, r"callbacks\[0\] can't be written .* lambda"),
        ({"proposer": dspy.Predict("a -> b")}, r"proposer.* can't be written"),
        ({"storage": optuna.storages.InMemoryStorage()}, r"storage can't be .* Write storage as a URL"),
        ({"prompt_model": HomeMadeLM()}, r"prompt_model can't be .* HomeMadeLM whose state can't be written"),
        ({"trainset": [dspy.Example(a=1), dspy.Example(a={"b": (1, 2)})]}, r"trainset\[1\]\['a'\]\['b'\] can't be"),
        ({"trainset": [dspy.Example(a=float("nan"))]}, r"trainset\[0\]\['a'\] can't be written .* nan"),
        ({"valset": [dspy.Prediction(a=1)]}, r"valset\[0\] can't be written .* Prediction"),
        ({"teacher_settings": {"$lm": 1}}, r"teacher_settings can't be written .* key '\$lm'"),
    ],
)  # fmt: skip
def test_what_cannot_come_back_is_an_error_that_names_place_and_remedy(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        OPROTeleprompter(**arguments).get_config()


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"metrik": None}, TypeError, "metrik.*Did you mean 'metric'"),
        ({"metric": {"$import": "no_such_module:metric"}}, ValueError, "names no_such_module:metric, which can't"),
        ({"metric": {"$import": f"{__name__}:gone"}}, ValueError, "metric names .*:gone, which can't be imported"),
        ({"pruner": {"$what": 1}}, ValueError, r"pruner has the unknown key '\$what'; known are \$float"),
        ({"prompt_model": {"$lm": {"_dspy_lm_class": "os.path", "model": "m"}}}, ValueError, "os.path is no LM class"),
        ({"num_rounds": 0}, ValueError, "num_rounds must be at least 1, but got 0."),
    ],
)  # fmt: skip
def test_a_config_that_says_nothing_sensible_is_a_clear_error(
    config: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        OPROTeleprompter.from_config(config)


def test_only_what_was_given_is_written() -> None:
    config = OPROTeleprompter(exact, num_rounds=3, depth=3).get_config()
    assert config["num_rounds"] == 3
    assert {"depth", "num_candidates", "pruner", "trainset", "storage"} & config.keys() == set()
    assert from_json(to_json(OPROTeleprompter.from_config(config).config)).keys() == config.keys()


def test_a_subclass_comes_back_as_itself() -> None:
    class Own(OPROTeleprompter):
        pass

    assert type(Own.from_config(Own(exact).get_config())) is Own
