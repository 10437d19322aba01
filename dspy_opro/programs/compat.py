"""Differences between DSPy 3.0 and 3.4, and workarounds for both. Each names the version and the reason."""

from __future__ import annotations

import copy
import importlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import dspy
from dspy.utils.callback import ACTIVE_CALL_ID, BaseCallback, with_callbacks

from .secrets import without_secrets

HAS_COMPILE_CALLBACKS = hasattr(BaseCallback, "on_compile_start")
"""DSPy 3.3 and later call callbacks for `compile`."""

_LM_CLASS = "_dspy_lm_class"
"""Key of the class in an LM's state (DSPy 3.3 and later)."""

_VERSION = tuple(int(part) for part in dspy.__version__.split(".")[:2])
_COPIES_SHALLOWLY = _VERSION >= (3, 3)

EMPTY_USAGE_MEANS_CACHED = _VERSION == (3, 0)
"""DSPy 3.0.0 marks a cached answer only by an empty dict as its usage. In 3.4 a server that sends none has one, too."""

UNMARKED_RESPONSES: tuple[type, ...] = (dspy.lm15.Response, tuple) if hasattr(dspy, "lm15") else ()
"""What DSPy 3.4's own engine answers: one response, or several. They don't say whether they come from the cache."""

# -- instructions --------------------------------------------------------------------------------

# Class in dspy.predict -> first words of the text that it appends to the user's, at the start of a line. Wording of
# DSPy 3.0 to 3.4.
_ANCHORS: Mapping[str, tuple[str, ...]] = {
    "ReAct": ("You are an Agent. In each episode, you will be given the fields",),
    "ReActV2": ("You are an Agent. Use the supplied tools to produce",),
    "CodeAct": ("You are an intelligent agent. For each episode, you will receive the fields",),
    "ProgramOfThought": ("You will be given `", "You are given `", "Given the final code `"),
    "RLM": (
        "You are tasked with producing the following outputs given the inputs",
        "Based on the REPL trajectory, extract the final outputs now.",
    ),
}
# Class in dspy.predict -> the text that it puts before the user's.
_LEADS: Mapping[str, str] = {"RLM": "The trajectory was generated with the following objective: \n"}


def canonical(text: str) -> str:
    """The text as a signature returns it: `with_instructions` of DSPy 3.0 to 3.4 runs `inspect.cleandoc`."""
    return inspect.cleandoc(text)


def task_text(program: dspy.Module, predictor: Any) -> tuple[str, str, str]:
    """A predictor's instructions as (prefix, task text, suffix). A module of DSPy wrote the prefix and the suffix.

    ReAct, ReActV2, CodeAct and RLM write tool lists and rules around the user's instructions, and keep the user's
    signature as `signature`. ProgramOfThought writes only its own text. The first words of these additions find them,
    even after a rewrite of the task text. For other modules the text of `signature` separates the three parts, if the
    predictor has other inputs than this signature.
    """
    instructions = predictor.signature.instructions
    owner = _owner(program, predictor)
    names = [c.__name__ for c in type(owner).__mro__ if c.__module__.startswith("dspy.predict")]
    prefix = next((lead for n in names if instructions.startswith(lead := _LEADS.get(n, "\0"))), "")
    for anchor in (a for n in names for a in _ANCHORS.get(n, ())):
        match = re.compile(rf"(?m)^{re.escape(anchor)}").search(instructions)
        if match:
            between = instructions[len(prefix) : match.start()]
            task = between.rstrip("\n")
            return prefix, task, between[len(task) :] + instructions[match.start() :]
    signature: Any = None if names else getattr(owner, "signature", None)
    given = getattr(signature, "instructions", None)
    if given and {*signature.input_fields} != {*predictor.signature.input_fields}:
        match = re.compile(rf"(?m)^{re.escape(given)}$").search(instructions, len(prefix))
        if match:
            return instructions[: match.start()], given, instructions[match.end() :]
    return "", instructions, ""


