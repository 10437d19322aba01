"""`benchmarks/quality.py` and `proposals.py` on a scripted language model: budgets, apart data, store and tables."""

from __future__ import annotations

import importlib
import json
import random
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import dspy
import pytest

from dspy_opro.testing import LMCall, ScriptedLM, SimulatedServer

ROOT = Path(__file__).parent.parent
BUDGET = 120
SIZES = (24, 16, 40)


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    names = ("quality", "quality_tasks", "quality_optimizers", "quality_tables", "proposals")
    return type("Modules", (), {name: importlib.import_module(name) for name in names})


def rows(number: int = 90) -> list[dict[str, str]]:
    return [{"text": f"text number {n}", "label": ("even", "odd")[n % 2]} for n in range(number)]


def scorer(asked: list[str]) -> ScriptedLM:
    """Right where the instruction has the word `parity`, else always `even`."""

    def answer(call: LMCall) -> dict[str, str]:
        prompt = "\n".join(text for _, text in call.messages)
        number = int(re.findall(r"text number (\d+)", prompt)[-1])
        asked.append(str(number))
        return {"label": ("even", "odd")[number % 2 if "parity" in prompt else 0]}

    return ScriptedLM(answer)


def proposer() -> ScriptedLM:
    """Every third instruction has the word."""
    draws = random.Random(0)

    def answer(call: LMCall) -> str:
        text = (
            f"Tell the {'parity' if draws.random() < 0.34 else 'colour'}, attempt {draws.randrange(10**6)}."
        )
        keys = re.findall(r'"(\w+)": ', call.messages[0][1]) or ["instruction"]
        fields = set(keys) | {
            "proposed_instruction",
            "proposed_prefix_for_output_field",
            "observations",
            "summary",
        }
        if "```" in call.messages[-1][1]:
            return f"```\n{text}\n```"
        return json.dumps(dict.fromkeys(sorted(fields), text))

    return ScriptedLM(answer)


def test_there_are_instructions_by_hand_for_every_predictor_of_a_task(modules: Any, tmp_path: Path) -> None:
    tasks = modules.quality_tasks
    for name in tasks.INSTRUCTIONS:
        lines = (json.dumps(row) + "\n" for row in rows())
        (tmp_path / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    made = {name: make() for name, make in tasks.tasks(tmp_path).items()}
    has_gym = find_spec("reasoning_gym") is not None
    others = set() if has_gym else {"gym_leg_counting", "gym_letter_counting"}
    assert set(made) | others == set(tasks.BY_HAND)
    for name, task in made.items():
        run = modules.quality_optimizers.Run(task, task.metric, None, None, None, [], [], 0, 1, 0)
        program = modules.quality_optimizers.OPTIMIZERS["by hand"](run)
        found = {name: p.signature.instructions for name, p in program.named_predictors()}
        assert found == tasks.BY_HAND[name]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["student", "OPRO", "COPRO", "MIPROv2", "GEPA", "OPRO, confirm=False",
                                       "OPRO, paper", "OPRO, demos", "MIPROv2, demos",
                                       "random search, demos"])  # fmt: skip
def test_every_optimizer_keeps_to_the_budget_and_never_sees_a_test_example(
    modules: Any, optimizer: str
) -> None:
    asked: list[str] = []
    dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=False)
    measured = modules.quality.Measurement(scorer(asked), proposer(), None, 2, BUDGET, SIZES)
    task = modules.quality_tasks.labelled("parity", "Answer.", rows())
    test = {example.text.split()[-1] for example in task.split(0, SIZES)[2]}
    row = measured.measure(task, optimizer, 0)
    assert "error" not in row, row
    assert row["scored"] <= 1.3 * BUDGET
    assert optimizer == "student" or row["scored"] >= 0.6 * BUDGET
    assert test.isdisjoint(asked[: -len(test)])
    assert set(asked[-len(test) :]) == test
    assert len(row["test"]) == SIZES[2]
    assert bool(row.get("stop_reason")) == optimizer.startswith("OPRO")
    assert (row["proposer_calls"] > 0) == (optimizer not in ("student", "random search, demos"))
    assert "text number" not in json.dumps(
        {key: value for key, value in row.items() if key != "instructions"}
    )
    if optimizer in ("OPRO", "MIPROv2", "COPRO"):
        assert sum(row["test"]) == SIZES[2]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["OPRO", "COPRO", "MIPROv2", "GEPA", "OPRO, paper", "OPRO, demos",
                                       "MIPROv2, demos", "random search, demos"])  # fmt: skip
