"""Where ranks meet and through what they talk, as far as whoever calls them together knows it: without torch, which
only the ranks need."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass, replace
from typing import Literal

Transport = Literal["shared_memory", "gloo", "nccl"]

SHARED_DIRECTORY = "/dev/shm"  # noqa: S108 - memory, not disk; files there are exclusive, private and soon nameless


def has_shared_memory() -> bool:
    """Of the kind that transport/shared_memory.py is written for."""
    return sys.platform == "linux" and platform.machine() == "x86_64" and os.path.isdir(SHARED_DIRECTORY)


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Where all ranks meet. Filled by rank 0's store and the worker group."""

    host: str  # the address rank 0's store listens at
    port: int
    size: int
    tensor: int  # ranks in each tensor group
    epoch: int = 0
    transport: Transport = "gloo"
    timeout_s: float = 60.0  # of every collective: longer than any step, shorter than a user's patience

    def at(self, port: int) -> Rendezvous:
        return replace(self, port=port)
