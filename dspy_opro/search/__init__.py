"""The search as a state machine: `next()` hands out work, `tell_...()` takes results, nothing here waits.

It knows nothing of threads, clocks, DSPy or storages. What it does depends on the results alone and not
on the order in which they arrive: decisions are taken at fixed checkpoints, in a fixed order.

`search.py` moves everything on. A round's life: `proposals.py` until its candidates are known, `round.py` while they
race. `overlap.py` says when the next one opens, `worklist.py` holds work and outcomes, `rules.py` what never changes.
"""

from __future__ import annotations

from .search import Search

__all__ = ["Search"]
