"""A teleprompter's arguments as JSON and back. Writing raises an error for a value that would not come back equal.

Values that JSON does not know are dicts with one key that begins with `$`. Reading imports and calls what the JSON
names, as unpickling does: read only trusted input.
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

from .arguments import FIELDS, OPROConfig, unknown_keyword

NAMED = (type, types.FunctionType, types.BuiltinFunctionType, types.MethodType)
"""Values that go by their import path."""


def to_json(config: OPROConfig) -> dict[str, Any]:
    """The given arguments as plain JSON.

    Raises:
        ValueError: An argument can't be written; the message names it, the reason and the remedy.
    """
    written = {}
    for name, value in config.given.items():
        if name in ("trainset", "valset") and value is not None:
            written[name] = {"$examples": [_example(e, f"{name}[{i}]") for i, e in enumerate(value)]}
        elif name == "storage" and not isinstance(value, (str, type(None))):
            raise refusal(name, "is an object", "Write storage as a URL, or pass the object to compile(...).")
        else:
            written[name] = encode(value, name)
    return written


def from_json(written: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that `to_json` wrote. This imports and calls what the JSON names.

    Raises:
        TypeError: An argument is unknown.
        ValueError: Something can't be imported or made.
    """
    for name in written:
        if name not in FIELDS:
            raise unknown_keyword(name, FIELDS, "from_config")
    return {name: decode(value, name) for name, value in written.items()}


# -- writing -------------------------------------------------------------------------------------


def encode(value: Any, place: str) -> Any:
    """A value as JSON. `place` names the value in messages."""
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
        _check_module(type(value), place)
        return {"$lm": _state(value, dump_lm, place)}
    if isinstance(value, functools.partial):
        return {"$partial": encode([value.func, list(value.args), dict(value.keywords)], place)}
    return _callable(value, place) if isinstance(value, NAMED) else _instance(value, place)


def _mapping(value: Mapping[Any, Any], place: str) -> dict[str, Any]:
    for key in value:
        if not isinstance(key, str) or key.startswith("$"):
            raise refusal(place, f"has the key {key!r}", "Keys must be strings that do not begin with $.")
    return {key: encode(item, f"{place}[{key!r}]") for key, item in value.items()}


def _state(value: Any, dump: Callable[[Any], Any], place: str) -> Any:
    """The state of an LM or a module."""
    try:
        return _plain(dump(value), place)
    except Exception as error:
        name = type(value).__name__
        remedy = f"Give {name} a dump_state() of JSON values, or pass it to compile(...)."
        raise refusal(place, f"is a {name} whose state can't be written ({error})", remedy) from error


def _callable(value: Any, place: str) -> dict[str, Any]:
    owner = getattr(value, "__self__", None)
    if isinstance(value, types.MethodType) and not isinstance(owner, type):
        return {"$method": [encode(owner, place), value.__name__]}
    name, remedy = getattr(value, "__qualname__", ""), "Define it with def or class in a module."
    if "<lambda>" in name:
        raise refusal(place, "is a lambda and has no import path", remedy)
    if "<locals>" in name:
        what = f"is {name}, which exists inside a function only and has no import path"
        raise refusal(place, what, remedy)
    _check_module(value, place)
    path = _path(value.__module__, name, value)
    try:
        found = import_name(path, place)
    except ValueError:
        found = None
    if found != value:
        raise refusal(place, f"is not the object that can be imported as {path}", remedy)
    return {"$import": path}


def _check_module(value: Any, place: str) -> None:
    """Refuse what a script or a notebook defines. Another one may have something else of that name."""
    if value.__module__ == "__main__":
        what = f"is {value.__qualname__} of __main__, which another process does not have"
        raise refusal(place, what, "Define it in a module and import it.")


def _path(module: str, name: str, value: Any) -> str:
    """The shortest path that leads to the value: `optuna.pruners:NopPruner`, not the private module behind it."""
    parts = module.split(".")
    packages = (".".join(parts[:count]) for count in range(1, len(parts)))
    short = (p for p in packages if getattr(sys.modules.get(p), name, None) is value)
    return f"{next(short, module)}:{name}"


