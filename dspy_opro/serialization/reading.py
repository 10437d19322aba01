"""JSON to values. It imports what it is told and calls it, as unpickling does: for trusted input only."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import dspy

from dspy_opro._compat import load_lm, load_module


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
