"""Checks all input before the run makes or spends anything: an error here costs nothing and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import dspy

from dspy_opro.programs.compat import model_name
from dspy_opro.programs.metric import Metric
from dspy_opro.programs.program import Program, check_examples, num_inputs, same_inputs
from dspy_opro.search.reserve import FEWEST_FRESH
from dspy_opro.search.tasks import rng, scored_example

from .arguments import DEMOS, FIELDS, OPROConfig, paper, warn
from .plan import Sizes, data_sizes, most_demos, num_kept_for_demos, pays_for_valset

MOST_REPEATED = 0.05
"""A share of the trainset. More examples that repeat the inputs of others make the gain too high."""


@dataclass(frozen=True)
class Inputs:
    """The checked inputs of a run."""

    config: OPROConfig
    """The resolved arguments."""
    metric: Metric
    program: Program
    """The student."""
    teacher: dspy.Module | None
    """The program that bootstraps demos, if it is not the student."""
    prompt_model: Any
    """The optimizer LM."""
    trainset: Sequence[Any]
    """The whole trainset of the user."""
    valset: Sequence[Any]
    """The whole valset of the user, also where the run leaves it out."""
    splits: Mapping[str, Sequence[Any]]
    """Split -> examples by position in the run's order."""
    for_demos: Sequence[Any]
    """Train examples that may be demos and score no candidate; none where the trainset is too small."""
    orders: Mapping[str, Sequence[int]]
    """Split -> index into the user's dataset, by position in the run's order. Unseen ones are of the valset, if any."""
    sizes: Sizes

    @property
    def num_threads(self) -> int:
        """The most LM calls at the same time."""
        return int(self.config.num_threads or dspy.settings.num_threads)

    def seen(self, keys: Iterable[str]) -> Set[int]:
        """Positions of unseen examples that chose candidates in an earlier plan of the run.

        Args:
            keys: Of the tasks on record.
        """
        split = "val" if self.splits["val"] else "train"
        scored = (scored_example(key) for key in keys if key.startswith("score/"))
        used = {self.orders[split][position] for _, where, position in scored if where == split}
        return {position for position, index in enumerate(self.orders["unseen"]) if index in used}


def check_inputs(config: OPROConfig, student: Any) -> Inputs:
    """Check every input of a `compile` call.

    Raises:
        ValueError: A dataset, the program or a setting is not usable.
        TypeError: An input has the wrong type.
    """
    asked, config = config, config.resolve()
    if not isinstance(student, dspy.Module):
        raise TypeError(f"student must be a dspy.Module, but is {_kind(student)}.")
    metric, trainset = config.metric, config.trainset
    if metric is None or trainset is None:
        name = "metric" if metric is None else "trainset"
        raise ValueError(f"{name} must be given, to OPROTeleprompter(...) or to compile(...), but is None.")
    _check_data(trainset, config.valset)
    program = Program(student)
    if most_demos(config) and not _suits_demos(config, student, len(trainset)):
        config = config.model_copy(update={name: 0 for name in DEMOS if getattr(asked, name) is None})
    _warn(config, program)
    _warn_of_other_inputs(student, trainset[0])
    teacher, prompt_model = _teacher(config, program), _prompt_model(config, student)
    _warn_of_other_prices(config, prompt_model, student, teacher)
    given = list(config.valset or ())
    config = _without_useless_valset(config, len(trainset))
    trainset, valset = list(trainset), list(config.valset or ())
    sizes = data_sizes(config, len(trainset), len(valset))
    train_order, val_order = _shuffled(config.seed, "order", trainset), _shuffled(config.seed, "val", valset)
    for_demos, train_order = train_order[: sizes.num_for_demos], train_order[sizes.num_for_demos :]
    unseen = [*for_demos[: sizes.num_spare], *(val_order or train_order)[::-1][: sizes.num_unseen]]
    orders = {"train": train_order[: config.max_train_examples], "val": val_order, "unseen": unseen}
    data = {"train": trainset, "val": valset, "unseen": valset or trainset}
    splits = {split: [data[split][index] for index in order] for split, order in orders.items()}
    return Inputs(
        config=config,
        metric=Metric(metric),
        program=program,
        teacher=teacher,
        prompt_model=prompt_model,
        trainset=trainset,
        valset=given,
        splits=splits,
        for_demos=[trainset[index] for index in for_demos],
        orders=orders,
        sizes=sizes,
    )


def _without_useless_valset(config: OPROConfig, num_train: int) -> OPROConfig:
    """Leave out a valset that can't confirm the result, because it or the budget is too small."""
    number = len(config.valset or ())
    if not config.confirm or paper(config) or not number:
        return config
    if number < FEWEST_FRESH:
        warn(
            f"valset has {number} examples, and at least {FEWEST_FRESH} are needed to confirm the result. The run "
            "leaves them out and confirms the result on train examples. Give more, or confirm=False to choose the "
            "result on them."
        )
    elif not pays_for_valset(config, num_train, number):
        warn(
            "The budget does not pay for the valset. The run leaves it out and scores its candidates on the trainset "
            "alone. Give a larger budget, or confirm=False to choose the result on the valset."
        )
    else:
        return config
    without: OPROConfig = config.model_copy(update={"valset": None})
    return without


def _suits_demos(config: OPROConfig, student: dspy.Module, num_train: int) -> bool:
    """Whether a preset searches for demos: the student has none, and they need not be scored examples."""
    has_demos = any(predictor.demos for predictor in student.predictors())
    return not has_demos and num_kept_for_demos(config, num_train) > 0


