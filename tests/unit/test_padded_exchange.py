"""The exchange of captured steps: with padding in every group, the same rows as one process, and nobody's load."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cluster.all_to_all import SlotTables
from cluster.padded_exchange import PaddedExchange
from cluster.placement import Placement, even_placement
from cluster.rendezvous import has_shared_memory
from model.comm import Comm, Groups
from model.config import MixtralConfig
from model.device_exchange import Listed
from model.exchange import OneRank, SlotLoad
from model.graphs import PaddedSteps
from model.kv_cache import KVCache
from model.layers import PlainLinear
from model.mixtral import Mixtral
from model.shard import Shard
from model.weights import MixtralWeights
from tests.paged_texts import PAGE, PagedTexts
from tests.random_model import RandomModel
from tests.recomputed import Recomputed
from tests.threaded_ranks import on_groups
from tests.tiny import CONFIG

pytest.importorskip("triton", reason="kernels run in Triton's interpreter")

from model.kernels import paged_decode, routing
from model.triton_backend import TritonBackend

pytestmark = pytest.mark.skipif(not has_shared_memory(), reason="shared memory transport is for x86-64 Linux")

CPU = torch.device("cpu")
D, K, ROWS = 6, 2, 4


def experts(number: int, x_D: Tensor) -> Tensor:
    return torch.sin(x_D * (number + 1)) + number


def listed_experts(listed: Listed, held: tuple[int, ...], parts: int) -> Tensor:
    """What the kernel makes of them: weighted, in their places, zeros for pairs that are others'."""
    S, K = listed.weight_SK.shape
    y_SKD = torch.zeros(S, K, listed.x_ND.shape[1])
    for slot, (first, end) in enumerate(zip(listed.first_L, listed.first_L[1:], strict=False)):
        for pair in listed.order_N[first:end].tolist():
            token, k = divmod(pair, K)
            y_SKD[token, k] = experts(held[slot], listed.x_ND[token]) * listed.weight_SK[token, k] / parts
    return y_SKD


