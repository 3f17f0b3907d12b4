"""Which experts the sampled rows of a step went to, as messages say it.

S: this rank's share of the rows.  T: all rows.  R: rows whose hidden states are wanted.  K: experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cluster.messages import Routing as TokenRouting
from model.exchange import Exchange, OneRank
from model.moe import Routing


def routing_of(
    layers: Sequence[Routing], exchange: Exchange, logits_rows: Tensor, wanted: Sequence[int]
) -> list[TokenRouting]:
    """Of the wanted ones among logits_rows, layer by layer. A collective of the tensor group where rows are shared.

    An expert's number travels as a float beside its weight, so that all layers go in one piece.
    """
    packed = [torch.cat([layer.expert_SK.float(), layer.weight_SK], dim=1) for layer in layers]
    rows = logits_rows[wanted]
    if isinstance(exchange, OneRank):
        # The last block computes logits_rows alone.
        *whole, last = packed
        table = torch.cat([*(layer.index_select(0, rows) for layer in whole), last[wanted]], dim=1)
    else:
        table = exchange.gather(torch.cat(packed, dim=1)).index_select(0, rows)
    K = layers[0].expert_SK.shape[1]
    values = table.view(len(rows), len(layers), 2, K).tolist()
    return [
        tuple(tuple(zip(map(int, experts), weights, strict=True)) for experts, weights in token) for token in values
    ]
