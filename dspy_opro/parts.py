"""The parts of a run that touch DSPy and the storage, each made out of checked input."""

from __future__ import annotations

from typing import Any

import dspy

from . import study
from .cleaning import Rules, ngrams
from .config import OPROConfig, paper
from .demos import Bootstrap
from .events import Reporter
from .executor import DSPyExecutor
from .fingerprint import fingerprint, model_name
from .options import options_of
from .preflight import Inputs
from .proposer import OPROProposer, PaperProposer
from .reflective import adapt
from .stopping import Ledger
from .values import fields, shown


def make_executor(inputs: Inputs, ledger: Ledger, reporter: Reporter, is_async: bool) -> DSPyExecutor:
    """What does the search's work.

    Args:
        inputs: What the run works on.
        ledger: Told of every call's cost.
        reporter: Told of every answer.
        is_async: Whether the caller waits in a loop of its own.
    """
    return DSPyExecutor(
        inputs.program,
        inputs.metric,
        inputs.splits,
        _proposer(inputs.config),
        inputs.prompt_model,
        inputs.config.task_model,
        ledger,
        _rules(inputs),
        options_of(inputs.config, inputs.program.student, is_async),
        reporter,
        _bootstrap(inputs),
    )


def _proposer(config: OPROConfig) -> Any:
    if config.proposer is not None:
        return adapt(config.proposer)
    return PaperProposer() if paper(config) else OPROProposer()


def _rules(inputs: Inputs) -> Rules:
    # Only what the meta-prompt may show can be quoted from it. The beginning of each field is enough to notice a
    # quotation, and keeps long documents from filling memory.
    examples = inputs.splits["train"]
    texts = (shown(value)[:2000] for example in examples for value in fields(example).values())
    parts = inputs.program.parts.values()
    own = set(ngrams((part.text for part in parts), Rules.ngram))
    longest = max(len(part.text) for part in parts)
    # The paper's code drops texts above 500 characters; a student's own text may be longer.
    max_length = max(500, longest) if paper(inputs.config) else max(4000, 2 * longest)
    return Rules(max_length=max_length, quotes=frozenset(ngrams(texts, Rules.ngram)) - own)


def _bootstrap(inputs: Inputs) -> Bootstrap:
    """Makes demos out of the examples that candidates are not scored on, where those are enough."""
    config = inputs.config
    most, labeled = config.max_bootstrapped_demos or 0, config.max_labeled_demos or 0
    scored = set(inputs.orders["train"])
    others = [example for index, example in enumerate(inputs.trainset) if index not in scored]
    return Bootstrap(
        program=inputs.program,
        metric=inputs.metric,
        trainset=others if len(others) >= 2 * (most + labeled) else inputs.splits["train"],
        max_bootstrapped_demos=most,
        max_labeled_demos=labeled,
        max_rounds=config.max_rounds,
        metric_threshold=config.metric_threshold,
        max_errors=config.max_errors,
        teacher=inputs.teacher,
        teacher_settings=config.teacher_settings,
        seed=config.seed,
    )


def make_store(inputs: Inputs) -> study.OptunaStore:
    """Where the run is kept; with a `storage` of its own it is open to other processes."""
    config = inputs.config
    kind = study.OptunaStore if config.storage is None else study.SharedStore
    return kind(
        storage=config.storage,
        study_name=config.study_name or config.name,
        log_dir=config.log_dir,
        callbacks=config.callbacks,
        fingerprint=fingerprint(
            inputs.program.student,
            inputs.splits["train"],
            inputs.splits["val"],
            inputs.metric.function,
            task_model=model_name(config.task_model or dspy.settings.lm),
            failure_score=config.failure_score,
            seed=config.seed,
        ),
    )
