"""The prompts of a program as its adapter writes them, for use outside DSPy."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import dspy

from .errors import in_brief
from .values import plain

logger = logging.getLogger("dspy_opro")

Message = Mapping[str, Any]
"""`role` and `content`, as chat APIs take them. `content` is a text, or a list of parts where there are images."""


def prompts(program: dspy.Module, names: Sequence[str]) -> dict[str, Sequence[Message]]:
    """Predictor name -> its messages, with demos, and with `{field}` in place of each input.

    The adapter is that of `dspy.settings`. What an LM adds for itself, such as native tool calls, is not there, and
    neither is a conversation's history.

    Args:
        program: The program.
        names: The names of its predictors in their order.

    Returns:
        Nothing for a predictor whose prompt an adapter can't write without real inputs; the log says so.
    """
    adapter, made = dspy.settings.adapter or dspy.ChatAdapter(), {}
    for name, predictor in zip(names, program.predictors(), strict=True):
        signature = predictor.signature
        fields = (n for n, info in signature.input_fields.items() if info.annotation is not dspy.History)
        try:
            messages = adapter.format(signature, list(predictor.demos), {n: f"{{{n}}}" for n in fields})
            made[name] = plain(messages)
        except Exception as error:  # a custom adapter; the run is at its end and must not fail here
            words = "result.prompts() lacks %s: %s can't write it: %s"
            logger.warning(words, name, type(adapter).__name__, in_brief(error))
    return made
