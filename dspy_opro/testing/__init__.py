"""Public fakes: language models that answer by a plain function, in the process or over HTTP.

One rule: an answer is a function of an `LMCall`; the same one serves `ScriptedLM` and `SimulatedServer`.
"""

from __future__ import annotations

from dspy_opro.testing.calls import Answer, LMCall
from dspy_opro.testing.models import Fault, Latency, RateLimit, SimulatedModel
from dspy_opro.testing.scripted import ScriptedLM
from dspy_opro.testing.server import ModelStats, ServerStats, SimulatedServer
from dspy_opro.testing.vocabulary import VocabularyTask

__all__ = [
    "Answer",
    "Fault",
    "LMCall",
    "Latency",
    "ModelStats",
    "RateLimit",
    "ScriptedLM",
    "ServerStats",
    "SimulatedModel",
    "SimulatedServer",
    "VocabularyTask",
]
