"""What counts as proved: what a step used, for half a minute; then a canary is due, and later it is doubted."""

from __future__ import annotations

import pytest

from cluster.config import ParallelConfig
from cluster.proofs import DOUBTED_AFTER_S, PROVED_FOR_S, Proofs

ALL = ((1, 1, 1, 1),) * 2


def proved(parallel: ParallelConfig | None = None) -> Proofs:
    """Two layers of four slots; all has been proved at time 0."""
    proofs = Proofs(parallel or ParallelConfig(), 2, 4)
    while (exchange := proofs.due(0.0)) is not None:
        proofs.canary(exchange, 0.0)
    return proofs


def test_at_the_start_everything_is_due_and_doubted() -> None:
    proofs = Proofs(ParallelConfig(), 2, 4)
    assert proofs.due(0.0) == "none"
    assert proofs.due_in_s(0.0) == 0.0
    assert proofs.doubts(0.0) == ["none", "layer 0, expert slots 0 1 2 3", "layer 1, expert slots 0 1 2 3"]


@pytest.mark.parametrize(
    ("parallel", "exchanges"),
    [
        (ParallelConfig(), {"none"}),
        (ParallelConfig(tensor=2), {"all_reduce", "all_to_all"}),
        (ParallelConfig(data=2, exchange="all_to_all"), {"all_to_all"}),
    ],
)
def test_each_exchange_needs_a_canary_of_its_own(parallel: ParallelConfig, exchanges: set[str]) -> None:
    proofs, sent = Proofs(parallel, 2, 4), []
    while (exchange := proofs.due(0.0)) is not None:
        sent.append(exchange)
        proofs.canary(exchange, 0.0)
    assert set(sent) == exchanges
    assert len(sent) == len(exchanges)
    assert proofs.doubts(0.0) == []


def test_steps_that_use_everything_need_no_canary() -> None:
    proofs = proved()
    for now in range(1, 200):
        proofs.step("none", ALL, now)
        assert proofs.due(now) is None
        assert proofs.due_in_s(now) == PROVED_FOR_S


def test_a_slot_that_no_row_goes_to_gets_a_canary_and_then_is_doubted() -> None:
    proofs = proved()
    for now in range(1, int(DOUBTED_AFTER_S) + 2):
        proofs.step("none", ((1, 0, 1, 1), (1, 1, 1, 1)), now)
        assert (proofs.due(now) is None) == (now < PROVED_FOR_S)
    assert proofs.doubts(now) == ["layer 0, expert slots 1"]
    proofs.canary("none", now)
    assert proofs.due(now) is None
    assert proofs.doubts(now) == []


def test_a_step_that_tells_no_rows_proves_its_collectives_alone() -> None:
    proofs = proved(ParallelConfig(tensor=2))
    proofs.step("all_reduce", (), 20.0)
    assert proofs.due_in_s(20.0) == 10.0
    assert proofs.due(PROVED_FOR_S) == "all_to_all"
    proofs.step("all_to_all", ALL, PROVED_FOR_S)
    assert proofs.due(PROVED_FOR_S) is None


def test_when_experts_have_moved_a_canary_is_due_and_nothing_is_doubted_yet() -> None:
    proofs = proved()
    proofs.renew(10.0)
    assert proofs.due(10.0) == "none"
    assert proofs.doubts(10.0) == []
    assert proofs.doubts(10.0 + PROVED_FOR_S + 1) == ["layer 0, expert slots 0 1 2 3", "layer 1, expert slots 0 1 2 3"]


def test_after_a_recovery_nothing_is_proved() -> None:
    proofs = proved()
    proofs.forget()
    assert proofs.due(1.0) == "none"
    assert len(proofs.doubts(1.0)) == 3
