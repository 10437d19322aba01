"""The order of the log is the order in which the search is told: what was recorded first, then what comes in.

So a decision that reads what was spent comes out the same in a resumed run and, where several workers share a
run, in each of them.
"""

from __future__ import annotations

from collections.abc import Callable

from .company import Alone, Together
from .protocols import Store
from .search import Search
from .stopping import Ledger, Usage
from .work import Answer, Ask, Failure, Proposal, Work, work_key


class Telling:
    """Takes work from the search, and tells it the answers.

    Args:
        search: What is to be done next.
        store: Remembers answers.
        ledger: Told of what others, or earlier processes, spent.
        company: Gets the work that has no answer yet.
        emit: Passes on what the search has to say.
    """

    def __init__(
        self,
        search: Search,
        store: Store,
        ledger: Ledger,
        company: Alone | Together,
        emit: Callable[[], None],
    ) -> None:
        self.usage = Usage()
        """What the answers that the search knows cost."""
        self.seconds = 0.0
        """How long the run had been at work when the search was told the last answer, over all its processes."""
        self.seconds_before = 0.0
        """What earlier processes took."""
        self.failures: list[Failure] = []
        """Failed examples, by position; in no fixed order."""
        self._search = search
        self._store = store
        self._ledger = ledger
        self._company = company
        self._emit = emit
        self._is_live = False  # whether what was recorded earlier is taken in
        self._open: dict[str, tuple[Work, int]] = {}  # handed out in the past: work key -> work and its turn
        self._turns = {True: 0, False: 0}  # asks and blocks handed out
        self._expected: set[str] = set()  # keys of own answers that the log will bring back

    def pull(self) -> None:
        """Take everything that the search has to do; what was recorded earlier is answered on the spot."""
        while not self._search.done:
            self._emit()
            work = self._search.next()
            if work is None:
                break
            is_ask = isinstance(work, Ask)
            self._turns[is_ask] += 1
            answer = self._store.recall(work)
            if answer is not None:
                self.tell(answer)
            elif self._is_live:
                self._company.put(work, self._turns[is_ask])
            else:
                self._open[work_key(work)] = work, self._turns[is_ask]
        self._emit()

    def tell(self, answer: Answer) -> None:
        work, content = answer.work, answer.content
        self.usage += answer.usage
        self.seconds = max(self.seconds, answer.seconds)
        self._store.told(answer)
        if isinstance(work, Ask):
            assert isinstance(content, Proposal)
            self._search.tell_proposal(work, content)
            return
        assert isinstance(content, tuple)
        for position, outcome in enumerate(content, work.start):
            if outcome.error is not None:
                self.failures.append(Failure(work.candidate.id, work.split, position, outcome.error))
        self._search.tell_block(work, content)

    def expect(self, work: Work) -> None:
        """The log will bring back an answer of this worker, which is paid for already."""
        self._expected.add(work_key(work))

    def take_in(self) -> None:
        """Tell the search all that was recorded, in the order in which it was: it decides as it did then."""
        self.pull()
        self.learn()
        for key, (work, _) in list(self._open.items()):
            answer = self._store.recall(work)
            if answer is not None:  # it was recorded in blocks of another size
                del self._open[key]
                self.tell(answer)
        self._is_live = True
        self.seconds_before = self.seconds
        for work, turn in self._open.values():
            self._company.put(work, turn)
        self.pull()
        self._end_with_others()

    def learn(self) -> None:
        """Take in what is new in the log, record by record."""
        while (logged := self._store.load_next()) is not None:
            self._take(*logged)
            if self._is_live:
                self._end_with_others()
        self._company.learned()

    def _take(self, key: str, usage: Usage) -> None:
        if key in self._expected:
            self._expected.remove(key)
        else:
            self._ledger.add(usage)
        work = self._company.answered(key) if self._is_live else self._open.pop(key, (None, 0))[0]
        answer = None if work is None else self._store.recall(work)
        if answer is not None:
            self.tell(answer)
            self.pull()

    def _end_with_others(self) -> None:
        if self._company.end is not None:
            self._search.stop(self._company.end)
