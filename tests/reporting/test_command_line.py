"""`dspy-opro` on a log directory and on a database."""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dspy_opro import OPRO
from dspy_opro.reporting import recorded
from dspy_opro.reporting.command_line import main
from dspy_opro.reporting.heat_map import heat_maps
from dspy_opro.reporting.recorded import find_runs
from dspy_opro.reporting.report import page
from dspy_opro.reporting.result import OPROResult
from dspy_opro.search.trajectory import Trajectory
from dspy_opro.testing import LMCall, ScriptedLM
from tests.results import result as handmade
from tests.results import trial
from tests.runs import TASK, is_proposal, metric, propose

ROOT = Path(__file__).parent.parent.parent
SEED = 1
TRAINSET, VALSET = TASK.trainset(40), TASK.valset(24)
"""So many that with most seeds four rounds find a better instruction."""


def answer(call: LMCall) -> Any:
    return propose(call) if is_proposal(call) else TASK.scorer(call)


def run(*arguments: str | Path, code: int = 0) -> str:
    """What the command prints to stdout, or to stderr if it ends with an error.

    It runs in this process, because the imports of a new one take a second or more.
    """
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
        main(list(map(str, arguments)), prog_name="dspy-opro")
    assert end.value.code == code, out.getvalue() + err.getvalue()
    return out.getvalue() if code == 0 else err.getvalue()


def compiled(trainset: Any = TRAINSET, valset: Any = VALSET, **values: Any) -> Any:
    """A valset selects here."""
    lm = ScriptedLM(answer)
    values = {
        "num_rounds": 4,
        "confirm": not valset,
        "seed": SEED,
        "display_progress": False,
        "prompt_model": lm,
        "task_model": lm,
        **values,
    }
    return OPRO(metric, **values).compile(TASK.student(), trainset=trainset, valset=valset).opro_result


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, Any]:
    """A log directory, a database with two runs, and the result of both first runs."""
    folder = tmp_path_factory.mktemp("runs")
    url = f"sqlite:///{folder / 'runs.db'}"
    result = compiled(log_dir=folder / "qa")
    compiled(storage=url, name="first")
    compiled(storage=url, name="second", num_rounds=1)
    return folder / "qa", url, result


def test_list_names_the_runs_with_their_scores(runs: tuple[Path, str, Any]) -> None:
    directory, url, result = runs
    (row,) = json.loads(run("list", directory, "--json"))
    assert row["name"] == "opro"
    assert (row["state"], row["rounds"], row["decided_on"]) == ("num_rounds", 4, "valset")
    assert (row["student"], row["best"]) == (result.curve[0], result.best_score)
    assert (row["examples"], row["tokens"]) == (result.usage.metric_calls, result.usage.tokens)
    assert [line.split()[:2] for line in run("list", url).splitlines()] == [
        ["first", "num_rounds"],
        ["second", "num_rounds"],
    ]


def test_show_prints_the_result_and_the_instructions(runs: tuple[Path, str, Any]) -> None:
    directory, url, result = runs
    text = run("show", directory)
    scores = f"{result.curve[0]:.3f} -> {result.best_score:.3f}"
    assert f"score on the valset: {scores} (stop reason: num_rounds)" in text
    assert text.rstrip().endswith(result.instructions["self"])
    shown = json.loads(run("show", url, "--study", "first", "--json"))
    assert shown["instructions"] == dict(result.instructions)
    assert len(shown["trajectory"]) == len(result.trajectory)
    student = run("show", directory, "--trial", "0")
    assert student.rstrip().endswith(result.baseline.candidate.instructions["self"])


def test_the_recorded_result_equals_the_result_of_the_run(
    runs: tuple[Path, str, Any], tmp_path: Path
) -> None:
    directory, _, result = runs
    (on_record,) = find_runs(str(directory))
    again = on_record.result()
    assert again.to_dicts() == result.to_dicts()
    assert (again.usage, list(again.curve)) == (result.usage, list(result.curve))
    assert (again.stop_reason, again.trajectory.score_range) == (
        result.stop_reason,
        result.trajectory.score_range,
    )
    # A directory holds the whole result once the run has ended.
    for name, each in (("again", again), ("result", result)):
        replace(each, seconds=0.0).save(tmp_path / name)
    assert json.loads((tmp_path / "again").read_text()) == json.loads((tmp_path / "result").read_text())
    assert again.messages and again.gain is not None


