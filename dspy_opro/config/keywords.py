"""The keywords of `OPROTeleprompter`, and the meaning of the keywords of DSPy's own optimizers.

These are MIPROv2, COPRO, GEPA, BootstrapFewShot, BootstrapFewShotWithRandomSearch and SIMBA of DSPy 3.0 to 3.4.
`docs/migrating.md` explains them for each optimizer, with examples.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict, TypeVar

from .arguments import Auto, OPROConfig, make_config, unknown_keyword, warn

F = TypeVar("F", bound=Callable[..., Any])


class BuiltinKeywords(TypedDict, total=False):
    """Keywords of the built-in optimizers, constructor and `compile`, that are not arguments of ours."""

    breadth: int
    depth: int
    max_steps: int
    bsize: int
    block_size: int
    num_candidate_programs: int
    minibatch: bool
    minibatch_full_eval_steps: int
    reflection_lm: Any
    reflection_minibatch_size: int
    instruction_proposer: Any
    code_proposer: Any
    component_selector: Any
    candidate_selection_strategy: str
    skip_perfect_score: bool
    perfect_score: float
    add_format_failure_as_feedback: bool
    use_merge: bool
    max_merge_invocations: int | None
    warn_on_score_mismatch: bool
    track_best_outputs: bool
    use_wandb: bool
    wandb_api_key: str | None
    wandb_init_kwargs: Mapping[str, Any] | None
    use_mlflow: bool
    gepa_kwargs: Mapping[str, Any] | None
    max_demos: int
    demo_input_field_maxlen: int
    temperature_for_sampling: float
    temperature_for_candidates: float
    eval_kwargs: Mapping[str, Any]
    devset: Sequence[Any]
    restrict: Any
    labeled_sample: bool
    num_rules: int
    program_aware_proposer: bool
    data_aware_proposer: bool
    view_data_batch_size: int
    tip_aware_proposer: bool
    fewshot_aware_proposer: bool
    requires_permission_to_run: bool | None


class Arguments(BuiltinKeywords, total=False):
    """The arguments of the constructor. `compile` takes them too, for one call. `OPROConfig` has their defaults."""

    prompt_model: Any
    task_model: Any
    proposer: Any
    name: str | None
    description: str | None
    auto: Auto | None
    num_rounds: int | None
    num_candidates: int | None
    num_trials: int | None
    k_best: int | None
    num_exemplars: int
    init_temperature: float
    max_train_examples: int | None
    patience: int | None
    min_delta: float
    stop_at_score: float | None
    max_metric_calls: int | None
    max_full_evals: int | None
    max_tokens: int | None
    max_cost: float | None
    timeout_seconds: float | None
    stoppers: Sequence[Callable[..., Any]]
    confirm: bool
    pruner: Any
    predictor_strategy: Literal["all", "round_robin", "joint"]
    lag: int | None
    minibatch_size: int | None
    seed: int | None
    max_bootstrapped_demos: int | None
    max_labeled_demos: int | None
    max_rounds: int
    metric_threshold: float | None
    teacher_settings: Mapping[str, Any] | None
    storage: Any
    study_name: str | None
    log_dir: str | Path | None
    callbacks: Sequence[Callable[[Any, Any], None]]
    track_stats: bool
    verbose: bool
    display_progress: bool
    num_threads: int | None
    executor: Any
    max_errors: int | None
    failure_score: float
    provide_traceback: bool | None
    example_timeout_seconds: float | None
    max_outage_seconds: float


FIELDS = OPROConfig.model_fields

RENAMED: Mapping[str, str] = {
    "bsize": "minibatch_size",
    "breadth": "num_candidates",
    "depth": "num_rounds",
    "max_steps": "num_rounds",
    "num_candidate_programs": "num_trials",
    "reflection_lm": "prompt_model",
    "reflection_minibatch_size": "num_exemplars",
    "instruction_proposer": "proposer",
    "max_demos": "max_bootstrapped_demos",
    "temperature_for_candidates": "init_temperature",
    "devset": "trainset",
}
"""Keyword of a built-in optimizer -> our argument with the same meaning."""

UNUSED: Mapping[str, tuple[object, str]] = {
    "block_size": (None, "the unit of work is one example; minibatch_size sets the first checkpoint"),
    "minibatch_full_eval_steps": (5, "the race decides which candidates are scored in full, and when"),
    "code_proposer": (None, "OPRO rewrites only instructions"),
    "candidate_selection_strategy": ("pareto", "every proposal sees the best instructions so far"),
    "skip_perfect_score": (True, "the meta-prompt shows failures first"),
    "perfect_score": (1.0, "use stop_at_score to end the run at a score"),
    "add_format_failure_as_feedback": (False, "the meta-prompt shows every failure with its error"),
    "use_merge": (True, "OPRO always combines the best instructions of several predictors"),
    "max_merge_invocations": (5, "OPRO combines the best instructions of several predictors once per round"),
    "warn_on_score_mismatch": (True, "OPRO calls the metric once per prediction"),
    "track_best_outputs": (False, "OPRO does not keep the outputs"),
    "use_wandb": (False, "pass Optuna's callback as callbacks=[...]"),
    "wandb_api_key": (None, "pass Optuna's callback as callbacks=[...]"),
    "wandb_init_kwargs": (None, "pass Optuna's callback as callbacks=[...]"),
    "use_mlflow": (False, "call mlflow.dspy.autolog(log_compiles=True, log_evals=True)"),
    "gepa_kwargs": (None, "only GEPA itself can use them"),
    "demo_input_field_maxlen": (100_000, "OPRO never shortens a demo"),
    "temperature_for_sampling": (0.2, "the program runs with the temperature that it has later"),
    "restrict": (None, "OPRO considers every candidate"),
    "labeled_sample": (True, "OPRO always draws labeled demos at random"),
    "num_rules": (10, "an instruction is free text"),
    "program_aware_proposer": (True, "the meta-prompt always names the predictor's role"),
    "data_aware_proposer": (True, "num_exemplars says how many examples the meta-prompt shows"),
    "view_data_batch_size": (10, "num_exemplars says how many examples the meta-prompt shows"),
    "tip_aware_proposer": (True, "the styles of the requests are fixed"),
    "fewshot_aware_proposer": (True, "num_exemplars says how many examples the meta-prompt shows"),
}
"""Keyword without a meaning here -> (its default in DSPy, which causes no warning; why OPRO does not use it)."""

EVAL_KWARGS = ("num_threads", "max_errors", "failure_score", "provide_traceback", "display_progress")
"""Keywords of `dspy.Evaluate` that are arguments of ours too."""
EVAL_UNUSED = ("display_table", "save_as_csv", "save_as_json", "callback_metadata")


def _component_selector(value: Any) -> dict[str, Any]:
    if value in ("round_robin", "all"):
        return {"predictor_strategy": value}
    warn(f"component_selector={value!r} has no meaning for OPRO and is not used: use predictor_strategy.")
    return {}


def _permission(value: Any) -> dict[str, Any]:
    if value:
        raise ValueError("requires_permission_to_run must not be True: OPRO never asks. Leave it out.")
    return {}


def _eval_kwargs(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"eval_kwargs must be a dict, but is {type(value).__name__}.")
    for name in value:
        if name not in (*EVAL_KWARGS, *EVAL_UNUSED):
            raise unknown_keyword(name, EVAL_KWARGS, "eval_kwargs")
        if name in EVAL_UNUSED and value[name]:
            warn(f"{name} in eval_kwargs has no meaning for OPRO and is not used.")
    return {name: value[name] for name in EVAL_KWARGS if value.get(name) is not None}


COMPUTED: Mapping[str, Callable[[Any], dict[str, Any]]] = {
    "minibatch": lambda value: {} if value else {"pruner": None},
    "component_selector": _component_selector,
    "requires_permission_to_run": _permission,
    "eval_kwargs": _eval_kwargs,
}
"""Keyword of a built-in optimizer -> a function that turns its value into our arguments."""


def translate(keywords: Mapping[str, Any], ours: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The keywords of a built-in optimizer as arguments of `OPROConfig`.

    `ours` has our own arguments of the same call, and `where` names the called function in messages. None means
    "not given", as in the built-in optimizers.

    Raises:
        TypeError: A keyword is unknown; the message names the nearest known one.
        ValueError: Two keywords give the same argument different values.
    """
    found: dict[str, Any] = {}
    by: dict[str, str] = {}  # our argument -> the keyword that gave it
    for name, value in keywords.items():
        if name not in BuiltinKeywords.__annotations__:
            raise unknown_keyword(name, {**FIELDS, **BuiltinKeywords.__annotations__}, where)
        if value is None:
            continue
        for argument, meaning in _meaning(name, value).items():
            if argument == "pruner":  # from minibatch=False; an explicit pruner overrides it
                if "pruner" not in ours:
                    found["pruner"] = meaning
                continue
            default = FIELDS[argument].default
            own = found[argument] if argument in found else ours.get(argument, default)
            if own not in (None, default, meaning) or (argument in found and own != meaning):
                raise ValueError(
                    f"{name} and {by.get(argument, argument)} both say what {argument} is: "
                    f"{meaning!r} and {own!r}. Give one of them."
                )
            found[argument], by[argument] = meaning, name
    return found


