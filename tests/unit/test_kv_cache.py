"""Page memory: what is written where, views of runs, and what a page costs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model.config import MixtralConfig
from model.kv_cache import KVCache
from model.shard import Shard
from tests.tiny import CONFIG

CONFIG_2_LAYERS = MixtralConfig.from_dict(CONFIG, "config.json")


def make(shard: Shard = Shard(), dtype: torch.dtype = torch.float32) -> KVCache:  # noqa: B008
    return KVCache(CONFIG_2_LAYERS, shard, num_pages=6, page_size=4, dtype=dtype, device=torch.device("cpu"))


def test_tokens_lie_where_their_slots_say_and_nowhere_else() -> None:
    kv = make()
    torch.manual_seed(0)
    key, value = torch.randn(3, 2, 16), torch.randn(3, 2, 16)
    slots = torch.tensor([4, 23, 0])
    kv.write(1, slots, key, value)
    for memory, written in zip(kv.layer(1), (key, value), strict=True):
        assert torch.equal(memory[slots], written)
        assert memory.count_nonzero() == written.count_nonzero()
    assert not any(memory.any() for memory in kv.layer(0))


def test_a_run_of_pages_is_a_view_and_one_piece() -> None:
    key, value = make().layer(0)
    for memory in (key, value):
        run = memory[2 * 4 : 5 * 4]
        assert run.is_contiguous()
        assert run.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr()


def test_writing_no_tokens_is_fine() -> None:
    make().write(0, torch.empty(0, dtype=torch.int64), torch.empty(0, 2, 16), torch.empty(0, 2, 16))


@pytest.mark.parametrize("shard", [Shard(), Shard(1, 2), Shard(3, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_page_costs_what_is_allocated_for_it(shard: Shard, dtype: torch.dtype) -> None:
    kv = make(shard, dtype)
    allocated = sum(memory.nbytes for layer in range(2) for memory in kv.layer(layer))
    assert KVCache.bytes_per_page(CONFIG_2_LAYERS, shard, 4, dtype) * (kv.num_pages + 1) == allocated  # and scratch


def test_what_is_written_to_scratch_is_in_no_page() -> None:
    kv = make()
    slots = torch.tensor([3, kv.scratch_slot, kv.scratch_slot])
    kv.write(0, slots, torch.ones(3, 2, 16), torch.ones(3, 2, 16))
    for memory in kv.layer(0):
        assert memory[: kv.num_pages * kv.page_size].any(dim=(1, 2)).nonzero().flatten().tolist() == [3]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux says there what a process holds")
def test_pages_that_nobody_has_written_take_no_memory() -> None:
    def held() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = held()
    kv = KVCache(
        CONFIG_2_LAYERS, Shard(), num_pages=1 << 18, page_size=4, dtype=torch.float32, device=torch.device("cpu")
    )
    assert sum(memory.nbytes for layer in range(2) for memory in kv.layer(layer)) > 500 << 20
    assert held() - before < 100 << 20
