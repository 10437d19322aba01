"""The keywords of DSPy's own optimizers and what they mean here.

The optimizers are MIPROv2, COPRO, GEPA, BootstrapFewShot, BootstrapFewShotWithRandomSearch and SIMBA of DSPy 3.0 to
3.4. `docs/migrating.md` explains the keywords for each optimizer, with examples.
"""

from __future__ import annotations

import inspect
import reprlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple, TypeVar, get_type_hints

from .arguments import FIELDS, Arguments, OPROConfig, make_config, unknown_keyword, warn

T = TypeVar("T", bound=type)


class Unused(NamedTuple):
    """A keyword without a meaning here."""

    default: object
    """The default in DSPy. It causes no warning."""
    reason: str


EVAL_KWARGS = ("num_threads", "max_errors", "failure_score", "provide_traceback", "display_progress")
"""Keywords of `dspy.Evaluate` that are arguments of ours too."""
EVAL_UNUSED = ("display_table", "save_as_csv", "save_as_json", "callback_metadata")


def _minibatch(value: Any) -> dict[str, Any]:
    """False means pruner=None. True, in `compile`, takes back the constructor's pruner=None."""
    return {} if value else {"pruner": None}


def _component_selector(value: Any) -> dict[str, Any]:
    """The same as predictor_strategy, for "all" and "round_robin"."""
    if value in ("round_robin", "all"):
        return {"predictor_strategy": value}
    warn(f"component_selector={value!r} has no meaning for OPRO and is not used: use predictor_strategy.")
    return {}


def _permission(value: Any) -> dict[str, Any]:
    """Must not be True, because OPRO never asks."""
    if value:
        raise ValueError("requires_permission_to_run must not be True: OPRO never asks. Leave it out.")
    return {}


def _eval_kwargs(value: Any) -> dict[str, Any]:
    """A dict with arguments of `dspy.Evaluate` that are also arguments here."""
    if not isinstance(value, Mapping):
        raise TypeError(f"eval_kwargs must be a dict, but is {type(value).__name__}.")
    for name in value:
        if name not in (*EVAL_KWARGS, *EVAL_UNUSED):
            raise unknown_keyword(name, EVAL_KWARGS, "eval_kwargs")
        if name in EVAL_UNUSED and value[name]:
            warn(f"{name} in eval_kwargs has no meaning for OPRO and is not used.")
    return {name: value[name] for name in EVAL_KWARGS if value.get(name) is not None}


_WANDB = "pass Optuna's callback as callbacks=[...]"
_EXEMPLARS = "num_exemplars says how many examples the meta-prompt shows"


class Keywords(Arguments, total=False):
    """`Arguments` and the keywords of the built-in optimizers.

    Each keyword has its type and its meaning: the name of our argument, a function that turns the value into our
    arguments, or `Unused`.
    """

    breadth: Annotated[int, "num_candidates"]
    bsize: Annotated[int, "minibatch_size"]
    depth: Annotated[int, "num_rounds"]
    devset: Annotated[Sequence[Any], "trainset"]
    instruction_proposer: Annotated[Any, "proposer"]
    additional_instructions: Annotated[str, "guidance"]
    max_chars: Annotated[int, "max_instruction_chars"]
    max_demos: Annotated[int, "max_bootstrapped_demos"]
    max_steps: Annotated[int, "num_rounds"]
    num_candidate_programs: Annotated[int, "num_trials"]
    reflection_lm: Annotated[Any, "prompt_model"]
    reflection_minibatch_size: Annotated[int, "num_exemplars"]
    temperature_for_candidates: Annotated[float, "init_temperature"]

    component_selector: Annotated[Any, _component_selector]
    eval_kwargs: Annotated[Mapping[str, Any], _eval_kwargs]
    minibatch: Annotated[bool, _minibatch]
    requires_permission_to_run: Annotated[bool | None, _permission]

    add_format_failure_as_feedback: Annotated[bool, Unused(False, "the meta-prompt shows every error")]
    block_size: Annotated[int, Unused(None, "minibatch_size sets the first checkpoint")]
    candidate_selection_strategy: Annotated[str, Unused("pareto", "proposals see the best instructions")]
    code_proposer: Annotated[Any, Unused(None, "OPRO rewrites only instructions")]
    data_aware_proposer: Annotated[bool, Unused(True, _EXEMPLARS)]
    demo_input_field_maxlen: Annotated[int, Unused(100_000, "OPRO never shortens a demo")]
    fewshot_aware_proposer: Annotated[bool, Unused(True, _EXEMPLARS)]
    gepa_kwargs: Annotated[Mapping[str, Any] | None, Unused(None, "only GEPA itself can use them")]
    labeled_sample: Annotated[bool, Unused(True, "OPRO always draws labeled demos at random")]
    max_merge_invocations: Annotated[int | None, Unused(5, "OPRO merges once per round")]
    minibatch_full_eval_steps: Annotated[int, Unused(5, "the race decides who is scored in full")]
    num_rules: Annotated[int, Unused(10, "an instruction is free text")]
    perfect_score: Annotated[float, Unused(1.0, "use stop_at_score to end the run at a score")]
    program_aware_proposer: Annotated[bool, Unused(True, "the meta-prompt always names the predictor's role")]
    restrict: Annotated[Any, Unused(None, "OPRO considers every candidate")]
    skip_perfect_score: Annotated[bool, Unused(True, "the meta-prompt shows failures first")]
    temperature_for_sampling: Annotated[float, Unused(0.2, "the program keeps its temperature")]
    tip_aware_proposer: Annotated[bool, Unused(True, "the styles of the requests are fixed")]
    track_best_outputs: Annotated[bool, Unused(False, "OPRO does not keep the outputs")]
    use_merge: Annotated[bool, Unused(True, "OPRO always merges the best instructions")]
    use_mlflow: Annotated[bool, Unused(False, "call mlflow.dspy.autolog(log_compiles=True, log_evals=True)")]
    use_wandb: Annotated[bool, Unused(False, _WANDB)]
    view_data_batch_size: Annotated[int, Unused(10, _EXEMPLARS)]
    wandb_api_key: Annotated[str | None, Unused(None, _WANDB)]
    wandb_init_kwargs: Annotated[Mapping[str, Any] | None, Unused(None, _WANDB)]
    warn_on_score_mismatch: Annotated[bool, Unused(True, "OPRO calls the metric once per prediction")]


