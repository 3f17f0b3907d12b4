"""What this replica counts, under the names that Prometheus sees: mixtral_*.

    engine thread ──step, failures──▶ Metrics ◀──events, answers── event loop
    engine's own counters ──read when somebody looks──▶ collect() ──▶ GET /metrics, and Ray's agent (ray_metrics.py)

Everything is recorded once, here; what the engine counts itself is not counted again but read (engine_metrics.py).
Every label has few values: layers, experts, ranks, routes, codes and reasons of ours, and no more key names than MOST.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from cluster.messages import Exchange, FinishReason, TokenEvent
from cluster.observer import FailureCause, Rejection, StepRecord
from deployments.access_log import CLIENT_LEFT, Record
from deployments.engine_metrics import EngineFacts, engine_metrics

MOST = 100  # values of a label that comes from outside; what comes later is counted as "other"
OTHER = "other"
KEY_LIMIT = "key_limit"  # code of the error that a key with too many requests gets, and its reason among rejections

# Counters of these begin before the first of them comes: one that begins with a count is not seen to rise.
_STATUSES = (200, 429, 500, 503, 504)
_CODES = (
    "aborted", "deadline_exceeded", "engine_error", "idle_timeout", "internal_error", KEY_LIMIT, "not_ready",
    "queue_full", "request_crashes_ranks",
)  # fmt: skip

_STEP_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_FIRST_TOKEN_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0)
_BETWEEN_TOKENS_S = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.5, 1.0, 5.0, 30.0)
_REQUEST_S = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_PAUSE_S = (0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0)
_PARTS = ("build", "attention", "router", "experts", "exchange", "head", "sample")  # fields of StepTimes
_TOKENS = tuple(float(1 << power) for power in range(14))


class Metrics:
    """Of one replica. The engine loop's observer, and what HTTP tells of requests; callable from any thread."""

    def __init__(self, model: str, replica: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.registry = CollectorRegistry()
        self.clock = clock
        self._common = {"model": model, "replica": replica}
        self._engine: EngineFacts | None = None
        self._members: list[Counter | Histogram] = []

        self.first_token = self._histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token.", _FIRST_TOKEN_S
        )
        self.between_tokens = self._histogram(
            "inter_token_latency_seconds", "Between two tokens of one answer, as they leave.", _BETWEEN_TOKENS_S
        )
        self.request = self._histogram(
            "e2e_request_latency_seconds", "From a request's arrival to its last token.", _REQUEST_S
        )
        self.queue = self._histogram(
            "request_queue_time_seconds", "From a request's arrival to its first step.", _REQUEST_S
        )
        self.prefill = self._histogram(
            "request_prefill_time_seconds", "From a request's first step to its first token.", _REQUEST_S
        )
        self.decode = self._histogram(
            "request_decode_time_seconds", "From a request's first token to its last.", _REQUEST_S
        )
        finished = self._counter("request_success", "Answers that ended, by how.", "finished_reason")
        self._finished = _begin_at_zero(finished, get_args(FinishReason))
        self._answers = self._counter("http_requests", "HTTP requests answered.", "route", "status")
        self._routes: set[str] = set()  # that have been asked
        self._errors = self._counter("http_errors", "Errors told to callers, in streams too.", "code")
        _begin_at_zero(self._errors, _CODES)
        rejections = self._counter("requests_rejected", "Requests turned away, or failed before a step.", "reason")
        self._rejections = _begin_at_zero(rejections, (*get_args(Rejection), KEY_LIMIT))
        self._key_requests = self._counter("key_requests", "Requests by the name of their API key.", "key")
        self._key_tokens = self._counter("key_tokens", "Tokens by the name of their API key.", "key", "kind")

        self._iteration_tokens = self._histogram("iteration_tokens", "Tokens computed in one step.", _TOKENS)
        self._step = self._histogram("step_duration_seconds", "From handing a step out to its result.", _STEP_S)
        parts = self._counter("step_seconds", "Time of steps by what it was spent on, on rank 0.", "part")
        self._part_clocks = _begin_at_zero(parts, ("schedule", *_PARTS, "postprocess", "publish"))
        exchanges = self._counter("steps_by_exchange", "Steps by how the ranks exchanged tokens.", "exchange")
        self._exchanges = _begin_at_zero(exchanges, get_args(Exchange))
        graphs = self._counter("graph_steps", "Steps by whether a captured graph was replayed, on rank 0.", "outcome")
        self._graph_steps = {True: graphs.labels("hit"), False: graphs.labels("miss")}
        self._expert_tokens: list[dict[int, int]] = []  # per layer and expert

        failures = self._counter("rank_failures", "Ranks that failed, by how.", "cause")
        self._failures = _begin_at_zero(failures, get_args(FailureCause))
        self._pauses = self._histogram(
            "recovery_pause_seconds", "From a rank's failure to the first plan after it.", _PAUSE_S
        )
        self._rebalances = self._counter("rebalances", "Times that experts were moved.")
        self._moves = self._counter("expert_moves", "Slots that were given another expert.")
        canaries = self._counter("canaries", "Canary steps by their outcome.", "outcome")
        self._canaries = _begin_at_zero(canaries, ("ok", "failed"))
        self._proved: float | None = None
        self._bounded: dict[str, set[str]] = {"code": set(_CODES)}
        self.unstarted: dict[RequestTimer, None] = {}  # requests without a token yet, the oldest first
        self.registry.register(self)

    def watch(self, engine: EngineFacts) -> None:
        """Whose counters are shown from now on."""
        self._engine = engine

    # The engine loop's side: cluster/observer.py.

    def step(self, record: StepRecord) -> None:
        self._iteration_tokens.observe(record.prompt_tokens + record.decode_tokens)
        self._step.observe(record.step_s)
        self._exchanges[record.exchange].inc()
        if record.graph is not None:
            self._graph_steps[record.graph].inc()
        clocks = self._part_clocks
        clocks["schedule"].inc(record.schedule_s)
        clocks["postprocess"].inc(record.postprocess_s)
        clocks["publish"].inc(record.publish_s)
        for part in _PARTS:
            clocks[part].inc(getattr(record.ranks, part))
        if record.slot_rows:
            self._add_rows(record.slot_rows, record.slot_experts)

    def rejected(self, reason: Rejection) -> None:
        self._rejections[reason].inc()

    def rank_failed(self, cause: FailureCause) -> None:
        self._failures[cause].inc()

    def recovered(self, pause_s: float) -> None:
        self._pauses.observe(pause_s)

    def rebalanced(self, moves: int) -> None:
        self._rebalances.inc()
        self._moves.inc(moves)

    def canary(self, ok: bool) -> None:
        self._canaries["ok" if ok else "failed"].inc()
        if ok:
            self._proved = self.clock()

    # HTTP's side.

    def timer(self, choices: int) -> RequestTimer:
        return RequestTimer(self, choices)

    def longest_wait_s(self) -> float:
        """How long the request has waited that has waited longest for its first token."""
        oldest = next(iter(list(self.unstarted)), None)
        return 0.0 if oldest is None else self.clock() - oldest.arrived

    def finished(self, reason: FinishReason) -> None:
        self._finished[reason].inc()

    def answered(self, route: str, status: int, record: Record) -> None:
        """An HTTP request is over. The route is a pattern, not what the caller wrote."""
        if route not in self._routes:
            self._routes.add(route)
            for usual in _STATUSES:
                self._answers.labels(route, str(usual))
        self._answers.labels(route, str(status)).inc()
        if record.error == KEY_LIMIT:  # HTTP's own; the engine tells the others
            self._rejections[KEY_LIMIT].inc()
        if record.error is not None or (status >= 400 and status != CLIENT_LEFT):
            self._errors.labels(self._few("code", record.error or f"status_{status}")).inc()
        if record.key is not None:
            key = self._few("key", record.key)
            self._key_requests.labels(key).inc()
            if status < 400:  # what is turned away is not used
                self._key_tokens.labels(key, "prompt").inc(record.prompt_tokens)
                self._key_tokens.labels(key, "generation").inc(record.completion_tokens)

    # Whoever looks.

    def text(self) -> bytes:
        """Prometheus's text format."""
        return generate_latest(self.registry)

    def collect(self) -> Iterator[Metric]:
        """Everything, each sample with the model and the replica it is of."""
        for member in self._members:
            yield from map(self._labelled, member.collect())
        yield self._labelled(self._expert_family())
        waits = "How long the request has waited that has waited longest for its first token."
        wait = GaugeMetricFamily("mixtral_longest_wait_seconds", waits, value=self.longest_wait_s())
        yield self._labelled(wait)
        if self._proved is not None:
            age = self.clock() - self._proved
            text = "Since a canary proved every slot and collective."
            yield self._labelled(GaugeMetricFamily("mixtral_canary_age_seconds", text, value=age))
        if self._engine is not None:
            yield from map(self._labelled, engine_metrics(self._engine))

    def _labelled(self, family: Metric) -> Metric:
        family.samples = [
            sample._replace(labels=self._common | sample.labels)
            for sample in family.samples
            if not sample.name.endswith("_created")  # the day a counter began is nothing that anybody draws
        ]
        return family

    def _expert_family(self) -> Metric:
        family = CounterMetricFamily(
            "mixtral_expert_tokens", "Rows that each expert has computed.", labels=("layer", "expert")
        )
        for layer, rows in enumerate(self._expert_tokens):
            for expert, count in sorted(rows.copy().items()):
                family.add_metric((str(layer), str(expert)), count)
        return family

    def _add_rows(self, slot_rows: Sequence[Sequence[int]], slot_experts: Sequence[Sequence[int]]) -> None:
        while len(self._expert_tokens) < len(slot_rows):
            self._expert_tokens.append({})
        for totals, layer_rows, experts in zip(self._expert_tokens, slot_rows, slot_experts, strict=True):
            for rows, expert in zip(layer_rows, experts, strict=True):
                totals[expert] = totals.get(expert, 0) + rows

    def _few(self, label: str, value: str) -> str:
        """The value, or "other" where its label has had too many."""
        known = self._bounded.setdefault(label, set())
        if value not in known:
            if len(known) >= MOST:
                return OTHER
            known.add(value)
        return value

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        counter = Counter(f"mixtral_{name}", text, labels, registry=None)
        self._members.append(counter)
        return counter

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        histogram = Histogram(f"mixtral_{name}", text, registry=None, buckets=buckets)
        self._members.append(histogram)
        return histogram


