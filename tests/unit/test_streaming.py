"""Streams on the wire: their exact bytes, what they say when something fails, and who stops when a client leaves."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from cluster.errors import EngineDraining, EngineNotReady, QueueFull, RequestInvalid, StepFailed
from cluster.messages import TokenEvent
from tests.unit.fake_engine import MODEL, FakeEngine, app_for, failing, http, one_then_silence, silence

BODY: dict[str, Any] = {"model": MODEL, "prompt": "a", "stream": True}
CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "a"}], "stream": True}


async def stream(engine: FakeEngine, body: dict[str, Any] | None = None, **options: Any) -> tuple[int, list[str]]:
    async with http(engine, **options) as client:
        response = await client.post("/v1/completions", json=body or BODY)
    assert response.text.endswith("\n\n") or response.status_code != 200
    return response.status_code, response.text.removesuffix("\n\n").split("\n\n")


async def test_the_bytes_of_a_chat_stream() -> None:
    async with http(FakeEngine()) as client:
        response = await client.post("/v1/chat/completions", json=CHAT | {"stream_options": {"include_usage": True}})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert "content-length" not in response.headers
    *lines, done = response.text.removesuffix("\n\n").split("\n\n")
    assert done == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
    frame = {"id": chunks[0]["id"], "object": "chat.completion.chunk", "created": chunks[0]["created"], "model": MODEL}
    frame |= {"system_fingerprint": "fp_fake"}

    def chunk(delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return frame | {"choices": [choice], "usage": None}

    assert chunks[:-1] == [
        chunk({"role": "assistant", "content": ""}),
        chunk({"content": "one"}),
        chunk({"content": " two"}),
        chunk({"content": " three"}),
        chunk({}, "stop"),
    ]
    prompt = len("<user>a<assistant>") + 1
    assert chunks[-1] == frame | {
        "choices": [],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": 3,
            "total_tokens": prompt + 3,
            "prompt_tokens_details": {"cached_tokens": 1},
        },
    }


async def test_streamed_is_whole() -> None:
    _, lines = await stream(FakeEngine())
    texts = [json.loads(line.removeprefix("data: "))["choices"][0]["text"] for line in lines[:-1]]
    async with http(FakeEngine()) as client:
        whole = (await client.post("/v1/completions", json=BODY | {"stream": False})).json()
    assert "".join(texts) == whole["choices"][0]["text"]


async def test_an_event_without_text_is_no_chunk() -> None:
    async def held_back(request: Any) -> Any:
        yield TokenEvent(request.request_id, (10,))
        yield TokenEvent(request.request_id, (11,), text="é", finish_reason="length")

    _, lines = await stream(FakeEngine(held_back))
    assert len(lines) == 2
    assert "é" in lines[0]


@pytest.mark.parametrize(
    ("error", "status", "retry_after"),
    [
        (QueueFull("the queue is full", retry_after_s=3), 429, "10"),
        (EngineNotReady("a rank is gone", retry_after_s=0.1), 503, "1"),
        (EngineDraining("shutting down", retry_after_s=10), 503, "10"),
        (RequestInvalid("too long"), 400, None),
        (StepFailed("rank 1 died"), 500, None),
        (RuntimeError("a secret of ours"), 500, None),
    ],
)
@pytest.mark.parametrize("streamed", [True, False])
async def test_an_early_failure_has_a_status_of_its_own(
    error: Exception, status: int, retry_after: str | None, streamed: bool
) -> None:
    async with http(FakeEngine(failing(error))) as client:
        response = await client.post("/v1/completions", json=BODY | {"stream": streamed})
    assert response.status_code == status
    assert response.headers.get("retry-after") == retry_after
    assert "secret" not in response.text
    assert response.json()["error"]["message"]


@pytest.mark.parametrize("error", [StepFailed("rank 1 died during a step"), RuntimeError("a secret of ours")])
async def test_a_late_failure_is_said_in_the_stream(error: Exception) -> None:
    status, lines = await stream(FakeEngine(failing(error, after=2)))
    assert status == 200
    assert "one" in lines[0]
    last = json.loads(lines[-1].removeprefix("data: "))
    assert last["error"]["type"] == "server_error"
    assert ("rank 1 died" in lines[-1]) is isinstance(error, StepFailed)
    assert "secret" not in lines[-1]


@pytest.mark.parametrize(("reason", "status"), [("error", 500), ("abort", 503)])
async def test_an_answer_the_engine_ends_is_an_error(reason: Any, status: int) -> None:
    async def ended(request: Any) -> Any:
        yield TokenEvent(request.request_id, (), finish_reason=reason, error="the ranks are gone")

    for streamed in (True, False):
        async with http(FakeEngine(ended)) as client:
            response = await client.post("/v1/completions", json=BODY | {"stream": streamed})
        assert response.status_code == status


async def test_one_failure_ends_the_whole_request() -> None:
    async def second_fails(request: Any) -> Any:
        if request.request_id.endswith("-1"):
            raise QueueFull("full", retry_after_s=1)
        async for event in silence(request):
            yield event

    engine = FakeEngine(second_fails)
    async with http(engine) as client:
        response = await client.post("/v1/completions", json=BODY | {"prompt": ["a", "b", "c"], "stream": False})
    assert response.status_code == 429
    assert len(engine.aborted) == 2


async def test_silence_is_filled_with_comments() -> None:
    async def slow(request: Any) -> Any:
        await asyncio.sleep(0.05)
        yield TokenEvent(request.request_id, (10,), text="late", finish_reason="stop")

    status, lines = await stream(FakeEngine(slow), keep_alive_s=0.01)
    assert status == 200
    assert lines[0] == ": waiting"
    assert "late" in lines[-2]
    assert lines[-1] == "data: [DONE]"


async def test_a_deadline_before_the_first_token_is_a_504() -> None:
    engine = FakeEngine(silence)
    for streamed in (True, False):
        async with http(engine, {"limits": {"request_timeout_s": 0.02}}) as client:
            response = await client.post("/v1/completions", json=BODY | {"stream": streamed})
        assert response.status_code == 504
        assert "0.02 s" in response.json()["error"]["message"]
    assert len(engine.aborted) == 2


async def test_a_deadline_in_a_stream_is_said_in_it() -> None:
    engine = FakeEngine(one_then_silence)
    status, lines = await stream(engine, args={"limits": {"request_timeout_s": 0.02}})
    assert status == 200
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
    assert len(engine.aborted) == 1


@pytest.mark.parametrize("script", [silence, one_then_silence], ids=["before the first token", "after it"])
@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("how", ["disconnect", "cancel"])
async def test_a_client_that_leaves_ends_its_requests(script: Any, streamed: bool, how: str) -> None:
    """Servers say so either by a message or by cancelling the application; the engine hears of both."""
    engine = FakeEngine(script)
    body = json.dumps(BODY | {"stream": streamed, "prompt": ["a", "b"]}).encode()
    incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    incoming.put_nowait({"type": "http.request", "body": body, "more_body": False})
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }
    running = asyncio.create_task(app_for(engine)(scope, incoming.get, send))
    expected_chunks = 2 if streamed and script is one_then_silence else 0
    async with asyncio.timeout(5):
        while len(engine.requests) < 2 or sum(b"one" in message.get("body", b"") for message in sent) < expected_chunks:
            await asyncio.sleep(0)
        if how == "disconnect":
            incoming.put_nowait({"type": "http.disconnect"})
        else:
            running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    assert len(engine.aborted) == 2
    assert not any(b"[DONE]" in message.get("body", b"") for message in sent)
    assert len(asyncio.all_tasks()) == 1
