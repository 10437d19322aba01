"""The process of a simulated server: reads its task from standard input, writes its port, and serves.

One rule: it lives no longer than its parent; end of file on standard input ends it.

It is run by path and not as a module of the package, because importing the package imports DSPy, which takes
seconds, and the server needs nothing of it.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import pickle
import sys
import types
from typing import Any


class _Postponed(types.ModuleType):
    """A package whose `__init__` runs when a name of it is needed; its submodules can be imported at once."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or f"{self.__name__}.{name}" in sys.modules:
            raise AttributeError(name)
        spec = self.__spec__
        assert spec is not None
        assert spec.loader is not None
        self.__class__ = types.ModuleType  # type: ignore[assignment]
        spec.loader.exec_module(self)
        return getattr(self, name)


def postpone(package: str) -> None:
    """Let submodules of `package` be imported without running its `__init__`."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    module = _Postponed(package)
    module.__spec__ = spec
    module.__path__ = list(spec.submodule_search_locations or [])
    module.__package__, module.__file__ = package, spec.origin
    sys.modules[package] = module


async def main() -> None:
    """Serve what the second line of standard input describes."""
    from dspy_opro.testing.http_server import Service, serve

    models, seed = pickle.loads(bytes.fromhex(sys.stdin.readline()))
    server = await serve(Service(models, seed))
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    sys.path[:] = json.loads(sys.stdin.readline())
    postpone("dspy_opro")
    postpone("dspy_opro.testing")
    asyncio.run(main())
