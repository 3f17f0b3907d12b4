"""Forked ranks for tests: one function run on 2, 4 or 8 processes that share a group.

Forking takes a tenth of a second where spawning takes seconds. The price: the parent must have started no
threads that a child would miss, so Ray, CUDA and the rendezvous store all stay out of it (rank 0 opens the store).
"""

from __future__ import annotations

import gc
import multiprocessing
import pickle
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from cluster.process_group import join, open_store
from cluster.rendezvous import Rendezvous, Transport

LOOPBACK = "127.0.0.1"


def run_ranks(
    size: int,
    function: Callable[..., Any],
    *args: Any,
    tensor: int | None = None,
    transport: Transport = "gloo",
    survivors: set[int] | None = None,
    timeout_s: float = 60.0,
) -> list[Any]:
    """function(groups, *args) on every rank; the survivors' (default: all) results in rank order.

    Ranks form tensor groups of `tensor` (default: one of all). One failure fails all, with its traceback.
    """
    context = multiprocessing.get_context("fork")
    rendezvous = Rendezvous(LOOPBACK, 0, size, tensor or size, transport=transport, timeout_s=timeout_s)
    pipes, processes = [], []
    for rank in range(size):
        ours, theirs = context.Pipe()
        process = context.Process(target=_rank_main, args=(theirs, rendezvous, rank, function, args), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        rendezvous = pipes[0].recv()
        for pipe in pipes[1:]:
            pipe.send(rendezvous)
        return _collect([pipe for rank, pipe in enumerate(pipes) if survivors is None or rank in survivors], timeout_s)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _collect(pipes: list[Connection], timeout_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        ready = wait([pipe for rank, pipe in enumerate(pipes) if rank not in results], timeout_s)
        assert ready, f"ranks {sorted(set(range(len(pipes))) - set(results))} did not answer in {timeout_s} s"
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = pipes.index(pipe)
            error, results[rank] = pickle.loads(pipe.recv_bytes())
            assert error is None, f"rank {rank} failed:\n{error}"
    return [results[rank] for rank in range(len(pipes))]


def _rank_main(
    pipe: Connection, rendezvous: Rendezvous, rank: int, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # what was inherited stays shared memory: no search for garbage writes to it
    try:
        store = None
        if rank == 0:
            store = open_store(rendezvous)
            rendezvous = rendezvous.at(store.port)
            pipe.send(rendezvous)
        else:
            rendezvous = pipe.recv()
        answer = (None, function(join(rendezvous, rank, LOOPBACK, store).groups, *args))
    except BaseException:
        answer = (traceback.format_exc(), None)
    # As plain bytes: the pipe's own pickling would share tensors by handles that die with this process.
    pipe.send_bytes(pickle.dumps(answer))
    # The parent ends us: the store must outlive the last rank that looks for it.
    pipe.poll(None)
