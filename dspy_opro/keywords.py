"""The keywords that `OPROTeleprompter` takes beside its own arguments, for type checkers and in signatures."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict, TypeVar

from .config import Auto

F = TypeVar("F", bound=Callable[..., Any])


class BuiltinKeywords(TypedDict, total=False):
    """What the constructors and `compile`s of the built-in optimizers take and ours has under another name."""

    breadth: int
    depth: int
    max_steps: int
    bsize: int
    num_candidate_programs: int
    minibatch: bool
    minibatch_size: int
    minibatch_full_eval_steps: int
    reflection_lm: Any
    reflection_minibatch_size: int
    instruction_proposer: Any
    code_proposer: Any
    component_selector: Any
    candidate_selection_strategy: str
    skip_perfect_score: bool
    perfect_score: float
    add_format_failure_as_feedback: bool
    use_merge: bool
    max_merge_invocations: int | None
    warn_on_score_mismatch: bool
    track_best_outputs: bool
    use_wandb: bool
    wandb_api_key: str | None
    wandb_init_kwargs: Mapping[str, Any] | None
    use_mlflow: bool
    gepa_kwargs: Mapping[str, Any] | None
    max_demos: int
    demo_input_field_maxlen: int
    temperature_for_sampling: float
    temperature_for_candidates: float
    eval_kwargs: Mapping[str, Any]
    devset: Sequence[Any]
    restrict: Any
    labeled_sample: bool
    num_rules: int
    program_aware_proposer: bool
    data_aware_proposer: bool
    view_data_batch_size: int
    tip_aware_proposer: bool
    fewshot_aware_proposer: bool
    requires_permission_to_run: bool | None


class CompileKeywords(BuiltinKeywords, total=False):
    """What `compile` takes beside its data: the above, and any argument of the constructor for this call."""

    prompt_model: Any
    task_model: Any
    proposer: Any
    name: str | None
    description: str | None
    auto: Auto | None
    num_rounds: int | None
    num_candidates: int | None
    num_trials: int | None
    k_best: int | None
    num_exemplars: int
    init_temperature: float
    max_train_examples: int | None
    patience: int | None
    min_delta: float
    stop_at_score: float | None
    max_metric_calls: int | None
    max_full_evals: int | None
    max_tokens: int | None
    max_cost: float | None
    timeout_seconds: float | None
    stoppers: Sequence[Callable[..., Any]]
    pruner: Any
    predictor_strategy: Literal["all", "round_robin", "joint"]
    lag: int | None
    block_size: int
    seed: int | None
    max_bootstrapped_demos: int | None
    max_labeled_demos: int | None
    max_rounds: int
    metric_threshold: float | None
    teacher_settings: Mapping[str, Any] | None
    storage: Any
    study_name: str | None
    log_dir: str | Path | None
    callbacks: Sequence[Callable[[Any, Any], None]]
    track_stats: bool
    verbose: bool
    display_progress: bool
    num_threads: int | None
    max_errors: int | None
    failure_score: float
    provide_traceback: bool | None
    example_timeout_seconds: float | None


def named(*keywords: type) -> Callable[[F], F]:
    """Show `**keywords` in a function's signature as named parameters, which tools and BetterTogether read."""

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        parameters = list(signature.parameters.values())
        names = {name for typed in keywords for name in inspect.get_annotations(typed)}
        shown = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
            for name in sorted(names - set(signature.parameters))
        ]
        function.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[*parameters[:-1], *shown, parameters[-1]]
        )
        return function

    return decorate
