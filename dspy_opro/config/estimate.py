"""What a run will spend, said before it: from the student's first examples, and a search with simulated scores."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace

from dspy_opro.programs.metering import Budget, Prices, dollars
from dspy_opro.programs.pace import WaitingTasks
from dspy_opro.programs.values import fields, shown
from dspy_opro.proposers.demos import is_labeled
from dspy_opro.proposers.meta_prompt import MetaPrompt
from dspy_opro.proposers.opro import prompt_fields
from dspy_opro.search import Search
from dspy_opro.search.reserve import SHARE
from dspy_opro.search.tasks import Proposal, ProposalTask, Task, TaskResult, rng
from dspy_opro.search.trajectory import Outcome, Usage, mean

from .arguments import OPROConfig
from .plan import most_work

NUM_EXAMPLES = 5
"""Examples of the student behind an estimate."""
MOST_EXAMPLES = 100_000
"""Examples after which a simulated search without a limit in rounds or examples has no end."""
MOST_IN_A_RUN = 20_000
"""Examples that are simulated while a run goes on. It takes about two seconds."""
MOST_MEASURED = 200
"""Proposals whose length is measured. Later ones are like these."""
SPREAD = 0.1
"""Simulated candidates are as good as the student, with this standard deviation."""

# What is assumed of a proposal. Nothing is known of the optimizer LM before it is asked.
CHARS_PER_TOKEN = 4
INSTRUCTION_CHARS = 400
"""Of a proposed instruction, or as many as the student's has, if these are more."""
FRAME_CHARS = 2000
"""The meta-prompt without the texts of this run: the signature of the proposer, and what the adapter adds."""


@dataclass(frozen=True)
class Spending:
    """What a run spends, in round figures."""

    examples: int
    """Examples scored."""
    calls: int
    """LM calls, for examples and proposals."""
    tokens: int
    dollars: float | None
    """None where no price is known. Without the proposals where only their price is not known."""

    def __str__(self) -> str:
        cost = "cost unknown" if self.dollars is None else f"${self.dollars:,.4f}"
        return f"{self.examples:,} examples, {self.calls:,} LM calls, {self.tokens:,} tokens, {cost}"


