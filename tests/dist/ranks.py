"""Forked ranks for tests: one function run on 2, 4 or 8 processes that share a gloo group.

Forking takes a tenth of a second where spawning takes seconds; the price is that this process must never have
started Ray, CUDA or a thread pool inside torch (threads are set to 1 before the first operation).
"""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from cluster.process_group import Rendezvous, join_gloo, open_store
from cluster.transport.gloo import GlooComm
from model.comm import Comm

LOOPBACK = "127.0.0.1"


def run_ranks(size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 60.0) -> list[Any]:
    """function(comm, *args) on every rank; their results in rank order. One failure fails all, with its traceback."""
    context = multiprocessing.get_context("fork")
    store = open_store(LOOPBACK, size, timeout_s)
    rendezvous = Rendezvous(LOOPBACK, store.port, size, timeout_s=timeout_s)
    pipes, processes = [], []
    for rank in range(size):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_rank_main, args=(theirs, rendezvous, rank, function, args), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        return _collect(pipes, timeout_s)
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
            error, results[rank] = pipe.recv()
            assert error is None, f"rank {rank} failed:\n{error}"
    return [results[rank] for rank in range(len(pipes))]


def _rank_main(
    pipe: Connection, rendezvous: Rendezvous, rank: int, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    try:
        comm: Comm = GlooComm(join_gloo(rendezvous, rank, LOOPBACK))
        pipe.send((None, function(comm, *args)))
    except BaseException:
        pipe.send((traceback.format_exc(), None))
