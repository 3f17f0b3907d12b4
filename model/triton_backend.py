"""How a GPU computes a block: the kernels of model/kernels, flash attention for prompts, torch's grouped products.

On CPU tensors the same runs in Triton's interpreter, which is how it is tested without a GPU.

T: rows of the step.  S: this rank's share of them.  D: model width.  E: experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from model.batch import Batch
from model.config import MixtralConfig
from model.device_attention import DeviceAttention, DevicePlan, DevicePlanner, KernelReader, PageReader
from model.device_exchange import OneDevice
from model.device_experts import DeviceExperts
from model.exchange import Exchange, OneRank
from model.flash_pages import FlashReader, reads_pages
from model.graphs import Capture, CudaCapture, DecodeBuffers, DecodeGraphs, PaddedSteps, Run
from model.kv_cache import KVCache
from model.moe import Routing
from model.rotary import Rotary
from model.varlen_attention import varlen_attention_for
from model.weights import ExpertWeights


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
        self._processors = 1
        if device.type == "cuda":
            self._processors = torch.cuda.get_device_properties(device).multi_processor_count

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
        return DeviceExperts(experts, self._dtype)

    def norm(self, x_SD: Tensor, weight_D: Tensor) -> Tensor:
        from model.kernels.norm import norm

        return norm(x_SD, weight_D, self._config.rms_norm_eps)

    def add_norm(self, x_SD: Tensor, delta_SD: Tensor, weight_D: Tensor) -> tuple[Tensor, Tensor]:
        from model.kernels.norm import add_norm

        return add_norm(x_SD.contiguous(), delta_SD.contiguous(), weight_D, self._config.rms_norm_eps)

    def route(self, x_SD: Tensor, router_ED: Tensor) -> Routing:
        from model.kernels.routing import ROUTED_ROWS, choose_experts, route_rows

        if len(x_SD) <= ROUTED_ROWS:
            return Routing(*route_rows(x_SD, router_ED, self._config.num_experts_per_tok))
        logits_SE = functional.linear(x_SD, router_ED).float()
        return Routing(logits_SE, *choose_experts(logits_SE, self._config.num_experts_per_tok))
