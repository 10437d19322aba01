"""What differs between DSPy 3.0 and 3.4, and their quirks, each with the version and the reason."""

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

HAS_COMPILE_CALLBACKS = hasattr(BaseCallback, "on_compile_start")
"""DSPy 3.3 and later tell their callbacks of `compile`."""

_LM_CLASS = "_dspy_lm_class"
"""Key under which DSPy 3.3 and later keep the class in an LM's state."""

_SECRET = re.compile(r"(?i)(_key|_token|secret|password|headers)$")
"""Arguments of an LM that are no one else's to read: keys, tokens, and headers, which may carry either."""

_COPIES_SHALLOWLY = tuple(int(part) for part in dspy.__version__.split(".")[:2]) >= (3, 3)

# -- instructions --------------------------------------------------------------------------------

# Class in dspy.predict -> where the text begins that it puts after the user's, at the start of a line. Wording of
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
# Class in dspy.predict -> what it puts before the user's text.
_LEADS: Mapping[str, str] = {"RLM": "The trajectory was generated with the following objective: \n"}


def canonical(text: str) -> str:
    """A text as a signature gives it back: `with_instructions` runs `inspect.cleandoc` in DSPy 3.0 to 3.4."""
    return inspect.cleandoc(text)


def task_text(program: dspy.Module, predictor: Any) -> tuple[str, str, str]:
    """A predictor's instructions as (prefix, task text, suffix); prefix and suffix are a module's own words.

    ReAct, ReActV2, CodeAct and RLM write tool lists and rules around the text of the signature that they were
    given, and keep that signature as `signature`. ProgramOfThought writes its own text alone. What these modules
    add is found by how it begins, as the text may have been rewritten since; what others add, by the signature's text.
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
    given = getattr(getattr(owner, "signature", None), "instructions", None)
    if given:
        match = re.compile(rf"(?m)^{re.escape(given)}$").search(instructions, len(prefix))
        if match:
            return instructions[: match.start()], given, instructions[match.end() :]
    return "", instructions, ""


def _owner(program: dspy.Module, predictor: Any) -> Any:
    """The nearest module around the predictor that was given a signature."""
    owner = None
    for _, module in program.named_sub_modules(dspy.Module):  # breadth first: the last one is the nearest
        if module is predictor or isinstance(module, dspy.Predict) or not hasattr(module, "signature"):
            continue
        if any(inner is predictor for inner in module.predictors()):
            owner = module
    return owner


# -- modules -------------------------------------------------------------------------------------


def defines(module: object, method: str) -> bool:
    """Whether a module has a method of its own where `dspy.Module` has none that works.

    Looks at the class and at the instance's dict (KNNFewShot sets `forward` there): to ask a module for its
    `forward` logs a warning.
    """
    return method in vars(module) or getattr(type(module), method, None) is not getattr(
        dspy.Module, method, None
    )


def predictor_state(predictor: Any) -> dict[str, Any]:
    """`predictor.dump_state()` without its LM, which up to DSPy 3.2 need not have such a method.

    Demos are dicts in it; the first releases of DSPy 3.0 leave them examples.
    """
    bare = copy.copy(predictor)
    bare.lm = None
    state = {key: value for key, value in bare.dump_state().items() if key not in ("lm", "traces", "train")}
    return {**state, "demos": [d if isinstance(d, dict) else dict(d.items()) for d in state["demos"]]}


# -- language models -----------------------------------------------------------------------------


def model_name(lm: Any) -> str:
    """An LM as `model`, without keys or addresses."""
    return "" if lm is None else str(getattr(lm, "model", type(lm).__name__))


def copy_lm(lm: Any, **kwargs: Any) -> Any:
    """A copy of an LM with other kwargs and an empty history; the LM itself is unchanged.

    Up to DSPy 3.2 `lm.copy` is a deep copy: slow with a long history, and a TypeError where the LM holds a lock.
    No kwarg may be None: that removes the key, and up to DSPy 3.3 an answer that is cut off then raises KeyError.
    """
    if _COPIES_SHALLOWLY:
        return lm.copy(**kwargs)
    new = copy.copy(lm)
    new.history = []
    new.kwargs = {**lm.kwargs, **kwargs}
    new.callbacks = list(getattr(lm, "callbacks", None) or [])
    return new


def sampling_lm(lm: Any, temperature: float, rollout_id: int) -> Any:
    """An LM that answers anew for each `rollout_id` and the same when asked again with it.

    Only `dspy.LM` knows `rollout_id`: it is part of its cache's key and is taken out of the request. Any other
    `BaseLM` would get it as an unknown argument of `forward`; those have no cache of DSPy's, and stay as they are.
    """
    if not isinstance(lm, dspy.LM):
        return lm
    if "max_completion_tokens" in lm.kwargs:  # a reasoning model: providers refuse it another temperature
        own = lm.kwargs.get("temperature")
        return copy_lm(lm, rollout_id=rollout_id, temperature=1.0 if own is None else own)
    if temperature == 0.0:
        # A rollout_id without a temperature changes nothing, and DSPy warns.
        return copy_lm(lm, temperature=0.0)
    return copy_lm(lm, rollout_id=rollout_id, temperature=temperature)


def without_temperature(lm: Any) -> Any:
    """A copy of an LM whose requests do not name a temperature: None, as in an LM that was given none."""
    new = copy_lm(lm)
    new.kwargs = {**new.kwargs, "temperature": None}
    return new


def refuses_temperature(error: BaseException) -> bool:
    """Whether a provider's error is about the temperature.

    By its words: the classes are litellm's up to DSPy 3.2, DSPy's own from 3.3 on, and differ between providers.
    """
    return "temperature" in str(error).lower()


def dump_lm(lm: Any) -> dict[str, Any]:
    """An LM's `dump_state()`, always with its class and never with its secrets.

    Up to DSPy 3.2 only `dspy.LM` has such a method, and it does not name the class.
    """
    if not hasattr(lm, "dump_state"):
        raise TypeError(f"{type(lm).__name__} has no dump_state()")
    return {_LM_CLASS: f"{type(lm).__module__}.{type(lm).__qualname__}", **_without_key(lm.dump_state())}


def dump_module(module: dspy.Module) -> Any:
    """A module's `dump_state()`, its predictors' LMs without their API keys."""
    return _without_keys(module.dump_state())


def _without_keys(state: Any) -> Any:
    if not isinstance(state, dict):
        return state
    return {name: (_without_key if name == "lm" else _without_keys)(value) for name, value in state.items()}


def _without_key(state: Any) -> Any:
    """An LM's state without its secrets; DSPy itself leaves out the `api_key` alone, and 3.0.0 not even that."""
    return {k: v for k, v in state.items() if not _SECRET.search(k)} if isinstance(state, dict) else state


