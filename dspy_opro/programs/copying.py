"""Copies of a program: predictors are never shared with it, and what can't be copied always is."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import dspy


def uncopyable(module: dspy.Module) -> list[Any]:
    """What a module and those within it hold that can't be copied.

    `dspy.Module.deepcopy` (DSPy 3.0 to 3.4) then falls back to one attribute after the other: a list with a
    predictor and a lock in it is not copied at all, a predictor in two attributes is copied twice. One with a
    `deepcopy` of its own knows better: nothing then.
    """
    if type(module).deepcopy is not dspy.Module.deepcopy:
        return []
    found: list[Any] = []
    seen: set[int] = set()

    def look(value: Any) -> None:
        if id(value) in seen:
            return
        seen.add(id(value))
        if _is_copyable(value):
            return
        inner = _members(value)
        if inner is None:
            found.append(value)
        else:
            for member in inner:
                look(member)

    look(module)
    return found


def _is_copyable(value: Any) -> bool:
    try:
        copy.deepcopy(value)
    except Exception:
        return False
    return True


def _members(value: Any) -> Iterable[Any] | None:
    """What a module or a container holds; None for anything else."""
    if isinstance(value, dspy.Module):
        value = vars(value)
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, (list, tuple, set)) else None


def copy_module(module: dspy.Module, shared: Sequence[Any]) -> dspy.Module:
    """A copy of a module that shares what `uncopyable` found."""
    if not shared:
        return module.deepcopy()
    return copy.deepcopy(module, {id(value): value for value in shared})
