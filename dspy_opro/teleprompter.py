"""`OPROTeleprompter`: its arguments, `compile` and `acompile`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import dspy
from dspy.teleprompt import Teleprompter

from .config.arguments import FIELDS, make_config, paper
from .config.keywords import Keywords, configure, shows_keywords
from .config.readable import readable
from .config.serialization import from_json, to_json
from .programs.compat import with_compile_callbacks

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


@shows_keywords
class OPROTeleprompter(Teleprompter):
    """Rewrites the instructions of every predictor of a program in OPRO rounds (arXiv 2309.03409).

    An optimizer LM sees the instructions tried so far with their scores and proposes better ones. The candidates race
    on the trainset. Every candidate is one Optuna trial. `compile` returns a copy of the student.

    Args:
        metric: `metric(example, prediction)`, also with `trace` or GEPA's five arguments, sync or async. It returns a
            bool, a number, or a `dspy.Prediction` or dict with `score` and `feedback`.
        prompt_model: The optimizer LM. Default: `dspy.settings.lm` when `compile` runs.
        task_model: The scorer LM. Default: the LM of the program or of `dspy.settings`.
        proposer: A `dspy.Module` that is called with `request=ProposalRequest`; see `dspy_opro.proposers`.
        trainset, valset: The data for a `compile` that gets none.
        name, description: Texts for the report. `name` also names the study.
        auto: The preset: "light", "medium", "heavy", "paper" (the paper to the letter) or None. Explicit values
            override the preset. The first three also search for demos.
        num_rounds: The most rounds. Default of the preset: "light" 8, "medium" 8, "heavy" 10, "paper" 200; without a
            preset no limit. With a budget (`max_metric_calls`, `max_full_evals`, `max_tokens`, `max_cost`,
            `timeout_seconds`) the preset sets no limit.
        num_candidates: Candidates per round. Default: 8 (section 5.1 of the paper), "medium" 16, "heavy" 32. With
            `max_metric_calls`, `max_full_evals` or `num_trials` up to 64, if that still leaves about eight rounds.
        num_trials: The most candidates of the whole run. It determines `num_rounds`.
        k_best: How many scored instructions the optimizer LM sees: 20 (section 5.1).
        num_exemplars: How many examples the optimizer LM sees: 3 (section 5.1).
        init_temperature: The sampling temperature of the optimizer LM: 1.0 (section 5.1).
        guidance: Your constraints in words, e.g. "Keep the tone formal." Every request to the optimizer LM shows them.
        max_instruction_chars: The most characters of a proposed instruction. The optimizer LM is told; longer ones are
            dropped. Default: 4,000, or twice the student's longest instruction if that is more; "paper" 500.
        must_keep: Texts that stay word for word in every instruction that has them in the student.
        initial_instructions: Instructions that race in the first round, e.g. from an earlier result: texts, or for
            several predictors dicts predictor name -> text. At most as many as `num_candidates`.
        max_train_examples: The most train examples for the score of a candidate, a seeded choice. Default of the
            preset: "light" 100, "medium" 300, "heavy" 1,000, otherwise all. With `max_metric_calls` it is
            1/32 of that budget, but at least 16. Without a valset a small budget gives more: 30 for 300 calls, 48 for
            768. Neither holds with a `pruner`, a `minibatch_size` or `auto="paper"`.
        patience: The run ends after so many rounds in a row without a better program. Default of the preset: "light" 4,
            "medium" 3, "heavy" 3, otherwise none. With a budget or `num_trials` the preset sets none.
        min_delta: For `patience`, a better program must be better by more than this, in the metric's own scale.
        stop_at_score: The mean score that ends the run, in the metric's own scale.
        max_metric_calls: The most scored examples. Those that BootstrapFewShot tries for demos count, too; they are at
            most an eighth.
        max_full_evals: The same limit in passes over trainset and valset.
        max_tokens: The most tokens of all LM calls, without cache hits.
        max_cost: The most US dollars, as far as the prices of the LMs are known.
        prices: Your own prices in US dollars per million tokens, `{lm.model: (input, output)}`. They are for LMs whose
            price DSPy does not know, and replace those that it knows. Answers from the cache cost nothing.
        timeout_seconds: The most wall time. The run does not wait for calls that are still running.
        stoppers: Functions that get a `RunState` and return a reason to stop, or None.
        confirm: Whether the run confirms its result. The search then does not use a part of the data: the valset, or
            without one the train examples beyond `max_train_examples`, or up to a third of the trainset if that is
            more. At the end it scores the student and the best candidate there, with at most about 15% of the calls,
            and returns the student unless the evidence favours the candidate.
            `docs/decisions/0014-honest-scores.md` has the rule.
        pruner: "auto" (successive halving on paired differences), None (every candidate is scored in full), an Optuna
            pruner or your own `Pruner`.
        predictor_strategy: For several predictors. "all" rewrites each of them in every round, "round_robin" one per
            round, "joint" all in one proposal.
        lag: How many rounds may be undecided when the next round asks for its proposals. A larger lag overlaps more
            rounds and is faster. With 0 every proposal sees all earlier results, which is better per call. Default: a
            quarter of the possible rounds, rounded down, and at most 3; "paper" 0.
        minibatch_size: How many examples every candidate of a round is scored on before the race drops the first
            candidates. Default: 4, or fewer with few examples. With an Optuna pruner: the examples between two of its
            decisions, by default 16.
        seed: The same seed, data and answers give the same trials.
        max_bootstrapped_demos, max_labeled_demos: The most demos per predictor, 0 for none. Demo sets by DSPy's
            BootstrapFewShot race together with the instructions. Default of "light", "medium" and "heavy": 4 and 4 if
            the student has no demos and the trainset at least 64 examples. A quarter of these, and at most 64, may then
            be demos, and no candidate is scored on them. If one of the two is given, the other one keeps this default,
            but `max_bootstrapped_demos=0` alone means no demos. Otherwise the student keeps the demos that it has.
        teacher: The program that bootstraps demos; from a list the first. Without a search for demos it has no effect.
        max_rounds, metric_threshold, teacher_settings: Arguments of BootstrapFewShot.
        storage: An Optuna storage or its URL. Default: in memory, or a journal file in `log_dir`. Without `study_name`,
            `name` and `log_dir` every `compile` starts a new run in the storage, and Optuna names it.
        study_name: The name of the run. `compile` resumes a run of this name in `storage` or `log_dir`. Default:
            `name`, otherwise with a `log_dir` "opro", or with `log_dir` and `storage` the name of the directory.
        log_dir: The directory for the files of the run.
        callbacks: Functions `f(study, trial)`, Optuna's convention.
        track_stats: Whether the returned program has `candidate_programs` and `trial_logs`.
        verbose: Whether to log every candidate, and every better instruction whole.
        display_progress: Whether to show the progress line.
        num_threads: The most LM calls at the same time. Default: `dspy.settings.num_threads`.
        executor: Any `concurrent.futures.Executor`; its processes score the examples. `docs/scaling.md` says what is
            sent to them. By default threads of this process score the examples.
        max_errors: The run ends at so many failed examples in this process. Default: no fixed number; the run ends if
            no example succeeded in the last rounds.
        failure_score: The score of a failed example. If the metric gives negative scores, a failed example scores no
            more than the student's worst example that did not fail.
        provide_traceback: Whether the log of a failure has the traceback.
        example_timeout_seconds: The most wall time for one example. An example that takes longer has failed.
        max_outage_seconds: How long the run waits for a provider that is down, above 0. Then it ends with the best
            program, and can be resumed. Rate limits and outages are never failed examples.
        dry_run: `compile` only says what it would spend. It scores the student on its first 5 examples, prints an
            estimate, and returns a copy of the student whose `opro_estimate` has the figures. It writes no files.
        keywords: Keywords of DSPy's own optimizers; `docs/migrating.md` explains them.

    Raises:
        ValueError: A value is out of range; the message names argument, rule and value.
        TypeError: An argument is unknown; the message names the nearest known one.

    Example:
        >>> from dspy_opro import OPROTeleprompter
        >>> def exact(example, prediction, trace=None):
        ...     return example.answer == prediction.answer
        >>> teleprompter = OPROTeleprompter(metric=exact, auto="light", num_threads=16)
    """

    def __init__(
        self,
        metric: Callable[..., Any] | None = None,
        *positional: NoReturn,
        trainset: Sequence[Any] | None = None,
        valset: Sequence[Any] | None = None,
        **arguments: Unpack[Keywords],
    ) -> None:
        super().__init__()
        if isinstance(metric, dspy.BaseLM):
            raise TypeError(
                "metric must be a function, but is an LM. Write prompt_model=... for the optimizer LM."
            )
        if positional:
            raise TypeError("Only metric is positional. Write prompt_model=..., task_model=... for the LMs.")
        values = {"metric": metric, "trainset": trainset, "valset": valset, **arguments}
        # A default is not given: `get_params` has all of them, and given values override the preset.
        changed = {name: value for name, value in values.items() if not _is_default(name, value)}
        self.config = configure(changed, type(self).__name__)

    def __getattr__(self, name: str) -> Any:
        """An argument's value."""
        # DSPy takes an object's `callbacks` for callbacks of its own.
        if name not in FIELDS or name == "callbacks":
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.config, name)

    def __repr__(self) -> str:
        """The arguments that differ from their defaults, without secrets."""
        shown = readable(self.config)
        given = (
            f"{name}={shown[name]!r}" for name in self.config.given if shown[name] != FIELDS[name].default
        )
        return f"{type(self).__name__}({', '.join(given)})"

    def __setattr__(self, name: str, value: Any) -> None:
        """Change an argument. The value is checked as in the constructor."""
        if name in FIELDS:
            name, value = "config", make_config({**self.config.given, name: value})
        super().__setattr__(name, value)

    def compile(
        self,
        student: Any,
        trainset: Sequence[Any] | None = None,
        metric: Callable[..., Any] | None = None,
        *,
        valset: Sequence[Any] | None = None,
        **arguments: Unpack[Keywords],
    ) -> Any:
        """Return a copy of the student with better instructions.

        It blocks until the end, and works in a script, in a thread and in the running loop of a notebook.

        Args:
            student: Any `dspy.Module` with predictors. It stays unchanged.
            trainset: Examples with `.with_inputs(...)`. Candidates are scored on them.
            metric: Overrides the constructor's metric.
            valset: Confirms the result: the student and the best candidate are compared on it. With
                `confirm=False`, and if demos are scored examples, it decides early stopping and the result.
            keywords: Any argument of the constructor, for this call, and the keywords of DSPy's own optimizers;
                `docs/migrating.md` explains them.

        Returns:
            The best program, or the student if no candidate is better. Its `opro_result` says how certain the gain is.

        Raises:
            ValueError, TypeError: An argument, the data or the program is not usable, or the storage has a run of
                this name with other data, program or settings. Nothing was spent.
            RuntimeError: Another process uses `log_dir`. Nothing was spent.
            MetricError: The metric can't be called with an example and a prediction (nothing was spent), it raised an
                error or returned no score on the first example, or it returned no score later.
            TooManyErrors: The program failed on the first ten examples, on `max_errors` examples, or on every example
                of the last rounds.
            ProposerFailed: The optimizer LM can't be called (wrong key, unknown model), or every proposal failed.
            Exception: The error of a stopper or a pruner, or of the storage when the run opens it.

            An error that ends a run has the best program so far as its `program`. This is the student if no candidate
            was scored in full.
        """
        data = {"trainset": trainset, "metric": metric, "valset": valset}
        # Needs Optuna, which takes longer to import than all the rest.
        from .compile import Job, optimize
        from .dry_run import dry_run
        from .reporting.autologging import completes_run

        config = configure({**data, **arguments}, "compile", self.config.given)
        with completes_run(arguments) as complete:  # `complete` returns its argument
            return complete(dry_run(config, student) if config.dry_run else optimize(Job(config, student)))

    @with_compile_callbacks  # DSPy wraps `compile` itself
    async def acompile(
        self,
        student: Any,
        trainset: Sequence[Any] | None = None,
        metric: Callable[..., Any] | None = None,
        *,
        valset: Sequence[Any] | None = None,
        **arguments: Unpack[Keywords],
    ) -> Any:
        """`compile` for async code: the same arguments, result and errors.

        The running loop awaits the program if it has its own `aforward` and its LMs can be awaited.
        """
        data = {"trainset": trainset, "metric": metric, "valset": valset}
        from .compile import Job, optimize_in_thread
        from .dry_run import dry_run
        from .reporting.autologging import completes_run

        config = configure({**data, **arguments}, "compile", self.config.given)
        loop = asyncio.get_running_loop()
        if config.dry_run:
            return await asyncio.to_thread(dry_run, config, student, loop)
        with completes_run({}) as complete:  # MLflow does not know `acompile`
            return complete(await optimize_in_thread(Job(config, student, loop)))

    def get_params(self) -> dict[str, Any]:
        """A copy of the constructor's arguments: name -> value."""
        params = {name: getattr(self.config, name) for name in FIELDS}
        if paper(self.config) and "pruner" not in self.config.given:
            params["pruner"] = None  # "auto" would override the preset
        return params

    def get_config(self) -> dict[str, Any]:
        """The given arguments as JSON. `from_config` makes the same teleprompter from it.

        An LM is written as its `dump_state()` without API keys, a function or class as its import path, a dataset as
        its fields. The password in a `storage` URL is written, too.

        Raises:
            ValueError: An argument can't be written, e.g. a lambda; the message has the remedy.
        """
        return to_json(self.config)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """The teleprompter that `get_config` described.

        It imports and calls what the config names, so read only configs that you trust.

        Raises:
            ValueError: Something in the config can't be imported or made.
            TypeError: The config has an unknown argument.
        """
        return cls(**from_json(config))


def _is_default(name: str, value: Any) -> bool:
    """Whether a value counts as not given. "auto" for `pruner` is given: it overrides `auto="paper"`."""
    if name not in FIELDS or name == "pruner":
        return False
    default = FIELDS[name].default
    # An array or a table has an == that is no bool, and is no default.
    return type(value) is type(default) and bool(value == default)


OPRO = OPROTeleprompter