def _instance(value: Any, place: str) -> dict[str, Any]:
    """An object: its class, the arguments of its constructor (read from its attributes), and its state."""
    made: dict[str, Any] = {"$new": _callable(type(value), place)["$import"]}
    # The signature of `__init__`: dspy.Module's metaclass shows `(*args, **kwargs)` for the class.
    initialize: Any = type(value).__init__
    arguments = {}
    for name, parameter in list(inspect.signature(initialize).parameters.items())[1:]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        found = getattr(value, name, getattr(value, f"_{name}", parameter.default))
        # An attribute of None may stand for a default of "auto" (Optuna's SuccessiveHalvingPruner).
        if parameter.default is not parameter.empty and (found is None or found == parameter.default):
            continue
        arguments[name] = encode(found, f"{place}.{name}")
    if arguments:
        made["arguments"] = arguments
    if isinstance(value, dspy.Module):
        made["state"] = _state(value, dump_module, place)
    remedy = "Keep each argument of its constructor in an attribute of that name, or pass it to compile(...)."
    try:
        same = _equal(decode(made, place), value)
    except Exception as error:
        raise refusal(place, f"is an object that can't be made again ({error})", remedy) from error
    if not same:
        raise refusal(place, "is an object whose attributes do not tell how it was made", remedy)
    return made


def _equal(one: Any, other: Any) -> bool:
    """Whether two objects have equal attributes."""
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
    has_no_equality = type(one).__eq__ is object.__eq__  # type: ignore[comparison-overlap]
    if has_no_equality and hasattr(one, "__dict__") and not isinstance(one, NAMED):
        return _equal(vars(one), vars(other))
    return bool(one == other)


def _example(example: Any, place: str) -> dict[str, Any]:
    """An example: its fields and the names of its inputs."""
    if type(example) is not dspy.Example:
        remedy = "Write dspy.Examples, or pass the data to compile(...)."
        raise refusal(place, f"is a {type(example).__name__}", remedy)
    fields, inputs = dict(example.items(include_dspy=True)), getattr(example, "_input_keys", None)
    return {"fields": _plain(fields, place), "inputs": None if inputs is None else sorted(inputs)}


def _plain(value: Any, place: str) -> Any:
    """The value itself, if JSON gives it back equal."""
    if value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value)):
        return value
    if type(value) is list:
        return [_plain(item, f"{place}[{i}]") for i, item in enumerate(value)]
    if type(value) is dict and all(type(key) is str for key in value):
        return {key: _plain(item, f"{place}[{key!r}]") for key, item in value.items()}
    remedy = "Use only JSON's values (no tuple, no object), or pass it to compile(...)."
    raise refusal(place, f"is {value!r:.80}, which JSON does not give back equal", remedy)


def refusal(place: str, rule: str, remedy: str) -> ValueError:
    return ValueError(f"{place} can't be written to a config: it {rule}. {remedy}")


# -- reading -------------------------------------------------------------------------------------


def decode(value: Any, place: str) -> Any:
    """The value that `encode` wrote."""
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


def _examples(value: Mapping[str, Any], place: str) -> Sequence[Any]:
    read = [(dspy.Example(**written["fields"]), written["inputs"]) for written in value["$examples"]]
    return [example if inputs is None else example.with_inputs(*inputs) for example, inputs in read]


READERS: Mapping[str, Callable[[Mapping[str, Any], str], Any]] = {
    "$float": lambda value, place: float(value["$float"]),
    "$tuple": lambda value, place: tuple(decode(value["$tuple"], place)),
    "$lm": lambda value, place: load_lm(value["$lm"]),
    "$import": lambda value, place: import_name(value["$import"], place),
    "$new": _new,
    "$partial": _partial,
    "$method": lambda value, place: getattr(*decode(value["$method"], place)),
    "$examples": _examples,
}
"""Key that begins with `$` -> the function that makes a value of its dict."""
