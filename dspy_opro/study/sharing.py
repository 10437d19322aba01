"""`SharedStore`: one run on several processes. Each feeds its own search from the log, in the log's order.

What a search does depends on its answers alone, so all of them take the same decisions at the same record;
nothing is decided elsewhere. Work is claimed in the log before it is done.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable
from typing import Any, ClassVar

from dspy_opro.work import Answer, Work, work_key

from .crew import Crew, Settings, claimed, differences, ended, joined, parted, shown
from .liveness import BEAT_SECONDS, Watch, is_gone, new_worker
from .records import Record, answer_record
from .storage import Log
from .store import OptunaStore


class SharedStore(OptunaStore):
    """A store that several processes work on. Takes what `OptunaStore` takes; `storage` must be given."""

    is_alone: ClassVar[bool] = False

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self._crew = Crew()
        self._settings: Settings = {}
        self._watch = Watch()
        self._exchanging = threading.Lock()
        self._outbox: deque[Record] = deque()
        self._sending: list[Record] = []  # taken from the outbox and not known to be written
        self._num_beats = 0
        self._next_beat = 0.0

    @property
    def log(self) -> Log:
        assert self._log is not None
        return self._log

    def join(self, settings: Settings, first: Work) -> bool:
        """Become a worker; before the run, once.

        Args:
            settings: What workers must agree on.
            first: Work that whoever starts the run takes at once.

        Returns:
            Whether this worker starts the run: it holds `first`.

        Raises:
            ValueError: Others are at work with other settings.
        """
        self._settings = settings
        self._unread.extend(self.log.read())
        known = _crew(self._unread)
        gone = [parted("lost", worker) for worker in known.members if is_gone(worker)]
        self.log.beat(self.worker, 0)
        self._append(*gone, joined(self.worker, settings), claimed(self.worker, [work_key(first)]))
        self._unread.extend(self.log.read())
        known = _crew(self._unread)
        for worker, theirs in known.members.items():
            if worker == self.worker:
                break
            if found := differences(settings, theirs):
                self._append(parted("left", self.worker))
                raise ValueError(
                    f"Study {self.study.study_name!r} is being worked on with other settings: "
                    f"{'; '.join(found)}. Workers of one run need the same; or use another study_name."
                )
        return self.is_fresh and known.holder(work_key(first)) == self.worker

    # -- at a point of the log, on the loop's thread ---------------------------------------------

    def _load(self, record: Record) -> None:
        super()._load(record)
        self._crew.load(record)

    @property
    def end(self) -> str | None:
        """The reason that ends the run for all workers."""
        return self._crew.end

    @property
    def is_drained(self) -> bool:
        """Whether all workers that are there have told all they will."""
        return self._crew.is_drained

    @property
    def is_shown(self) -> bool:
        """Whether the visible study is complete."""
        return self._crew.is_shown

    @property
    def is_member(self) -> bool:
        """Whether the others know of this worker."""
        return self.worker in self._crew.members

    @property
    def leads(self) -> bool:
        """Whether this worker keeps the visible study."""
        return self._crew.leader == self.worker

    @property
    def place(self) -> tuple[int, int]:
        """This worker's place among the workers, and how many there are."""
        return self._crew.place(self.worker)

    def is_mine(self, work: Work) -> bool:
        return self._crew.holder(work_key(work)) == self.worker

    def is_free(self, work: Work) -> bool:
        return self._crew.holder(work_key(work)) is None

    # -- what is to be told, on the loop's thread; the next `exchange` writes it -------------------

    def post(self, answer: Answer) -> None:
        self._outbox.append(answer_record(answer))

    def claim(self, works: Iterable[Work]) -> None:
        self._outbox.append(claimed(self.worker, map(work_key, works)))

    def ask_to_end(self, reason: str) -> None:
        """End the run for all workers."""
        self._outbox.append(ended(self.worker, reason))

    def drain(self) -> None:
        """This worker has told all it will."""
        self._outbox.append(parted("drained", self.worker))

    def leave(self) -> None:
        """This worker goes; what it holds is free."""
        self._outbox.append(parted("left", self.worker))

    def conclude(self) -> None:
        """The visible study is complete."""
        self._outbox.append(shown(self.worker))

    def rejoin(self, held: Iterable[Work]) -> None:
        """Come back under a new name after the others took this worker for lost."""
        self.worker = new_worker()
        self._outbox.append(joined(self.worker, self._settings))
        self.claim(held)

    @property
    def has_post(self) -> bool:
        return bool(self._outbox or self._sending)

    # -- with the storage, on a thread that may wait -----------------------------------------------

    def exchange(self) -> None:
        """Write what was posted and read what is new. After it failed it may be called again."""
        with self._exchanging:
            self._beat()
            if not self._sending:
                self._sending = [self._outbox.popleft() for _ in range(len(self._outbox))]
            if self._sending:
                self._append(*self._sending)
                self._sending = []
            self._unread.extend(self.log.read())

    def record(self, answers: object) -> None:
        """Nothing: what is posted, `exchange` writes."""

    def draw(self) -> None:
        """One worker keeps the visible study; the others are ready to take over."""
        if self.leads:
            super().draw()

    def _beat(self) -> None:
        now = time.monotonic()
        others = [worker for worker in list(self._crew.members) if worker != self.worker]
        lost = {worker for worker in others if is_gone(worker)}
        if now >= self._next_beat:
            self._num_beats += 1
            self.log.beat(self.worker, self._num_beats)
            if others:
                lost.update(self._watch.lost(others, self.log.beats()))
            self._next_beat = now + BEAT_SECONDS
        self._outbox.extend(parted("lost", worker) for worker in sorted(lost))


def _crew(records: Iterable[Record]) -> Crew:
    crew = Crew()
    for record in records:
        crew.load(record)
    return crew
