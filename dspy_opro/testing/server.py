"""An OpenAI-compatible server on the loopback interface, for tests and benchmarks.

One rule: the client sees nothing but HTTP; LMs are real `dspy.LM`s and figures are read over the wire.
"""

from __future__ import annotations

import asyncio
import json
import pickle
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import dspy

from dspy_opro.testing.accounts import ModelStats, ServerStats, read
from dspy_opro.testing.calls import Answer
from dspy_opro.testing.http_server import Service, serve
from dspy_opro.testing.models import Fault, SimulatedModel

__all__ = ["ModelStats", "ServerStats", "SimulatedServer"]


class SimulatedServer:
    """Serves simulated models until the `with` block ends.

    Args:
        models: Model name -> `SimulatedModel`, or an answer function for a model without latency and faults. One of
            these two alone answers under every name.
        seed: Decides latencies and faults.
        own_process: Whether the server runs in a process of its own, so that it does not slow down the client. The
            models must then be picklable. With False it runs in a thread and takes lambdas.

    Example:
        ```python
        with SimulatedServer(lambda call: {"answer": "4"}, own_process=False) as server:
            with dspy.context(lm=server.lm("scorer")):
                dspy.Predict("question -> answer")(question="2 + 2")
            assert server.stats()["scorer"].completions == 1
        ```
    """

    def __init__(
        self,
        models: Mapping[str, SimulatedModel | Answer] | SimulatedModel | Answer,
        *,
        seed: int = 0,
        own_process: bool = True,
    ) -> None:
        named: Mapping[Any, Any] = models if isinstance(models, Mapping) else {None: models}
        self.models: dict[str | None, SimulatedModel] = {
            name: model if isinstance(model, SimulatedModel) else SimulatedModel(model)
            for name, model in named.items()
        }
        self.seed = seed
        self.own_process = own_process
        self.port = 0
        """The TCP port. It is 0 while the server is not running."""

    @property
    def url(self) -> str:
        """The server's address."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def api_base(self) -> str:
        """What an OpenAI client takes as its base address."""
        return f"{self.url}/v1"

    def lm(self, name: str = "scorer", **kwargs: Any) -> dspy.LM:
        """A real `dspy.LM` that talks to this server.

        Args:
            name: The model's name on the server.
            **kwargs: As for `dspy.LM`. `cache` is off by default: DSPy's cache does not tell servers apart, so one
                test would get the answers of another.
        """
        kwargs = {"api_base": self.api_base, "api_key": "unused", "cache": False, **kwargs}
        return dspy.LM(f"openai/{name}", **kwargs)

    def stats(self) -> ServerStats:
        """The counters at this instant."""
        return read(self._control("GET", "/stats"))

    def reset(self) -> None:
        """Set all counters and sample numbers to 0, and give each model its own faults again."""
        self._control("POST", "/reset", {})

    def inject(self, *faults: Fault, model: str | None = None) -> None:
        """From now on calls fail with these faults, which replace the earlier ones. Without faults no call fails.

        Args:
            *faults: The first one that fits a call decides how it fails.
            model: The model's name. None means all models.

        Raises:
            ValueError: The server has no such model.
        """
        if model not in {None, *self.models} and None not in self.models:
            known = ", ".join(sorted(map(repr, self.models)))
            raise ValueError(f"model must be one of {known}, but got {model!r}.")
        self._control("POST", "/faults", {"model": model, "faults": [asdict(fault) for fault in faults]})

    def _control(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data=data, method=method)
        # No proxy of the environment may come between.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=30) as response:
            return json.loads(response.read())

    def start(self) -> SimulatedServer:
        """Start the server and wait until its port is open. `with` does this."""
        if self.port:
            raise RuntimeError("the server is running already.")
        self.port = self._start_process() if self.own_process else self._start_thread()
        return self

    def stop(self) -> None:
        """Close all connections and end the process or thread. `with` does this."""
        if not self.port:
            return
        self.port = 0
        if self.own_process:
            self._process.terminate()
            self._process.communicate()
        else:
            self._loop.call_soon_threadsafe(self._stopped.set)
            self._thread.join()

    def __enter__(self) -> SimulatedServer:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _start_process(self) -> int:
        try:
            task = pickle.dumps((self.models, self.seed))
        except Exception as error:
            raise ValueError(f"models must be picklable ({error}); or pass own_process=False.") from error
        if b"__main__" in task:
            raise ValueError(
                "models must not be defined in __main__, which the server's process does not import; "
                "move them into a module or pass own_process=False."
            )
        child = Path(__file__).with_name("child.py")
        pipe = subprocess.PIPE
        process = subprocess.Popen([sys.executable, str(child)], stdin=pipe, stdout=pipe, text=True)
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{json.dumps(sys.path)}\n{task.hex()}\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            process.communicate()
            raise RuntimeError(f"the server's process ended with status {process.returncode}; see above.")
        self._process = process
        return int(line)

    def _start_thread(self) -> int:
        started: Future[int] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run(started)), daemon=True)
        self._thread.start()
        return started.result()

    async def _run(self, started: Future[int]) -> None:
        try:
            self._loop, self._stopped = asyncio.get_running_loop(), asyncio.Event()
            service = Service(self.models, self.seed)
            server = await serve(service)
        except BaseException as error:
            started.set_exception(error)
            raise
        started.set_result(server.sockets[0].getsockname()[1])
        await self._stopped.wait()
        server.close()
        for transport in list(service.transports):
            transport.abort()
        await asyncio.sleep(0)  # closing a transport takes one turn of the loop
