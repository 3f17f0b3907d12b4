from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cluster.config import EngineConfig
from cluster.errors import EngineError
from cluster.placement import even_placement
from cluster.rank_loader import RankLoader
from model.errors import CheckpointError
from tests.tiny import CONFIG, write_checkpoint


def test_weights_without_room_are_refused_before_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write_checkpoint(tmp_path / "tiny")
    (directory / "model.safetensors").unlink()  # whoever reads it fails in another way
    monkeypatch.setattr("cluster.rank_loader.available_bytes", lambda: 1000)
    sentence = r"^rank 0 needs \d+ bytes to load its weights and its cpu lacks \d+ of them: use more ranks"
    with pytest.raises(EngineError, match=sentence):
        RankLoader(0, EngineConfig(str(directory)), even_placement(2, 4, 1)).weights()


def test_a_gpu_needs_room_for_one_blocks_experts_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write_checkpoint(tmp_path / "tiny")
    (directory / "model.safetensors").unlink()
    holds = RankLoader(0, EngineConfig(str(directory)), even_placement(2, 4, 1))._holds
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    for free, refused in ((holds.weights, True), (holds.weights + holds.experts // 2, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, free))
        with pytest.raises(EngineError if refused else CheckpointError):
            RankLoader(0, EngineConfig(str(directory), device="cuda"), even_placement(2, 4, 1)).weights()


def test_a_rank_knows_what_a_page_takes_and_what_is_left_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.rank_loader.available_bytes", lambda: 1 << 30)
    loader = RankLoader(0, EngineConfig(str(write_checkpoint(tmp_path / "tiny"))), even_placement(2, 4, 1))
    assert loader.bytes_per_page == 2 * 2 * 16 * CONFIG["num_key_value_heads"] * 16 * 4  # K and V, layers, slots, heads
    assert loader.bytes_for_pages() == 1 << 30
    assert loader.pages(3).num_pages == 3
