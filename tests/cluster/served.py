"""The HTTP application over real actors in this process, so that a test can reach through to a rank and hurt it.

Serve is left out: what it adds (replicas, draining) has tests of its own.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic, sleep
from typing import Any

import ray
import uvicorn

from cluster.engine import Engine
from cluster.launch import launch
from deployments.api import create_app
from deployments.live import Live
from deployments.resolve import Machine, resolve
from deployments.settings import load
from tests.e2e.server import answers, free_port
from tests.notes import Notes

START_TIMEOUT_S = 120


class Served:
    def __init__(self, settings: dict[str, Any], placement_group: Any = None) -> None:
        self.notes = Notes()
        self.url = f"http://127.0.0.1:{free_port()}"
        self._settings = settings
        self._placement_group = placement_group
        self._failure: BaseException | None = None
        self._server: uvicorn.Server | None = None
        self._thread = threading.Thread(target=self._run, name="http")
        self._thread.start()
        eventually(lambda: self._failure or answers(f"{self.url}/health"), "the server answers", START_TIMEOUT_S)
        if self._failure is not None:
            raise self._failure

    engine: Engine

    @property
    def pids(self) -> list[int]:
        return [rank.pid for rank in self.engine.ranks()]

    def inside(self, rank: int, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function with the rank's actor as its first argument, in its process, beside its steps."""
        actor = self.engine._group._ranks[rank].actor  # type: ignore[attr-defined]
        return ray.get(actor.__ray_call__.options(concurrency_group="control").remote(function, *arguments))

    def standby(self) -> int:
        """The process that stands by, once it does."""
        group: Any = self.engine._group
        ((actor,),) = group._standbys._waiting.values()
        pid: int = ray.get(actor.place.remote()).pid
        return pid

    def settled(self, recoveries: int) -> None:
        """Wait until the engine serves again, after so many recoveries or more."""
        eventually(lambda: self.engine.stats().recoveries >= recoveries and self.engine.ready, "it serves again", 120)

    def close(self) -> None:
        if self._server is not None:
            self._server.should_exit = True
        self._thread.join()

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:  # told to the test, which waits
            self._failure = error

    async def _serve(self) -> None:
        resolved = resolve(load(self._settings | {"access_log": None}), Machine(cores=2, gpus=0))
        self.engine = await launch(resolved.engine, self._placement_group, self.notes)
        app = create_app(self.engine, resolved, Live(resolved.settings, {}))
        port = int(self.url.rpartition(":")[2])
        self._server = uvicorn.Server(uvicorn.Config(app, "127.0.0.1", port, log_level="warning"))
        await self._server.serve()


@contextmanager
def served(**settings: Any) -> Iterator[Served]:
    """A server that is closed for certain, and leaves no process."""
    server = Served(settings)
    pids = server.pids
    try:
        yield server
        pids += server.pids
    finally:
        server.close()
    eventually(lambda: not any(lives(pid) for pid in pids), "every rank's process ended")


def lives(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def eventually(holds: Callable[[], object], what: str, timeout_s: float = 60, every_s: float = 0.01) -> None:
    deadline = monotonic() + timeout_s
    while not holds():
        assert monotonic() < deadline, f"never: {what}"
        sleep(every_s)
