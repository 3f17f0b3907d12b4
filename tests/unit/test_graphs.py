"""Replayed decode steps against computed ones. A capture here computes again, into the place it was captured with."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.config import MixtralConfig
from model.exchange import OneRank, SlotLoad
from model.graphs import graph_sizes
from model.kv_cache import KVCache
from model.mixtral import Mixtral
from model.shard import Shard
from tests.paged_texts import PAGE, PagedTexts
from tests.random_model import RandomModel
from tests.tiny import CONFIG

pytest.importorskip("triton", reason="kernels run in Triton's interpreter")

from model.triton_backend import TritonBackend

CPU = torch.device("cpu")
MODEL = MixtralConfig.from_dict(CONFIG | {"max_position_embeddings": 64, "num_hidden_layers": 1}, "config.json")
MAX_ROWS = 4


class Recomputed:
    """Captures as a GPU does, as far as anybody can see from outside. Notes how often it replayed how many rows."""

    def __init__(self) -> None:
        self.replayed: list[int] = []

    def __call__(self, compute: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        out = compute()

        def replay() -> None:
            self.replayed.append(len(out))
            out.copy_(compute())

        return replay, out


class Rig:
    def __init__(self) -> None:
        self.recomputed = Recomputed()
        backend = TritonBackend(MODEL, CPU, torch.float32, lambda: self.recomputed)
        self.model = Mixtral(MODEL, RandomModel(MODEL, CPU, torch.float32).weights(), backend=backend)
        self.memories = [
            KVCache(MODEL, Shard(), num_pages=30, page_size=PAGE, dtype=torch.float32, device=CPU) for _ in range(2)
        ]
        self.exchange = OneRank(4, SlotLoad(1, 4))
        self.captured: list[tuple[int, int]] = []
        self.model.capture_decode(self.memories[0], self.exchange, MAX_ROWS, lambda *done: self.captured.append(done))


@pytest.fixture(scope="module")
def shared_rig() -> Rig:
    return Rig()


@pytest.fixture
def rig(shared_rig: Rig) -> Rig:
    """Captured once for all tests; what it has counted is forgotten."""
    assert shared_rig.exchange.load is not None
    shared_rig.exchange.load.take()
    shared_rig.recomputed.replayed.clear()
    return shared_rig


@pytest.mark.parametrize("rows", [1, 3, 5])
def test_a_replayed_step_is_the_computed_one(rig: Rig, rows: int) -> None:
    plain = OneRank(4, SlotLoad(1, 4))
    texts = [[random.Random(row).randrange(384) for _ in range(3 + row)] for row in range(rows)]
    sequences = PagedTexts(texts, 30, random.Random(rows))
    for lengths in ([len(text) - 1 for text in texts], [1] * rows):
        batch = sequences.step(lengths)
        found = rig.model.forward(batch, rig.memories[0], rig.exchange)
        expected = rig.model.forward(batch, rig.memories[1], plain)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        for kept, other in zip(*(memory.layer(0) for memory in rig.memories), strict=True):
            pages = slice(0, 30 * PAGE)  # but for scratch
            torch.testing.assert_close(kept[pages], other[pages], rtol=1e-5, atol=1e-5)
    assert rig.recomputed.replayed == ([{1: 1, 3: 4}[rows]] if rows < 5 else [])
    assert rig.exchange.load is not None
    assert plain.load is not None
    assert rig.exchange.load.take() == plain.load.take()


def test_rows_whose_states_are_not_wanted_are_left_out(rig: Rig) -> None:
    batch = PagedTexts([[5], [6], [7]], 30, random.Random(0)).step([1, 1, 1])
    whole = rig.model.forward(batch, rig.memories[0], rig.exchange)
    some = replace(batch, logits_rows=torch.tensor([2, 0]))
    assert torch.equal(rig.model.forward(some, rig.memories[0], rig.exchange), whole[[2, 0]])
    assert rig.recomputed.replayed == [4, 4]


def test_steps_that_graphs_do_not_know_are_computed(rig: Rig) -> None:
    """Other memory or exchange, routing to be told, several tokens of a text, no text at all."""
    memory, other = rig.memories
    one = PagedTexts([[5, 6, 7]], 30, random.Random(0))
    rig.model.forward(one.step([2]), memory, rig.exchange)
    batch = one.step([1])
    rig.model.forward(batch, other, rig.exchange)
    rig.model.forward(batch, memory, OneRank(4))
    rig.model.forward(batch, memory, rig.exchange, [])
    rig.model.forward(PagedTexts([], 30, random.Random(0)).step([]), memory, rig.exchange)
    assert rig.recomputed.replayed == []
    assert rig.model.replayed is False
    rig.model.forward(batch, memory, rig.exchange)
    assert rig.recomputed.replayed == [1]
    assert rig.model.replayed is True


def test_a_page_table_that_is_too_long_is_computed_too(rig: Rig) -> None:
    """A text of 64 tokens has 16 pages at most here; with a window it may list more."""
    batch = PagedTexts([[5]], 30, random.Random(0)).step([1])
    [span] = batch.spans
    long = replace(batch, spans=(replace(span, runs=(*span.runs, *([(9, 4)] * 20))),))
    assert torch.equal(
        rig.model.forward(long, rig.memories[0], rig.exchange), rig.model.forward(batch, rig.memories[1], OneRank(4))
    )
    assert rig.recomputed.replayed == []


def test_a_graph_no_larger_than_it_must_be() -> None:
    assert graph_sizes(1) == [1]
    assert graph_sizes(6) == [1, 2, 4, 6]
    assert graph_sizes(40) == [1, 2, 4, 8, 16, 32, 40]
    assert graph_sizes(256)[-2:] == [240, 256]


def test_progress_is_told_and_graphs_can_be_dropped() -> None:
    rig = Rig()
    assert rig.captured == [(1, 3), (2, 3), (3, 3)]
    rig.model.drop_graphs()
    rig.model.forward(PagedTexts([[5]], 30, random.Random(0)).step([1]), rig.memories[0], rig.exchange)
    assert rig.recomputed.replayed == []
    assert rig.model.replayed is None
