"""A step that the ranks have been given: how long it may take, what it gave, and what is told of it afterwards."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.errors import StepFailed
from cluster.messages import EngineStats, StepPlan, StepResult
from cluster.observer import StepRecord
from cluster.step_clock import StepForecast
from cluster.worker_group import PendingStep

CAPTURE_WITHIN_S = 300.0  # the first one compiles kernels

SlotRows = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class UnderWay:
    plan: StepPlan
    pending: PendingStep
    schedule_s: float
    handed_out: float  # when

    @property
    def num_tokens(self) -> int:
        """For the forecast; a canary counts as a small step."""
        return max(1, self.plan.num_tokens)

    def deadline_s(self, forecast: StepForecast) -> float:
        return CAPTURE_WITHIN_S if self.plan.capture else forecast.deadline_s(self.num_tokens)

    def result(self, timeout_s: float) -> StepResult:
        try:
            return self.pending.result(timeout_s)
        except TimeoutError:
            raise StepFailed(f"step {self.plan.step} took longer than {timeout_s:.0f} s", "deadline") from None

    def record(
        self,
        result: StepResult,
        stats: EngineStats,
        slot_rows: SlotRows,
        slot_experts: SlotRows,
        *,
        done: float,
        taken: float,
        published: float,
    ) -> StepRecord:
        """Of a step with tokens. When the ranks had done it, when it was taken in, and when everybody was told."""
        decodes = sum(len(chunk.token_ids) == 1 for chunk in self.plan.chunks)
        return StepRecord(
            prompt_tokens=self.plan.num_tokens - decodes,
            decode_tokens=decodes,
            sequences=len(self.plan.chunks),
            exchange=self.plan.exchange,
            schedule_s=self.schedule_s,
            step_s=done - self.handed_out,
            postprocess_s=taken - done,
            publish_s=published - taken,
            ranks=result.times,
            stats=stats,
            slot_rows=slot_rows,
            slot_experts=slot_experts,
            graph=result.graph,
        )
