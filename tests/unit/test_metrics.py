"""What is counted, under which names, and that a label cannot grow without end."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.messages import EngineStats, StepTimes, TokenEvent
from cluster.observer import StepRecord
from deployments.access_log import CLIENT_LEFT, Record
from deployments.api import create_app
from deployments.live import Live
from deployments.metrics import MOST, Metrics
from deployments.settings import load
from tests.unit.fake_engine import MODEL, FakeEngine, failing, http, resolved, spelling

STATS = EngineStats(1, 2, 30, 4, steps=5, prompt_tokens=6, generated_tokens=7, preemptions=0)
STEP = StepRecord(
    prompt_tokens=3,
    decode_tokens=2,
    sequences=3,
    exchange="all_reduce",
    schedule_s=0.25,
    step_s=1.5,
    postprocess_s=0.5,
    publish_s=0.125,
    ranks=StepTimes(build=1.0, exchange=2.0),
    stats=STATS,
)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def read(text: str) -> dict[str, float]:
    """name{label=value,...} -> value; the labels that every sample has are checked and left out."""
    values = {}
    for family in text_string_to_metric_families(text):
        for name, labels, value, *_ in family.samples:
            assert labels.pop("model") == MODEL
            assert labels.pop("replica")
            shown = ",".join(f"{label}={labels[label]}" for label in sorted(labels))
            values[f"{name}{{{shown}}}" if shown else name] = value
    return values


def seen(metrics: Metrics, metric: str = "") -> dict[str, float]:
    """All of it; or what one metric counts, by its labels."""
    values = read(metrics.text().decode())
    return {name.removeprefix(metric): value for name, value in values.items() if name.startswith(metric)}


def test_the_names_that_users_of_other_servers_know() -> None:
    metrics = Metrics(MODEL, "r")
    metrics.watch(FakeEngine())
    names = {name.partition("{")[0] for name in seen(metrics)}
    seconds = ("time_to_first_token", "inter_token_latency", "e2e_request_latency", "request_queue_time")
    seconds += ("request_prefill_time", "request_decode_time")
    known = {f"mixtral_{name}_seconds_bucket" for name in seconds} | {
        f"mixtral_{name}"
        for name in (
            "prompt_tokens_total", "generation_tokens_total", "request_success_total", "num_requests_running",
            "num_requests_waiting", "kv_cache_usage_perc", "prefix_cache_queries_total", "prefix_cache_hits_total",
            "num_preemptions_total", "iteration_tokens_bucket",
        )
    }  # fmt: skip
    assert known <= names
    assert all(name.startswith("mixtral_") for name in names)
    assert not any(name.endswith("_created") for name in names)


def test_a_step() -> None:
    metrics = Metrics(MODEL, "r")
    metrics.step(STEP)
    metrics.step(replace(STEP, graph=True))
    metrics.step(replace(STEP, graph=False))
    values = seen(metrics)
    assert values["mixtral_iteration_tokens_sum"] == 15
    assert values["mixtral_step_duration_seconds_sum"] == 4.5
    spent = {part: seconds for part, seconds in seen(metrics, "mixtral_step_seconds_total").items() if seconds}
    assert spent == {
        "{part=schedule}": 0.75,
        "{part=build}": 3.0,
        "{part=exchange}": 6.0,
        "{part=postprocess}": 1.5,
        "{part=publish}": 0.375,
    }
    exchanges = {"{exchange=none}": 0, "{exchange=all_to_all}": 0, "{exchange=all_reduce}": 3}
    assert seen(metrics, "mixtral_steps_by_exchange_total") == exchanges
    graphs = {"{outcome=hit}": 1, "{outcome=miss}": 1}  # the step of a rank without graphs is neither
    assert seen(metrics, "mixtral_graph_steps_total") == graphs


def test_rows_of_a_slot_are_those_of_the_expert_that_sits_in_it_now() -> None:
    metrics = Metrics(MODEL, "r")
    one = StepRecord(1, 0, 1, "none", 0, 0, 0, 0, StepTimes(), STATS, ((5, 1, 2), (0, 0, 7)), ((0, 1, 0), (1, 0, 2)))
    moved = StepRecord(1, 0, 1, "none", 0, 0, 0, 0, StepTimes(), STATS, ((1, 1, 1), (0, 0, 0)), ((2, 1, 0), (1, 0, 2)))
    metrics.step(one)
    metrics.step(moved)
    assert seen(metrics, "mixtral_expert_tokens_total") == {
        "{expert=0,layer=0}": 8,
        "{expert=1,layer=0}": 2,
        "{expert=2,layer=0}": 1,
        "{expert=0,layer=1}": 0,
        "{expert=1,layer=1}": 0,
        "{expert=2,layer=1}": 7,
    }


def test_failures_recoveries_and_proofs() -> None:
    clock = Clock()
    metrics = Metrics(MODEL, "r", clock)
    assert seen(metrics)["mixtral_rank_failures_total{cause=frozen}"] == 0, "what begins at 1 is not seen to rise"
    assert "mixtral_canary_age_seconds" not in seen(metrics)
    metrics.rank_failed("frozen")
    metrics.recovered(2.5)
    metrics.rebalanced(3)
    metrics.canary(ok=True)
    clock.now += 7
    metrics.canary(ok=False)
    values = seen(metrics)
    assert values["mixtral_rank_failures_total{cause=frozen}"] == 1
    assert values["mixtral_recovery_pause_seconds_sum"] == 2.5
    assert (values["mixtral_rebalances_total"], values["mixtral_expert_moves_total"]) == (1, 3)
    assert values["mixtral_canary_age_seconds"] == 7
    assert values["mixtral_canaries_total{outcome=failed}"] == 1


def test_who_is_turned_away_is_counted_by_why() -> None:
    metrics = Metrics(MODEL, "r")
    before = seen(metrics, "mixtral_requests_rejected_total")
    assert set(before.values()) == {0}, "what begins at 1 is not seen to rise"
    metrics.rejected("queue_full")
    metrics.answered("/v1/completions", 429, Record(error="queue_full"))  # the same one, as HTTP saw it
    metrics.answered("/v1/completions", 429, Record(error="key_limit", key="a"))
    after = seen(metrics, "mixtral_requests_rejected_total")
    assert after == before | {"{reason=queue_full}": 1, "{reason=key_limit}": 1}


def test_a_request_on_its_way() -> None:
    clock = Clock()
    metrics = Metrics(MODEL, "r", clock)
    with metrics.timer(choices=2) as timer:
        clock.now = 103
        assert metrics.longest_wait_s() == 3
        timer.event(TokenEvent("a", (7,), choice=0, waited_s=1.0))
        assert metrics.longest_wait_s() == 0
        clock.now = 104
        timer.event(TokenEvent("a", (7,), choice=1))
        clock.now = 106
        timer.event(TokenEvent("a", (7,), choice=0, finish_reason="stop"))
        clock.now = 109
        timer.event(TokenEvent("a", (), choice=1, finish_reason="length"))
    values = seen(metrics)
    seconds = {name: value for name, value in values.items() if name.endswith("_seconds_sum") and value}
    assert seconds == {
        "mixtral_time_to_first_token_seconds_sum": 3,
        "mixtral_request_queue_time_seconds_sum": 1,
        "mixtral_request_prefill_time_seconds_sum": 2,
        "mixtral_inter_token_latency_seconds_sum": 3,
        "mixtral_request_decode_time_seconds_sum": 6,
        "mixtral_e2e_request_latency_seconds_sum": 9,
    }
    assert values["mixtral_request_success_total{finished_reason=stop}"] == 1
    assert values["mixtral_request_success_total{finished_reason=length}"] == 1


def test_a_request_that_is_given_up_waits_no_longer() -> None:
    clock = Clock()
    metrics = Metrics(MODEL, "r", clock)
    with contextlib.suppress(TimeoutError), metrics.timer(1):
        clock.now += 50
        raise TimeoutError
    assert metrics.longest_wait_s() == 0
    assert seen(metrics)["mixtral_e2e_request_latency_seconds_count"] == 0


def test_who_left_was_told_nothing() -> None:
    metrics = Metrics(MODEL, "r")
    metrics.answered("/v1/completions", CLIENT_LEFT, Record())
    values = seen(metrics)
    assert values["mixtral_http_requests_total{route=/v1/completions,status=499}"] == 1
    assert set(seen(metrics, "mixtral_http_errors_total").values()) == {0}


def test_a_burst_of_failures_is_seen_to_rise() -> None:
    """All of them between two looks of Prometheus's, and none before."""
    metrics = Metrics(MODEL, "r")
    metrics.answered("/v1/completions", 200, Record())
    before = seen(metrics, "mixtral_http_")
    for _ in range(190):
        metrics.answered("/v1/completions", 503, Record(error="not_ready"))
    after = seen(metrics, "mixtral_http_")
    assert {name: value - before[name] for name, value in after.items() if value != before[name]} == {
        "requests_total{route=/v1/completions,status=503}": 190,
        "errors_total{code=not_ready}": 190,
    }