def load_lm(state: Mapping[str, Any]) -> Any:
    """The LM that `dump_lm` wrote; imports its class."""
    given = dict(state)
    if (
        "max_completion_tokens" in given
    ):  # a reasoning model: up to DSPy 3.3 its constructor wants the other name
        given["max_tokens"] = given.pop("max_completion_tokens")
    path = given[_LM_CLASS]
    module, _, name = path.rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"The LM class {path} can't be imported: {error}.") from error
    if not (isinstance(kind, type) and issubclass(kind, dspy.BaseLM)):
        raise ValueError(f"{path} is no LM class.")
    if hasattr(kind, "load_state"):  # DSPy 3.3 and later, and classes of their own
        return kind.load_state(given)
    return kind(**{key: value for key, value in given.items() if key != _LM_CLASS})


def load_module(module: dspy.Module, state: Any) -> None:
    """`load_state` for a state that is trusted: from DSPy 3.2 on it must be told to keep the LMs' addresses."""
    unsafe = "allow_unsafe_lm_state" in inspect.signature(module.load_state).parameters
    module.load_state(state, **({"allow_unsafe_lm_state": True} if unsafe else {}))


# -- callbacks -----------------------------------------------------------------------------------


def with_compile_callbacks(function: Callable[..., Any]) -> Callable[..., Any]:
    """Tell DSPy's callbacks of `acompile`, as DSPy 3.3 and later do for `compile` alone.

    Earlier ones have no such callbacks; their decorator would take the teleprompter for a module.
    """
    return with_callbacks(function) if HAS_COMPILE_CALLBACKS else function


@contextmanager
def called_by(call_id: str | None) -> Iterator[None]:
    """Let callbacks see `call_id` as the parent of what is called within; None changes nothing."""
    if call_id is None:
        yield
        return
    token = ACTIVE_CALL_ID.set(call_id)
    try:
        yield
    finally:
        ACTIVE_CALL_ID.reset(token)
