"""Replayed decode steps against computed ones. A capture here computes again, into the place it was captured with."""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from model.config import MixtralConfig
from model.device_exchange import padded_alone
from model.exchange import OneRank, SlotLoad
from model.graphs import CudaCapture, PaddedSteps
from model.kv_cache import KVCache
from model.mixtral import Mixtral
from model.shard import Shard
from tests.paged_texts import PAGE, PagedTexts
from tests.random_model import RandomModel
from tests.recomputed import Recomputed
from tests.tiny import CONFIG

pytest.importorskip("triton", reason="kernels run in Triton's interpreter")

from model.triton_backend import TritonBackend

CPU = torch.device("cpu")
# As small as kernels take it: their interpreter is slow.
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
MODEL = MixtralConfig.from_dict(CONFIG | SMALL | {"max_position_embeddings": 64, "num_hidden_layers": 1}, "config.json")
SIZES = (4, 2)


class Rig:
    def __init__(self) -> None:
        self.recomputed = Recomputed()
        backend = TritonBackend(MODEL, CPU, torch.float32, lambda: self.recomputed)
        self.model = Mixtral(MODEL, RandomModel(MODEL, CPU, torch.float32).weights(), backend=backend)
        self.memories = [
            KVCache(MODEL, Shard(), num_pages=30, page_size=PAGE, dtype=torch.float32, device=CPU) for _ in range(2)
        ]
        self.load = SlotLoad(1, 4)
        exchange = padded_alone(OneRank(4, self.load))
        self.graphs = self.model.decode_graphs(PaddedSteps(self.memories[0], max(SIZES), exchange))
        for rows in SIZES:
            self.graphs.capture(rows)


@pytest.fixture(scope="module")
def shared_rig() -> Rig:
    return Rig()


@pytest.fixture
def rig(shared_rig: Rig) -> Rig:
    """Captured once for all tests; what it has counted is forgotten."""
    shared_rig.load.take()
    shared_rig.recomputed.replayed.clear()
    return shared_rig


def assert_same_pages(memories: list[KVCache]) -> None:
    for kept, other in zip(*(memory.layer(0) for memory in memories), strict=True):
        pages = slice(0, 30 * PAGE)  # but for scratch
        torch.testing.assert_close(kept[pages], other[pages], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rows", "graph"), [(1, 2), (3, 4)])
def test_a_replayed_step_is_the_computed_one(rig: Rig, rows: int, graph: int) -> None:
    plain = OneRank(4, SlotLoad(1, 4))
    texts = [[random.Random(row).randrange(384) for _ in range(4 + row)] for row in range(rows)]
    sequences = PagedTexts(texts, 30, random.Random(rows))
    prompts = sequences.step([len(text) - 2 for text in texts])
    for memory in rig.memories:
        rig.model.forward(prompts, memory, OneRank(4))
    for _ in range(2):
        batch = sequences.step([1] * rows)
        found = rig.graphs.replay(batch, graph, [rows])
        torch.testing.assert_close(found, rig.model.forward(batch, rig.memories[1], plain), rtol=1e-5, atol=1e-5)
        assert_same_pages(rig.memories)
    assert rig.recomputed.replayed == [graph] * 2
    assert plain.load is not None
    assert rig.load.take() == plain.load.take(), "padding is no load"


def test_rows_whose_states_are_not_wanted_are_left_out(rig: Rig) -> None:
    batch = PagedTexts([[5], [6], [7]], 30, random.Random(0)).step([1, 1, 1])
    whole = rig.graphs.replay(batch, 4, [3])
    some = replace(batch, logits_rows=torch.tensor([2, 0]))
    assert torch.equal(rig.graphs.replay(some, 4, [3]), whole[[2, 0]])


def test_capturing_writes_nobody_s_keys(rig: Rig) -> None:
    """Also after steps: what is computed once before is padding alone."""
    batch = PagedTexts([[5], [6]], 30, random.Random(0)).step([1, 1])
    rig.graphs.replay(batch, 2, [2])
    rig.load.take()
    for memory in rig.memories[0].layer(0):
        memory.zero_()
    before = [memory[: 30 * PAGE].clone() for memory in rig.memories[0].layer(0)]
    rig.graphs.capture(2)
    assert all(torch.equal(a, b[: 30 * PAGE]) for a, b in zip(before, rig.memories[0].layer(0), strict=True))
    assert rig.load.take() == ((0, 0, 0, 0),)


def test_texts_may_list_more_pages_than_there_are(rig: Rig) -> None:
    """With a sliding window a text lists pages it has given back as well: up to its longest, each of them."""
    batch = PagedTexts([[5]], 30, random.Random(0)).step([1])
    [span] = batch.spans
    longest = replace(batch, spans=(replace(span, runs=(*span.runs, *[(9, 1)] * 15)),))
    assert torch.equal(rig.graphs.replay(longest, 4, [1]), rig.graphs.replay(batch, 4, [1]))


def test_a_capture_computes_once_before_and_leaves_other_threads_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch is asked for, in its own terms; a GPU is where it is done."""
    done: list[str] = []
    capturing = inspect.signature(torch.cuda.graph)

    @contextmanager
    def capture(*arguments: Any, **options: Any) -> Iterator[None]:
        asked = capturing.bind(*arguments, **options).arguments
        assert asked["pool"] == "the pool of all its graphs"
        assert asked["capture_error_mode"] == "thread_local"
        done.append("capture")
        yield
        done.append("captured")

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "the pool of all its graphs")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("wait"))
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: done.append("replay")))

    def compute() -> Tensor:
        done.append("compute")
        return torch.zeros(1)

    replay, _ = CudaCapture()(compute)
    replay()
    assert done == ["compute", "wait", "capture", "compute", "captured", "replay"]
