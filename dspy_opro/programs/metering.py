"""Counts what one piece of work spends, at the places where DSPy itself records its LM calls."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, Literal

import dspy
from dspy.utils.usage_tracker import UsageTracker

from dspy_opro.search.trajectory import Usage

from .compat import EMPTY_USAGE_MEANS_CACHED, UNMARKED_RESPONSES

NOTHING = Usage()

Prices = Mapping[str, tuple[float, float]]
"""Model, named as in `lm.model` -> dollars per million prompt tokens and per million completion tokens."""


def dollars(price: tuple[float, float], prompt_tokens: int, completion_tokens: int) -> float:
    """What so many tokens cost."""
    return (price[0] * prompt_tokens + price[1] * completion_tokens) / 1e6


class Ledger:
    """All that was paid; budgets read it. `Search.usage` has only results that were told.

    An LM call is booked when it ends, an example when its result counts: an example without a score is tried again.
    Once the run is over nothing is booked any more, so that its result and its log agree.

    Any thread may add to it.
    """

    def __init__(self) -> None:
        self._usage = Usage()
        self._is_closed = False
        self._lock = threading.Lock()

    @property
    def usage(self) -> Usage:
        return self._usage

    def add(self, usage: Usage) -> None:
        with self._lock:
            if not self._is_closed:
                self._usage = self._usage + usage

    def add_calls(self, usage: Usage) -> None:
        """Add what LM calls cost. Examples in the usage are not counted."""
        self.add(replace(usage, metric_calls=0))

    def close(self) -> Usage:
        """Book nothing any more. Returns the usage."""
        with self._lock:
            self._is_closed = True
            return self._usage


@dataclass(frozen=True)
class Budget:
    """Limits in tokens, dollars and seconds: no call is started once one of them is reached."""

    max_tokens: int | None = None
    max_cost: float | None = None
    timeout_seconds: float | None = None

    def exhausted(self, usage: Usage, seconds: float, share: float = 1.0) -> str | None:
        """The stop reason if this share of a limit is spent."""
        if self.max_tokens is not None and usage.tokens >= share * self.max_tokens:
            return "max_tokens"
        if self.max_cost is not None and usage.cost >= share * self.max_cost:
            return "max_cost"
        if self.timeout_seconds is not None and seconds >= share * self.timeout_seconds:
            return "timeout_seconds"
        return None


@dataclass
class Meter:
    """Counts LM calls, tokens and dollars. It keeps no prompts and no answers."""

    caller: Literal["scorer", "proposer"]
    """The side that makes the calls."""
    on_usage: Callable[[Usage], None]
    """Gets the usage of every call when the call ends. An abandoned call costs money, too."""
    usage: Usage
    """The usage so far, from the start with that of the work itself."""
    prices: Prices = field(default_factory=dict)
    """The user's own prices. They replace DSPy's."""

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    def add(self, model: str, usage: Any, cost: Any) -> None:
        """Book one LM call. An answer from DSPy's cache has no usage, but it has the cost of the original call.

        A cost of 0 is no price: litellm (1.85 to 1.106) also gives it for a model that its list has without a price,
        and for a known one whose server sends no usage. DSPy's own engine gives None for both. Only the user's own
        price can say that an LM is free.
        """
        spent = Usage(cached_calls=1)
        if usage:
            spent = Usage(
                scorer_calls=int(self.caller == "scorer"),
                proposer_calls=int(self.caller == "proposer"),
                # The second name is that of the Responses API.
                prompt_tokens=int(usage.get("prompt_tokens") or usage.get("input_tokens") or 0),
                completion_tokens=int(usage.get("completion_tokens") or usage.get("output_tokens") or 0),
                cost=float(cost or 0.0),
            )
            is_priced = bool(spent.cost)
            if model in self.prices:
                price = self.prices[model]
                spent = replace(spent, cost=dollars(price, spent.prompt_tokens, spent.completion_tokens))
                is_priced = bool(spent.tokens) or not any(price)
            spent = replace(spent, unpriced_calls=int(not is_priced))
        self.spend(spent)

    def spend(self, spent: Usage) -> None:
        with self._lock:
            self.usage += spent
        self.on_usage(spent)


class _Tracker(UsageTracker):
    """Hears of every answer that does not come from the cache, right before its history entry.

    It hears neither of costs nor of cached answers. Where the history is switched off it books the calls, and only the
    user's own prices are known.
    """

    def __init__(self, meter: Meter | None, parent: UsageTracker | None) -> None:
        super().__init__()
        self._meter = meter
        self._parent = parent
        self._heard = threading.local()
        if parent is not None:
            self.usage_data = parent.usage_data  # `dspy.track_usage` within the program adds to it

    def add_usage(self, lm: str, usage_entry: dict[str, Any]) -> None:
        self._heard.usage = usage_entry
        if self._meter is not None:
            no_usage = None if EMPTY_USAGE_MEANS_CACHED else {"prompt_tokens": 0}
            self._meter.add(lm, usage_entry or no_usage, None)
        if self._parent is None:
            super().add_usage(lm, usage_entry)
        else:
            self._parent.add_usage(lm, usage_entry)

    def has_just_heard(self, usage: Any) -> bool:
        """Whether this very object was the last usage in this thread."""
        return getattr(self._heard, "usage", None) is usage

    def __deepcopy__(self, memo: Any) -> _Tracker:
        return self  # dspy.Parallel copies the tracker for each of its threads


class _History(list[Any]):
    """Replaces a module's `history`. DSPy appends an entry for every LM call below that module."""

    def __init__(self, meter: Meter, tracker: _Tracker | None) -> None:
        super().__init__()
        self._meter = meter
        self._tracker = tracker

    def append(self, entry: Any) -> None:
        usage = entry.get("usage")
        # Many servers send no usage. An answer without usage is paid for, unless it comes from the cache.
        paid = usage or (None if self._is_cached(entry.get("response"), usage) else {"prompt_tokens": 0})
        self._meter.add(str(entry.get("model")), paid, entry.get("cost"))

    def _is_cached(self, response: Any, usage: Any) -> bool:
        """Whether an answer without usage comes from the cache.

        DSPy 3.0 to 3.3 set `cache_hit`. In 3.4 a response of its own engine has no mark, but only a paid one is told to
        the tracker. Where the program has put another tracker in its place, a response that has the usage that its
        entry lacks is cached; where the server sent none it counts as paid.
        """
        tracker, own = self._tracker, getattr(response, "usage", None)
        if tracker is not None and tracker is not dspy.settings.usage_tracker:
            tracker = None
        if tracker is not None and isinstance(response, UNMARKED_RESPONSES):
            return not tracker.has_just_heard(usage)
        is_cached = getattr(response, "cache_hit", False) or getattr(own, "total_tokens", None)
        return bool(is_cached or (EMPTY_USAGE_MEANS_CACHED and own == {}))


