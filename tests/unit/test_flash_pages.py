"""flash-attn reading pages, by its definition: what we ask it gives what every row should see, and nothing else."""

from __future__ import annotations

import random
import sys

import pytest
import torch

from model import flash_pages, triton_backend
from model.batch import SequenceSpan
from model.config import MixtralConfig
from model.cpu_backend import CpuBackend
from model.device_attention import DevicePlanner, KernelReader
from model.device_exchange import padded_alone
from model.exchange import OneRank
from model.flash_pages import FlashReader, block_table, reads_pages
from model.graphs import DecodeBuffers, PaddedSteps
from model.kv_cache import KVCache
from model.mixtral import Mixtral
from model.shard import Shard
from model.varlen_attention import Chunks, flash_attn_attention, masked_attention, torch_flash_attention
from tests.fake_flash_attn import fake_flash_attn
from tests.paged_texts import PAGE, PagedTexts
from tests.random_model import RandomModel
from tests.tiny import CONFIG

pytest.importorskip("triton", reason="plans name what kernels take")

from model.kernels import paged_decode
from model.kernels.paged_decode import PageTable
from model.triton_backend import TritonBackend

CPU = torch.device("cpu")
H, G, C = 4, 2, 16


def memory(config: MixtralConfig) -> KVCache:
    return KVCache(config, Shard(), num_pages=40, page_size=PAGE, dtype=torch.float32, device=CPU)


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", fake_flash_attn())


@pytest.mark.usefixtures("flash_attn")
@pytest.mark.parametrize("window", [None, 1, 40, 300])
@pytest.mark.parametrize("page_size", [256, 512])
def test_it_reads_what_our_own_way_reads(window: int | None, page_size: int) -> None:
    key_NGC, value_NGC = torch.randn(2, 9 * page_size, G, C, generator=torch.Generator().manual_seed(page_size))
    spans = [
        SequenceSpan(0, 1, 700, ((6, 3),)),
        SequenceSpan(1, 1, 1, ((1, 1),)),
        SequenceSpan(2, 300, 600, ((8, 1), (2, 2))),
        SequenceSpan(302, 20, 20, ((0, 1),)),
        SequenceSpan(322, 1, 257, ((4, 2),)),
    ]
    query_THC = torch.randn(323, H, C, generator=torch.Generator().manual_seed(0))
    plan = DevicePlanner(page_size, window, kv_heads=G, processors=8, device=CPU).plan(spans)
    ours = KernelReader(plan, page_size, window, masked_attention)
    theirs = FlashReader(plan, page_size, window, max_tokens=700)
    pages = key_NGC, value_NGC
    found, expected = (
        (reader.decodes(query_THC[:2], pages), reader.prompts(query_THC[2:], pages)) for reader in (theirs, ours)
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_rows_of_the_block_table_are_the_texts_pages() -> None:
    table = PageTable(*(torch.tensor(x).int() for x in ([7, 8, 3, 5, 9], [0, 3, 4], [700, 9, 10])))
    assert block_table(table, 3).tolist() == [[7, 8, 3], [5, 9, 9], [9, 9, 9]]


def test_what_is_filled_in_later_is_read() -> None:
    """A graph makes its block table from buffers that every step fills anew, behind which others' pages lie."""
    kv = memory(MixtralConfig.from_dict(CONFIG, "config.json"))
    buffers = DecodeBuffers(PaddedSteps(kv, 4, padded_alone(OneRank(4))), 5 * PAGE, CPU)
    sequences = PagedTexts([[1] * 18, [2] * 7, [3] * 9], 40, random.Random(0))
    sequences.step([17, 6, 8])
    buffers.fill(sequences.step([1, 1, 1]), 4, [3])
    found = block_table(buffers.plan(4, 8).table, 5)
    for row, pages in zip(found.tolist(), [*sequences.pages, [kv.num_pages]], strict=True):
        assert row[: len(pages)] == pages


def test_only_flash_attn_and_only_large_pages() -> None:
    assert [reads_pages(flash_attn_attention, size) for size in (16, 128, 256, 384, 512)] == [
        False,
        False,
        True,
        False,
        True,
    ]
    assert not any(reads_pages(attention, 256) for attention in (masked_attention, torch_flash_attention))


@pytest.mark.usefixtures("flash_attn")
@pytest.mark.parametrize("window", [None, 3])
def test_keys_in_one_piece_are_attended_to_as_defined(window: int | None) -> None:
    rows, keys = (1, 4, 5), (7, 4, 12)
    borders = [torch.tensor([0, *counts]).cumsum(0).int() for counts in (rows, keys)]
    query_LHC = torch.randn(10, H, C, generator=torch.Generator().manual_seed(0))
    key_MGC, value_MGC = torch.randn(2, 23, G, C, generator=torch.Generator().manual_seed(1))
    found, expected = (
        attend(query_LHC, key_MGC, value_MGC, Chunks(rows, keys, *borders), window)
        for attend in (flash_attn_attention, masked_attention)
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 6])
def test_a_whole_model_on_pages_of_flash_attn(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of four tokens stand for pages of 256."""
    monkeypatch.setitem(sys.modules, "flash_attn", fake_flash_attn(PAGE))
    monkeypatch.setattr(flash_pages, "PAGE_MULTIPLE", PAGE)
    monkeypatch.setattr(triton_backend, "varlen_attention_for", lambda *_: flash_attn_attention)
    monkeypatch.setattr(paged_decode, "splits_for", lambda *_: 2)  # the interpreter is slow
    small = {"hidden_size": 32, "head_dim": 16, "intermediate_size": 48}
    config = MixtralConfig.from_dict(CONFIG | small | {"sliding_window": window}, "config.json")
    weights = RandomModel(config, CPU, torch.float32).weights()
    backends = CpuBackend(config, torch.float32), TritonBackend(config, CPU, torch.float32)
    models = [(Mixtral(config, weights, backend=backend), memory(config)) for backend in backends]
    rng = random.Random(0)
    sequences = PagedTexts([[rng.randrange(384) for _ in range(n)] for n in (14, 9, 11)], 40, rng)
    for lengths in ([12, 8, 0], [1, 1, 3], [1, 0, 7], [0, 0, 1]):
        batch = sequences.step(lengths)
        expected, found = (model.forward(batch, kv, OneRank(4)) for model, kv in models)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
