"""Optuna's part of a run: trials to look at, a log to resume from, pruners and TPE from its shelf.

Optuna is imported when a run needs it: it takes as long as all the rest of this package, and more.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .pruning import OptunaPruner
    from .recombination import recombine
    from .sharing import SharedStore
    from .store import OptunaStore

__all__ = ["OptunaPruner", "OptunaStore", "SharedStore", "recombine"]

_HOMES = {
    "OptunaPruner": "pruning",
    "OptunaStore": "store",
    "SharedStore": "sharing",
    "recombine": "recombination",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
