"""Real servers for the tests, each started for them alone and on a port of its own; skipped where none can be."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dspy_opro.testing import SimulatedServer
from tests.runs import serve


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def find(program: str) -> str | None:
    """A program, where Debian or others put it."""
    places = [os.environ.get("PATH", ""), *map(str, Path("/usr/lib/postgresql").glob("*/bin")), "/usr/sbin"]
    return shutil.which(program, path=os.pathsep.join(places))


def as_user(name: str, directory: Path) -> list[str]:
    """What comes before a command that refuses to be run by root; the directory becomes the user's."""
    if os.geteuid() != 0:
        return []
    shutil.chown(directory, name)
    return ["runuser", "-u", name, "--"]


def need_driver(*modules: str) -> None:
    """Skip where none of these packages is installed."""
    if not any(importlib.util.find_spec(module) for module in modules):
        pytest.skip(f"{' or '.join(modules)} is not installed")


def wait_for_port(port: int, process: subprocess.Popen[Any], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise RuntimeError(f"{process.args!r} does not listen on port {port}")


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """The URL of a database of its own."""
    need_driver("psycopg", "psycopg2")
    initdb, postgres = find("initdb"), find("postgres")
    if initdb is None or postgres is None:
        pytest.skip("PostgreSQL is not installed (Debian: postgresql)")
    with tempfile.TemporaryDirectory(prefix="postgresql-") as name:
        home, port = Path(name), free_port()
        before, data = as_user("postgres", home), f"{name}/data"
        initialize = [initdb, "-D", data, "-U", "postgres", "--auth=trust", "--no-sync", "--encoding=UTF8"]
        subprocess.run([*before, *initialize], check=True, capture_output=True, cwd=home)
        options = ["-D", data, "-p", str(port), "-k", name, "-h", "127.0.0.1"]
        process = subprocess.Popen([*before, postgres, *options], stderr=subprocess.DEVNULL, cwd=home)
        try:
            wait_for_port(port, process)
            yield f"postgresql://postgres@127.0.0.1:{port}/postgres"
        finally:
            process.terminate()
            process.wait(30)


@pytest.fixture(scope="session")
def redis() -> Iterator[str]:
    """The URL of a server that keeps everything in memory."""
    need_driver("redis")
    program = find("redis-server")
    if program is None:
        pytest.skip("Redis is not installed (Debian: redis-server)")
    port = free_port()
    options = ["--port", str(port), "--save", "", "--appendonly", "no", "--bind", "127.0.0.1"]
    process = subprocess.Popen([program, *options], stdout=subprocess.DEVNULL)
    try:
        wait_for_port(port, process)
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="session")
def mysql() -> Iterator[str]:
    """The URL of a MariaDB database of its own."""
    need_driver("pymysql")
    install, server = find("mariadb-install-db"), find("mariadbd")
    if install is None or server is None:
        pytest.skip("MariaDB is not installed (Debian: mariadb-server)")
    with tempfile.TemporaryDirectory(prefix="mariadb-") as name:
        home, port = Path(name), free_port()
        before, data = as_user("mysql", home), f"{name}/data"
        initialize = [
            install,
            "--no-defaults",
            f"--datadir={data}",
            "--auth-root-authentication-method=normal",
        ]
        subprocess.run([*before, *initialize, "--skip-test-db"], check=True, capture_output=True, cwd=home)
        places = [f"--datadir={data}", f"--socket={name}/socket", f"--pid-file={name}/pid"]
        command = [server, "--no-defaults", *places, f"--port={port}", "--bind-address=127.0.0.1"]
        process = subprocess.Popen([*before, *command], stderr=subprocess.DEVNULL, cwd=home)
        try:
            wait_for_port(port, process)
            _create_database(port)
            yield f"mysql+pymysql://root@127.0.0.1:{port}/opro"
        finally:
            process.terminate()
            process.wait(60)


def _create_database(port: int) -> None:
    import pymysql

    with (
        pymysql.connect(host="127.0.0.1", port=port, user="root") as connection,
        connection.cursor() as cursor,
    ):
        cursor.execute("CREATE DATABASE opro")


@pytest.fixture(scope="session")
def grpc_proxy(postgresql: str) -> Iterator[int]:
    """The port of Optuna's gRPC proxy in front of PostgreSQL."""
    pytest.importorskip("grpc", reason="grpcio is not installed")
    storages = pytest.importorskip("optuna.storages")
    if not hasattr(storages, "run_grpc_proxy_server"):
        pytest.skip("Optuna has its gRPC proxy from 4.2 on")
    port = free_port()
    code = (
        "import sys, optuna; optuna.storages.run_grpc_proxy_server("
        "optuna.storages.RDBStorage(sys.argv[1]), host='127.0.0.1', port=int(sys.argv[2]))"
    )
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code, postgresql, str(port)])
    try:
        wait_for_port(port, process)
        yield port
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def shared() -> Iterator[SimulatedServer]:
    """A simulated server for all tests of a file."""
    with serve() as server:
        yield server


@pytest.fixture
def server(shared: SimulatedServer) -> SimulatedServer:
    """The file's server, without faults and with its counters at zero."""
    shared.inject()
    shared.reset()
    return shared
