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
from model.config import MixtralConfig
from model.exchange import OneRank
from model.mixtral import Mixtral
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
    return HeldExperts(placement, weights, _answers(config, rank, placement, weights))


def fetch(held: HeldExperts, placement: Placement, rank: int, config: MixtralConfig, read: Read) -> HeldExperts:
    """The experts of another placement: read are those that are not here yet."""
    have = {
        (layer, expert): block.experts[slot]
        for layer, (block, experts) in enumerate(zip(held.weights.blocks, held.placement.slots_of(rank), strict=True))
        for slot, expert in enumerate(experts)
    }
    wanted = placement.slots_of(rank)
    places = {(layer, expert) for layer, experts in enumerate(wanted) for expert in experts}
    have |= read(sorted(places - have.keys()))
    blocks = tuple(
        replace(block, experts=tuple(have[layer, expert] for expert in experts))
        for layer, (block, experts) in enumerate(zip(held.weights.blocks, wanted, strict=True))
    )
    weights = replace(held.weights, blocks=blocks)
    answers = _answers(config, rank, placement, weights)
    # Those of experts that stay are still the ones of their loading: a weight that changed since would show.
    return HeldExperts(placement, weights, answers | {key: held.answers[key] for key in answers.keys() & held.answers})


def known_row(width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A made-up row of activations, (1, D), the same on every rank."""
    return torch.randn(1, width, generator=torch.Generator().manual_seed(0)).to(device, dtype)


def _answers(config: MixtralConfig, rank: int, placement: Placement, weights: MixtralWeights) -> dict[Place, Tensor]:
    model = Mixtral(config, weights)
    row = known_row(config.hidden_size, weights.norm_D.dtype, weights.norm_D.device)
    answers = {}
    slot_S1 = torch.arange(placement.slots_per_rank, device=row.device)[:, None]
    weight_S1 = torch.ones_like(slot_S1, dtype=torch.float32)
    for layer, experts in enumerate(placement.slots_of(rank)):
        x_SD = row.expand(len(experts), -1)
        out_SD = model.probe(layer, x_SD, slot_S1, weight_S1, OneRank(len(experts)))
        answers.update({(layer, expert): out_D for expert, out_D in zip(experts, out_SD.float(), strict=True)})
    return answers
