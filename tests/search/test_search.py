"""The search alone, driven by a made-up world: what it does depends on the results and not on their order."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspy_opro.search.pruners import Halving, Race, ScoreAll, cannot_win
from dspy_opro.search import Search
from dspy_opro.search.stoppers import RunState
from dspy_opro.search.trajectory import Candidate, Outcome, Trajectory, mean
from dspy_opro.search.tasks import ProposalTask, ScoringTask, RoundDecided, Event, TrialFinished, Plan, Proposal, CandidatesProposed, TrialReported, View

PREDICTORS = ("first", "second", "third")


def draw(*parts: object) -> float:
    """A number from [0, 1) that is fixed by the parts."""
    return random.Random(repr(parts)).random()


@dataclass
class World:
    """What proposer and program would answer: functions of the work alone."""

    seed: int = 0
    num_texts: int = 1000
    """How many different texts the proposer knows; few of them make duplicates."""
    failing: float = 0.0
    """Share of the proposer's calls that fail."""
    looks: bool = True
    """Whether proposals depend on what the meta-prompt would show."""
    scores: Callable[[float], float] = round

    def propose(self, ask: ProposalTask) -> Proposal:
        key = (self.seed, ask.round, ask.slot, ask.wave)
        if draw("fails", *key, ask.predictors) < self.failing:
            return Proposal({}, error="TimeoutError: no answer")
        view = ask.view
        shown = [view.base.id, *((t.id, t.reward) for t in view.trajectory.trials)] if self.looks else []
        texts = {
            name: f"{name} {int(self.num_texts * draw('text', *key, name, shown))}" for name in ask.predictors
        }
        return Proposal(texts, ("empty",) if draw("problem", *key) < 0.1 else ())

    def outcomes(self, block: ScoringTask) -> list[Outcome]:
        return [self.outcome(block.candidate, block.split, p) for p in range(block.start, block.stop)]

    def outcome(self, candidate: Candidate, split: str, position: int) -> Outcome:
        skill = draw("skill", self.seed, candidate.id)
        value = 0.7 * draw("item", self.seed, split, position) + 0.3 * draw(candidate.id, split, position)
        return Outcome(self.scores(0.5 + (skill - value) / 2))

    def row(self, candidate: Candidate, count: int, split: str = "train") -> list[float]:
        return [self.outcome(candidate, split, p).score for p in range(count)]


@dataclass
class Record:
    """What one drive of a search showed."""

    search: Search
    asks: list[ProposalTask] = field(default_factory=list)
    blocks: list[ScoringTask] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)

    @property
    def trials(self) -> Sequence[Any]:
        return self.search.trajectory.trials

    @property
    def num_calls(self) -> int:
        return sum(block.stop - block.start for block in self.blocks)

    def decisions(self) -> dict[str, Any]:
        """Everything that must be the same in every order."""
        search = self.search
        return {
            "trials": search.trajectory.trials,
            "scores": search.best_scores,
            "reason": search.stop_reason,
            "problems": search.problems,
            "events": self.events,
        }


def student(num_predictors: int = 1) -> Candidate:
    return Candidate({name: f"{name} of the student" for name in PREDICTORS[:num_predictors]})


def drive(search: Search, world: World, order: random.Random | None = None, capacity: int = 1) -> Record:
    """Answer everything the search asks for, first come first served or in a random order."""
    record, open_work = Record(search), []
    for _ in range(50_000):
        while len(open_work) < capacity and (work := search.next()) is not None:
            open_work.append(work)
            (record.asks if isinstance(work, ProposalTask) else record.blocks).append(work)  # type: ignore[arg-type]
        if not open_work:
            break
        work = open_work.pop(order.randrange(len(open_work)) if order else 0)
        if isinstance(work, ProposalTask):
            search.tell_proposal(work, world.propose(work))
        else:
            search.tell_block(work, world.outcomes(work))
        record.events += search.events()
    else:
        pytest.fail("The search does not come to an end.")
    assert search.done
    return record


