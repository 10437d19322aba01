"""Runs as they are on record: in the journal of a log directory, or in any Optuna storage."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage

from dspy_opro.programs.errors import in_brief
from dspy_opro.programs.secrets import without_password
from dspy_opro.search.confidence import Gain, measured_gain
from dspy_opro.search.shared import SPLITS
from dspy_opro.search.tasks import Failure, demo_set_key, scored_example
from dspy_opro.search.trajectory import Outcome, Trajectory, Trial, Usage, as_counted, lowest_success
from dspy_opro.storage.opening import JOURNAL_NAME, journal_storage, opened, quiet_optuna
from dspy_opro.storage.outage import Outage
from dspy_opro.storage.result_log import Record, ResultLog
from dspy_opro.storage.run_storage import LOG_SUFFIX, OPENED_BY
from dspy_opro.storage.trials import Outcomes, is_decided, read_trial

from .examples import Examples, ExampleText
from .result import NOT_ENDED, OPROResult
from .run_directory import BEST, CONFIG, RESULT, STOP, is_in_use

logger = logging.getLogger("dspy_opro")


@dataclass(frozen=True)
class Run:
    """One run on record."""

    study: optuna.Study
    log: optuna.Study
    directory: Path | None
    """Its log directory, if the run was named by one."""

    @property
    def name(self) -> str:
        return self.study.study_name

    @property
    def is_running(self) -> bool:
        """Whether a process runs it. If its log directory can't tell: whether no end is on record."""
        is_in_directory = None if self.directory is None else is_in_use(self.directory)
        return not self._has_end if is_in_directory is None else is_in_directory

    @property
    def _has_end(self) -> bool:
        """Whether its latest process has recorded an end. The end of an earlier process stays in the study."""
        attrs = self.study.user_attrs
        return "stop_reason" in attrs and attrs.get(OPENED_BY) is None

    @property
    def best_program(self) -> Path | None:
        """The file of the best program."""
        path = None if self.directory is None else self.directory / BEST
        return path if path is not None and path.is_file() else None

    def request_stop(self) -> None:
        """Ask the process that runs it to end, as Ctrl-C does.

        Raises:
            ValueError: There is no log directory, or no process runs it.
        """
        if self.directory is None:
            raise ValueError("Only a run with a log directory can be stopped. Give the directory.")
        if not self.is_running:
            raise ValueError(f"No process runs {self.directory}.")
        (self.directory / STOP).touch()

    def result(self) -> OPROResult:
        """The result so far: the whole one of a run that has ended in its log directory.

        Elsewhere the examples' texts, the prompts, and which proposals were not used are not on record.
        """
        whole = None if self.directory is None else self.directory / RESULT
        if whole is not None and whole.is_file() and not self.is_running:
            try:
                return OPROResult.load(whole)
            except ValueError as error:
                _warn_of_damage(whole, in_brief(error))
        recorded = [trial for trial in self.study.get_trials(deepcopy=False) if is_decided(trial)]
        records = ResultLog(self.log, Outage()).read()
        outcomes = _outcomes(records, recorded[0].user_attrs["candidate_id"] if recorded else "")
        proposed = {r["key"]: r["proposal"].get("texts") for r in records if "proposal" in r}
        trials = tuple(_with_demos(read_trial(trial, outcomes), proposed) for trial in recorded)
        trajectory = Trajectory().add(*trials)
        failures = [
            Failure(id_, split, position, outcome.error)
            for (id_, split), row in sorted(outcomes.items())
            for position, outcome in enumerate(row)
            if outcome is not None and outcome.error is not None
        ]
        has_end = not self.is_running and self._has_end
        number = self.study.user_attrs.get("returned_trial") if has_end else None
        returned = next((t.id for row, t in zip(recorded, trials, strict=True) if row.number == number), "")
        chosen = _chosen(trajectory, outcomes, returned)
        confirms = not has_end or number == self.study.user_attrs.get("confirmed_trial")
        return OPROResult(
            trajectory=trajectory,
            curve=_curve(trials),
            stop_reason=self.study.user_attrs["stop_reason"] if has_end else NOT_ENDED,
            usage=sum((Usage(**r["usage"]) for r in records if "usage" in r), Usage()),
            seconds=max((r.get("seconds", 0.0) for r in records), default=0.0),
            failures=tuple(failures[:1000]),
            num_failures=len(failures),
            selected_on="valset" if any(t.valset_score is not None for t in trials) else "trainset",
            config={} if self.directory is None else _config(self.directory),
            study_name=self.name,
            returned=returned,
            gain=None if chosen is None else _gain(trajectory, outcomes, chosen, confirms),
            data=_examples(trajectory, outcomes, chosen, returned),
        )


def find_runs(target: str) -> list[Run]:
    """The runs in a log directory or in a storage.

    Raises:
        ValueError: There is no such directory or storage, or it has no run.
    """
    directory: Path | None = None
    storage: Any = target
    if "://" not in target:
        directory = Path(target)
        if not directory.is_dir():
            raise ValueError(
                f"{target} is not a directory. Give one, or the URL of a storage: sqlite:///qa.db."
            )
        storage = _storage_of(directory)
    elif not _is_there(target):
        raise ValueError(f"There is no database {target}.")
    with quiet_optuna():
        backend = _opened_to_read(storage)
        names = {study.study_name for study in backend.get_all_studies()}
        own = sorted(name for name in names if f"{name}{LOG_SUFFIX}" in names)
        if directory is not None and isinstance(storage, str):  # a storage has runs of other directories, too
            config = _config(directory)
            study_name = config.get("study_name") or config.get("name") or directory.resolve().name
            own = [name for name in own if name == study_name]
        runs = [
            Run(
                optuna.load_study(study_name=name, storage=backend),
                optuna.load_study(study_name=f"{name}{LOG_SUFFIX}", storage=backend),
                directory,
            )
            for name in own
        ]
    if not runs:
        raise ValueError(f"{target} has no run of dspy_opro.")
    return runs


