"""A teleprompter's arguments as JSON and back: what can't come back the same is an error when it is written.

Values that JSON does not know are dicts with one key that begins with `$`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dspy_opro.config import OPROConfig, unknown_keyword

from .reading import decode
from .writing import encode, encode_dataset, refusal

__all__ = ["from_json", "to_json"]


def to_json(config: OPROConfig) -> dict[str, Any]:
    """The arguments that were given, as plain JSON.

    Raises:
        ValueError: One of them can't be written; the message names it, the reason and the remedy.
    """
    written = {}
    for name in OPROConfig.model_fields:
        if name not in config.model_fields_set:
            continue
        value = getattr(config, name)
        if name in ("trainset", "valset") and value is not None:
            written[name] = encode_dataset(value, name)
        elif name == "storage" and not isinstance(value, (str, type(None))):
            raise refusal(name, "is an object", "Write storage as a URL, or pass the object to compile(...).")
        else:
            written[name] = encode(value, name)
    return written


def from_json(written: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments out of what `to_json` wrote. It imports and calls what is named there.

    Raises:
        TypeError: An argument is unknown.
        ValueError: Something that is named can't be imported or made.
    """
    for name in written:
        if name not in OPROConfig.model_fields:
            raise unknown_keyword(name, OPROConfig.model_fields, "from_config")
    return {name: decode(value, name) for name, value in written.items()}
