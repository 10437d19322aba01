"""What a DSPy request means to the model: its prompt and its seed, the same for every version of DSPy."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import count
from typing import Any

SAMPLING = ("temperature", "max_tokens", "top_p", "frequency_penalty", "presence_penalty")
"""The request parameters that llama.cpp knows by their OpenAI names."""

CAPABILITIES = frozenset({*SAMPLING, "stop", "seed", "response_format"})
"""All that the model honours; DSPy's adapters look them up."""


@dataclass(frozen=True)
class _Call:
    rollout_id: int | None
    samples: Iterator[int]


# DSPy takes the rollout id out of a request before an engine sees it, so it travels beside the request.
_call: ContextVar[_Call | None] = ContextVar("dspy_opro_local_call", default=None)


@contextmanager
def rollout(rollout_id: int | None) -> Iterator[None]:
    """Within it, `next_seed` derives from `rollout_id` and gives each of the n samples of a call its own seed."""
    token = _call.set(_Call(rollout_id, count()))
    try:
        yield
    finally:
        _call.reset(token)


def next_seed(seed: int) -> int:
    """The seed of the next sample of this call."""
    call = _call.get()
    return seed if call is None else derived_seed(seed, call.rollout_id, next(call.samples))


def derived_seed(seed: int, rollout_id: int | None, sample: int = 0) -> int:
    """A seed for llama.cpp, 0 to 2**32 - 2, that differs between seeds, rollouts and samples.

    `seed` itself is used for a call's first sample where no rollout is asked for.
    """
    if rollout_id is None and sample == 0:
        return seed
    digest = hashlib.sha256(f"{seed}/{rollout_id}/{sample}".encode()).digest()
    # 2**32 - 1 is llama.cpp's word for "a random seed".
    return int.from_bytes(digest[:4], "big") % (2**32 - 1)


def text_prompt(messages: Sequence[Mapping[str, Any]]) -> str:
    """The text that a model without chat form continues.

    One message is continued as it stands, so that `lm("The capital of France is")` is a completion. Several, as an
    adapter makes them, are joined as `dspy.LM` joins them for `model_type="text"`.
    """
    texts = [str(message["content"]) for message in messages]
    return texts[0] if len(texts) == 1 else "\n\n".join([*texts, "BEGIN RESPONSE:"])
