"""NCCL itself under the transport: as one rank, captured, aborted, and as several ranks on one GPU where it lets us."""

from __future__ import annotations

import os
import queue
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from time import monotonic

import pytest
import torch
from torch import Tensor

from cluster.all_to_all import AllReduce, SlotTables
from cluster.collectives_check import MODES, _RankChecks
from cluster.padded_exchange import ListedPairs
from cluster.placement import even_placement
from cluster.process_group import Membership
from cluster.transport.nccl import NcclComm
from cluster.transport.nccl_library import NcclLibrary, load_nccl
from cluster.transport.shared_memory import PeerLost
from model.comm import Groups
from model.config import MixtralConfig
from model.exchange import OneRank, SlotLoad
from model.graphs import CudaCapture, PaddedSteps
from model.kv_cache import KVCache
from model.mixtral import Mixtral
from model.shard import Shard
from tests.paged_texts import PAGE, PagedTexts
from tests.random_model import RandomModel
from tests.tiny import CONFIG

ROOT = Path(__file__).parents[2]
HANGS_AFTER_S = 120.0
LEAVES_WITHIN_S = 30.0


@pytest.fixture(scope="module")
def library(device: torch.device) -> NcclLibrary:
    torch.zeros(1, device=device)  # NCCL wants a context
    return load_nccl()


@pytest.fixture
def comm(library: NcclLibrary) -> Iterator[NcclComm]:
    made = alone(library)
    yield made
    made.abort()
    until_left()


def alone(library: NcclLibrary) -> NcclComm:
    return NcclComm(library, library.unique_id(), 0, 1)


def until_left() -> None:
    for thread in threading.enumerate():
        if thread.name == "nccl-abort":
            thread.join(LEAVES_WITHIN_S)
            assert not thread.is_alive(), "NCCL does not leave its group"


def test_all_that_doctor_tries(comm: NcclComm, device: torch.device) -> None:
    checks = _RankChecks(0, device)
    checks._membership = Membership(Groups(comm, comm), (comm,))
    checks.compare_collectives()
    for mode in MODES:
        checks.compare_exchange(mode)
    checks.compare_captured()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64])
def test_sums_in_every_type(comm: NcclComm, device: torch.device, dtype: torch.dtype) -> None:
    x = torch.arange(12, device=device).view(4, 3).to(dtype)
    for found in (comm.all_reduce(x.clone()), comm.reduce_scatter(x, [4]), comm.all_gather(x, [4])):
        assert torch.equal(found, x)


def test_replays_between_computed_sums(comm: NcclComm, device: torch.device) -> None:
    x = torch.zeros(64, 1024, device=device)

    def compute() -> Tensor:
        return comm.reduce_scatter(comm.all_gather(comm.all_reduce(x.clone()), [64]), [64]) + 1

    replay, found = CudaCapture()(compute)
    for turn in range(50):
        x.fill_(turn)
        assert torch.equal(comm.all_reduce(x.clone()), x)
        replay()
        assert torch.equal(found, x + 1)


def test_abort_and_a_new_group_leave_no_memory_behind(library: NcclLibrary, device: torch.device) -> None:
    def round_trip() -> int:
        comm = alone(library)
        comm.all_reduce(torch.ones(1024, device=device))
        comm.abort()
        with pytest.raises(PeerLost):
            comm.all_reduce(torch.ones(1, device=device))
        until_left()
        return torch.cuda.mem_get_info(device)[0]

    round_trip()
    free = round_trip()
    for _ in range(3):
        assert abs(round_trip() - free) <= 8 << 20


def test_abort_returns_while_a_graph_lives_and_ends_when_it_is_gone(library: NcclLibrary, device: torch.device) -> None:
    comm, x = alone(library), torch.ones(1024, device=device)
    graph = CudaCapture()(lambda: comm.all_reduce(x.clone()))
    graph[0]()
    torch.cuda.synchronize(device)
    comm.abort()
    with pytest.raises(PeerLost):
        comm.all_reduce(x)
    del graph
    until_left()
    again = alone(library)
    assert torch.equal(again.all_reduce(x.clone()), x)
    again.abort()
    until_left()


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_a_replayed_step_with_collectives_is_the_computed_one(comm: NcclComm, device: torch.device, rows: int) -> None:
    config = MixtralConfig.from_dict(CONFIG | {"hidden_size": 128, "max_position_embeddings": 128}, "config.json")
    # In float32: sums in another order change no choice of experts.
    model = Mixtral(config, RandomModel(config, device, torch.float32).weights())
    placement = even_placement(config.num_hidden_layers, config.num_local_experts, 1)
    tables, load, plain = SlotTables(placement, device), SlotLoad(2, 4), SlotLoad(2, 4)
    slots = tables.own_slots(0)
    kv, other = (
        KVCache(config, Shard(), num_pages=64, page_size=PAGE, dtype=torch.float32, device=device) for _ in range(2)
    )

    def exchange(graph_rows: int, tokens_G: Tensor) -> AllReduce:
        return AllReduce(comm, ListedPairs(slots, tables, 0.5, graph_rows, tokens_G, load))

    graphs = model.decode_graphs(PaddedSteps(kv, 8, exchange))
    for size in (8, 4, 1):
        graphs.capture(size)
    sequences = PagedTexts([[row, 7, 9] for row in range(rows)], 64, random.Random(0), device)
    for _ in range(3):
        batch = sequences.step([1] * rows)
        found = graphs.replay(batch, min(size for size in (8, 4, 1) if size >= rows), [rows])
        expected = model.forward(batch, other, OneRank(4, plain))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert sum(map(sum, load.take())) == sum(map(sum, plain.take()))


class Started:
    """A rank in a process of its own, and what it has said."""

    def __init__(self, rank: int, size: int, port: int) -> None:
        # Another host to NCCL, which refuses two ranks on one GPU of one host.
        apart = {"NCCL_HOSTID": f"rank-{rank}", "NCCL_SOCKET_IFNAME": "lo", "NCCL_NET": "Socket"}
        command = [sys.executable, "-m", "tests.gpu.one_of_several", *map(str, (rank, size, port)), "nccl", "cuda"]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | apart, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.said: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait_for(self, word: str) -> str | None:
        """The line that begins with it; None where the process has ended, or hangs."""
        deadline = monotonic() + HANGS_AFTER_S
        while monotonic() < deadline:
            try:
                line = self._lines.get(timeout=1)
            except queue.Empty:
                continue
            if not line:
                return None
            self.said.append(line)
            if line.startswith(word):
                return line
        return None

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line.rstrip() or " ")
        self._lines.put("")


def test_several_ranks_on_one_gpu(library: NcclLibrary) -> None:
    first = Started(0, 2, 0)
    ranks = [first]
    try:
        port = first.wait_for("port")
        assert port is not None, first.said
        ranks.append(Started(1, 2, int(port.split()[1])))
        if None in [rank.wait_for("met") for rank in ranks]:
            said = [line for rank in ranks for line in rank.said]
            refused = [line for line in said if "NcclError" in line]
            assert refused, said
            pytest.skip(f"NCCL {library.version} does not let two ranks share this GPU: {refused[0]}")
        for rank in ranks:
            assert rank.wait_for("compared") is not None, rank.said
        assert first.wait_for("left") is not None, first.said
    finally:
        for rank in ranks:
            rank.end()
