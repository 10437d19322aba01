"""How the values of a search become JSON and come back equal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from dspy_opro.stopping import Usage
from dspy_opro.trajectory import Outcome
from dspy_opro.work import Answer, Ask, Proposal, work_key

Record = dict[str, Any]
"""One entry of a run's log: plain JSON with a `kind`."""

TEXT_LIMIT = 1000
"""Characters of an outcome's output, feedback and cause that are kept."""


def clip(text: str, limit: int = TEXT_LIMIT) -> str:
    """Text of at most `limit` characters; where some are missing the last one is an ellipsis."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def answer_record(answer: Answer) -> Record:
    work, content = answer.work, answer.content
    spent: Record = {"usage": encode_usage(answer.usage), "seconds": answer.seconds}
    if isinstance(work, Ask):
        assert isinstance(content, Proposal)
        record: Record = {"kind": "proposal", "key": work_key(work), "texts": dict(content.texts)}
        if content.problems:
            record["problems"] = list(content.problems)
        if content.error is not None:
            record["error"] = content.error
        return record | spent
    assert isinstance(content, tuple)
    return {
        "kind": "block",
        "candidate": work.candidate.id,
        "split": work.split,
        "start": work.start,
        "outcomes": [encode_outcome(outcome) for outcome in content],
    } | spent


def record_key(record: Mapping[str, Any]) -> str | None:
    """The `work_key` of the work that a record answers; None where it answers none."""
    if record["kind"] == "proposal":
        return str(record["key"])
    if record["kind"] == "block":
        stop = record["start"] + len(record["outcomes"])
        return f"block/{record['candidate']}/{record['split']}/{record['start']}/{stop}"
    return None


def decode_proposal(record: Mapping[str, Any]) -> Proposal:
    return Proposal(record["texts"], tuple(record.get("problems", ())), record.get("error"))


def encode_outcome(outcome: Outcome) -> Record:
    """The fields that say something; texts clipped, so that a run and its resumption show the same."""
    record: Record = {"score": outcome.score}
    for name in ("output", "feedback"):
        if text := getattr(outcome, name):
            record[name] = clip(text)
    if outcome.error is not None:
        record["error"] = clip(outcome.error)
    if outcome.subscores is not None:
        record["subscores"] = dict(outcome.subscores)
    return record


def decode_outcome(record: Mapping[str, Any]) -> Outcome:
    return Outcome(**record)


def encode_usage(usage: Usage) -> Record:
    """The counts that are not zero."""
    return {f.name: value for f in fields(usage) if (value := getattr(usage, f.name))}


def decode_usage(record: Mapping[str, Any]) -> Usage:
    return Usage(**record)