def run(
    plan: Plan, world: World | None = None, pruner: Any = None, num_predictors: int = 1, **how: Any
) -> Record:
    recombine = how.pop("recombine", None)
    search = Search(plan, student(num_predictors), pruner or Halving(first=2), recombine)
    search.stop_rule = how.pop("stop_rule", search.stop_rule)
    return drive(search, world or World(), **how)


def mix(trajectory: Trajectory, seed: int) -> Mapping[str, str] | None:
    """In the place of TPE: for each predictor one of its best texts."""
    if not len(trajectory):
        return None
    best = {name: trajectory.top_texts(name, 5) for name in trajectory.incumbent.candidate.instructions}
    return {name: texts[int(len(texts) * draw(seed, name))][0] for name, texts in best.items()}


plans = st.builds(
    Plan,
    num_train=st.integers(1, 30),
    num_val=st.sampled_from([0, 0, 3, 12]),
    num_rounds=st.integers(1, 5),
    num_candidates=st.integers(1, 6),
    predictor_strategy=st.sampled_from(["all", "round_robin", "joint"]),
    max_metric_calls=st.none() | st.integers(42, 300),
    lag=st.integers(0, 3),
    block_size=st.integers(1, 20),
    max_waves=st.integers(1, 3),
    seed=st.integers(0, 3),
)
worlds = st.builds(
    World,
    seed=st.integers(0, 1000),
    num_texts=st.sampled_from([1, 3, 30, 1000]),
    failing=st.sampled_from([0.0, 0.0, 0.3, 1.0]),
    scores=st.sampled_from([round, lambda x: x, lambda x: 10 * x - 5, lambda x: 0.5]),
)
pruners = st.sampled_from([Halving(first=2), Halving(), Halving(first=1, keep=0.4, slack=1.0), ScoreAll()])


@given(plans, worlds, pruners, st.integers(1, 3), st.booleans(), st.integers(0, 10**6), st.integers(2, 64))
@settings(max_examples=150)
def test_the_order_of_arrival_changes_nothing(
    plan: Plan, world: World, pruner: Any, num_predictors: int, mixes: bool, order: int, capacity: int
) -> None:
    how: dict[str, Any] = {"num_predictors": num_predictors, "recombine": mix if mixes else None}
    one = run(plan, world, pruner, **how)
    other = run(plan, world, pruner, order=random.Random(order), capacity=capacity, **how)
    assert one.decisions() == other.decisions()


@given(plans, worlds, pruners, st.integers(1, 3), st.booleans(), st.integers(0, 10**6))
@settings(max_examples=150)
def test_what_every_run_keeps_to(
    plan: Plan, world: World, pruner: Any, num_predictors: int, mixes: bool, order: int
) -> None:
    record = run(
        plan,
        world,
        pruner,
        num_predictors,
        order=random.Random(order),
        capacity=7,
        recombine=mix if mixes else None,
    )
    if plan.max_metric_calls is not None:
        assert record.num_calls <= plan.max_metric_calls
    scored = [(b.candidate.id, b.split, p) for b in record.blocks for p in range(b.start, b.stop)]
    assert len(scored) == len(set(scored))  # nothing is paid twice
    assert all(0 < b.stop - b.start <= plan.block_size for b in record.blocks)
    ids = [trial.id for trial in record.trials]
    assert len(ids) == len(set(ids))
    first = record.trials[0]
    assert first.candidate == student(num_predictors)
    assert first.num_scored == plan.num_train
    for trial in record.trials:
        assert list(trial.scores) == world.row(trial.candidate, trial.num_scored)
        assert (trial.state == "complete") == (trial.num_scored == plan.num_train)
    rounds = [trial.candidate.round for trial in record.trials]
    assert rounds == sorted(rounds)
    assert record.search.best_scores == sorted(record.search.best_scores)  # the best so far never gets worse
    assert len(record.search.best_scores) == 1 + sum(
        isinstance(e, RoundDecided) and e.round > 0 for e in record.events
    )


