"""When a rank that says nothing counts as frozen.

Every rank has a thread that only answers "are you there?" and never waits for the work beside it: it answers while a
step computes for minutes, because kernels give the interpreter away. So silence means that the process is stopped, or
stuck inside a call that keeps the interpreter. It can also mean a machine that has no time for it, and nobody may be
killed for that:

- silence is counted in checks: a watcher that was itself held up for ten seconds has missed one check, not twenty;
- a process on the watcher's own machine that has computed in the last second, or would like to, is busy and not
  frozen; it has BUSY_SILENT_S before it counts as stuck.

Knows no ray: who asks, and how, is the worker group's business.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

CHECK_EVERY_S = 0.5
SILENT_S = 2.0
IDLE_S = 1.0  # at the end of the silence
BUSY_SILENT_S = 30.0
LONGEST_CHECK_S = 2 * CHECK_EVERY_S  # what one check counts for at most


@dataclass(slots=True)
class Pulse:
    """The silence of one rank."""

    process: int | None = None  # on this machine; None: elsewhere, so nothing can be seen of it
    silent_s: float = 0.0
    _idle_s: float = 0.0  # at the end of the silence, how long the process has not even tried to do anything
    _cpu_ticks: int = -1

    def check(self, *, answered: bool, elapsed_s: float) -> bool:
        """One look, `elapsed_s` after the one before. Is the rank frozen?"""
        if answered:
            self.silent_s = self._idle_s = 0.0
            return False
        elapsed_s = min(elapsed_s, LONGEST_CHECK_S)
        self.silent_s += elapsed_s
        if self.process is not None and self._busy(self.process):
            self._idle_s = 0.0
        else:
            self._idle_s += elapsed_s
        return self.silent_s >= BUSY_SILENT_S or (self.silent_s >= SILENT_S and self._idle_s >= IDLE_S)

    def _busy(self, process: int) -> bool:
        before, self._cpu_ticks = self._cpu_ticks, cpu_ticks(process)
        return self._cpu_ticks > before or wants_to_run(process)


def cpu_ticks(process: int) -> int:
    """Processor time of a process so far, all threads; -1 if it is gone."""
    fields = _stat(Path(f"/proc/{process}/stat"))
    return int(fields[11]) + int(fields[12]) if fields else -1


def wants_to_run(process: int) -> bool:
    """Does any of its threads run, wait for a core, or wait for a disk?"""
    try:
        threads = [_stat(path / "stat") for path in Path(f"/proc/{process}/task").iterdir()]
    except OSError:
        return False
    return any(fields and fields[0] in ("R", "D") for fields in threads)


def _stat(path: Path) -> list[str]:
    """What follows the name of a process in its stat file, the state first; empty if it is gone."""
    try:
        return path.read_text().rpartition(")")[2].split()
    except OSError:
        return []
