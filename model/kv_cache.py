"""Page memory for keys and values, one pair of tensors per layer, allocated once.

    page            0               1               2            scratch
    slot        0 1 2 ... P-1 | P P+1 ...     |  ...          | ...     slot = page * page_size + offset
    key memory  one row of (key-value heads, head_dim) per slot

Consecutive pages are consecutive rows, so a run of pages is one view and nothing is copied to read it.
Which sequence owns which page is the engine's business. Nobody owns the scratch page behind the last one: keys and
values that already lie in shared pages are written there a second time, and never read.
"""

from __future__ import annotations

import mmap
from math import prod

import torch
from torch import Tensor

from model.config import MixtralConfig
from model.shard import Shard


class KVCache:
    """N: slots.  G: this rank's key-value heads.  C: head_dim."""

    def __init__(
        self,
        config: MixtralConfig,
        shard: Shard,
        *,
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.scratch_slot = num_pages * page_size  # for any number of rows at once
        heads = config.local_kv_heads(shard)
        self.bytes_per_key = heads * config.head_dim * dtype.itemsize
        shape = config.num_hidden_layers, 2, (num_pages + 1) * page_size, heads, config.head_dim
        memory = _zeros(shape, dtype) if device.type == "cpu" else torch.zeros(shape, dtype=dtype, device=device)
        self._layers = tuple((layer[0], layer[1]) for layer in memory)

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """The whole memory of one layer: keys and values, each (N, G, C)."""
        return self._layers[layer]

    def write(self, layer: int, slot_T: Tensor, key_TGC: Tensor, value_TGC: Tensor) -> None:
        key_NGC, value_NGC = self._layers[layer]
        key_NGC.index_copy_(0, slot_T, key_TGC)
        value_NGC.index_copy_(0, slot_T, value_TGC)

    @staticmethod
    def bytes_per_page(config: MixtralConfig, shard: Shard, page_size: int, dtype: torch.dtype) -> int:
        """Over all layers, keys and values."""
        heads = config.local_kv_heads(shard)
        return 2 * config.num_hidden_layers * page_size * heads * config.head_dim * dtype.itemsize


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """What nobody has written yet costs nothing: the operating system hands out zeroed memory page by page.

    torch.zeros would write all of it, gigabytes, before the first request.
    """
    memory = mmap.mmap(-1, prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
