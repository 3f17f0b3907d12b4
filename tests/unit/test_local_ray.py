"""The pipe through which replicas reach this terminal, and when a server is said to answer. Starting and ending a Ray
is tested end to end."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import ray

from deployments import local_ray
from deployments.access_log import STDOUT, keep, logger
from deployments.local_ray import access_log_here, in_one_sentence, own_ray, wait_until_routed
from deployments.settings import SettingsError


@pytest.fixture(autouse=True)
def _no_log_afterwards() -> Iterator[None]:
    yield
    keep(None)


def test_lines_of_every_replica_come_out_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with access_log_here(tmp_path) as pipe:
        for replica in range(2):
            keep(STDOUT, pipe)
            for number in range(3):
                logger.info('{"id":"%d-%d é"}', replica, number)
    assert capsys.readouterr().out.splitlines() == [f'{{"id":"{r}-{n} é"}}' for r in range(2) for n in range(3)]


class Gone(io.StringIO):
    """A stdout that nobody reads any more."""

    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_a_reader_of_stdout_who_leaves_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Gone())
    with access_log_here(tmp_path) as pipe:
        keep(STDOUT, pipe)
        for _ in range(3000):  # more than a pipe holds
            logger.info("x" * 100)


@pytest.mark.parametrize("error", [Exception("The node timed out.\nMore of it."), TimeoutError()])
def test_a_ray_that_does_not_start_is_said_in_one_sentence(error: Exception) -> None:
    with pytest.raises(SettingsError, match=r"^Ray does not start: T\w+.* try again later\.$"), in_one_sentence():
        raise error
    with pytest.raises(KeyboardInterrupt), in_one_sentence():
        raise KeyboardInterrupt


@pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`")  # Ray Serve's own
@pytest.mark.parametrize("said", [None, "1"])
def test_nothing_is_reported_to_others_unless_asked_for(said: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def init(**_: object) -> None:
        seen.append(os.environ["RAY_USAGE_STATS_ENABLED"])
        raise RuntimeError("enough")

    environment = {name: value for name, value in os.environ.items() if name != "RAY_USAGE_STATS_ENABLED"}
    monkeypatch.setattr(os, "environ", environment | ({} if said is None else {"RAY_USAGE_STATS_ENABLED": said}))
    monkeypatch.setattr(local_ray, "_treat_as_interrupt", lambda *_: None)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(SettingsError, match="enough"), own_ray():
        pass
    assert seen == [said or "0"]


@pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`")  # Ray Serve's own
@pytest.mark.parametrize("has_one", [False, True])
def test_a_home_needs_not_be_there_to_write_to(has_one: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray would write its token there. One that is there already is the one that `ray status` knows."""
    seen: list[str | None] = []

    def init(**_: object) -> None:
        seen.append(os.environ.get("RAY_AUTH_TOKEN"))
        raise RuntimeError("enough")

    if has_one:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text("theirs")
    rest = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    monkeypatch.setattr(os, "environ", rest | {"HOME": str(tmp_path)})
    monkeypatch.setattr(local_ray, "_treat_as_interrupt", lambda *_: None)
    monkeypatch.setattr(ray, "init", init)
    for _ in range(2):
        with pytest.raises(SettingsError, match="enough"), own_ray():
            pass
        os.environ.pop("RAY_AUTH_TOKEN", None)
    assert (seen == [None, None]) is has_one
    assert has_one or len(set(seen)) == 2, "every Ray has its own"


def test_who_told_us_to_ignore_a_closed_terminal_is_heeded() -> None:
    """That is all that nohup does."""
    before = {each: signal.getsignal(each) for each in (signal.SIGHUP, signal.SIGTERM)}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        local_ray._treat_as_interrupt(signal.SIGTERM, signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def test_a_server_answers_once_its_proxy_knows_the_application() -> None:
    asked: list[str] = []

    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response({1: 404, 2: 503}.get(len(asked), 200))
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Nobody reads it."""

    with HTTPServer(("127.0.0.1", 0), Proxy) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            assert wait_until_routed("127.0.0.1", server.server_port, "/prefix")
        finally:
            server.shutdown()
            thread.join()
    assert asked == ["/prefix/ready"] * 3


def test_a_server_that_nobody_can_ask_is_not_waited_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.local_ray.ROUTED_WITHIN_S", 0.05)
    assert not wait_until_routed("127.0.0.1", 9, "/")
