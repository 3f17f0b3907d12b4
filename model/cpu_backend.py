"""How a CPU computes a block: attention per run of pages, experts one after another on packed weights.

native/backend.py has kernels for much of it, in bfloat16 on processors that multiply it.

T: rows of the step.  S: this rank's share of them.  D: model width.  H, G: query and key-value heads.  C: head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.attention import paged_attention
from model.attention_plan import Planner
from model.backend import Experts
from model.batch import Batch
from model.config import MixtralConfig
from model.exchange import Dispatched, Exchange
from model.graphs import DecodeGraphs, PaddedSteps, Run
from model.kv_cache import KVCache
from model.layers import rms_norm
from model.moe import Routing, route, run_experts
from model.rotary import Rotary, rotate
from model.step_attention import StepAttention
from model.weights import ExpertWeights


class CpuBackend:
    def __init__(self, config: MixtralConfig, dtype: torch.dtype) -> None:
        self._config = config
        self._dtype = dtype
        self._device = torch.device("cpu")
        self._rotary = Rotary(config, self._device)

    def exchange(self, exchange: Exchange) -> Exchange:
        return exchange

    def attention(self, batch: Batch, kv: KVCache) -> StepAttention:
        angles = self._rotary.angles(batch.position_T, self._dtype)
        planner = Planner(kv.page_size, kv.bytes_per_key, self._config.sliding_window, self._dtype, self._device)
        return CpuAttention(planner, batch, kv, angles)

    def decode_graphs(self, steps: PaddedSteps, run: Run) -> DecodeGraphs:
        raise AssertionError("a CPU has no graphs")

    def experts(self, experts: Sequence[ExpertWeights]) -> Experts:
        return ExpertLoop(experts)

    def norm(self, x_SD: Tensor, weight_D: Tensor) -> Tensor:
        return rms_norm(x_SD, weight_D, self._config.rms_norm_eps)

    def add_norm(self, x_SD: Tensor, delta_SD: Tensor, weight_D: Tensor) -> tuple[Tensor, Tensor]:
        # Routing weights are float32 and so is their sum; the residual stream keeps the model's precision.
        x_SD = x_SD + delta_SD.to(x_SD.dtype)
        return x_SD, rms_norm(x_SD, weight_D, self._config.rms_norm_eps)

    def route(self, x_SD: Tensor, router_ED: Tensor) -> Routing:
        return route(x_SD, router_ED, self._config.num_experts_per_tok)


class CpuAttention(StepAttention):
    def __init__(self, planner: Planner, batch: Batch, kv: KVCache, angles: tuple[Tensor, Tensor]) -> None:
        self._plan = planner.plan(batch.spans)
        self._slot_T = batch.slot_T
        self._kv = kv
        self._angles = angles

    def __call__(self, layer: int, heads_THC: Tensor) -> Tensor:
        memory = self._kv.layer(layer)
        G = memory[0].shape[1]
        H = heads_THC.shape[1] - 2 * G
        rotated_THC = rotate(heads_THC[:, : H + G], *self._angles)
        query_THC, key_TGC, value_TGC = rotated_THC[:, :H], rotated_THC[:, H:], heads_THC[:, H + G :]
        self._kv.write(layer, self._slot_T, key_TGC, value_TGC)
        return paged_attention(query_THC, key_TGC, value_TGC, memory, self._plan)


class ExpertLoop:
    def __init__(self, experts: Sequence[ExpertWeights]) -> None:
        self._experts = experts

    def __call__(self, dispatched: Dispatched) -> Tensor:
        return run_experts(dispatched.x_ND, dispatched.rows, self._experts)
