"""How a CPU with AVX-512 BF16 computes a block in bfloat16: by the compiled kernels of this folder.

What they have no form for stays as cpu_backend.py does it: quantised experts.

T: rows of the step.  S: this rank's share of them.  D: model width.  E: experts.  K: experts per token.
H, G: query and key-value heads.  C: head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.attention_plan import in_sight
from model.backend import Experts
from model.batch import Batch
from model.config import MixtralConfig
from model.cpu_backend import CpuBackend
from model.exchange import Dispatched, Exchange, OneRank
from model.kv_cache import KVCache
from model.moe import Routing
from model.native import attention, rows
from model.native.attention import Chunks, Rows
from model.native.library import has_kernels
from model.native.linear import NativeExperts, NativeLinear
from model.weights import ExpertWeights


def fits(config: MixtralConfig, dtype: torch.dtype) -> bool:
    sizes = config.hidden_size % rows.MULTIPLE == 0 and config.head_dim % attention.MULTIPLE == 0
    return sizes and dtype == torch.bfloat16 and has_kernels()


class NativeBackend(CpuBackend):
    def exchange(self, exchange: Exchange) -> Exchange:
        return NativeOneRank(exchange.num_experts, exchange.load) if isinstance(exchange, OneRank) else exchange

    def attention(self, batch: Batch, kv: KVCache) -> NativeAttention:
        angles = self._rotary.angles(batch.position_T, self._dtype)
        return NativeAttention(batch, kv, angles, self._config.sliding_window)

    def experts(self, experts: Sequence[ExpertWeights]) -> Experts:
        gate_up = [expert.gate_up for expert in experts if isinstance(expert.gate_up, NativeLinear)]
        down = [expert.down for expert in experts if isinstance(expert.down, NativeLinear)]
        if experts and len(gate_up) == len(down) == len(experts):
            return OneCall(NativeExperts(gate_up, down))
        return super().experts(experts)

    def norm(self, x_SD: Tensor, weight_D: Tensor) -> Tensor:
        return rows.norm(x_SD, weight_D, self._config.rms_norm_eps)

    def add_norm(self, x_SD: Tensor, delta_SD: Tensor, weight_D: Tensor) -> tuple[Tensor, Tensor]:
        return rows.add_norm(x_SD, delta_SD, weight_D, self._config.rms_norm_eps)

    def route(self, x_SD: Tensor, router_ED: Tensor) -> Routing:
        return Routing(*rows.route(x_SD, router_ED, self._config.num_experts_per_tok))


class NativeAttention:
    def __init__(self, batch: Batch, kv: KVCache, angles: tuple[Tensor, Tensor], window: int | None) -> None:
        size = kv.page_size
        single = [span for span in batch.spans if span.length == 1]
        chunks = [span for span in batch.spans if span.length > 1]
        self._rows = self._chunks = None
        if single:
            self._rows = Rows.of([span.row for span in single], [in_sight(span, window, size) for span in single])
        if chunks:
            rows = [range(span.row, span.row + span.length) for span in chunks]
            self._chunks = Chunks.of(rows, [in_sight(span, window, size) for span in chunks], window)
        self._slot_T = batch.slot_T
        self._kv = kv
        self._angles = angles

    def __call__(self, layer: int, heads_THC: Tensor) -> Tensor:
        memory = self._kv.layer(layer)
        T, heads, C = heads_THC.shape
        attention.turn_and_store(heads_THC, self._angles, self._slot_T, memory)
        out_THC = heads_THC.new_empty(T, heads - 2 * memory[0].shape[1], C)
        if self._rows is not None:
            attention.attend(heads_THC, memory, self._rows, out_THC)
        if self._chunks is not None:
            attention.attend_chunks(heads_THC, memory, self._chunks, out_THC)
        return out_THC


class OneCall:
    """All experts of a block."""

    def __init__(self, experts: NativeExperts) -> None:
        self._experts = experts

    def __call__(self, dispatched: Dispatched) -> Tensor:
        return self._experts(dispatched.x_ND, dispatched.rows)


class NativeOneRank(OneRank):
    """Its rows travel by kernels. What it gives back is in the rows' own precision."""

    def dispatch(self, layer: int, x_SD: Tensor, expert_SK: Tensor, weight_SK: Tensor) -> Dispatched:
        x_ND, rows_E, place_SK = rows.dispatch(x_SD, expert_SK, self.num_experts)
        if self.load is not None:
            self.load.add(layer, rows_E)
        return Dispatched(x_ND, rows_E, place_SK, weight_SK)

    def combine(self, dispatched: Dispatched, y_ND: Tensor) -> Tensor:
        return rows.combine(y_ND, dispatched.order_N, dispatched.weight_SK)