@given(plans, worlds, st.integers(0, 10**6))
@settings(max_examples=60)
def test_events_tell_one_story(plan: Plan, world: World, order: int) -> None:
    """A round's candidates are told of before anything else of it, and each of them has one end."""
    record = run(plan, world, order=random.Random(order), capacity=9)
    proposed: list[Candidate] = []
    steps: dict[str, list[int]] = {}
    finished: list[str] = []
    for event in record.events:
        if isinstance(event, CandidatesProposed):
            proposed += event.candidates
        elif isinstance(event, TrialReported):
            assert event.candidate in proposed
            steps.setdefault(event.candidate.id, []).append(event.step)
        elif isinstance(event, TrialFinished):
            assert event.trial.candidate in proposed
            finished.append(event.trial.id)
    assert sorted(finished) == sorted(trial.id for trial in record.trials)
    assert [c.id for c in proposed] == [trial.id for trial in record.trials]
    assert [e.round for e in record.events if isinstance(e, RoundDecided)] == list(
        range(len(record.search.best_scores))
    )
    for trial in record.trials[1:]:
        assert steps[trial.id] == sorted(set(steps[trial.id]))
        assert steps[trial.id][-1] == trial.num_scored


# --- the race --------------------------------------------------------------------------------------------


class BoundOnly(ScoreAll):
    """Nothing but the exact bound, after every example."""

    def checkpoints(self, num_examples: int, num_candidates: int) -> Sequence[int]:
        return list(range(1, num_examples + 1))

    def drop(self, race: Race) -> Mapping[str, str]:
        return {c: "cannot win" for c, row in race.scores.items() if cannot_win(row, race.incumbent)}


@given(
    st.integers(0, 10**6),
    st.integers(1, 12),
    st.integers(0, 2),
    st.sampled_from([round, lambda x: x, lambda x: round(x, 1)]),
)
@settings(max_examples=60)
def test_the_exact_bound_never_drops_a_winner(
    seed: int, num_train: int, lag: int, scores: Callable[[float], float]
) -> None:
    """The incumbents are those of a run that scores everything, and fewer examples are paid for."""
    plan = Plan(num_train, num_rounds=4, num_candidates=4, lag=lag)
    world = World(seed, looks=False, scores=scores)
    full, bounded = run(plan, world, ScoreAll()), run(plan, world, BoundOnly())
    assert bounded.search.best_scores == full.search.best_scores
    assert bounded.search.trajectory.incumbent.id == full.search.trajectory.incumbent.id
    assert bounded.num_calls <= full.num_calls


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_a_dropped_candidate_has_a_reward_that_full_scores_can_be_compared_with(lag: int) -> None:
    world = World(3)
    record = run(Plan(24, num_rounds=5, num_candidates=6, lag=lag), world)
    views = {ask.round: ask.view for ask in record.asks}
    dropped = [trial for trial in record.trials if trial.state == "pruned"]
    assert dropped
    for trial in dropped:
        known = views[trial.candidate.round].trajectory
        incumbent = known.incumbent if len(known) else record.trials[0]
        count = trial.num_scored
        assert trial.reward == pytest.approx(
            incumbent.reward + mean(trial.scores) - mean(incumbent.scores[:count])
        )
        assert count < 24
        assert str(count) in trial.reason or trial.reason == "cannot win any more"


def test_metrics_beyond_one_have_no_exact_bound() -> None:
    """The first example gives the candidate nothing and each other one 10 points."""

    class Points(World):
        def outcome(self, candidate: Candidate, split: str, position: int) -> Outcome:
            if candidate.round == 0:
                return Outcome(1.0 if position < 3 else 3.0)
            return Outcome(1.0 if position < 3 else 10.0)

    record = run(Plan(8, num_rounds=1, num_candidates=1, lag=0), Points(), Halving(first=3))
    assert [trial.state for trial in record.trials] == ["complete", "complete"]
    assert record.search.trajectory.incumbent.candidate.round == 1


