"""One call of the proposer: a usable text comes back, or the reason why there is none."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import dspy
import pytest

from dspy_opro import ProposalRequest
from dspy_opro.programs.awaiting import EventLoop
from dspy_opro.programs.metering import Ledger
from dspy_opro.programs.program import Program
from dspy_opro.proposers.cleaning import InstructionRules
from dspy_opro.proposers.meta_prompt import MetaPrompt
from dspy_opro.proposers.opro import OPROProposer
from dspy_opro.proposers.writer import InstructionWriter, initial_texts
from dspy_opro.search.tasks import Proposal, ProposalTask, TaskResult, View
from dspy_opro.search.trajectory import Candidate, Trajectory, Trial
from dspy_opro.testing import LMCall, ScriptedLM

TRAINSET = [dspy.Example(question=f"{n}", answer=f"{n}").with_inputs("question") for n in range(8)]
STUDENT = dspy.Predict(dspy.Signature("question -> answer", "Repeat it."))


def repeat(call: LMCall) -> Mapping[str, str]:
    return {"instruction": f"Repeat it {call.rollout_id}."}


def failing(call: LMCall) -> Any:
    raise ValueError("the provider is down")


class Case:
    """A writer over a scripted LM."""

    def __init__(
        self,
        answer: Callable[[LMCall], Any] = repeat,
        proposer: Any = None,
        rules: InstructionRules = InstructionRules(),  # noqa: B008 # frozen
        temperature: float = 1.0,
        seed: int = 0,
        loop: asyncio.AbstractEventLoop | None = None,
        student: Any = STUDENT,
    ) -> None:
        self.lm = ScriptedLM(answer)
        self.ledger = Ledger()
        self.program = Program(student)
        self.loop = EventLoop(loop)
        meta_prompt = MetaPrompt(self.program, TRAINSET, 20, 2, seed, is_paper=False)
        self.writer = InstructionWriter(
            proposer or OPROProposer(), self.lm, temperature, self.program, meta_prompt, rules, self.loop
        )

    def write(self, **changes: Any) -> TaskResult:
        candidate = self.program.candidate
        view = View(Trajectory(), candidate, [None] * len(TRAINSET))
        values: dict[str, Any] = {
            "round": 1,
            "slot": 0,
            "wave": 0,
            "predictors": tuple(candidate.instructions),
        }
        return self.writer.write(ProposalTask(**{**values, "view": view, **changes}), self.ledger.add)

    def propose(self, **changes: Any) -> Proposal:
        content = self.write(**changes).content
        assert isinstance(content, Proposal)
        self.loop.close()
        return content


@pytest.mark.parametrize(
    "current",
    [
        "Instruction: repeat it.\n\nThis prompt is from a user.",
        "> Quoted.",
        "*Repeat it.*",
        "# Instructions\nRepeat.",
    ],
)
def test_an_extension_leaves_the_instruction_as_it_is(current: str) -> None:
    case = Case(
        lambda call: {"instruction": "Mind {it}.\n\nThis instruction is short."},
        student=dspy.Predict(dspy.Signature("question -> answer", current)),
    )
    texts = {case.propose(slot=slot).texts["self"] for slot in range(9)}
    assert texts in ({"Mind {it}.", f"{current}{gap}Mind {{it}}."} for gap in (" ", "\n"))


def test_a_proposal_is_cleaned_and_checked() -> None:
    case = Case(answer=lambda call: {"instruction": '```\nInstruction: "Say it."\n```'})
    assert case.propose().texts == {"self": "Say it."}
    case = Case(answer=lambda call: {"instruction": "x" * 30}, rules=InstructionRules(max_length=20))
    proposal = case.propose()
    assert (proposal.texts, proposal.problems) == ({}, ("overlong: 30 characters, max_instruction_chars=20",))


def look_up(title: str) -> str:
    """Look a title up."""
    return title


@pytest.mark.parametrize("end", ["", "\nBe kind."])
def test_what_a_module_adds_is_no_part_of_a_proposal(end: str) -> None:
    student = dspy.ReAct(dspy.Signature("question -> answer", "Repeat it."), tools=[look_up])
    own = Program(student).texts["react"]
    answer = {"instruction": f"Say it.{own.suffix[:400]}{end}"}
    proposal = Case(lambda call: answer, student=student).propose(predictors=("react",))
    assert proposal.texts == {"react": "Say it."}


@pytest.mark.parametrize("kind", [dspy.Predict, dspy.ProgramOfThought, dspy.CodeAct, dspy.ReAct])
def test_initial_instructions_may_be_those_of_a_whole_program(kind: Any) -> None:
    tools = {"tools": [look_up]} if kind in (dspy.CodeAct, dspy.ReAct) else {}
    student = kind(dspy.Signature("question -> answer", "Repeat it."), **tools)
    program = Program(student)
    better = program.build(Candidate(dict.fromkeys(program.names, "Say it.")))
    for source in (student, better):
        given = {name: predictor.signature.instructions for name, predictor in source.named_predictors()}
        (texts,) = initial_texts([given], program, InstructionRules())
        built = dict(program.build(Candidate(texts)).named_predictors())
        assert {name: predictor.signature.instructions for name, predictor in built.items()} == given


class ContextWindowExceededError(ValueError):
    """DSPy 3.0 has LiteLLM's, later versions have one of their own."""