def _begin_at_zero(counter: Counter, values: Iterable[str]) -> dict[str, Counter]:
    """The series of each value."""
    return {value: counter.labels(value) for value in values}


class RequestTimer:
    """One engine request on its way: told of every event, it says how long what took."""

    def __init__(self, metrics: Metrics, choices: int) -> None:
        self._metrics = metrics
        self._unfinished = choices
        self.arrived = metrics.clock()
        self._first: float | None = None
        self._last: dict[int, float] = {}  # by choice: its last token

    def __enter__(self) -> RequestTimer:
        self._metrics.unstarted[self] = None
        return self

    def __exit__(self, *_: object) -> None:
        self._metrics.unstarted.pop(self, None)

    def whole(self) -> None:
        """The answer came in one piece: an embedding, or scores."""
        self._metrics.finished("stop")
        self._metrics.request.observe(self._metrics.clock() - self.arrived)

    def event(self, event: TokenEvent) -> None:
        metrics, now = self._metrics, self._metrics.clock()
        if event.waited_s is not None:
            metrics.queue.observe(event.waited_s)
        if event.token_ids:
            if self._first is None:
                self._first = now
                metrics.unstarted.pop(self, None)
                metrics.first_token.observe(now - self.arrived)
                if event.waited_s is not None:
                    metrics.prefill.observe(max(0.0, now - self.arrived - event.waited_s))
            if event.choice in self._last:
                metrics.between_tokens.observe(now - self._last[event.choice])
            self._last[event.choice] = now
        if event.finish_reason is not None:
            metrics.finished(event.finish_reason)
            self._unfinished -= 1
            if self._unfinished == 0 and self._first is not None:
                metrics.decode.observe(now - self._first)
                metrics.request.observe(now - self.arrived)
