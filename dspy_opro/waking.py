"""What wakes a run: its loop waits in one place, and its calls wake it, or a wish to stop from any thread."""

from __future__ import annotations

import asyncio

import anyio


class Bell:
    """Wakes whoever waits for a change."""

    def __init__(self) -> None:
        self.wish: str | None = None
        """The reason why somebody wants the run to end."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._changed: anyio.Event | None = None

    def open(self) -> None:
        """From now on a wish wakes this loop."""
        self._loop = asyncio.get_running_loop()

    def close(self) -> None:
        """Nobody waits any more."""
        self._loop = None

    def ask_to_stop(self, reason: str) -> None:
        """Leave a wish, from any thread."""
        self.wish = reason
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self.ring)

    def ring(self) -> None:
        """Something has changed; on the loop's thread."""
        if self._changed is not None:
            self._changed.set()

    def mute(self) -> anyio.Event:
        """Forget what rang so far.

        Returns:
            What to wait for: the next ring, also one that comes before the waiting begins.
        """
        self._changed = anyio.Event()
        return self._changed
