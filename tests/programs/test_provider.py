"""What an error says about the next call, by its class, status and causes."""

from __future__ import annotations

import asyncio
import json
import pickle
import socket
import time
from email.utils import formatdate
from types import SimpleNamespace
from typing import Any

import pytest
from dspy.utils.exceptions import AdapterParseError

from dspy_opro.programs.awaiting import ExampleTimeout
from dspy_opro.programs.evaluator import MetricRaised
from dspy_opro.programs.provider import ErrorElsewhere, Verdict, is_unusable, judge


def error(name: str = "SomeError", module: str = "tools", **attributes: Any) -> Exception:
    """An exception of a library: its class, where that lives, and what it carries."""
    made: Exception = type(name, (Exception,), {"__module__": module})("why")
    for attribute, value in attributes.items():
        setattr(made, attribute, value)
    return made


def caused(by: BaseException, outer: Exception | None = None) -> Exception:
    try:
        raise outer or ValueError("wrapped") from by
    except Exception as raised:
        return raised


def happened_during(inner: BaseException) -> Exception:
    try:
        try:
            raise inner
        except BaseException:
            raise ValueError("later")  # noqa: B904
    except ValueError as raised:
        return raised


LIMIT = error("RateLimitError", "litellm.exceptions", status_code=429)
PARSE = AdapterParseError("ChatAdapter", SimpleNamespace(output_fields={}), "no fields")


@pytest.mark.parametrize(
    "transient",
    [
        *(error(status_code=status) for status in (408, 429, 500, 502, 503, 504, 529)),
        error("LMServerError", "dspy.utils.exceptions", status=500),
        error("LMTransportError", "dspy.utils.exceptions"),
        error("HTTPStatusError", "httpx", response=SimpleNamespace(status_code=503, headers={})),
        error("Timeout", "litellm.exceptions", status_code=408),
        ConnectionRefusedError("refused"),
        ConnectionResetError("reset"),
        TimeoutError("read timed out"),
        happened_during(socket.gaierror("the network is down, so no name has an address")),
        asyncio.TimeoutError(),
        caused(LIMIT),
        caused(caused(LIMIT), MetricRaised("metric raised")),
        happened_during(LIMIT),
        caused(PARSE, error(status_code=503)),
    ],
    ids=lambda e: type(e).__name__,
)
def test_what_may_work_later(transient: Exception) -> None:
    assert judge(transient).kind == "transient"


@pytest.mark.parametrize(
    "account",
    [
        error("AuthenticationError", "litellm.exceptions", status_code=401),
        error("LMAuthError", "dspy.utils.exceptions", status=401),
        error("NotFoundError", "openai", status_code=404),
        error("LMUnsupportedModelError", "dspy.utils.exceptions", status=404),
        error("RateLimitError", "openai", status_code=429, code="insufficient_quota"),
        error("APIError", "litellm.exceptions", status_code=402),
        caused(error("AuthenticationError", "litellm.exceptions", status_code=401)),
    ],
    ids=lambda e: type(e).__name__,
)
def test_what_no_call_gets_over(account: Exception) -> None:
    assert judge(account).kind == "account"


@pytest.mark.parametrize(
    "other",
    [
        None,
        ValueError("bad"),
        PARSE,
        ExampleTimeout("no score within example_timeout_seconds=1"),
        error("ContextWindowExceededError", "litellm.exceptions", status_code=400),
        error("LMAuthError", "dspy.utils.exceptions", status=403),
        error("NotFoundError", "elasticsearch", status_code=404),  # a tool's, and of this example
        error(status_code=422),
        error(status_code=501),
        error(status_code="429"),
        caused(json.JSONDecodeError("bad", "{", 0), error("InternalServerError", "litellm", status_code=500)),
        caused(LIMIT, error("BadRequestError", "litellm.exceptions", status_code=400)),
    ],
    ids=lambda e: type(e).__name__,
)
def test_what_is_neither(other: Exception | None) -> None:
    assert judge(other) == Verdict("other")


@pytest.mark.parametrize(
    ("told", "expected"), [("3", 3.0), ("0.5", 0.5), ("-1", 0.0), ("inf", None), ("soon", None), (None, None)]
)
def test_retry_after_in_seconds(told: str | None, expected: float | None) -> None:
    headers = {} if told is None else {"retry-after": told}
    limited = error(response=SimpleNamespace(status_code=429, headers=headers))
    assert judge(caused(limited)) == Verdict("transient", True, expected)


def test_retry_after_as_a_date() -> None:
    headers = {"retry-after": formatdate(time.time() + 30, usegmt=True)}
    seconds = judge(error(response=SimpleNamespace(status_code=429, headers=headers))).retry_after
    assert seconds == pytest.approx(30, abs=3)


def test_an_attribute_says_it_too() -> None:
    assert judge(error("LMRateLimitError", "dspy", status=429, retry_after=2.0)).retry_after == 2.0


class Unreadable(Exception):
    """Each property raises, as `response` does on an httpx error without one."""

    @property
    def response(self) -> Any:
        raise RuntimeError("The response property has not been set.")

    status = status_code = code = provider_code = exceptions = retry_after = response


def test_a_property_that_raises_says_nothing() -> None:
    assert judge(Unreadable("x")) == Verdict("other")
    assert not is_unusable(Unreadable("x"))
    assert judge(caused(LIMIT, Unreadable("x"))) == Verdict("transient", True)


@pytest.mark.parametrize("value", [10**400, "Mon, 01 Jan 0001 00:00:00 +2359"], ids=["int", "date"])
def test_a_retry_after_that_no_number_holds_says_nothing(value: Any) -> None:
    assert judge(error("LMRateLimitError", "dspy", status=429, retry_after=value)).retry_after in (None, 0.0)


def test_a_circle_of_causes_ends() -> None:
    first, second = ValueError("one"), ValueError("two")
    first.__cause__, second.__cause__ = second, first
    assert judge(first).kind == "other"


def test_an_error_of_another_process_keeps_its_meaning() -> None:
    verdict = Verdict("transient", True, 2.5)
    copied = pickle.loads(pickle.dumps(ErrorElsewhere("RateLimitError: why", verdict)))
    assert str(copied) == "RateLimitError: why"
    assert judge(copied) == verdict
