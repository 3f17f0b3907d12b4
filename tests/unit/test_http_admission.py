"""Who has to wait: limits per key, when to come back, silence in an answer, and what the log says of all of them."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import QueueFull
from cluster.messages import TokenEvent
from deployments import access_log
from deployments.admission import Pace
from deployments.settings import SettingsError
from tests.unit.fake_engine import MODEL, FakeEngine, failing, http, one_then_silence, silence

BODY: dict[str, Any] = {"model": MODEL, "prompt": "secret words"}
ONE_EACH = {"auth": {"api_keys_env": "KEYS"}, "limits": {"max_concurrent_per_key": 1}}
KEYS = {"KEYS": "first,second"}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_who_is_sent_away_gets_the_next_free_place() -> None:
    clock = Clock()
    pace = Pace(clock)
    for _ in range(4):
        pace.finished()
        clock.now += 2
    assert [pace.retry_after_s() for _ in range(3)] == [2, 4, 6]
    clock.now += 4.5  # two of them are back; places come more slowly
    assert pace.retry_after_s() == pytest.approx(2 * 12.5 / 4)


def test_an_unknown_pace_is_a_guess_and_a_slow_one_has_an_end() -> None:
    clock = Clock()
    pace = Pace(clock)
    assert pace.retry_after_s() == 10
    pace.finished()
    clock.now += 59
    for _ in range(20):
        assert pace.retry_after_s() <= 600
    clock.now += 2
    assert pace.retry_after_s() == 10


async def test_a_full_queue_says_when_to_come_back() -> None:
    async with http(FakeEngine()) as client:
        for _ in range(3):
            assert (await client.post("/v1/completions", json=BODY)).status_code == 200
    engine = FakeEngine(failing(QueueFull("full", retry_after_s=1)))
    async with http(engine) as client:
        assert (await client.post("/v1/completions", json=BODY)).headers["retry-after"] == "10"


async def test_one_request_for_each_key() -> None:
    engine = FakeEngine(silence)
    async with http(engine, ONE_EACH, environment=KEYS) as client:
        running = asyncio.create_task(client.post("/v1/completions", json=BODY, headers=bearer("first")))
        while not engine.requests:
            await asyncio.sleep(0)
        second = await client.post("/v1/completions", json=BODY, headers=bearer("first"))
        assert second.status_code == 429
        assert second.json()["error"]["code"] == "key_limit"
        assert int(second.headers["retry-after"]) >= 1
        assert (await client.get("/v1/models", headers=bearer("first"))).status_code == 200
        assert (await client.post("/tokenize", json={"prompt": "a"}, headers=bearer("second"))).status_code == 200
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert (await client.post("/tokenize", json={"prompt": "a"}, headers=bearer("first"))).status_code == 200


async def test_an_answer_that_falls_silent_ends() -> None:
    engine = FakeEngine(one_then_silence)
    async with http(engine, {"limits": {"idle_timeout_s": 0.02}}) as client:
        whole = await client.post("/v1/completions", json=BODY)
        stream = await client.post("/v1/completions", json=BODY | {"stream": True})
    assert whole.status_code == 504
    assert whole.json()["error"]["code"] == "idle_timeout"
    assert stream.status_code == 200
    assert "idle_timeout" in stream.text
    assert "[DONE]" not in stream.text
    assert len(engine.aborted) == 2


async def test_silence_before_the_first_token_is_waiting() -> None:
    limits = {"limits": {"idle_timeout_s": 0.01, "request_timeout_s": 0.1}}
    async with http(FakeEngine(silence), limits, keep_alive_s=0.005) as client:
        response = await client.post("/v1/completions", json=BODY)
    assert response.json()["error"]["code"] == "deadline_exceeded"


async def test_silence_of_one_that_waits_while_others_are_done() -> None:
    async def only_the_first(request: Any) -> Any:
        if not request.request_id.endswith("-0"):
            await asyncio.Event().wait()
        yield TokenEvent(request.request_id, (10,), text="one")
        yield TokenEvent(request.request_id, (11,), finish_reason="stop")

    limits = {"limits": {"idle_timeout_s": 0.01, "request_timeout_s": 0.1}}
    async with http(FakeEngine(only_the_first), limits, keep_alive_s=0.005) as client:
        response = await client.post("/v1/completions", json=BODY | {"prompt": ["a", "b"]})
    assert response.json()["error"]["code"] == "deadline_exceeded"


async def test_silence_while_the_engine_recovers_is_no_silence() -> None:
    engine = FakeEngine(one_then_silence)
    engine.ready = False
    limits = {"limits": {"idle_timeout_s": 0.01, "request_timeout_s": 0.1}}
    async with http(engine, limits) as client:
        response = await client.post("/v1/completions", json=BODY)
    assert response.json()["error"]["code"] == "deadline_exceeded"


async def lines(caplog: pytest.LogCaptureFixture, engine: FakeEngine, *requests: Any, **options: Any) -> list[Any]:
    with caplog.at_level(logging.INFO, "mixtral.access"):
        async with http(engine, **options) as client:
            for method, path, body in requests:
                await client.request(method, path, json=body, headers=bearer("first"))
    return [json.loads(record.getMessage()) for record in caplog.records if record.name == "mixtral.access"]


async def test_the_log_says_who_and_how_much_but_not_what(caplog: pytest.LogCaptureFixture) -> None:
    [line] = await lines(
        caplog,
        FakeEngine(),
        ("POST", "/v1/completions", BODY | {"n": 1, "request_id": "mine", "stream": True}),
        args={"auth": {"api_keys_env": "KEYS"}},
        environment=KEYS,
    )
    assert line["id"] == "cmpl-mine"
    assert (line["key"], line["method"], line["route"], line["status"]) == ("env-1", "POST", "/v1/completions", 200)
    assert (line["prompt_tokens"], line["completion_tokens"], line["cached_tokens"]) == (13, 3, 1)
    assert line["finish_reason"] == "stop"
    assert line["complete"] is True
    assert 0 <= line["first_token_s"] <= line["seconds"]
    assert "secret" not in caplog.text
    assert "first" not in line.values()


async def test_what_is_refused_is_logged_and_probes_are_not(caplog: pytest.LogCaptureFixture) -> None:
    logged = await lines(
        caplog,
        FakeEngine(),
        ("GET", "/health", None),
        ("GET", "/ready", None),
        ("GET", "/nothing", None),
        ("POST", "/v1/embeddings", {"model": MODEL, "input": "ab"}),
    )
    assert [(line["route"], line["status"], line["prompt_tokens"]) for line in logged] == [
        ("/nothing", 404, 0),
        ("/v1/embeddings", 200, 3),
    ]


async def test_a_failure_within_a_stream_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    [line] = await lines(
        caplog,
        FakeEngine(one_then_silence),
        ("POST", "/v1/completions", BODY | {"stream": True}),
        args={"limits": {"request_timeout_s": 0.02}},
    )
    assert (line["status"], line["error"], line["finish_reason"]) == (200, "deadline_exceeded", None)


async def test_where_the_log_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "access.jsonl"
    try:
        for where in (str(file), "stdout", None):
            access_log.keep(where)
            access_log.logger.info("a line for %s", where)
        with pytest.raises(SettingsError, match="access_log: /nowhere/x cannot be written"):
            access_log.keep("/nowhere/x")
    finally:
        for handler in access_log.logger.handlers:
            handler.close()
        access_log.logger.handlers.clear()
        access_log.logger.propagate = True
    assert file.read_text() == f"a line for {file}\n"
    assert capsys.readouterr().out == "a line for stdout\n"