@pytest.mark.parametrize(
    ("data", "basis"), [({}, "selected"), ({"trainset": TASK.trainset(60), "valset": None}, "fresh")]
)
def test_a_database_has_all_but_the_texts_of_the_examples(
    data: dict[str, Any], basis: str, tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path / 'runs.db'}"
    result = compiled(storage=url, name="qa", **data)
    (run_on_record,) = find_runs(url)
    again = run_on_record.result()
    assert again.gain is not None and again.gain.interval.basis == basis
    assert again.gain == result.gain
    assert [list(t.scores) for t in again.trials] == [list(t.scores) for t in result.trials]
    assert any(t.positions for t in result.trials)  # a later race begins with the contested examples
    assert [t.scores_by_position for t in again.trials] == [t.scores_by_position for t in result.trials]
    assert [list(t.valset_scores) for t in again.trials] == [list(t.valset_scores) for t in result.trials]
    kept, before = again.data.outcomes, result.data.outcomes
    assert {id_: {split: list(row) for split, row in rows.items()} for id_, rows in kept.items()} == {
        id_: {split: list(row) for split, row in rows.items()} for id_, rows in before.items()
    }
    maps, expected = (
        [
            (found.split, found.counts, [(number, levels) for number, _, levels in found.trials])
            for found in heat_maps(each, range(len(result.trials)))
        ]
        for each in (again, result)
    )
    assert maps == expected
    names = ("split", "trial", "score", "prediction", "feedback")
    rows = ([[row[name] for name in names] for row in each.examples()] for each in (again, result))
    assert next(rows) == next(rows)
    assert 0 < again.seconds < 600


def test_a_result_is_out_of_date_once_the_run_goes_on(tmp_path: Path) -> None:
    compiled(log_dir=tmp_path, num_rounds=1)
    first = json.loads((tmp_path / "result.json").read_text("utf-8"))
    (tmp_path / "stop").touch()  # the next process ends at once
    stopped = compiled(log_dir=tmp_path, num_rounds=3)
    second = json.loads((tmp_path / "result.json").read_text("utf-8"))
    assert (first["stop_reason"], second["stop_reason"]) == ("num_rounds", stopped.stop_reason)
    (on_record,) = find_runs(str(tmp_path))
    (tmp_path / "result.json").unlink()  # as after a kill: what is on record has to do
    assert on_record.result().to_dicts() == stopped.to_dicts()


def test_the_student_of_a_run_with_another_plan_keeps_its_own_score(tmp_path: Path) -> None:
    arguments = {"trainset": TASK.trainset(60), "valset": None, "confirm": False, "log_dir": tmp_path}
    compiled(**arguments, num_rounds=3)
    result = compiled(**arguments, num_rounds=4)
    student = result.baseline.score
    assert result.curve[0] > student  # the best program on record is scored together with the student
    assert json.loads(run("list", tmp_path, "--json"))[0]["student"] == student
    assert f'<span class="from">{student:.3f}</span>' in page(result)


