"""The benchmarks run, at the smallest size, and their tables show what was measured."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


def run(script: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / script), *arguments],
        capture_output=True, text=True, env=environment, timeout=110,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def cells(output: str, first: str) -> list[str]:
    """The cells of the line whose first cell is `first`."""
    lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in output.splitlines()]
    return next(line for line in lines if line[0] == first)


def test_utilization_measures_and_shows_what_was_kept(tmp_path: Path) -> None:
    kept = tmp_path / "rows.jsonl"
    arguments = ["--optimizers", "OPRO", "COPRO", "--seeds", "0"]
    output = run("utilization.py", *arguments, "--time-scale", "0", "--keep", str(kept))
    rows = {row["optimizer"]: row for row in map(json.loads, kept.read_text().splitlines())}
    assert rows["COPRO"]["scorer_calls"] == 28 * 60
    assert 1200 < rows["OPRO"]["scorer_calls"] <= 1600
    assert rows["OPRO"]["quality"] > 0.30
    assert run("utilization.py", "--show", str(kept)) == output


def test_search_efficiency_compares_calls_for_the_same_quality(tmp_path: Path) -> None:
    kept = tmp_path / "rows.jsonl"
    options = [
        "--seeds",
        "2",
        "--signals",
        "strong",
        "--budgets",
        "120",
        "400",
        "--ablation",
        "all in full",
        "--ablation-budgets",
        "300",
    ]
    output = run("search_efficiency.py", "--rehearse", *options, "--keep", str(kept))
    rows = [json.loads(line) for line in kept.read_text().splitlines()]
    assert [row["budget"] for row in rows] == [120, 120, 400, 400, 300, 300]
    assert all(60 <= row["scorer_calls"] <= row["budget"] for row in rows)
    ours = [(sum(r["scorer_calls"] for r in rows[i : i + 2]) / 2, sum(r["quality"] for r in rows[i : i + 2]) / 2)
            for i in (0, 2)]  # fmt: skip
    wanted = sum(quality for _, quality in ours) / 2
    peer = {
        "optimizer": "COPRO",
        "seed": 0,
        "budget": "",
        "scorer_calls": 1680,
        "proposer_calls": 27,
        "gain": 0.1,
    }
    with kept.open("a") as file:
        file.write(json.dumps({**peer, "signal": "strong", "quality": wanted}) + "\n")
    output = run("search_efficiency.py", "--show", str(kept))
    needed = float(output.strip().splitlines()[-1].split("|")[4])
    assert needed == pytest.approx(sum(calls for calls, _ in ours) / 2, abs=1)


def test_search_efficiency_has_a_table_for_each_signal(tmp_path: Path) -> None:
    """A run gains much less with the signal of real prompts."""
    kept = tmp_path / "rows.jsonl"
    arguments = ["--rehearse", "--seeds", "4", "--budgets", "400", "--ablation", "--keep", str(kept)]
    output = run("search_efficiency.py", *arguments)
    assert [line for line in output.splitlines() if line.startswith("##")] == [
        "## strong signal",
        "## real signal",
    ]
    gains: dict[str, list[float]] = {}
    for row in map(json.loads, kept.read_text().splitlines()):
        gains.setdefault(row["signal"], []).append(row["gain"])
    assert sum(gains["strong"]) > 3 * sum(gains["real"]) > 0


def test_demos_shows_what_a_search_for_them_gains_and_costs(tmp_path: Path) -> None:
    kept = tmp_path / "rows.jsonl"
    arguments = ["--budgets", "300", "--seeds", "0", "2", "--keep", str(kept)]
    output = run("demos.py", *arguments)
    alone, much = cells(output, "instructions alone"), cells(output, "demos too, which help much")
    assert (alone[5], much[5]) == ("0", "100")
    assert float(much[3].split()[0]) > float(alone[3].split()[0]) + 10
    lines = kept.read_text()
    assert run("demos.py", *arguments) == output
    assert kept.read_text() == lines  # nothing ran again


def test_demos_compares_published_prompts_under_the_same_instruction(tmp_path: Path) -> None:
    folder = tmp_path / "results" / "main_results" / "sums" / "model" / "CAPO" / "seed42"
    folder.mkdir(parents=True)
    demo = "\n\nInput:\n1 + 1\nOutput:\n{}"
    prompts = [
        ("Add.", 0.5),
        ("Add." + demo.format("2"), 0.6),
        ("Add." + demo.format("2.0"), 0.8),
        ("Add." + demo.format("2.0"), 0.9),  # the same prompt in another step
        ("Sum." + demo.format("2"), 0.1),
    ]
    with (folder / "step_results_eval.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["prompt", "test_score"])
        rows.writerows(prompts)
    found = cells(run("demos.py", "--published", str(tmp_path)), "sums")
    assert found == ["sums", "model", "1", "+20.0", "14.1", "1"]


def test_overhead_shows_every_part() -> None:
    output = run(
        "overhead.py", "--repeats", "1", "--size", "12", "--threads", "2", "--trials", "16", "--examples", "8"
    )
    assert float(cells(output, "OPRO")[1]) > 0
    assert float(cells(output, "dspy.Evaluate")[2].split()[0]) == 1.0
    assert cells(output, "17")[0] == "17"  # the student is a trial too
    assert int(cells(output, "8")[1]) == 9 * 8  # a round of 8 candidates and the student
    assert "import dspy_opro after import dspy" in output


def test_scaling_shows_what_storages_and_processes_cost() -> None:
    sizes = ["--scale", "0.005", "--size", "20", "--computed", "4", "--seconds", "0.01", "--repeats", "1"]
    output = run("scaling.py", *sizes)
    assert int(cells(output, "in memory")[2]) == int(cells(output, "journal file")[2]) == 17 * 16
    assert float(cells(output, "ProcessPoolExecutor")[1].split()[0]) > 0
    assert ("Dask" in output) == (importlib.util.find_spec("distributed") is not None)
    assert float(cells(output, "one process")[2].split()[0]) == 1.0
    assert float(cells(output, "ProcessPoolExecutor(2)")[1]) > 0


def test_a_rehearsal_is_a_run_without_its_waiting() -> None:
    """Calls and result as through DSPy: equal with 1 and with 16 threads, in fewer virtual seconds."""
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); from rehearsal import rehearse\n"
        "for threads in (1, 16):\n"
        "    r = rehearse(3, num_threads=threads, max_metric_calls=300)\n"
        "    print(r.scorer_calls, r.quality, r.num_rounds, r.wall_seconds, r.utilization)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    one, many = ([float(value) for value in line.split()] for line in done.stdout.splitlines())
    assert one[:3] == many[:3]
    assert many[3] < one[3] / 2
    assert one[4] == pytest.approx(1.0)


def test_the_server_of_models_says_what_it_needs() -> None:
    """With its libraries in the help, without them in place of a traceback."""
    script = ROOT / "benchmarks" / "serve_gguf.py"
    done = subprocess.run(
        [sys.executable, str(script), "--help"], capture_output=True, text=True, timeout=110
    )
    assert "pip install openvino-genai openvino-tokenizers gguf numpy" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
