"""What takes too long for every run: twenty deaths in a row, and the loss of a node. With MIXTRAL_TEST_ALL=1."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group

from tests.cluster.served import Served, eventually, lives, served
from tests.cluster.traffic import Run, bodies

pytestmark = [
    pytest.mark.usefixtures("local_ray"),
    pytest.mark.skipif("MIXTRAL_TEST_ALL" not in os.environ, reason="minutes; set MIXTRAL_TEST_ALL=1"),
    pytest.mark.timeout(1200),
]


def shared_files() -> set[Path]:
    return set(Path("/dev/shm").glob("mixtral-serve-*"))


def open_files() -> Counter[str]:
    """Of this process, by kind; those of Ray's own logs and sockets come and go."""
    links = []
    for name in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{name}").partition(":")[0])
        except FileNotFoundError:
            continue
    return Counter(link for link in links if link in ("pipe", "anon_inode") or "mixtral" in link)


async def test_twenty_deaths_leave_nothing_behind() -> None:
    chance = random.Random(0)
    files, pids = shared_files(), set()
    with served(parallel={"tensor": 2, "standby": 1}) as server:
        expected = await Run(server.url, bodies()).done()
        before = open_files()
        for _ in range(20):
            pids |= set(server.pids)
            done = server.engine.stats().recoveries
            run = Run(server.url, bodies())
            await run.under_way(chance.randint(1, 20))
            for victim in chance.sample(server.pids, chance.randint(1, 2)):
                os.kill(victim, chance.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP)))
            assert await run.done() == expected
            await asyncio.to_thread(server.settled, done + 1)
            assert server.engine.stats().pages_used == 0
        print(f"20 faults: pauses {' '.join(f'{pause:.1f}' for pause in server.notes.pauses)} s")
        alive = {pid for pid in pids if lives(pid)}
        assert alive <= set(server.pids), "no rank outlives its replacement"
        grown = open_files() - before
        assert sum(grown.values()) < 10, f"descriptors of this process: {grown}"
    assert shared_files() == files


@contextmanager
def node() -> Iterator[subprocess.Popen[bytes]]:
    """Another node of the same Ray, on this machine."""
    address = ray.get_runtime_context().gcs_address
    command = [str(Path(sys.executable).with_name("ray")), "start", f"--address={address}", "--num-cpus=1", "--block"]
    alive = sum(entry["Alive"] for entry in ray.nodes())
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        eventually(lambda: sum(entry["Alive"] for entry in ray.nodes()) > alive, "the node has joined")
        yield process
    finally:
        lose(process)


def lose(process: subprocess.Popen[bytes]) -> None:
    """The node is gone at once, with all that ran there."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


async def test_a_node_is_lost_and_its_rank_goes_to_another_one() -> None:
    with node() as lost:
        group = placement_group([{"CPU": 0.5}, {"CPU": 0.5}], strategy="SPREAD")
        ray.get(group.ready())
        server = await asyncio.to_thread(Served, {"parallel": {"tensor": 2, "cpus_per_rank": 0.5}}, group)
        try:
            expected = await Run(server.url, bodies()).done()
            assert len({rank.place.node for rank in server.engine._group._ranks.values()}) == 2  # type: ignore[attr-defined]
            run = Run(server.url, bodies())
            await run.under_way()
            lose(lost)
            assert await run.done() == expected
            await asyncio.to_thread(server.settled, 1)
            print(f"node lost: pause {sum(server.notes.pauses):.1f} s")
        finally:
            await asyncio.to_thread(server.close)
            remove_placement_group(group)