def _meaning(name: str, value: Any) -> dict[str, Any]:
    if name in RENAMED:
        return {RENAMED[name]: value}
    if name in COMPUTED:
        return COMPUTED[name](value)
    silent, reason = UNUSED[name]
    if value != silent:
        warn(f"{name} has no meaning for OPRO and is not used: {reason}.")
    return {}


def given(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Our own arguments without those that are None. For `auto` and `pruner` None is a value."""
    ours = {name: value for name, value in arguments.items() if name in FIELDS}
    return {name: value for name, value in ours.items() if value is not None or name in ("auto", "pruner")}


def for_this_call(config: OPROConfig, arguments: Mapping[str, Any]) -> OPROConfig:
    """The constructor's `config` with the `arguments` of a `compile` call over it. None keeps a value of `config`."""
    ours = given(arguments)
    builtin = {name: value for name, value in arguments.items() if name not in FIELDS}
    before = {name: getattr(config, name) for name in config.model_fields_set}
    return make_config({**before, **ours, **translate(builtin, ours, "compile")})


def shows_arguments(function: F) -> F:
    """Decorator: the signature shows `**arguments` as named parameters. Tools and BetterTogether read the signature.

    Our own arguments come first, in the order of `OPROConfig`. The keywords of the built-in optimizers follow.
    """
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())
    defaults = {name: field.default for name, field in FIELDS.items() if name != "teacher"}
    defaults |= dict.fromkeys(sorted(BuiltinKeywords.__annotations__))
    shown = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
        for name, default in defaults.items()
        if name not in signature.parameters
    ]
    function.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*parameters[:-1], *shown, parameters[-1]]
    )
    return function
