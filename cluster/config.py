"""What an engine needs to know, resolved: no autos, no environment, no files to look up.

deployments/settings.py makes it once; everything below reads it and nobody changes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Device = Literal["cpu", "cuda"]
Dtype = Literal["float32", "bfloat16", "float16"]
Quantization = Literal["none", "int8", "int4", "nf4", "fp8"]
ExchangeChoice = Literal["auto", "all_to_all", "all_reduce"]


@dataclass(frozen=True, slots=True)
class ParallelConfig:
    """rank = data group * tensor + place in the tensor group."""

    tensor: int = 1  # ranks that share one sequence's attention
    data: int = 1  # groups of such ranks, each with sequences of its own
    expert: int | None = None  # ranks over which whole experts are spread; None: all
    exchange: ExchangeChoice = "auto"
    spare_slots: int = 0  # on each rank, for replicas of hot experts
    standby: int = 0  # warm spare processes
    cpus_per_rank: float = 0.0  # what each rank asks of Ray
    threads_per_rank: int = 1  # torch threads; the worker sets them, OMP_NUM_THREADS is never believed

    @property
    def ranks(self) -> int:
        return self.tensor * self.data

    @property
    def expert_slices(self) -> int:
        """Parts each expert is cut into; ranks r * slices .. r * slices + slices - 1 hold the parts of one slot."""
        return self.ranks // (self.expert or self.ranks)


@dataclass(frozen=True, slots=True)
class KVConfig:
    page_size: int = 16
    memory: int | None = None  # bytes on each rank; None: a share of what is free after loading
    prefix_caching: bool = True


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    max_running: int = 256
    max_step_tokens: int = 2048
    max_waiting: int = 1024


@dataclass(frozen=True, slots=True)
class EngineConfig:
    model_path: str
    device: Device = "cpu"
    dtype: Dtype = "float32"  # of activations, and of weights that are not quantised
    quantization: Quantization = "none"
    max_model_len: int | None = None  # None: the checkpoint's own, capped by what the pages hold
    parallel: ParallelConfig = ParallelConfig()
    kv: KVConfig = KVConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
