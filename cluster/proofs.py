"""What has shown lately that it works: every expert's slots, and the collectives of every exchange.

A step proves the exchange it used and the slots that had rows. What is left unproved for PROVED_FOR_S gets a canary,
a step with made-up rows for every slot (cluster/canary.py). Pure: the time is the caller's.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from cluster.config import ParallelConfig
from cluster.messages import Exchange

PROVED_FOR_S = 30.0
DOUBTED_AFTER_S = 2 * PROVED_FOR_S  # a canary has had its chance: now it counts as not working


class Proofs:
    """One thread writes; `doubts` may be asked by any."""

    def __init__(self, parallel: ParallelConfig, num_layers: int, num_slots: int) -> None:
        self._exchanges: dict[Exchange, float] = dict.fromkeys(_exchanges(parallel), -inf)
        self._slots = [[-inf] * num_slots for _ in range(num_layers)]  # when each was proved last
        self._oldest_slot = -inf

    def step(self, exchange: Exchange, slot_rows: Sequence[Sequence[int]], now: float) -> None:
        """A step is done. `slot_rows` if it told them: what each slot has had lately."""
        self._exchanges[exchange] = now
        for proved, rows in zip(self._slots, slot_rows, strict=False):
            for slot, count in enumerate(rows):
                if count:
                    proved[slot] = now
        if slot_rows:
            self._oldest_slot = min(map(min, self._slots))

    def canary(self, exchange: Exchange, now: float) -> None:
        """Every slot has answered what it should, over this exchange."""
        self._exchanges[exchange] = now
        for proved in self._slots:
            proved[:] = [now] * len(proved)
        self._oldest_slot = now

    def renew(self, now: float) -> None:
        """Experts sit elsewhere: a canary is due at once, and until it has had time nothing is doubted."""
        due = now - PROVED_FOR_S
        self._slots = [[min(at, due) for at in proved] for proved in self._slots]
        self._oldest_slot = min(map(min, self._slots))

    def forget(self) -> None:
        """The ranks were formed anew: nothing is proved."""
        self._exchanges = dict.fromkeys(self._exchanges, -inf)
        self._slots = [[-inf] * len(proved) for proved in self._slots]
        self._oldest_slot = -inf

    def due(self, now: float) -> Exchange | None:
        """The exchange over which a canary has to go now; None: all is proved."""
        oldest = min(self._exchanges, key=self._exchanges.__getitem__)
        return oldest if now - min(self._exchanges[oldest], self._oldest_slot) >= PROVED_FOR_S else None

    def due_in_s(self, now: float) -> float:
        return max(0.0, min(*self._exchanges.values(), self._oldest_slot) + PROVED_FOR_S - now)

    def doubts(self, now: float) -> list[str]:
        """What has not been proved for too long, for people."""
        told: list[str] = [name for name, at in self._exchanges.items() if now - at > DOUBTED_AFTER_S]
        for layer, proved in enumerate(self._slots):
            slots = [str(slot) for slot, at in enumerate(proved) if now - at > DOUBTED_AFTER_S]
            if slots:
                told.append(f"layer {layer}, expert slots {' '.join(slots)}")
        return told


def _exchanges(parallel: ParallelConfig) -> tuple[Exchange, ...]:
    if parallel.ranks == 1:
        return ("none",)
    return ("all_reduce", "all_to_all") if parallel.exchange == "auto" else (parallel.exchange,)
