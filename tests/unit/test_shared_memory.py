"""The shared-memory transport with its ranks as threads of one process: areas too small, aborts, silence."""

from __future__ import annotations

import os
import threading
from types import SimpleNamespace

import pytest
import torch

from cluster.rendezvous import SHARED_DIRECTORY, has_shared_memory
from cluster.transport.shared_memory import Layout, PeerLost, SharedMemoryComm, create_file
from tests.threaded_ranks import on_ranks

pytestmark = pytest.mark.skipif(not has_shared_memory(), reason="shared memory transport is for x86-64 Linux")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_rows_wider_than_an_area_go_in_rounds(dtype: torch.dtype) -> None:
    """Rank 0 sends much and rank 1 little, so that they need different numbers of rounds."""
    rows = torch.arange(7 * 50).view(7, 50).to(dtype)

    def exchange(comm: SharedMemoryComm) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        send, receive = ([4, 3], [4, 1]) if comm.rank == 0 else ([1, 0], [3, 0])
        mine = rows[: sum(send)] + comm.rank
        return comm.all_to_all(mine, send, receive), comm.all_reduce(rows + comm.rank), comm.all_gather(mine, [7, 1])

    first, second = on_ranks(2, exchange, area_bytes=512)
    assert torch.equal(first[0], torch.cat([rows[:4], rows[:1] + 1]))
    assert torch.equal(second[0], rows[4:])
    for _, summed, gathered in (first, second):
        assert torch.equal(summed, rows + (rows + 1))
        assert torch.equal(gathered, torch.cat([rows, rows[:1] + 1]))


def test_many_collectives_in_a_row_never_read_a_half_that_is_being_written() -> None:
    def sums(comm: SharedMemoryComm) -> list[float]:
        return [float(comm.all_reduce(torch.full((4, 8), float(k)))[0, 0]) for k in range(500)]

    assert on_ranks(3, sums) == [[3.0 * k for k in range(500)]] * 3


def test_a_transposed_row_is_gathered() -> None:
    """Contiguous by torch's rule, yet its last stride is not 1."""
    results = on_ranks(2, lambda comm: comm.all_gather(torch.arange(6.0).view(1, 6).T.contiguous(), [6, 6]))
    assert results[0].flatten().tolist() == [*range(6), *range(6)]


def test_an_abort_ends_every_wait() -> None:
    all_met = threading.Barrier(2)  # a rank that is still on its way in would hear of the abort there

    def aborted(comm: SharedMemoryComm) -> str:
        all_met.wait(timeout=10)
        if comm.rank == 0:
            comm.abort()
        with pytest.raises(PeerLost, match="aborted"):
            comm.all_reduce(torch.zeros(1, 1))
        return "raised"

    assert on_ranks(2, aborted) == ["raised"] * 2


def test_a_silent_peer_is_named() -> None:
    def wait(comm: SharedMemoryComm) -> None:
        if comm.rank == 0:
            with pytest.raises(PeerLost, match=r"rank 1 did not join a collective within 0\.1 s"):
                comm.all_reduce(torch.zeros(1, 1))

    on_ranks(2, wait, timeout_s=0.1)


def test_counts_that_disagree_are_our_mistake() -> None:
    def disagree(comm: SharedMemoryComm) -> None:
        with pytest.raises(AssertionError, match="were expected"):
            comm.all_to_all(torch.zeros(2, 1), [1, 1], [2, 0] if comm.rank == 0 else [0, 2])

    on_ranks(2, disagree)


def test_the_file_is_private() -> None:
    path = create_file(Layout(2, 4096))
    try:
        assert path.startswith(SHARED_DIRECTORY)
        assert os.stat(path).st_mode & 0o777 == 0o600
    finally:
        os.unlink(path)


def test_too_little_room_is_said_before_it_ends_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=5 << 10, f_frsize=4096))
    with pytest.raises(OSError, match=r"has 20 MiB free and 4 ranks want 32 MiB .* --shm-size"):
        create_file(Layout(4))
    os.unlink(create_file(Layout(2)))
