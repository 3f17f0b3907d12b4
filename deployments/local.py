"""A Ray of our own with one application on it, from start to end: what `mixtral-serve serve` runs.

Everything it starts, it ends: processes, shared memory, and the directory with their logs.
"""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from types import FrameType

import ray
from ray import serve

from deployments.app import bind, machine
from deployments.config_file import HttpOptions
from deployments.greeting import greeting
from deployments.resolve import resolve
from deployments.settings import Settings, SettingsError

OBJECT_STORE_BYTES = 128 << 20  # nothing large travels through it; Ray's default takes a third of the memory


def run(settings: Settings, address: HttpOptions, name: str, route_prefix: str) -> int:
    """Serve until interrupted; the exit status."""
    _check_port_free(address)
    with _ray():
        resolved = resolve(settings, machine(may_grow=False))
        print(resolved.table(), flush=True)
        serve.start(proxy_location="HeadOnly", http_options=address.model_dump())
        try:
            serve.run(bind(resolved), name=name, route_prefix=route_prefix)
        except RuntimeError as error:
            raise SettingsError(f"the model could not be started: {_reason(name) or error}") from None
        print(f"\n{greeting(resolved, address, route_prefix)}", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print("\nFinishing the answers that run; Ctrl-C again ends them now.", file=sys.stderr, flush=True)
            _drain(name)
    return 0


@contextlib.contextmanager
def _ray() -> Iterator[None]:
    # Not below TMPDIR: paths of sockets may have 107 characters, and Ray's own part takes most of them.
    directory = tempfile.mkdtemp(prefix="mixtral-", dir="/tmp")
    for logger in ("ray", "ray.serve"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    _treat_as_interrupt(signal.SIGTERM, signal.SIGHUP)
    try:
        ray.init(
            address="local",
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=OBJECT_STORE_BYTES,
            _temp_dir=directory,
        )
        _treat_as_interrupt(signal.SIGTERM, signal.SIGHUP)  # again: Ray has put its own handler there
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(directory, ignore_errors=True)


def _reason(application: str) -> str | None:
    """Why the application failed, from Serve's status: what serve.run raises does not say.

    The status holds a whole traceback, and its last line at the margin begins with the exception's name.
    """
    status = serve.status().applications.get(application)
    messages = [deployment.message for deployment in status.deployments.values()] if status else []
    for message in messages:
        lines = [line for line in message.splitlines() if re.match(r"[A-Za-z_][\w.]*: ", line)]
        if lines:
            return lines[-1].partition(": ")[2]
    return None


def _check_port_free(address: HttpOptions) -> None:
    with contextlib.closing(socket.socket(socket.AF_INET6 if ":" in address.host else socket.AF_INET)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address.host, address.port))
        except OSError as error:
            where = f"{address.host}:{address.port}"
            raise SettingsError(
                f"cannot listen on {where}: {error.strerror}; choose another --port or --host."
            ) from None


def _drain(application: str) -> None:
    """Take the application away, which waits for its answers. They have a deadline each, so this ends."""
    while True:
        try:
            serve.delete(application)
        except TimeoutError:
            continue
        return


def _treat_as_interrupt(*signals: signal.Signals) -> None:
    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    for each in signals:
        signal.signal(each, interrupt)
