"""From a `response_format` to what llama.cpp holds an answer to; a schema it can't hold is an error, never ignored."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from pydantic_core import from_json


class UnsupportedSchemaError(ValueError):
    """A JSON schema that llama.cpp can't hold an answer to."""


def response_schema(response_format: Any) -> dict[str, Any] | None:
    """The JSON schema that a `response_format` asks for: a pydantic class, or a dict in OpenAI's or lm15's form."""
    if response_format is None:
        return None
    if hasattr(response_format, "model_json_schema"):
        schema: dict[str, Any] = response_format.model_json_schema()
        return schema
    kind = response_format.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    if kind == "json_schema":
        return dict(response_format.get("json_schema", response_format)["schema"])
    raise ValueError(f"response_format must be text, json_object or json_schema, but got {kind!r}.")


_PLAIN_KEYS = {"type", "properties", "required", "additionalProperties", "enum", "const", "items", "anyOf"}
_PLAIN_KEYS |= {"$defs", "$ref", "title", "description", "default"}


def is_plain_schema(schema: Any) -> bool:
    """Whether a JSON schema keeps to what every grammar engine of llama.cpp is known to follow.

    That is: objects whose properties are all listed, arrays, numbers, strings, booleans, null, choices of them.
    """
    if not isinstance(schema, Mapping) or not _PLAIN_KEYS.issuperset(schema):
        return False
    if schema.get("type") == "object" and schema.get("additionalProperties") is not False:
        return False
    if not any(key in schema for key in ("type", "enum", "const", "anyOf", "$ref")):
        return False
    inner = [
        *schema.get("properties", {}).values(),
        *schema.get("$defs", {}).values(),
        *schema.get("anyOf", []),
    ]
    return all(map(is_plain_schema, [*inner, *([schema["items"]] if "items" in schema else [])]))


def constraint(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of llama.cpp's request that makes the answer follow `schema`."""
    if is_plain_schema(schema):
        return {"grammar": _compact_grammar(json.dumps(schema))}
    return {"json_schema": dict(schema)}


def check_answer(text: str, schema: Mapping[str, Any], *, is_whole: bool) -> None:
    """Raise if an answer is no JSON, or not the beginning of some where `max_tokens` ended it.

    For some schemas that it does not know, llama.cpp drops the constraint with no more than a line in its log.
    """
    try:
        from_json(text, allow_partial=not is_whole)
    except ValueError as error:
        if not is_whole and str(error).startswith("EOF"):
            return  # what a partial reading has no value for: nothing yet, or a string, number or word cut off
        raise unsupported(schema, "the answer was no JSON") from error


def unsupported(schema: Mapping[str, Any], reason: object) -> UnsupportedSchemaError:
    """The error that says which schema llama.cpp could not follow, and why."""
    return UnsupportedSchemaError(
        f"llama.cpp can't hold an answer to the schema {json.dumps(schema)}: {reason}."
    )


@lru_cache(maxsize=256)
def _compact_grammar(schema_json: str) -> str:
    # Without line breaks and indentation an answer has half the tokens, and takes half the time.
    import xllamacpp

    # LLGuidance's own keys, https://github.com/guidance-ai/llguidance/blob/main/docs/json_schema.md
    style = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    grammar: str = xllamacpp.json_schema_to_grammar({**json.loads(schema_json), "x-guidance": style})
    return grammar
