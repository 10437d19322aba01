"""What a teleprompter says of itself: its help and its repr."""

from __future__ import annotations

import functools
import pydoc
from typing import Any

import dspy

from dspy_opro import Halving, OPROTeleprompter
from dspy_opro.config.arguments import FIELDS
from dspy_opro.config.keywords import BUILTIN


def exact(example: Any, prediction: Any) -> float:
    return 1.0


def test_help_begins_with_our_arguments_and_ends_with_the_keywords_of_others() -> None:
    text = pydoc.plain(pydoc.render_doc(OPROTeleprompter))
    text = text[text.index("Args:") : text.index("Method resolution order")]
    own, others = text.split("Keywords of DSPy's own optimizers:")
    assert all(f"{name}:" in own or f"{name}, " in own or f", {name}" in own for name in FIELDS)
    lines = [line.strip(" |") for line in others.splitlines()]
    assert [line for line in lines if ":" not in line and line] == ["Other names", "Translated", "Not used"]
    for name in BUILTIN:
        (line,) = [line for line in lines if line.startswith(f"{name}: ")]
        assert line.endswith(".")
    assert "breadth: num_candidates." in lines


def test_the_repr_shows_what_differs_from_the_defaults() -> None:
    assert repr(OPROTeleprompter()) == "OPROTeleprompter()"
    teleprompter = OPROTeleprompter(
        exact,
        depth=3,
        seed=0,
        prompt_model=dspy.LM("openai/x", api_key="k"),
        pruner=Halving(first=2),
        trainset=[1],
    )
    teleprompter.storage = "postgresql://me:pw@host/db"
    teleprompter.callbacks = functools.partial(print, "token")
    teleprompter.auto = None
    assert repr(teleprompter) == (
        "OPROTeleprompter(prompt_model='openai/x', auto=None, num_rounds=3, "
        "pruner='Halving(first=2, keep=0.5, slack=0.0)', storage='postgresql://me:***@host/db', "
        "callbacks='[partial(print)]', metric='exact', trainset=1)"
    )
