"""What a rank checks of a group: right ones pass, wrong ones are named. With real processes: tests/dist."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cluster.collectives_check import _RankChecks
from cluster.process_group import Membership
from cluster.rendezvous import has_shared_memory
from cluster.transport.shared_memory import SharedMemoryComm
from model.comm import Comm, Groups
from tests.recomputed import Recomputed
from tests.threaded_ranks import on_ranks

pytestmark = pytest.mark.skipif(not has_shared_memory(), reason="shared memory transport is for x86-64 Linux")


def checks(comm: Comm) -> _RankChecks:
    found = _RankChecks(comm.rank, torch.device("cpu"))
    found._membership = Membership(Groups(comm, comm), ())
    return found


class Wrong(SharedMemoryComm):
    """Its sums are off by a little, and rows come back turned round."""

    def all_reduce(self, x: Tensor) -> Tensor:
        return super().all_reduce(x) * 1.01

    def all_to_all(self, x_ND: Tensor, send: list[int], receive: list[int]) -> Tensor:  # type: ignore[override]
        return super().all_to_all(x_ND, send, receive).flip(0)


def test_a_right_group_passes() -> None:
    def compare(comm: SharedMemoryComm) -> bool:
        checks(comm).compare_collectives()
        checks(comm).compare_exchange("all_reduce")
        checks(comm).compare_exchange("all_to_all")
        checks(comm).compare_captured(Recomputed)
        return True

    assert on_ranks(3, compare, area_bytes=1 << 16) == [True] * 3


def test_a_wrong_one_is_named() -> None:
    def compare(comm: SharedMemoryComm) -> list[str]:
        wrong = object.__new__(Wrong)
        wrong.__dict__.update(comm.__dict__)
        told = []
        for check in (lambda: checks(wrong).compare_exchange("all_reduce"), lambda: captured(wrong)):
            with pytest.raises(ValueError, match="gave something else") as error:
                check()
            told.append(str(error.value).partition(" gave")[0])
        return told

    def captured(comm: Comm) -> None:
        checks(comm).compare_captured(Recomputed)

    assert on_ranks(2, compare, area_bytes=1 << 16) == [["all_reduce", "a captured all_reduce"]] * 2
