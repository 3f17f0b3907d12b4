"""Pairs listed by slot for experts that find their rows themselves, beside rows that have moved."""

from __future__ import annotations

import pytest
import torch

from model.device_exchange import OneDevice
from model.exchange import OneRank, SlotLoad

pytest.importorskip("triton", reason="a kernel sorts the pairs")

from model.kernels.routing import sort_pairs

EXPERT_SK = torch.tensor([[2, 0], [0, 1], [0, 2]])


def test_the_list_is_the_order_that_rows_would_move_in() -> None:
    x_SD, weight_SK = torch.randn(3, 8), torch.rand(3, 2)
    load = SlotLoad(2, 3)
    moved = OneRank(3, SlotLoad(2, 3)).dispatch(1, x_SD, EXPERT_SK, weight_SK)
    listed = OneDevice(OneRank(3, load), sort_pairs).dispatch(1, x_SD, EXPERT_SK, weight_SK)
    assert torch.equal(listed.order_N.long(), moved.order_N)
    assert listed.first_L.diff().tolist() == moved.rows
    assert torch.equal(listed.x_ND[listed.order_N // 2], moved.x_ND)
    assert load.take() == ((0, 0, 0), (3, 1, 2))
    assert load.take() == ((0, 0, 0), (0, 0, 0))


def test_nothing_moves_on_one_device() -> None:
    exchange, x_SD = OneDevice(OneRank(3), sort_pairs), torch.randn(3, 8)
    assert exchange.share(x_SD) is exchange.reduce(x_SD) is exchange.gather(x_SD) is x_SD
    listed = exchange.dispatch(0, x_SD, EXPERT_SK, torch.rand(3, 2))
    y_SKD = torch.randn(3, 2, 8)
    assert exchange.combine(listed, y_SKD) is y_SKD
