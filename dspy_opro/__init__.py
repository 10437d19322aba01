"""OPRO ("Large Language Models as Optimizers", arXiv 2309.03409) as a DSPy teleprompter."""

from __future__ import annotations

from .programs.failures import ProposerFailed, TooManyErrors
from .programs.metric import MetricError
from .proposers.meta_prompt import Exemplar, ProposalRequest
from .reporting.result import OPROResult
from .search.pruners import Halving, Pruner
from .search.stoppers import RunState, Stopper
from .search.trajectory import Candidate, Trajectory, Trial, Usage
from .teleprompter import OPRO, OPROTeleprompter

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
    "ProposerFailed",
    "Pruner",
    "RunState",
    "Stopper",
    "TooManyErrors",
    "Trajectory",
    "Trial",
    "Usage",
]
