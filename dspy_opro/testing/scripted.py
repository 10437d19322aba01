"""A language model inside the process that answers by a function.

One rule: it is a `dspy.LM` in everything but the source of the text, so whatever takes an LM takes this one.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar
from typing import Any

import dspy

from dspy_opro.testing.calls import LMCall, SampleCounter, content_text, count_tokens, render

Scripted = Callable[[LMCall], "str | Mapping[str, Any] | Awaitable[str | Mapping[str, Any]]"]

# DSPy 3.4 takes an engine and drops `forward` plug-ins in 3.5; before that, `forward` is the only way.
_HAS_ENGINES = "engine" in inspect.signature(dspy.LM.__init__).parameters
# Before DSPy 3.3 it was for `forward` to tell the usage tracker.
_BASE_LM_TRACKS = tuple(int(part) for part in dspy.__version__.split(".")[:2]) >= (3, 3)
# Engines are not told the rollout id: it is an execution control of the LM around them.
_rollout_id: ContextVar[int | None] = ContextVar("scripted_lm_rollout_id", default=None)


class _Script:
    """The answering function and the record of its calls, shared by an LM and all its copies."""

    def __init__(self, answer: Scripted, keep_calls: bool) -> None:
        self.answer = answer
        self.keep_calls = keep_calls
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        with self._lock:
            self.calls: list[LMCall] = []
            self.num_calls = 0
            self._counter = SampleCounter()

    def record(self, model: str, messages: list[tuple[str, str]], settings: dict[str, Any]) -> LMCall:
        call = LMCall(
            model,
            tuple(messages),
            temperature=settings.get("temperature"),
            seed=settings.get("seed"),
            rollout_id=settings.get("rollout_id"),
            request=settings,
        )
        with self._lock:
            call = self._counter.number(call)
            self.num_calls += 1
            if self.keep_calls:
                self.calls.append(call)
        return call

    def text(self, call: LMCall) -> str:
        answer = self.answer(call)
        if inspect.isawaitable(answer):
            if inspect.iscoroutine(answer):
                answer.close()
            raise TypeError("answer must not be a coroutine function for a synchronous call.")
        return _rendered(answer, call)

    async def atext(self, call: LMCall) -> str:
        answer = self.answer(call)
        return _rendered(await answer if inspect.isawaitable(answer) else answer, call)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Script:
        return self  # DSPy copies LMs deeply up to 3.2; the calls of a copy are still this script's calls

    def __getstate__(self) -> dict[str, Any]:
        return {"answer": self.answer, "keep_calls": self.keep_calls}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.answer, self.keep_calls = state["answer"], state["keep_calls"]
        self._lock = threading.Lock()
        self.reset()


def _rendered(answer: Any, call: LMCall) -> str:
    if not isinstance(answer, (str, Mapping)):
        raise TypeError(f"answer must return a str or a mapping, but returned {answer!r}.")
    return render(answer, call)


class _Engine:
    """Answers the canonical requests of DSPy 3.4 and later."""

    def __init__(self, script: _Script) -> None:
        self.script = script

    def complete(self, request: Any) -> Any:
        call = self._record(request)
        return _response(call, self.script.text(call))

    def stream(self, request: Any) -> Any:
        from dspy.lm15 import response_to_events

        return response_to_events(self.complete(request))

    def close(self) -> None:
        pass

    def _record(self, request: Any) -> LMCall:
        config = request.config
        names = ("temperature", "max_tokens", "top_p", "stop", "seed", "response_format")
        settings = {name: getattr(config, name, None) for name in names}
        settings["rollout_id"] = _rollout_id.get()
        messages = [(message.role, _text_parts(message)) for message in request.messages]
        if request.system is not None:
            system = request.system
            parts = [system] if isinstance(system, str) else [getattr(part, "text", "") for part in system]
            messages.insert(0, ("system", "".join(parts)))
        return self.script.record(request.model, messages, settings)


class _AsyncEngine(_Engine):
    async def complete(self, request: Any) -> Any:
        call = self._record(request)
        return _response(call, await self.script.atext(call))

    async def stream(self, request: Any) -> Any:
        from dspy.lm15 import response_to_events

        for event in response_to_events(await self.complete(request)):
            yield event

    async def aclose(self) -> None:
        pass


def _text_parts(message: Any) -> str:
    """A message's text, without what stands in it besides (`message.text` is None then)."""
    return "\n".join(part.text for part in message.parts if part.type == "text")


def _response(call: LMCall, text: str) -> Any:
    from dspy.lm15 import Message, Response, Usage

    asked, answered = count_tokens(call.prompt), count_tokens(text)
    usage = Usage(input_tokens=asked, output_tokens=answered, total_tokens=asked + answered)
    message = Message.assistant(text or " ")  # an assistant message without any text is refused
    return Response(id=None, model=call.model, message=message, finish_reason="stop", usage=usage)


