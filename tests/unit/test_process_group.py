"""A rank's place in its groups. How groups form: tests/dist/test_transports.py."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.distributed import PrefixStore

from cluster.process_group import Membership, Rendezvous, join, open_store
from cluster.transport.shared_memory import PeerLost, SharedMemoryComm, supported
from model.comm import Groups
from tests.threaded_ranks import on_groups

pytestmark = pytest.mark.skipif(not supported(), reason="shared memory transport is for x86-64 Linux")


def test_one_abort_ends_what_waits_in_either_group() -> None:
    all_met, aborted = threading.Barrier(4), threading.Event()

    def rank_main(groups: Groups) -> str:
        world, tensor = groups.world, groups.tensor
        assert isinstance(world, SharedMemoryComm)
        assert isinstance(tensor, SharedMemoryComm)
        membership = Membership(groups, (world, tensor))
        all_met.wait(timeout=10)  # a rank that is still on its way in would hear of the abort there
        if world.rank == 0:
            membership.abort()
            aborted.set()
        aborted.wait(timeout=10)
        for comm in (world, tensor) if world.rank < 2 else (world,):
            with pytest.raises(PeerLost, match="aborted"):
                comm.all_reduce(torch.zeros(1, 1))
        # The other data group has nothing to do with rank 0's tensor group.
        return "raised" if world.rank < 2 else f"adds up to {float(tensor.all_reduce(torch.ones(1, 1))):g}"

    assert on_groups(2, 2, rank_main) == ["raised", "raised", "adds up to 2", "adds up to 2"]


@pytest.mark.parametrize("rank", [0, 1])
def test_who_waits_for_a_rank_that_never_comes_can_be_called_back(rank: int) -> None:
    rendezvous = Rendezvous("127.0.0.1", 0, 2, 2, transport="shared_memory", timeout_s=60)
    store, leave = open_store(rendezvous), threading.Event()
    with ThreadPoolExecutor(1) as thread:
        joining = thread.submit(join, rendezvous, rank, "127.0.0.1", store, leave)
        leave.set()
        with pytest.raises(PeerLost, match="aborted"):
            joining.result(timeout=10)
    if rank == 0:
        file = PrefixStore("epoch-0/world", store).get("path").decode()
        assert not Path(file).exists(), "who made the file takes its name away"