@dataclass(frozen=True)
class Estimate:
    """What a run will spend, `compile(..., dry_run=True)`. It prints as a few lines."""

    spent: Spending
    """What the estimate itself has spent."""
    expected: Spending | None
    """Of a run whose candidates are about as good as the student. None where such a run would never end."""
    most: Spending | None
    """If no race ends early, every round asks for proposals three times, and every example needs as much as the largest
    of those that were scored. None where only tokens, dollars, time or your own stoppers limit the run.
    """
    notes: Sequence[str] = ()
    """What the figures leave out."""

    def __str__(self) -> str:
        lines = [
            f"Estimate, from {self.spent}:",
            f"  expected: {self.expected or 'unknown'}",
            f"  at most:  {self.most or 'what the limits allow'}",
        ]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def estimate(
    config: OPROConfig,
    search: Search,
    meta_prompt: MetaPrompt,
    prompt_model: str,
    program_models: Collection[str],
    results: Sequence[TaskResult],
    seconds: float,
    most_examples: float,
) -> Estimate:
    """The estimate for a search that has not begun.

    Args:
        config: The resolved arguments.
        search: A new search. It is used up.
        meta_prompt: Makes the requests, whose length counts.
        prompt_model: The name of the optimizer LM.
        program_models: The names of the LMs that the program calls. Their price is known from the examples.
        results: The student's results on its first examples. One of them at least did not fail.
        seconds: Wall time that an example adds to a run.
        most_examples: After so many examples the simulation stops, and nothing is known of what is expected.
    """
    notes = ["Proposals are estimated from the length of their prompts, 4 characters per token."]
    worked = [result for result in results if result.error is None]
    paid = [result for result in worked if not result.usage.cached_calls] or worked
    if config.pruner not in (None, "auto"):
        notes.append("The races are estimated with the default pruner in place of yours.")
    if any(result.usage.cached_calls for result in paid):
        notes.append("All answers came from DSPy's cache: what an example costs is unknown.")
    spent = sum((result.usage for result in results), Usage())
    paid_usage = sum((result.usage for result in paid), Usage())
    prices, is_own = config.prices or {}, prompt_model in program_models
    if prompt_model not in prices and is_own and paid_usage.cost:
        rate = 1e6 * paid_usage.cost / max(1, paid_usage.tokens)
        prices = {prompt_model: (rate, rate)}
    is_priced = bool(paid_usage.cost) or any(not any(price) for price in prices.values())
    if not is_priced:
        notes.append('No price is known: give prices={"model": (input, output)}.')
    elif prompt_model not in prices:
        notes.append(f"The dollars leave out the proposals: give the price of {prompt_model} in prices.")
    if is_priced and paid_usage.unpriced_calls:
        notes.append("The dollars leave out an LM of the program or the metric: give its price in prices.")
    budget = Budget(config.max_tokens, config.max_cost, config.timeout_seconds)
    # The most that the search can do is known only before it begins.
    work, max_waves, most = most_work(search), search.plan.max_waves, None
    bootstrapped, labeled = config.max_bootstrapped_demos or 0, config.max_labeled_demos or 0
    num_demos = max(bootstrapped, labeled) if search.plan.num_demo_sets else 0  # of a set
    run = _Run(search, meta_prompt, prompt_model, prices, paid, seconds, num_demos)
    is_bounded = work is not None or config.patience is not None or budget != Budget()
    limit = min(most_examples, MOST_EXAMPLES if work is None else math.inf)
    tries = {
        len(search.plan.initial) + number: 0 if is_labeled(number, bootstrapped, labeled) else bootstrapped
        for number in range(search.plan.num_demo_sets)
    }
    ends = is_bounded and run.play(budget, tries, limit)
    if work is not None:
        usages = [run.with_demos(result.usage) for result in paid]
        largest = max(usages, key=lambda usage: (usage.cost, usage.tokens))
        num_slots = run.num_proposals if work.num_proposals is None else work.num_proposals
        usage = _times(largest, work.num_examples) + _times(run.largest_proposal, max_waves * num_slots)
        most = _limited(_spending(usage, is_priced), config)
    expected = _spending(run.usage, is_priced) if ends else None
    return Estimate(_spending(spent, is_priced), expected, most, tuple(notes))


def _times(usage: Usage, count: int) -> Usage:
    return Usage(*(count * value for value in astuple(usage)))


def _spending(usage: Usage, is_priced: bool) -> Spending:
    cost = usage.cost if is_priced else None
    return Spending(usage.metric_calls, usage.scorer_calls + usage.proposer_calls, usage.tokens, cost)


def _limited(spending: Spending, config: OPROConfig) -> Spending:
    """What the limits in tokens and dollars leave of it."""
    if config.max_tokens is not None:
        spending = replace(spending, tokens=min(spending.tokens, config.max_tokens))
    if config.max_cost is not None and spending.dollars is not None:
        spending = replace(spending, dollars=min(spending.dollars, config.max_cost))
    return spending


