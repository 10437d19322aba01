"""Proposers ask the optimizer LM for new instructions, or for demos. Own ones are modules that take `request=`."""

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