def _shuffled(seed: int, name: str, examples: Sequence[Any]) -> list[int]:
    order = list(range(len(examples)))
    rng(seed, name).shuffle(order)
    return order


def _kind(value: Any) -> str:
    """The type of a value that has the wrong type, in words."""
    if isinstance(value, type):
        name = value.__name__
        instance = f"dspy.Predict({name})" if issubclass(value, dspy.Signature) else f"{name}(...)"
        return f"the class {name}: pass an instance, {instance}"
    return type(value).__name__


def _warn(config: OPROConfig, program: Program) -> None:
    """Warn of arguments that do not go together."""
    if config.num_trials is not None and config.auto is not None and "auto" in config.model_fields_set:
        warn(f"num_trials={config.num_trials} overrides the number of rounds of auto={config.auto!r}.")
    if config.task_model is not None:
        own = [name for name, predictor in program.student.named_predictors() if predictor.lm is not None]
        if own:
            warn(f"task_model is not used for {', '.join(own)}: these predictors have an LM of their own.")
    if not config.max_bootstrapped_demos:
        for name in ("teacher", "teacher_settings", "metric_threshold", "max_rounds"):
            if getattr(config, name) not in (None, {}, FIELDS[name].default):
                warn(
                    f"{name} is not used: it is for bootstrapping demos. Pass max_bootstrapped_demos above 0."
                )


def program_models(config: OPROConfig, program: dspy.Module) -> set[str]:
    """The names of the LMs that the predictors of a program call."""
    default = config.task_model or dspy.settings.lm
    return {model_name(predictor.lm or default) for predictor in program.predictors()}


def _warn_of_other_inputs(student: dspy.Module, example: Any) -> None:
    """Warn if the inputs have other names than the fields of a student of one predictor. DSPy leaves them out."""
    predictor = student.predict if isinstance(student, dspy.ChainOfThought) else student
    if isinstance(predictor, dspy.Predict):
        needed, given = set(predictor.signature.input_fields), set(example.inputs().keys())
        if needed - given and given - needed:
            warn(
                f"trainset[0] has the inputs {_quoted(sorted(given))}, but the student's input fields are "
                f"{_quoted(sorted(needed))}. Name them alike in the signature and in .with_inputs(...)."
            )


def _warn_of_other_prices(
    config: OPROConfig, prompt_model: Any, student: dspy.Module, teacher: dspy.Module | None
) -> None:
    """Warn of prices under names that no LM of the run has."""
    names = {model_name(prompt_model), model_name((config.teacher_settings or {}).get("lm"))} - {""}
    for program in filter(None, (student, teacher)):
        names |= program_models(config, program)
    if others := [name for name in config.prices or () if name not in names]:
        warn(
            f"prices has {_quoted(others)}, but no LM of the program or the optimizer has this name. Their names: "
            f"{_quoted(sorted(names))}. A price under another name counts only for an LM that the metric or the "
            "program itself calls."
        )


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


def _teacher(config: OPROConfig, program: Program) -> dspy.Module | None:
    """The program that bootstraps the demos; of a list the first. Its demos must fit the student."""
    teacher = config.teacher
    if isinstance(teacher, (list, tuple)):
        teacher = teacher[0] if teacher else None
    if teacher is None or not config.max_bootstrapped_demos:
        return None
    if not isinstance(teacher, dspy.Module):
        raise TypeError(f"teacher must be a dspy.Module, but is {_kind(teacher)}.")
    own, needed = (
        {name: list(predictor.signature.fields) for name, predictor in module.named_predictors()}
        for module in (teacher, program.student)
    )
    if own != needed:
        raise ValueError(f"teacher must have the student's predictors and fields {needed}, but has {own}.")
    return teacher


def _check_data(trainset: Sequence[Any], valset: Sequence[Any] | None) -> None:
    check_examples(trainset, "trainset")
    repeated = len(trainset) - num_inputs(trainset)
    if repeated > MOST_REPEATED * len(trainset) and not valset:
        warn(
            f"{repeated} of {len(trainset)} trainset examples repeat the inputs of another one. The search and the "
            "examples that confirm the result then share inputs, and the gain will be too high. Remove the repetitions."
        )
    if valset is None:
        return
    if not len(valset):
        warn("valset is empty, so it counts as none.")
        return
    check_examples(valset, "valset")
    shared = same_inputs(trainset, valset)
    if shared:
        warn(
            f"{shared} of {len(valset)} valset examples have the inputs of a trainset example. The gain on the "
            "valset will be too high for instructions that fit the trainset. Remove these examples from one dataset."
        )


def _prompt_model(config: OPROConfig, student: dspy.Module) -> Any:
    """The optimizer LM. Checks that every predictor has an LM, too, unless the user's own code may set one."""
    default = dspy.settings.lm
    modules = [type(module) for _, module in student.named_sub_modules(dspy.Module)]
    has_own_code = any(module.__module__.partition(".")[0] != "dspy" for module in modules)
    if default is None and config.task_model is None and not has_own_code:
        bare = [name for name, predictor in student.named_predictors() if predictor.lm is None]
        if bare:
            predictors = f"predictor{'s' * (len(bare) > 1)} {', '.join(map(repr, bare))}"
            raise ValueError(
                f"No LM is configured for the program ({predictors}). Call dspy.configure(lm=dspy.LM(...)) or pass "
                "task_model."
            )
    prompt_model = config.prompt_model or default or config.task_model
    if prompt_model is None:
        raise ValueError(
            "No LM is configured for the proposals. Pass prompt_model or call dspy.configure(lm=...)."
        )
    return prompt_model