@pytest.mark.parametrize(
    ("room", "sizes", "error"),
    [
        (9, [(4, 3), (2, 2)], None),
        (0, [(4, 3), (2, 2), (1, 1)], "ContextWindowExceededError: too long"),
    ],
)
def test_a_request_that_exceeds_the_context_is_repeated_with_less(
    room: int, sizes: list[tuple[int, int]], error: str | None
) -> None:
    seen = []

    def propose(request: ProposalRequest) -> str:
        seen.append((len(request.scored_instructions["self"]), len(request.exemplars)))
        if seen[-1][0] * seen[-1][1] > room:
            raise ContextWindowExceededError("too long")
        assert request.scored_instructions["self"][-1][0] == "Repeat it."
        return "Say it."

    case = Case(proposer=propose)
    case.writer.meta_prompt = replace(case.writer.meta_prompt, num_exemplars=3)
    texts = [Trial(Candidate({"self": f"V{n}."}), n / 10, 8) for n in range(3)]
    student = Trial(case.program.candidate, 0.9, 8)
    proposal = case.propose(view=View(Trajectory().add(*texts, student), student.candidate, [None] * 8))
    assert (seen, proposal.error) == (sizes, error)
    assert proposal.texts == ({} if error else {"self": "Say it."})


class Given(dspy.Module):  # type: ignore[misc]
    """A proposer of one's own: no LM, no signature."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer
        self.requests: list[ProposalRequest] = []

    def forward(self, request: ProposalRequest) -> Any:
        self.requests.append(request)
        return self.answer


class GivenAsync(dspy.Module):  # type: ignore[misc]
    async def aforward(self, request: ProposalRequest) -> Any:
        await asyncio.sleep(0)
        return dspy.Prediction(instruction="Say it.")


def plain(request: ProposalRequest) -> str:
    return "Say it."


async def plain_async(request: ProposalRequest) -> dict[str, str]:
    return {"self": "Say it."}


@pytest.mark.parametrize(
    "proposer",
    [
        Given(dspy.Prediction(instruction="Say it.")),
        Given("Say it."),
        Given({"self": "Say it."}),
        Given(dspy.Prediction(instruction={"self": "Say it.", "unknown": "?"})),
        GivenAsync(),
        plain,
        plain_async,
    ],
    ids=lambda proposer: getattr(proposer, "__name__", type(proposer).__name__),
)
def test_proposers_of_ones_own(proposer: Any) -> None:
    assert Case(proposer=proposer).propose().texts == {"self": "Say it."}


async def test_async_proposers_are_awaited_on_the_callers_loop() -> None:
    seen = []

    async def look(request: ProposalRequest) -> str:
        seen.append(asyncio.get_running_loop())
        return "Say it."

    case = Case(proposer=look, loop=asyncio.get_running_loop())
    assert (await asyncio.to_thread(case.propose)).texts == {"self": "Say it."}
    assert seen == [asyncio.get_running_loop()]


class AsyncOnly(dspy.BaseLM):  # type: ignore[misc]
    """A language model of one's own that can only be awaited."""

    async def aforward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
        from dspy.dsp.utils.utils import dotdict

        await asyncio.sleep(0)
        message = dotdict(
            content="[[ ## instruction ## ]]\nSay it.\n\n[[ ## completed ## ]]", tool_calls=None
        )
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        return dotdict(
            choices=[dotdict(message=message, finish_reason="stop")], usage=usage, model=self.model
        )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_lm_that_can_only_be_awaited_writes_proposals() -> None:
    case = Case()
    case.writer.prompt_model = AsyncOnly(model="async/only")
    assert case.writer.try_out(case.ledger.add).proposer_calls == 1
    assert case.propose().texts == {"self": "Say it."}


