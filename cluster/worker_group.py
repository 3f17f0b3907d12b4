"""All ranks of one replica as one thing that takes a plan and gives a result; and its form as Ray actors.

The other form, for tests and offline use, is cluster/in_process_group.py. Knows lifecycles, not tokens; what concerns
a single actor, a step or the processes that stand by is in the files called ray_*.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from time import monotonic
from typing import Any, Literal, Protocol

from cluster.config import EngineConfig
from cluster.crash_bundle import RankReport
from cluster.errors import StepFailed
from cluster.heartbeat import CHECK_EVERY_S, SILENT_S
from cluster.memory import page_budget
from cluster.messages import Grammar, RankStatus, StepPlan, StepResult
from cluster.observer import FailureCause
from cluster.placement import Placement
from cluster.ray_rank import Rank, bundles_of_ranks, create, ended, failed, results
from cluster.ray_standby import Standbys
from cluster.ray_step import RayStep
from cluster.rendezvous import Transport, has_shared_memory
from cluster.step_clock import StepClock

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"  # what ranks on one node meet on: nothing listens outside
START_TRIES = 3  # what a rank raises while loading ends the start at once; that it dies is worth another try
STOP_TIMEOUT_S = 5.0
ABORT_TIMEOUT_S = 5.0  # a rank that cannot leave a collective in this time is replaced
FORM_TIMEOUT_S = 120.0
REPORTS_WITHIN_S = 1.0
ROOM_NEWS_S = 30.0  # how often is said that a rank waits for room in the cluster
LOADING_NEWS_S = 5.0  # and how far a rank has loaded
PROGRESS_WITHIN_S = 2.0


class PendingStep(Protocol):
    def result(self, timeout: float | None = None) -> StepResult:
        """Wait for the step. Raises StepFailed if a rank could not do it, TimeoutError if it takes longer."""


class WorkerGroup(Protocol):
    def start(self) -> int:
        """Load the weights, connect the ranks; the pages of KV memory each holds. Blocks."""

    def step(self, plan: StepPlan) -> PendingStep:
        """Hand a plan to every rank. Plans are carried out in the order they are handed in."""

    @property
    def epoch(self) -> int:
        """How often the ranks were formed anew."""

    def recover(self, *, anew: bool = False) -> frozenset[int]:
        """After a failed step or a death: replace the ranks that are gone, or all of them, and form the group anew.

        Weights stay where they are; sequences are forgotten, steps count from 0 again. Gives the data groups whose
        pages are gone too, because a rank of theirs was replaced. Blocks.
        """

    def fetch(self, placement: Placement) -> None:
        """Have every rank read the experts it will need, beside the steps. Blocks."""

    def adopt(self, placement: Placement) -> None:
        """Plans name this placement from now on. All ranks of this epoch have fetched it."""

    def prepare(self, grammar: Grammar) -> None:
        """Compile a grammar where tokens are chosen, beside the steps. Blocks; ModelError if it cannot be."""

    def ranks(self) -> tuple[RankStatus, ...]: ...

    def reports(self) -> tuple[RankReport, ...]:
        """Where the threads of every rank are, of those that can still say it. Takes a second at most."""

    def stop(self) -> None:
        """End every rank. Safe at any time, and twice."""


OnLoss = Callable[[str, int, FailureCause], None]  # a sentence, the epoch it is about, and what happened


class RayGroup:
    """One actor per rank. This process owns and supervises them: Ray restarts nothing by itself."""

    def __init__(
        self,
        config: EngineConfig,
        placement: Placement,
        tokens_per_sequence: int,
        *,
        placement_group: Any = None,  # with a bundle for each rank; None: wherever Ray finds room
        on_loss: OnLoss,  # called from the watching thread
    ) -> None:
        self._config = config
        self._placement = placement
        self._tokens_per_sequence = tokens_per_sequence
        self._placement_group = placement_group
        self._bundles: list[int] = []  # of each rank; stays, whatever node Ray moves a bundle to
        self._on_loss = on_loss
        self._clock = StepClock()
        self._ranks: Mapping[int, Rank] = {}  # in order; replaced, never changed, since other threads look at it
        self._num_pages = 0
        self._standbys = Standbys(config)
        self._handed_out: deque[RayStep] = deque(maxlen=2)  # the last ones
        self._stopping = threading.Event()
        self.epoch = 0

    def start(self) -> int:
        threading.Thread(target=self._watch, name="watch-ranks", daemon=True).start()
        self._bundles = bundles_of_ranks(self._placement_group, self._config.parallel.ranks)
        try:
            for tries_left in reversed(range(START_TRIES)):
                try:
                    self._fill()
                    facts = [rank.facts for rank in self._ranks.values() if rank.facts is not None]
                    self._num_pages = page_budget(self._config, facts, self._tokens_per_sequence)
                    self._form()
                    break
                except StepFailed as failure:
                    if not tries_left or self._stopping.is_set():
                        raise
                    log.error("%s at the start; what is lost is started once more", failure)
                    self._part(self._find_lost())
        except BaseException:
            self.stop()
            raise
        return self._num_pages

    def recover(self, *, anew: bool = False) -> frozenset[int]:
        self._part(set(self._ranks) if anew else self._find_lost())
        self._fill()
        self.fetch(self._placement)  # some may have died between two placements
        empty = {number for number, rank in self._ranks.items() if rank.epoch < 0}
        self._form()
        if self._stopping.is_set():  # meanwhile, and what was just started must not stay
            self.stop()
        return frozenset(number // self._config.parallel.tensor for number in empty)

    def step(self, plan: StepPlan) -> PendingStep:
        ranks = list(self._ranks.values())
        step = RayStep(ranks, [rank.step(plan, self.epoch) for rank in ranks], self._clock, self._placement)
        self._handed_out.append(step)
        return step

    def fetch(self, placement: Placement) -> None:
        results([rank.ask("beside", "fetch", placement) for rank in self._ranks.values()])

    def adopt(self, placement: Placement) -> None:
        self._placement = placement

    def prepare(self, grammar: Grammar) -> None:
        choosing = [rank for number, rank in self._ranks.items() if number % self._config.parallel.tensor == 0]
        results([rank.ask("beside", "compile", grammar) for rank in choosing])

    def ranks(self) -> tuple[RankStatus, ...]:
        age = self._clock.age()
        return tuple(rank.status(self._config.device, age) for rank in self._ranks.values())

    def reports(self) -> tuple[RankReport, ...]:
        calls = [rank.ask("control", "report") for rank in self._ranks.values() if rank.state == "ready"]
        return tuple(results([call for call in ended(calls, REPORTS_WITHIN_S) if not failed(call)]))

    def stop(self) -> None:
        self._stopping.set()
        self._standbys.stop()
        ranks = list(self._ranks.values())
        for rank in ranks:
            rank.kill(by_force=rank.state == "frozen")
        ended([rank.watch for rank in ranks], STOP_TIMEOUT_S)
        for rank in ranks:
            rank.state = "dead"

    def _fill(self) -> None:
        """Start the ranks that are missing, and wait until all have loaded."""
        missing = {n for n in range(self._config.parallel.ranks) if n not in self._ranks or self._ranks[n].lost}
        made = {number: self._make(number) for number in missing}
        self._ranks = dict(sorted({**self._ranks, **made}.items()))
        loading = [rank for rank in self._ranks.values() if rank.facts is None]
        self._wait_for_room(loading)
        for rank, place in zip(loading, results([rank.placing for rank in loading]), strict=True):
            rank.located(place)
        self._follow(loading)
        for rank, facts in zip(loading, results([rank.loading for rank in loading]), strict=True):
            rank.facts = facts
            read, seconds = facts.weight_bytes / 1e9, facts.load_seconds
            log.info("%s: %.2f GB in %.1f s, %.2f GB/s", rank, read, seconds, read / seconds)

    def _make(self, number: int) -> Rank:
        """From a process that stands by where the rank was, or a new one."""
        before = self._ranks.get(number)
        actor = None if before is None or before.place is None else self._standbys.take(before.place)
        if actor is None:
            actor = create(self._config, self._placement_group, self._bundles[number])
        return Rank(number, actor, self._placement)

    def _follow(self, ranks: Sequence[Rank]) -> None:
        """Say now and then how far each has read, until all have or one cannot."""
        calls = [rank.loading for rank in ranks]
        done: list[Any] = []
        while len(done) < len(calls) and not any(map(failed, done)):
            before, done = len(done), ended(calls, LOADING_NEWS_S, at_least=len(done) + 1)
            if len(done) > before:
                continue
            with contextlib.suppress(StepFailed):  # whoever has died is heard of from its call
                reading = [rank for rank in ranks if rank.loading not in done]
                shares = results([rank.ask("control", "progress") for rank in reading], PROGRESS_WITHIN_S)
                log.info("loading: %s", ", ".join(f"{rank} {s:.0%}" for rank, s in zip(reading, shares, strict=True)))

    def _wait_for_room(self, ranks: Collection[Rank]) -> None:
        """Until every actor's process is up. Where the cluster has no room, for as long as that takes."""
        waiting = list(ranks)
        while waiting and not self._stopping.is_set():
            began = monotonic()
            done = ended([rank.placing for rank in waiting], ROOM_NEWS_S)
            waiting = [rank for rank in waiting if rank.placing not in done]
            if waiting and monotonic() - began >= ROOM_NEWS_S:
                log.warning("%s: no node of the cluster has room; waiting for one", ", ".join(map(str, waiting)))

    def _form(self) -> None:
        """Connect the ranks."""
        ranks = list(self._ranks.values())
        addresses = [rank.place.address for rank in ranks if rank.place is not None]
        transport: Transport = "nccl" if self._config.device == "cuda" else "gloo"
        if len(set(addresses)) == 1:
            addresses = [LOOPBACK] * len(addresses)
            if transport == "gloo" and has_shared_memory():
                transport = "shared_memory"
        rendezvous = None
        if len(ranks) > 1:
            opened = ranks[0].actor.open_store.remote(addresses[0], len(ranks), self.epoch, transport)
            (rendezvous,) = results([opened], FORM_TIMEOUT_S)
        own = zip(ranks, addresses, strict=True)
        results([r.actor.join.remote(rendezvous, at, self._num_pages, self.epoch) for r, at in own], FORM_TIMEOUT_S)
        for rank in ranks:
            rank.joined(self.epoch)
        self._standbys.fill({rank.place.node for rank in ranks if rank.place is not None})

    def _find_lost(self) -> set[int]:
        """Those that are known to be gone, and those of which nobody has heard yet."""
        over = ended([rank.watch for rank in self._ranks.values()])
        return {number for number, rank in self._ranks.items() if rank.lost or rank.watch in over}

    def _part(self, lost: set[int]) -> None:
        """Let go of the ranks that are lost, and of each other. What follows is another epoch."""
        self._give_up(lost | self._abort(self._ranks.keys() - lost))
        self.epoch += 1
        for step in self._handed_out:
            step.abandon()

    def _abort(self, numbers: Collection[int]) -> set[int]:
        """Call ranks out of their collectives, also those that wait for others to join; those that did not come."""
        loaded = [n for n in numbers if self._ranks[n].facts is not None]
        calls = {self._ranks[n].ask("control", "abort", self.epoch): n for n in loaded}
        came = {calls[call] for call in ended(list(calls), ABORT_TIMEOUT_S) if not failed(call)}
        return set(calls.values()) - came

    def _give_up(self, numbers: Collection[int]) -> None:
        """End these for certain; the next _fill replaces them."""
        for number in numbers:
            rank = self._ranks[number]
            rank.kill(by_force=True)
            if not rank.lost:
                rank.state = "dead"

    def _watch(self) -> None:
        """Hear of every death at once, and ask every rank twice a second whether it is there."""
        asked = monotonic()
        while not self._stopping.is_set():
            ranks = [rank for rank in self._ranks.values() if not rank.lost]
            if ranks:
                ended([rank.watch for rank in ranks], CHECK_EVERY_S, at_least=1)
            else:
                self._stopping.wait(CHECK_EVERY_S)
            over = ended([rank.watch for rank in ranks])
            dead = [rank for rank in ranks if rank.watch in over]
            frozen = []
            if (elapsed := monotonic() - asked) >= CHECK_EVERY_S:
                asked = monotonic()
                frozen = [rank for rank in ranks if rank not in dead and rank.frozen(elapsed)]
            self._lose(dead, "dead")
            self._lose(frozen, "frozen")

    def _lose(self, ranks: Collection[Rank], state: Literal["dead", "frozen"]) -> None:
        if not ranks or self._stopping.is_set():
            return
        for rank in ranks:
            rank.state = state
            if state == "frozen":
                rank.kill(by_force=True)
        names = " and ".join(map(str, ranks))
        epoch = max(rank.epoch for rank in ranks)
        if state == "dead":
            self._on_loss(f"{names} died", epoch, "died")
        else:
            self._on_loss(f"{names} has not answered for {SILENT_S:g} s", epoch, "frozen")
