"""Everything a run needs, made and checked before anything is spent."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import dspy

from . import study
from .cleaning import Rules, ngrams
from .config import OPROConfig, paper
from .demos import Bootstrap
from .evaluation import Run
from .events import Reporter
from .executor import DSPyExecutor
from .fingerprint import fingerprint, model_name, settings_of
from .metric import Metric
from .migration import warn
from .options import options_of
from .program import Program, check_examples, same_inputs
from .progress import Progress, announce
from .proposer import OPROProposer, PaperProposer
from .racing import Halving, Pruner, ScoreAll
from .reflective import adapt
from .result import OPROResult
from .rundir import RunDirectory
from .search import Search
from .stopping import Budget, Ledger, Patience, RunState, StopAtScore, Stopper, first_reason
from .trajectory import Candidate, Trial
from .work import Block, Decided, Event, Failure, Finished, Plan, rng, usual_lag


@dataclass
class Setup:
    """One `compile` call, ready to run."""

    config: OPROConfig
    program: Program
    student: Candidate
    executor: DSPyExecutor
    search: Search
    store: study.OptunaStore
    progress: Progress
    run: Run
    reporter: Reporter
    splits: dict[str, Sequence[Any]]
    """Split -> examples by position in the race."""
    orders: dict[str, Sequence[int]]
    """Split -> index into the given dataset, by position in the race."""
    directory: RunDirectory | None
    """The files in `log_dir`."""
    started: float
    finished: list[Trial] = field(default_factory=list)
    """Trials since the last round was decided."""

    def on_event(self, event: Event) -> None:
        if isinstance(event, Finished):
            candidate = event.trial.candidate
            self.reporter.finished(event.trial, lambda: self.executor.build(candidate), self.splits)
            self.executor.forget(candidate)
            self.finished.append(event.trial)
        self.progress.on_event(event)
        if self.directory is not None and isinstance(event, Decided):
            self.directory.log("round %d decided, best score %.4f", event.round, event.best_score)
        if isinstance(event, Decided):
            trials, self.finished = self.finished, []
            self.executor.decided(trials)

    def on_tick(self) -> None:
        """Look for a wish from outside, and keep `best.json` up to date."""
        if self.directory is None:
            return
        if self.directory.take_stop():
            self.run.request_stop("stop_file")
        self._save_best()

    def _save_best(self, wait: bool = False) -> None:
        if self.directory is not None and len(self.search.trajectory):
            best = self.search.trajectory.best.candidate
            self.directory.write_best(best.id, lambda path: self.program.build(best).save(path), wait)

    def close(self) -> None:
        self.progress.close()
        self.executor.close()
        if self.directory is not None:
            self._save_best(wait=True)
            self.directory.log("ended: %s", self.search.stop_reason)
            self.directory.close()

    def result(self) -> OPROResult:
        """What the run found so far."""
        search, run = self.search, self.run
        failures = [
            replace(f, example=self.orders[f.split][f.example]) for f in sorted(run.failures, key=_place)
        ]
        return OPROResult(
            trajectory=search.trajectory,
            curve=tuple(search.best_scores),
            stop_reason=search.stop_reason or "error",
            usage=run.ledger.usage,
            seconds=time.monotonic() - self.started,
            failures=tuple(failures[:1000]),
            num_failures=len(failures),
            selected_on="valset" if search.plan.num_val else "trainset",
            config=readable(self.config),
            study_name=self.store.study.study_name,
            problems=tuple(search.problems),
        )


def _place(failure: Failure) -> tuple[str, str, int]:
    return failure.candidate, failure.split, failure.example


def set_up(config: OPROConfig, student: Any, is_async: bool) -> Setup:
    """Check every input and put the parts together.

    Raises:
        ValueError: A dataset, the program or a setting can't be used.
        TypeError: Something is not of the type it must be.
    """
    started = time.monotonic()
    _look_over(config)
    config = config.resolve()
    metric, trainset, valset = _inputs(config, student)
    program = Program(student)
    prompt_model = _language_models(config, student)
    order = list(range(len(trainset)))
    rng(config.seed, "order").shuffle(order)
    order = order[: config.max_train_examples]
    splits = {"train": [trainset[i] for i in order], "val": valset}
    ledger = Ledger()
    reporter = Reporter(metric, at_once=is_async)
    executor = DSPyExecutor(
        program,
        Metric(metric),
        splits,
        _proposer(config),
        prompt_model,
        config.task_model,
        ledger,
        _rules(config, program, splits["train"]),
        options_of(config, student, is_async),
        reporter,
        _bootstrap(config, program, Metric(metric), trainset, order),
    )
    search = _search(config, program, len(splits["train"]), len(valset))
    program.demo_sets = search.demo_sets
    directory = None  # from here on things are made that stay, so what is above has checked all there is
    if config.log_dir is not None:
        directory = RunDirectory(config.log_dir, is_shared=config.storage is not None)
        directory.write_config(readable(config))
    store = _store(config, student, splits, metric)
    _announce(config, search)
    progress = Progress(config.display_progress, config.verbose, config.num_rounds, lambda: ledger.usage)
    budget = Budget(config.max_tokens, config.max_cost, config.timeout_seconds)
    num_threads = config.num_threads or dspy.settings.num_threads
    shared = store if isinstance(store, study.SharedStore) else None
    run = Run(search, executor, store, ledger, budget, num_threads, shared)
    setup = Setup(
        config, program, program.candidate, executor, search, store, progress, run, reporter, splits,
        {"train": order, "val": range(len(valset))}, directory, started,
    )  # fmt: skip
    run.on_event, run.on_tick = setup.on_event, setup.on_tick
    store.on_stop = lambda: run.request_stop("callback")
    first = Block(program.candidate, 0, "train", 0, min(config.block_size, len(order)))
    if store.is_fresh if shared is None else shared.join(settings_of(config, search.plan), first):
        run.prepare = lambda: executor.try_one(program.candidate)
    search.stop_rule = _stop_rule(config, run)
    return setup


def _look_over(config: OPROConfig) -> None:
    """Warn of what does not go together."""
    if config.num_trials is not None and config.auto is not None and "auto" in config.model_fields_set:
        warn(f"num_trials={config.num_trials} takes the place of the rounds of auto={config.auto!r}.")
    if config.teacher is not None and not (config.max_bootstrapped_demos or config.max_labeled_demos):
        warn("teacher is not used: it bootstraps demos, and max_bootstrapped_demos is not above 0.")


def _proposer(config: OPROConfig) -> Any:
    if config.proposer is not None:
        return adapt(config.proposer)
    return PaperProposer() if paper(config) else OPROProposer()


def _store(
    config: OPROConfig, student: dspy.Module, splits: Mapping[str, Sequence[Any]], metric: Callable[..., Any]
) -> study.OptunaStore:
    """Where the run is kept; with a `storage` of its own it is open to other processes."""
    kind = study.OptunaStore if config.storage is None else study.SharedStore
    return kind(
        storage=config.storage,
        study_name=config.study_name or config.name,
        log_dir=config.log_dir,
        callbacks=config.callbacks,
        fingerprint=fingerprint(
            student,
            splits["train"],
            splits["val"],
            metric,
            task_model=model_name(config.task_model or dspy.settings.lm),
            failure_score=config.failure_score,
            seed=config.seed,
        ),
    )


def _inputs(config: OPROConfig, student: Any) -> tuple[Callable[..., Any], Sequence[Any], Sequence[Any]]:
    if not isinstance(student, dspy.Module):
        raise TypeError(f"student must be a dspy.Module, but is {type(student).__name__}.")
    if config.metric is None:
        raise ValueError("metric must be given, to OPROTeleprompter(...) or to compile(...), but is None.")
    if config.trainset is None:
        raise ValueError("trainset must be given, to OPROTeleprompter(...) or to compile(...), but is None.")
    check_examples(config.trainset, "trainset")
    if config.valset is not None and not len(config.valset):
        warn("valset is empty: the trainset decides early stopping and the result.")
    elif config.valset is not None:
        check_examples(config.valset, "valset")
        shared = same_inputs(config.trainset, config.valset)
        if shared:
            warn(
                f"{shared} of {len(config.valset)} valset examples have the inputs of a trainset example: "
                "the validation score will flatter instructions that fit the trainset."
            )
    return config.metric, list(config.trainset), list(config.valset or ())


def _language_models(config: OPROConfig, student: dspy.Module) -> Any:
    """The optimizer LM; checks that the program has one too."""
    for name in ("prompt_model", "task_model"):
        lm = getattr(config, name)
        if lm is not None and not isinstance(lm, dspy.BaseLM):
            raise TypeError(f"{name} must be a dspy.LM, but is {lm!r}. Write {name}=dspy.LM(...).")
    default = dspy.settings.lm
    if default is None and config.task_model is None:
        bare = [name for name, predictor in student.named_predictors() if predictor.lm is None]
        if bare:
            raise ValueError(
                f"No LM is configured for {', '.join(bare)}. Call dspy.configure(lm=dspy.LM(...)) or pass task_model."
            )
    prompt_model = config.prompt_model or default or config.task_model
    if prompt_model is None:
        raise ValueError(
            "No LM is configured for the proposals. Pass prompt_model or call dspy.configure(lm=...)."
        )
    return prompt_model


def _rules(config: OPROConfig, program: Program, shown: Sequence[Any]) -> Rules:
    # Only what the meta-prompt may show can be quoted from it. The beginning of each field is enough to notice a
    # quotation, and keeps long documents from filling memory.
    texts = (str(value)[:2000] for example in shown for value in example.toDict().values())
    own = set(ngrams((part.text for part in program.parts.values()), Rules.ngram))
    longest = max(len(part.text) for part in program.parts.values())
    # The paper's code drops texts above 500 characters; a student's own text may be longer.
    max_length = max(500, longest) if paper(config) else max(4000, 2 * longest)
    return Rules(max_length=max_length, quotes=frozenset(ngrams(texts, Rules.ngram)) - own)


def _bootstrap(
    config: OPROConfig, program: Program, metric: Metric, trainset: Sequence[Any], order: Sequence[int]
) -> Bootstrap:
    """Makes demos out of the examples that candidates are not scored on, where those are enough."""
    most, labeled = config.max_bootstrapped_demos or 0, config.max_labeled_demos or 0
    scored = set(order)
    others = [example for index, example in enumerate(trainset) if index not in scored]
    teacher = config.teacher
    return Bootstrap(
        program=program,
        metric=metric,
        trainset=others if len(others) >= 2 * (most + labeled) else [trainset[i] for i in order],
        max_bootstrapped_demos=most,
        max_labeled_demos=labeled,
        max_rounds=config.max_rounds,
        metric_threshold=config.metric_threshold,
        max_errors=config.max_errors,
        teacher=teacher[0] if isinstance(teacher, (list, tuple)) and teacher else teacher or None,
        teacher_settings=config.teacher_settings,
        seed=config.seed,
    )


def _pruner(pruner: Any, block_size: int) -> Pruner:
    if pruner is None:
        return ScoreAll()
    if isinstance(pruner, str) and pruner == "auto":
        return Halving()
    if hasattr(pruner, "prune"):  # optuna.pruners.BasePruner
        return study.OptunaPruner(pruner, block_size)
    if hasattr(pruner, "drop"):
        chosen: Pruner = pruner
        return chosen
    raise ValueError(
        f'pruner must be "auto", None, an Optuna pruner or a dspy_opro Pruner, but got {pruner!r}.'
    )


def _search(config: OPROConfig, program: Program, num_train: int, num_val: int) -> Search:
    pruner = _pruner(config.pruner, config.block_size)
    least = num_train + num_val
    if config.max_metric_calls is not None and config.max_metric_calls < least:
        raise ValueError(
            f"max_metric_calls must be at least {least}, to score the student on {num_train} train and {num_val} "
            f"validation examples, but got {config.max_metric_calls}. Give fewer examples or max_train_examples."
        )
    max_metric_calls = config.max_metric_calls
    if config.max_full_evals is not None:
        max_metric_calls = config.max_full_evals * least
    num_candidates = config.num_candidates or 8
    has_demos = bool(config.max_bootstrapped_demos or config.max_labeled_demos)
    num_demo_sets = max(1, min(num_candidates, config.num_trials or num_candidates) // 2) if has_demos else 0
    num_rounds = math.inf if config.num_rounds is None else config.num_rounds
    if max_metric_calls is not None:
        per_round = pruner.most_calls(num_train, num_candidates) + num_val
        num_rounds = min(num_rounds, (max_metric_calls - least) // per_round)
    plan = Plan(
        num_train=num_train,
        num_val=num_val,
        num_rounds=config.num_rounds,
        num_candidates=num_candidates,
        num_trials=config.num_trials,
        num_demo_sets=num_demo_sets,
        predictor_strategy=config.predictor_strategy,
        max_metric_calls=max_metric_calls,
        lag=usual_lag(num_rounds) if config.lag is None else config.lag,
        block_size=config.block_size,
        seed=config.seed,
    )
    return Search(plan, program.candidate, pruner, recombine=study.recombine)


def _stop_rule(config: OPROConfig, run: Run) -> Callable[[RunState], str | None]:
    stoppers: list[Stopper] = []
    if config.stop_at_score is not None:
        stoppers.append(StopAtScore(config.stop_at_score))
    if config.patience is not None:
        stoppers.append(Patience(config.patience, config.min_delta))
    stoppers.extend(config.stoppers)
    return lambda state: first_reason(stoppers, replace(state, usage=run.told, seconds=run.seconds))


def _announce(config: OPROConfig, search: Search) -> None:
    """Say beforehand what the run can spend at most."""
    if not (config.display_progress or config.verbose):
        return
    plan = search.plan
    if plan.num_rounds is None:
        announce("OPRO: no limit on rounds; the other limits end the run.")
        return
    per_round = search.pruner.most_calls(plan.num_train, plan.num_candidates) + plan.num_val
    examples = plan.num_train + plan.num_val + plan.num_rounds * per_round
    if plan.max_metric_calls is not None:
        examples = min(examples, plan.max_metric_calls)
    per_candidate = 1 if plan.predictor_strategy != "all" else len(search.student.instructions)
    proposals = plan.num_rounds * plan.num_candidates * per_candidate
    announce(
        f"OPRO (auto={config.auto!r}): at most {plan.num_rounds} rounds of {plan.num_candidates} candidates, "
        f"{examples:,} examples scored and {proposals:,} proposals ({plan.max_waves * proposals:,} where all are "
        "rejected); patience and the race usually end it far below."
    )


def readable(config: OPROConfig) -> dict[str, Any]:
    """The settings as values that print and pickle."""
    shown: dict[str, Any] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        if name in ("trainset", "valset"):
            value = None if value is None else len(value)
        elif name in ("prompt_model", "task_model"):
            value = model_name(value) or None
        elif callable(value):
            value = getattr(value, "__qualname__", type(value).__name__)
        elif not isinstance(value, (str, int, float, bool, type(None))):
            value = repr(value)
        shown[name] = without_password(value) if name == "storage" else value
    return shown


def without_password(url: Any) -> Any:
    """A storage URL as it may be shown."""
    return re.sub(r"(://[^:/@]*):.*@", r"\1:***@", url) if isinstance(url, str) else url
