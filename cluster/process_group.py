"""Forming and leaving a group of ranks: one rendezvous store per group, an explicit timeout and interface.

Groups are objects, not torch.distributed's process-wide default: a rank can leave one and join the next
without a trace of the first. The prefix keeps the groups of successive epochs apart in one store.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Literal, Protocol

import torch.distributed as dist

from cluster.transport.gloo import GlooComm
from cluster.transport.shared_memory import Layout, SharedMemoryComm, create_file
from model.comm import Comm

Transport = Literal["shared_memory", "gloo"]


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Where the ranks of one group meet. Filled by rank 0's store and the worker group."""

    host: str  # the address rank 0's store listens at
    port: int
    size: int
    epoch: int = 0
    transport: Transport = "gloo"
    timeout_s: float = 60.0  # of every collective: longer than any step, shorter than a user's patience

    def at(self, port: int) -> Rendezvous:
        return replace(self, port=port)


class Store(Protocol):
    """A torch.distributed.TCPStore, as far as we look at it."""

    @property
    def port(self) -> int: ...


class Transported(Comm, Protocol):
    """A Comm that other ranks are behind."""

    def abort(self) -> None:
        """Make this rank's collectives raise, now and from now on. Callable from another thread."""


def open_store(rendezvous: Rendezvous) -> Store:
    """The store at which a group meets; whoever opens it keeps it while the group lives. Port 0: any free one."""
    store: Store = dist.TCPStore(
        rendezvous.host,
        rendezvous.port,
        world_size=rendezvous.size,
        is_master=True,
        timeout=timedelta(seconds=rendezvous.timeout_s),
        wait_for_workers=False,
    )
    return store


def join(rendezvous: Rendezvous, rank: int, own_address: str, store: Store | None = None) -> Transported:
    """This rank's end of the group; returns when all ranks have joined. Rank 0 brings the store it opened."""
    timeout = timedelta(seconds=rendezvous.timeout_s)
    if store is None:
        store = dist.TCPStore(
            rendezvous.host, rendezvous.port, is_master=False, timeout=timeout, wait_for_workers=False
        )
    prefixed = dist.PrefixStore(f"epoch-{rendezvous.epoch}", store)
    match rendezvous.transport:
        case "shared_memory":
            layout = Layout(rendezvous.size)
            if rank == 0:
                prefixed.set("path", create_file(layout))
            return SharedMemoryComm(prefixed.get("path").decode(), rank, layout, rendezvous.timeout_s)
        case "gloo":
            options = dist.ProcessGroupGloo._Options()
            options._devices = [dist.ProcessGroupGloo.create_device(hostname=own_address)]
            options._timeout = timeout
            options._threads = 1  # collectives run one after another; more threads only fight the compute threads
            return GlooComm(dist.ProcessGroupGloo(prefixed, rank, rendezvous.size, options))
