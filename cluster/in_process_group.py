"""The one rank of a group in this process: tests and offline use, no ray needed.

It takes steps as an actor does (step_line.py), so that the engine plans while it computes.
"""

from __future__ import annotations

import os
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from cluster.config import EngineConfig
from cluster.crash_bundle import RankReport
from cluster.errors import StepFailed
from cluster.memory import page_budget
from cluster.messages import Grammar, RankStatus, StepPlan, StepResult
from cluster.placement import Placement
from cluster.step_clock import StepClock
from cluster.step_line import CALLERS, StepLine
from cluster.worker import Worker
from cluster.worker_group import PendingStep
from model.comm import alone


class InProcessGroup:
    def __init__(self, config: EngineConfig, placement: Placement, tokens_per_sequence: int) -> None:
        self._config = config
        self._tokens_per_sequence = tokens_per_sequence
        self._worker = Worker(0, config, placement)
        self._clock = StepClock()
        self._line = StepLine(self._worker)
        self._callers = ThreadPoolExecutor(CALLERS, thread_name_prefix="rank-0")
        self._status = RankStatus(0, os.getpid(), socket.gethostname(), config.device, "loading", None)
        self._num_pages = 0
        self.epoch = 0

    def start(self) -> int:
        self._num_pages = page_budget(self._config, [self._worker.load()], self._tokens_per_sequence)
        self._form()
        self._status = replace(self._status, state="ready")
        return self._num_pages

    def recover(self, *, anew: bool = False) -> frozenset[int]:
        self.epoch += 1
        self._form()
        return frozenset()  # it is the same process with the same pages

    def step(self, plan: StepPlan) -> PendingStep:
        return self._callers.submit(self._step, plan, self.epoch)

    def fetch(self, placement: Placement) -> None:
        self._worker.fetch(placement)

    def adopt(self, placement: Placement) -> None:
        """The plans say it."""

    def prepare(self, grammar: Grammar) -> None:
        self._worker.compile(grammar)

    def ranks(self) -> tuple[RankStatus, ...]:
        return (replace(self._status, last_step_age_s=self._clock.age()),)

    def reports(self) -> tuple[RankReport, ...]:
        return ()

    def stop(self) -> None:
        self._line.close(self.epoch)
        self._callers.shutdown(cancel_futures=True)
        self._line.stop()
        self._status = replace(self._status, state="dead")

    def _form(self) -> None:
        self._line.form(lambda leave: self._worker.join(alone(), self._num_pages), self.epoch)

    def _step(self, plan: StepPlan, epoch: int) -> StepResult:
        try:
            result = self._line.step(plan, epoch)
        except StepFailed:
            raise
        except Exception as error:  # as from another process: the engine goes on, whoever is to blame does not
            raise StepFailed(f"rank 0 failed in a step: {type(error).__name__}: {error}") from error
        self._clock.tick()
        return result
