"""What gives a score its meaning, as hashes: a resumed run must agree on every part, or is told what differs."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from itertools import chain
from typing import Any

import dspy
from pydantic import TypeAdapter

from dspy_opro.programs.compat import model_name, predictor_state
from dspy_opro.programs.secrets import without_password
from dspy_opro.programs.values import as_json, fields

from .result_log import clip
from .source_code import parsed, sources

SHAPES_ANSWERS = ("temperature", "top_p", "max_tokens", "max_completion_tokens", "reasoning_effort", "seed")
"""Settings of an LM that a score depends on."""

Fingerprint = Mapping[str, Any]
"""Part -> hash or readable value; for `predictors` and `code` a dict of them."""


def fingerprint(
    student: dspy.Module,
    trainset: Sequence[Any],
    valset: Sequence[Any],
    metric: Callable[..., Any],
    task_model: Any = None,
    whole_trainset: Sequence[Any] = (),
    **values: object,
) -> dict[str, Any]:
    """Part -> hash or readable value.

    Args:
        student: Its instructions, fields, demos, LMs and the code of its classes count.
        trainset: Examples in the order of the race.
        valset: Examples in their order.
        metric: Counts by name, code and the plain values that it holds.
        task_model: The scorer LM of predictors that have none of their own.
        whole_trainset: All train examples as given. Unseen examples and demos are from it.
        values: Further settings, as they are.
    """
    modules = [module for _, module in student.named_sub_modules(dspy.Module)]
    code, unknown, objects = sources([*modules, *_callables_in([*modules, metric]), metric])
    adapter = dspy.settings.adapter
    parts: dict[str, Any] = {
        "student": type(student).__name__,
        "predictors": {name: _predictor(predictor) for name, predictor in student.named_predictors()},
        "trainset": f"{len(trainset)} examples, {_digest([_example(e) for e in (*trainset, *whole_trainset)])}",
        "valset": f"{len(valset)} examples, {_digest([_example(e) for e in valset])}",
        "metric": _metric(metric),
        "attributes": _attributes(student),
        "code": {name: _digest(source) for name, source in code.items()},
        "objects": {
            name: _digest(_object(value))
            for name, value in objects.items()
            if isinstance(value, (dspy.Module, dspy.BaseLM))
        },
        "unknown code": unknown,
        "task_model": _model(task_model),
        "adapter": "default"
        if adapter is None
        else f"{type(adapter).__name__}, {_digest(_constants(adapter))}",
    }
    return parts | {name: str(value) for name, value in values.items()}


def differences(theirs: Fingerprint, mine: Fingerprint) -> Iterator[str]:
    """What a run on record has that this one has not, in words.

    The seed orders the data. If it differs, other data of the same size are not mentioned.
    """
    for part in {**theirs, **mine}:
        was, now = theirs.get(part), mine.get(part)
        if was == now or part == "unknown code":
            continue
        if part in _NAMED:
            yield from _named_differ(part, was or {}, now or {})
        elif part == "predictors" and was and now:
            yield from _predictors_differ(was, now)
        elif part in ("trainset", "valset") and was and now:
            sizes = was.partition(",")[0], now.partition(",")[0]
            if sizes[0] != sizes[1]:
                yield f"{part} had {sizes[0]} and now has {sizes[1]}"
            elif theirs.get("seed") == mine.get("seed"):
                yield f"{part} has as many examples as before, but others or in another order"
        elif part == "format":
            yield f"format was {was!r}, which did not record the code of the program, and is now {now!r}"
        elif part == "metric" and was and now and was.partition(",")[0] == now.partition(",")[0]:
            yield f"metric {now.partition(',')[0]} now holds other values"
        else:
            yield f"{part} was {was!r} and is now {now!r}"


_NAMED = {"code": "the code of {}", "objects": "{}", "attributes": "{} of the student"}
"""Part -> how a name in it is told."""


def _named_differ(part: str, was: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """The changes of what both processes know. One that is started in another way may know less of the code."""
    for name in was:
        # As text, because NaN does not equal itself.
        if name in now and as_json(was[name]) != as_json(now[name]):
            values = f" from {was[name]} to {now[name]}" if part == "attributes" else ""
            yield f"{_NAMED[part].format(name)} has changed{values}"


def _predictors_differ(was: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    if list(was) != list(now):
        yield f"the student's predictors were {', '.join(was)} and are now {', '.join(now)}"
    for name in was:
        for part in was[name]:
            before, after = was[name][part], now.get(name, was[name]).get(part)
            if before != after:
                yield f"{part} of predictor {name!r} was {before} and is now {after}"


def _predictor(predictor: Any) -> dict[str, str]:
    """Part -> readable value, with a hash where it is cut."""
    state = predictor_state(predictor)
    signature, demos = state.pop("signature", {}), state.pop("demos")
    return {
        "instructions": _text(signature.pop("instructions", "")),
        **{f"field {field['prefix']!r}": field["description"] for field in signature.pop("fields", ())},
        **{f"type of {name!r}": _type(field) for name, field in predictor.signature.fields.items()},
        "signature": _digest([predictor.signature.signature, signature]),
        "demos": f"{len(demos)}, {_digest(demos)}",
        "LM": _model(predictor.lm) or "none",
        "settings": _digest([state, sorted(_plain(predictor.config).items())]),
    }


def _type(field: Any) -> str:
    """The type of a field with its constraints: as JSON schema, in which the members of enums and models count."""
    try:
        kind = as_json(TypeAdapter(field.annotation).json_schema())
    except Exception:  # of a callable, for one, there is no schema
        kind = str(field.annotation)
    return _text(f"{kind} {(field.json_schema_extra or {}).get('constraints') or ''}".strip())


def _attributes(student: dspy.Module) -> dict[str, Any]:
    """Numbers that the student's modules hold and never change, e.g. how many passages to retrieve.

    Texts may be keys or paths of one process, so they do not count.
    """
    named = [(n, m) for n, m in student.named_sub_modules(dspy.Module) if not isinstance(m, dspy.Predict)]
    changed = set[str]().union(*(_changed_by_methods(type(module)) for _, module in named))
    return {
        f"{name}.{key}": value
        for name, module in named
        for key, value in vars(module).items()
        if isinstance(value, (int, float)) and not key.startswith("_") and key not in changed
    }


def _object(value: Any) -> Any:
    """What tells an LM, or a module by its predictors, from another one."""
    if isinstance(value, dspy.BaseLM):
        return _model(value)
    return {name: _predictor(predictor) for name, predictor in value.named_predictors()}


def _plain(config: Any) -> dict[str, Any]:
    """The plain values of the settings of a predictor or an LM."""
    return {name: value for name, value in dict(config or {}).items() if isinstance(value, (str, int, float))}


def _text(text: str) -> str:
    return (
        repr(text) if len(text) <= 100 else f"{clip(text, 100)!r} ({len(text)} characters, {_digest(text)})"
    )


def _model(lm: Any) -> str:
    """An LM's name, its endpoint and what shapes its answers. Keys and passwords are left out."""
    settings = _plain(getattr(lm, "kwargs", None))
    endpoint = settings.get("api_base") or settings.get("base_url")
    shape = "".join(f", {name}={settings[name]}" for name in SHAPES_ANSWERS if name in settings)
    return model_name(lm) + (f" at {without_password(str(endpoint))}" if endpoint else "") + shape


