"""Dispatch and combine on several ranks against the loop over experts in one place."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from cluster.all_to_all import AllToAll, SlotTables, exchange_for
from cluster.messages import Exchange
from cluster.placement import Placement, even_placement
from cluster.rendezvous import has_shared_memory
from model.comm import Groups, split_rows
from model.exchange import OneRank, SlotLoad
from tests.threaded_ranks import on_groups

pytestmark = pytest.mark.skipif(not has_shared_memory(), reason="shared memory transport is for x86-64 Linux")

D = 6
CPU = torch.device("cpu")


def routed(T: int, E: int, K: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, K different experts for each, and their weights."""
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(T, D, generator=generator)
    expert_TK = torch.rand(T, E, generator=generator).topk(K).indices
    weight_TK = torch.rand(T, K, generator=generator)
    return x_TD, expert_TK, weight_TK


def expert(number: int, x_nD: Tensor, part: int = 0, parts: int = 1) -> Tensor:
    """Something that neither commutes with the sum nor is the same for two experts; or one of its parts."""
    shares = torch.tensor([1.0, -2.0, 5.0, 3.0])[:parts]
    return (torch.sin(x_nD * (number + 1)) + number) * (shares[part] / shares.sum())


def definition(x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
    rows = [
        sum(weight_TK[t, k] * expert(int(expert_TK[t, k]), x_TD[t]) for k in range(expert_TK.shape[1]))
        for t in range(len(x_TD))
    ]
    return torch.stack(rows) if rows else x_TD  # type: ignore[arg-type]


def compute(x_ND: Tensor, rows: list[int], experts: tuple[int, ...], part: int = 0, parts: int = 1) -> Tensor:
    assert sum(rows) == len(x_ND)
    each = zip(experts, torch.split(x_ND, rows), strict=True)
    return torch.cat([expert(e, rows_nD, part, parts) for e, rows_nD in each])


@pytest.mark.parametrize("K", [1, 2, 3])
@pytest.mark.parametrize("T", [0, 1, 13])
def test_one_rank(T: int, K: int) -> None:
    x_TD, expert_TK, weight_TK = routed(T, 5, K, seed=T)
    exchange = OneRank(5)
    sent = exchange.dispatch(0, x_TD, expert_TK, weight_TK)
    got = exchange.combine(sent, compute(sent.x_ND, sent.rows, tuple(range(5))))
    torch.testing.assert_close(got, definition(x_TD, expert_TK, weight_TK))


@dataclass(frozen=True)
class Case:
    tensor: int
    data: int
    experts: int
    slices: int = 1
    spare: int = 0

    @property
    def placement(self) -> Placement:
        """Of the second of two layers; the first has its experts elsewhere."""
        even = even_placement(2, self.experts, self.tensor * self.data, self.slices, self.spare)
        return replace(even, expert_of=(even.expert_of[0][::-1], even.expert_of[1]))


CASES = [
    Case(2, 1, 8),
    Case(2, 1, 5),
    Case(3, 1, 4),
    Case(4, 1, 3),
    Case(2, 1, 8, spare=2),
    Case(4, 1, 4, slices=2),
    Case(4, 1, 4, slices=4),
    Case(1, 2, 8),
    Case(1, 3, 4, spare=1),
    Case(2, 2, 4),
    Case(2, 2, 5, slices=2, spare=1),
    Case(1, 4, 3, slices=4),
]


@pytest.mark.parametrize("mode", ["all_to_all", "all_reduce"])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("tokens", [(0, 1, 0, 0), (13, 0, 4, 9)], ids=["one", "many"])  # of group 0, 1, 2, 3
def test_every_layout_gives_what_the_definition_says(mode: Exchange, case: Case, tokens: tuple[int, ...]) -> None:
    group_tokens = [max(tokens)] if case.data == 1 else list(tokens[: case.data])
    placement = case.placement
    inputs = [routed(T, case.experts, min(2, case.experts), seed=group) for group, T in enumerate(group_tokens)]

    def rank_main(groups: Groups) -> tuple[Tensor, tuple[int, ...]]:
        rank = groups.world.rank
        load = SlotLoad(2, placement.slots_per_rank)
        exchange = exchange_for(mode, groups, SlotTables(placement, CPU), group_tokens, load)
        x_SD, expert_SK, weight_SK = (exchange.share(x) for x in inputs[rank // case.tensor])
        sent = exchange.dispatch(1, x_SD, expert_SK, weight_SK)
        held = placement.slots_of(rank)[1]
        y_ND = compute(sent.x_ND, sent.rows, held, rank % case.slices, case.slices)
        nothing, rows = load.take()
        assert sum(nothing) == 0
        return exchange.gather(exchange.combine(sent, y_ND)), rows

    results = on_groups(case.tensor, case.data, rank_main)
    for rank, (got, _) in enumerate(results):
        torch.testing.assert_close(got, definition(*inputs[rank // case.tensor]))
        assert torch.equal(got, results[rank // case.tensor * case.tensor][0]), (
            "a group's ranks go on with the same bits"
        )
    # Every pair is computed once by each slice, and counted by all of them.
    pairs = Counter(e for _, expert_TK, _ in inputs for e in expert_TK.flatten().tolist())
    for part in range(case.slices):
        rows = [n for rank in range(part, len(results), case.slices) for n in results[rank][1]]
        counted: Counter[int] = Counter()
        for e, n in zip(placement.expert_of[1], rows, strict=True):
            counted[e] += n
        assert +counted == pairs


@pytest.mark.parametrize("mode", ["all_to_all", "all_reduce"])
@pytest.mark.parametrize("seed", range(12))
def test_any_placement(mode: Exchange, seed: int) -> None:
    """Replicas wherever load has put them, also two on one rank."""
    rng = random.Random(seed)
    tensor, data = rng.choice([(1, 2), (2, 1), (2, 2), (4, 1), (1, 4), (3, 1)])
    ranks = tensor * data
    slices = rng.choice([n for n in (1, 2, 4) if ranks % n == 0])
    experts = rng.randint(1, 6)
    slots = -(-experts // (ranks // slices)) + rng.randint(0, 2)
    layers = []
    for _ in range(2):
        layer = [*range(experts), *rng.choices(range(experts), k=ranks // slices * slots - experts)]
        rng.shuffle(layer)
        layers.append(tuple(layer))
    placement = Placement(ranks, slots, tuple(layers), slices)
    group_tokens = [rng.choice([0, 1, 5, 12]) for _ in range(data)]
    chosen = rng.randint(1, experts)
    inputs = [routed(T, experts, chosen, seed) for T in group_tokens]

    def rank_main(groups: Groups) -> Tensor:
        rank = groups.world.rank
        exchange = exchange_for(mode, groups, SlotTables(placement, CPU), group_tokens)
        x_SD, expert_SK, weight_SK = (exchange.share(x) for x in inputs[rank // tensor])
        sent = exchange.dispatch(1, x_SD, expert_SK, weight_SK)
        y_ND = compute(sent.x_ND, sent.rows, placement.slots_of(rank)[1], rank % slices, slices)
        return exchange.gather(exchange.combine(sent, y_ND))

    for rank, got in enumerate(on_groups(tensor, data, rank_main)):
        torch.testing.assert_close(got, definition(*inputs[rank // tensor]))


def test_a_single_row_of_an_odd_width_travels_in_groups() -> None:
    """Two bytes each: what follows the row begins where no float may."""
    x_1D = torch.arange(3.0)[None].bfloat16()

    def rank_main(groups: Groups) -> tuple[Tensor, Tensor]:
        tokens = [1, 0]
        exchange = exchange_for("all_reduce", groups, SlotTables(even_placement(1, 2, 2), CPU), tokens)
        own = slice(0, tokens[groups.world.rank])
        sent = exchange.dispatch(0, x_1D[own], torch.tensor([[1, 0]])[own], torch.tensor([[0.75, 0.25]])[own])
        return sent.x_ND, exchange.combine(sent, sent.x_ND * (1 + groups.world.rank))

    (first, output), (second, nothing) = on_groups(1, 2, rank_main)
    assert torch.equal(first, x_1D)
    assert torch.equal(second, x_1D)
    assert torch.equal(output, x_1D.float() * 1.75)
    assert len(nothing) == 0


def test_replicas_take_turns() -> None:
    """Expert 0 sits on both ranks: half of its tokens go to each, whoever sends them."""
    placement = Placement(2, 2, ((0, 1, 0, 2),))
    expert_TK, x_TD = torch.zeros(12, 1, dtype=torch.int64), torch.zeros(12, D)

    def rank_main(groups: Groups) -> dict[str, list[int]]:
        found = {}
        modes: list[Exchange] = ["all_to_all", "all_reduce"]
        for mode in modes:
            load = SlotLoad(1, 2)
            exchange = exchange_for(mode, groups, SlotTables(placement, CPU), [12], load)
            sent = exchange.dispatch(0, *(exchange.share(x) for x in (x_TD, expert_TK, torch.ones(12, 1))))
            exchange.combine(sent, sent.x_ND)
            found[mode] = sent.rows
        return found

    assert on_groups(2, 1, rank_main) == [{"all_to_all": [6, 0], "all_reduce": [6, 0]}] * 2


@pytest.mark.parametrize("data", [1, 2])
def test_the_share_of_the_sum(data: int) -> None:
    partial = torch.arange(14.0).view(7, 2)
    group_tokens = [3, 7][-data:]

    def rank_main(groups: Groups) -> tuple[Tensor, Tensor]:
        exchange = AllToAll(groups, SlotTables(even_placement(1, 2, 2 * data), CPU), group_tokens)
        own = partial[: group_tokens[groups.world.rank // 2]]
        return exchange.share(own), exchange.reduce(own * (groups.tensor.rank + 1))

    results = on_groups(2, data, rank_main)
    for rank, (share, reduced) in enumerate(results):
        assert len(share) == split_rows(group_tokens[rank // 2], 2)[rank % 2]
        assert torch.equal(reduced, share * 3)
