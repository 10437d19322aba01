"""Every example runs with `--model`, on a simulated server, as a user starts it."""

from __future__ import annotations

import difflib
import importlib
import json
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dspy
import pytest

from dspy_opro.testing import LMCall, SimulatedServer
from tests.runs import is_proposal

EXAMPLES = Path(__file__).parent.parent / "examples"
HINT = "Mind the details."


def instruct(call: LMCall) -> dict[str, Any]:
    return {"instruction": f"{HINT} Variant {len(call.prompt)} {call.sample}."}


def reviews(call: LMCall) -> dict[str, Any]:
    """`good` to all, as the small model does; right once the instruction has a hint."""
    if "verdict" not in call.output_fields:
        # MIPROv2's proposer asks for observations and tips, too.
        text = f"{HINT} Variant {len(call.prompt)}."
        return dict.fromkeys(call.output_fields, text) or {"instruction": text}
    rows = [json.loads(line) for line in (EXAMPLES / "data" / "reviews.jsonl").read_text().splitlines()]
    right = {row["review"]: row["verdict"] for row in rows}[call.inputs["review"]]
    knows = HINT in call.instructions or "complains" in call.instructions
    return {"verdict": right if knows else "good"}


def town(call: LMCall) -> dict[str, Any]:
    if is_proposal(call):
        return instruct(call)
    if "query" in call.output_fields:
        return {"query": call.inputs["question"] if HINT in call.instructions else "Ostermark"}
    known = json.loads((EXAMPLES / "data" / "town.json").read_text())["questions"]
    expected = dict(known)[call.inputs["question"]]
    return {"answer": expected if expected in call.inputs["passages"] else "I do not know"}


def shop(call: LMCall) -> dict[str, Any]:
    """Asks for one price at a time, then adds, where the instruction has a hint."""
    if is_proposal(call):
        return instruct(call)
    question = call.inputs["question"]
    items = re.findall(r"lamp|chair|desk|shelf|clock|mirror", question)
    costs = re.findall(r"\[\[ ## observation_\d+ ## \]\]\s*(\d+)", call.user)
    if "next_tool_name" not in call.output_fields:
        return {"reasoning": "as seen", "answer": costs[-1] if costs else "unknown"}
    if HINT not in call.instructions or len(costs) > len(items) or (len(items) == 1 and costs):
        name, args = "finish", {}
    elif len(costs) < len(items):
        name, args = "price", {"item": items[len(costs)]}
    else:
        name, args = "add", {"numbers": [float(cost) for cost in costs]}
    return {"next_thought": "next", "next_tool_name": name, "next_tool_args": args}


def orders(call: LMCall) -> dict[str, Any]:
    if is_proposal(call):
        return instruct(call)
    extraction = importlib.import_module("extraction")
    (right,) = [order for mail, order in extraction.MAILS if mail in call.user]
    if "order" in call.output_fields:
        return {"order": right.model_dump() | ({} if HINT in call.instructions else {"quantity": 1})}
    return {name: right.model_dump()[name] for name in call.output_fields}


def pairs(call: LMCall) -> str:
    """The best pair, moved by one."""
    w, b = map(int, [("16", "16"), *re.findall(r"w=(-?\d+), b=(-?\d+)", call.prompt)][-1])
    moves = [(1, 0), (-1, 0), (0, 1), (0, -1), (1, -1), (-1, 1), (2, 0), (0, -2)]
    dw, db = moves[(call.rollout_id or call.sample) % len(moves)]
    return f"w={w + dw}, b={b + db}"


def tours(call: LMCall) -> str:
    """The best tour with a part reversed."""
    tour = re.findall(r"score \d+: ((?:\d ){7}\d)", call.prompt)[-1].split()
    start, end = sorted(((call.sample * 3) % 7, (call.sample * 5 + len(call.prompt)) % 8))
    return "score 100: " + " ".join(tour[:start] + tour[start : end + 1][::-1] + tour[end + 1 :])


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("OPENAI_API_KEY", "unused")
    monkeypatch.chdir(tmp_path)
    yield EXAMPLES
    for name in {"flags", "extraction", *(path.stem for path in EXAMPLES.glob("*.py"))} - before:
        sys.modules.pop(name, None)


