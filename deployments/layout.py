"""Is a layout of ranks possible? Said in one sentence that names the field, before any weight is read.

Knows the checkpoint's shape and what there is to run on; starts nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.config import Device, ParallelConfig
from deployments.settings import Parallel, SettingsError
from model.config import MixtralConfig
from model.errors import ModelError
from model.shard import Shard


@dataclass(frozen=True, slots=True)
class Machine:
    """What there is to run on: of the one machine, or of the cluster."""

    cores: int  # of the largest node
    gpus: int  # in all
    may_grow: bool = False  # nodes may join later, so too few now is no reason to refuse
    all_cores: int | None = None  # of all nodes; None: there is one


def check_model(parallel: Parallel, checkpoint: MixtralConfig) -> None:
    """Can the model be cut this way?"""
    ranks = parallel.tensor * parallel.data
    expert = parallel.expert or ranks
    if ranks % expert:
        raise SettingsError(
            f"parallel.expert: {expert} does not divide the {ranks} ranks (tensor {parallel.tensor} x data "
            f"{parallel.data}); use {', '.join(str(n) for n in range(1, ranks) if ranks % n == 0)}, {ranks} or null."
        )
    try:
        shard = Shard(tensor_size=parallel.tensor, expert_slices=ranks // expert)
        checkpoint.head_slices(shard)
        shard.ffn_rows(checkpoint.intermediate_size)
    except ModelError as error:
        raise SettingsError(f"parallel: {error}.") from None
    experts = checkpoint.num_local_experts
    slots = -(-experts // expert)
    if slots + parallel.spare_slots > experts:
        raise SettingsError(
            f"parallel.spare_slots: {parallel.spare_slots} is more than a rank can use: {slots} of {experts} experts "
            f"have a slot there already, so use at most {experts - slots}."
        )


def check_room(parallel: ParallelConfig, device: Device, machine: Machine) -> None:
    """Is there a node for every rank?"""
    if machine.may_grow:
        return
    if device == "cuda" and machine.gpus < parallel.ranks:
        raise SettingsError(
            f"parallel: every rank needs a GPU, {parallel.ranks} in all, and there are {machine.gpus}; "
            "lower tensor or data, or set device: cpu."
        )
    if parallel.cpus_per_rank > machine.cores:
        raise SettingsError(
            f"parallel.cpus_per_rank: {parallel.cpus_per_rank:g} is more than any node has, {machine.cores}; lower it."
        )
    cores = machine.cores if machine.all_cores is None else machine.all_cores
    if parallel.cpus_per_rank * parallel.ranks > cores:
        raise SettingsError(
            f"parallel.cpus_per_rank: {parallel.ranks} ranks want {parallel.cpus_per_rank:g} CPUs each and there are "
            f"{cores}; lower it, or tensor or data."
        )