@pytest.mark.parametrize("seed", range(8))
def test_rows_that_are_there_get_what_the_definition_says(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "ONE_PROGRAM", 0)  # sorted by torch: Triton's interpreter has no threads
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    tensor, data = [(2, 1), (1, 2), (2, 2), (4, 1), (1, 4), (3, 1), (1, 1), (4, 1)][seed]
    ranks = tensor * data
    slices = rng.choice([n for n in (1, 2, 4) if ranks % n == 0])
    placement = even_placement(2, 5, ranks, slices, spare_slots=rng.randint(0, 2) if ranks > 1 else 0)
    tokens = torch.tensor([rng.randint(0, ROWS) for _ in range(data)], dtype=torch.int32)
    inputs = [
        (torch.randn(ROWS, D, generator=generator), torch.rand(ROWS, 5, generator=generator).topk(K).indices,
         torch.rand(ROWS, K, generator=generator))
        for _ in range(data)
    ]  # fmt: skip

    def rank_main(groups: Groups) -> tuple[Tensor, tuple[int, ...]]:
        load = SlotLoad(2, placement.slots_per_rank)
        exchange = PaddedExchange(groups, SlotTables(placement, CPU), load)(ROWS, tokens)
        mine = (exchange.share(x) for x in inputs[groups.world.rank // tensor])
        listed = exchange.dispatch(1, *mine)
        assert isinstance(listed, Listed)
        y_SKD = listed_experts(listed, placement.slots_of(groups.world.rank)[1], slices)
        combined = exchange.combine(listed, y_SKD)
        nothing, rows = load.take()
        assert sum(nothing) == 0
        return exchange.gather(combined if combined.dim() == 2 else combined.sum(1)), rows

    results = on_groups(tensor, data, rank_main)
    for rank, (found, _) in enumerate(results):
        x_RD, expert_RK, weight_RK = inputs[rank // tensor]
        for row in range(int(tokens[rank // tensor])):
            chosen = zip(expert_RK[row].tolist(), weight_RK[row], strict=True)
            torch.testing.assert_close(found[row], sum(w * experts(e, x_RD[row]) for e, w in chosen))
    assert sum(n for _, rows in results for n in rows) == int(tokens.sum()) * K * slices, "padding is nobody's load"


class Turns:
    """Ranks that are threads compute one at a time: Triton's interpreter knows no threads."""

    def __init__(self, comm: Comm, lock: threading.Lock) -> None:
        self._comm, self._lock = comm, lock
        self.rank, self.size = comm.rank, comm.size

    @contextmanager
    def waiting(self) -> Iterator[None]:
        self._lock.release()
        try:
            yield
        finally:
            self._lock.acquire()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            with self.waiting():
                return getattr(self._comm, name)(*arguments)

        return call


# As small as kernels take it: their interpreter is slow.
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_local_experts": 2}
MODEL = MixtralConfig.from_dict(CONFIG | HEADS | SIZES | {"max_position_embeddings": 16}, "config.json")


def of_rank(weights: MixtralWeights, placement: Placement, rank: int, tensor: int) -> MixtralWeights:
    """Attention of the first rank of a tensor group is the whole, that of the others nothing: their sum is right."""
    blocks = []
    for block, held in zip(weights.blocks, placement.slots_of(rank), strict=True):
        output = block.output if rank % tensor == 0 else PlainLinear(torch.zeros_like(block.output.weight_OI))
        # Experts lie together in memory, one after another.
        assert list(held) == list(range(held[0], held[-1] + 1))
        blocks.append(replace(block, output=output, experts=block.experts[held[0] : held[-1] + 1]))
    return replace(weights, blocks=tuple(blocks))


@pytest.mark.parametrize(("tensor", "group_tokens"), [(2, (1,)), (1, (1, 0))])
def test_replayed_steps_of_several_ranks_are_those_of_one(
    tensor: int, group_tokens: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paged_decode, "splits_for", lambda *_: 2)
    data = len(group_tokens)
    weights = RandomModel(MODEL, CPU, torch.float32).weights()
    placement = even_placement(1, MODEL.num_local_experts, tensor * data)
    texts = [[[group + 7 * row, 5] for row in range(rows)] for group, rows in enumerate(group_tokens)]
    lock = threading.Lock()

    def memory() -> KVCache:
        return KVCache(MODEL, Shard(), num_pages=8, page_size=PAGE, dtype=torch.float32, device=CPU)

    def rank_main(groups: Groups) -> list[Tensor]:
        with lock:
            world, in_group = Turns(groups.world, lock), Turns(groups.tensor, lock)
            own, group = of_rank(weights, placement, world.rank, tensor), world.rank // tensor
            model = Mixtral(MODEL, own, backend=TritonBackend(MODEL, CPU, torch.float32, Recomputed))
            load = SlotLoad(1, placement.slots_per_rank)
            exchange = PaddedExchange(Groups(world, in_group), SlotTables(placement, CPU), load)
            graphs = model.decode_graphs(PaddedSteps(memory(), 2, exchange, data))
            graphs.capture(2)
            sequences = PagedTexts(texts[group], 8, random.Random(0))
            return [graphs.replay(sequences.step([1] * group_tokens[group]), 2, group_tokens) for _ in range(2)]

    results = on_groups(tensor, data, rank_main)
    alone = Mixtral(MODEL, weights, backend=TritonBackend(MODEL, CPU, torch.float32))
    for rank, found in enumerate(results):
        kv, sequences = memory(), PagedTexts(texts[rank // tensor], 8, random.Random(0))
        for hidden_RD in found:
            batch = sequences.step([1] * group_tokens[rank // tensor])
            assert len(hidden_RD) == len(batch.spans)
            if len(hidden_RD):
                expected = alone.forward(batch, kv, OneRank(MODEL.num_local_experts))
                torch.testing.assert_close(hidden_RD, expected, rtol=1e-4, atol=1e-4)
