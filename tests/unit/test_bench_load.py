"""Load on our own HTTP application with a scripted engine behind it, and on servers that answer badly."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from cluster.errors import QueueFull
from cluster.messages import Request, TokenEvent
from deployments import bench_load
from deployments.bench_load import Workload, connected, put_load
from deployments.bench_report import Measurements
from deployments.settings import SettingsError
from tests.unit.fake_engine import MODEL, FakeEngine, Script, app_for, failing, one_then_silence, spelling
from tests.unit.http_rig import on_a_port

FEW = Workload(3, range(5, 9), range(4, 5), requests=7, duration_s=None, seed=0)
USAGE = {"choices": [], "usage": {"completion_tokens": 1}}
TEXT = {"choices": [{"text": "a"}]}


async def measure(url: str, workload: Workload) -> Measurements:
    async with connected(url, None, None, workload) as target:
        measured = Measurements()
        await put_load(target, workload, measured, asyncio.Event())
        return measured


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_load, "AFTER_ERROR_S", 0.0)


async def test_every_request_is_asked_once_and_measured() -> None:
    engine = FakeEngine(spelling("abc"))
    with on_a_port(app_for(engine)) as url:
        measured = await measure(url, FEW)
    lengths = [len(request.prompt_ids) for request in engine.requests]
    assert len(lengths) == measured.finished == 7
    assert set(lengths) <= set(FEW.prompt_tokens)
    assert measured.prompt_tokens == sum(lengths)
    assert measured.output_tokens == 7 * 4, "the end of sequence is a token too"
    assert measured.errors == {}
    report = measured.report()
    counts = [report[f"{name}_s"]["count"] for name in ("first_token", "between_tokens", "whole_answer")]
    assert counts == [7, 7 * 3, 7]
    for request in engine.requests:
        assert request.prompt_ids[0] == 1, "as every text begins"
        assert request.sampling.ignore_eos
        assert request.sampling.max_tokens == 4


async def test_a_seed_fixes_what_is_asked() -> None:
    asked = []
    for seed in (5, 5, 6):
        engine = FakeEngine(spelling("a"))
        with on_a_port(app_for(engine)) as url:
            await measure(url, replace(FEW, seed=seed))
        asked.append({request.prompt_ids for request in engine.requests})
    assert asked[0] == asked[1] != asked[2]
    assert len(asked[0]) == 7, "no prompt twice: the prefix cache would answer"


async def test_so_many_at_once_and_no_more() -> None:
    running = most = 0

    async def script(request: Request) -> AsyncIterator[TokenEvent]:
        nonlocal running, most
        running += 1
        most = max(most, running)
        while most < FEW.streams:
            await asyncio.sleep(0)
        yield TokenEvent(request.request_id, (65,), text="a", finish_reason="length")
        running -= 1

    with on_a_port(app_for(FakeEngine(script))) as url:
        assert (await measure(url, FEW)).finished == 7
    assert most == FEW.streams


async def test_when_the_time_is_over_streams_are_cut_off() -> None:
    engine = FakeEngine(one_then_silence)
    with on_a_port(app_for(engine)) as url:
        measured = await measure(url, replace(FEW, requests=None, duration_s=0.3))
    assert measured.report()["requests"] == {"finished": 0, "failed": 0, "cut_off": 3}
    assert measured.output_tokens == 3
    assert len(engine.aborted) == 3, "nothing computes for a client that has gone"


@pytest.mark.parametrize(
    ("script", "error"),
    [
        (failing(QueueFull("full", retry_after_s=1)), "429 queue_full"),
        (failing(ZeroDivisionError(), after=1), "in a stream: internal_error"),
    ],
    ids=["refused", "failed"],
)
async def test_errors_of_the_server_are_counted_and_no_reason_to_stop(script: Script, error: str) -> None:
    with on_a_port(app_for(FakeEngine(script))) as url:
        measured = await measure(url, FEW)
    assert measured.errors == {error: 7}
    assert measured.finished == 0


class Other:
    """Some server: it lists a model and tokenizes, but answers as it was told."""

    def __init__(
        self, answer: bytes, status: int = 200, models: Any = None, missing: int = 0, *, slowly: bool = False
    ) -> None:
        listed = [{"id": "m", "max_model_len": 100}] if models is None else models
        self._missing = missing  # bytes that were promised and do not come
        self._slowly = slowly  # in pieces, as from far away
        self._answers = {
            "/v1/models": (200, json.dumps({"data": listed}).encode()),
            "/tokenize": (200, b'{"tokens": [1, 2, 3]}'),
            "/v1/completions": (status, answer),
        }

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        status, body = self._answers[scope["path"]]
        missing = self._missing if scope["path"] == "/v1/completions" else 0
        headers = [(b"content-length", str(len(body) + missing).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        for first in range(0, len(body), 20) if self._slowly else ():
            await send({"type": "http.response.body", "body": body[first : first + 20], "more_body": True})
            await asyncio.sleep(0.005)
        await send({"type": "http.response.body", "body": b"" if self._slowly else body})


def stream(*chunks: Any, done: bool = True) -> bytes:
    events = [b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks]
    return b": waiting\n\n" + b"".join(events) + b"data: [DONE]\n\n" * done


@pytest.mark.parametrize(
    ("other", "error"),
    [
        (Other(stream(TEXT, done=False)), "a stream was cut off"),
        (Other(stream(TEXT), missing=10), None),  # all that matters has come
        (Other(stream(TEXT, done=False), missing=10), "ClientPayloadError"),
        (Other(stream(TEXT)), "a stream without usage"),
        (Other(b"data: {\n\n"), "an answer that is none of ours"),
        (Other(b"data: []\n\n"), "an answer that is none of ours"),
        (Other(b"data: " + b"[" * 100_000 + b"\n\n"), "an answer that is none of ours"),
        (Other(b"data: " + b"x" * 1_000_000 + b"\n\n"), "an answer that is none of ours"),
        (Other(b"<html>", status=502), "502 without a code"),
        (Other(b'{"error": {"code": "queue_full"}}', status=429), "429 queue_full"),
        (Other(b'{"error": {"code": "queue_full"}}', status=429, slowly=True), "429 queue_full"),
        (Other(stream(TEXT, {"choices": [], "usage": {"completion_tokens": [1]}})), "an answer that is none of ours"),
    ],
)
async def test_whatever_comes_back_has_a_name(other: Other, error: str | None) -> None:
    if error is None:
        other._answers["/v1/completions"] = (200, stream(TEXT, USAGE))
    with on_a_port(other) as url:
        measured = await measure(url, replace(FEW, requests=2, streams=1))
    assert measured.errors == ({} if error is None else {error: 2})
    assert measured.finished == (2 if error is None else 0)
    assert measured.report()["requests"]["cut_off"] == 0


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ([], "does not answer as mixtral-serve does"),
        ([{"id": "m"}], "does not answer as mixtral-serve does"),
        (7, "does not answer as mixtral-serve does"),
        ([{"id": "m", "max_model_len": float("inf")}], "does not answer as mixtral-serve does"),
        ([{"id": "m", "max_model_len": 11}], "come to 12 tokens and m takes 11; lower --prompt-tokens or"),
    ],
)
async def test_a_server_that_cannot_be_measured_is_refused_in_a_sentence(models: Any, message: str) -> None:
    with on_a_port(Other(b"", models=models)) as url, pytest.raises(SettingsError, match=message) as refused:
        await measure(url, FEW)
    assert "\n" not in str(refused.value)


async def test_a_model_that_is_not_served_is_refused_with_those_that_are() -> None:
    with on_a_port(app_for(FakeEngine())) as url:
        refused = connected(url, None, "gpt", FEW)
        with pytest.raises(SettingsError, match=f"--model gpt: {url} serves {MODEL}, other/alias"):
            await refused.__aenter__()


async def test_who_has_no_key_is_told_so() -> None:
    app = app_for(FakeEngine(spelling("a")), {"auth": {"api_keys_env": "KEYS"}}, {"KEYS": "secret"})
    with on_a_port(app) as url:
        with pytest.raises(SettingsError, match=r"v1/models says 401 \w+"):
            await measure(url, FEW)
        async with connected(url, "secret", None, FEW) as target:
            measured = Measurements()
            await put_load(target, FEW, measured, asyncio.Event())
    assert measured.finished == 7
