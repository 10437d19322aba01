"""A teleprompter's arguments as JSON and back. What can't come back the same is an error when it is written.

Values that JSON does not know are dicts with one key that begins with `$`. Reading imports what it is told and calls
it, as unpickling does: for trusted input only.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import dspy

from dspy_opro.programs.compat import dump_lm, dump_module, load_lm, load_module

from .arguments import OPROConfig, unknown_keyword


def to_json(config: OPROConfig) -> dict[str, Any]:
    """The arguments that were given, as plain JSON.

    Raises:
        ValueError: One of them can't be written; the message names it, the reason and the remedy.
    """
    written = {}
    for name in OPROConfig.model_fields:
        if name not in config.model_fields_set:
            continue
        value = getattr(config, name)
        if name in ("trainset", "valset") and value is not None:
            written[name] = encode_dataset(value, name)
        elif name == "storage" and not isinstance(value, (str, type(None))):
            raise refusal(name, "is an object", "Write storage as a URL, or pass the object to compile(...).")
        else:
            written[name] = encode(value, name)
    return written


def from_json(written: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments out of what `to_json` wrote. It imports and calls what is named there.

    Raises:
        TypeError: An argument is unknown.
        ValueError: Something that is named can't be imported or made.
    """
    for name in written:
        if name not in OPROConfig.model_fields:
            raise unknown_keyword(name, OPROConfig.model_fields, "from_config")
    return {name: decode(value, name) for name, value in written.items()}


# -- writing -------------------------------------------------------------------------------------


def encode(value: Any, place: str) -> Any:
    """One value as JSON; `place` is its name in messages."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, list):
        return [encode(item, f"{place}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, tuple):
        return {"$tuple": encode(list(value), place)}
    if isinstance(value, Mapping):
        return _mapping(value, place)
    if isinstance(value, dspy.BaseLM):
        return {"$lm": _language_model(value, place)}
    if isinstance(value, functools.partial):
        parts = [value.func, list(value.args), dict(value.keywords)]
        return {"$partial": [encode(part, place) for part in parts]}
    if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType, types.MethodType)):
        return _callable(value, place)
    return _instance(value, place)


def _mapping(value: Mapping[Any, Any], place: str) -> dict[str, Any]:
    for key in value:
        if not isinstance(key, str) or key.startswith("$"):
            raise refusal(place, f"has the key {key!r}", "Keys must be strings that do not begin with $.")
    return {key: encode(item, f"{place}[{key!r}]") for key, item in value.items()}


def _language_model(lm: Any, place: str) -> Any:
    try:
        return _plain(dump_lm(lm), place)
    except Exception as error:
        name = type(lm).__name__
        remedy = f"Give {name} a dump_state() of JSON values, or pass it to compile(...)."
        raise refusal(place, f"is a {name} whose state can't be written ({error})", remedy) from error


def _callable(value: Any, place: str) -> dict[str, Any]:
    owner = getattr(value, "__self__", None)
    if isinstance(value, types.MethodType) and not isinstance(owner, type):
        return {"$method": [encode(owner, place), value.__name__]}
    name = getattr(value, "__qualname__", "")
    kind = "lambda" if "<lambda>" in name else "local" if "<locals>" in name else ""
    if kind:
        what = "is a lambda" if kind == "lambda" else f"is {name}, which exists inside a function only"
        raise refusal(place, f"{what} and has no import path", "Define it with def or class in a module.")
    path = _path(value.__module__, name, value)
    try:
        found = import_name(path, place)
    except ValueError:
        found = None
    if found != value:
        raise refusal(
            place, f"is not what can be imported as {path}", "Define it with def or class in a module."
        )
    return {"$import": path}


def _path(module: str, name: str, value: Any) -> str:
    """The shortest path that leads to the value: `optuna.pruners:NopPruner`, not the private module behind it."""
    parts = module.split(".")
    for count in range(1, len(parts)):
        package = sys.modules.get(".".join(parts[:count]))
        if getattr(package, name, None) is value:
            return f"{'.'.join(parts[:count])}:{name}"
    return f"{module}:{name}"


def _instance(value: Any, place: str) -> dict[str, Any]:
    """An object by its class, the arguments of its constructor as its attributes show them, and its state."""
    made: dict[str, Any] = {"$new": _callable(type(value), place)["$import"]}
    arguments = {}
    for name, parameter in _parameters(type(value)).items():
        found = getattr(value, name, getattr(value, f"_{name}", parameter.default))
        # An attribute of None may stand for a default of "auto" (Optuna's SuccessiveHalvingPruner).
        if parameter.default is not parameter.empty and (found is None or found == parameter.default):
            continue
        arguments[name] = encode(found, f"{place}.{name}")
    if arguments:
        made["arguments"] = arguments
    if isinstance(value, dspy.Module):
        made["state"] = _state(value, place)
    try:
        same = _equal(decode(made, place), value)
    except Exception as error:
        raise refusal(place, f"is an object that can't be made anew ({error})", _REMEDY) from error
    if not same:
        raise refusal(place, "is an object whose attributes do not tell how it was made", _REMEDY)
    return made


_REMEDY = "Keep each argument of its constructor in an attribute of that name, or pass it to compile(...)."


def _parameters(kind: type) -> Mapping[str, inspect.Parameter]:
    """The arguments of a class's constructor by name."""
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    # Of `__init__`: what dspy.Module's metaclass shows for the class is `(*args, **kwargs)`.
    initialize: Any = kind.__init__  # type: ignore[misc]
    parameters = list(inspect.signature(initialize).parameters.items())[1:]
    return {name: parameter for name, parameter in parameters if parameter.kind not in variable}


