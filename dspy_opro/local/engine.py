"""The model behind `dspy.LM(engine=...)`, which DSPy takes from 3.4 on: one request in, one response out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import dspy
from dspy import lm15

from .llama import Completion, ContextOverflowError, LlamaModel
from .request import CAPABILITIES, SAMPLING, next_seed, text_prompt
from .schema import UnsupportedSchemaError, response_schema


class EngineLM(dspy.LM):
    """`dspy.LM` whose requests go to `llama` instead of a server."""

    def __init__(self, model: str, llama: LlamaModel, *, model_type: str, **kwargs: Any) -> None:
        self.llama = llama
        super().__init__(model, model_type=model_type, **self._engines(model_type), **kwargs)

    def copy(self, **kwargs: Any) -> Any:
        """A copy with other parameters, e.g. `lm.copy(rollout_id=1, temperature=1.0)`; it shares the weights."""
        if "model_type" in kwargs:
            kwargs |= self._engines(kwargs["model_type"])
        return super().copy(**kwargs)

    def _engines(self, model_type: str) -> dict[str, Any]:
        engine = LlamaEngine(self.llama, model_type)
        return {"engine": engine, "async_engine": AsyncLlamaEngine(engine)}


class LlamaEngine:
    """Answers `dspy.lm15.Request`s with a `LlamaModel`; a custom engine as `dspy.LM(engine=...)` takes it."""

    supports_response_schema = True
    supported_params = CAPABILITIES

    def __init__(self, model: LlamaModel, model_type: str) -> None:
        self.model = model
        self.model_type = model_type

    def complete(self, request: lm15.Request) -> lm15.Response:
        with _dspy_errors():
            return _response(request, self.model.complete(**self.arguments(request)))

    def arguments(self, request: lm15.Request) -> dict[str, Any]:
        """What `LlamaModel.complete` takes for this request."""
        config = request.config
        for name, value in (("tools", request.tools), ("logprobs", config.logprobs)):
            if value not in (None, ()):
                raise lm15.UnsupportedFeatureError(f"LocalLM does not support {name}.")
        options = {name: value for name in SAMPLING if (value := getattr(config, name)) is not None}
        messages = _messages(request)
        return {
            "prompt": text_prompt(messages) if self.model_type == "text" else messages,
            "schema": response_schema(config.response_format),
            "seed": next_seed(config.seed or 0),
            "stop": config.stop,
            **options,
        }

    def stream(self, request: lm15.Request) -> Iterator[Any]:
        return iter(lm15.response_to_events(self.complete(request)))

    def close(self) -> None:
        """The engine borrows the model; whoever made the model closes it."""


class AsyncLlamaEngine:
    """The same for `await`: a request waits in a thread of its own pool, never on the event loop."""

    supports_response_schema = True
    supported_params = CAPABILITIES

    def __init__(self, engine: LlamaEngine) -> None:
        self.engine = engine

    async def complete(self, request: lm15.Request) -> lm15.Response:
        with _dspy_errors():
            return _response(request, await self.engine.model.acomplete(**self.engine.arguments(request)))

    async def stream(self, request: lm15.Request) -> AsyncIterator[Any]:
        for event in lm15.response_to_events(await self.complete(request)):
            yield event

    async def aclose(self) -> None:
        """The engine borrows the model; whoever made the model closes it."""


@contextmanager
def _dspy_errors() -> Iterator[None]:
    try:
        yield
    except ContextOverflowError as error:
        raise lm15.ContextLengthError(str(error)) from error
    except UnsupportedSchemaError as error:
        raise lm15.UnsupportedFeatureError(str(error), feature="response_format") from error


def _response(request: lm15.Request, answer: Completion) -> lm15.Response:
    return lm15.Response(
        id=None,
        model=request.model,
        message=lm15.Message.assistant([lm15.TextPart(answer.text)]),
        finish_reason="length" if answer.finish_reason == "length" else "stop",
        usage=lm15.Usage(
            input_tokens=answer.prompt_tokens,
            output_tokens=answer.completion_tokens,
            cache_read_tokens=answer.cached_tokens,
        ),
    )


def _messages(request: lm15.Request) -> list[dict[str, str]]:
    messages = []
    if request.system is not None:
        system = request.system
        text = system if isinstance(system, str) else "".join(part.text for part in system)
        messages.append({"role": "system", "content": text})
    for message in request.messages:
        if any(part.type != "text" for part in message.parts):
            raise lm15.UnsupportedFeatureError("LocalLM reads text alone; a message holds something else.")
        messages.append({"role": message.role, "content": message.text or ""})
    return messages
