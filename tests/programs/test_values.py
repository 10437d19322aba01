from __future__ import annotations

import base64
import dataclasses
import datetime
import enum
import subprocess
import sys
from typing import Any

import dspy
import numpy
import pydantic
import pytest

from dspy_opro.programs.values import as_json, fields, plain, shown


class Color(enum.Enum):
    RED = "r"


class Point(pydantic.BaseModel):
    x: int
    color: Color = Color.RED


@dataclasses.dataclass
class Pair:
    left: Color
    right: Point


class Link(dspy.Type):  # type: ignore[misc]
    """A type of the user's own, as DSPy's documentation shows it."""

    url: str

    def format(self) -> Any:
        return [{"type": "image_url", "image_url": {"url": self.url}}]


IMAGE = dspy.Image(url="data:image/png;base64," + base64.b64encode(bytes(range(256)) * 8).decode())


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("text", "text"),
        (Color.RED, "r"),
        ([Color.RED, (1, 2)], ["r", (1, 2)]),
        ({"b", "a"}, ["a", "b"]),
        ({(0, 1): Color.RED, None: 1}, {"(0, 1)": "r", "None": 1}),
        (Point(x=1), {"x": 1, "color": "r"}),
        (dspy.Example(a=Point(x=1)), {"a": {"x": 1, "color": "r"}}),
        (Pair(Color.RED, Point(x=1)), {"left": "r", "right": {"x": 1, "color": "r"}}),
        (dspy.Code(code="x = 1"), "x = 1"),
        (
            dspy.Tool(len, name="count", desc="Count.", args={}),
            str(dspy.Tool(len, name="count", desc="Count.", args={})),
        ),
        (numpy.float32(0.5), 0.5),
        (numpy.arange(3), [0, 1, 2]),
        (datetime.datetime(2026, 1, 2, 3, 4), "2026-01-02T03:04:00"),
    ],
)
def test_values_become_what_an_adapter_shows(value: Any, expected: Any) -> None:
    assert plain(value) == expected


@pytest.mark.parametrize(
    "value",
    [
        IMAGE,
        [IMAGE],
        {"page": IMAGE},
        dspy.Image(url="https://example.com/a.png"),
        Link(url="data:" + "A" * 99),
    ],
)
def test_an_image_is_named_and_not_sent(value: Any) -> None:
    text = shown(value)
    assert "<image>" in text
    assert len(text) < 30


def test_the_address_of_an_object_is_not_shown() -> None:
    class Doc:
        pass

    name = f"<{__name__}.test_the_address_of_an_object_is_not_shown.<locals>.Doc object>"
    assert shown(Doc()) == name
    assert shown({"docs": [Doc()]}) == f'{{"docs": ["{name}"]}}'
    assert shown("<f at 0x7f9c>") == "<f at 0x7f9c>"


def test_lists_and_objects_are_json_as_the_program_sees_them() -> None:
    value = {"tags": ("a", "ü"), "is_new": True, "note": None, "point": Point(x=1)}
    assert (
        shown(value) == '{"tags": ["a", "ü"], "is_new": true, "note": null, "point": {"x": 1, "color": "r"}}'
    )
    assert shown(True) == "True"  # as DSPy's adapters show a single value


def test_what_datasets_add_is_no_data() -> None:
    assert fields(dspy.Example(question="?", dspy_uuid="4d26", dspy_split="train")) == {"question": "?"}


def test_json_is_the_same_in_every_process() -> None:
    program = (
        "from dspy_opro.programs.values import as_json\n"
        "class C: pass\n"
        "print(as_json([{'a', 'b', 'c'}, C(), C, lambda: 0, {(1, 2): 3, None: 4}]))"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1] == '[["a", "b", "c"], "C", "C", "<lambda>", {"(1, 2)": 3, "None": 4}]\n'
    assert as_json({"a": 1}) != as_json({"a": 2})
