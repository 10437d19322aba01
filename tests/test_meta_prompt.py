from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import dspy
import pytest

DOCS = Path(__file__).parent.parent / "docs"
IS_PINNED = dspy.__version__.startswith("3.4.")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("meta_prompt", DOCS / "meta_prompt.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(not IS_PINNED, reason="the page shows the prompt as DSPy 3.4 writes it")
def test_the_page_shows_the_prompts_as_they_are(script: Any) -> None:
    page = (DOCS / "meta-prompt.md").read_text(encoding="utf-8")
    for name, text in script.rendered().items():
        (shown,) = script.block(name).findall(page)
        assert shown == text, f"run: python docs/meta_prompt.py  ({name} differs)"


def test_a_prompt_has_all_its_parts(script: Any) -> None:
    prompt = script.rendered()["default"]
    scores = [
        line
        for before, line in zip(prompt.split("\n"), prompt.split("\n")[1:], strict=False)
        if before == "score:"
    ]
    assert scores == sorted(scores, key=int) and len(scores) > 2
    for part in (
        "- input `mail` (str)",
        "output:\nteam:",
        "expected:\nteam:",
        "result:\nwrong",
        "feedback:\nThis is for",
    ):
        assert part in prompt
