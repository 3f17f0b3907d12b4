"""What one rank reads from the checkpoint: its share of the weights at the start, single experts when they move.

Refuses what there is no room for before anything is read. Knows no steps and no other ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from cluster.config import EngineConfig
from cluster.errors import EngineError
from cluster.footprint import footprint, matrix_bytes
from cluster.held_experts import Place
from cluster.host_memory import available_bytes
from cluster.placement import Placement
from model.checkpoint import load_experts, load_weights
from model.config import MixtralConfig, load_config
from model.expert_stack import put_together
from model.kv_cache import KVCache
from model.shard import Shard
from model.weights import ExpertWeights, MixtralWeights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class RankLoader:
    """Of one rank in one layout; experts may move later, slices may not."""

    def __init__(self, rank: int, config: EngineConfig, placement: Placement) -> None:
        self.directory = Path(config.model_path)
        self.model_config: MixtralConfig = load_config(self.directory)
        self.device = torch.device(config.device)
        self.dtype = DTYPES[config.dtype]
        self._rank = rank
        self._config = config
        self._quantization = None if config.quantization == "none" else config.quantization
        self._shard = Shard(
            rank % config.parallel.tensor,
            config.parallel.tensor,
            placement.slots_of(rank),
            expert_slice=rank % placement.slices,
            expert_slices=placement.slices,
        )
        saved, scheduler = self.model_config.quantization, config.scheduler
        self._holds = footprint(
            self.model_config,
            config.parallel,
            itemsize=self.dtype.itemsize,
            matrix_bytes=matrix_bytes(self._quantization if saved is None else saved.mode, self.dtype.itemsize),
            max_step_tokens=scheduler.max_step_tokens,
            max_running=scheduler.max_running,
        )

    def weights(self, progress: Callable[[int, int], None] | None = None) -> MixtralWeights:
        """This rank's share, or EngineError if it does not fit."""
        self._refuse_what_is_too_large()
        weights = load_weights(
            self.directory,
            self.model_config,
            self._shard,
            dtype=self.dtype,
            device=self.device,
            quantization=self._quantization,
            progress=progress,
        )
        if self.device.type == "cuda":
            put_together(weights)
        return weights

    def experts(self, places: Sequence[Place]) -> dict[Place, ExpertWeights]:
        return load_experts(
            self.directory,
            self.model_config,
            self._shard,
            places,
            dtype=self.dtype,
            device=self.device,
            quantization=self._quantization,
        )

    def pages(self, num_pages: int) -> KVCache:
        return KVCache(
            self.model_config,
            self._shard,
            num_pages=num_pages,
            page_size=self._config.kv.page_size,
            dtype=self.dtype,
            device=self.device,
        )

    @property
    def bytes_per_page(self) -> int:
        return KVCache.bytes_per_page(self.model_config, self._shard, self._config.kv.page_size, self.dtype)

    def bytes_for_pages(self) -> int:
        """What is free now; on a GPU, beside what steps, graphs and other ranks need."""
        return max(0, self._free_bytes() - (self._holds.beside if self.device.type == "cuda" else 0))

    def _refuse_what_is_too_large(self) -> None:
        needed = self._holds.weights
        if self.device.type == "cuda":  # one block's experts exist twice while they are put together
            needed += self._holds.experts // self.model_config.num_hidden_layers
        lacks = needed - self._free_bytes()
        if lacks > 0:
            raise EngineError(
                f"rank {self._rank} needs {needed} bytes to load its weights and its {self.device.type} lacks "
                f"{lacks} of them: use more ranks or a quantization (mixtral-serve plan compares them)"
            )

    def _free_bytes(self) -> int:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # what only torch still holds is free as well
            return int(torch.cuda.mem_get_info(self.device)[0])
        return available_bytes()
