"""How much memory this process may still take on its machine: of what is free, and of its container's limit.

Files that the kernel keeps in memory count as free: it drops them when somebody needs the room. Right after a large
checkpoint has been read they are most of it.
"""

from __future__ import annotations

import os
from pathlib import Path

PROC = Path("/proc")
CGROUP = Path("/sys/fs/cgroup")


def available_bytes(proc: Path = PROC, cgroup: Path = CGROUP) -> int:
    free = _table(proc / "meminfo").get("MemAvailable:", 0) << 10
    if not free:  # no Linux
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _container(cgroup)
    return free if limit is None else max(0, min(free, limit))


def _container(cgroup: Path) -> int | None:
    """What a container may still take, where it has a limit."""
    try:
        limit = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text())
    except (OSError, ValueError):  # no container, no limit ("max"), or an older kernel
        return None
    files = _table(cgroup / "memory.stat")
    return limit - used + files.get("inactive_file", 0) + files.get("active_file", 0)


def _table(file: Path) -> dict[str, int]:
    """The number behind each name of a file of lines like `name 12 kB`; empty where it cannot be read."""
    try:
        lines = [line.split() for line in file.read_text().splitlines()]
    except OSError:
        return {}
    return {line[0]: int(line[1]) for line in lines if len(line) > 1 and line[1].isdecimal()}