class ScriptedLM(dspy.LM):
    """A `dspy.LM` that answers by a function of the call.

    The LM and all its copies count and record their calls together, from any number of threads. By default nothing is
    cached or retried, so one call of the program is one call of `answer`. Up to DSPy 3.2 ChatAdapter repeats a failed
    call through JSONAdapter. Both calls are counted.

    Args:
        answer: A function that gets an `LMCall`. It returns the completion as text, or a dict output field -> value,
            which is written in the form that the prompt asks for. It may be a coroutine function if all calls are
            asynchronous. If it raises an error, the call fails.
        model: The LM's name in usage and history.
        keep_calls: Whether `calls` keeps every call. False saves memory in long runs.
        cache: Whether to use DSPy's cache. By default it is off, because it knows only the prompt and not `answer`. It
            has no effect before DSPy 3.4.
        **kwargs: As for `dspy.LM`.

    Example:
        ```python
        lm = ScriptedLM(lambda call: {"answer": "4" if "arithmetic" in call.instructions else "?"})
        with dspy.context(lm=lm):
            dspy.Predict("question -> answer")(question="2 + 2")
        assert lm.num_calls == 1
        ```
    """

    def __init__(
        self,
        answer: Scripted,
        model: str = "scripted/lm",
        *,
        keep_calls: bool = True,
        cache: bool = False,
        **kwargs: Any,
    ) -> None:
        if not callable(answer):
            raise TypeError(f"answer must be a function of an LMCall, but got {type(answer).__name__}.")
        self._script = _Script(answer, keep_calls)
        if _HAS_ENGINES:
            kwargs["engine"], kwargs["async_engine"] = _Engine(self._script), _AsyncEngine(self._script)
        super().__init__(model, cache=cache, **{"num_retries": 0, **kwargs})

    @property
    def calls(self) -> list[LMCall]:
        """The calls so far, in the order of their arrival."""
        return list(self._script.calls)

    @property
    def num_calls(self) -> int:
        """How often a completion was asked for, failed calls included."""
        return self._script.num_calls

    def reset(self) -> None:
        """Forget the calls so far, for all copies."""
        self._script.reset()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Answer as `dspy.LM` does."""
        token = _rollout_id.set(kwargs.get("rollout_id", self.kwargs.get("rollout_id")))
        try:
            return super().__call__(*args, **kwargs)
        finally:
            _rollout_id.reset(token)

    async def acall(self, *args: Any, **kwargs: Any) -> Any:
        """Answer as `dspy.LM` does, and await what `answer` returns."""
        token = _rollout_id.set(kwargs.get("rollout_id", self.kwargs.get("rollout_id")))
        try:
            return await super().acall(*args, **kwargs)
        finally:
            _rollout_id.reset(token)

    def dump_state(self) -> dict[str, Any]:
        """The settings without `answer`, which is code and not state."""
        state = {key: value for key, value in self.kwargs.items() if key != "api_key"}
        named = ("model", "model_type", "cache", "num_retries")
        return {**{name: getattr(self, name) for name in named}, **state}

    if not _HAS_ENGINES:

        def forward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
            """What `dspy.BaseLM` calls."""
            calls = self._record(prompt, messages, kwargs)
            return _legacy_response([(call, self._script.text(call)) for call in calls])

        async def aforward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
            """What `dspy.BaseLM` awaits."""
            calls = self._record(prompt, messages, kwargs)
            return _legacy_response([(call, await self._script.atext(call)) for call in calls])

        def _record(self, prompt: Any, messages: Any, kwargs: dict[str, Any]) -> list[LMCall]:
            settings = {**self.kwargs, **kwargs}
            messages = messages or [{"role": "user", "content": prompt}]
            texts = [(message["role"], content_text(message["content"])) for message in messages]
            wanted = settings.get("n") or 1
            return [self._script.record(self.model, texts, settings) for _ in range(wanted)]


def _legacy_response(answered: list[tuple[LMCall, str]]) -> Any:
    """What `BaseLM` up to DSPy 3.3 reads from a provider, and what its usage tracker must be told."""
    from dspy.dsp.utils.utils import dotdict

    call = answered[0][0]
    asked, told = sum(count_tokens(c.prompt) for c, _ in answered), sum(count_tokens(t) for _, t in answered)
    usage = {"prompt_tokens": asked, "completion_tokens": told, "total_tokens": asked + told}
    if dspy.settings.usage_tracker and not _BASE_LM_TRACKS:
        dspy.settings.usage_tracker.add_usage(call.model, dict(usage))
    choices = [dotdict(message=dotdict(content=text), finish_reason="stop") for _, text in answered]
    return dotdict(choices=choices, usage=usage, model=call.model)
