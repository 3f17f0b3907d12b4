"""A rank's place in its groups. How groups form: tests/dist/test_transports.py."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.distributed import PrefixStore

from cluster import process_group
from cluster.errors import StepFailed
from cluster.process_group import Membership, join, open_store
from cluster.rendezvous import Rendezvous, Transport, has_shared_memory
from cluster.transport.nccl import NcclComm
from cluster.transport.nccl_library import NcclError, NcclLibrary
from cluster.transport.shared_memory import PeerLost, SharedMemoryComm
from model.comm import Groups
from tests.nccl_ranks import can_compile, fake_nccl
from tests.threaded_ranks import on_groups

pytestmark = pytest.mark.skipif(not has_shared_memory(), reason="shared memory transport is for x86-64 Linux")


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


@pytest.fixture
def nccl(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if not can_compile():
        pytest.skip("the fake NCCL is C: needs gcc")
    with fake_nccl() as library:
        monkeypatch.setattr(process_group, "load_nccl", lambda: NcclLibrary(library))
        yield


@pytest.mark.parametrize("transport", ["shared_memory", "nccl"])
@pytest.mark.parametrize("rank", [0, 1])
def test_who_waits_for_a_rank_that_never_comes_can_be_called_back(nccl: None, rank: int, transport: Transport) -> None:
    rendezvous = Rendezvous("127.0.0.1", 0, 2, 2, transport=transport, timeout_s=60)
    store, leave = open_store(rendezvous), threading.Event()
    with ThreadPoolExecutor(1) as thread:
        joining = thread.submit(join, rendezvous, rank, "127.0.0.1", store, leave)
        leave.set()
        with pytest.raises(PeerLost, match="aborted"):
            joining.result(timeout=10)
    if rank == 0 and transport == "shared_memory":
        file = PrefixStore("epoch-0/world", store).get("path").decode()
        assert not Path(file).exists(), "who made the file takes its name away"


def test_ranks_meet_over_nccl_in_both_groups(nccl: None) -> None:
    rendezvous = Rendezvous("127.0.0.1", 0, 4, 2, transport="nccl", timeout_s=60)
    store = open_store(rendezvous)
    with ThreadPoolExecutor(4) as threads:
        joining = [threads.submit(join, rendezvous, rank, "127.0.0.1", store) for rank in range(4)]
        found = [future.result(timeout=30).groups for future in joining]
    assert all(isinstance(comm, NcclComm) for groups in found for comm in (groups.world, groups.tensor))
    assert [(g.world.rank, g.world.size, g.tensor.rank, g.tensor.size) for g in found] == [
        (0, 4, 0, 2), (1, 4, 1, 2), (2, 4, 0, 2), (3, 4, 1, 2)
    ]  # fmt: skip


def test_what_nccl_refuses_is_a_failure_that_a_new_group_may_not_have(
    nccl: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def connect(*_: object) -> int:
        raise NcclError("NCCL 2.29.7, ncclCommInitRank: remote process exited")

    monkeypatch.setattr(NcclLibrary, "connect", connect)
    rendezvous = Rendezvous("127.0.0.1", 0, 1, 1, transport="nccl", timeout_s=60)
    with pytest.raises(StepFailed, match="rank 0 of 1 could not join its group"):
        join(rendezvous, 0, "127.0.0.1", open_store(rendezvous))
