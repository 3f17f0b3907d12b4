"""What is written down when ranks fail: the last plans, where every thread was, memory. One small JSON file each.

Nobody's text is in it, nor a single token: plans are told by their numbers.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.errors import StepFailed
from cluster.messages import RankStatus, StepPlan

log = logging.getLogger(__name__)

MAX_BUNDLES = 16  # the oldest goes
MAX_STACKS = 64 << 10  # characters of each rank
MAX_CHUNKS = 256  # of each plan


@dataclass(frozen=True, slots=True)
class RankReport:
    """Filled by the rank's thread of control, while the rank works or hangs."""

    rank: int
    stacks: str  # where every thread is
    resident_bytes: int
    device_bytes: int  # allocated on the accelerator


class CrashBundles:
    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def write(
        self, failure: StepFailed, plans: Iterable[StepPlan], ranks: Sequence[RankStatus], reports: Sequence[RankReport]
    ) -> Path | None:
        """The new file; None if there is no room for it, which must not keep anybody from recovering."""
        bundle = {
            "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "cause": failure.cause,
            "failure": str(failure),
            "ranks": [asdict(rank) for rank in ranks],
            "reports": [asdict(report) | {"stacks": report.stacks[:MAX_STACKS]} for report in reports],
            "plans": [_told(plan) for plan in plans],
        }
        path = self._directory / f"crash-{time.time_ns()}.json"
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            for old in sorted(self._directory.glob("crash-*.json"))[: -MAX_BUNDLES + 1]:
                old.unlink()
            path.write_text(json.dumps(bundle, indent=1))
        except OSError as error:
            log.error("no crash bundle could be written: %s", error)
            return None
        return path


def _told(plan: StepPlan) -> dict[str, Any]:
    return {
        "step": plan.step,
        "exchange": plan.exchange,
        "placement": plan.placement,
        "canary": plan.canary,
        "tokens": plan.num_tokens,
        "group_tokens": plan.group_tokens,
        "begins": [start.seq for start in plan.starts][:MAX_CHUNKS],
        "chunks": [
            {
                "seq": chunk.seq,
                "start": chunk.start,
                "tokens": len(chunk.token_ids),
                "new_pages": len(chunk.new_pages),
                "sample": chunk.sample,
            }
            for chunk in plan.chunks[:MAX_CHUNKS]
        ],
    }
