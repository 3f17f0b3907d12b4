"""What a block asks of the device it runs on. One object per model, chosen once, so that no call asks again.

    cpu     model/cpu_backend.py       packed linears, attention per run of pages, a loop over experts
            model/native/backend.py    in bfloat16, where the processor multiplies it: compiled kernels
    cuda    model/triton_backend.py    the kernels of model/kernels, flash attention for prompts, grouped products

T: rows of the step.  S: this rank's share of them.  D: model width.  E: experts.  K: experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from model.batch import Batch
from model.config import MixtralConfig
from model.exchange import Dispatched, Exchange
from model.graphs import DecodeGraphs, PaddedSteps, Run
from model.kv_cache import KVCache
from model.moe import Routing
from model.step_attention import StepAttention
from model.weights import ExpertWeights


class Experts(Protocol):
    """The experts of one block, in the layout that multiplies fastest where they lie."""

    def __call__(self, dispatched: Dispatched) -> Tensor:
        """What the exchange's combine() takes."""


class Backend(Protocol):
    def exchange(self, exchange: Exchange) -> Exchange:
        """The same, or a form of it that suits the device better."""

    def attention(self, batch: Batch, kv: KVCache) -> StepAttention: ...

    def decode_graphs(self, steps: PaddedSteps, run: Run) -> DecodeGraphs:
        """Of steps of single tokens; none is captured yet. For devices that have graphs."""

    def experts(self, experts: Sequence[ExpertWeights]) -> Experts: ...

    def norm(self, x_SD: Tensor, weight_D: Tensor) -> Tensor: ...

    def add_norm(self, x_SD: Tensor, delta_SD: Tensor, weight_D: Tensor) -> tuple[Tensor, Tensor]:
        """The sum in x's precision, and its norm."""

    def route(self, x_SD: Tensor, router_ED: Tensor) -> Routing: ...


def backend_for(config: MixtralConfig, device: torch.device, dtype: torch.dtype) -> Backend:
    if device.type == "cpu":
        from model.cpu_backend import CpuBackend
        from model.native.backend import NativeBackend, fits

        return NativeBackend(config, dtype) if fits(config, dtype) else CpuBackend(config, dtype)
    from model.triton_backend import TritonBackend

    return TritonBackend(config, device, dtype)
