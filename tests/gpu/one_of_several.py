"""A rank of several on one GPU, or on the CPU: python -m tests.gpu.one_of_several RANK SIZE PORT TRANSPORT DEVICE

Says on its output what it has done, a word a line. The last rank leaves without a word once all has been compared; the
others wait for it in a sum until they call themselves out. Port 0: rank 0 opens the meeting point, and says where.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import get_args

import torch

from cluster.collectives_check import LOOPBACK, MODES, _RankChecks
from cluster.rendezvous import Rendezvous, Transport

ABORT_AFTER_S = 5.0


def main(rank: int, size: int, port: int, transport: Transport, device: str) -> None:
    checks = _RankChecks(rank, torch.device(device, 0) if device == "cuda" else torch.device(device))
    rendezvous = Rendezvous(LOOPBACK, port, size, size, transport=transport, timeout_s=30)
    if rank == 0:
        rendezvous = rendezvous.at(checks.open(rendezvous))
        say(f"port {rendezvous.port}")
    checks.join(rendezvous)
    say("met")
    checks.compare_collectives()
    for mode in MODES:
        checks.compare_exchange(mode)
    if device == "cuda":
        checks.compare_captured()
    say("compared")
    if rank == size - 1:
        time.sleep(1)  # until rank 0, which has the meeting point, needs nobody any more
        os._exit(0)
    threading.Timer(ABORT_AFTER_S, checks.abort).start()
    try:
        checks.wait_for_all()
    except (ConnectionError, RuntimeError):
        say("left")


def say(word: str) -> None:
    print(word, flush=True)


if __name__ == "__main__":
    rank, size, port, transport, device = sys.argv[1:]
    assert transport in get_args(Transport)
    main(int(rank), int(size), int(port), transport, device)  # type: ignore[arg-type]
