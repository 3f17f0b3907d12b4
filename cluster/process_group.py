"""Forming and leaving a group of ranks: one rendezvous store per group, an explicit timeout and interface.

Groups are objects, not torch.distributed's process-wide default: a rank can leave one and join the next
without a trace of the first. The prefix keeps the groups of successive epochs apart in one store.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Protocol

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Where the ranks of one group meet. Filled by rank 0's store and the worker group."""

    host: str  # the address rank 0's store listens at
    port: int
    size: int
    epoch: int = 0
    timeout_s: float = 60.0  # of every collective: longer than any step, shorter than a user's patience

    def at(self, port: int) -> Rendezvous:
        return replace(self, port=port)


class Store(Protocol):
    """A torch.distributed.TCPStore, as far as we look at it."""

    @property
    def port(self) -> int: ...


class Work(Protocol):
    def wait(self) -> bool: ...


class Group(Protocol):
    """A torch.distributed backend, as far as the transports use it."""

    def rank(self) -> int: ...
    def size(self) -> int: ...
    def abort(self) -> None: ...
    def allreduce(self, tensors: list[Tensor]) -> Work: ...
    def broadcast(self, tensors: list[Tensor], options: object) -> Work: ...
    def alltoall_base(self, output: Tensor, input: Tensor, receive: list[int], send: list[int]) -> Work: ...


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


def join_gloo(
    rendezvous: Rendezvous, rank: int, own_address: str, store: dist.Store | None = None
) -> dist.ProcessGroup:
    """This rank's end of a gloo group; returns when all ranks have joined."""
    timeout = timedelta(seconds=rendezvous.timeout_s)
    if store is None:
        store = dist.TCPStore(
            rendezvous.host, rendezvous.port, world_size=rendezvous.size, is_master=False, timeout=timeout
        )
    prefixed = dist.PrefixStore(f"epoch-{rendezvous.epoch}", store)
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=own_address)]
    options._timeout = timeout
    options._threads = 1  # collectives run one after another; more threads only fight the compute threads
    group: Group = dist.ProcessGroupGloo(prefixed, rank, rendezvous.size, options)
    return group
