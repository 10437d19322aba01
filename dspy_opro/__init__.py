"""OPRO ("Large Language Models as Optimizers", arXiv 2309.03409) as a DSPy teleprompter."""

from __future__ import annotations

from .failures import TooManyErrors
from .metric import MetricError
from .protocols import Exemplar, ProposalRequest, Pruner, Stopper
from .racing import Halving
from .result import OPROResult
from .stopping import RunState, Usage
from .teleprompter import OPRO, OPROTeleprompter
from .trajectory import Candidate, Trajectory, Trial

__version__ = "0.1.0"

__all__ = [
    "OPRO",
    "Candidate",
    "Exemplar",
    "Halving",
    "MetricError",
    "OPROResult",
    "OPROTeleprompter",
    "ProposalRequest",
    "Pruner",
    "RunState",
    "Stopper",
    "TooManyErrors",
    "Trajectory",
    "Trial",
    "Usage",
]
