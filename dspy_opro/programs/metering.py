"""What one piece of work spends, counted where DSPy itself writes it down."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import dspy
from dspy.utils.usage_tracker import UsageTracker

from dspy_opro.search.trajectory import Usage

NOTHING = Usage()


class Meter:
    """Counts LM calls, tokens and dollars; entries and answers themselves are not kept.

    Args:
        caller: On whose side calls are booked, the program's or the proposer's.
        book: Told of every call as it ends: one that a time limit left behind is paid for, too.
        entry: What the work itself counts as; booked at once.
    """

    def __init__(
        self, caller: Literal["scorer", "proposer"], book: Callable[[Usage], None], entry: Usage
    ) -> None:
        self._caller = caller
        self._book = book
        self._lock = threading.Lock()
        self.usage = entry
        """What was spent so far."""
        book(entry)

    def add(self, usage: Any, cost: Any) -> None:
        """Book one LM call. An answer from DSPy's cache has no usage, and still the cost of the first time."""
        if usage:
            spent = Usage(
                scorer_calls=int(self._caller == "scorer"),
                proposer_calls=int(self._caller == "proposer"),
                # The second name is that of the Responses API.
                prompt_tokens=int(usage.get("prompt_tokens") or usage.get("input_tokens") or 0),
                completion_tokens=int(usage.get("completion_tokens") or usage.get("output_tokens") or 0),
                cost=float(cost or 0.0),
            )
        else:
            spent = Usage(cached_calls=1)
        with self._lock:
            self.usage += spent
        self._book(spent)


class _History(list[Any]):
    """Stands in for a module's `history`: DSPy appends an entry for every LM call below that module."""

    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self._meter = meter

    def append(self, entry: Any) -> None:
        self._meter.add(entry.get("usage"), entry.get("cost"))


class _Caller:
    def __init__(self, meter: Meter) -> None:
        self.history = _History(meter)


class _Tracker(UsageTracker):
    """Counts where the history is switched off; it hears of neither costs nor cached answers."""

    def __init__(self, meter: Meter, parent: Any) -> None:
        super().__init__()
        self._meter = meter
        self._parent = parent

    def add_usage(self, lm: str, usage_entry: dict[str, Any]) -> None:
        super().add_usage(lm, usage_entry)
        self._meter.add(usage_entry or {"prompt_tokens": 0}, None)
        if self._parent is not None:
            self._parent.add_usage(lm, usage_entry)

    def __deepcopy__(self, memo: Any) -> _Tracker:
        return self  # dspy.Parallel copies the tracker for each of its threads


@contextmanager
def metered(
    caller: Literal["scorer", "proposer"],
    book: Callable[[Usage], None],
    entry: Usage = NOTHING,
    **settings: Any,
) -> Iterator[Meter]:
    """A `dspy.context` in which all LM calls are counted, those in threads of `dspy.Parallel` too.

    Leans on `settings.caller_modules` (DSPy 3.0 to 3.4: `record_history` appends each entry to the `history` of
    every module in it). A usage tracker alone would miss costs, and in the context of DSPy 3.0 it makes every
    task of `dspy.Parallel` return None.
    """
    meter = Meter(caller, book, entry)
    if dspy.settings.disable_history or dspy.settings.max_history_size == 0:
        settings["usage_tracker"] = _Tracker(meter, dspy.settings.usage_tracker)
    callers = [_Caller(meter), *(dspy.settings.caller_modules or [])]
    with dspy.context(caller_modules=callers, **settings):
        yield meter
