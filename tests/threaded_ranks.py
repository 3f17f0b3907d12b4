"""Ranks as threads of one process, over the shared-memory transport: no fork, milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cluster.transport.shared_memory import Layout, SharedMemoryComm, create_file
from model.comm import Groups, SoloComm


def on_ranks(
    size: int, function: Callable[[SharedMemoryComm], Any], area_bytes: int = 4096, timeout_s: float = 10
) -> list[Any]:
    layout = Layout(size, area_bytes)
    path = create_file(layout)
    with ThreadPoolExecutor(size) as threads:
        futures = [
            threads.submit(lambda r: function(SharedMemoryComm(path, r, layout, timeout_s)), rank)
            for rank in range(size)
        ]
        results = [future.result() for future in futures]
    assert not Path(path).exists()
    return results


def on_groups(tensor: int, data: int, function: Callable[[Groups], Any]) -> list[Any]:
    """The same for ranks of `data` groups: function(groups) on each."""
    layout = Layout(tensor, 4096)
    paths = [create_file(layout) if tensor > 1 else "" for _ in range(data)]

    def rank_main(world: SharedMemoryComm) -> Any:
        group, place = divmod(world.rank, tensor)
        alone = SoloComm()
        return function(Groups(world, SharedMemoryComm(paths[group], place, layout, 10) if tensor > 1 else alone))

    return on_ranks(tensor * data, rank_main)