def test_a_directory_that_can_only_be_read_is_shown(
    runs: tuple[Path, str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests may run as root, who may write everywhere."""
    directory, opened = runs[0], os.open

    def open_to_read(path: Any, flags: int, *mode: Any, **options: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, flags, *mode, **options)

    monkeypatch.setattr(os, "open", open_to_read)
    assert json.loads(run("list", directory, "--json"))[0]["state"] == "num_rounds"
    for command in (["show", directory], ["watch", directory], ["export", directory, "prompts"]):
        run(*command)


def test_an_error_while_a_run_is_read_is_one_line(
    runs: tuple[Path, str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> bool:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(recorded, "is_in_use", fail)
    for command in ("list", "show", "watch", "stop"):
        assert run(command, runs[0], code=1).startswith("Error: [Errno 13] Permission denied")
    assert run("export", runs[0], "prompts", code=1).startswith("Error: [Errno 13] Permission denied")


def test_of_a_damaged_file_the_journal_takes_the_place(
    runs: tuple[Path, str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result, copy = runs[2], tmp_path / "copy"
    shutil.copytree(runs[0], copy)
    for name in ("result.json", "config.json"):
        (copy / name).write_text((copy / name).read_text("utf-8")[:40], "utf-8")
    (row,) = json.loads(run("list", copy, "--json"))
    assert (row["best"], row["state"]) == (result.best_score, result.stop_reason)
    assert not any("\n" in record.getMessage() for record in caplog.records)
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        f"{copy / 'result.json'} is damaged, and the run is shown without it",
        f"{copy / 'config.json'} is damaged, and the run is shown without it",
    ]
    assert result.instructions["self"] in run("show", copy)


def test_reading_makes_no_database_and_no_tables(
    runs: tuple[Path, str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = tmp_path / "app.db"
    with contextlib.closing(sqlite3.connect(database)) as connection:
        connection.execute("create table customers (name)")
        connection.commit()
    before = database.read_bytes()
    assert run("list", f"sqlite:///{database}", code=1).endswith("app.db has no run of dspy_opro.\n")
    assert database.read_bytes() == before
    directory = tmp_path / "qa"
    directory.mkdir()
    monkeypatch.chdir(tmp_path)
    for url, message in (
        ("sqlite:///rel.db", "its storage sqlite:///rel.db is relative to another directory. Give its URL."),
        (f"sqlite:///{tmp_path}/gone.db", f"There is no database sqlite:///{tmp_path}/gone.db."),
    ):
        (directory / "config.json").write_text(json.dumps({"storage": url}), "utf-8")
        assert message in run("list", directory, code=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["app.db", "qa"]


def test_a_directory_without_a_program_says_why(runs: tuple[Path, str, Any], tmp_path: Path) -> None:
    shutil.copytree(runs[0], tmp_path / "copy")
    (tmp_path / "copy" / "best.json").unlink()
    text = run("export", tmp_path / "copy", "program", code=1)
    assert "The run has no program yet: the student was not scored in full." in text


def with_demos(directory: Path) -> OPROResult:
    """A finished run in the directory: the student, a dropped trial and the best one with demos and a colour."""
    student = trial("Answer.", [0.0, 0.0])
    start = student.candidate
    dropped = trial("Answer badly.", [0.0], 1, "pruned", start)
    best = trial("Answer \x1b[31mwell\x1b]0;title\x07.", [1.0, 1.0], 1, parent=start)
    best = replace(best, candidate=replace(best.candidate, demo_set=2, demos={"answer": "[]"}))
    found = handmade(trajectory=Trajectory().add(student, dropped, best), curve=(0.0, 1.0))
    found.save(directory / "result.json")
    return found


def test_show_and_export_tell_of_estimates_and_demos_and_print_no_control_sequences(tmp_path: Path) -> None:
    compiled(log_dir=tmp_path, num_rounds=1)
    with_demos(tmp_path)
    assert "trial 1: pruned, reward ≈ 0.000, estimate from 1 example\n" in run(
        "show", tmp_path, "--trial", "1"
    )
    shown = run("show", tmp_path, "--trial", "2")
    assert "trial 2: complete, reward 1.000, demo set 2\n" in shown
    prompts = run("export", tmp_path, "prompts")
    assert "\x1b" not in shown + prompts
    assert "Answer well." in shown and "Answer well." in prompts
    run("export", tmp_path, "prompts", "-o", tmp_path / "prompts.txt")
    assert "\x1b[31mwell" in (tmp_path / "prompts.txt").read_text("utf-8")


def test_prompts_without_their_demos_are_pointed_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compiled(log_dir=tmp_path, num_rounds=1)
    with_demos(tmp_path)
    for output in ((), ("-o", str(tmp_path / "a")), ("--json",)):
        with pytest.raises(SystemExit):
            main(["export", str(tmp_path), "prompts", *output])
        assert (
            "The program also shows demos to the LM. Only `export program` has them."
            in capsys.readouterr().err
        )


def test_report_writes_the_page(runs: tuple[Path, str, Any], tmp_path: Path) -> None:
    directory, url, result = runs
    for arguments in ([directory], [url, "--study", "first"]):
        path = tmp_path / "pages" / "qa.html"
        assert run("report", *arguments, "-o", path).strip() == str(path)
        page = path.read_text("utf-8")
        assert result.instructions["self"].split()[0] in page
        assert 'class="interval"' in page and 'id="examples"' in page
    assert "position 0" in page and "trainset[" not in page
    assert "the default LM of DSPy" not in page  # the storage does not say which LMs the run used


def test_export_writes_program_prompts_and_trials(runs: tuple[Path, str, Any], tmp_path: Path) -> None:
    directory, url, result = runs
    run("export", directory, "program", "-o", tmp_path / "new" / "best.json")
    program = TASK.student()
    program.load(tmp_path / "new" / "best.json")
    assert program.predictors()[0].signature.instructions == result.instructions["self"]
    assert run("export", url, "prompts", "--study", "first") == f"# self\n\n{result.instructions['self']}\n"
    pandas = pytest.importorskip("pandas")
    rows = list(csv.DictReader(io.StringIO(run("export", directory, "trials"))))
    assert [float(row["reward"]) for row in rows] == [result.reward_of(trial) for trial in result.trials]
    pytest.importorskip("pyarrow")
    run("export", directory, "trials", "--format", "parquet", "-o", tmp_path / "trials.parquet")
    assert len(pandas.read_parquet(tmp_path / "trials.parquet")) == len(rows)


def test_json_says_what_was_done(runs: tuple[Path, str, Any], tmp_path: Path) -> None:
    directory, _, _ = runs
    done = {"name": "opro", "output": str(tmp_path / "a")}
    assert json.loads(run("report", directory, "-o", tmp_path / "a", "--json")) == done
    assert "</html>" in (tmp_path / "a").read_text("utf-8")
    assert json.loads(run("export", directory, "prompts", "-o", tmp_path / "a", "--json")) == done
    assert (tmp_path / "a").read_text("utf-8") == run("export", directory, "prompts")


def test_export_prints_json(runs: tuple[Path, str, Any]) -> None:
    directory, url, result = runs
    assert json.loads(run("export", directory, "prompts", "--json")) == dict(result.instructions)
    rows = json.loads(run("export", url, "trials", "--study", "first", "--json"))
    assert [row["reward"] for row in rows] == [result.reward_of(trial) for trial in result.trials]
    assert run("export", directory, "program", "--json") == (directory / "best.json").read_text("utf-8")


def test_a_cost_that_is_not_known_is_null(runs: tuple[Path, str, Any]) -> None:
    row, usage = json.loads(run("list", runs[0], "--json"))[0], runs[2].usage
    assert row["cost"] is None
    assert row["unpriced_calls"] == usage.scorer_calls + usage.proposer_calls > 0
    assert "cost unknown" in run("show", runs[0])


def test_the_cost_of_free_lms_is_zero(tmp_path: Path) -> None:
    compiled(log_dir=tmp_path, num_rounds=1, prices={"scripted/lm": (0, 0)})
    row = json.loads(run("list", tmp_path, "--json"))[0]
    assert (row["cost"], row["unpriced_calls"]) == (0.0, 0)
    assert " tokens, $0.0000\n" in run("show", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ("show", "no/such/folder"),
            1,
            "Error: no/such/folder is not a directory. Give one, or the URL of a storage: sqlite:///qa.db.",
        ),
        (("list", "sqlite:///no/such.db"), 1, "Error: There is no database sqlite:///no/such.db."),
        (("list", "nonsense://x"), 1, "Error: storage 'nonsense://x' can't be opened"),
        (("list", "sqlite:///{directory}/best.json"), 1, "Error: The database can't be read: "),
        (("list", "{folder}"), 1, "has no run of dspy_opro."),
        (("show", "{url}"), 1, "has several runs: first, second. Choose one with --study."),
        (("show", "{url}", "--study", "third"), 1, "has no run 'third', but first, second."),
        (("show", "{directory}", "--trial", "999"), 1, "The run has no trial 999, only the trials 0 to"),
        (("export", "{url}", "program", "--study", "first"), 1, "Only a log directory has the best program."),
        (("export", "{directory}", "trials", "--format", "parquet"), 2, "--format parquet needs --output."),
        (("export", "{directory}", "nothing"), 2, "'nothing' is not one of"),
        (("export", "{directory}", "prompts", "-o", "{folder}"), 1, "Error: [Errno 21] Is a directory"),
        (
            ("export", "{directory}", "prompts", "-o", "{file}/a/b.txt"),
            1,
            "Error: [Errno 20] Not a directory",
        ),
        (
            ("export", "{directory}", "trials", "--format", "parquet", "-o", "{file}/a/b"),
            1,
            "Error: [Errno 20] Not",
        ),
        (("stop", "{directory}"), 1, "Error: No process runs"),
        (("stop", "{url}", "--study", "first"), 1, "Only a run with a log directory can be stopped."),
        (("frobnicate",), 2, "No such command 'frobnicate'."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_mistakes_are_one_line_and_an_exit_code(
    runs: tuple[Path, str, Any], arguments: tuple[str, ...], code: int, message: str
) -> None:
    directory, url, _ = runs
    places = {"directory": directory, "url": url, "folder": directory.parent, "file": directory / "lock"}
    text = run(*(argument.format(**places) for argument in arguments), code=code)
    assert message in text
    assert "Traceback" not in text


LONG_RUN = """
import sys, time
from dspy_opro import OPRO
from dspy_opro.testing import ScriptedLM
from tests.reporting.test_command_line import SEED, TASK, TRAINSET, answer, metric

def slow(call):
    time.sleep(0.05)
    return answer(call)

lm = ScriptedLM(slow)
result = OPRO(
    metric, prompt_model=lm, task_model=lm, log_dir=sys.argv[1], auto=None, timeout_seconds=60, num_threads=2,
    display_progress=False, seed=SEED,
).compile(TASK.student(), trainset=TRAINSET).opro_result
print(result.stop_reason)
"""


def begin(directory: Path, num_trials: int = 1) -> subprocess.Popen[str]:
    """Start `LONG_RUN`, and wait until it has decided so many trials."""
    command = [sys.executable, "-W", "ignore", "-c", LONG_RUN, str(directory)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    until = time.monotonic() + 60
    while True:
        with contextlib.suppress(ValueError):  # the run is not on record yet
            (on_record,) = find_runs(str(directory))
            if len(on_record.result().trials) >= num_trials:
                return process
        if time.monotonic() > until or process.poll() is not None:
            process.kill()
            raise AssertionError(f"{directory} has no {num_trials} trials")
        time.sleep(0.1)


@pytest.mark.slow
def test_a_resumed_run_has_not_ended_until_its_own_end(tmp_path: Path) -> None:
    directory = tmp_path / "qa"
    first = compiled(valset=None, log_dir=directory, num_rounds=1)
    process = begin(directory, len(first.trials) + 1)
    try:
        (on_record,) = find_runs(str(directory))
        assert on_record.is_running and on_record.result().stop_reason == "not ended"
    finally:
        process.kill()
        process.wait()
    assert not on_record.is_running
    assert (on_record.result().stop_reason, on_record.result().returned) == ("not ended", "")
    assert replace(on_record, directory=None).is_running  # without a directory nobody can tell
    assert json.loads(run("list", directory, "--json"))[0]["state"] == "not ended"
    run("watch", directory, code=3)


def test_a_run_under_way_is_watched_and_stopped(tmp_path: Path) -> None:
    directory = tmp_path / "qa"
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", LONG_RUN, str(directory)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        until = time.monotonic() + 60
        while not (directory / "best.json").is_file():
            assert time.monotonic() < until
            time.sleep(0.1)
        assert json.loads(run("list", directory, "--json"))[0]["state"] == "running"
        watching = subprocess.Popen(
            [
                sys.executable,
                "-W",
                "ignore",
                "-m",
                "dspy_opro",
                "watch",
                directory,
                "--interval",
                "0.2",
                "--json",
            ],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        assert watching.stdout is not None
        first = json.loads(watching.stdout.readline())
        assert first["state"] == "running"
        assert json.loads(run("stop", directory, "--json")) == {"name": "opro", "state": "stopping"}
        assert process.communicate(timeout=60)[0].strip() == "stop_file"
        lines, _ = watching.communicate(timeout=60)
        assert watching.returncode == 0
        assert json.loads(lines.splitlines()[-1])["state"] == "stop_file"
    finally:
        process.kill()


def test_the_shell_completes_commands() -> None:
    from click.testing import CliRunner

    from dspy_opro.reporting.command_line import main

    done = CliRunner().invoke(main, env={"_DSPY_OPRO_COMPLETE": "bash_source"}, prog_name="dspy-opro")
    assert "_dspy_opro_completion" in done.output


def test_the_package_does_not_import_click_for_it() -> None:
    code = "import sys, dspy_opro; print('dspy_opro.reporting.command_line' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "False"
