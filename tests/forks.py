"""Code in processes of its own that have DSPy imported already: a server that imports once and forks for each."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios
import threading
import traceback
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).parent.parent


class Forks:
    """Runs pieces of code, one after the other, each in a fresh process; a failing one is an error."""

    def __enter__(self) -> Forks:
        pipe = subprocess.PIPE
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.forks"], stdin=pipe, stdout=pipe, cwd=ROOT
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.communicate(timeout=60)

    def into_files(self, code: str, directory: Path) -> tuple[str, str]:
        """What the code writes to stdout and to stderr, where both are files."""
        out, err = directory / "stdout", directory / "stderr"
        self._run(code, str(out), str(err))
        return tuple(file.read_bytes().decode() for file in (out, err))  # type: ignore[return-value]

    def on_terminal(self, code: str, columns: int) -> str:
        """What the code writes to a pseudo-terminal, control characters and all."""
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        written: list[bytes] = []
        reader = threading.Thread(target=_read, args=(ours, written))
        reader.start()
        try:
            self._run(code, os.ttyname(theirs), os.ttyname(theirs))
        finally:
            os.close(theirs)
            reader.join(60)
            os.close(ours)
        return b"".join(written).decode()

    def _run(self, code: str, stdout: str, stderr: str) -> None:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps([code, stdout, stderr]).encode() + b"\n")
        self._server.stdin.flush()
        assert self._server.stdout.readline() == b"0\n", "the code failed; its stderr has the cause"


def _read(terminal: int, written: list[bytes]) -> None:
    while True:
        try:
            written.append(os.read(terminal, 65536))
        except OSError:  # Linux says so when the other end is closed
            return
        if not written[-1]:
            return


def _serve() -> None:
    import dspy_opro.reporting.progress  # noqa: F401  # what takes the time

    for line in sys.stdin:
        code, stdout, stderr = json.loads(line)
        process = os.fork()
        if process == 0:
            os._exit(_execute(code, stdout, stderr))
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


def _execute(code: str, stdout: str, stderr: str) -> int:
    for number, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOCTTY), number)
    sys.stdout, sys.stderr = (open(n, "w", encoding="utf-8", buffering=1) for n in (1, 2))  # noqa: SIM115, PTH123
    status = 1
    try:
        exec(code, {})
        status = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    return status


if __name__ == "__main__":
    _serve()
