"""A real language model inside the process: no key, no network, nothing to start.

This package keeps one rule: everything that DSPy versions do differently stays in `engine.py` and `forward.py`.
`llama.py` runs the model and knows nothing of DSPy, `weights.py` finds the file, `lm.py` is the LM that users see.
"""

from __future__ import annotations

from .llama import Completion, ContextOverflowError, LlamaModel
from .lm import LocalLM
from .schema import UnsupportedSchemaError

__all__ = ["Completion", "ContextOverflowError", "LlamaModel", "LocalLM", "UnsupportedSchemaError"]
