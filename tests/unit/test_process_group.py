"""A rank's place in its groups. How groups form: tests/dist/test_transports.py."""

from __future__ import annotations

import threading

import pytest
import torch

from cluster.process_group import Membership
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
