"""`dspy-opro`: shows and exports runs. It needs neither the program, nor the data, nor an LM.

Exit codes: 0 success; 1 no such run, or the command does not work with it; 2 wrong usage; 3 the watched run ended
with an error, or its process was killed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
from sqlalchemy.exc import SQLAlchemyError  # Optuna needs it, too

from dspy_opro.programs.errors import printable
from dspy_opro.programs.secrets import without_password
from dspy_opro.search.trajectory import Trial

from .recorded import Run, find_runs
from .result import NOT_ENDED, OPROResult, counted, known_cost

RUNNING = "running"
target = click.argument("target")
study = click.option("--study", metavar="NAME", help="The run's name, if TARGET has several.")
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="dspy-opro")
def main() -> None:
    """Show, watch, export and stop runs of dspy_opro.

    TARGET is the log directory of a run or the URL of an Optuna storage, e.g. runs/qa or sqlite:///runs.db.
    """


@main.command("list")
@target
@as_json
def list_(target: str, as_json: bool) -> None:
    """List the runs in TARGET."""
    rows = _try(lambda: [_row(run) for run in find_runs(target)])
    if as_json:
        _print_json(rows)
        return
    for row in rows:
        click.echo(
            f"{row['name']}  {row['state']}  {counted(row['trials'], 'trial')}, {_scores(row)}, "
            f"{row['examples']:,} examples scored"
        )


@main.command()
@target
@study
@click.option("--trial", type=int, help="Show this trial instead of the returned one.")
@as_json
def show(target: str, study: str | None, trial: int | None, as_json: bool) -> None:
    """Show the result of a run and its best instructions."""
    run = _run(target, study)
    result = _try(run.result)
    trials = result.trajectory.trials
    if trial is not None and not 0 <= trial < len(trials):
        raise click.ClickException(f"The run has no trial {trial}, only the trials 0 to {len(trials) - 1}.")
    shown = trials[trial] if trial is not None else result.best if result.curve else None
    texts = {} if shown is None else dict(shown.candidate.instructions)
    if as_json:
        _print_json({**_try(lambda: _row(run)), "instructions": texts, "trajectory": result.to_dicts()})
        return
    click.echo(result.summary() if trial is None else f"trial {trial}: {_outcome(result, trials[trial])}")
    for name, text in texts.items():
        click.echo(f"\n{click.style(name, bold=True)}\n{printable(text)}")


@main.command()
@target
@study
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default=Path("report.html"), show_default=True
)
@as_json
def report(target: str, study: str | None, output: Path, as_json: bool) -> None:
    """Write the report of a run as one HTML page."""
    run = _run(target, study)
    _try(lambda: run.result().save_report(output))
    if as_json:
        _print_json({"name": run.name, "output": str(output)})
    else:
        click.echo(output)


@main.command()
@target
@study
@click.option("--interval", type=click.FloatRange(min=0.1), default=2.0, show_default=True, help="Seconds.")
@as_json
def watch(target: str, study: str | None, interval: float, as_json: bool) -> None:
    """Print a line whenever a run makes progress, until it ends."""
    before: dict[str, Any] = {}
    while True:
        run = _run(target, study)
        row = _try(partial(_row, run))
        if row != before:
            line = (
                f"round {row['rounds']}: {_scores(row)}, {row['examples']:,} examples scored, {row['state']}"
            )
            click.echo(json.dumps(row, ensure_ascii=False) if as_json else line)
        if row["state"] != RUNNING:
            raise SystemExit(3 if row["state"] in ("error", NOT_ENDED) else 0)
        before = row
        time.sleep(interval)


@main.command()
@target
@click.argument("what", type=click.Choice(["program", "prompts", "trials"]))
@study
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="The file. Default: the standard output."
)
@click.option(
    "--format", "format_", type=click.Choice(["csv", "parquet"]), default="csv", help="Of the trials."
)
@as_json
def export(
    target: str, what: str, study: str | None, output: Path | None, format_: str, as_json: bool
) -> None:
    """Export the best program, the prompts or the trials.

    With --json and no --output it prints the program, the prompts by predictor, or the trials as JSON. With --json
    and --output it writes the file as without --json, and prints its name as JSON.
    """
    run = _run(target, study)
    result = _try(run.result)
    is_printed = as_json and output is None
    if what == "program":
        best = run.best_program
        if best is None:
            raise click.ClickException(
                "Only a log directory has the best program. Give the directory."
                if run.directory is None
                else "The run has no program yet: the student was not scored in full."
            )
        _write(output, best.read_text("utf-8"))
    elif what == "prompts":
        texts = _try(lambda: result.instructions)
        if result.best.candidate.demo_set is not None:
            click.echo("The program also shows demos to the LM. Only `export program` has them.", err=True)
        if is_printed:
            _print_json(dict(texts))
        else:
            text = "\n\n".join(f"# {name}\n\n{text}" for name, text in texts.items()) + "\n"
            _write(output, printable(text) if output is None else text)
    elif is_printed:
        _print_json(result.to_dicts())
    elif format_ == "csv":
        _write(output, _try(result.to_dataframe).to_csv(index=False))
    elif output is None:
        raise click.UsageError("--format parquet needs --output.")
    else:
        _try(lambda: output.parent.mkdir(parents=True, exist_ok=True))
        _try(lambda: result.to_dataframe().to_parquet(output, index=False))
    if as_json and output is not None:
        _print_json({"name": run.name, "output": str(output)})


@main.command()
@target
@study
@as_json
def stop(target: str, study: str | None, as_json: bool) -> None:
    """Ask the process of a run to end. It finishes its running calls."""
    run = _run(target, study)
    _try(run.request_stop)
    if as_json:
        _print_json({"name": run.name, "state": "stopping"})
    else:
        click.echo(f"{run.name} ends as soon as its running calls are finished.")


def _run(target: str, name: str | None) -> Run:
    runs: list[Run] = _try(lambda: find_runs(target))
    names = [run.name for run in runs]
    if name is not None:
        runs = [run for run in runs if run.name == name]
        if not runs:
            raise click.ClickException(f"{target} has no run {name!r}, but {', '.join(names)}.")
    if len(runs) > 1:
        raise click.ClickException(f"{target} has several runs: {', '.join(names)}. Choose one with --study.")
    return runs[0]


def _row(run: Run) -> dict[str, Any]:
    is_running = run.is_running  # before the result is read: the run may end in between
    result = run.result()
    has_score = bool(result.curve)
    return {
        "name": run.name,
        "state": RUNNING if is_running else result.stop_reason,
        "rounds": max(0, len(result.curve) - 1),
        "trials": len(result.trajectory),
        "student": result.baseline.score if has_score else None,
        "best": result.best_score if has_score else None,
        "decided_on": result.selected_on,
        "examples": result.usage.metric_calls,
        "tokens": result.usage.tokens,
        "cost": known_cost(result.usage),
        "unpriced_calls": result.usage.unpriced_calls,
    }


def _outcome(result: OPROResult, trial: Trial) -> str:
    """A trial in words. The reward of a dropped one is an estimate."""
    reward, demos = f"{result.reward_of(trial):.3f}", trial.candidate.demo_set
    if trial.state != "complete":
        reward = f"≈ {reward}, estimate from {counted(trial.num_scored, 'example')}"
    return f"{trial.state}, reward {reward}" + ("" if demos is None else f", demo set {demos}")


def _scores(row: dict[str, Any]) -> str:
    if row["best"] is None:
        return "no score yet"
    return f"{row['student']:.3f} -> {row['best']:.3f} on the {row['decided_on']}"


def _try(function: Callable[[], Any]) -> Any:
    """The result of a call. Its error is one line for the user."""
    try:
        return function()
    except SQLAlchemyError as error:
        cause = without_password(str(error).partition("\n")[0])
        raise click.ClickException(f"The database can't be read: {cause}") from error
    except (ValueError, OSError, ImportError) as error:
        raise click.ClickException(str(error)) from error


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def _write(output: Path | None, text: str) -> None:
    if output is None:
        click.echo(text, nl=False)
    else:
        _try(lambda: output.parent.mkdir(parents=True, exist_ok=True))
        _try(lambda: output.write_text(text, encoding="utf-8"))