def _state(module: dspy.Module, place: str) -> Any:
    try:
        return _plain(dump_module(module), place)
    except Exception as error:
        raise refusal(
            place, f"has a state that can't be written ({error})", "Pass it to compile(...)."
        ) from error


def _equal(one: Any, other: Any) -> bool:
    """Whether two objects are the same in all that their attributes say."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dspy.BaseLM):
        return bool(dump_lm(one) == dump_lm(other))
    if isinstance(one, dspy.Predict):
        return bool(dump_module(one) == dump_module(other))
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if _compares_by_identity(one):
        return _equal(vars(one), vars(other))
    return bool(one == other)


_IDENTITY: Any = object.__eq__


def _compares_by_identity(value: Any) -> bool:
    named = (type, types.FunctionType, types.BuiltinFunctionType, types.MethodType)
    return not isinstance(value, named) and type(value).__eq__ is _IDENTITY and hasattr(value, "__dict__")


def encode_dataset(examples: Sequence[Any], place: str) -> dict[str, Any]:
    """Examples by their fields and the names of their inputs."""
    return {"$examples": [_example(example, f"{place}[{i}]") for i, example in enumerate(examples)]}


def _example(example: Any, place: str) -> dict[str, Any]:
    if type(example) is not dspy.Example:
        raise refusal(
            place, f"is a {type(example).__name__}", "Write dspy.Examples, or pass the data to compile(...)."
        )
    fields = dict(example.items(include_dspy=True))
    inputs = getattr(example, "_input_keys", None)
    return {"fields": _plain(fields, place), "inputs": None if inputs is None else sorted(inputs)}


def _plain(value: Any, place: str) -> Any:
    """The value itself, where JSON gives it back equal."""
    if value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value)):
        return value
    if type(value) is list:
        return [_plain(item, f"{place}[{i}]") for i, item in enumerate(value)]
    if type(value) is dict and all(type(key) is str for key in value):
        return {key: _plain(item, f"{place}[{key!r}]") for key, item in value.items()}
    remedy = "Keep to JSON's values (a tuple is none), or pass it to compile(...)."
    raise refusal(place, f"is {value!r:.80}, which JSON does not give back the same", remedy)


def refusal(place: str, rule: str, remedy: str) -> ValueError:
    return ValueError(f"{place} can't be written to a config: it {rule}. {remedy}")


# -- reading -------------------------------------------------------------------------------------


def decode(value: Any, place: str) -> Any:
    """What `encode` made out of a value."""
    if isinstance(value, list):
        return [decode(item, f"{place}[{i}]") for i, item in enumerate(value)]
    if not isinstance(value, Mapping):
        return value
    tag = next((key for key in value if key.startswith("$")), None)
    if tag is None:
        return {key: decode(item, f"{place}[{key!r}]") for key, item in value.items()}
    if tag not in READERS:
        raise ValueError(f"{place} has the unknown key {tag!r}; known are {', '.join(READERS)}.")
    return READERS[tag](value, place)


def import_name(path: str, place: str) -> Any:
    module, _, name = path.partition(":")
    try:
        return functools.reduce(getattr, name.split("."), importlib.import_module(module))
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{place} names {path}, which can't be imported: {error}.") from error


def _new(value: Mapping[str, Any], place: str) -> Any:
    made = import_name(value["$new"], place)(**decode(value.get("arguments", {}), place))
    if "state" in value:
        load_module(made, value["state"])
    return made


def _partial(value: Mapping[str, Any], place: str) -> Any:
    function, arguments, keywords = decode(value["$partial"], place)
    return functools.partial(function, *arguments, **keywords)


def _method(value: Mapping[str, Any], place: str) -> Any:
    owner, name = decode(value["$method"], place)
    return getattr(owner, name)


def _examples(value: Mapping[str, Any], place: str) -> Sequence[Any]:
    examples = []
    for written in value["$examples"]:
        example = dspy.Example(**written["fields"])
        examples.append(example if written["inputs"] is None else example.with_inputs(*written["inputs"]))
    return examples


READERS: Mapping[str, Callable[[Mapping[str, Any], str], Any]] = {
    "$float": lambda value, place: float(value["$float"]),
    "$tuple": lambda value, place: tuple(decode(value["$tuple"], place)),
    "$lm": lambda value, place: load_lm(value["$lm"]),
    "$import": lambda value, place: import_name(value["$import"], place),
    "$new": _new,
    "$partial": _partial,
    "$method": _method,
    "$examples": _examples,
}
"""Key that begins with `$` -> what makes a value of its dict."""
