"""Copies of a program. A copy has its own predictors and shares only what can't be copied, such as a lock."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import dspy


def uncopyable(module: dspy.Module) -> list[Any]:
    """The values in a module and its submodules that can't be copied.

    For such a module `dspy.Module.deepcopy` (DSPy 3.0 to 3.4) copies one attribute after the other: it does not copy a
    list with a predictor and a lock in it, and it copies a predictor in two attributes twice.
    """
    if type(module).deepcopy is not dspy.Module.deepcopy:  # the module knows how to copy itself
        return []
    found: list[Any] = []
    seen: set[int] = set()

    def look(value: Any) -> None:
        if id(value) in seen:
            return
        seen.add(id(value))
        try:
            copy.deepcopy(value)
        except Exception:
            inner = _members(value)
            if inner is None:
                found.append(value)
            for member in inner or ():
                look(member)

    look(module)
    return found


def _members(value: Any) -> Iterable[Any] | None:
    """The members of a module or a container; None for anything else."""
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
