"""flash-attn itself on pages of 256: what it gives is what our kernel and copied keys give, and a graph may hold it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.batch import SequenceSpan
from model.varlen_attention import masked_attention

pytest.importorskip("triton", reason="the other way is our kernel's")
pytest.importorskip("flash_attn", reason="needs flash-attn")

from model.device_attention import DevicePlanner, KernelReader
from model.flash_pages import FlashReader

H, G, C, PAGE = 32, 8, 128, 256
SPANS = [
    SequenceSpan(0, 1, 700, ((6, 3),)),
    SequenceSpan(1, 1, 1, ((1, 1),)),
    SequenceSpan(2, 300, 600, ((8, 1), (2, 2))),
    SequenceSpan(302, 20, 20, ((0, 1),)),
    SequenceSpan(322, 1, 257, ((4, 2),)),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 1, 40, 300])
def test_it_reads_what_our_own_way_reads(device: torch.device, dtype: torch.dtype, window: int | None) -> None:
    key_NGC, value_NGC = torch.randn(2, 9 * PAGE, G, C, device=device).to(dtype)
    query_THC = torch.randn(323, H, C, device=device).to(dtype)
    plan = DevicePlanner(PAGE, window, kv_heads=G, processors=64, device=device).plan(SPANS)
    ours = KernelReader(plan, PAGE, window, masked_attention)
    theirs = FlashReader(plan, PAGE, window, max_tokens=4096)

    def read(reader: KernelReader | FlashReader) -> tuple[Tensor, Tensor]:
        pages = key_NGC, value_NGC
        return reader.decodes(query_THC[:2], pages), reader.prompts(query_THC[2:], pages)

    torch.testing.assert_close(read(theirs), read(ours), rtol=2e-2, atol=2e-2)


def test_a_graph_holds_it(device: torch.device) -> None:
    memory = torch.randn(2, 9 * PAGE, G, C, device=device).bfloat16()
    query_BHC = torch.randn(2, H, C, device=device).bfloat16()
    plan = DevicePlanner(PAGE, None, kv_heads=G, processors=64, device=device).plan(SPANS[:2])

    def compute() -> Tensor:
        return FlashReader(plan, PAGE, None, max_tokens=4096).decodes(query_BHC, (memory[0], memory[1]))

    expected = compute()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = compute()
    graph.replay()
    torch.testing.assert_close(found, expected)
    plan.table.context_B[0] = 300
    graph.replay()
    torch.testing.assert_close(found, compute())
    assert not torch.equal(found, expected)
