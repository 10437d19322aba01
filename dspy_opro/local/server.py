"""One llama.cpp server with one slot: the only file that touches xllamacpp.

llama.cpp computes a prompt faster where it shares its beginning with the request before. With flash attention off and
keys and values in 32 bit an answer is, bit for bit, the same with that cache as without, as long as what is reused was
computed as part of a prompt and at least two tokens are left to compute: single tokens take other kernels, which round
differently. `Server` keeps to these conditions, so that an answer does not depend on what was asked before.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_MIN_NEW_CHARACTERS = 16
"""So many characters are two tokens or more."""


class Server:
    """A loaded model that answers one request at a time.

    Args:
        path: The GGUF file.
        n_ctx: Tokens of context; `None` takes what the model was trained for.
        n_threads: Threads that compute one token.
        verbose: Whether llama.cpp writes its log to stderr.
        llama_params: More attributes of llama.cpp's `common_params`.

    Raises:
        ImportError: If xllamacpp is not installed.
        RuntimeError: If llama.cpp can't load the file.
        ValueError: If `llama_params` has a name that llama.cpp does not know.
    """

    def __init__(
        self, path: Path, *, n_ctx: int | None, n_threads: int, verbose: bool, llama_params: Mapping[str, Any]
    ) -> None:
        self._previous = ""
        self._server = _start(path, n_ctx, n_threads, verbose, llama_params)
        # A server that is freed before its loop has begun never ends (xllamacpp 2026.10); an answer proves it has.
        self.answer({"prompt": "Hello", "max_tokens": 1}, "Hello", cache_prompt=False)

    def shared(self, text: str) -> int:
        """The characters at the beginning of `text` that the request before began with; 0 if it was refused."""
        low, high = 0, min(len(text), len(self._previous))
        while low < high:
            middle = (low + high + 1) // 2
            if text[:middle] == self._previous[:middle]:
                low = middle
            else:
                high = middle - 1
        return low

    def answer(self, request: Mapping[str, Any], text: str, cache_prompt: bool) -> dict[str, Any]:
        """llama.cpp's answer to `request`, which has `messages` or a `prompt` and whose whole prompt is `text`."""
        shared = self.shared(text)
        # Beyond the end of the request before lies its answer, which was computed token by token.
        reuse = cache_prompt and shared < len(self._previous) and len(text) - shared >= _MIN_NEW_CHARACTERS
        self._previous = ""  # a refused request leaves in memory what was there, an earlier answer included
        ask = (
            self._server.handle_chat_completions if "messages" in request else self._server.handle_completions
        )
        answer: dict[str, Any] = ask({**request, "cache_prompt": reuse})
        if "error" not in answer:
            self._previous = text
        return answer


def cores() -> int:
    """The processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _start(
    path: Path, n_ctx: int | None, n_threads: int, verbose: bool, llama_params: Mapping[str, Any]
) -> Any:
    try:
        import xllamacpp
    except ImportError as error:
        raise ImportError(
            "LocalLM needs xllamacpp (llama.cpp as a prebuilt wheel): `pip install 'dspy-opro[local]'`."
        ) from error
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx = n_ctx or 0
    params.n_parallel = 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = n_threads
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    # llama.cpp would bring back older prompts together with their answers.
    params.cache_ram_mib = 0
    # Plain reading: mapped into memory, the first requests wait for the disk page by page.
    params.load_mode = xllamacpp.llama_load_mode.LLAMA_LOAD_MODE_NONE
    params.fit_params = params.warmup = False
    params.verbosity = 3 if verbose else -1
    # xllamacpp always opens a port on loopback; a random key keeps it shut for others.
    params.api_keys = [secrets.token_hex(16)]
    params.ui = params.endpoint_slots = False
    for name, value in llama_params.items():
        if not hasattr(params, name):
            raise ValueError(
                f"llama_params must name attributes of xllamacpp.CommonParams, but got {name!r}."
            )
        setattr(params, name, value)
    try:
        return xllamacpp.Server(params)
    except RuntimeError as error:
        raise RuntimeError(
            f"llama.cpp could not load {path} with n_ctx={n_ctx}: the file is damaged or of a kind it does not know, "
            "or there is too little memory. verbose=True shows its log."
        ) from error