def test_every_optimizer_takes_a_program_of_two_predictors(modules: Any, optimizer: str) -> None:
    dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=False)
    lm = ScriptedLM(
        lambda call: {"team": "billing", "priority": "high" if "parity" in str(call.messages) else "low"}
    )
    measured = modules.quality.Measurement(lm, proposer(), None, 2, BUDGET, SIZES)
    row = measured.measure(modules.quality_tasks.tickets(), optimizer, 0)
    assert "error" not in row, row
    assert 0.6 * BUDGET <= row["scored"] <= 1.3 * BUDGET
    assert set(row["instructions"]) == {"route", "rate"}


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["COPRO", "GEPA"])
def test_each_seed_samples_its_own_proposals(modules: Any, optimizer: str) -> None:
    """With the cache on, the same first request must not bring the proposals of another seed."""
    dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=True)
    lm = proposer()
    measured = modules.quality.Measurement(scorer([]), lm, None, 2, BUDGET, SIZES)
    task = modules.quality_tasks.labelled("parity", "Answer.", rows())
    for seed in (0, 1):
        measured.measure(task, optimizer, seed)
    assert {call.rollout_id for call in lm.calls} >= {1, 2}
    assert {call.temperature for call in lm.calls} == {1.0}


def test_splits_are_apart_and_the_test_is_the_same_for_every_seed(modules: Any) -> None:
    task = modules.quality_tasks.labelled("parity", "Answer.", rows())
    splits = [[{e.text for e in part} for part in task.split(seed, SIZES)] for seed in (0, 1)]
    for train, val, test in splits:
        assert [len(train), len(val), len(test)] == list(SIZES)
        assert not (train & val or train & test or val & test)
    assert splits[0][2] == splits[1][2]
    assert splits[0][0] != splits[1][0]
    with pytest.raises(ValueError, match="parity has 90 examples, but 145 are needed"):
        task.split(0, (60, 40, 90))


@pytest.mark.parametrize("is_interchanged", [False, True])
def test_question_types_have_their_right_names(modules: Any, tmp_path: Path, is_interchanged: bool) -> None:
    """One copy of TREC says that "How many" asks for a location, and "Where" for a number."""
    expected = [
        {"text": "How many feet has a spider ?", "label": "number"},
        {"text": "Where is Bergen ?", "label": "location"},
        {"text": "Who was Ibsen ?", "label": "human"},
    ]
    wrong = {"number": "location", "location": "number"} if is_interchanged else {}
    lines = [json.dumps({**row, "label": wrong.get(row["label"], row["label"])}) for row in expected]
    (tmp_path / "trec.jsonl").write_text("\n".join(lines))
    task = modules.quality_tasks.tasks(tmp_path)["trec"]()
    assert [example.toDict() for example in task.examples] == expected


@pytest.mark.parametrize("name", ["tickets", "directory"])
def test_tasks_of_two_predictors_can_be_solved(modules: Any, name: str) -> None:
    task = modules.quality_tasks.tasks(None)[name]()
    _, _, test = task.split(0, (60, 40, 150))
    assert len(task.student().predictors()) == 2
    assert len({json.dumps(dict(example.inputs())) for example in task.examples}) == len(task.examples)
    assert all(task.metric(example, dspy.Prediction(**example.labels())) == 1.0 for example in test)
    assert task.majority(test) < 0.5
    assert task.feedback(test[0], dspy.Prediction()).startswith("Wrong; the right ")


def test_the_directory_finds_the_sentence_with_the_answer(modules: Any) -> None:
    task = modules.quality_tasks.directory()
    passages = task.student().passages
    asked: list[list[str]] = []

    def answer(call: LMCall) -> dict[str, str]:
        prompt = call.messages[-1][1]
        asked.append([passage for passage in passages if passage in prompt])
        return {"query": example.question, "answer": "nothing"}

    with dspy.context(lm=ScriptedLM(answer)):
        for example in task.examples[:20]:
            task.student()(**example.inputs())
            assert example.answer in " ".join(asked[-1])


def stored(optimizer: str, seed: int, right: int, task: str = "t", **values: Any) -> dict[str, Any]:
    row = {"model": "m", "prompt_model": "m", "task": task, "optimizer": optimizer, "seed": seed, "budget": 9}
    row |= {"sizes": [1, 1, 10], "scored": 9, "scorer_calls": 19, "proposer_calls": 3, "majority": 0.5}
    return {**row, "test": [1.0] * right + [None] + [0.0] * (9 - right), **values}


