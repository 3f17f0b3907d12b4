"""How a GPU computes a block: the kernels of model/kernels, flash attention for prompts, torch's grouped product.

On CPU tensors the same runs in Triton's interpreter, which is how it is tested without a GPU.

T: rows of the step.  S: this rank's share of them.  P: token-expert pairs.  N: rows for this rank's slots.
D: model width.  F: ffn width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from model.batch import Batch
from model.config import MixtralConfig
from model.device_attention import DeviceAttention, DevicePlan, DevicePlanner, KernelReader, PageReader
from model.device_exchange import Listed, OneDevice
from model.exchange import Dispatched, Exchange, OneRank
from model.expert_stack import stack_linears
from model.flash_pages import FlashReader, reads_pages
from model.graphs import Capture, CudaCapture, DecodeBuffers, DecodeGraphs, PaddedSteps, Run
from model.kv_cache import KVCache
from model.moe import Routing
from model.rotary import Rotary
from model.varlen_attention import varlen_attention_for
from model.weights import ExpertWeights

if TYPE_CHECKING:
    from model.kernels.weight_tiles import WeightStack

# From so many rows per expert on, torch's grouped product takes over on Hopper: multiplying is all there.
GROUPED_MM_ROWS = 64


class TritonBackend:
    def __init__(
        self,
        config: MixtralConfig,
        device: torch.device,
        dtype: torch.dtype,
        make_capture: Callable[[], Capture] = CudaCapture,
    ) -> None:
        self._config = config
        self._make_capture = make_capture
        self._device = device
        self._dtype = dtype
        self._rotary = Rotary(config, device)
        self._varlen_attention = varlen_attention_for(device, dtype, config.head_dim)
        self._processors, self._has_grouped_mm = 1, False
        if device.type == "cuda":
            self._processors = torch.cuda.get_device_properties(device).multi_processor_count
            self._has_grouped_mm = torch.cuda.get_device_capability(device) >= (9, 0) and dtype == torch.bfloat16

    def exchange(self, exchange: Exchange) -> Exchange:
        from model.kernels.routing import sort_pairs

        return OneDevice(exchange, sort_pairs) if isinstance(exchange, OneRank) else exchange

    def attention(self, batch: Batch, kv: KVCache) -> DeviceAttention:
        kv_heads = kv.layer(0)[0].shape[1]
        window = self._config.sliding_window
        planner = DevicePlanner(kv.page_size, window, kv_heads, self._processors, self._device)
        longest = max((span.context for span in batch.spans), default=0)
        return self.planned_attention(planner.plan(batch.spans), kv, batch.position_T, batch.slot_T, longest)

    def planned_attention(
        self, plan: DevicePlan, kv: KVCache, position_T: Tensor, slot_T: Tensor, max_tokens: int
    ) -> DeviceAttention:
        """`max_tokens`: that a text may have in any step that this is used for."""
        angles, window = self._rotary.angles(position_T, self._dtype), self._config.sliding_window
        reader: PageReader
        if reads_pages(self._varlen_attention, kv.page_size):
            reader = FlashReader(plan, kv.page_size, window, max_tokens)
        else:
            reader = KernelReader(plan, kv.page_size, window, self._varlen_attention)
        return DeviceAttention(plan.num_decodes, reader, kv, angles, slot_T)

    def decode_graphs(self, steps: PaddedSteps, run: Run) -> DecodeGraphs:
        from model.kernels.paged_decode import splits_for

        kv = steps.kv
        kv_heads, max_tokens = kv.layer(0)[0].shape[1], self._config.max_position_embeddings
        buffers = DecodeBuffers(steps, max_tokens, self._device)

        def prepare(rows: int) -> tuple[DeviceAttention, Exchange]:
            plan = buffers.plan(rows, splits_for(rows, kv_heads, self._processors))
            attention = self.planned_attention(plan, kv, buffers.position[:rows], buffers.slot[:rows], max_tokens)
            return attention, steps.exchange(rows, buffers.tokens)

        return DecodeGraphs(buffers, prepare, run, self._make_capture())

    def experts(self, experts: Sequence[ExpertWeights]) -> DeviceExperts:
        gate_up = stack_linears([expert.gate_up for expert in experts])
        down = stack_linears([expert.down for expert in experts])
        return DeviceExperts(gate_up, down, has_grouped_mm=self._has_grouped_mm)

    def norm(self, x_SD: Tensor, weight_D: Tensor) -> Tensor:
        from model.kernels.norm import norm

        return norm(x_SD, weight_D, self._config.rms_norm_eps)

    def add_norm(self, x_SD: Tensor, delta_SD: Tensor, weight_D: Tensor) -> tuple[Tensor, Tensor]:
        from model.kernels.norm import add_norm

        return add_norm(x_SD.contiguous(), delta_SD.contiguous(), weight_D, self._config.rms_norm_eps)

    def route(self, x_SD: Tensor, router_ED: Tensor) -> Routing:
        from model.kernels.routing import choose_experts

        logits_SE = functional.linear(x_SD, router_ED).float()
        return Routing(logits_SE, *choose_experts(logits_SE, self._config.num_experts_per_tok))


class DeviceExperts:
    def __init__(self, gate_up: WeightStack, down: WeightStack, *, has_grouped_mm: bool) -> None:
        self._gate_up = gate_up
        self._down = down
        self._has_grouped_mm = has_grouped_mm and gate_up.mode == "plain"

    def __call__(self, dispatched: Dispatched) -> Tensor:
        if isinstance(dispatched, Listed):
            return self._listed(dispatched)
        # Rows that moved are a list as well: of one expert each, in the order they lie in, weighed by who sent them.
        x_ND, device = dispatched.x_ND, dispatched.x_ND.device
        order_N = torch.arange(len(x_ND), dtype=torch.int32, device=device)
        first_L = torch.tensor([0, *dispatched.rows], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
        weight_N1 = torch.ones(len(x_ND), 1, device=device)
        listed = Listed(x_ND.contiguous(), [], order_N, weight_N1, first_L=first_L)
        return self._listed(listed)[:, 0].to(x_ND.dtype)

    def _listed(self, listed: Listed) -> Tensor:
        from model.kernels.grouped_experts import grouped_experts

        pairs = listed.weight_SK.numel()
        if self._has_grouped_mm and listed.whole and pairs >= GROUPED_MM_ROWS * (len(listed.first_L) - 1):
            return grouped_products(listed, self._gate_up.packed_EOP, self._down.packed_EOP)
        return grouped_experts(listed.x_ND, listed.order_N, listed.first_L, listed.weight_SK, self._gate_up, self._down)


def grouped_products(listed: Listed, gate_up_LFD: Tensor, down_LDF: Tensor) -> Tensor:
    """The same by torch's product of groups, for many rows: (S, K, D), float32. Every pair must have its slot here."""
    from model.kernels.swiglu import swiglu

    S, K = listed.weight_SK.shape
    ends_L = listed.first_L[1:]
    x_PD = listed.x_ND.index_select(0, listed.order_N // K)
    hidden_PF = swiglu(functional.grouped_mm(x_PD, gate_up_LFD.transpose(1, 2), offs=ends_L))
    y_PD = functional.grouped_mm(hidden_PF, down_LDF.transpose(1, 2), offs=ends_L)
    weight_P1 = listed.weight_SK.flatten().index_select(0, listed.order_N)[:, None]
    out_PD = torch.empty(y_PD.shape, dtype=torch.float32, device=y_PD.device)
    return out_PD.index_copy_(0, listed.order_N.long(), y_PD * weight_P1).view(S, K, -1)
