"""A real server for end-to-end tests: the command line in a process group of its own, on a port of its own."""

from __future__ import annotations

import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

if TYPE_CHECKING:
    import openai

REPOSITORY = Path(__file__).parents[2]
START_TIMEOUT_S = 120
STOP_TIMEOUT_S = 60
RUN_TIMEOUT_S = 180  # of a command that ends by itself
# Ray's own is 15: whatever else is tested at the time would starve the servers.
ENVIRONMENT = {"RAY_worker_niceness": "0"}


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


def answers(url: str) -> bool:
    try:
        # To verify means to read all certificates first, for each try anew, which takes longer than the answer.
        return httpx.get(url, timeout=10, verify=False).status_code == 200
    except httpx.TransportError:
        return False


class Server:
    """A command that serves. Its output is read by a thread, so that it never blocks on a full pipe."""

    def __init__(
        self, command: Sequence[str], port: int, environment: dict[str, str] | None = None, key: str = "none"
    ) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.key = key  # what its clients send
        self.process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=os.environ | ENVIRONMENT | (environment or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.output = ""
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def client(self, path: str = "/v1") -> openai.OpenAI:
        import openai  # tests/cluster takes only what is above from here

        return openai.OpenAI(api_key=self.key, base_url=self.url + path, max_retries=0, timeout=120)

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

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
        status = self.process.wait(RUN_TIMEOUT_S)
        self._reader.join(STOP_TIMEOUT_S)
        while not self._lines.empty():
            self.output += self._lines.get() or ""
        return status

    def processes(self) -> dict[int, str]:
        """What still runs of its session, by process id; zombies have ended."""
        lines = subprocess.run(["ps", "-eo", "sess=,pid=,stat=,args="], capture_output=True, text=True, check=True)
        rows = [line.split(None, 3) for line in lines.stdout.splitlines()]
        return {int(row[1]): row[3] for row in rows if row[0] == str(self.process.pid) and not row[2].startswith("Z")}

    def belongings(self) -> set[Path]:
        """Its directory of logs and sockets, and the shared memory that its processes have mapped."""
        found: set[str] = set()
        for pid, command in self.processes().items():
            try:
                maps = Path(f"/proc/{pid}/maps").read_text()
            except OSError:  # it has just ended
                continue
            found.update(re.findall(r"/tmp/mixtral-\w+|/dev/shm/[^\s(]+", command + maps))
        return set(map(Path, found))

    def leaves_nothing(self, belongings: set[Path]) -> bool:
        return not self.processes() and not any(path.exists() for path in belongings)

    def stop(self) -> None:
        """As Kubernetes or a shell ends it: it takes itself away completely, and has nothing to complain about."""
        belongings = self.belongings()
        self.process.terminate()
        assert self.wait() == 0, self.output
        assert "Traceback" not in self.output
        eventually(lambda: self.leaves_nothing(belongings), "everything ended and was taken away")

    def close(self) -> None:
        """However it went."""
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


def mixtral_serve(*arguments: str, environment: dict[str, str] | None = None, key: str = "none") -> Server:
    code = "import sys; from deployments.cli import main; sys.exit(main())"
    port = free_port()
    return Server([sys.executable, "-c", code, "serve", "--port", str(port), *arguments], port, environment, key)