def test_names_from_outside_are_bounded() -> None:
    metrics = Metrics(MODEL, "r")
    for number in range(MOST + 50):
        metrics.answered("/v1/completions", 200, Record(key=f"key-{number}", prompt_tokens=2, completion_tokens=1))
        metrics.answered("/v1/completions", 400, Record(error=f"code-{number}"))
    values = seen(metrics)
    assert sum(name.startswith("mixtral_key_requests_total") for name in values) == MOST + 1
    assert sum(name.startswith("mixtral_http_errors_total") for name in values) == MOST + 1
    assert values["mixtral_key_tokens_total{key=other,kind=prompt}"] == 100


async def test_over_http() -> None:
    engine = FakeEngine(spelling("one"))
    body = {"model": MODEL, "prompt": "a"}
    async with http(engine) as client:
        await client.post("/v1/completions", json=body)
        await client.post("/v1/completions", json=body | {"stream": True})
        await client.post("/v1/completions", json=body | {"temperature": -1})
        await client.get("/v1/models/whatever/the/caller/likes")
        await client.get("/or/where/she/likes")
        answer = await client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    values = read(answer.text)
    assert values["mixtral_http_requests_total{route=/v1/completions,status=200}"] == 2
    assert values["mixtral_http_requests_total{route=/v1/completions,status=400}"] == 1
    assert values["mixtral_http_requests_total{route=/v1/models/{name:path},status=404}"] == 1
    assert values["mixtral_http_requests_total{route=none,status=404}"] == 1
    assert values["mixtral_http_errors_total{code=model_not_found}"] == 1
    assert values["mixtral_request_success_total{finished_reason=stop}"] == 2
    assert values["mixtral_time_to_first_token_seconds_count"] == 2
    assert values["mixtral_inter_token_latency_seconds_count"] == 2 * len("one")
    assert values["mixtral_num_requests_waiting"] == 2
    assert values["mixtral_rank_up{rank=0}"] == 1
    assert values["mixtral_rank_info{device=cpu,node=node,rank=0}"] == 1
    assert values["mixtral_expert_location{expert=1,layer=0,rank=1}"] == 1
    assert values["mixtral_expert_imbalance_ratio{layer=0}"] == 1.25


