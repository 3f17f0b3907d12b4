"""Crash bundles tell what was going on and nothing of what was said; they are few, and never in the way."""

from __future__ import annotations

import json
from pathlib import Path

from cluster.crash_bundle import MAX_BUNDLES, MAX_CHUNKS, MAX_STACKS, CrashBundles, RankReport
from cluster.errors import StepFailed
from cluster.messages import RankStatus, SamplingParams, SequenceChunk, SequenceStart, StepPlan

RANKS = (RankStatus(0, 4711, "node", "cpu", "ready", 0.5),)
FAILURE = StepFailed("rank 1 froze during a step", "frozen")


def plan(num_chunks: int = 1) -> StepPlan:
    start = SequenceStart(7, (31337, 31338), 2, SamplingParams(max_tokens=1))
    return StepPlan(3, (SequenceChunk(7, (31337, 31338), 0, (5,), True),) * num_chunks, (start,), exchange="all_reduce")


def test_it_tells_cause_ranks_stacks_and_plans_but_no_token(tmp_path: Path) -> None:
    path = CrashBundles(tmp_path / "crashes").write(FAILURE, [plan()], RANKS, [RankReport(0, "x" * 10**6, 5, 6)])
    assert path is not None
    text = path.read_text()
    bundle = json.loads(text)
    assert (bundle["cause"], bundle["failure"]) == ("frozen", str(FAILURE))
    assert bundle["ranks"][0]["pid"] == 4711
    assert len(bundle["reports"][0]["stacks"]) == MAX_STACKS
    assert bundle["plans"][0]["chunks"] == [{"seq": 7, "start": 0, "tokens": 2, "new_pages": 1, "sample": True}]
    assert "31337" not in text


def test_there_are_few_and_small_ones_and_the_newest_stay(tmp_path: Path) -> None:
    bundles = CrashBundles(tmp_path)
    paths = [bundles.write(FAILURE, [plan(5000)] * 2, RANKS, []) for _ in range(MAX_BUNDLES + 5)]
    assert sorted(tmp_path.iterdir()) == sorted(path for path in paths[5:] if path is not None)
    assert paths[-1] is not None
    assert len(json.loads(paths[-1].read_text())["plans"][0]["chunks"]) == MAX_CHUNKS


def test_a_full_disk_keeps_nobody_from_recovering(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert CrashBundles(tmp_path / "file").write(FAILURE, [], (), ()) is None
