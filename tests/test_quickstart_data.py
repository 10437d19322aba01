"""The quickstart's data: labelled, balanced, and no review of one split is known from another."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest

DATA = Path(__file__).parents[1] / "examples" / "data" / "reviews.jsonl"
ROWS = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]


def words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


def letter_runs(text: str, length: int = 4) -> set[str]:
    letters = " ".join(words(text))
    return {letters[start : start + length] for start in range(len(letters) - length + 1)}


def shared(one: set[str], other: set[str]) -> float:
    """Jaccard similarity: 0.0 for nothing in common, 1.0 for the same."""
    return len(one & other) / len(one | other)


def near_duplicates(rows: list[dict[str, str]]) -> list[tuple[str, str]]:
    """Pairs of reviews from different splits that say nearly the same in nearly the same words."""
    parts = [(row, letter_runs(row["review"]), set(words(row["review"]))) for row in rows]
    return [
        (a["review"], b["review"])
        for (a, a_runs, a_words), (b, b_runs, b_words) in combinations(parts, 2)
        if a["split"] != b["split"] and (shared(a_runs, b_runs) >= 0.3 or shared(a_words, b_words) >= 0.4)
    ]


def test_every_row_has_a_split_a_review_and_a_label() -> None:
    assert {tuple(row) for row in ROWS} == {("split", "review", "verdict")}
    assert all(4 <= len(row["review"].split()) <= 25 for row in ROWS)


def test_each_split_has_as_many_good_as_bad_reviews() -> None:
    assert Counter((row["split"], row["verdict"]) for row in ROWS) == {
        ("train", "good"): 60,
        ("train", "bad"): 60,
        ("validation", "good"): 47,
        ("validation", "bad"): 47,
        ("test", "good"): 60,
        ("test", "bad"): 60,
    }


def test_no_review_occurs_twice() -> None:
    seen = Counter(" ".join(words(row["review"])) for row in ROWS)
    assert [text for text, times in seen.items() if times > 1] == []


def test_no_review_has_a_near_duplicate_in_another_split() -> None:
    assert near_duplicates(ROWS) == []


@pytest.mark.parametrize(
    "copy",
    [
        pytest.param(
            "The kettle leaks from the base, and its handle gets too hot!", id="a few words changed"
        ),
        pytest.param(
            "Far too hot the handle gets and from the base this kettle leaks.", id="words in another order"
        ),
    ],
)
def test_near_duplicates_are_found(copy: str) -> None:
    rows = [
        {"split": "train", "review": "This kettle leaks from the base and the handle gets far too hot."},
        {"split": "test", "review": copy},
    ]
    assert len(near_duplicates(rows)) == 1
