"""`OPROConfig`: every value of a run. The values are checked once, when the teleprompter is made."""

from __future__ import annotations

import difflib
import math
import reprlib
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict, get_args, get_type_hints

import dspy
from pydantic import ConfigDict, Field, ValidationError, create_model, field_validator, model_validator

from .sizes import PAPER_CANDIDATES, usual_candidates

Auto = Literal["light", "medium", "heavy", "paper"]

DEMOS: Mapping[str, int] = {"max_bootstrapped_demos": 4, "max_labeled_demos": 4}
"""What a preset searches; MIPROv2 has the same defaults."""

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "light": {"num_rounds": 8, "num_candidates": 8, "patience": 4, "max_train_examples": 100, **DEMOS},
    "medium": {"num_rounds": 8, "num_candidates": 16, "patience": 3, "max_train_examples": 300, **DEMOS},
    "heavy": {"num_rounds": 10, "num_candidates": 32, "patience": 3, "max_train_examples": 1000, **DEMOS},
    # 8 proposals at temperature 1.0, 20 scored instructions, 3 exemplars, 200 steps: section 5.1 of the paper and
    # opt/optimize_instructions.py of its code. The steps do not overlap, every candidate is scored in full, and nothing
    # is confirmed.
    "paper": {
        "num_rounds": 200,
        "num_candidates": PAPER_CANDIDATES,
        "k_best": 20,
        "lag": 0,
        "pruner": None,
        "confirm": False,
    },
}
"""Preset -> its values. Explicit values override the preset."""

BOUNDS = (
    "num_rounds", "num_trials", "patience", "stop_at_score", "max_metric_calls", "max_full_evals", "max_tokens",
    "max_cost", "timeout_seconds",
)  # fmt: skip
"""Arguments that each can end a run."""

BUDGETS = ("num_trials", "max_metric_calls", "max_full_evals", "max_tokens", "max_cost", "timeout_seconds")
"""Arguments that say how much a run may spend. They override rounds and patience of the preset."""

MEANT: Mapping[str, str] = {
    "lm": "prompt_model",
    "optimizer_lm": "prompt_model",
    "scorer_lm": "task_model",
    "max_iterations": "num_rounds",
    "budget": "max_metric_calls",
    "num_iterations": "num_rounds",
}
"""Wrong name that is spelt like none of our arguments -> the argument that the user means."""


Count = Annotated[int | None, Field(ge=1)]
Limit = Annotated[float | None, Field(gt=0.0)]
Price = Annotated[float, Field(ge=0.0)]


class Arguments(TypedDict, total=False):
    """Our arguments by keyword: name, type, default and rule. `OPROTeleprompter` documents them.

    Where no default is given it is None. For most arguments None takes the preset's value.
    """

    prompt_model: Any
    task_model: Any
    proposer: Any
    teacher: Any
    name: str | None
    description: str | None

    auto: Annotated[Auto | None, Field("light")]
    num_rounds: Count
    num_candidates: Count
    num_trials: Count
    k_best: Count
    num_exemplars: Annotated[int, Field(3, ge=0)]
    init_temperature: Annotated[float, Field(1.0, ge=0.0)]
    max_train_examples: Count

    guidance: str | None
    max_instruction_chars: Count
    must_keep: Annotated[Sequence[str], Field(())]
    initial_instructions: Annotated[Sequence[str | Mapping[str, str]], Field(())]

    patience: Count
    min_delta: Annotated[float, Field(0.0, ge=0.0)]
    stop_at_score: float | None
    max_metric_calls: Count
    max_full_evals: Count
    max_tokens: Count
    max_cost: Limit
    prices: Mapping[str, tuple[Price, Price]] | None
    timeout_seconds: Limit
    stoppers: Annotated[Sequence[Callable[..., Any]], Field(())]

    confirm: Annotated[bool, Field(True)]
    pruner: Annotated[Any, Field("auto")]
    predictor_strategy: Annotated[Literal["all", "round_robin", "joint"], Field("all")]
    lag: Annotated[int | None, Field(ge=0)]
    minibatch_size: Count
    seed: Annotated[int, Field(0)]

    max_bootstrapped_demos: Annotated[int | None, Field(ge=0)]
    max_labeled_demos: Annotated[int | None, Field(ge=0)]
    max_rounds: Annotated[int, Field(1, ge=1)]
    metric_threshold: float | None
    teacher_settings: Mapping[str, Any] | None

    storage: Any
    study_name: str | None
    log_dir: str | Path | None
    callbacks: Annotated[Sequence[Callable[[Any, Any], None]], Field(())]
    track_stats: Annotated[bool, Field(True)]
    verbose: Annotated[bool, Field(False)]
    display_progress: Annotated[bool, Field(True)]

    num_threads: Count
    executor: Any
    max_errors: Count
    failure_score: Annotated[float, Field(0.0)]
    provide_traceback: bool | None
    example_timeout_seconds: Limit
    max_outage_seconds: Annotated[float, Field(300.0, gt=0.0)]
    dry_run: Annotated[bool, Field(False)]