def _owner(program: dspy.Module, predictor: Any) -> Any:
    """The innermost module around the predictor that has a signature."""
    owner = None
    # Breadth first, so the last one is the innermost.
    for _, module in program.named_sub_modules(dspy.Module):
        if module is predictor or isinstance(module, dspy.Predict) or not hasattr(module, "signature"):
            continue
        if any(inner is predictor for inner in module.predictors()):
            owner = module
    return owner


# -- modules -------------------------------------------------------------------------------------


def defines(module: object, method: str, base: type = dspy.Module) -> bool:
    """Whether a module, or an LM as a `dspy.BaseLM`, has its own `method`. The one of `base` only raises.

    Looks at the class and the instance's dict (KNNFewShot sets `forward` there), because `module.forward` logs a
    warning.
    """
    inherited = getattr(base, method, None)
    return method in getattr(module, "__dict__", ()) or getattr(type(module), method, None) is not inherited


def predictor_state(predictor: Any) -> dict[str, Any]:
    """`predictor.dump_state()` without its LM: up to DSPy 3.2 an LM need not have `dump_state`.

    All demos are dicts. In the first releases of DSPy 3.0 `dump_state` returns examples.
    """
    bare = copy.copy(predictor)
    bare.lm = None
    state = {key: value for key, value in bare.dump_state().items() if key not in ("lm", "traces", "train")}
    return {**state, "demos": [d if isinstance(d, dict) else dict(d.items()) for d in state["demos"]]}


# -- language models -----------------------------------------------------------------------------


def model_name(lm: Any) -> str:
    """The name of an LM, without keys and addresses."""
    return "" if lm is None else str(getattr(lm, "model", type(lm).__name__))


def is_async_only_lm(lm: Any) -> bool:
    """Whether an LM has an `aforward` of its own and no `forward`. Those of `dspy.BaseLM` only raise."""
    return defines(lm, "aforward", dspy.BaseLM) and not defines(lm, "forward", dspy.BaseLM)


def can_be_awaited(lm: Any) -> bool:
    """Whether `lm.acall` works. A custom engine (DSPy 3.4) may have no async counterpart, which has no public name."""
    if isinstance(lm, dspy.LM) and not isinstance(getattr(lm, "engine", ""), str):
        return getattr(lm, "_async_engine_spec", None) is not None
    return defines(lm, "aforward", dspy.BaseLM)


def copy_lm(lm: Any, **kwargs: Any) -> Any:
    """A copy of an LM with other kwargs and an empty history.

    Up to DSPy 3.2 `lm.copy` is a deep copy: slow with a long history, and a TypeError if the LM holds a lock.
    No kwarg may be None: None removes the key, and up to DSPy 3.3 a truncated answer then raises KeyError.
    """
    if _COPIES_SHALLOWLY:
        return lm.copy(**kwargs)
    new = copy.copy(lm)
    new.history = []
    new.kwargs = {**lm.kwargs, **kwargs}
    new.callbacks = list(getattr(lm, "callbacks", None) or [])
    return new


def sampling_lm(lm: Any, temperature: float, rollout_id: int) -> Any:
    """A copy of an LM with its own cached answer for each `rollout_id`.

    Only `dspy.LM` knows `rollout_id`: the id is part of its cache key and not of the request. Any other `BaseLM` would
    get it as an unknown argument of `forward`. Such an LM does not use DSPy's cache, so it is returned unchanged.
    """
    if not isinstance(lm, dspy.LM):
        return lm
    if "max_completion_tokens" in lm.kwargs:  # a reasoning model: providers accept only its own temperature
        own = lm.kwargs.get("temperature")
        return copy_lm(lm, rollout_id=rollout_id, temperature=1.0 if own is None else own)
    if temperature == 0.0:  # a rollout_id has no effect then, and DSPy warns
        return copy_lm(lm, temperature=0.0)
    return copy_lm(lm, rollout_id=rollout_id, temperature=temperature)


def without_temperature(lm: Any) -> Any:
    """A copy of an LM whose requests have no temperature. The kwarg is None, as in an LM made without one."""
    new = copy_lm(lm)
    new.kwargs = {**new.kwargs, "temperature": None}
    return new


