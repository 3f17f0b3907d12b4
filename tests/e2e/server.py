"""A real server for end-to-end tests: the command line in a process group of its own, on a port of its own."""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
START_TIMEOUT_S = 120
STOP_TIMEOUT_S = 60


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def eventually(holds: Callable[[], bool], what: str, timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.05)


class Server:
    """A command that serves. Its output is read by a thread, so that it never blocks on a full pipe."""

    def __init__(self, command: Sequence[str], port: int, environment: dict[str, str] | None = None) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=os.environ | (environment or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.output = ""
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait_for(self, text: str) -> None:
        """Until a line of the output holds the text."""
        while text not in self.output:
            line = self._lines.get(timeout=START_TIMEOUT_S)
            assert line is not None, f"the server ended early:\n{self.output}"
            self.output += line

    def interrupt(self) -> None:
        """Ctrl-C in a terminal: to every process of the group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def wait(self) -> int:
        """The exit status, once the process has ended by itself. The output is complete then."""
        status = self.process.wait(STOP_TIMEOUT_S)
        self._reader.join(STOP_TIMEOUT_S)
        while (line := self._lines.get(timeout=STOP_TIMEOUT_S)) is not None:
            self.output += line
        return status

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        assert self.process.stdout is not None
        self._reader.join(STOP_TIMEOUT_S)
        self.process.stdout.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(None)


def mixtral_serve(*arguments: str, port: int, environment: dict[str, str] | None = None) -> Server:
    code = "import sys; from deployments.cli import main; sys.exit(main())"
    return Server([sys.executable, "-c", code, "serve", "--port", str(port), *arguments], port, environment)


@contextmanager
def serving(*arguments: str, environment: dict[str, str] | None = None) -> Iterator[Server]:
    """A `mixtral-serve serve` that answers, with anything it prints on failure in the assertion."""
    server = mixtral_serve(*arguments, port=free_port(), environment=environment)
    try:
        server.wait_for("answers at")
        yield server
    finally:
        server.close()
