"""Mixtral, as far as one rank holds it. Written for one device: other ranks appear only behind Comm and Exchange.

    normed_TD ──attention──▶ partial_TD ──reduce──▶ + x_SD ──router──▶ dispatch ──experts──▶ combine ──▶ + x_SD
    next normed_TD ◀──gather── norm of x_SD

The residual stream stays where its rows' experts are chosen: x_SD. Its norm is what all ranks attend with.

T: rows of the step.  S: this rank's share of them.  R: rows whose logits are wanted.  D: model width.
V: vocabulary.  H: heads of query, key and value together.  C: head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from model.backend import Backend, Experts, backend_for
from model.batch import Batch
from model.comm import Comm, SoloComm, split_rows
from model.config import MixtralConfig
from model.exchange import Exchange, OneRank
from model.graphs import DecodeGraphs, PaddedSteps
from model.kv_cache import KVCache
from model.moe import Routing
from model.stages import Stages
from model.step_attention import StepAttention, heads_of
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
        backend: Backend | None = None,
    ) -> None:
        """Without a `backend` the one of the device that the weights lie on."""
        self.config = config
        self._weights = weights
        self._tensor = SoloComm() if tensor is None else tensor
        self._stages = Stages() if stages is None else stages
        norm_D = weights.norm_D
        self._backend = backend_for(config, norm_D.device, norm_D.dtype) if backend is None else backend
        next_norms = [*(block.attention_norm_D for block in weights.blocks[1:]), norm_D]
        self._blocks = [
            Block(config, layer, block, next_norm_D, self._backend, self._stages)
            for layer, (block, next_norm_D) in enumerate(zip(weights.blocks, next_norms, strict=True))
        ]

    @torch.inference_mode()
    def forward(self, batch: Batch, kv: KVCache, exchange: Exchange, routings: list[Routing] | None = None) -> Tensor:
        """Write the step's keys and values to their pages; the final hidden states of batch.logits_rows, (R, D).

        Who wants to know how tokens were routed gives a list: each block appends its routing of this rank's share of
        the rows. With OneRank that of the last block is of batch.logits_rows alone, for it computes no others.
        """
        alone = isinstance(exchange, OneRank)
        self._stages.start("attention")
        attention = self._backend.attention(batch, kv)
        # No later token attends to what the last block gives: alone, it need not go on with rows nobody asked for.
        wanted = batch.logits_rows if alone else None
        hidden_TD = self._run(batch.token_ids_T, attention, exchange, routings, wanted)
        return hidden_TD if alone else hidden_TD.index_select(0, batch.logits_rows)

    def _run(
        self,
        token_ids_T: Tensor,
        attention: StepAttention,
        exchange: Exchange,
        routings: list[Routing] | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """The final hidden states of all rows, or of the wanted ones."""
        self._stages.start("head")
        x_TD = self._embed(token_ids_T)
        self._stages.start("attention")
        exchange = self._backend.exchange(exchange)
        step = Step(attention, exchange, routings)
        x_SD = exchange.share(x_TD)
        normed_TD = self._backend.norm(x_TD, self._weights.blocks[0].attention_norm_D)
        *earlier, last = self._blocks
        for block in earlier:
            x_SD, normed_TD = block(x_SD, normed_TD, step)
        return last(x_SD, normed_TD, step, wanted)[1]

    def decode_graphs(self, steps: PaddedSteps) -> DecodeGraphs:
        """For steps of one token of each text, on a GPU: what is captured of them is replayed instead of forward()."""
        return self._backend.decode_graphs(steps, self._run)

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

    @torch.inference_mode()
    def probe(self, layer: int, x_SD: Tensor, expert_SK: Tensor, weight_SK: Tensor, exchange: Exchange) -> Tensor:
        """What one block's experts give for rows that somebody else has routed, (S, D)."""
        return through_experts(
            self._blocks[layer].experts, self._backend.exchange(exchange), layer, x_SD, expert_SK, weight_SK
        )

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


def through_experts(
    experts: Experts, exchange: Exchange, layer: int, x_SD: Tensor, expert_SK: Tensor, weight_SK: Tensor
) -> Tensor:
    """There and back, without a model around them. (S, D)."""
    dispatched = exchange.dispatch(layer, x_SD.contiguous(), expert_SK, weight_SK)
    combined = exchange.combine(dispatched, experts(dispatched))
    return combined if combined.dim() == 2 else combined.sum(1)  # a device leaves each row's K parts to be added


@dataclass(frozen=True, slots=True)
class Step:
    """What all blocks of one step share."""

    attention: StepAttention
    exchange: Exchange
    routings: list[Routing] | None


class Block:
    """One transformer block, from its normed input to that of the next."""

    def __init__(
        self,
        config: MixtralConfig,
        layer: int,
        weights: BlockWeights,
        next_norm_D: Tensor,
        backend: Backend,
        stages: Stages,
    ) -> None:
        self._layer = layer
        self._head_dim = config.head_dim
        self._weights = weights
        self._next_norm_D = next_norm_D
        self._backend = backend
        self.experts = backend.experts(weights.experts)
        self._stages = stages

    def __call__(
        self, x_SD: Tensor, normed_TD: Tensor, step: Step, wanted: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """This rank's share of the residual stream, and its norm for all rows; or both for the wanted rows alone.

        Keys and values are written for all rows.
        """
        weights, backend, start, exchange = self._weights, self._backend, self._stages.start, step.exchange
        start("attention")
        partial_TD = self._attention(normed_TD, step, wanted)
        if wanted is not None:
            x_SD = x_SD.index_select(0, wanted)
        start("exchange")
        reduced_SD = exchange.reduce(partial_TD)
        start("router")
        x_SD, normed_SD = backend.add_norm(x_SD, reduced_SD, weights.moe_norm_D)
        routing = backend.route(normed_SD, weights.router_ED)
        if step.routings is not None:
            step.routings.append(routing)
        start("exchange")
        dispatched = exchange.dispatch(self._layer, normed_SD, routing.expert_SK, routing.weight_SK)
        start("experts")
        y_ND = self.experts(dispatched)
        start("exchange")
        combined_SD = exchange.combine(dispatched, y_ND)
        start("attention")
        x_SD, normed_SD = backend.add_norm(x_SD, combined_SD, self._next_norm_D)
        start("exchange")
        return x_SD, exchange.gather(normed_SD)

    def _attention(self, normed_TD: Tensor, step: Step, wanted: Tensor | None) -> Tensor:
        weights, C = self._weights, self._head_dim
        if wanted is None:
            out_THC = step.attention(self._layer, heads_of(weights.qkv, normed_TD, C))
        else:
            out_THC = step.attention.of_wanted(self._layer, normed_TD, weights.qkv, C, wanted)
        return weights.output(out_THC.view(-1, weights.output.in_features))
