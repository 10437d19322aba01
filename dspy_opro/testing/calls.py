"""What a fake language model sees of one call, and how its answer is written down.

One rule: everything here is read from the messages alone, as a language model would read it, so that the
same code serves a fake in the process and a fake behind HTTP. It knows DSPy's prompt formats but not DSPy.
"""

from __future__ import annotations

import hashlib
import json
import re
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

Format = Literal["chat", "json", "xml", "text"]

# The last user message ends with one of these requests; the field names stand in backticks behind it.
# Wording of DSPy 3.0 to 3.4: `user_message_output_requirements` of the three adapters.
_REQUESTS: tuple[tuple[Format, str, str], ...] = (
    (
        "chat",
        "Respond with the corresponding output fields, starting with the field",
        r"`\[\[ ## (\w+) ## ]]`",
    ),
    ("json", "Respond with a JSON object in the following order of fields:", r"`(\w+)`"),
    ("xml", "Respond with the corresponding output fields wrapped in XML tags", r"`<(\w+)>`"),
)
_OBJECTIVE = "your objective is:"
_SECTION = re.compile(r"(?ms)^\[\[ ## (\w+) ## ]][ \t]*\n?(.*?)(?=^\[\[ ## \w+ ## ]]|\Z)")
_TAG = re.compile(r"(?ms)^<(\w+)>\n?(.*?)\n?</\1>")


@dataclass(frozen=True)
class LMCall:
    """One call as the language model sees it."""

    model: str
    """The model's name. Over HTTP it has no provider prefix."""
    messages: tuple[tuple[str, str], ...]
    """(role, text) in order. Parts of a message that are not text are left out."""
    temperature: float | None = None
    """The temperature of the request. None if it has none."""
    seed: int | None = None
    """The `seed` of the request. None if it has none."""
    rollout_id: int | None = None
    """DSPy's rollout id. None over HTTP, where DSPy removes it before it sends the request."""
    sample: int = 0
    """How many calls with the same values in all fields above came before this one."""
    request: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """All settings of the request as they arrived (`max_tokens`, `response_format`, …)."""

    @cached_property
    def system(self) -> str:
        """The text of the system messages."""
        return "\n\n".join(text for role, text in self.messages if role in ("system", "developer"))

    @cached_property
    def user(self) -> str:
        """The last user message: the inputs of this call, without demonstrations."""
        return next((text for role, text in reversed(self.messages) if role == "user"), "")

    @cached_property
    def prompt(self) -> str:
        """All messages in order."""
        return "\n\n".join(text for _, text in self.messages)

    @cached_property
    def instructions(self) -> str:
        """The signature's instructions. If no adapter of DSPy wrote the system text, it is the whole system text."""
        _, marker, text = self.system.rpartition(_OBJECTIVE)
        return textwrap.dedent(text).strip() if marker else self.system.strip()

    @cached_property
    def _requested(self) -> tuple[Format, tuple[str, ...], int]:
        """(format, output fields, where the request for them begins in the user message)."""
        for name, marker, pattern in _REQUESTS:
            at = self.user.rfind(marker)
            if at >= 0:
                line = self.user[at + len(marker) :].partition("\n")[0]
                fields = (f for f in re.findall(pattern, line) if f != "completed")
                return name, tuple(dict.fromkeys(fields)), at
        schema = _schema_fields(self.request.get("response_format"))
        return "json" if schema else "text", schema, len(self.user)

    @property
    def format(self) -> Format:
        """The form of answer that the prompt asks for: `chat`, `json` or `xml` of DSPy's adapters, otherwise `text`."""
        return self._requested[0]

    @property
    def output_fields(self) -> tuple[str, ...]:
        """The names of the fields that the answer must have, in order. Empty for free text."""
        return self._requested[1]

    @cached_property
    def inputs(self) -> dict[str, str]:
        """Input field -> its text in the last user message."""
        text = self.user[: self._requested[2]]
        # XMLAdapter writes inputs as tags since DSPy 3.1 and as sections before.
        found = (self.format == "xml" and _TAG.findall(text)) or _SECTION.findall(text)
        return {name: value.strip() for name, value in found}


class SampleCounter:
    """Numbers equal calls, so that each can get a sample of its own whatever arrives in between."""

    def __init__(self) -> None:
        self._seen: dict[bytes, int] = {}  # digest of a call without its number -> how often it came

    def number(self, call: LMCall) -> LMCall:
        """The call with its `sample` set."""
        key = digest(call.model, call.messages, call.temperature, call.seed, call.rollout_id)
        sample = self._seen.get(key, 0)
        self._seen[key] = sample + 1
        return replace(call, sample=sample)


def digest(*values: Any) -> bytes:
    """A hash that is the same in every process, unlike `hash`."""
    return hashlib.blake2b(repr(values).encode("utf-8", "surrogatepass"), digest_size=16).digest()


Answer = Callable[[LMCall], "str | Mapping[str, Any]"]
"""Text is the raw completion; a mapping of output field to value is rendered as the prompt asks."""


def render(answer: str | Mapping[str, Any], call: LMCall) -> str:
    """Write an answer in the format that the call's prompt asks for.

    Args:
        answer: Text, which is returned as it is, or output field name to value.
        call: The call that is answered.

    Returns:
        A completion that the adapter behind the prompt parses back to the same values.
    """
    if isinstance(answer, str):
        return answer
    if call.format == "json":
        return json.dumps(dict(answer), default=str, ensure_ascii=False)
    texts = {name: _text(value) for name, value in answer.items()}
    if call.format == "chat":
        sections = [f"[[ ## {name} ## ]]\n{text}" for name, text in texts.items()]
        return "\n\n".join([*sections, "[[ ## completed ## ]]"])
    if call.format == "xml":
        return "\n".join(f"<{name}>\n{_escape(text)}\n</{name}>" for name, text in texts.items())
    return "\n".join(texts.values()) if len(texts) == 1 else "\n".join(f"{n}: {t}" for n, t in texts.items())


def content_text(content: Any) -> str:
    """The text of a message's content, which OpenAI's format writes as a string or as a list of parts."""
    if isinstance(content, list):
        return "\n".join(part.get("text", "") for part in content if isinstance(part, dict))
    return "" if content is None else str(content)


def count_tokens(text: str) -> int:
    """The fakes' token: a run of characters without white space."""
    return len(text.split())


def _schema_fields(response_format: Any) -> tuple[str, ...]:
    """The properties of the JSON schema that an OpenAI client sends, if it sends one."""
    if not isinstance(response_format, Mapping):
        return ()
    schema = response_format.get("json_schema") or {}
    return tuple((schema.get("schema") or {}).get("properties") or ())


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return str(value) if isinstance(value, bool) else json.dumps(value, default=str, ensure_ascii=False)


def _escape(text: str) -> str:
    # DSPy 3.4 parses real XML; earlier versions take the text between the tags as it is, and show an
    # escaped "&" or "<" literally. Text without these two characters reads the same in all versions.
    return text.replace("&", "&amp;").replace("<", "&lt;")