def is_cut(lm: Any) -> bool:
    """Whether the last answer of a `sampling_lm` ended at `max_tokens`. Without a history nobody knows.

    Other threads may add to the history of an LM that is no `dspy.LM`.
    """
    response = lm.history[-1]["response"] if isinstance(lm, dspy.LM) and lm.history else None
    answers = getattr(response, "choices", None) or [response]  # DSPy 3.4's own engine gives one response
    return any(getattr(answer, "finish_reason", None) == "length" for answer in answers)


def refuses_temperature(error: BaseException) -> bool:
    """Whether a provider's error is about the temperature.

    The words tell: the error classes are litellm's up to DSPy 3.2, DSPy's from 3.3 on, and differ between providers.
    """
    return "temperature" in str(error).lower()


def dump_lm(lm: Any) -> dict[str, Any]:
    """An LM's `dump_state()` with its class and without its secrets.

    Up to DSPy 3.2 only `dspy.LM` has `dump_state`, and the state does not name the class.
    """
    if not hasattr(lm, "dump_state"):
        raise TypeError(f"{type(lm).__name__} has no dump_state()")
    return {_LM_CLASS: f"{type(lm).__module__}.{type(lm).__qualname__}", **without_secrets(lm.dump_state())}


def dump_module(module: dspy.Module) -> Any:
    """A module's `dump_state()` without the secrets of its predictors' LMs."""

    def strip(state: Any) -> Any:
        if not isinstance(state, dict):
            return state
        return {k: (without_secrets if k == "lm" else strip)(value) for k, value in state.items()}

    return strip(module.dump_state())


def forget_secrets(module: dspy.Module) -> None:
    """Give the predictors of a module LMs without secrets. DSPy's `save` leaves out only the `api_key`."""
    for predictor in module.predictors():
        if predictor.lm is None:
            continue
        predictor.lm = lm = copy.copy(predictor.lm)
        for name in ("kwargs", "launch_kwargs", "train_kwargs"):
            if hasattr(lm, name):
                setattr(lm, name, without_secrets(getattr(lm, name)))


def load_lm(state: Mapping[str, Any]) -> Any:
    """The LM that `dump_lm` wrote. This imports its class."""
    given = dict(state)
    if "max_completion_tokens" in given:  # up to DSPy 3.3 the constructor takes only the other name
        given["max_tokens"] = given.pop("max_completion_tokens")
    path = given[_LM_CLASS]
    module, _, name = path.rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"The LM class {path} can't be imported: {error}.") from error
    if not (isinstance(kind, type) and issubclass(kind, dspy.BaseLM)):
        raise ValueError(f"{path} is no LM class.")
    if hasattr(kind, "load_state"):  # DSPy 3.3 and later, and classes that define it
        return kind.load_state(given)
    return kind(**{key: value for key, value in given.items() if key != _LM_CLASS})


def load_module(module: dspy.Module, state: Any) -> None:
    """`load_state` for a trusted state. From DSPy 3.2 on only an extra argument keeps the addresses of the LMs."""
    unsafe = "allow_unsafe_lm_state" in inspect.signature(module.load_state).parameters
    module.load_state(state, **({"allow_unsafe_lm_state": True} if unsafe else {}))


# -- callbacks -----------------------------------------------------------------------------------


def with_compile_callbacks(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: DSPy's callbacks hear of `acompile`. DSPy 3.3 and later decorate only `compile`.

    Earlier versions have no such callbacks, and their decorator would take the teleprompter for a module.
    """
    return with_callbacks(function) if HAS_COMPILE_CALLBACKS else function


@contextmanager
def called_by(call_id: str | None) -> Iterator[None]:
    """Callbacks see `call_id` as the parent of the calls in this context; None changes nothing."""
    token = ACTIVE_CALL_ID.set(ACTIVE_CALL_ID.get() if call_id is None else call_id)
    try:
        yield
    finally:
        ACTIVE_CALL_ID.reset(token)
