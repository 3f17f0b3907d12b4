"""What a test does inside a rank's process. The first argument is the rank's actor; Ray carries the functions there."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def fail_next_step(actor: Any, make_error: Callable[[], BaseException]) -> None:
    """The rank raises where the others expect it to compute."""
    compute = actor._worker.compute

    def fail_once(prepared: Any) -> Any:
        actor._worker.compute = compute
        raise make_error()

    actor._worker.compute = fail_once


def fail_for_token(actor: Any, token_id: int) -> None:
    """From now on, every step that computes this token."""
    compute = actor._worker.compute

    def fail_sometimes(prepared: Any) -> Any:
        if any(token_id in chunk.token_ids for chunk in prepared.plan.chunks):
            raise RuntimeError("this token cannot be computed")
        return compute(prepared)

    actor._worker.compute = fail_sometimes


def break_connection(actor: Any) -> None:
    """What the ranks see when the transport between them is reset."""
    actor._membership.abort()


def hold_interpreter(actor: Any, seconds: float) -> None:
    """The next step keeps the interpreter to itself for so long: not even the heartbeat is answered."""
    import ctypes

    compute = actor._worker.compute

    def hold_once(prepared: Any) -> Any:
        actor._worker.compute = compute
        ctypes.PyDLL(None).usleep(int(seconds * 1e6) // 2)  # PyDLL: the interpreter is not given away
        return compute(prepared)

    actor._worker.compute = hold_once


def compute_for(actor: Any, seconds: float) -> None:
    """The next step takes so long: the machine is busy with it at first, and then waits as it would for a device."""
    from time import monotonic, sleep

    import torch

    compute = actor._worker.compute

    def compute_once(prepared: Any) -> Any:
        actor._worker.compute = compute
        busy_s = min(seconds, 3.0)  # longer than a frozen rank may be silent
        until, x = monotonic() + busy_s, torch.ones(1500, 1500)
        while monotonic() < until:
            x @ x
        sleep(seconds - busy_s)
        return compute(prepared)

    actor._worker.compute = compute_once


def slow_fetch(actor: Any, seconds: float) -> None:
    """Reading experts for another placement takes so long."""
    from time import sleep

    fetch = actor._worker.fetch

    def fetch_slowly(placement: Any) -> None:
        sleep(seconds)
        fetch(placement)

    actor._worker.fetch = fetch_slowly


def open_files(actor: Any) -> list[str]:
    gc.collect()
    descriptors = Path("/proc/self/fd")
    return sorted(
        os.readlink(descriptors / name) for name in os.listdir(descriptors) if (descriptors / name).is_symlink()
    )
