"""The examples of a run as text, with what the student and the best candidate gave on each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dspy_opro.programs.program import shorten
from dspy_opro.programs.values import fields, shown
from dspy_opro.search.tasks import Split
from dspy_opro.search.trajectory import Outcome

TEXT_LIMIT = 1000
"""Characters of one field that are kept."""


@dataclass(frozen=True)
class ExampleText:
    """One example."""

    index: int
    """Its place in the trainset or valset as it was given."""
    inputs: Mapping[str, str]
    """Name of an input field -> its value as text."""
    expected: Mapping[str, str]
    """Name of any other field -> its value as text."""


@dataclass(frozen=True)
class Examples:
    """Examples and outcomes, both by split and by position in the run's order.

    Positions are those of `Trial.scores_by_position` (split `train`) and `Trial.valset_scores` (`val`). The unseen
    examples come from the valset where there is one, else from the trainset.
    """

    texts: Mapping[Split, Sequence[ExampleText]] = field(default_factory=dict)
    """Split -> its examples, scored or not."""
    outcomes: Mapping[str, Mapping[Split, Sequence[Outcome | None]]] = field(default_factory=dict)
    """Id of the student or of the best candidate -> split -> its outcomes. None where an example was not scored."""
    has_texts: bool = True
    """Otherwise only the scores are on record: the fields are empty, and `ExampleText.index` is the position."""


def as_texts(examples: Sequence[Any], indices: Sequence[int]) -> list[ExampleText]:
    """Examples of the user as text. `indices` has at least one entry for each of them, their places in the dataset."""
    texts = []
    for index, example in zip(indices, examples, strict=False):
        inputs = fields(example.inputs())
        values = {name: shorten(shown(value), TEXT_LIMIT) for name, value in fields(example).items()}
        expected = {name: value for name, value in values.items() if name not in inputs}
        texts.append(ExampleText(index, {name: values[name] for name in inputs}, expected))
    return texts
