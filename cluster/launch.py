"""From a resolved configuration to an engine that answers. The one place that puts the parts together."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.config import EngineConfig
from cluster.engine import Engine
from cluster.memory import held_at_once
from cluster.observer import FailureCause, Observer
from cluster.placement import Placement, even_placement
from cluster.ray_rank import session_directory
from cluster.worker_group import RayGroup, WorkerGroup
from model.config import load_config
from model.tokenizer import load_tokenizer

log = logging.getLogger(__name__)

CRASHES = "mixtral-serve-crashes"  # among the logs of Ray's session

GroupFactory = Callable[[EngineConfig, Placement, int], WorkerGroup]


async def launch(config: EngineConfig, placement_group: Any = None, observer: Observer | None = None) -> Engine:
    """An engine over Ray actors, one per rank, in the given placement group. Ray must be up."""
    engine: Engine | None = None
    early: list[tuple[str, int, FailureCause]] = []

    def on_loss(reason: str, epoch: int, cause: FailureCause) -> None:
        if engine is None:
            early.append((reason, epoch, cause))
        else:
            engine.rank_lost(reason, epoch, cause)

    def group(config: EngineConfig, placement: Placement, tokens_per_sequence: int) -> WorkerGroup:
        return RayGroup(config, placement, tokens_per_sequence, placement_group=placement_group, on_loss=on_loss)

    engine = await _launch(config, group, observer, session_directory() / CRASHES)
    for loss in early:
        engine.rank_lost(*loss)
    return engine


async def launch_in_process(config: EngineConfig, observer: Observer | None = None) -> Engine:
    """An engine whose only rank is this process. No ray."""
    if config.parallel.ranks > 1:
        raise ValueError(f"one process is one rank, not {config.parallel.ranks}; set parallel.tensor and data to 1")
    from cluster.in_process_group import InProcessGroup  # computes here, so that torch comes along

    return await _launch(config, InProcessGroup, observer)


async def _launch(
    config: EngineConfig, make_group: GroupFactory, observer: Observer | None, crash_directory: Path | None = None
) -> Engine:
    directory = Path(config.model_path)
    model = load_config(directory)
    if model.unknown:
        log.warning("config.json has fields that nobody here knows: %s", ", ".join(model.unknown))
    tokenizer = load_tokenizer(directory)
    parallel = config.parallel
    placement = even_placement(
        model.num_hidden_layers,
        model.num_local_experts,
        parallel.ranks,
        slices=parallel.expert_slices,
        spare_slots=parallel.spare_slots,
    )
    wanted = config.max_model_len or model.max_position_embeddings
    held = held_at_once(config, wanted, model.sliding_window)
    group = make_group(config, placement, held)
    num_pages = await asyncio.to_thread(group.start)
    tokens = num_pages * config.kv.page_size  # of one data group: a sequence is in one
    max_model_len = wanted if tokens >= held else tokens
    log.info(
        "KV memory: %d tokens in %d pages, enough for %d requests of %d tokens at once",
        tokens * parallel.data, num_pages * parallel.data, tokens // min(held, tokens) * parallel.data, max_model_len,
    )  # fmt: skip
    engine = Engine(config, model, group, placement, num_pages, max_model_len, tokenizer, observer, crash_directory)
    try:
        await engine.proved()
    except BaseException:
        await engine.stop()
        raise
    return engine
