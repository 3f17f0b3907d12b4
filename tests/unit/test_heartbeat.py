"""Who counts as frozen: the stopped and the stuck; never the busy, the starved, or those a late watcher did not see."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from time import monotonic, sleep

import pytest

from cluster.heartbeat import BUSY_SILENT_S, CHECK_EVERY_S, SILENT_S, Pulse, cpu_ticks, wants_to_run


@pytest.fixture
def process(request: pytest.FixtureRequest) -> Iterator[int]:
    child = subprocess.Popen([sys.executable, "-c", request.param], stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        assert child.stdout.read(1) == b"."  # it runs
        yield child.pid
    finally:
        child.kill()
        child.wait()
        assert child.stdout is not None
        child.stdout.close()


SLEEPS = "print('.', end='', flush=True); import time; time.sleep(100)"
COMPUTES = "print('.', end='', flush=True)\nwhile True: pass"


def checks_until_frozen(pulse: Pulse, elapsed_s: float = CHECK_EVERY_S) -> int:
    for number in range(1, 1000):
        if pulse.check(answered=False, elapsed_s=elapsed_s):
            return number
    raise AssertionError("never frozen")


def test_silence_of_two_seconds_is_frozen() -> None:
    assert checks_until_frozen(Pulse()) == SILENT_S / CHECK_EVERY_S


def test_an_answer_begins_the_count_anew() -> None:
    pulse = Pulse()
    for _ in range(10):
        for _ in range(3):
            assert not pulse.check(answered=False, elapsed_s=CHECK_EVERY_S)
        assert not pulse.check(answered=True, elapsed_s=CHECK_EVERY_S)
    assert pulse.silent_s == 0


def test_a_watcher_that_was_held_up_has_missed_one_check() -> None:
    pulse = Pulse()
    assert not pulse.check(answered=False, elapsed_s=60)
    assert checks_until_frozen(pulse, elapsed_s=60) == 1


@pytest.mark.parametrize("process", [SLEEPS], indirect=True)
def test_a_process_that_sleeps_and_does_not_answer_is_frozen(process: int) -> None:
    eventually(lambda: not wants_to_run(process))
    assert checks_until_frozen(Pulse(process)) == SILENT_S / CHECK_EVERY_S


@pytest.mark.parametrize("process", [COMPUTES], indirect=True)
def test_a_process_that_computes_is_not_frozen_until_it_is_stopped_or_stuck(process: int) -> None:
    assert checks_until_frozen(Pulse(process)) == BUSY_SILENT_S / CHECK_EVERY_S
    os.kill(process, signal.SIGSTOP)
    eventually(lambda: not wants_to_run(process))
    assert checks_until_frozen(Pulse(process)) == SILENT_S / CHECK_EVERY_S


def test_a_process_that_is_gone_is_not_busy() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert cpu_ticks(child.pid) == -1
    assert not wants_to_run(child.pid)
    assert checks_until_frozen(Pulse(child.pid)) == SILENT_S / CHECK_EVERY_S


def eventually(holds: Callable[[], bool]) -> None:
    deadline = monotonic() + 10
    while not holds():
        assert monotonic() < deadline
        sleep(0.01)
