"""Proposers ask the optimizer LM for new instructions. A proposer of the user is a module that takes `request=`."""

from __future__ import annotations

from .completion import CompletionProposer
from .meta_prompt import Exemplar, ProposalRequest
from .opro import OPROProposer, PaperProposer
from .reflective import ReflectiveProposer

__all__ = [
    "CompletionProposer",
    "Exemplar",
    "OPROProposer",
    "PaperProposer",
    "ProposalRequest",
    "ReflectiveProposer",
]