def _example(example: Any) -> list[Any]:
    return [fields(example), sorted(fields(example.inputs()))]


def _callables_in(holders: Sequence[Any]) -> Iterator[Any]:
    """What modules and a metric hold and may call, such as tools."""
    for value in [value for holder in holders for value in getattr(holder, "__dict__", {}).values()]:
        held = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
        yield from filter(callable, (each.func if isinstance(each, dspy.Tool) else each for each in held))


def _constants(holder: Any) -> dict[str, Any]:
    return {
        name: _model(value) if isinstance(value, dspy.BaseLM) else value
        for name, value in vars(holder).items()
        if isinstance(value, (str, int, float, type(None), dspy.BaseLM))
    }


def _metric(metric: Any, depth: int = 0) -> str:
    """Its name, with a digest of the plain values that it holds."""
    target = metric if hasattr(metric, "__qualname__") else type(metric)
    name = f"{getattr(target, '__module__', '')}.{target.__qualname__}"  # a slot wrapper has no module
    held = [
        [key, what] for key, value in _held(metric).items() if (what := _plainly(value, depth)) is not None
    ]
    return f"{name}, {_digest(held)}" if held else name


def _held(metric: Any) -> Mapping[Any, Any]:
    """What a metric was made with: a closure's variables, a partial's arguments, an object's attributes.

    What it counts or stores as it runs is no part of that.
    """
    if isinstance(metric, functools.partial):
        return {"": metric.func, "arguments": metric.args, **metric.keywords}
    if inspect.ismethod(metric):
        return {"": metric.__func__, "self": _metric(metric.__self__)}
    if isinstance(metric, type):
        return {}  # its source counts
    if isinstance(metric, dspy.Module):
        predictors = as_json([_predictor(predictor) for predictor in metric.predictors()])
        return {"": predictors, **_attributes(metric)}
    if inspect.isfunction(metric):
        held = {**inspect.getclosurevars(metric).nonlocals, "defaults": metric.__defaults__}
        held |= metric.__kwdefaults__ or {}
        changed = _changed_names(metric)
    else:
        held = dict(getattr(metric, "__dict__", {}))
        changed = _changed_by_methods(type(metric))
    return {name: value for name, value in held.items() if name not in changed}


def _changed_by_methods(kind: type) -> set[str]:
    """The attributes that a class assigns after its objects are made."""
    methods = inspect.getmembers(kind, inspect.isfunction)
    makes = "__init__", "__post_init__"
    return {n for name, method in methods if name not in makes for n in _changed_names(method)}


def _changed_names(function: Any) -> set[str]:
    """The closure's variables and the object's attributes that a function assigns, by its source."""
    trees = filter(None, map(parsed, {function, inspect.unwrap(function)}))
    names: set[str] = set()
    for node in chain.from_iterable(map(ast.walk, trees)):
        if isinstance(node, ast.Nonlocal):
            names.update(node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    return names


def _plainly(value: Any, depth: int) -> Any:
    """A constant, or what tells a function; None for lists and dicts, which may be filled as the metric runs."""
    if isinstance(value, (str, int, float, Enum, tuple, frozenset)):
        return value
    if isinstance(value, dspy.BaseLM):
        return _model(value)
    return _metric(value, depth + 1) if callable(value) and depth < 3 else None


def _digest(value: object) -> str:
    return hashlib.sha256(as_json(value).encode()).hexdigest()[:16]
