"""Mixtral, as far as one rank holds it. Written for one device: other ranks appear only behind Comm and Exchange.

    x_TD ──attention──▶ partial_TD ──reduce──▶ x_SD ──router──▶ dispatch ──experts──▶ combine ──▶ x_SD ──gather──▶ x_TD

T: rows of the step.  S: this rank's share of them.  R: rows whose logits are wanted.  D: model width.
V: vocabulary.  H, G: this rank's query and key-value heads.  C: head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from model.attention import paged_attention
from model.attention_plan import AttentionPlan, Planner
from model.batch import Batch
from model.comm import Comm, SoloComm, split_rows
from model.config import MixtralConfig
from model.exchange import Exchange, OneRank
from model.kv_cache import KVCache
from model.layers import rms_norm
from model.moe import Routing, route, run_experts
from model.rotary import Rotary, rotate
from model.stages import Stages
from model.weights import BlockWeights, MixtralWeights


class Mixtral:
    """Token ids in, final hidden states of the rows asked for out; then logits of those."""

    def __init__(
        self,
        config: MixtralConfig,
        weights: MixtralWeights,
        *,
        tensor: Comm | None = None,
        stages: Stages | None = None,
    ) -> None:
        self.config = config
        self._weights = weights
        self._tensor = SoloComm() if tensor is None else tensor
        self._stages = Stages() if stages is None else stages
        self._rotary = Rotary(config, weights.norm_D.device)
        self._blocks = [Block(config, layer, block, self._stages) for layer, block in enumerate(weights.blocks)]

    @torch.inference_mode()
    def forward(self, batch: Batch, kv: KVCache, exchange: Exchange, routings: list[Routing] | None = None) -> Tensor:
        """Write the step's keys and values to their pages; the final hidden states of batch.logits_rows, (R, D).

        Who wants to know how tokens were routed gives a list: each block appends its routing of this rank's share of
        the rows. With OneRank that of the last block is of batch.logits_rows alone, for it computes no others.
        """
        self._stages.start("head")
        x_TD = self._embed(batch.token_ids_T)
        self._stages.start("attention")
        cos_T1C, sin_T1C = self._rotary.angles(batch.position_T, x_TD.dtype)
        planner = Planner(kv.page_size, kv.bytes_per_key, self.config.sliding_window, x_TD.dtype, x_TD.device)
        step = Step(cos_T1C, sin_T1C, batch.slot_T, planner.plan(batch.spans), kv, exchange, routings)
        *earlier, last = self._blocks
        for block in earlier:
            x_TD = block(x_TD, step)
        if isinstance(exchange, OneRank):
            # No later token attends to what the last block gives: it need not go on with rows nobody asked for.
            x_RD = last(x_TD, step, batch.logits_rows)
        else:
            x_RD = last(x_TD, step).index_select(0, batch.logits_rows)
        self._stages.start("head")
        return rms_norm(x_RD, self._weights.norm_D, self.config.rms_norm_eps)

    @torch.inference_mode()
    def logits(self, hidden_RD: Tensor) -> Tensor:
        """Scores of every token of the vocabulary, (R, V), float32, the same on every rank of the tensor group.

        Of a classifier: of every label. A model without a head has none.
        """
        assert self._weights.head is not None
        self._stages.start("head")
        logits_RV = self._weights.head(hidden_RD).float()
        if self._weights.head_bias is not None:
            logits_RV += self._weights.head_bias
        if self._tensor.size == 1 or not self.config.is_language_model:
            return logits_RV
        self._stages.start("exchange")
        rows = split_rows(self.config.vocab_size, self._tensor.size)
        logits_VR = self._tensor.all_gather(logits_RV.T.contiguous(), rows)
        self._stages.start("head")
        return logits_VR.T.contiguous()

    def _embed(self, token_ids_T: Tensor) -> Tensor:
        embedding_VD = self._weights.embedding_VD
        if self._tensor.size == 1:
            return functional.embedding(token_ids_T, embedding_VD)
        # Each token's row lies on one rank; the others add zeros.
        local_T = token_ids_T - self._weights.first_token
        ours_T = (local_T >= 0) & (local_T < len(embedding_VD))
        x_TD = functional.embedding(local_T.where(ours_T, 0), embedding_VD) * ours_T[:, None]
        self._stages.start("exchange")
        x_TD = self._tensor.all_reduce(x_TD)
        self._stages.start("head")
        return x_TD


@dataclass(frozen=True, slots=True)
class Step:
    """What all blocks of one step share."""

    cos_T1C: Tensor
    sin_T1C: Tensor
    slot_T: Tensor
    attention: AttentionPlan
    kv: KVCache
    exchange: Exchange
    routings: list[Routing] | None


class Block:
    """One transformer block."""

    def __init__(self, config: MixtralConfig, layer: int, weights: BlockWeights, stages: Stages) -> None:
        self._config = config
        self._layer = layer
        self._weights = weights
        self._stages = stages
        C = config.head_dim
        self._heads = weights.output.in_features // C
        self._kv_heads = (weights.qkv.out_features // C - self._heads) // 2

    def __call__(self, x_TD: Tensor, step: Step, wanted: Tensor | None = None) -> Tensor:
        """The block's output for all rows, or for the wanted ones alone; keys and values are written for all."""
        weights, epsilon, start, exchange = self._weights, self._config.rms_norm_eps, self._stages.start, step.exchange
        start("attention")
        partial_TD = self._attention(rms_norm(x_TD, weights.attention_norm_D, epsilon), step, wanted)
        if wanted is not None:
            x_TD = x_TD.index_select(0, wanted)
        start("exchange")
        x_SD = exchange.share(x_TD) + exchange.reduce(partial_TD)
        start("router")
        normed_SD = rms_norm(x_SD, weights.moe_norm_D, epsilon)
        routing = route(normed_SD, weights.router_ED, self._config.num_experts_per_tok)
        if step.routings is not None:
            step.routings.append(routing)
        start("exchange")
        dispatched = exchange.dispatch(self._layer, normed_SD, routing.expert_SK, routing.weight_SK)
        start("experts")
        y_ND = run_experts(dispatched.x_ND, dispatched.rows, weights.experts)
        start("exchange")
        # Routing weights are float32 and so is their sum; the residual stream keeps the model's precision.
        x_SD = x_SD + exchange.combine(dispatched, y_ND).to(x_SD.dtype)
        return exchange.gather(x_SD)

    def _attention(self, x_TD: Tensor, step: Step, wanted: Tensor | None) -> Tensor:
        H, G, C = self._heads, self._kv_heads, self._config.head_dim
        heads_THC = self._weights.qkv(x_TD).view(len(x_TD), H + 2 * G, C)
        rotated_THC = rotate(heads_THC[:, : H + G], step.cos_T1C, step.sin_T1C)
        query_THC, key_TGC, value_TGC = rotated_THC[:, :H], rotated_THC[:, H:], heads_THC[:, H + G :]
        step.kv.write(self._layer, step.slot_T, key_TGC, value_TGC)
        out_THC = paged_attention(query_THC, key_TGC, value_TGC, step.kv.layer(self._layer), step.attention)
        if wanted is not None:
            out_THC = out_THC.index_select(0, wanted)
        return self._weights.output(out_THC.view(-1, H * C))