def test_tables_show_gain_interval_and_failures(modules: Any) -> None:
    kept = [stored("student", 0, 2), stored("OPRO", 0, 6), stored("OPRO", 1, 4), stored("GEPA", 0, 3)]
    failed = {key: value for key, value in stored("GEPA", 1, 0).items() if key != "test"} | {
        "error": "ValueError: no"
    }
    text = modules.quality_tables.report([*kept, failed])
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    line = next(line for line in lines if line[0] == "OPRO" and len(line) == 10)
    assert line[1:3] == ["2", "0.500"]
    assert line[3].startswith("+30.0 (")
    assert line[4:6] == ["2 / 0 / 0", "90%"]
    gepa = next(line for line in lines if line[0] == "GEPA" and len(line) == 10)
    assert (gepa[1], gepa[-1]) == ("1", "1")
    by_task = next(line for line in lines if line[0] == "t: 0.500, 0.200")
    assert by_task[1].startswith("+30.0 (")
    assert by_task[2].startswith("+10.0 (") and by_task[2].endswith("), 1 of 2 failed")
    mean = next(line for line in lines if line[0] == "mean of 1, a failed run counts 0")
    assert mean[1] == by_task[1]
    assert mean[2].startswith("+5.0 (")
    assert ["tasks where OPRO is better / equal / worse", "", "1 / 0 / 0"] in [line[:3] for line in lines]
    lead = next(line for line in lines if line[0] == "lead of OPRO")
    assert lead[1] == ""
    assert lead[2].startswith("+30.0 (")
    assert ["runs worse than the student", "0 of 2", "0 of 1"] in [line[:3] for line in lines]
    worse = modules.quality_tables.report([stored("student", 0, 5), stored("OPRO", 0, 3)])
    assert "| runs worse than the student | 1 of 1, by up to 20.0 |" in worse
    assert modules.quality_tables.plot(kept).count("<circle") == 2


def test_a_run_is_compared_with_the_student_of_its_seed(modules: Any) -> None:
    """The runs of a seed are of one machine. On another one the student answers differently."""
    kept = [stored("student", 0, 2), stored("student", 1, 5), stored("OPRO", 0, 6), stored("OPRO", 1, 6)]
    group = {name: [row for row in kept if row["optimizer"] == name] for name in ("student", "OPRO")}
    by_seed = [sum(differences) for differences in modules.quality_tables.gains(group, "OPRO")]
    assert by_seed == [4.0, 1.0]


def test_the_store_is_shown_for_the_given_seeds_and_tasks(
    modules: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = [stored("student", 0, 2, "other"), stored("OPRO", 0, 9, "other")]
    store = tmp_path / "store.jsonl"
    runs = [stored("student", 0, 2), stored("OPRO", 0, 6), stored("OPRO", 1, 2), *other]
    store.write_text("\n".join(map(json.dumps, runs)) + "\n")
    monkeypatch.setattr(
        "sys.argv", ["quality.py", "--show", "--store", str(store), "--seeds", "0", "--tasks", "t"]
    )
    modules.quality.main()
    printed = capsys.readouterr().out
    assert "| OPRO | 1 | 0.600 |" in printed
    assert "other" not in printed


def test_an_interval_covers_seeds_and_examples(modules: Any) -> None:
    interval = modules.quality_tables.interval
    low, high = interval([[0.0, 1.0] * 50])
    assert 0.35 < low < 0.45 < 0.55 < high < 0.65
    wide = interval([[0.0] * 100, [1.0] * 100])
    assert wide == (0.0, 1.0)
    low, high = interval([[0.0, 1.0] * 50], [[0.0, 1.0] * 50])
    assert 0.4 < low < 0.5 < high < 0.6


def test_a_failure_that_is_no_answer_ends_the_measurement(modules: Any) -> None:
    """A connection that breaks must not count as a wrong answer."""

    def answer(call: LMCall) -> str:
        raise ConnectionError("gone")

    dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=False)
    measured = modules.quality.Measurement(ScriptedLM(answer), proposer(), None, 1, BUDGET, SIZES)
    with pytest.raises(Exception, match=r"gone|cancelled"):
        measured.measure(modules.quality_tasks.labelled("parity", "Answer.", rows()), "student", 0)


