"""The experts one rank holds: the first ones, those a new placement brings, and what each gives for a known row.

A rank reads what it lacks while it serves with what it has. For a moment it holds both; the step that names the new
placement drops the old. An expert that stays is the same object before and after.

D: model width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cluster.placement import Placement
from model.backend import backend_for
from model.config import MixtralConfig
from model.exchange import OneRank
from model.mixtral import through_experts
from model.weights import ExpertWeights, MixtralWeights

Place = tuple[int, int]  # layer and expert
Read = Callable[[Sequence[Place]], dict[Place, ExpertWeights]]


@dataclass(frozen=True, slots=True)
class HeldExperts:
    placement: Placement
    weights: MixtralWeights  # its experts lie as the placement says
    answers: dict[Place, Tensor]  # (D,) in float32: what this rank's slice gave for known_row() when it was loaded


def hold(config: MixtralConfig, rank: int, placement: Placement, weights: MixtralWeights) -> HeldExperts:
    """The first placement."""
    return HeldExperts(placement, weights, _answers(config, weights, placement.slots_of(rank)))


def fetch(held: HeldExperts, placement: Placement, rank: int, config: MixtralConfig, read: Read) -> HeldExperts:
    """The experts of another placement: read are those that are not here yet."""
    have = {
        (layer, expert): block.experts[slot]
        for layer, (block, experts) in enumerate(zip(held.weights.blocks, held.placement.slots_of(rank), strict=True))
        for slot, expert in enumerate(experts)
    }
    wanted = placement.slots_of(rank)
    places = {(layer, expert) for layer, experts in enumerate(wanted) for expert in experts}
    missing = places - have.keys()
    have |= read(sorted(missing))
    blocks = tuple(
        replace(block, experts=tuple(have[layer, expert] for expert in experts))
        for layer, (block, experts) in enumerate(zip(held.weights.blocks, wanted, strict=True))
    )
    weights = replace(held.weights, blocks=blocks)
    changed = {layer for layer, _ in missing}
    answers = _answers(config, weights, [experts if n in changed else () for n, experts in enumerate(wanted)])
    # Those of experts that stay are still the ones of their loading: a weight that changed since would show.
    return HeldExperts(placement, weights, answers | {key: held.answers[key] for key in places & held.answers.keys()})


def known_row(width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A made-up row of activations, (1, D), the same on every rank."""
    return torch.randn(1, width, generator=torch.Generator().manual_seed(0)).to(device, dtype)


@torch.inference_mode()
def _answers(config: MixtralConfig, weights: MixtralWeights, slots: Sequence[tuple[int, ...]]) -> dict[Place, Tensor]:
    """Of the experts in the slots of each layer; of a layer that is given none, none."""
    norm_D = weights.norm_D
    row = known_row(len(norm_D), norm_D.dtype, norm_D.device)
    backend = backend_for(config, norm_D.device, norm_D.dtype)
    answers = {}
    for layer, (block, experts) in enumerate(zip(weights.blocks, slots, strict=True)):
        if experts:
            exchange = backend.exchange(OneRank(len(experts)))
            slot_S1 = torch.arange(len(experts), device=row.device)[:, None]
            weight_S1 = torch.ones_like(slot_S1, dtype=torch.float32)
            x_SD = row.expand(len(experts), -1)
            out_SD = through_experts(backend.experts(block.experts), exchange, layer, x_SD, slot_S1, weight_S1)
            answers.update({(layer, expert): out_D for expert, out_D in zip(experts, out_SD.float(), strict=True)})
    return answers