def _field(kind: Any) -> Any:
    """An argument's type and default, for pydantic."""
    rules = [rule for rule in getattr(kind, "__metadata__", ()) if not rule.is_required()]
    return kind, rules[0].default if rules else None


HINTS = get_type_hints(Arguments, include_extras=True)
_Arguments: Any = create_model("_Arguments", **{name: _field(kind) for name, kind in HINTS.items()})


class OPROConfig(_Arguments):
    """The checked values of a run: metric, data and `Arguments`."""

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid", frozen=True, allow_inf_nan=False)

    metric: Callable[..., Any] | None = None
    trainset: Sequence[Any] | None = None
    valset: Sequence[Any] | None = None

    @field_validator("prompt_model", "task_model", mode="before")
    @classmethod
    def _model(cls, value: Any, info: Any) -> Any:
        name = info.field_name
        return _checked_lm(value, name, f"{name}=dspy.LM(...)")

    @field_validator("teacher_settings", mode="before")
    @classmethod
    def _teacher_settings(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            remedy = 'teacher_settings={"lm": dspy.LM(...)}'
            _checked_lm(value.get("lm"), "teacher_settings['lm']", remedy)
        return value

    @field_validator("metric", "pruner", "proposer", "executor", mode="before")
    @classmethod
    def _instance(cls, value: Any) -> Any:
        if isinstance(value, type):
            name = value.__name__
            raise ValueError(f"must be an instance, but is the class {name}. Write {name}().")
        return value

    @field_validator("pruner")
    @classmethod
    def _a_pruner(cls, value: Any) -> Any:
        is_known = value is None or (isinstance(value, str) and value == "auto")
        methods = ("checkpoints", "drop", "most_calls")
        missing = [name for name in methods if not hasattr(value, name)]
        if missing and not (is_known or hasattr(value, "prune")):
            hint = f" It lacks {' and '.join(missing)}." if len(missing) < len(methods) else ""
            raise ValueError(
                f'must be "auto", None, an Optuna pruner or a dspy_opro Pruner, but got {value!r}.{hint}'
            )
        return value

    @field_validator("executor")
    @classmethod
    def _an_executor(cls, value: Any) -> Any:
        if value is not None and not callable(getattr(value, "submit", None)):
            raise ValueError(f"must be a concurrent.futures.Executor, but got {value!r}.")
        return value

    @field_validator("metric", "proposer", mode="before")
    @classmethod
    def _callable(cls, value: Any, info: Any) -> Any:
        if value is not None and not callable(value):
            is_data = info.field_name == "metric" and isinstance(value, (list, tuple))
            hint = " The third argument of compile is metric; write valset=..." if is_data else ""
            raise ValueError(f"must be callable, but got {reprlib.repr(value)}.{hint}")
        return value

    @field_validator("stoppers", "callbacks", mode="before")
    @classmethod
    def _callables(cls, value: Any) -> Any:
        is_one = callable(value) or not isinstance(value, Iterable)
        items = [] if value is None else [value] if is_one else list(value)
        for item in items:
            if isinstance(item, type):
                name = item.__name__
                raise ValueError(f"must be instances, but one is the class {name}. Write {name}(...).")
            if not callable(item):
                raise ValueError(f"must hold callables, but got {item!r}.")
        return items

    @field_validator("log_dir")
    @classmethod
    def _home(cls, value: str | Path | None) -> str | Path | None:
        return value if value is None else type(value)(Path(value).expanduser())

    @field_validator("trainset", "valset", mode="before")
    @classmethod
    def _sequence(cls, value: Any) -> Any:
        if value is not None and (not isinstance(value, Sequence) or isinstance(value, (str, bytes))):
            raise ValueError(f"must be a list of dspy.Example, but got {reprlib.repr(value)}.")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> OPROConfig:
        if self.max_metric_calls is not None and self.max_full_evals is not None:
            raise ValueError("max_metric_calls and max_full_evals both limit the examples; give one of them.")
        if paper(self) and self.predictor_strategy == "joint" and self.proposer is None:
            raise ValueError(
                'predictor_strategy="joint" needs another proposer: the proposer of auto="paper" writes one '
                "instruction at a time. Pass proposer=... or another predictor_strategy."
            )
        return self

    @property
    def given(self) -> dict[str, Any]:
        """The given values: argument -> value, in the order of the fields."""
        return {name: getattr(self, name) for name in FIELDS if name in self.model_fields_set}

    @property
    def bounds(self) -> list[str]:
        """Names of the given arguments that may end the run."""
        given = [name for name in BOUNDS if getattr(self, name) is not None]
        return [*given, "stoppers"] if self.stoppers else given

    def resolve(self) -> OPROConfig:
        """This config with the values of the preset and the common defaults filled in.

        Raises:
            ValueError: Nothing would end the run. The constructor cannot check this, because scripts for MIPROv2 pass
                the bound to `compile`.
        """
        if self.auto is None and not self.bounds:
            raise ValueError(f"auto=None needs at least one bound: {', '.join(BOUNDS)} or stoppers.")
        values = {name: getattr(self, name) for name in FIELDS}
        preset = {"k_best": 20, **PRESETS.get(self.auto or "", {})}
        if any(getattr(self, name) is not None for name in BUDGETS):  # the preset then sets only sizes
            for name in ("num_rounds", "patience"):
                preset.pop(name, None)
        if (self.max_metric_calls or self.max_full_evals) and not paper(self):
            preset.pop("num_candidates", None)  # a larger budget has larger rounds
        if self.max_bootstrapped_demos == 0:  # no demos, or labeled ones alone
            preset = {name: value for name, value in preset.items() if name not in DEMOS}
        if self.num_trials is not None:
            if not paper(self):
                preset["num_candidates"] = usual_candidates(self.num_trials / PAPER_CANDIDATES)
            rounds = math.ceil(self.num_trials / (self.num_candidates or preset["num_candidates"]))
            preset["num_rounds"] = rounds
            values["num_rounds"] = min(rounds, self.num_rounds or rounds)
        for name, value in preset.items():
            if name not in self.model_fields_set or (values[name] is None and name != "pruner"):
                values[name] = value
        resolved: OPROConfig = OPROConfig.model_construct(_fields_set=self.model_fields_set, **values)
        return resolved


FIELDS = OPROConfig.model_fields
"""Our argument -> its type, default and rule. All of them, with metric and data."""


def make_config(values: Mapping[str, Any]) -> OPROConfig:
    """An `OPROConfig`. Its errors name the argument, the rule and the value.

    Raises:
        ValueError: A value is out of range or of the wrong type.
    """
    try:
        return OPROConfig(**values)
    except ValidationError as error:
        # pydantic reports an error for each type of a union. The message has the last one.
        sentences = {e["loc"][:1]: _sentence(dict(e)) for e in error.errors()}
        raise ValueError("\n".join(sentences.values())) from None


def _checked_lm(value: Any, name: str, remedy: str) -> Any:
    if not isinstance(value, (dspy.BaseLM, type(None))):
        raise TypeError(f"{name} must be a dspy.LM, but is {value!r}. Write {remedy}.")
    return value


_RULES: Mapping[str, str] = {
    "greater_than_equal": "must be at least {ge:g}",
    "greater_than": "must be above {gt:g}",
    "literal_error": "must be one of {expected}",
    "finite_number": "must be a finite number",
    "is_instance_of": "must be a {class}",
    "int": "must be a whole number",
    "float": "must be a number",
    "bool": "must be True or False",
    "string": "must be a text",
    "path": "must be a path",
    "sequence": "must be a list",
    "tuple": "must hold pairs of numbers",
}
"""pydantic's type of an error, or the first word of that type -> the rule in our words."""


def _sentence(error: dict[str, Any]) -> str:
    name, kind = str(error["loc"][0]) if error["loc"] else "", error["type"]
    message = str(error["msg"]).removeprefix("Value error, ")
    if kind == "value_error":
        return f"{name} {message}".strip()
    rule = _RULES.get(kind) or _RULES.get(kind.partition("_")[0])
    said = f"{name}: {message}" if rule is None else f"{name} {rule.format(**error.get('ctx', {}))}"
    if kind == "literal_error" and type(None) in get_args(OPROConfig.model_fields[name].annotation):
        said += ", or None"
    return f"{said}, but got {error['input']!r}."


def unknown_keyword(name: str, known: Iterable[str], where: str) -> TypeError:
    """The error for an unknown argument. It names the nearest known one and prefers our own arguments."""
    known = list(known)
    own = [argument for argument in known if argument in FIELDS]
    tries = (known, 0.85), (own, 0.5), (known, 0.5)  # first a typo of any name, then a similar name of ours
    near = [MEANT[name]] if MEANT.get(name) in known else []
    near += [hit for names, cutoff in tries for hit in difflib.get_close_matches(name, names, 1, cutoff)]
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return TypeError(f"{where} got an unexpected keyword argument {name!r}.{hint}")


def warn(message: str) -> None:
    """A `UserWarning` that points at the user's line: the first one outside this package and its wrappers."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _WRAPPERS:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)


_WRAPPERS = frozenset({"dspy_opro", "dspy", "mlflow", "functools", "contextlib"})


def paper(config: OPROConfig) -> bool:
    """Whether the run follows the paper to the letter."""
    return bool(config.auto == "paper")
