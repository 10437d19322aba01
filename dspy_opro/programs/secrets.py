"""What a run writes holds no secrets: keys, tokens, passwords, credentials, and headers, which may contain them."""

from __future__ import annotations

import re
from typing import Any

_NAME = re.compile(
    r"(?i)((^|[_-])(key|token|auth|bearer|cookies?|passwd|access_key_id|token_provider)"
    r"|apikey|secret|password|passphrase|credentials?|headers?|authorization)$"
)
# Errors quote long answers of an LM. Each expression looks at every character a few times at most.
_BEFORE_HOST = re.compile(r"(?<!\S)\S*@(?=[\w\[])")
# Some errors quote an address without its scheme: "failed to connect to user:password@host".
_USER = re.compile(r"(?:(?<=://)|(?<![^:/@])(?=[^\w:/@]*\w))[^:/@]*:(?!//)")
_IN_QUERY = re.compile(r"(?i)([?&][^=&?\s]{0,64}(?:pass|secret|token|key)[^=&\s]{0,64}=)[^&\s]*")

_KEY = re.compile(r"\b(Bearer |sk-)[\w.~+/-]{8,}")


def is_secret(name: object) -> bool:
    """Whether a value of this name is a secret."""
    return isinstance(name, str) and _NAME.search(name) is not None


def without_password(text: Any) -> Any:
    """A text without the passwords of its URLs, bearer tokens and keys that begin with `sk-`.

    Any other value is returned as it is.
    """
    if not isinstance(text, str):
        return text
    return _KEY.sub(r"\1***", _IN_QUERY.sub(r"\1***", _BEFORE_HOST.sub(_without_user, text)))


def _without_user(match: re.Match[str]) -> str:
    """What stands before a host, without the password behind the first user name."""
    user = _USER.search(match.group())
    return match.group() if user is None else f"{match.group()[: user.end()]}***@"


def without_secrets(value: Any) -> Any:
    """JSON values without the secret keys of dicts, at any depth, and without passwords in URLs."""
    if isinstance(value, dict):
        return {name: without_secrets(item) for name, item in value.items() if not is_secret(name)}
    if isinstance(value, (list, tuple)):
        return type(value)(map(without_secrets, value))
    return without_password(value)