async def test_an_embedding_is_an_answer_too() -> None:
    async with http(FakeEngine()) as client:
        await client.post("/v1/embeddings", json={"model": MODEL, "input": ["a", "b"]})
        values = read((await client.get("/metrics")).text)
    assert values["mixtral_request_success_total{finished_reason=stop}"] == 2
    assert values["mixtral_e2e_request_latency_seconds_count"] == 2
    assert values["mixtral_time_to_first_token_seconds_count"] == 0
    assert values["mixtral_longest_wait_seconds"] == 0


async def test_an_error_in_a_stream_is_counted() -> None:
    async with http(FakeEngine(failing(ZeroDivisionError(), after=1))) as client:
        await client.post("/v1/completions", json={"model": MODEL, "prompt": "a", "stream": True})
        values = read((await client.get("/metrics")).text)
    assert values["mixtral_http_requests_total{route=/v1/completions,status=200}"] == 1
    assert values["mixtral_http_errors_total{code=internal_error}"] == 1


async def test_our_own_mistakes_are_counted_as_such() -> None:
    async with http(FakeEngine(failing(ZeroDivisionError()))) as client:
        answer = await client.post("/v1/completions", json={"model": MODEL, "prompt": "a"})
        values = read((await client.get("/metrics")).text)
    assert answer.status_code == 500
    assert values["mixtral_http_requests_total{route=/v1/completions,status=500}"] == 1
    assert values["mixtral_http_errors_total{code=internal_error}"] == 1


@pytest.mark.parametrize(("open_metrics", "status"), [(False, 401), (True, 200)])
async def test_whether_a_key_is_needed_is_a_setting(open_metrics: bool, status: int) -> None:
    auth = {"auth": {"api_keys_env": "KEYS", "open_metrics": open_metrics}}
    async with http(FakeEngine(), auth, environment={"KEYS": "secret"}) as client:
        assert (await client.get("/metrics")).status_code == status
        allowed = await client.get("/metrics", headers={"Authorization": "Bearer secret"})
        assert (await client.get("/v1/models")).status_code == 401
    assert allowed.status_code == 200
    assert "secret" not in allowed.text


async def test_metrics_open_and_close_while_serving() -> None:
    live = Live(load({"auth": {"api_keys_env": "KEYS"}}), {"KEYS": "secret"})
    transport = httpx.ASGITransport(create_app(FakeEngine(), resolved(load({})), live))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        assert (await client.get("/metrics")).status_code == 401
        live.apply({"auth": {"open_metrics": True}})
        assert (await client.get("/metrics")).status_code == 200
        live.apply(None)
        assert (await client.get("/metrics")).status_code == 401


async def test_usage_of_a_key_goes_by_its_name() -> None:
    auth = {"auth": {"api_keys_env": "KEYS"}}
    async with http(FakeEngine(spelling("one")), auth, environment={"KEYS": "a,secret"}) as client:
        client.headers["Authorization"] = "Bearer secret"
        await client.post("/v1/completions", json={"model": MODEL, "prompt": "ab"})
        await client.post("/v1/completions", json={"model": MODEL, "prompt": "ab", "n": 1000})
        values = read((await client.get("/metrics")).text)
    assert values["mixtral_key_requests_total{key=env-2}"] == 2
    assert values["mixtral_key_tokens_total{key=env-2,kind=prompt}"] == 3
    assert values["mixtral_key_tokens_total{key=env-2,kind=generation}"] == 4