@contextmanager
def metered(
    caller: Literal["scorer", "proposer"],
    on_usage: Callable[[Usage], None],
    entry: Usage = NOTHING,
    prices: Prices | None = None,
    **settings: Any,
) -> Iterator[Meter]:
    """A `dspy.context` that counts all LM calls, also those in threads of `dspy.Parallel`.

    It uses `settings.caller_modules` (DSPy 3.0 to 3.4: `record_history` appends each entry to the `history` of every
    module in it). A usage tracker alone would miss costs, and in the context of DSPy 3.0 it makes every task of
    `dspy.Parallel` return None. With `track_usage` modules give their predictions a usage only where no tracker is set.
    """
    meter, parent, tracker = Meter(caller, on_usage, entry, prices or {}), dspy.settings.usage_tracker, None
    if dspy.settings.disable_history or dspy.settings.max_history_size == 0:
        settings["usage_tracker"] = _Tracker(meter, parent)
    elif UNMARKED_RESPONSES and not (dspy.settings.track_usage and parent is None):
        settings["usage_tracker"] = tracker = _Tracker(None, parent)
    callers = [SimpleNamespace(history=_History(meter, tracker)), *(dspy.settings.caller_modules or [])]
    with dspy.context(caller_modules=callers, **settings):
        yield meter