BUILTIN: Mapping[str, Any] = {
    name: hint.__metadata__[0]
    for name, hint in get_type_hints(Keywords, include_extras=True).items()
    if name not in FIELDS
}
"""Keyword of a built-in optimizer -> its meaning: a name, a function or `Unused`."""


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
        if name not in BUILTIN:
            raise unknown_keyword(name, [*FIELDS, *BUILTIN], where)
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
                    f"{reprlib.repr(meaning)} and {reprlib.repr(own)}. Give one of them."
                )
            found[argument], by[argument] = meaning, name
    return found


def _meaning(name: str, value: Any) -> dict[str, Any]:
    meaning = BUILTIN[name]
    if isinstance(meaning, str):
        return {meaning: value}
    if callable(meaning):
        return dict(meaning(value))
    if value != meaning.default:
        warn(f"{name} has no meaning for OPRO and is not used: {meaning.reason}.")
    return {}


def configure(
    arguments: Mapping[str, Any], where: str, before: Mapping[str, Any] | None = None
) -> OPROConfig:
    """The config for the `arguments` of a call over the values `before`.

    None in `arguments` means "not given"; for `auto` and `pruner` None is a value.
    """
    is_given = {name: value is not None or name in ("auto", "pruner") for name, value in arguments.items()}
    ours = {name: value for name, value in arguments.items() if name in FIELDS and is_given[name]}
    builtin = {name: value for name, value in arguments.items() if name not in FIELDS}
    before = dict(before or {})
    if arguments.get("minibatch") and "pruner" in before and before["pruner"] is None:
        before["pruner"] = "auto"
    return make_config({**before, **ours, **translate(builtin, ours, where)})


def shows_keywords(cls: T) -> T:
    """Decorator: signatures and docstring of the class show the keywords behind `**arguments`.

    Our own arguments come first. Tools and BetterTogether read the signatures.
    """
    for method in (cls.__init__, cls.compile, cls.acompile):  # type: ignore[attr-defined, misc]
        signature = inspect.signature(method)
        *parameters, variable = signature.parameters.values()
        defaults = {name: field.default for name, field in FIELDS.items()} | dict.fromkeys(BUILTIN)
        parameters += [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
            for name, default in defaults.items()
            if name not in signature.parameters
        ]
        # On the function itself, below DSPy's wrappers: its callbacks name the arguments by it.
        function: Any = inspect.unwrap(method)
        function.__signature__ = signature.replace(parameters=[*parameters, variable])
    cls.__doc__ = f"{inspect.cleandoc(cls.__doc__ or '')}\n\n{keywords_help()}"
    return cls


def keywords_help() -> str:
    """The keywords of the built-in optimizers in three groups, a line for each."""
    groups: dict[str, list[str]] = {"Other names": [], "Translated": [], "Not used": []}
    for name, meaning in BUILTIN.items():
        if isinstance(meaning, str):
            groups["Other names"].append(f"{name}: {meaning}.")
        elif callable(meaning):
            groups["Translated"].append(f"{name}: {meaning.__doc__}")
        else:
            groups["Not used"].append(f"{name}: {meaning.reason}.")
    texts = [f"{title}\n" + textwrap.indent("\n".join(lines), "    ") for title, lines in groups.items()]
    return "Keywords of DSPy's own optimizers:\n" + textwrap.indent("\n\n".join(texts), "    ")
