"""N ranks = one rank: the same tokens, and hidden states within rounding, for every layout, exchange and transport."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from cluster.config import EngineConfig, ExchangeChoice, ParallelConfig
from cluster.messages import Exchange, StepResult, TokenLogprob
from cluster.rendezvous import Transport, has_shared_memory
from cluster.results import merge
from tests.dist.ranks import run_ranks
from tests.dist.runs import Recorded, engine_config, moved, placement_for, record, replay, rows_of_experts
from tests.tiny import write_checkpoint

EVERYTHING = bool(os.environ.get("MIXTRAL_TEST_ALL"))
SEED = 9
TRANSPORTS: list[Transport] = ["gloo", *(["shared_memory"] if has_shared_memory() else [])]  # type: ignore[list-item]
FAST = TRANSPORTS[-1]
EXCHANGES: list[ExchangeChoice] = ["all_to_all", "all_reduce"]
DEMO = "demo"
CHECKPOINTS = {
    "8 experts": {"num_attention_heads": 8, "num_local_experts": 8},
    "5 experts": {"num_attention_heads": 8, "num_local_experts": 5, "vocab_size": 391},
    "one of 3 experts per token": {
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "num_local_experts": 3,
        "num_experts_per_tok": 1,
        "intermediate_size": 90,
    },
}


def layouts(ranks: int) -> Iterator[ParallelConfig]:
    """Every way to arrange so many ranks."""
    for tensor in range(1, ranks + 1):
        for expert in range(1, ranks + 1):
            if ranks % tensor == 0 and ranks % expert == 0:
                for exchange in EXCHANGES:
                    for spare in (0, 1) if expert > 1 else (0,):
                        yield ParallelConfig(tensor, ranks // tensor, expert, exchange, spare)


def cases() -> list[tuple[str, ParallelConfig]]:
    """All of them, or as few as have everything once: with 2 and with 4 ranks each checkpoint, each degree, and both
    exchanges with and without data groups. Eight ranks of the demo model take too long for that."""
    names = [*CHECKPOINTS, DEMO]
    every = [(name, layout) for ranks in (2, 4, 8) for layout in layouts(ranks) for name in names]
    if EVERYTHING:
        return every
    drawn = random.Random(SEED)
    chosen: list[tuple[str, ParallelConfig]] = []
    for ranks, most in ((2, 8), (4, 8), (8, 2)):
        some = [case for case in every if case[1].ranks == ranks and (ranks < 8 or case[0] != DEMO)]
        drawn.shuffle(some)
        seen: set[object] = set()
        for _ in range(most):
            name, layout = max(some, key=lambda case: len(traits(*case) - seen))
            if traits(name, layout) <= seen:
                break
            chosen.append((name, layout))
            seen |= traits(name, layout)
    return chosen


def traits(name: str, layout: ParallelConfig) -> set[object]:
    degrees = {("tensor", layout.tensor), ("expert", layout.expert), ("spare", layout.spare_slots)}
    return {name, (layout.exchange, layout.data > 1), *degrees}


def case_id(case: tuple[str, ParallelConfig]) -> str:
    name, layout = case
    expert = f"expert{layout.expert}" + ("+spare" if layout.spare_slots else "")
    return f"{name}-tensor{layout.tensor}-data{layout.data}-{expert}-{layout.exchange}"


Record = Callable[[str, ParallelConfig], tuple[EngineConfig, Recorded]]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Record:
    """What one process gives for a checkpoint, with so many data groups."""

    @cache
    def checkpoint(name: str) -> Path:
        if name == DEMO:
            return Path(__file__).parents[2] / "model" / "demo"
        return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", **CHECKPOINTS[name])

    @cache
    def made(name: str, data: int) -> Recorded:
        return record(engine_config(checkpoint(name), ParallelConfig(data=data)))

    return lambda name, layout: (engine_config(checkpoint(name), layout), made(name, layout.data))


def test_data_groups_preemption_and_cached_prefixes_change_no_text(recorded: Record) -> None:
    """In one process: what the other tests compare with."""
    _, alone = recorded("8 experts", ParallelConfig())
    assert alone.preemptions > 0
    assert any(result.routing for result in alone.results)
    for data in (2, 4):
        _, grouped = recorded("8 experts", ParallelConfig(data=data))
        assert grouped.texts == alone.texts
        assert any(0 in plan.group_tokens for plan in grouped.plans), "no group was idle"


@pytest.mark.parametrize("case", cases(), ids=case_id)
def test_ranks_give_what_one_process_gives(case: tuple[str, ParallelConfig], recorded: Record) -> None:
    exchange = case[1].exchange
    assert exchange != "auto"
    check(*recorded(*case), (exchange,), FAST)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_every_transport_with_exchanges_in_turn(transport: Transport, recorded: Record) -> None:
    check(*recorded("5 experts", ParallelConfig(2, 2, 2)), ("all_to_all", "all_reduce"), transport)


def test_every_rank_quantises_alike(recorded: Record) -> None:
    config, _ = recorded("8 experts", ParallelConfig(2, 2, 2))
    config = replace(config, quantization="int8")
    check(config, record(config), ("all_to_all", "all_reduce"), FAST)


def test_bfloat16_stays_within_rounding(recorded: Record) -> None:
    """Sampled tokens may differ there, and what follows them: so what is of prompts alone is compared."""
    config, _ = recorded("8 experts", ParallelConfig(2, 2, 2))
    config = replace(config, dtype="bfloat16")
    expected = record(config)
    found = merged_results(config, expected, ("all_to_all", "all_reduce"), FAST)
    rounding = 3e-2
    for ours, one in zip(found, expected.results, strict=True):
        assert ours.seqs == one.seqs, "none is lost, and none comes twice"
        assert ours.pooled.keys() == one.pooled.keys()
        for seq, rows in one.pooled.items():
            theirs = torch.tensor(rows)
            atol = rounding * float(theirs.abs().max())
            torch.testing.assert_close(torch.tensor(ours.pooled[seq]), theirs, rtol=0, atol=atol)
        for seq, each in one.prompt_logprobs.items():
            for mine, other in zip(ours.prompt_logprobs[seq], each, strict=True):
                assert mine.logprob == pytest.approx(other.logprob, abs=rounding * 10)
    assert any(result.pooled for result in found)
    assert any(result.prompt_logprobs for result in found)


def merged_results(
    config: EngineConfig, expected: Recorded, exchanges: tuple[Exchange, ...], transport: Transport
) -> list[StepResult]:
    ranks = run_ranks(
        config.parallel.ranks,
        replay,
        config,
        expected.plans,
        exchanges,
        tensor=config.parallel.tensor,
        transport=transport,
        timeout_s=300,  # of machines that have much else to do
    )
    return [merge(results, placement_for(config)) for results in zip(*ranks, strict=True)]


def check(config: EngineConfig, expected: Recorded, exchanges: tuple[Exchange, ...], transport: Transport) -> None:
    found = merged_results(config, expected, exchanges, transport)
    first = placement_for(config)
    for index, (ours, one, rows) in enumerate(zip(found, expected.results, expected.expert_rows, strict=True)):
        same(ours, one)
        # One process computes only some rows of the last layer: nobody asks for the others.
        placement = first if index < len(found) // 2 else moved(first)
        assert rows_of_experts(ours, placement)[:-1] == rows[:-1]


def same(found: StepResult, expected: StepResult) -> None:
    assert (found.seqs, found.token_ids) == (expected.seqs, expected.token_ids)
    assert found.failed == expected.failed == {}
    assert found.pooled.keys() == expected.pooled.keys()
    for seq, rows in expected.pooled.items():
        torch.testing.assert_close(torch.tensor(found.pooled[seq]), torch.tensor(rows), rtol=1e-3, atol=1e-4)
    assert _without_values(found.logprobs) == _without_values(expected.logprobs)
    for seq, one in expected.logprobs.items():
        assert found.logprobs[seq].logprob == pytest.approx(one.logprob, abs=1e-3)
    assert found.prompt_logprobs.keys() == expected.prompt_logprobs.keys()
    for seq, each in expected.prompt_logprobs.items():
        for ours, one in zip(found.prompt_logprobs[seq], each, strict=True):
            assert ours.logprob == pytest.approx(one.logprob, abs=1e-3)
    assert found.routing.keys() == expected.routing.keys()
    for seq, layers in expected.routing.items():
        for ours, one in zip(found.routing[seq], layers, strict=True):
            assert [expert for expert, _ in ours] == [expert for expert, _ in one]
            assert [weight for _, weight in ours] == pytest.approx([weight for _, weight in one], abs=1e-4)


def _without_values(logprobs: dict[int, TokenLogprob]) -> dict[int, TokenLogprob]:
    return {seq: replace(one, logprob=0.0, top=()) for seq, one in logprobs.items()}
