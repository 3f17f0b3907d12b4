"""What the engine's thread does when the ranks fail: who is suspected, the group formed anew, when it gives up.

    failure ──blame──▶ group.recover, until it succeeds ──▶ scheduler.start_over ──▶ steps again
                 │
                 └── the request that was alone in its third crash gets an error, and the others go on

Nothing has to be saved before: all that a sequence needs is with the scheduler. A failed step is not taken in; its
tokens were told to nobody, and the same are sampled again.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Sequence
from time import monotonic

from cluster.crash_bundle import CrashBundles
from cluster.errors import StepFailed
from cluster.messages import StepPlan
from cluster.observer import Observer
from cluster.scheduler import Event, Scheduler
from cluster.suspects import CULPRIT, Suspects
from cluster.worker_group import WorkerGroup

log = logging.getLogger(__name__)

MAX_FRUITLESS = 3  # recoveries without a culprit and without a completed step between them


class Recovery:
    """Works on the engine's thread; `active` and `count` may be read by others."""

    def __init__(
        self, scheduler: Scheduler, group: WorkerGroup, observer: Observer, bundles: CrashBundles | None
    ) -> None:
        self._scheduler = scheduler
        self._group = group
        self._observer = observer
        self._bundles = bundles
        self._suspects = Suspects()
        self._fruitless = 0
        self._convicted = False  # somebody, since a step was last completed
        self._began = 0.0
        self.active = False
        self.count = 0

    def alone(self) -> str | None:
        """The request that the next step must be for and nobody else's."""
        if self._suspects.alone is not None:
            self._suspects.forget_all_but(self._scheduler.keys)
        return self._suspects.alone

    def completed(self, events: Sequence[Event]) -> None:
        """A step is done. Whoever gets a token from it is suspected no more."""
        self._fruitless = 0
        self._convicted = False
        self._suspects.cleared(event.request_id for event in events)

    def proved(self) -> None:
        """A canary found nothing wrong. If the last failure was in a request's step, that says little."""
        if not self._suspects.any and not self._convicted:
            self._fruitless = 0

    def blame(self, failure: StepFailed, keys: Collection[str], plans: Iterable[StepPlan]) -> list[Event]:
        """The ranks failed in a step for these requests, or between two. What to tell whoever cannot go on.

        plans: the last ones.
        """
        self._began = monotonic()
        self.active = True
        log.error("%s; the ranks are formed anew", failure)
        self._observer.rank_failed(failure.cause)
        if self._bundles is not None:
            path = self._bundles.write(failure, plans, self._group.ranks(), self._group.reports())
            log.error("what was going on is written down in %s", path)
        self._suspects.forget_all_but(self._scheduler.keys)
        culprit = self._suspects.crashed(keys)
        if culprit is not None and not self._convicted:
            self._fruitless = 0
        if self._fruitless >= MAX_FRUITLESS:  # also with a second culprit in a row: then it is the ranks
            raise StepFailed(f"{MAX_FRUITLESS} recoveries in a row have not led to a completed step: {failure}")
        if culprit is None:
            return []
        log.error("request %s was alone in its third crash; it is not tried again", culprit)
        self._convicted = True
        return self._scheduler.fail(culprit, CULPRIT)

    def run(self, *, anew: bool = False) -> None:
        """Bring the ranks back, or others; every sequence goes on from the tokens it has. Callers see a pause."""
        while True:
            self.count += 1
            self._fruitless += 1
            try:
                lost = self._group.recover(anew=anew)
                break
            except StepFailed as failure:  # another rank died meanwhile
                log.error("%s, during recovery %d", failure, self.count)
                if self._fruitless >= MAX_FRUITLESS:
                    raise
        # Who has to run alone needs pages that others hold.
        self._scheduler.start_over(None if self._suspects.alone is not None else lost)
        pause = monotonic() - self._began
        self._scheduler.move_deadlines(pause)
        log.info("recovery %d took %.2f s", self.count, pause)
        self._observer.recovered(pause)
        self.active = False
