"""OPRO itself as a state machine: `next_tasks()` hands out tasks, `tell()` takes results, `events()` reports.

It knows nothing of threads, clocks, DSPy or storages. What it does depends on the results alone and not on the order
in which they arrive: it decides at fixed checkpoints, in a fixed order.

`search.py` moves everything on. `proposals.py` fills a round with candidates, `round.py` lets them race, `pruners.py`
says who leaves the race, `stoppers.py` when the run ends. `reserve.py` says how many examples are held back, and
`confidence.py` what they prove. `tasks.py` and `trajectory.py` have the values, `shared.py` what the rounds share.
"""

from __future__ import annotations

from .search import Search

__all__ = ["Search"]