@pytest.mark.parametrize("ends", [[], [0, 8], [4], [4, 4, 8], [8, 4], [4, 9], [4, 8, 12]])
def test_a_pruner_with_impossible_checkpoints_is_an_error(ends: list[int]) -> None:
    class Odd(ScoreAll):
        def checkpoints(self, num_examples: int, num_candidates: int) -> Sequence[int]:
            return ends

    with pytest.raises(ValueError, match=r"must ascend from at least 1 and end with all 8 examples, but Odd"):
        run(Plan(8, num_rounds=1), pruner=Odd())


def test_a_pruner_that_fails_leaves_what_was_scored() -> None:
    class Failing(ScoreAll):
        def checkpoints(self, num_examples: int, num_candidates: int) -> Sequence[int]:
            raise ArithmeticError("no idea")

    search = Search(Plan(8, num_rounds=1, num_candidates=1, lag=0), student(), Failing())
    with pytest.raises(ArithmeticError, match="no idea"):
        drive(search, World())
    search.stop("error")
    search.salvage()
    assert [trial.num_scored for trial in search.trajectory.trials] == [8]


# --- rounds ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lag", [0, 1, 2, 3])
def test_what_a_proposer_has_seen_of_the_rounds_before(lag: int) -> None:
    """All of the decided ones, and of each one in between a checkpoint more than of the one after it."""
    plan = Plan(16, num_rounds=8, num_candidates=8, lag=lag)
    record = run(plan, World(1), Keeper(), capacity=3, order=random.Random(lag))
    assert {ask.round for ask in record.asks} == set(range(1, 9))
    for ask in record.asks:
        seen: dict[int, int] = {}  # round -> examples of its candidate that was scored on most
        for trial in ask.view.trajectory.trials:
            seen[trial.candidate.round] = max(trial.num_scored, seen.get(trial.candidate.round, 0))
        decided = max(0, ask.round - 1 - lag) if ask.round > 1 or lag <= 1 else -1
        under_way = range(decided + 1, ask.round)
        passed = {n: ask.round - n - (lag > 1) for n in under_way}
        expected = {n: [2, 4, 8][count - 1] for n, count in passed.items() if count > 0}
        assert seen == dict.fromkeys(range(decided + 1), 16) | expected


class Keeper(Halving):
    """Keeps everybody to the end."""

    def checkpoints(self, num_examples: int, num_candidates: int) -> Sequence[int]:
        return [2, 4, 8, 16]

    def drop(self, race: Race) -> Mapping[str, str]:
        return {}


def test_candidates_are_scored_before_their_round_is_known() -> None:
    search = Search(Plan(8, num_rounds=1, num_candidates=3), student(), Halving(first=2))
    while (work := search.next()) is not None:
        if isinstance(work, ProposalTask) and work.slot == 1:
            search.tell_proposal(work, World().propose(work))
            break
    blocks = [work for work in iter(search.next, None) if isinstance(work, ScoringTask) and work.round == 1]
    assert [(block.start, block.stop) for block in blocks] == [(0, 2)]


def test_proposals_and_older_rounds_are_most_urgent() -> None:
    search = Search(Plan(4, num_rounds=2, num_candidates=2, lag=2, block_size=2), student(), ScoreAll())
    first = [search.next() for _ in range(4)]
    assert [type(work) for work in first] == [ProposalTask, ProposalTask, ScoringTask, ScoringTask]
    for ask in first[:2]:
        assert isinstance(ask, ProposalTask)
        search.tell_proposal(ask, World().propose(ask))
    rest = [search.next() for _ in range(5)]
    assert [work.round for work in rest if work is not None] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("strategy", "slots"),
    [
        ("joint", [[("first", "second")], [("first", "second")]]),
        ("round_robin", [[("first",)], [("first",)]]),
        ("all", [[("first",), ("second",)], [("second",)]]),
    ],
)
def test_the_strategy_says_what_a_proposal_rewrites(strategy: Any, slots: list) -> None:
    plan = Plan(4, num_rounds=2, num_candidates=2, lag=0, predictor_strategy=strategy)
    record = run(plan, num_predictors=2)
    asked = [
        [ask.predictors for ask in record.asks if (ask.round, ask.slot, ask.wave) == (1, slot, 0)]
        for slot in (0, 1)
    ]
    assert asked == slots
    if strategy == "round_robin":
        assert {ask.predictors for ask in record.asks if ask.round == 2} == {("second",)}


