"""The steps of one rank on their way through three hands, so that none waits where it need not.

    one caller's thread    prepare n                               answer n
    the computing one                 compute n ................ compute n + 1 ............
    another caller's                     prepare n + 1                            answer n + 1

Callers may come in any order: each waits until the steps before its own are prepared. One thread does all the
computing, because torch brings threads of its own for each that computes, and two such sets would fight for the cores.

A line takes the steps of one epoch, that of the group it was formed with last. Once it is closed or a step has failed
it takes no more: who waits is sent away, and what is prepared is not computed. Closing names the epoch, for it may
overtake the call that forms the group. Knows neither ray nor torch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from cluster.errors import StepFailed
from cluster.messages import StepPlan, StepResult

CALLERS = 2  # threads to bring steps with: while one's is computed, the other's is prepared
TURN_S = 30.0  # how long a step waits for the one before, which was sent earlier

Prepared = TypeVar("Prepared")


class Output(Protocol):
    def result(self) -> StepResult:
        """Waits for a device that is still at it."""


class Steps(Protocol[Prepared]):
    """What a worker does of a step."""

    @property
    def next_step(self) -> int:
        """The step that is to be prepared next."""

    def prepare(self, plan: StepPlan) -> Prepared: ...

    def compute(self, prepared: Prepared) -> Output: ...


class StepLine:
    def __init__(self, worker: Steps[Any]) -> None:
        self._worker = worker
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="compute")
        self._changed = threading.Condition()  # held where a step is prepared
        self._epoch: int | None = None  # whose steps are taken
        self._leave = threading.Event()  # set: no more of them are
        self._over = -1  # the last epoch that was closed
        self._calls = 0  # of form() and step() that are not over

    def form(self, join: Callable[[threading.Event], None], epoch: int) -> None:
        """Have the computing thread join a group; from then on take the steps of this epoch.

        What went on before ends first. The event that `join` is given says that the group is not to be any more.
        """
        self.close(epoch - 1)
        self.wait_until_empty()
        with self._call():
            with self._changed:
                if epoch <= self._over:
                    raise StepFailed("the group was aborted before it formed")
                self._epoch, self._leave = None, threading.Event()
            self._thread.submit(join, self._leave).result()
            self._epoch = epoch

    def step(self, plan: StepPlan, epoch: int) -> StepResult:
        """What a step gives. For CALLERS threads at once, which wait here."""
        with self._call():
            with self._changed:
                self._changed.wait_for(lambda: self._refuses(epoch) or self._worker.next_step >= plan.step, TURN_S)
                self._check(epoch)
                with self._closed_by_failure():
                    prepared = self._worker.prepare(plan)
                computing = self._thread.submit(self._compute, prepared, epoch)
                self._changed.notify_all()
            output = computing.result()
            with self._closed_by_failure():
                return output.result()

    def close(self, epoch: int) -> None:
        """Up to this epoch form no group and take no more steps; who waits is sent away, what is computed goes on."""
        with self._changed:
            self._over = max(self._over, epoch)
            self._leave.set()
            self._changed.notify_all()

    def wait_until_empty(self) -> None:
        """Until whatever goes on has ended. Something else must see to it that it does."""
        with self._changed:
            self._changed.wait_for(lambda: not self._calls)

    def stop(self) -> None:
        """For good, once it is closed."""
        self._thread.shutdown()

    def _compute(self, prepared: Any, epoch: int) -> Output:
        self._check(epoch)
        with self._closed_by_failure():
            return self._worker.compute(prepared)

    def _refuses(self, epoch: int) -> bool:
        return self._leave.is_set() or epoch != self._epoch

    def _check(self, epoch: int) -> None:
        if self._refuses(epoch):
            raise StepFailed("the group was aborted, or a step before this one failed")

    @contextmanager
    def _closed_by_failure(self) -> Iterator[None]:
        """The steps behind one that failed are not to be computed; who waits hears of it when this call is over."""
        try:
            yield
        except Exception:
            self._leave.set()
            raise
        except BaseException as error:  # a library's panic: as it is, it would end whoever waits, not the step
            self._leave.set()
            raise StepFailed(f"{type(error).__name__}: {error}") from error

    @contextmanager
    def _call(self) -> Iterator[None]:
        with self._changed:
            self._calls += 1
        try:
            yield
        finally:
            with self._changed:
                self._calls -= 1
                self._changed.notify_all()