SCRIPTS: dict[str, tuple[Callable[[LMCall], Any], list[str], str]] = {
    # script -> (the LM, further flags, what the output says)
    "quickstart": (reviews, ["--max-metric-calls", "100"], r"test accuracy 0\.\d+ -> 1\.000"),
    "two_steps": (town, ["--max-metric-calls", "100"], r"10 other questions: \d+% -> (100|[6-9]\d)%"),
    "react_agent": (shop, ["--max-metric-calls", "60"], r"together\? \d+"),
    "extraction": (
        orders,
        ["--max-metric-calls", "80"],
        r"after: 12 of 12 right, the judge is right about 12",
    ),
    "custom_proposer": (reviews, ["--max-metric-calls", "120"], r"instruction: '.*complains"),
    "linear_regression": (pairs, ["--max-metric-calls", "2000"], r"found: w=1[3-8], b=1[2-6]"),
    "traveling_salesman": (tours, [], r"start \d+, found \d+, shortest \d+"),
    "migration/before": (reviews, [], r"100\.0% with .*Mind the details"),
    "migration/after": (reviews, [], r"100\.0% with .*Mind the details"),
}


def test_every_example_is_in_the_table() -> None:
    scripts = {path.relative_to(EXAMPLES).with_suffix("").as_posix() for path in EXAMPLES.rglob("*.py")}
    assert scripts - {"flags"} == set(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_it_runs_with_a_model_by_flag(
    name: str, examples: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answer, flags, expected = SCRIPTS[name]
    with SimulatedServer(answer, own_process=False) as server:
        script = str(examples / f"{name}.py")
        monkeypatch.setattr(
            sys, "argv", [script, "--model", "openai/simulated", "--api-base", server.api_base, *flags]
        )
        runpy.run_path(script, run_name="__main__")
    output = capsys.readouterr().out
    assert re.search(expected, output), output


def test_the_agent_for_a_small_model_calls_tools_in_the_right_form(examples: Path) -> None:
    react_agent = importlib.import_module("react_agent")

    def answer(call: LMCall) -> dict[str, Any]:
        assert not {"next_thought", "reasoning"} & set(call.output_fields)
        if "next_tool_name" in call.output_fields:
            return {"next_tool_name": "price", "next_tool_args": {"item": "lamp", "numbers": [1, 2]}}
        return {"answer": "30" if "30" in call.user else "unknown"}

    with SimulatedServer(answer, own_process=False) as server:
        lm = dspy.LM("openai/simulated", api_base=server.api_base)
        with dspy.context(lm=lm, adapter=react_agent.SmallAgentAdapter()):
            prediction = react_agent.agent(max_iters=1)(question="How much is the lamp?")
    assert (prediction.trajectory["tool_args_0"], prediction.answer) == ({"item": "lamp"}, "30")


def test_the_migration_diff_is_the_difference_of_the_two_scripts() -> None:
    before, after = (
        (EXAMPLES / "migration" / name).read_text().splitlines(keepends=True)
        for name in ("before.py", "after.py")
    )
    shown = (EXAMPLES / "migration" / "migration.diff").read_text()
    assert "".join(difflib.unified_diff(before, after, "before.py", "after.py")) == shown


@pytest.mark.slow
def test_the_cells_of_the_notebook_run_in_their_order(
    examples: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    notebook = json.loads((examples / "notebook.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] for cell in notebook["cells"] if cell["cell_type"] == "code")
    monkeypatch.setenv("OPRO_MODEL", "openai/simulated")
    with SimulatedServer(reviews, own_process=False) as server:
        for name in ("OPENAI_API_BASE", "OPENAI_BASE_URL"):
            monkeypatch.setenv(name, server.api_base)
        namespace: dict[str, Any] = {"__name__": "notebook"}
        for number, cell in enumerate(cells):
            exec(compile(cell, f"cell {number}", "exec", dont_inherit=True), namespace)
    assert "-> 1.00" in capsys.readouterr().out
