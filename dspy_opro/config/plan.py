"""The plan of a run: sizes, pruner and stoppers follow from the arguments and the size of the data alone."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

from dspy_opro.programs.metering import Budget
from dspy_opro.programs.values import as_json
from dspy_opro.proposers.demos import num_bootstrapped
from dspy_opro.search import Search
from dspy_opro.search.pruners import Halving, Pruner, ScoreAll
from dspy_opro.search.reserve import held_back, held_back_of_valset, num_pairs
from dspy_opro.search.stoppers import Patience, StopAtScore, Stopper
from dspy_opro.search.tasks import Plan, ScoringTask, Split, task_key
from dspy_opro.search.trajectory import Candidate, Trial, Usage
from dspy_opro.storage.carrying import NOTHING, Carried
from dspy_opro.storage.optuna_pruner import OptunaPruner
from dspy_opro.storage.recombination import recombine

from .arguments import OPROConfig, paper, warn
from .sizes import (
    LEAST_TO_VALIDATE,
    PAPER_CANDIDATES,
    affordable_examples,
    useful_examples,
    usual_candidates,
    usual_first,
    usual_lag,
)

logger = logging.getLogger("dspy_opro")

TRIES_PER_DEMO = 8
"""Examples that bootstrapping tries at most for one demo. A program that is right less often has fewer demos."""
FEW_EXAMPLES = 20
"""A run with fewer train examples gets a warning."""


@dataclass(frozen=True)
class Sizes:
    """How many of the given examples the run uses for what."""

    num_train: int
    """Train examples of a full score: the first ones in the run's order, so a larger budget adds to them on resume."""
    num_val: int
    num_held_back: int
    """Unseen examples that confirm the result."""
    num_unseen: int
    """All unseen examples, the last ones in order: of the valset if there is one, otherwise of the trainset."""
    num_per_pass: int = 0
    """Examples of a pass over trainset and valset, which `max_full_evals` counts."""
    num_for_demos: int = 0
    """Train examples that may be demos. No candidate is scored on them. They come before the others in the run's
    order. 0 where there are too few: then the examples that score the candidates may be demos, too."""
    num_spare: int = 0
    """Those of them that are unseen examples, too, before the others: all. 0 with a valset and without confirmation."""


def data_sizes(config: OPROConfig, num_train: int, num_val: int) -> Sizes:
    """The sizes for the resolved arguments and the numbers of examples given.

    Where the result is confirmed, a valset confirms it and the search does not see it:
    docs/decisions/0021-valset-confirms.md. Train scores flatter a candidate whose demos are scored examples. So a
    search for demos keeps examples for demos alone: docs/decisions/0023-demos-by-default.md. Where there are too few
    for that, two thirds of the valset select, if the budget is not below `LEAST_TO_VALIDATE`.
    """
    num_for_demos = num_kept_for_demos(config, num_train)
    num_per_pass = min(num_train, config.max_train_examples or num_train) + num_val
    are_scored = most_demos(config) > 0 and num_for_demos == 0
    budget = _num_calls(config, num_per_pass)
    sizes = _scored_sizes(config, num_train - num_for_demos, num_val, are_scored, budget)
    num_spare = num_for_demos if sizes.num_held_back and not num_val else 0
    return replace(sizes, num_per_pass=num_per_pass, num_for_demos=num_for_demos, num_spare=num_spare)


def pays_for_valset(config: OPROConfig, num_train: int, num_val: int) -> bool:
    """Whether the budget lets a valset confirm the result, or select where scored examples are demos."""
    sizes = data_sizes(config, num_train, num_val)
    budget = _num_calls(config, sizes.num_per_pass)
    if budget is None or sizes.num_held_back:
        return True
    return budget >= LEAST_TO_VALIDATE and most_demos(config) > 0 and sizes.num_for_demos == 0


