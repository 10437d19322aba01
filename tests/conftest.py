"""No test sees another test's DSPy settings or cache, the user's files, or a network beyond this machine."""

from __future__ import annotations

import os
import tempfile

# DSPy and litellm read these once, when they are imported.
os.environ["DSPY_CACHEDIR"] = tempfile.mkdtemp(prefix="dspy-cache-")
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
os.environ["HF_HUB_OFFLINE"] = "1"

import atexit
import copy
import importlib
import ipaddress
import shutil
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dspy
import hypothesis
import pytest

# The helpers beside this file are imported by their names, in child processes too.
sys.path.insert(0, str(Path(__file__).parent))
pytest_plugins = ["servers"]

# By its name: `dspy.dsp.utils.settings`, read as an attribute, is the object and not the module.
dspy_settings = importlib.import_module("dspy.dsp.utils.settings")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Started in the background by a shell: its children would ignore Ctrl-C too, which some tests send them.
    signal.signal(signal.SIGINT, signal.default_int_handler)

atexit.register(shutil.rmtree, os.environ["DSPY_CACHEDIR"], ignore_errors=True)

# The machine's load is not what the properties are about, and CI draws the same examples every time.
hypothesis.settings.register_profile("dev", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.fixture(autouse=True)
def fresh_dspy() -> Iterator[None]:
    """Every test starts from DSPy's defaults, with an empty cache in memory and none on disk."""
    dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=True)
    yield
    # `dspy.configure` neither forgets keys nor lets another thread or task set them than the first one did
    # (DSPy 3.0 to 3.4), so a test that configures would leave its mark on the next.
    dspy_settings.main_thread_config.clear()
    dspy_settings.main_thread_config.update(copy.deepcopy(dspy_settings.DEFAULT_CONFIG))
    dspy_settings.config_owner_thread_id = None
    dspy_settings.config_owner_async_task = None


@pytest.fixture(autouse=True, scope="session")
def loopback_only() -> Iterator[None]:
    """A connection to anywhere but this machine is an error in the test that asks for it."""
    patch = pytest.MonkeyPatch()
    for name in ("connect", "connect_ex"):
        patch.setattr(socket.socket, name, _guarded(getattr(socket.socket, name)))
    yield
    patch.undo()


def _guarded(connect: Any) -> Any:
    def guarded(self: socket.socket, address: Any) -> Any:
        if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_loopback(str(address[0])):
            pytest.fail(f"The tests stay on this machine, but {address} was asked for.")
        return connect(self, address)

    return guarded


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return host == "localhost"