@dataclass
class _Run:
    """A search that is played to its end with simulated answers. They cost nothing and take no time."""

    search: Search
    meta_prompt: MetaPrompt
    prompt_model: str
    prices: Prices
    samples: Sequence[TaskResult]
    """Results whose usage and output the simulated examples have."""
    seconds: float
    """Wall time that an example adds to the run."""
    num_demos: int
    """Demos of a set, for each predictor."""
    usage: Usage = field(default=Usage())
    num_proposals: int = 0

    def __post_init__(self) -> None:
        examples = self.meta_prompt.trainset[:MOST_MEASURED]
        chars = [len(shown(value)) for example in examples for value in fields(example).values()]
        self._demo_tokens = sum(chars) / len(examples) / CHARS_PER_TOKEN
        self._proposals = deque([Usage()], MOST_MEASURED)  # the last ones that were measured
        self._random = rng(self.search.plan.seed, "estimate")
        passed = [sample.content.score for sample in self.samples if isinstance(sample.content, Outcome)]
        is_share = all(0.0 <= score <= 1.0 for score in passed)
        # With one more example of either kind: five right answers do not say that all are right.
        self._quality = mean([*passed, 0.0, 1.0]) if is_share else 0.5
        self._qualities: dict[str, float] = {self.search.student.id: self._quality}

    def play(self, budget: Budget, tries: Mapping[int, int], most_examples: float) -> bool:
        """Whether the search comes to an end within so many examples.

        Args:
            budget: The limits of the run.
            tries: Slot of a set of demos -> examples that bootstrapping tries for it.
            most_examples: The play ends without an answer after so many.
        """
        search, waiting = self.search, WaitingTasks(num_threads=1, max_outage_seconds=math.inf)
        while not search.done and self.usage.metric_calls <= most_examples:
            seconds = self.seconds * self.usage.metric_calls
            reason = budget.exhausted(self.usage, seconds)
            if reason is not None:
                search.stop(reason)
            elif search.is_confirmed_later and (reason := budget.exhausted(self.usage, seconds, 1 - SHARE)):
                search.conclude(reason)
            for task in search.next_tasks():
                waiting.push(task)
            if (urgent := waiting.pop(now=0.0)) is not None:
                waiting.ended(urgent)
                self._perform(urgent, tries)
            search.events()
        return search.done

    def _perform(self, task: Task, tries: Mapping[int, int]) -> None:
        if not self.search.wants(task):
            return
        if not isinstance(task, ProposalTask):
            sample, quality = self._random.choice(self.samples), self._qualities.get(task.candidate.id)
            if quality is None:
                quality = self._qualities[task.candidate.id] = self._random.gauss(self._quality, SPREAD)
            score = float(self._random.random() < quality)
            output, calls = (getattr(sample.content, name, None) for name in ("output", "calls"))
            usage = sample.usage if task.candidate.demos is None else self.with_demos(sample.usage)
            result = TaskResult(Outcome(score, output or "", calls=calls), usage)
        elif task.is_for_demos:
            tried = [self._random.choice(self.samples).usage for _ in range(tries[task.slot])]
            demos = Proposal(dict.fromkeys(self.search.student.instructions, f"[{task.slot}]"))
            result = TaskResult(demos, sum(tried, Usage()))
        else:
            place = f"{task.round}/{task.slot}/{task.wave}"
            texts = {name: place.ljust(self._chars(name), "x") for name in task.predictors}
            result = TaskResult(Proposal(texts), self._proposal_usage(task))
        self.usage += result.usage
        self.search.tell(task, result)

    def _proposal_usage(self, task: ProposalTask) -> Usage:
        if task.initial is not None:
            return Usage()
        self.num_proposals += 1
        if self.num_proposals > MOST_MEASURED:  # by now the meta-prompt has all the texts that it can have
            return self._random.choice(self._proposals)
        request = self.meta_prompt.request(task)
        asked = (FRAME_CHARS + sum(map(len, prompt_fields(request).values()))) // CHARS_PER_TOKEN
        told = sum(map(self._chars, task.predictors)) // CHARS_PER_TOKEN
        cost = dollars(self.prices.get(self.prompt_model, (0.0, 0.0)), asked, told)
        usage = Usage(proposer_calls=1, prompt_tokens=asked, completion_tokens=told, cost=cost)
        self._proposals.append(usage)
        return usage

    def _chars(self, name: str) -> int:
        return max(INSTRUCTION_CHARS, len(self.search.student.instructions[name]))

    def with_demos(self, usage: Usage) -> Usage:
        """The usage of an example if every call shows a set of demos: each has an example and an answer."""
        more = self.num_demos * (usage.scorer_calls * self._demo_tokens + usage.completion_tokens)
        cost = usage.cost * (1 + more / max(1, usage.tokens))
        return replace(usage, prompt_tokens=usage.prompt_tokens + round(more), cost=cost)

    @property
    def largest_proposal(self) -> Usage:
        return max(self._proposals, key=lambda usage: usage.tokens)
