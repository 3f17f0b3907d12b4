"""Forming and leaving groups of ranks: one rendezvous store, an explicit timeout and interface.

    tensor 2, data 2    world 0 1 2 3    tensor groups 0 1 | 2 3    rank = data group * tensor + place in it

Groups are objects, not torch.distributed's process-wide default: a rank can leave one and join the next
without a trace of the first. Prefixes keep apart the groups, and their successive epochs, in one store.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from datetime import timedelta
from time import monotonic
from typing import Protocol

import torch.distributed as dist

from cluster.errors import StepFailed
from cluster.rendezvous import Rendezvous
from cluster.transport.gloo import GlooComm
from cluster.transport.nccl import NcclComm
from cluster.transport.nccl_library import NcclError, load_nccl
from cluster.transport.shared_memory import Layout, PeerLost, SharedMemoryComm, create_file
from model.comm import Comm, Groups, SoloComm

LOOK_AGAIN_S = 0.005  # whether other ranks have come


class Store(Protocol):
    """A torch.distributed.TCPStore, as far as we look at it."""

    @property
    def port(self) -> int: ...


class Transported(Comm, Protocol):
    """A Comm that other ranks are behind."""

    def abort(self) -> None:
        """End what this rank waits in, somehow; from now on its collectives raise. From any thread."""


@dataclass(frozen=True, slots=True)
class Membership:
    """One rank's place in its groups."""

    groups: Groups
    connections: tuple[Transported, ...]  # the groups that other ranks are in

    def abort(self) -> None:
        """In whichever group this rank waits."""
        for connection in self.connections:
            connection.abort()


def open_store(rendezvous: Rendezvous) -> Store:
    """The store at which ranks meet; whoever opens it keeps it while the groups live. Port 0: any free one."""
    store: Store = dist.TCPStore(
        rendezvous.host,
        rendezvous.port,
        world_size=rendezvous.size,
        is_master=True,
        timeout=timedelta(seconds=rendezvous.timeout_s),
        wait_for_workers=False,
    )
    return store


def join(
    rendezvous: Rendezvous,
    rank: int,
    own_address: str,
    store: Store | None = None,
    leave: threading.Event | None = None,
) -> Membership:
    """This rank's end of its groups; returns when all ranks have joined. Rank 0 brings the store it opened.

    Whoever waits in vain is called back by `leave`, but for gloo, which has its timeout. NCCL binds to the current CUDA
    device.
    """
    leave = threading.Event() if leave is None else leave
    if store is None:
        timeout = timedelta(seconds=rendezvous.timeout_s)
        store = dist.TCPStore(
            rendezvous.host, rendezvous.port, is_master=False, timeout=timeout, wait_for_workers=False
        )
    group, place = divmod(rank, rendezvous.tensor)
    world = _connect(rendezvous, "world", rank, rendezvous.size, own_address, store, leave)
    if rendezvous.tensor == rendezvous.size:
        return Membership(Groups(world, world), (world,))
    if rendezvous.tensor == 1:
        return Membership(Groups(world, SoloComm()), (world,))
    tensor = _connect(rendezvous, f"tensor-{group}", place, rendezvous.tensor, own_address, store, leave)
    return Membership(Groups(world, tensor), (world, tensor))


def _connect(
    rendezvous: Rendezvous,
    name: str,
    rank: int,
    size: int,
    own_address: str,
    store: Store,
    leave: threading.Event,
) -> Transported:
    """One group's end, for the rank that is number `rank` in it."""
    prefixed = dist.PrefixStore(f"epoch-{rendezvous.epoch}/{name}", store)
    match rendezvous.transport:
        case "shared_memory":
            layout = Layout(size)
            if rank == 0:
                prefixed.set("path", create_file(layout))
            _wait_for(["path"], prefixed, rendezvous.timeout_s, leave)
            return SharedMemoryComm(prefixed.get("path").decode(), rank, layout, rendezvous.timeout_s, leave)
        case "gloo":
            options = dist.ProcessGroupGloo._Options()
            options._devices = [dist.ProcessGroupGloo.create_device(hostname=own_address)]
            options._timeout = timedelta(seconds=rendezvous.timeout_s)
            options._threads = 1  # collectives run one after another; more threads only fight the compute threads
            return GlooComm(dist.ProcessGroupGloo(prefixed, rank, size, options))
        case "nccl":
            library = load_nccl()
            if rank == 0:
                prefixed.set("id", library.unique_id())
            prefixed.set(f"rank-{rank}", "here")
            # A rank that waits inside NCCL for one that never comes cannot be called back: first see that all are here.
            _wait_for(["id", *(f"rank-{other}" for other in range(size))], prefixed, rendezvous.timeout_s, leave)
            try:
                return NcclComm(library, prefixed.get("id"), rank, size)
            except NcclError as error:  # one of them has died since: the group is formed once more
                raise StepFailed(f"rank {rank} of {size} could not join its group: {error}") from error


def _wait_for(keys: list[str], store: dist.Store, timeout_s: float, leave: threading.Event) -> None:
    deadline = monotonic() + timeout_s
    while not store.check(keys):
        if leave.wait(LOOK_AGAIN_S) or monotonic() > deadline:
            raise PeerLost("the group was aborted, or one of its ranks did not come")
