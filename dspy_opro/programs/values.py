"""The values in an example's fields: as text for the meta-prompt, and as JSON that is equal in all processes."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections.abc import Mapping
from enum import Enum
from typing import Any

# DSPy 3.0 to 3.4 mark images, audio and files in a text like this. Between the marks is JSON, in 3.0.0 the repr of a
# list.
_MEDIA = re.compile(r"<<CUSTOM-TYPE-START-IDENTIFIER>>.*?<<CUSTOM-TYPE-END-IDENTIFIER>>", re.DOTALL)
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+(?=>)")
"""In the text of an object without a `__repr__`. It differs in every process."""
_SCALARS = frozenset({str, int, float, bool, type(None)})
_KIND = re.compile(r"""\\*["']type\\*["']:\s*\\*["'](?:input_)?(\w+?)(?:_url)?\\*["']""")


def fields(example: Any) -> dict[str, Any]:
    """An example's own fields, without the random `dspy_uuid` that DSPy's datasets add."""
    return dict(example.items())


def own_copies(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs that a program may change. A value that can't be copied is shared."""

    def own_copy(value: Any) -> Any:
        try:
            return copy.deepcopy(value)
        except Exception:
            return value

    return {name: own_copy(value) for name, value in inputs.items()}


def shown(value: Any) -> str:
    """A value as text that can be stored and sent. Images and other media become a name such as `<image>`.

    Lists and objects are JSON, as in the prompts of DSPy's adapters.
    """

    def name(match: re.Match[str]) -> str:
        kind = _KIND.search(match.group())
        return f"<{kind.group(1) if kind else 'media'}>"

    given = plain(value)
    if isinstance(given, (dict, list, tuple)):
        given = json.dumps(given, ensure_ascii=False, default=_without_address)
    text = given if isinstance(given, str) else _without_address(given)
    return storable(_MEDIA.sub(name, text))


def _without_address(value: Any) -> str:
    return _ADDRESS.sub("", str(value))


def storable(text: str) -> str:
    """The text without half a surrogate pair, which UTF-8 and most databases can't hold and no provider takes."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def plain(value: Any) -> Any:
    """A value as dicts with text keys, lists and scalars, in the form that DSPy's adapters show."""
    if type(value) in _SCALARS:
        return value
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else str(plain(key)): plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        items = [plain(item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, (set, frozenset)):
        return sorted((plain(item) for item in value), key=repr)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {each.name: plain(getattr(value, each.name)) for each in dataclasses.fields(value)}
    for name in () if isinstance(value, type) else _CONVERSIONS:
        convert = getattr(value, name, None)
        if callable(convert):
            return plain(convert())
    return value


# Of pydantic's models, which DSPy's own types are, examples, arrays, and dates.
_CONVERSIONS = ("model_dump", "toDict", "tolist", "isoformat")


def as_json(value: Any) -> str:
    """A value as JSON. The text is the same in every process: keys and sets are sorted, addresses are left out."""
    return json.dumps(plain(value), sort_keys=True, default=_name)


def as_key(value: Any) -> str:
    """A value as text to compare in this process. An object without a text of its own equals only itself."""
    return json.dumps(plain(value), sort_keys=True, default=str)


def _name(value: Any) -> str:
    named = getattr(value, "__qualname__", None)  # a function or a class
    text = str(value)
    return str(named or (type(value).__qualname__ if " at 0x" in text else text))
