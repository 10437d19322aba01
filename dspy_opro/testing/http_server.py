"""The simulated server's side of the wire: HTTP/1.1 with keep-alive and the chat completions endpoint.

One rule: everything runs on one event loop without awaiting, so counters need no lock and are exact.
"""

from __future__ import annotations

import asyncio
import json
import time
import traceback
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dspy_opro.testing.accounts import Accounts
from dspy_opro.testing.calls import LMCall, SampleCounter, content_text, count_tokens, render
from dspy_opro.testing.models import Fault, SimulatedModel


class Service:
    """Decides what each request gets."""

    def __init__(self, models: Mapping[str | None, SimulatedModel], seed: int) -> None:
        self.models = dict(models)  # model name -> model; None -> every other name
        self.seed = seed
        self.transports: set[asyncio.Transport] = set()
        self.reset()

    def reset(self) -> None:
        """Zero counters and sample numbers; the models' own faults start anew with their full counts."""
        self.accounts = Accounts()
        self.samples = SampleCounter()
        self.admitted: dict[str | None, deque[float]] = {name: deque() for name in self.models}  # times
        self.faults = {name: _armed(model.faults) for name, model in self.models.items()}

    def key(self, name: str) -> str | None:
        """Under which name the model that answers to this one is kept."""
        return name if name in self.models else None

    def call(self, body: dict[str, Any]) -> LMCall:
        """Read a request."""
        messages = tuple((str(m["role"]), content_text(m.get("content"))) for m in body["messages"])
        call = LMCall(body["model"], messages, body.get("temperature"), body.get("seed"), request=body)
        return self.samples.number(call)

    def fault(self, call: LMCall) -> Fault | None:
        """The fault that strikes this call; its count goes down."""
        armed = self.faults[self.key(call.model)]
        for position, (fault, left) in enumerate(armed):
            if left != 0 and fault.strikes(call, self.seed):
                armed[position] = (fault, None if left is None else left - 1)
                return fault
        return None

    def excess(self, call: LMCall) -> Fault | None:
        """The answer to a call beyond the model's rate limit."""
        key = self.key(call.model)
        limit, admitted, now = self.models[key].rate_limit, self.admitted[key], time.monotonic()
        if limit is None:
            return None
        while admitted and admitted[0] <= now - limit.seconds:
            admitted.popleft()
        if len(admitted) < limit.num_requests:
            admitted.append(now)
            return None
        return Fault(status=429, retry_after_seconds=admitted[0] + limit.seconds - now)

    def inject(self, name: str | None, faults: tuple[Fault, ...]) -> None:
        """Replace the faults of a model, or of all."""
        for key in self.models if name is None else [self.key(name)]:
            self.faults[key] = _armed(faults)

    def completion(self, call: LMCall, texts: list[str]) -> dict[str, Any]:
        """The body of a successful answer with one choice per text."""
        prompt_tokens, completion_tokens = count_tokens(call.prompt), sum(map(count_tokens, texts))
        self.accounts.completed(call.model, prompt_tokens, completion_tokens)
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
        choices = [
            {"index": i, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
            for i, text in enumerate(texts)
        ]
        body = {"id": "simulated", "object": "chat.completion", "created": 0, "model": call.model}
        reply = {**body, "choices": choices}
        if self.models[self.key(call.model)].sends_usage:
            reply["usage"] = {**usage, "total_tokens": prompt_tokens + completion_tokens}
        return reply

    def texts(self, call: LMCall) -> list[str]:
        """One completion for each of the `n` that the request asks for."""
        model, wanted = self.models[self.key(call.model)], call.request.get("n") or 1
        calls = [call] + [self.samples.number(replace(call, sample=0)) for _ in range(wanted - 1)]
        return [render(model.answer(each), each) for each in calls]


class Connection(asyncio.Protocol):
    """One client connection: parses requests one after the other and answers each before the next."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.buffer = b""
        self.pending: tuple[Accounts, str, asyncio.TimerHandle | None] | None = None  # the request in service

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client has connected."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.service.transports.add(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """The client, or a fault, has closed the connection; what was in service is abandoned."""
        self.service.transports.discard(self.transport)
        if self.pending is not None:
            accounts, model, timer = self.pending
            if timer is not None:
                timer.cancel()
            accounts.left(model, abandoned=True)
            self.pending = None

    def data_received(self, data: bytes) -> None:
        """Some bytes have arrived; a request may span several of these calls."""
        self.buffer += data
        if self.pending is None:
            self._next()

    def _next(self) -> None:
        head, found, rest = self.buffer.partition(b"\r\n\r\n")
        if not found:
            return
        line, *headers = head.decode("latin-1").split("\r\n")
        fields = {name.lower(): value.strip() for name, _, value in (h.partition(":") for h in headers)}
        length = int(fields.get("content-length", 0))
        if len(rest) < length:
            return
        self.buffer = rest[length:]
        method, path = line.split(" ")[:2]
        try:
            self._route(method, path, rest[:length])
        except Exception as error:  # a broken request or answer function must reach the client, not a log
            self._fail(400, error)

    def _route(self, method: str, path: str, body: bytes) -> None:
        match method, path:
            case "POST", "/v1/chat/completions":
                self._complete(json.loads(body))
            case "GET", "/v1/models":
                names = [name for name in self.service.models if name is not None]
                data = [{"id": name, "object": "model"} for name in names]
                self._send(200, {"object": "list", "data": data})
            case "GET", "/stats":
                self._send(200, self.service.accounts.snapshot())
            case "POST", "/reset":
                self.service.reset()
                self._send(200, {})
            case "POST", "/faults":
                order = json.loads(body)
                self.service.inject(order["model"], tuple(Fault(**fault) for fault in order["faults"]))
                self._send(200, {})
            case _:
                self._send(404, _error(f"no such endpoint: {method} {path}"))

    def _complete(self, body: dict[str, Any]) -> None:
        service = self.service
        if service.key(body["model"]) not in service.models:
            self._send(404, _error(f"the model {body['model']!r} does not exist"))
            return
        call = service.call(body)
        accounts = service.accounts
        accounts.entered(call.model)
        self.pending = (accounts, call.model, None)
        fault = service.excess(call) or service.fault(call)
        if fault is not None:
            accounts.faulted(call.model, fault.kind)
        if fault is not None and fault.kind != "malformed_answer":
            self._fault(fault)
            return
        seconds = service.models[service.key(call.model)].latency.seconds(call, service.seed)
        if seconds > 0:
            timer = asyncio.get_running_loop().call_later(seconds, self._answer, call, fault)
            self.pending = (accounts, call.model, timer)
        else:
            self._answer(call, fault)

    def _answer(self, call: LMCall, fault: Fault | None) -> None:
        try:
            texts = ["I would rather not fill in any fields today."] if fault else self.service.texts(call)
            reply = self.service.completion(call, texts)
        except Exception as error:
            self.service.accounts.faulted(call.model, "error", traceback.format_exc())
            self._fail(500, error)
            return
        self._send(200, reply)

    def _fault(self, fault: Fault) -> None:
        if fault.kind == "status":
            wait = fault.retry_after_seconds
            header = "" if wait is None else f"Retry-After: {wait:g}\r\n"
            self._send(fault.status, _error(f"simulated status {fault.status}"), header)
        elif fault.kind == "malformed_json":
            self._send(200, b'{"id": "simulated", "choices": [{"mess')
        elif fault.kind == "reset":
            self._leave()
            self.transport.abort()
        # "hang": the request stays in service until the client gives up

    def _fail(self, status: int, error: Exception) -> None:
        self._send(status, _error(f"{type(error).__name__}: {error}"))

    def _leave(self) -> None:
        if self.pending is not None:
            accounts, model, _ = self.pending
            accounts.left(model)
            self.pending = None

    def _send(self, status: int, body: dict[str, Any] | bytes, header: str = "") -> None:
        # Left before written: a client that has its answer reads counters that include it.
        self._leave()
        payload = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = f"HTTP/1.1 {status} \r\nContent-Type: application/json\r\n{header}"
        self.transport.write(f"{head}Content-Length: {len(payload)}\r\n\r\n".encode() + payload)
        if self.buffer:
            asyncio.get_running_loop().call_soon(self._resume)

    def _resume(self) -> None:
        if self.pending is None and not self.transport.is_closing():
            self._next()


async def serve(service: Service) -> asyncio.Server:
    """Listen on a free port of the loopback interface."""
    loop = asyncio.get_running_loop()
    return await loop.create_server(lambda: Connection(service), "127.0.0.1", 0, backlog=1024)


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "simulated", "code": None}}


def _armed(faults: tuple[Fault, ...]) -> list[tuple[Fault, int | None]]:
    return [(fault, fault.count) for fault in faults]  # (fault, how many strikes are left)
