"""What a provider's errors mean for the next call."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, Literal

from .awaiting import ExampleTimeout


@dataclass(frozen=True)
class Verdict:
    """What an error says about the next call."""

    kind: Literal["transient", "account", "other"]
    """`transient`: the same call may work later. `account`: no call of this LM will work. `other`: anything else."""
    is_rate_limit: bool = False
    retry_after: float | None = None
    """Seconds, where the provider gives them."""
    is_of_provider: bool = True
    """Whether an HTTP status or the library of an LM says so. A plain `TimeoutError` may be the program's own."""


class ErrorElsewhere(RuntimeError):
    """An error of another process: its text and what it means. The error itself may not be picklable."""

    def __init__(self, text: str, verdict: Verdict) -> None:
        super().__init__(text, verdict)
        self.verdict = verdict

    def __str__(self) -> str:
        return str(self.args[0])


# Errors are recognised by class name: DSPy 3.0 to 3.2 raise LiteLLM's, later versions their own, tools any library's.
_TRANSIENT = frozenset({
    *("ConnectionError", "TimeoutError", "Timeout", "TimeoutException", "NetworkError", "RemoteProtocolError"),
    *("ClientConnectionError", "APIConnectionError", "LMTransportError", "LMTimeoutError", "LMServerError"),
    *("LMRateLimitError", "LMLockTimeoutError", "CallCancelled", "gaierror"),
})  # fmt: skip
_ACCOUNT = frozenset({
    *("LMAuthError", "LMBillingError", "LMNotConfiguredError", "LMUnsupportedModelError"),
    *("AuthenticationError", "NotFoundError", "LiteLLMUnknownProvider"),
})  # fmt: skip
_OF_LMS = frozenset({"dspy", "litellm", "openai", "anthropic"})
_REFUSED = frozenset({401, 402, 403, 404})
_TRANSIENT_STATUS = frozenset({408, 425, 429, *range(500, 600)}) - {501, 505}


def judge(error: BaseException | None) -> Verdict:
    """What an error means. Of a chain of causes the outermost error that says something decides.

    Permanent errors are never tried again: a wrong key, an unknown model and an exhausted quota (`account`), and a
    prompt that is too long or not allowed (`other`).
    """
    chain = _chain(error)
    for link in chain:
        if isinstance(link, ErrorElsewhere):
            return link.verdict
        if isinstance(link, ExampleTimeout):
            break
        names, status = {kind.__name__ for kind in type(link).__mro__}, status_of(link)
        is_of_lm = type(link).__module__.partition(".")[0] in _OF_LMS
        if (
            is_of_lm
            and status != 403
            and (names & _ACCOUNT or status in (402, 404) or _is_out_of_quota(link))
        ):
            return Verdict("account")
        if status is None and not names & _TRANSIENT:
            continue
        if status is not None and status not in _TRANSIENT_STATUS:
            break
        if status != 429 and any(isinstance(cause, json.JSONDecodeError) for cause in chain):
            break  # LiteLLM reports a garbled answer as status 500
        retry_after = next((seconds for cause in chain if (seconds := _retry_after(cause)) is not None), None)
        is_rate_limit = status == 429 or "LMRateLimitError" in names
        return Verdict("transient", is_rate_limit, retry_after, is_of_lm or status is not None)
    return Verdict("other")


def is_too_long(error: BaseException) -> bool:
    """Whether a prompt does not fit into the context of an LM."""
    names = {kind.__name__ for link in _chain(error) for kind in type(link).__mro__}
    return not names.isdisjoint({"ContextWindowExceededError", "ContextLengthError"})


def is_unusable(error: BaseException) -> bool:
    """Whether an LM that has not answered yet never will: its account is wrong, or it refuses the first request.

    Of an LM that has answered, a status such as 403 says that one request is not allowed.
    """
    return judge(error).kind == "account" or any(status_of(link) in _REFUSED for link in _chain(error))


def _chain(error: BaseException | None) -> list[BaseException]:
    """An error, and what caused it."""
    chain: list[BaseException] = []
    while error is not None and not any(error is known for known in chain):
        chain.append(error)
        group = _said(error, "exceptions")  # of an ExceptionGroup, which Python 3.10 does not have
        if isinstance(group, tuple) and group:
            error = group[0]
        else:
            error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return chain


def status_of(error: BaseException) -> int | None:
    """The HTTP status of an error, from 400 to 599."""
    response = _said(error, "response")
    for holder, name in ((error, "status_code"), (error, "status"), (response, "status_code")):
        value = _said(holder, name)
        if isinstance(value, int) and 400 <= value < 600:
            return value
    return None


def _is_out_of_quota(error: BaseException) -> bool:
    """OpenAI answers 429 for that too."""
    return "insufficient_quota" in (_said(error, "code"), _said(error, "provider_code"))


def _retry_after(error: BaseException) -> float | None:
    """What `Retry-After` says: seconds or a date."""
    value = _said(error, "retry_after")
    if value is None:
        get = _said(_said(_said(error, "response"), "headers"), "get")
        value = get("retry-after") if callable(get) else None
    try:
        seconds = float(value)
    except (TypeError, ValueError, OverflowError):
        try:
            seconds = parsedate_to_datetime(str(value)).timestamp() - time.time()
        except (TypeError, ValueError, OverflowError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _said(holder: Any, name: str) -> Any:
    """An attribute; None where there is none, or where it is a property that raises an error of its own."""
    try:
        return getattr(holder, name, None)
    except Exception:
        return None
