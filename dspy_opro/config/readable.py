"""The settings of a run in readable form, without secrets."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from os import PathLike
from typing import Any

from dspy_opro.programs.compat import model_name
from dspy_opro.programs.secrets import is_secret, without_password

from .arguments import FIELDS, OPROConfig


def readable(config: OPROConfig) -> dict[str, Any]:
    """Argument -> its value as something that prints and pickles."""
    shown: dict[str, Any] = {}
    for name in FIELDS:
        value = getattr(config, name)
        if name in ("trainset", "valset"):
            value = None if value is None else len(value)
        elif name in ("prompt_model", "task_model"):
            value = model_name(value) or None
        elif not isinstance(value, (int, float, type(None))):
            value = _text(value)
        shown[name] = value
    return shown


def _text(value: Any) -> str:
    """A value as text. Of an object it is the class, because other attributes may hold secrets."""
    if isinstance(value, (str, PathLike)):
        return str(without_password(str(value)))
    if isinstance(value, Mapping):
        items = (f"{name}: {'***' if is_secret(name) else _text(item)}" for name, item in value.items())
        return f"{{{', '.join(items)}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, functools.partial):
        return f"partial({_text(value.func)})"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value) if field.repr]
        items = (f"{n}={'***' if is_secret(n) else _text(getattr(value, n))}" for n in names)
        return f"{type(value).__name__}({', '.join(items)})"
    if value is None or isinstance(value, (int, float)):
        return repr(value)
    return str(getattr(value, "__qualname__", None) or type(value).__name__)