@pytest.mark.parametrize("strategy", ["all", "round_robin", "joint"])
def test_every_predictor_gets_its_turn(strategy: Any) -> None:
    plan = Plan(6, num_rounds=3, num_candidates=3, predictor_strategy=strategy)
    record = run(plan, World(5), num_predictors=3)
    assert {name for trial in record.trials for name in trial.candidate.rewritten} == set(PREDICTORS)
    by_id = {trial.id: trial.candidate for trial in record.trials}
    for trial in record.trials[1:]:
        parent = by_id[trial.candidate.parent]
        differs = tuple(n for n in PREDICTORS if trial.candidate.instructions[n] != parent.instructions[n])
        assert trial.candidate.rewritten == differs


def test_recombination_adds_a_candidate_a_round() -> None:
    record = run(Plan(12, num_rounds=6, num_candidates=3, lag=0), World(2), num_predictors=2, recombine=mix)
    sizes = {e.round: len(e.candidates) for e in record.events if isinstance(e, CandidatesProposed)}
    assert max(sizes.values()) == 4
    assert sizes[1] == 3  # there is nothing to combine yet


@pytest.mark.parametrize("budget", [60, 100, 141])
def test_a_budget_knows_of_the_recombined_candidate(budget: int) -> None:
    plan = Plan(12, num_candidates=3, max_metric_calls=budget, lag=0)
    record = run(plan, World(2, looks=False), ScoreAll(), num_predictors=2, recombine=mix)
    assert record.num_calls <= budget
    assert max(len(e.candidates) for e in record.events if isinstance(e, CandidatesProposed)) >= 3


def test_duplicates_are_asked_for_again_and_then_done_without() -> None:
    record = run(Plan(6, num_rounds=2, num_candidates=4, lag=0), World(1, num_texts=3, looks=False))
    waves = [(ask.round, ask.wave, ask.slot) for ask in record.asks]
    assert max(wave for _, wave, _ in waves) == 2
    slots = [{slot for r, wave, slot in waves if (r, wave) == (1, n)} for n in range(3)]
    assert slots[0] == set(range(4))
    assert slots[0] > slots[1] >= slots[2]
    texts = [trial.candidate.instructions["first"] for trial in record.trials]
    assert len(texts) == len(set(texts)) <= 4
    assert "duplicate" in record.search.problems


@pytest.mark.parametrize("lag", [0, 1, 2])
@pytest.mark.parametrize(
    ("world", "reason"),
    [(World(num_texts=1), "no_new_proposals"), (World(failing=1.0), "proposer_failed")],
)
def test_a_proposer_with_nothing_new_ends_the_run_with_a_reason(lag: int, world: World, reason: str) -> None:
    record = run(Plan(5, num_candidates=4, lag=lag), world)
    assert record.search.stop_reason == reason
    assert len(record.asks) <= 3 * 4 * (2 + 2 * lag)
    assert len(record.trials) <= 2


def test_the_own_text_again_is_no_candidate() -> None:
    class Echo(World):
        def propose(self, ask: ProposalTask) -> Proposal:
            return Proposal({name: f" {ask.view.base.instructions[name]}\n" for name in ask.predictors})

    record = run(Plan(5, num_candidates=2), Echo())
    assert record.search.stop_reason == "no_new_proposals"
    assert len(record.trials) == 1


def test_an_empty_round_does_not_cost_the_next_one() -> None:
    """The proposer is away during round 2, while round 3 was asked for already."""

    class Outage(World):
        def propose(self, ask: ProposalTask) -> Proposal:
            return Proposal({}, error="503") if ask.round == 2 else super().propose(ask)

    record = run(Plan(6, num_rounds=5, num_candidates=3, lag=1), Outage(4))
    assert {trial.candidate.round for trial in record.trials} == {0, 1, 3, 4, 5}
    assert record.search.stop_reason == "num_rounds"
    assert len(record.search.best_scores) == 6
    assert record.search.problems.count("503") == 9