def test_answers_that_do_not_parse_are_counted(modules: Any) -> None:
    dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=False)
    measured = modules.quality.Measurement(
        ScriptedLM(lambda call: "no idea"), proposer(), None, 1, BUDGET, SIZES
    )
    row = measured.measure(modules.quality_tasks.labelled("parity", "Answer.", rows()), "student", 0)
    assert row["test"] == [None] * SIZES[2]


def test_a_server_gets_the_schema_and_each_model_by_its_name(modules: Any) -> None:
    """DSPy does not know that the models of one's own server hold answers to a schema."""
    calls: list[LMCall] = []

    def answer(call: LMCall) -> Any:
        calls.append(call)
        return (
            {"label": "even"} if call.model == "small" else {"instruction": "Say even.", "basic": "Say even."}
        )

    with SimulatedServer(answer, own_process=False) as server:
        args = modules.quality.parse(
            ["--api-base", server.api_base, "--model", "small", "--prompt-model", "large", "--budget", "60",
             "--sizes", *map(str, SIZES), "--num-threads", "4", "--prompt-max-tokens", "256"]
        )  # fmt: skip
        dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=False)
        measured = modules.quality.measurement(args)
        row = measured.measure(modules.quality_tasks.labelled("parity", "Answer.", rows()), "OPRO", 0)
    assert (row["model"], row["prompt_model"]) == ("small", "large")
    assert {call.model for call in calls} == {"small", "large"}
    asked = [call.request for call in calls if call.model == "small"]
    assert all(request["response_format"]["type"] == "json_schema" for request in asked)
    assert {most_tokens(request) for request in asked} == {40}
    assert {most_tokens(call.request) for call in calls if call.model == "large"} == {256}


@pytest.mark.parametrize(("options", "expected"), [([], 1000), (["--prompt-max-tokens", "300"], 300)])
def test_an_optimizer_lm_behind_an_api_may_write_long_answers(
    modules: Any, options: list[str], expected: int
) -> None:
    measured = modules.quality.measurement(modules.quality.parse(["--model", "openai/some", *options]))
    assert most_tokens(measured.prompt_model.kwargs) == expected
    assert most_tokens(measured.model.kwargs) == 40


def most_tokens(request: Any) -> Any:
    """The name of the setting depends on DSPy's version."""
    return request.get("max_completion_tokens", request.get("max_tokens"))


def test_stored_runs_are_not_repeated(modules: Any) -> None:
    keys = [{**{name: stored("OPRO", seed, 1)[name] for name in modules.quality.KEY}} for seed in (0, 1)]
    assert modules.quality.missing([stored("OPRO", 0, 1)], keys) == keys[1:]


# --- proposals.py --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["OPRO", "COPRO", "MIPROv2", "GEPA"])
def test_what_an_optimizer_tried_is_scored_on_the_same_examples(modules: Any, optimizer: str) -> None:
    dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=False)
    measured = modules.quality.Measurement(scorer([]), proposer(), None, 2, BUDGET, SIZES)
    task = modules.quality_tasks.labelled("parity", "Answer.", rows())
    row = modules.proposals.measure(measured, task, optimizer, 0, 5)
    student, *others = row["tried"]
    assert student["instructions"] == {"self": "Answer."}
    assert 1 <= len(others) <= 5
    assert len({pair["instructions"]["self"] for pair in row["tried"]}) == len(row["tried"])
    for pair in row["tried"]:
        assert len(pair["scores"]) == sum(SIZES)
        is_right = "parity" in pair["instructions"]["self"]
        assert sum(pair["scores"]) == (len(pair["scores"]) if is_right else pytest.approx(40, abs=8))


def test_the_table_has_the_gains_over_the_student(modules: Any) -> None:
    def pair(*scores: float | None) -> dict[str, Any]:
        return {"instructions": {"self": "x"}, "scores": scores}

    run = {"task": "trec", "optimizer": "OPRO"}
    first = {**run, "tried": [pair(0.0, 1.0), pair(1.0, 1.0), pair(0.0, None)]}
    second = {**run, "tried": [pair(1.0, 1.0), pair(0.0, 1.0)]}
    line = modules.proposals.table([first, second]).splitlines()[-1]
    assert line == "| trec | OPRO | 2 | 3 | -16.7 ± 33.3 | 57.7 | +50.0 | 1 |"
