"""The servers that a run of tests needs, each started once, two at a time, while tests that need none go on.

Starting one takes seconds, half of which it waits; a run needs half a dozen of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from tests.e2e.server import Server

AT_ONCE = 2


def _answers(server: Server) -> None:
    server.wait_for("answers at")


@dataclass(frozen=True)
class Kind:
    start: Callable[[], Server]
    until: Callable[[Server], object] = _answers  # returns when tests may have it


class Fleet:
    def __init__(self, kinds: Mapping[str, Kind]) -> None:
        self._servers: list[Server] = []
        self._threads = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="fleet")
        self._ready: dict[str, Future[Server]] = {
            name: self._threads.submit(self._start, kind) for name, kind in kinds.items()
        }

    def __getitem__(self, name: str) -> Server:
        return self._ready[name].result()

    def end(self) -> None:
        """Those that no test has ended; each must leave nothing behind."""
        self._threads.shutdown(cancel_futures=True)
        with ThreadPoolExecutor(AT_ONCE) as threads:
            ends = [threads.submit(self._end, server) for server in self._servers]
        for end in ends:
            end.result()

    def _start(self, kind: Kind) -> Server:
        server = kind.start()
        self._servers.append(server)
        kind.until(server)
        return server

    @staticmethod
    def _end(server: Server) -> None:
        try:
            if server.process.poll() is None:
                server.stop()
        finally:
            server.close()