def test_part_of_a_rounds_proposals_is_enough() -> None:
    class Limited(World):
        def propose(self, ask: ProposalTask) -> Proposal:
            return super().propose(ask) if ask.slot == 1 else Proposal({}, error="429")

    record = run(Plan(6, num_rounds=3, num_candidates=4), Limited())
    assert [trial.candidate.round for trial in record.trials] == [0, 1, 2, 3]


# --- ends ------------------------------------------------------------------------------------------------


def test_the_stop_rule_is_asked_once_a_round() -> None:
    states: list[RunState] = []

    def rule(state: RunState) -> str | None:
        states.append(state)
        return "enough" if state.round == 3 else None

    record = run(Plan(8, num_candidates=2, lag=2), World(2), stop_rule=rule, capacity=5)
    assert record.search.stop_reason == "enough"
    assert [state.round for state in states] == [0, 1, 2, 3]
    assert states[-1].best_scores == tuple(record.search.best_scores)
    assert states[-1].best_score == record.search.best_scores[-1]
    assert {trial.candidate.round for trial in record.trials} == {0, 1, 2, 3}  # nothing of the rounds ahead


@pytest.mark.parametrize("budget", [20, 25, 30, 50, 90, 200])
@pytest.mark.parametrize("lag", [0, 1, 2])
def test_a_budget_of_metric_calls_is_used_and_never_exceeded(budget: int, lag: int) -> None:
    plan = Plan(10, num_val=10, num_candidates=4, max_metric_calls=budget, lag=lag)
    record = run(plan, World(1), capacity=8)
    assert record.search.stop_reason == "max_metric_calls"
    assert record.num_calls <= budget
    # What is left is not enough for one more candidate, scored on everything; where rounds overlap, for a round.
    size = 1 if lag == 0 or len(record.trials) == 1 else plan.num_candidates
    assert record.num_calls + Halving(first=2).most_calls(10, size) + 10 > budget


