"""`OPROTeleprompter`: its arguments, `compile` and `acompile`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import dspy
from dspy.teleprompt import Teleprompter

from .config.arguments import make_config
from .config.keywords import FIELDS, Arguments, for_this_call, given, shows_arguments, translate
from .config.serialization import from_json, to_json
from .programs.compat import with_compile_callbacks

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


class OPROTeleprompter(Teleprompter):
    """Rewrites the instructions of every predictor of a program in OPRO rounds (arXiv 2309.03409).

    An optimizer LM sees the instructions tried so far with their scores and proposes better ones; the
    candidates race on the trainset; each of them is one Optuna trial. What comes back is a copy of the student.

    Args:
        metric: `metric(example, prediction)`, also with `trace` and GEPA's five arguments, sync or async. It
            returns a bool, a number, or a `dspy.Prediction` or dict with `score` and `feedback`.
        prompt_model: The optimizer LM; default `dspy.settings.lm` when `compile` runs.
        task_model: The scorer LM; default what the program and `dspy.settings` say.
        proposer: A `dspy.Module` called with `request=ProposalRequest`; see `dspy_opro.proposer`.
        trainset, valset: Used by `compile` where it is given none.
        name, description: For people; `name` also names the study.
        auto: The preset that fills what is not given: "light", "medium", "heavy", "paper" (the paper to the
            letter) or None.
        num_rounds: Rounds at most. Default: the preset's, "light" 8, "medium" 8, "heavy" 10, "paper" 200;
            `auto=None` has no limit.
        num_candidates: Candidates a round. Default 8 (section 5.1 of the paper), "medium" 16 and "heavy" 32; where
            a budget alone bounds the run as many more, 64 at most, as leave eight rounds or more.
        num_trials: Candidates in all; gives `num_rounds`.
        k_best: Scored instructions shown to the optimizer LM, 20 (section 5.1).
        num_exemplars: Examples shown to it, 3 (section 5.1).
        init_temperature: Its sampling temperature, 1.0 (section 5.1).
        max_train_examples: Train examples that candidates are scored on at most, a seeded choice. Default: the
            preset's, "light" 100, "medium" 300, "heavy" 1,000, else all of them; with `max_metric_calls` no more than a
            32nd of that, and 16 at least, unless a `pruner` is given or `auto="paper"`.
        patience: Rounds in a row without a better program that end the run. Default: the preset's, "light" 4,
            "medium" 3, "heavy" 3, else none.
        min_delta: What counts as better for `patience`, in the metric's scale.
        stop_at_score: Mean score that ends the run.
        max_metric_calls: Examples scored at most, those apart that BootstrapFewShot tries for demos.
        max_full_evals: The same in passes over trainset and valset.
        max_tokens: Tokens of all LM calls at most, cache hits apart.
        max_cost: US dollars at most, as far as the LMs' prices are known.
        timeout_seconds: Wall time at most; calls under way are cut.
        stoppers: Functions of a `RunState` that answer with a reason to stop, or None.
        confirm: Whether the result is confirmed. The search then holds examples back (a third of the data that decides
            at most, about 15% of the calls), scores the student and the best candidate on them at the end, and returns
            the student unless the evidence favours the candidate. `docs/decisions/0014-honest-scores.md` has the rule.
        pruner: "auto" (successive halving on paired differences), None (everything is scored in full), an
            Optuna pruner or an own `Pruner`.
        predictor_strategy: With several predictors: "all" rewrites each in every round, "round_robin" one a
            round, "joint" all in one proposal.
        lag: Rounds that may be undecided when the next one's proposals are asked for: more overlaps rounds (faster);
            0 lets every proposal see all earlier results (better per call). Default: a quarter of the rounds there
            can be, rounded down, 3 at most; "paper" 0.
        minibatch_size: Examples that every candidate of a round is scored on before the first of them are dropped;
            with an Optuna pruner the examples between two of its decisions, 16. Default: 4, and fewer for few examples.
        seed: Same seed, data and answers: same trials.
        max_bootstrapped_demos, max_labeled_demos: Demos per predictor at most. Above 0, demo sets made by DSPy's
            BootstrapFewShot race together with the instructions; by default the student keeps its demos.
        max_rounds, metric_threshold, teacher_settings: Handed to BootstrapFewShot.
        storage: An Optuna storage or URL; default in memory, or a journal file in `log_dir`. Without `study_name`,
            `name` or `log_dir` each `compile` is a new run there, under a name that Optuna makes up.
        study_name: Names the run; `compile` resumes a run of that name in `storage` or `log_dir`. Default: `name`; else
            with `log_dir` "opro", or that directory's name where there is a `storage` too.
        log_dir: Directory for the run's files.
        callbacks: Optuna's convention, `f(study, trial)`.
        track_stats: Whether the result carries `candidate_programs` and `trial_logs`.
        verbose: Whether to log every candidate.
        display_progress: Whether to show the progress line.
        num_threads: LM calls in flight at most; default `dspy.settings.num_threads`.
        executor: Any `concurrent.futures.Executor`, in whose processes the examples are scored. `docs/scaling.md` says
            what travels there. By default they are scored in threads of this process.
        max_errors: Failed examples, of the whole run in this process, that end it. Default: no fixed number; the run
            ends when not one example succeeded in the last rounds.
        failure_score: What a failed example counts.
        provide_traceback: Whether failures are logged with their traceback.
        example_timeout_seconds: Wall time for one example; longer counts as a failure.
        keywords: What the constructors of DSPy's own optimizers take; see `migration.py`.

    Raises:
        ValueError: A value is out of range; the message names argument, rule and value.
        TypeError: An argument is unknown; the message names the nearest known one.

    Example:
        >>> from dspy_opro import OPROTeleprompter
        >>> def exact(example, prediction, trace=None):
        ...     return example.answer == prediction.answer
        >>> teleprompter = OPROTeleprompter(metric=exact, auto="light", num_threads=16)
    """

    @shows_arguments
    def __init__(
        self,
        metric: Callable[..., Any] | None = None,
        *positional: NoReturn,
        trainset: Sequence[Any] | None = None,
        valset: Sequence[Any] | None = None,
        **arguments: Unpack[Arguments],
    ) -> None:
        super().__init__()
        if isinstance(metric, dspy.BaseLM):
            raise TypeError(
                "metric must be a function, but is an LM. Write prompt_model=... for the optimizer LM."
            )
        if positional:
            raise TypeError("Only metric is positional. Write prompt_model=..., task_model=... for the LMs.")
        values = {"metric": metric, "trainset": trainset, "valset": valset, **arguments}
        ours = {name: value for name, value in given(values).items() if value != FIELDS[name].default}
        builtin = {name: value for name, value in values.items() if name not in FIELDS}
        self.config = make_config(ours | translate(builtin, ours, type(self).__name__))

    def __setattr__(self, name: str, value: Any) -> None:
        if name in FIELDS:
            raise AttributeError(
                f"{name} can't be assigned. Pass {name}=... to {type(self).__name__}(...) or to compile(...)."
            )
        super().__setattr__(name, value)

    @property
    def metric(self) -> Callable[..., Any] | None:
        """The metric, as DSPy's own optimizers have it."""
        return self.config.metric

    @shows_arguments
    def compile(
        self,
        student: Any,
        trainset: Sequence[Any] | None = None,
        metric: Callable[..., Any] | None = None,
        *,
        teacher: Any = None,
        valset: Sequence[Any] | None = None,
        **arguments: Unpack[Arguments],
    ) -> Any:
        """Return a copy of the student with better instructions.

        Works in a script, in the running loop of a notebook and in a thread; it blocks until the end.

        Args:
            student: Any `dspy.Module` with predictors. It is not changed.
            trainset: Examples with `.with_inputs(...)`; candidates are scored on them.
            metric: In place of the constructor's.
            teacher: Bootstraps the demos, where demos are searched; of a list the first.
            valset: Decides early stopping and the result, where it is given.
            keywords: Any argument of the constructor, for this call, and what DSPy's own take; see `migration.py`.

        Returns:
            The best program, never worse on the deciding data than the student. `opro_result` on it says more.

        Raises:
            ValueError, TypeError: An argument, the data or the program can't be used, or the run in the storage is
                another one or has workers with other settings; nothing was spent.
            RuntimeError: Another process uses `log_dir`; nothing was spent.
            MetricError: The metric can't be called with an example and a prediction (nothing was spent), raised or
                returned no score on the first example, or returned no score later.
            TooManyErrors: The program failed on the first three examples, on `max_errors` in all, or on every example
                of the last rounds.
            Exception: What a stopper, a pruner or, when it is opened, the storage raises.

            What ends a run that has begun has the best program so far as its `program`, the student where nothing was
            scored in full.
        """
        data = {"trainset": trainset, "metric": metric, "teacher": teacher, "valset": valset}
        from .compile import (  # Optuna, which it needs, takes longer to import than all else here
            Job,
            optimize,
        )

        return optimize(Job(for_this_call(self.config, {**data, **arguments}), student))

    @with_compile_callbacks
    @shows_arguments
    async def acompile(
        self,
        student: Any,
        trainset: Sequence[Any] | None = None,
        metric: Callable[..., Any] | None = None,
        *,
        teacher: Any = None,
        valset: Sequence[Any] | None = None,
        **arguments: Unpack[Arguments],
    ) -> Any:
        """`compile` for a running loop; programs with an `aforward` of their own are awaited in it."""
        data = {"trainset": trainset, "metric": metric, "teacher": teacher, "valset": valset}
        from .compile import Job, optimize_in_thread

        config = for_this_call(self.config, {**data, **arguments})
        return await optimize_in_thread(Job(config, student, asyncio.get_running_loop()))

    def get_params(self) -> dict[str, Any]:
        """The constructor's arguments and their values; a copy."""
        return {name: getattr(self.config, name) for name in FIELDS if name != "teacher"}

    def get_config(self) -> dict[str, Any]:
        """The arguments that were given, as JSON: `from_config` makes the same teleprompter of it.

        LMs are written by their `dump_state()` (API keys are not), functions and classes by their import path,
        datasets by their fields; a `storage` URL stands there with its password.

        Raises:
            ValueError: An argument can't be written, e.g. a lambda; the message has the remedy.
        """
        return to_json(self.config)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """The teleprompter that `get_config` described.

        It imports and calls what the config names: read only configs that you trust.

        Raises:
            ValueError: Something that it names can't be imported or made.
            TypeError: It has an unknown argument.
        """
        return cls(**from_json(config))


OPRO = OPROTeleprompter
