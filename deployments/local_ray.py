"""A Ray of this command's own, on this machine, that is gone without a trace when the command ends.

Ray gives the output of its processes to files below its directory, which nobody looks for there and which go with it.
So the access log, where it is meant for stdout, comes back through a named pipe and out of this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import secrets
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from time import monotonic, sleep
from types import FrameType

from deployments.settings import SettingsError

OBJECT_STORE_BYTES = 128 << 20  # nothing large travels through it; Ray's default takes a third of the memory
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",  # it says so only to who starts Ray: nobody here would know
    "RAY_task_events_report_interval_ms": "0",  # records of calls for a dashboard, and there is none
}
TELL_TIMEOUT_S = 5.0
ROUTED_WITHIN_S = 30.0
LOOK_AGAIN_S = 0.02
ASK_AGAIN_S = 0.1
PIPE_ENDS = "\n"  # no line of the log is empty


@contextlib.contextmanager
def own_ray() -> Iterator[Path]:
    """Its directory."""
    import ray
    import ray.serve  # its import sets the level of its logger, so it comes before ours

    # Not below TMPDIR: paths of sockets may have 107 characters, and Ray's own part takes most of them.
    directory = Path(tempfile.mkdtemp(prefix="mixtral-", dir="/tmp"))
    for name, value in (QUIET | _token() | _direct_streaming(directory / "proxy")).items():
        os.environ.setdefault(name, value)
    for logger in ("ray", "ray.serve"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    _treat_as_interrupt(signal.SIGTERM, signal.SIGHUP)
    try:
        with in_one_sentence():
            ray.init(
                address="local",
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                object_store_memory=OBJECT_STORE_BYTES,
                _temp_dir=str(directory),
            )
        _treat_as_interrupt(signal.SIGTERM, signal.SIGHUP)  # again: Ray has put its own handler there
        yield directory
    finally:
        ray.shutdown()
        shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def in_one_sentence() -> Iterator[None]:
    """Around the starts of Ray's processes, which have half a minute each."""
    try:
        yield
    except Exception as error:  # Ray raises nothing narrower
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise SettingsError(f"Ray does not start: {reason} If this machine is very busy, try again later.") from error


def _token() -> dict[str, str]:
    """Ray's processes want one from each other, and would write it into a home that may not be there to write to."""
    there = "RAY_AUTH_TOKEN_PATH" in os.environ or os.path.exists(os.path.expanduser("~/.ray/auth_token"))
    return {} if there else {"RAY_AUTH_TOKEN": secrets.token_hex(32)}


def _direct_streaming(directory: Path) -> dict[str, str]:
    """What Ray's processes find in their environment, should Serve be told to use HAProxy."""
    return {
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{directory}/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{directory}/admin.sock",
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{directory}/metrics.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": f"{directory}",
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{directory}/server-state",
        # The 30 s for balancers in front to look elsewhere: there are none.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
    }


@contextlib.contextmanager
def access_log_here(directory: Path) -> Iterator[Path]:
    """A named pipe, whose lines go to this process's stdout."""
    pipe = directory / "access.pipe"
    os.mkfifo(pipe)
    # Open to write as well: the pipe does not end with the last replica that writes to it.
    descriptor = os.open(pipe, os.O_RDWR)
    with os.fdopen(os.dup(descriptor), encoding="utf-8", errors="replace") as lines:
        copying = threading.Thread(target=_copy, args=(lines,), name="access-log", daemon=True)
        copying.start()
        try:
            yield pipe
        finally:
            os.write(descriptor, PIPE_ENDS.encode())
            copying.join()
            os.close(descriptor)


def _copy(lines: Iterator[str]) -> None:
    """Goes on when nobody reads stdout any more: whoever writes to a full pipe waits."""
    for line in lines:
        if line == PIPE_ENDS:
            return
        with contextlib.suppress(OSError):
            print(line, end="", flush=True)


def why_it_failed(application: str) -> str | None:
    """From Serve's status: what serve.run raises does not say.

    The status holds a whole traceback, and its last line at the margin begins with the exception's name.
    """
    from ray import serve

    status = serve.status().applications.get(application)
    messages = [deployment.message for deployment in status.deployments.values()] if status else []
    for message in messages:
        lines = [line for line in message.splitlines() if re.match(r"[A-Za-z_][\w.]*: ", line)]
        if lines:
            return lines[-1].partition(": ")[2]
    return None


def wait_until_routed(host: str, port: int, route_prefix: str) -> bool:
    """Serve calls an application running before its proxy, HAProxy above all, has heard of it. Whether it has now."""
    deadline = monotonic() + ROUTED_WITHIN_S
    while not _ready(host, port, f"{route_prefix.rstrip('/')}/ready"):
        if monotonic() > deadline:
            return False
        sleep(LOOK_AGAIN_S)
    return True


def _ready(host: str, port: int, path: str) -> bool:
    with contextlib.closing(HTTPConnection(host, port, timeout=TELL_TIMEOUT_S)) as connection:
        try:
            connection.request("GET", path)
            return connection.getresponse().status == HTTPStatus.OK
        except (OSError, HTTPException):
            return False


def drain(application: str) -> None:
    """Take the application away once its answers are out. They have a deadline each, so this ends.

    First every replica stops taking requests and says so at /ready: who comes now is told to come back, not cut off.
    Serve hears of it last: from then on its proxy has no route, and its 404 would tell callers not to come back.
    """
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    with contextlib.suppress(RayServeException, RayError, TimeoutError):  # whoever cannot be told is drained by Serve
        asyncio.run(_until_idle(application))
    while True:
        try:
            serve.delete(application)
        except TimeoutError:
            continue
        return


async def _until_idle(application: str) -> None:
    """On an event loop: with RAY_SERVE_THROUGHPUT_OPTIMIZED handles work nowhere else."""
    from ray import serve

    replicas = serve.get_app_handle(application)
    while True:
        busy = await asyncio.wait_for(replicas.broadcast("drain").results_async(), TELL_TIMEOUT_S)
        if not any(busy):
            return
        await asyncio.sleep(ASK_AGAIN_S)


def _treat_as_interrupt(*signals: signal.Signals) -> None:
    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    for each in signals:
        if signal.getsignal(each) is not signal.SIG_IGN:  # under nohup SIGHUP is, and shall be
            signal.signal(each, interrupt)