@pytest.mark.parametrize("num_trials", [1, 4, 5, 8, 11])
@pytest.mark.parametrize("budget", [None, 10_000])
@pytest.mark.parametrize("lag", [0, 2])
def test_a_number_of_trials_is_kept(num_trials: int, budget: int | None, lag: int) -> None:
    num_rounds = -(-num_trials // 4)
    plan = Plan(
        6, num_rounds=num_rounds, num_candidates=4, num_trials=num_trials, max_metric_calls=budget, lag=lag
    )
    assert len(run(plan, World(1)).trials) == 1 + num_trials
    assert len(run(plan, World(1), num_predictors=2, recombine=mix).trials) == 1 + num_trials


def test_nothing_is_handed_out_after_the_end() -> None:
    search = Search(Plan(10, num_candidates=4), student(), Halving())
    search.stop("interrupted")
    assert search.next() is None
    search.stop("later")
    assert search.stop_reason == "interrupted"


@given(
    plans,
    worlds,
    pruners,
    st.integers(0, 10**6),
    st.integers(0, 120),
    st.sampled_from([1, 4, 64]),
    st.booleans(),
)
@settings(max_examples=150)
def test_a_run_that_is_cut_keeps_what_is_scored_in_full(
    plan: Plan, world: World, pruner: Any, order: int, steps: int, capacity: int, mixes: bool
) -> None:
    search = Search(replace(plan, max_metric_calls=None), student(2), pruner, mix if mixes else None)
    shuffled, open_work, events, decided = random.Random(order), [], [], 0
    scored: dict[tuple[str, str], set[int]] = {}
    candidates = {}
    for step in range(10_000):
        if step == steps and not search.done:
            search.stop("interrupted")
            decided = len(search.trajectory)
        while len(open_work) < capacity and (work := search.next()) is not None:
            open_work.append(work)
        if not open_work:
            break
        work = open_work.pop(shuffled.randrange(len(open_work)))
        if isinstance(work, ProposalTask):
            search.tell_proposal(work, world.propose(work))
        else:
            candidates[work.candidate.id] = work.candidate
            scored.setdefault((work.candidate.id, work.split), set()).update(range(work.start, work.stop))
            search.tell_block(work, world.outcomes(work))
        events += search.events()
    before = search.trajectory.trials
    search.salvage()
    events += search.events()
    trials = search.trajectory.trials
    assert trials[: len(before)] == before
    if search.stop_reason != "interrupted":
        assert trials == before
        return
    assert len(before) == decided  # results that arrive after the end decide nothing
    assert sorted(t.id for t in trials) == sorted(e.trial.id for e in events if isinstance(e, TrialFinished))
    assert len({t.id for t in trials}) == len(trials)
    in_full = {
        id_ for (id_, split), done in scored.items() if split == "train" and len(done) == plan.num_train
    }
    student_id = student(2).id
    is_baseline_known = student_id in in_full and (
        plan.num_val == 0 or len(scored.get((student_id, "val"), ())) == plan.num_val
    )
    if not is_baseline_known:
        assert not trials
        return
    assert trials[0].id == student_id
    best = search.trajectory.best
    assert search.best_scores[-1] == (best.reward if best.valset_score is None else best.valset_score)
    if plan.num_val == 0:
        assert in_full == {t.id for t in trials if t.state == "complete"}


# --- validation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lag", [0, 2])
def test_only_a_new_incumbent_is_validated(lag: int) -> None:
    world = World(11)
    record = run(Plan(20, num_val=15, num_rounds=6, num_candidates=4, lag=lag), world)
    best_reward = float("-inf")
    for number in range(7):
        trials = [t for t in record.trials if t.candidate.round == number and t.state == "complete"]
        leader = max(trials, key=lambda t: t.reward, default=None)
        for trial in trials:
            if trial is leader and trial.reward > best_reward:
                assert trial.valset_score == mean(world.row(trial.candidate, 15, "val"))
            else:
                assert trial.valset_score is None
        best_reward = max([best_reward, *(t.reward for t in trials)])
    validated = [t for t in record.trials if t.valset_score is not None]
    assert len(validated) > 1
    assert record.search.trajectory.best.valset_score == max(t.valset_score for t in validated)


def test_a_candidate_that_only_fits_the_trainset_is_not_returned() -> None:
    class Overfit(World):
        def outcome(self, candidate: Candidate, split: str, position: int) -> Outcome:
            is_student = candidate.round == 0
            return Outcome(float(is_student if split == "val" else not is_student))

    record = run(Plan(5, num_val=5, num_rounds=3, num_candidates=2), Overfit())
    assert record.search.trajectory.incumbent.candidate.round > 0
    assert record.search.trajectory.best.id == student().id
    assert record.search.best_scores == [1.0] * 4


def test_a_tie_keeps_the_student() -> None:
    """Rule 6 of the design: returned unless another is better."""
    for num_val in (0, 4):
        record = run(Plan(5, num_val=num_val, num_rounds=3, num_candidates=3), World(scores=lambda x: 1.0))
        assert record.search.trajectory.best.id == student().id


# --- what the proposer sees ------------------------------------------------------------------------------


def test_a_view_shows_the_incumbents_outcomes() -> None:
    world, views = World(9), {}

    class Watching(World):
        def propose(self, ask: ProposalTask) -> Proposal:
            views.setdefault(ask.round, ask.view)
            return world.propose(ask)

    record = run(Plan(12, num_rounds=6, num_candidates=4, lag=2), Watching(9))
    assert [o for o in views[1].outcomes if o is not None] == []
    assert len(record.trials) > 1
    for number in range(2, 7):
        view: View = views[number]
        assert view.base == view.trajectory.incumbent.candidate
        assert [o.score for o in view.outcomes if o is not None] == world.row(view.base, 12)
