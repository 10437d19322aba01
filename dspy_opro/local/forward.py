"""The model behind `forward`/`aforward`, which DSPy 3.0 to 3.3 ask of an LM; from 3.4 on nothing here is used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import dspy
import litellm
from dspy.clients.cache import request_cache

from .llama import Completion, ContextOverflowError, LlamaModel
from .request import SAMPLING, next_seed, text_prompt
from .schema import response_schema

# Until 3.2 forward() reports what was used; from 3.3 on BaseLM does, and a second report would count twice.
_REPORTS_USAGE = tuple(int(part) for part in dspy.__version__.split(".")[:2]) < (3, 3)


class ForwardLM(dspy.LM):
    """`dspy.LM` whose requests go to `llama` instead of a server."""

    def __init__(self, model: str, llama: LlamaModel, *, model_type: str, **kwargs: Any) -> None:
        self.llama = llama
        _announce(model)
        super().__init__(model, model_type=model_type, **kwargs)

    def forward(
        self, prompt: str | None = None, messages: list[dict[str, Any]] | None = None, **kwargs: Any
    ) -> Any:
        """Answer in OpenAI's chat completion form."""

        def answer(request: dict[str, Any]) -> Any:
            with self._dspy_errors():
                return self._response(
                    [self.llama.complete(**arguments) for arguments in self._arguments(request)]
                )

        request, cache = self._request(prompt, messages, kwargs)
        return self._report((_cached(answer) if cache else answer)(request=request))

    async def aforward(
        self, prompt: str | None = None, messages: list[dict[str, Any]] | None = None, **kwargs: Any
    ) -> Any:
        """The same for `await`."""

        async def answer(request: dict[str, Any]) -> Any:
            with self._dspy_errors():
                answers = [await self.llama.acomplete(**arguments) for arguments in self._arguments(request)]
            return self._response(answers)

        request, cache = self._request(prompt, messages, kwargs)
        return self._report(await (_cached(answer) if cache else answer)(request=request))

    def _request(self, prompt: Any, messages: Any, kwargs: dict[str, Any]) -> tuple[dict[str, Any], bool]:
        # What tells one request from another; it is the key of DSPy's cache too.
        request = {"model": self.model, "model_type": self.model_type, **self.kwargs, **kwargs}
        request["messages"] = messages or [{"role": "user", "content": prompt}]
        self._warn_zero_temp_rollout(request.get("temperature"), request.get("rollout_id"))
        return request, request.pop("cache", self.cache)

    def _arguments(self, request: dict[str, Any]) -> list[dict[str, Any]]:
        messages, stop = request["messages"], request.get("stop") or ()
        shared = {
            "prompt": text_prompt(messages) if request["model_type"] == "text" else messages,
            "schema": response_schema(request.get("response_format")),
            "stop": [stop] if isinstance(stop, str) else stop,
            **{name: request[name] for name in SAMPLING if request.get(name) is not None},
        }
        return [{**shared, "seed": next_seed(request.get("seed") or 0)} for _ in range(request.get("n") or 1)]

    def _response(self, answers: list[Completion]) -> Any:
        choices = [
            {
                "index": index,
                "finish_reason": answer.finish_reason,
                "message": {"role": "assistant", "content": answer.text},
            }
            for index, answer in enumerate(answers)
        ]
        prompt_tokens = sum(answer.prompt_tokens for answer in answers)
        completion_tokens = sum(answer.completion_tokens for answer in answers)
        usage = litellm.Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
            prompt_tokens_details={"cached_tokens": sum(answer.cached_tokens for answer in answers)},
        )
        return litellm.ModelResponse(model=self.model, choices=choices, usage=usage)

    def _report(self, response: Any) -> Any:
        self._check_truncation(response)
        tracker = dspy.settings.usage_tracker
        if _REPORTS_USAGE and tracker and not getattr(response, "cache_hit", False):
            tracker.add_usage(self.model, dict(response.usage))
        return response

    @contextmanager
    def _dspy_errors(self) -> Iterator[None]:
        try:
            yield
        except ContextOverflowError as error:
            # DSPy's own class begins in 3.1; before, its adapters look for LiteLLM's.
            if hasattr(dspy, "ContextWindowExceededError"):
                raise dspy.ContextWindowExceededError(model=self.model, message=str(error)) from error
            raise litellm.ContextWindowExceededError(str(error), self.model, "llamafile") from error


def _cached(answer: Any) -> Any:
    # The cache's key takes in the function's name, which must not depend on where it is defined.
    answer.__qualname__ = "LocalLM"
    return request_cache(cache_arg_name="request")(answer)


def _announce(model: str) -> None:
    """Tell LiteLLM, which DSPy 3.0 to 3.3 ask, that `model` follows a JSON schema and costs nothing."""
    facts = {"litellm_provider": "llamafile", "mode": "chat", "supports_response_schema": True}
    litellm.register_model({model: {**facts, "input_cost_per_token": 0.0, "output_cost_per_token": 0.0}})
