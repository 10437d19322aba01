"""What stands in an example's fields, as text for a meta-prompt, and as JSON that all processes agree on."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from enum import Enum
from typing import Any

import dspy

# DSPy 3.0 to 3.4 mark images, audio and files so in a text, and make parts of a message of them again. Within stands
# JSON, in 3.0.0 the repr of a list.
_MEDIA = re.compile(r"<<CUSTOM-TYPE-START-IDENTIFIER>>.*?<<CUSTOM-TYPE-END-IDENTIFIER>>", re.DOTALL)
_SCALARS = frozenset({str, int, float, bool, type(None)})
_KIND = re.compile(r"""\\*["']type\\*["']:\s*\\*["'](?:input_)?(\w+?)(?:_url)?\\*["']""")


def fields(example: Any) -> dict[str, Any]:
    """An example's own fields; DSPy's datasets give each one a random `dspy_uuid`, too."""
    return {name: value for name, value in example.items() if not name.startswith("dspy_")}


def shown(value: Any) -> str:
    """A value as a text; images and the like are named, not sent."""
    return _MEDIA.sub(_placeholder, str(plain(value)))


def _placeholder(match: re.Match[str]) -> str:
    kind = _KIND.search(match.group())
    return f"<{kind.group(1) if kind else 'media'}>"


def plain(value: Any) -> Any:
    """A value made of dicts with text keys, lists and scalars, as DSPy's adapters show it."""
    if type(value) in _SCALARS:
        return value
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, dspy.Type):
        return str(value)
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else str(plain(key)): plain(v) for key, v in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, tuple):
        return tuple(plain(item) for item in value)
    if isinstance(value, (set, frozenset)):
        return sorted((plain(item) for item in value), key=repr)
    for convert in (
        "model_dump",
        "toDict",
        "tolist",
        "isoformat",
    ):  # pydantic's models, examples, arrays, dates
        if not isinstance(value, type) and callable(getattr(value, convert, None)):
            return plain(getattr(value, convert)())
    return value


def as_json(value: Any) -> str:
    """The same text in every process, whatever the order of sets and keys; without addresses in memory."""
    return json.dumps(plain(value), sort_keys=True, default=_name)


def _name(value: Any) -> str:
    named = getattr(value, "__qualname__", None)  # a function or a class
    text = str(value)
    return str(named or (type(value).__qualname__ if " at 0x" in text else text))
