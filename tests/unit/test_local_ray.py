"""The pipe through which replicas reach this terminal. Starting and ending a Ray is tested end to end."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deployments.access_log import STDOUT, keep, logger
from deployments.local_ray import access_log_here, in_one_sentence
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