def _opened_to_read(storage: Any) -> BaseStorage:
    """The storage. Optuna would make its tables in a database that has none."""
    try:
        return opened(storage, makes_tables=False)
    except StorageInternalError as error:
        cause = error.__cause__ or error
        if "version_info" in str(cause).partition("\n")[0]:  # the table that Optuna reads first
            raise ValueError(f"{without_password(storage)} has no run of dspy_opro.") from error
        raise cause from error


def _is_there(url: str) -> bool:
    """Whether a storage can exist. SQLite would make a file that does not."""
    return not url.startswith("sqlite:///") or _file_of(url).is_file()


def _file_of(url: str) -> Path:
    return Path(url.partition("?")[0].removeprefix("sqlite:///"))


def _config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG
    try:
        return dict(json.loads(path.read_text("utf-8"))) if path.is_file() else {}
    except (ValueError, TypeError) as error:
        _warn_of_damage(path, in_brief(error))
        return {}


@cache
def _warn_of_damage(path: Path, cause: str) -> None:
    logger.warning("%s is damaged, and the run is shown without it: %s", path, cause.partition("\n")[0])


def _storage_of(directory: Path) -> Any:
    """The storage of a log directory: its journal, or the one that its settings name."""
    if (directory / JOURNAL_NAME).is_file():
        return journal_storage(directory)
    url = _config(directory).get("storage")
    if not url:
        raise ValueError(f"{directory} has no run of dspy_opro.")
    if "://" not in url or "***" in url:
        raise ValueError(f"The run of {directory} is in the storage {url}: give the URL of the storage.")
    if not _is_there(url):
        cause = f"its storage {url} is relative to another directory. Give its URL."
        is_absolute = _file_of(url).is_absolute()
        raise ValueError(f"There is no database {url}." if is_absolute else f"No run in {directory}: {cause}")
    return url


def _outcomes(records: Sequence[Record], student: str) -> Outcomes:
    """What every candidate gave, as far as it is on record. `student` is the id of candidate zero."""
    found: dict[tuple[str, str], dict[int, Record]] = {}
    for record in records:
        if "outcome" in record:
            id_, split, position = scored_example(record["key"])
            found.setdefault((id_, split), {})[position] = record["outcome"] | {"calls": None}  # not shown
    lowest = lowest_success(Outcome(**record) for record in found.get((student, "train"), {}).values())
    return {
        key: [
            as_counted(Outcome(**by_position[i]), lowest) if i in by_position else None
            for i in range(max(by_position) + 1)
        ]
        for key, by_position in found.items()
    }


def _with_demos(trial: Trial, proposed: Mapping[str, Mapping[str, str]]) -> Trial:
    """The trial with its demos, which are among the proposals of the first round."""
    number = trial.candidate.demo_set
    if number is None:
        return trial
    return replace(trial, candidate=replace(trial.candidate, demos=proposed.get(demo_set_key(number))))


def _chosen(trajectory: Trajectory, outcomes: Outcomes, returned: str) -> Trial | None:
    """The trial that the run compared with the student. It need not be the one with the best score."""
    if not any(trial.state == "complete" for trial in trajectory.trials):
        return None
    others = trajectory.trials[1:]
    compared = [t for t in others if (t.id, "unseen") in outcomes]
    return [trajectory.best, *compared, *(t for t in compared or others if t.id == returned)][-1]


def _gain(trajectory: Trajectory, outcomes: Outcomes, chosen: Trial, confirms: bool) -> Gain | None:
    """The gain; None where it is not known, and where processes with plans of other sizes scored the two."""
    student = trajectory.trials[0]
    same = len(student.scores) == len(chosen.scores) > 0 and (
        chosen.valset_score is None or len(student.valset_scores) == len(chosen.valset_scores) > 0
    )
    unseen = (outcomes.get((trial.id, "unseen"), ()) for trial in (student, chosen))
    return measured_gain(trajectory, chosen, *unseen, confirms=confirms) if same else None


def _examples(trajectory: Trajectory, outcomes: Outcomes, chosen: Trial | None, returned: str) -> Examples:
    """The outcomes that a result keeps, and the positions in place of the examples."""
    if chosen is None:
        return Examples(has_texts=False)
    kept = {trajectory.trials[0].id, trajectory.best.id, chosen.id, returned}
    sizes = {
        split: max((len(row) for (_, name), row in outcomes.items() if name == split), default=0)
        for split in SPLITS
    }
    return Examples(
        {split: [ExampleText(i, {}, {}) for i in range(size)] for split, size in sizes.items() if size},
        {id_: {split: outcomes.get((id_, split), ()) for split in SPLITS} for id_ in kept if id_},
        has_texts=False,
    )


def _curve(trials: Sequence[Trial]) -> tuple[float, ...]:
    """The best score after each round, on the deciding data."""
    with_val = any(trial.valset_score is not None for trial in trials)
    best, curve = float("-inf"), []
    for round_ in range(max((trial.candidate.round for trial in trials), default=-1) + 1):
        for trial in (t for t in trials if t.candidate.round == round_ and t.state == "complete"):
            score = trial.valset_score if with_val else trial.reward
            best = best if score is None else max(best, score)
        curve.append(best)
    return tuple(curve)
