"""The settings of a run in readable form, without secrets."""

from __future__ import annotations

from typing import Any

from dspy_opro.programs.compat import model_name
from dspy_opro.storage.opening import without_password

from .arguments import OPROConfig


def readable(config: OPROConfig) -> dict[str, Any]:
    """Argument -> its value as something that prints and pickles."""
    shown: dict[str, Any] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        if name in ("trainset", "valset"):
            value = None if value is None else len(value)
        elif name in ("prompt_model", "task_model"):
            value = model_name(value) or None
        elif callable(value):
            value = getattr(value, "__qualname__", type(value).__name__)
        elif not isinstance(value, (str, int, float, bool, type(None))):
            value = repr(value)
        shown[name] = without_password(value) if name == "storage" else value
    return shown
