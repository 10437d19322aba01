"""Runs one GGUF model: text or messages in, text and token counts out; nothing here knows DSPy."""

from __future__ import annotations

import asyncio
import atexit
import ctypes
import os
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from .schema import check_answer, constraint, unsupported
from .server import Server, cores


class ContextOverflowError(ValueError):
    """A request that does not fit into the model's context."""


@dataclass(frozen=True)
class Completion:
    """One answer of the model."""

    text: str
    finish_reason: str
    """`"stop"`, or `"length"` where `max_tokens` ended the answer."""
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    """Of the prompt's tokens, those taken from the request before instead of computed."""


class LlamaModel:
    """A loaded GGUF model that answers from any thread, the same request and seed always with the same answer.

    Args:
        path: The GGUF file.
        n_ctx: Tokens that prompt and answer may have together; `None` takes what the model was trained for.
        n_parallel: Requests computed at the same time. Each has the weights in memory for itself: llama.cpp can share
            them, but then computes in one loop, and an answer would depend on what is computed beside it.
        n_threads: Threads that compute one token; `None` shares the machine's cores among the `n_parallel`.
        cache_prompt: Whether the beginning that a prompt shares with the one before is taken from memory.
        verbose: Whether llama.cpp writes its log to stderr.
        llama_params: More of llama.cpp's parameters, by their names in `xllamacpp.CommonParams`.

    Raises:
        ImportError: If xllamacpp is not installed.
        RuntimeError: If llama.cpp can't load the file.
    """

    _is_ending: bool
    _changed: threading.Condition
    _servers: list[Server]
    _idle: list[Server]
    _pool: ThreadPoolExecutor

    def __init__(
        self,
        path: str | Path,
        *,
        n_ctx: int | None = 4096,
        n_parallel: int = 1,
        n_threads: int | None = None,
        cache_prompt: bool = True,
        verbose: bool = False,
        llama_params: Mapping[str, Any] | None = None,
    ) -> None:
        for name, value in (("n_ctx", n_ctx), ("n_parallel", n_parallel), ("n_threads", n_threads)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, but got {value}.")
        self.path = Path(path)
        self.n_parallel = n_parallel
        self.cache_prompt = cache_prompt
        self._start = partial(
            Server,
            self.path,
            n_ctx=n_ctx,
            n_threads=n_threads or max(1, cores() // n_parallel),
            verbose=verbose,
            llama_params=llama_params or {},
        )
        self._closed = False
        self._reset()
        self._load()

    def complete(
        self,
        prompt: str | Sequence[Mapping[str, Any]],
        *,
        schema: Mapping[str, Any] | None = None,
        temperature: float = 0.0,
        seed: int = 0,
        max_tokens: int | None = 256,
        stop: Sequence[str] = (),
        **sampling: Any,
    ) -> Completion:
        """Answer one request.

        Args:
            prompt: Messages (dicts with `role` and `content`), which go through the model's chat template, or a
                text, which the model continues as it stands.
            schema: A JSON schema that the answer is made to follow, token by token.
            temperature: 0 takes the likeliest token each time.
            seed: Another seed gives another sample.
            max_tokens: The most tokens the answer may have; `None` lets the context decide.
            stop: Strings before which the answer ends.
            sampling: More of llama.cpp's sampling parameters, e.g. `top_p`, `top_k`, `min_p`.

        Raises:
            ContextOverflowError: If the prompt, or prompt and answer, do not fit into the context.
            UnsupportedSchemaError: If llama.cpp can't hold an answer to `schema`.
            RuntimeError: If llama.cpp refuses the request, or the model was closed.
        """
        text = prompt if isinstance(prompt, str) else _joined(prompt)
        request: dict[str, Any] = {**sampling, "temperature": temperature, "seed": seed}
        request |= {"prompt": prompt} if isinstance(prompt, str) else {"messages": [dict(m) for m in prompt]}
        request |= {} if max_tokens is None else {"max_tokens": max_tokens}
        request |= {"stop": list(stop)} if stop else {}
        request |= {} if schema is None else constraint(schema)
        with self._idle_server(text) as server:
            try:
                answer = server.answer(request, text, self.cache_prompt)
            except ValueError as error:
                # So llama.cpp says that it can't make a grammar of a schema.
                if schema is None:
                    raise
                raise unsupported(schema, error) from error
        completion = self._read(answer, max_tokens)
        if schema is not None:
            check_answer(completion.text, schema, is_whole=completion.finish_reason == "stop")
        return completion

    async def acomplete(self, prompt: str | Sequence[Mapping[str, Any]], **options: Any) -> Completion:
        """The same as `complete`, for `await`: the request waits in a thread of the model's own."""
        self._load()
        return await asyncio.get_running_loop().run_in_executor(
            self._pool, partial(self.complete, prompt, **options)
        )

    def close(self) -> None:
        """Free the weights once the requests under way are answered; a later request is an error."""
        with self._changed:
            self._closed = True
            self._servers = [server for server in self._servers if server not in self._idle]
            self._idle = []
            self._changed.notify_all()
        self._pool.shutdown(wait=False)

    def __enter__(self) -> LlamaModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __copy__(self) -> LlamaModel:
        return self

    def __deepcopy__(self, memo: object) -> LlamaModel:
        # DSPy copies LMs freely; the weights are read only and shared.
        return self

    def __getstate__(self) -> dict[str, Any]:
        names = ("path", "n_parallel", "cache_prompt", "_start", "_closed")
        return {name: self.__dict__[name] for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def _reset(self) -> None:
        _MODELS.add(self)
        self._is_ending = False
        self._changed = threading.Condition()
        self._servers = []
        self._idle = []
        self._pool = ThreadPoolExecutor(self.n_parallel + 1, thread_name_prefix="LlamaModel")

    def _load(self) -> None:
        with self._changed:
            if self._closed:
                raise RuntimeError(f"The model {self.path.name} was closed; make a new one to go on.")
            if not self._servers:
                self._servers = [self._start() for _ in range(self.n_parallel)]
                self._idle = list(self._servers)

    @contextmanager
    def _idle_server(self, text: str) -> Iterator[Server]:
        self._load()
        with self._changed:
            self._changed.wait_for(lambda: self._closed or (self._idle and not self._is_ending))
            if self._closed:
                raise RuntimeError(f"The model {self.path.name} was closed while a request waited.")
            server = max(self._idle, key=lambda server: server.shared(text))
            self._idle.remove(server)
        try:
            yield server
        finally:
            with self._changed:
                if self._closed:
                    self._servers.remove(server)
                else:
                    self._idle.append(server)
                self._changed.notify_all()

    def _end(self) -> None:
        """Free the servers before the interpreter ends: llama.cpp crashes where its threads outlive it.

        Whoever waits goes on waiting: a daemon thread that got an error now would print it.
        """
        with self._changed:
            self._is_ending = True
            self._changed.wait_for(lambda: len(self._idle) == len(self._servers))
            self._servers, self._idle = [], []

    def _read(self, answer: Mapping[str, Any], max_tokens: int | None) -> Completion:
        if "error" in answer:
            raise self._refusal(answer["error"])
        choice, usage = answer["choices"][0], answer["usage"]
        completion = Completion(
            text=choice["text"] if "text" in choice else choice["message"].get("content") or "",
            finish_reason=choice["finish_reason"],
            prompt_tokens=usage["prompt_tokens"],
            completion_tokens=usage["completion_tokens"],
            cached_tokens=usage.get("prompt_tokens_details", {}).get("cached_tokens", 0),
        )
        if completion.finish_reason == "length" and completion.completion_tokens != max_tokens:
            raise ContextOverflowError(
                f"The context ended the answer: {completion.prompt_tokens} tokens of prompt left room for "
                f"{completion.completion_tokens} of max_tokens={max_tokens}. Make n_ctx larger or the prompt shorter."
            )
        return completion

    def _refusal(self, error: Mapping[str, Any]) -> Exception:
        if error.get("type") == "exceed_context_size_error":
            return ContextOverflowError(
                f"The prompt has {error['n_prompt_tokens']} tokens, but the context of {self.path.name} holds "
                f"n_ctx={error['n_ctx']}. Make n_ctx larger or the prompt shorter."
            )
        return RuntimeError(f"llama.cpp refused the request: {error.get('message', error)}")


_MODELS: weakref.WeakSet[LlamaModel] = weakref.WeakSet()
"""All that there are in this process."""


@atexit.register
def _end_all() -> None:
    for model in list(_MODELS):
        model._end()


def _begin_child() -> None:
    """A forked child has the memory of the servers but not their threads: they would never answer, nor end."""
    for model in list(_MODELS):
        for server in model._servers:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(server))  # so that it is never freed
        model._reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_child)


def _joined(messages: Sequence[Mapping[str, Any]]) -> str:
    # Tells any two conversations apart, and begins the same where they do.
    return "".join(f"{message['role']}\0{message['content']}\1" for message in messages)