def num_kept_for_demos(config: OPROConfig, num_train: int) -> int:
    """A quarter of the trainset, and at most what eight sets of demos take.

    0 without a search for demos, where a quarter is less than two sets take, and with `auto="paper"`, which scores all.
    """
    in_a_set = most_demos(config)
    count = 0 if paper(config) else min(num_train // 4, 8 * in_a_set)
    return count if count >= 2 * in_a_set else 0


def most_demos(config: OPROConfig) -> int:
    """Examples that one set of demos takes at most; 0 without a search for demos."""
    return (config.max_bootstrapped_demos or 0) + (config.max_labeled_demos or 0)


def _num_calls(config: OPROConfig, num_per_pass: int) -> int | None:
    """The most examples that the run may score, as `max_metric_calls` or `max_full_evals` says."""
    passes: int | None = config.max_full_evals
    calls: int | None = config.max_metric_calls
    return calls if passes is None else passes * num_per_pass


def _scored_sizes(
    config: OPROConfig, num_train: int, num_val: int, are_demos_scored: bool, budget: int | None
) -> Sizes:
    """How many of the examples that score candidates are used for what. `budget` is the most that may be scored."""
    affordable = _num_wanted(config, num_train)
    useful = affordable if num_val else _num_wanted(config, num_train, useful_examples)
    given = config.max_metric_calls  # `max_full_evals` is for full scores
    limit = num_val if given is None or paper(config) else affordable_examples(given)
    without = Sizes(useful, min(num_val, limit), 0, 0)
    if not config.confirm or paper(config):
        return without
    if num_val and are_demos_scored and (budget is None or budget >= LEAST_TO_VALIDATE):
        held = held_back(num_val, without.num_val, budget)
        selecting = min(without.num_val, num_val - held)
        confirmed = Sizes(affordable, selecting, held, min(2 * held, num_val - selecting))
    elif num_val:
        held = held_back_of_valset(num_val, affordable, budget)
        confirmed = Sizes(affordable, 0, held, min(2 * held, num_val))
    else:
        held = held_back(num_train, affordable, budget)
        # More than is affordable is searched only where it is not held back.
        searched = min(useful, num_train - held)
        confirmed = Sizes(searched, 0, held, min(2 * held, num_train - searched))
    is_paid = budget is None or budget - 2 * held >= confirmed.num_train + confirmed.num_val
    return confirmed if held and is_paid else without


def make_search(
    config: OPROConfig,
    student: Candidate,
    sizes: Sizes,
    carried: Carried = NOTHING,
    seen: Set[int] = frozenset(),
) -> Search:
    """The search for the resolved arguments, the student's instructions and the numbers of examples.

    `carried` and `seen` are of an earlier search.

    Raises:
        ValueError: `max_metric_calls` is not enough to score the student, or the pruner gives impossible checkpoints.
    """
    num_train, num_val = sizes.num_train, sizes.num_val
    pruner = _pruner(config, num_train)
    max_metric_calls = _max_metric_calls(config, sizes)

    def most_rounds(num_candidates: int) -> float:
        """How many rounds of so many candidates the whole budget pays for.

        Validations and the confirmation are left out. Counting them would give smaller rounds, which wait more often.
        """
        if max_metric_calls is None:
            return math.inf if config.num_rounds is None else config.num_rounds
        per_round = max(1, pruner.most_calls(num_train, num_candidates))
        affordable = (max_metric_calls + 2 * sizes.num_held_back - num_train - num_val) // per_round
        return min(affordable, config.num_rounds or affordable)

    num_candidates = config.num_candidates
    if num_candidates is None:
        # With `num_rounds`, larger rounds would leave fewer rounds than the user chose.
        is_chosen = config.num_rounds is not None
        num_candidates = PAPER_CANDIDATES if is_chosen else usual_candidates(most_rounds(PAPER_CANDIDATES))
    num_demo_sets = _num_demo_sets(config, num_candidates)
    plan = Plan(
        num_train=num_train,
        num_val=num_val,
        num_rounds=config.num_rounds,
        num_candidates=num_candidates,
        num_trials=config.num_trials,
        num_demo_sets=num_demo_sets,
        initial=_initial_hashes(config, student, num_candidates - num_demo_sets),
        max_demo_calls=_max_demo_calls(config, num_demo_sets, max_metric_calls),
        predictor_strategy=config.predictor_strategy,
        max_metric_calls=max_metric_calls,
        num_held_back=sizes.num_held_back,
        num_unseen=sizes.num_unseen,
        num_spare=sizes.num_spare,
        confirms=config.confirm and not paper(config),
        lag=usual_lag(most_rounds(num_candidates)) if config.lag is None else config.lag,
        seed=config.seed,
    )
    stoppers = _stoppers(config)
    search = Search(plan, student, pruner, recombine, stoppers, carried.candidates, carried.returned, seen)
    search.checkpoints(num_candidates)  # impossible ones are an error before anything is spent
    return search


def warn_of_small_budget(search: Search) -> None:
    """Warn if the budget pays for the student, and for no candidate beside it."""
    plan = search.plan
    least = plan.num_train + plan.num_val + plan.max_demo_calls + search.most_calls(1)
    if plan.max_metric_calls is not None and plan.max_metric_calls < least:
        given = plan.max_metric_calls + 2 * plan.num_held_back
        warn(
            f"The budget pays for scoring {given:,} examples. The run scores the student on {plan.num_train:,} of them "
            "and tries no candidate. Give a larger budget or a smaller max_train_examples."
        )


def budget_problem(search: Search, carried: Carried, recorded: Mapping[str, Usage]) -> str | None:
    """Why the budget of examples is too small for the first scores of a resumed run; None if it is not.

    Args:
        search: The search.
        carried: What it takes over. These candidates are scored with the student.
        recorded: Key of a task -> what it cost.
    """
    plan, most = search.plan, search.most_metric_calls
    starting = (search.student, *carried.candidates)
    sizes: Mapping[Split, int] = {"train": plan.num_train, "val": plan.num_val}
    tasks = (ScoringTask(c, 0, s, n) for c in starting for s, size in sizes.items() for n in range(size))
    missing = sum(task_key(task) not in recorded for task in tasks)
    spent = sum(usage.metric_calls for usage in recorded.values())
    if not missing or spent + missing <= most:
        return None
    return (
        f"The budget is {most:.0f} scored examples, but earlier processes of this run scored {spent}, and {missing} "
        "more are needed to score the student and the best program on record. Give a larger max_metric_calls or "
        "max_full_evals, or use another study_name or log_dir."
    )


def plan_on_record(config: OPROConfig, search: Search) -> dict[str, Any]:
    """What the storage keeps of a plan, to know whether the next process has the same one."""
    plan, size = search.plan, search.plan.num_candidates
    first_round = plan.num_trials, plan.num_demo_sets, len(plan.initial)
    own: list[Any] = []
    if hasattr(config.pruner, "__dict__"):  # the user's own pruner counts with its numbers
        numbers = [value for value in vars(config.pruner).values() if isinstance(value, (int, float))]
        own = [type(config.pruner).__name__, *map(float, numbers)]
    checkpoints = search.checkpoints(size)
    return {
        "data": [plan.num_train, plan.num_val, *([plan.num_spare] if plan.num_spare else [])],
        "rounds": [size, *first_round, plan.lag, plan.predictor_strategy, *plan.initial],
        "race": [type(search.pruner).__name__, *checkpoints, int(search.most_calls(size)), *own],
        "end": [plan.max_metric_calls, config.min_delta, len(config.stoppers)],
        # Larger ones only make a run longer.
        "limits": [plan.num_rounds, config.patience, config.stop_at_score],
    }


def _num_wanted(
    config: OPROConfig, num_train: int, affordable: Callable[[int], int] = affordable_examples
) -> int:
    """Train examples of a full score, without the examples that are held back."""
    num_train = min(num_train, config.max_train_examples or num_train)
    is_chosen = config.max_train_examples is not None and "max_train_examples" in config.model_fields_set
    is_raced_our_way = config.pruner == "auto" and config.minibatch_size is None
    if config.max_metric_calls is None or not is_raced_our_way or is_chosen or paper(config):
        return num_train
    return min(num_train, affordable(config.max_metric_calls))


def _pruner(config: OPROConfig, num_train: int) -> Pruner:
    pruner: Any = config.pruner
    if pruner is None:
        return ScoreAll()
    if isinstance(pruner, str) and pruner == "auto":
        return Halving(first=config.minibatch_size or usual_first(num_train))
    if hasattr(pruner, "prune"):  # optuna.pruners.BasePruner
        return OptunaPruner(pruner, config.minibatch_size or 16)
    chosen: Pruner = pruner
    return chosen


def _max_metric_calls(config: OPROConfig, sizes: Sizes) -> int | None:
    """Examples that the rounds may score: the budget without the examples that confirm the result."""
    num_train, num_val = sizes.num_train, sizes.num_val
    least, budget = num_train + num_val, _num_calls(config, sizes.num_per_pass)
    if budget is not None and budget < least:
        raise ValueError(
            f"max_metric_calls must be at least {least}, to score the student on {num_train} train and {num_val} "
            f"validation examples, but got {budget}. Raise it, or lower max_train_examples."
        )
    return budget and budget - 2 * sizes.num_held_back


def _num_demo_sets(config: OPROConfig, num_candidates: int) -> int:
    """Half of the first round's candidates, as far as the user's own instructions leave room."""
    if not most_demos(config):
        return 0
    first_round: int = min(num_candidates, config.num_trials or num_candidates)
    return max(0, min(max(1, first_round // 2), num_candidates - len(config.initial_instructions)))


def _initial_hashes(config: OPROConfig, student: Candidate, most: int) -> tuple[str, ...]:
    number = len(config.initial_instructions)
    if number > most:
        raise ValueError(
            f"initial_instructions must be at most {most}, because they race in the first round, but are {number}. "
            "Give fewer of them or a larger num_candidates."
        )
    named = (
        dict.fromkeys(student.instructions, given) if isinstance(given, str) else dict(given)
        for given in config.initial_instructions
    )
    return tuple(hashlib.sha256(as_json(sorted(each.items())).encode()).hexdigest()[:16] for each in named)


def _max_demo_calls(config: OPROConfig, num_demo_sets: int, max_metric_calls: int | None) -> int:
    """Examples that bootstrapping may try for all sets together: `TRIES_PER_DEMO`, and an eighth of the budget."""
    most, labeled = config.max_bootstrapped_demos or 0, config.max_labeled_demos or 0
    tries: int = num_bootstrapped(num_demo_sets, most, labeled) * TRIES_PER_DEMO * most * config.max_rounds
    return tries if max_metric_calls is None else min(tries, max_metric_calls // 8)


def _stoppers(config: OPROConfig) -> list[Stopper]:
    stoppers: list[Stopper] = []
    if config.stop_at_score is not None:
        stoppers.append(StopAtScore(config.stop_at_score))
    if config.patience is not None:
        stoppers.append(Patience(config.patience, config.min_delta))
    return [*stoppers, *config.stoppers]


def warn_after_student(
    config: OPROConfig, student: Trial, num_train: int, measured: Budget, spent: Usage
) -> None:
    """Warn of what the student's score shows.

    Args:
        config: The resolved arguments.
        student: The student's trial.
        num_train: The number of train examples that were given.
        measured: The limits that need to be measured.
        spent: What scoring the student cost.
    """
    score, is_share = student.score, all(0.0 <= s <= 1.0 for s in student.scores)
    if score > 0.9 and is_share:
        logger.warning(
            "Your program scores %.3f, so it can gain at most %.3f. Harder examples or a stricter metric leave more to "
            "gain.",
            *(score, 1.0 - score),
        )
    if num_train < FEW_EXAMPLES:
        logger.warning(
            "Train examples: only %d. A score on so few is uncertain by %.2f or more. Give at least %d, and more "
            "to tell a small gain from chance.",
            *(num_train, 1.0 / num_train**0.5, FEW_EXAMPLES),
        )
    goal = config.stop_at_score
    if goal is not None and goal > 1.0 and is_share:  # in percent, as in BootstrapFewShotWithRandomSearch
        logger.warning(
            "The run may never reach stop_at_score=%g: it is in the metric's own scale, and the student's scores lie "
            "within [0, 1]. Write %g for %g percent.",
            *(goal, goal / 100, goal),
        )
    if measured.max_cost is not None and spent.unpriced_calls:
        logger.warning(
            "max_cost=%g can't be enforced: no price is known for %d of the LM calls so far. Pass prices or "
            "max_tokens.",
            *(measured.max_cost, spent.unpriced_calls),
        )


@dataclass(frozen=True)
class Work:
    """The most that a run can do."""

    num_examples: int
    num_proposals: int | None
    """Without rejected proposals, which are asked for again. None if the rounds have no limit."""


def most_work(search: Search) -> Work | None:
    """The most that a new search can do; None if neither rounds nor examples have a limit."""
    plan, size = search.plan, search.plan.num_candidates
    confirming = 2 * plan.num_held_back
    if plan.max_metric_calls is None:
        confirming = 2 * num_pairs(plan.num_held_back, plan.num_unseen, plan.num_spare)
    if plan.num_rounds is None:
        return None if plan.max_metric_calls is None else Work(plan.max_metric_calls + confirming, None)
    num_slots = most_slots(plan)
    full, rest = divmod(num_slots, size)
    examples = plan.num_train + plan.num_val + plan.max_demo_calls + full * search.most_calls(size)
    examples += search.most_calls(rest) if rest else 0
    if plan.max_metric_calls is not None:
        examples = min(examples, plan.max_metric_calls)
    per_slot = len(search.student.instructions) if plan.predictor_strategy == "all" else 1
    return Work(examples + confirming, num_slots * per_slot)


def most_slots(plan: Plan) -> int:
    """The most candidates that are proposed, for a plan with a number of rounds."""
    num_slots = (plan.num_rounds or 0) * plan.num_candidates
    return min(num_slots, plan.num_trials or num_slots)


def forecast(auto: str | None, search: Search, bounds: Sequence[str] = ()) -> str:
    """What a run with the preset `auto` can spend at most, in words. `bounds` names the arguments that may end it."""
    plan, size = search.plan, search.plan.num_candidates
    limits = [name for name in bounds if name not in ("num_rounds", "num_trials")]
    work = most_work(search)
    demos = f" {plan.num_demo_sets} of the candidates bring demos." if plan.num_demo_sets else ""
    if work is None or work.num_proposals is None:
        most = "" if work is None else f", at most {work.num_examples:,} examples scored"
        end = " or ".join(limits) or "a limit"
        return f"OPRO (auto={auto!r}): rounds of {size} candidates until {end} ends the run{most}.{demos}"
    # With several predictors a round has one more candidate: it combines the best known texts.
    is_mixed = len(search.student.instructions) > 1 and plan.num_trials is None
    num_candidates = most_slots(plan) + ((plan.num_rounds or 0) if is_mixed else 0)
    text = (
        f"OPRO (auto={auto!r}): at most {num_candidates:,} candidates in {plan.num_rounds} "
        f"round{'s' * (plan.num_rounds != 1)}, "
        f"{work.num_examples:,} examples scored and {work.num_proposals:,} proposals "
        f"({plan.max_waves * work.num_proposals:,} if all of them are rejected)."
    )
    if not isinstance(search.pruner, ScoreAll):
        text += " The race usually needs far fewer examples."
    text += demos
    return f"{text} The run may end earlier because of {' or '.join(limits)}." if limits else text
