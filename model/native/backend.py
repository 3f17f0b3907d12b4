"""How a CPU with AVX-512 BF16 computes a block in bfloat16: by the compiled kernels of this folder.

What they have no form for stays as cpu_backend.py does it: quantised experts.

T: rows of the step.  S: this rank's share of them.  D: model width.  E: experts.  K: experts per token.
R: rows whose hidden states are wanted.  N: rows that attend.  H, G: query and key-value heads.  C: head_dim.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import torch
from torch import Tensor

from model.attention_plan import in_sight
from model.backend import Experts
from model.batch import Batch, SequenceSpan
from model.config import MixtralConfig
from model.cpu_backend import CpuBackend
from model.exchange import Dispatched, Exchange, OneRank
from model.kv_cache import KVCache
from model.layers import Linear
from model.moe import Routing
from model.native import attention, rows
from model.native.attention import Chunks, Rows
from model.native.library import has_kernels
from model.native.linear import NativeExperts, NativeLinear
from model.step_attention import StepAttention, heads_of
from model.weights import ExpertWeights


def fits(config: MixtralConfig, dtype: torch.dtype) -> bool:
    sizes = config.hidden_size % rows.MULTIPLE == 0 and config.head_dim % attention.MULTIPLE == 0
    return sizes and dtype == torch.bfloat16 and has_kernels()


class NativeBackend(CpuBackend):
    def exchange(self, exchange: Exchange) -> Exchange:
        return NativeOneRank(exchange.num_experts, exchange.load) if isinstance(exchange, OneRank) else exchange

    def attention(self, batch: Batch, kv: KVCache) -> NativeAttention:
        angles = self._rotary.angles(batch.position_T, self._dtype)
        return NativeAttention(batch.spans, batch.slot_T, kv, angles, self._config.sliding_window)

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


class NativeAttention(StepAttention):
    def __init__(
        self,
        spans: Sequence[SequenceSpan],
        slot_T: Tensor,
        kv: KVCache,
        angles: tuple[Tensor, Tensor],
        window: int | None,
    ) -> None:
        size = kv.page_size
        single = [span for span in spans if span.length == 1]
        chunks = [span for span in spans if span.length > 1]
        self._rows = self._chunks = None
        if single:
            self._rows = Rows.of([span.row for span in single], [in_sight(span, window, size) for span in single])
        if chunks:
            rows = [range(span.row, span.row + span.length) for span in chunks]
            self._chunks = Chunks.of(rows, [in_sight(span, window, size) for span in chunks], window)
        self._spans = spans
        self._slot_T = slot_T
        self._kv = kv
        self._angles = angles
        self._window = window

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

    def of_wanted(self, layer: int, normed_TD: Tensor, qkv: Linear, head_dim: int, wanted_R: Tensor) -> Tensor:
        spans, rows = narrowed(self._spans, wanted_R.tolist())
        if not isinstance(qkv, NativeLinear) or len(rows) == len(normed_TD):
            return super().of_wanted(layer, normed_TD, qkv, head_dim, wanted_R)
        memory, row_N = self._kv.layer(layer), torch.tensor(rows, dtype=torch.int64)
        key_values = 2 * memory[0].shape[1]
        heads = qkv.from_feature(qkv.out_features - key_values * head_dim, normed_TD)
        attention.turn_and_store(heads.view(-1, key_values, head_dim), self._angles, self._slot_T, memory)
        cos_N1C, sin_N1C = (angle.index_select(0, row_N) for angle in self._angles)
        some = NativeAttention(spans, self._slot_T.index_select(0, row_N), self._kv, (cos_N1C, sin_N1C), self._window)
        out_NHC = some(layer, heads_of(qkv, normed_TD.index_select(0, row_N), head_dim))
        return out_NHC.index_select(0, torch.searchsorted(row_N, wanted_R))


def narrowed(spans: Sequence[SequenceSpan], wanted: Sequence[int]) -> tuple[list[SequenceSpan], list[int]]:
    """Spans cut down to what lies between the first and the last wanted row of each; the rows that are left.

    Of several rows two are left at least: one that is alone is attended to by another kernel, which rounds otherwise.
    """
    narrow: list[SequenceSpan] = []
    left: list[int] = []
    wanted = sorted(wanted)
    for span in spans:
        low, high = bisect_left(wanted, span.row), bisect_left(wanted, span.row + span.length)
        if low < high:
            end = max(wanted[high - 1] + 1, min(span.row + span.length, span.row + 2))
            first = min(wanted[low], max(span.row, end - 2))
            context = span.context - (span.row + span.length - end)
            narrow.append(SequenceSpan(len(left), end - first, context, span.runs))
            left += range(first, end)
    return narrow, left


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
