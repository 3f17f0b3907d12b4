from __future__ import annotations

import logging

import pytest

from cluster.config import EngineConfig, KVConfig, ParallelConfig, SchedulerConfig
from cluster.launch import _launch, launch_in_process
from tests.fake_group import FakeGroup
from tests.tiny import write_checkpoint

LENGTH = 512  # the tiny checkpoint's own


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("launch") / "tiny"))


@pytest.mark.parametrize(
    ("num_pages", "length", "said"),
    [
        (200, LENGTH, "1600 tokens in 400 pages, enough for 2 requests of 512 tokens"),
        (100, 400, "800 tokens in 200 pages, enough for 2 requests of 400 tokens"),
    ],
)
async def test_a_sequence_fits_into_one_data_group(
    num_pages: int, length: int, said: str, checkpoint: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    config = EngineConfig(checkpoint, parallel=ParallelConfig(data=2), kv=KVConfig(page_size=4))
    engine = await _launch(config, lambda *_: FakeGroup(num_pages, 4, groups=2), None)
    try:
        assert engine.max_model_len == length
        assert said in caplog.text
        assert engine.stats().pages_total == 2 * num_pages
        assert len(engine.experts().ranks[0]) == 4
    finally:
        await engine.stop()


async def test_one_process_is_one_rank(checkpoint: str) -> None:
    config = EngineConfig(checkpoint, parallel=ParallelConfig(data=2), scheduler=SchedulerConfig(max_running=1))
    with pytest.raises(ValueError, match="one process is one rank, not 2"):
        await launch_in_process(config)