async def test_under_acompile_the_lm_is_awaited_on_the_callers_loop() -> None:
    seen = []

    async def answer(call: LMCall) -> Any:
        seen.append(asyncio.get_running_loop())
        return repeat(call)

    case = Case(answer=answer, loop=asyncio.get_running_loop())
    assert (await asyncio.to_thread(case.propose)).texts
    assert seen == [asyncio.get_running_loop()]


@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        (None, "A proposer must return"),
        (7, "A proposer must return"),
        (dspy.Prediction(text="Say it."), "A proposer must return"),
    ],
)
def test_a_proposer_that_returns_something_else_has_failed(answer: Any, cause: str) -> None:
    proposal = Case(proposer=Given(answer)).propose()
    assert proposal.texts == {}
    assert proposal.error is not None
    assert cause in proposal.error


@pytest.mark.parametrize("answer", ["", {}, {"self": None}, {"self": "  "}])
def test_an_empty_proposal_is_dropped(answer: Any) -> None:
    proposal = Case(proposer=Given(dspy.Prediction(instruction=answer))).propose()
    assert (proposal.texts, proposal.problems, proposal.error) == ({}, ("empty",), None)


def test_a_proposer_that_raises_has_failed(caplog: pytest.LogCaptureFixture) -> None:
    result = Case(answer=failing).write()
    assert isinstance(result.content, Proposal)
    assert "the provider is down" in (result.content.error or "")
    assert "the provider is down" in str(result.error)
    assert "A proposal failed" in caplog.text


def test_of_many_failures_the_first_and_every_tenth_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    case = Case(answer=failing)
    for slot in range(21):
        case.write(slot=slot)
    here = threading.get_ident()  # workers that an earlier test left behind may log, too
    lines = [r.getMessage() for r in caplog.records if r.name == "dspy_opro" and r.thread == here]
    assert [line.split(":")[0] for line in lines] == [
        "A proposal failed",
        "10 proposals failed so far, the last one",
        "20 proposals failed so far, the last one",
    ]


def test_every_request_samples_anew_and_the_same_when_repeated() -> None:
    case = Case()
    before = dict(case.lm.kwargs)
    slots = [{"round": r, "slot": slot, "wave": wave} for r in (1, 2) for slot in range(4) for wave in (0, 1)]
    for _ in range(2):
        for place in slots:
            case.propose(**place)
    ids = [call.rollout_id for call in case.lm.calls]
    assert ids[: len(slots)] == ids[len(slots) :]
    assert len(set(ids)) == len(slots)
    assert None not in ids
    assert {call.temperature for call in case.lm.calls} == {1.0}
    assert case.lm.kwargs == before
    assert "rollout_id" not in before


def test_another_seed_asks_for_other_samples() -> None:
    cases = [Case(seed=seed) for seed in (0, 1)]
    ids = []
    for case in cases:
        case.propose()
        ids.append(case.lm.calls[0].rollout_id)
    assert ids[0] != ids[1]


def test_an_lm_that_refuses_a_temperature_is_asked_without() -> None:
    def answer(call: LMCall) -> Any:
        if call.temperature is not None:
            raise ValueError("Unsupported value: 'temperature' does not support 1.0 with this model.")
        return {"instruction": "Say it."}

    case = Case(answer=answer)
    assert case.propose().texts == {"self": "Say it."}
    calls = case.lm.num_calls
    assert case.propose(slot=3).texts == {"self": "Say it."}
    assert case.lm.num_calls == calls + 1


def test_usage_is_the_proposers() -> None:
    case = Case()
    result = case.write()
    usage = case.ledger.usage
    assert result.usage == usage
    assert (usage.metric_calls, usage.scorer_calls, usage.proposer_calls) == (0, 0, 1)
    assert usage.tokens > 0


def test_a_users_own_tracker_sees_the_usage_too() -> None:
    case = Case()
    with dspy.track_usage() as tracker:
        case.write()
    totals = tracker.get_total_tokens()
    assert sum(usage["prompt_tokens"] for usage in totals.values()) == case.ledger.usage.prompt_tokens > 0
