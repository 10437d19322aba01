"""What the tests of the fakes share: a program, answers, and a plain HTTP client."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from typing import Any, Literal

import dspy
import pytest

from dspy_opro.testing import (
    LMCall,
    SimulatedServer,
)

DSPY = tuple(int(part) for part in dspy.__version__.split(".")[:2])
ADAPTERS = [dspy.ChatAdapter(), dspy.JSONAdapter(), dspy.XMLAdapter()]
INSTRUCTIONS = 'Add the numbers.\n\nMind "quotes" and\n  indentation.'
adapters = pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: type(adapter).__name__)


class Answered(dspy.Signature):  # type: ignore[misc]
    """Placeholder."""

    question: str = dspy.InputField()
    context: str = dspy.InputField()
    text: str = dspy.OutputField()
    number: int = dspy.OutputField()
    share: float = dspy.OutputField()
    flag: bool = dspy.OutputField()
    label: Literal["a", "b"] = dspy.OutputField()
    items: list[str] = dspy.OutputField()


VALUES = {
    "text": "two\nlines",
    "number": 3,
    "share": 0.5,
    "flag": True,
    "label": "b",
    "items": ["x", "y z"],
}
PROGRAM = dspy.Predict(Answered.with_instructions(INSTRUCTIONS))
INPUTS = {"question": "1 + 2?", "context": "first line\nsecond line"}


def echo(call: LMCall) -> dict[str, str]:
    """Fill every field with the first input, so that an answer tells which call it answers."""
    return dict.fromkeys(call.output_fields, next(iter(call.inputs.values()), ""))


QA = dspy.Signature("question -> answer")
"""Made once: Python 3.11.7 can't parse in several threads at a time ("AST constructor recursion depth mismatch")."""


def ask(lm: dspy.LM, question: str = "q", adapter: Any = None) -> str:
    with dspy.context(lm=lm, adapter=adapter or dspy.ChatAdapter(), disable_history=True):
        return str(dspy.Predict(QA)(question=question).answer)


def without_fallback() -> Any:
    """ChatAdapter asks again through JSONAdapter, where it can be told not to."""
    return dspy.ChatAdapter(use_json_adapter_fallback=False) if DSPY >= (3, 1) else dspy.JSONAdapter()


async def raw(server: SimulatedServer, *texts: str, **settings: Any) -> list[dict[str, Any]]:
    """The bodies that one connection gets for one request per text."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    bodies = []
    for text in texts:
        writer.write(http_request(text, **settings))
        bodies.append(await http_body(reader))
    writer.close()
    return bodies


def http_request(text: str, model: str = "m", **settings: Any) -> bytes:
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": text}], **settings}).encode()
    return b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body) + body


async def http_body(reader: asyncio.StreamReader) -> dict[str, Any]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    length = int(head.lower().partition("content-length:")[2].split()[0])
    return dict(json.loads(await reader.readexactly(length)))


def settled(server: SimulatedServer) -> Any:
    """The counters once the server has noticed that a client went away."""
    deadline = time.monotonic() + 5
    while (stats := server.stats()).in_flight and time.monotonic() < deadline:
        time.sleep(0.01)
    return stats


async def wire(server: SimulatedServer) -> tuple[str, bytes]:
    """(status line and headers, body) as they came; `hang` or `reset` where nothing came."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(http_request("x"))
    try:
        head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), timeout=0.3)).decode()
        return head, await reader.readexactly(int(head.lower().partition("content-length:")[2].split()[0]))
    except asyncio.TimeoutError:
        return "hang", b""
    except (asyncio.IncompleteReadError, ConnectionResetError):
        return "reset", b""
    finally:
        writer.close()
        with contextlib.suppress(ConnectionResetError):
            await writer.wait_closed()
