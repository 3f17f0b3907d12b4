"""Batches: what a file may hold, what comes out, and that a kill neither repeats nor loses a line."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import EngineNotReady, QueueFull
from cluster.messages import TokenEvent
from deployments import batch
from deployments.batch import BatchStopped, run_batch
from deployments.batch_file import Output, read_body, read_entries
from deployments.cli import main
from deployments.settings import SettingsError
from tests.tiny import write_checkpoint
from tests.unit.fake_engine import MODEL, FakeEngine, app_for, failing

NAMES = [MODEL]


def request(custom_id: str, **changes: Any) -> dict[str, Any]:
    body = {"model": MODEL, "prompt": custom_id, "max_tokens": 5}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body} | changes


def write(path: Path, *requests: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in requests))
    return path


def read(path: Path) -> dict[str, Any]:
    answers = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({answer["custom_id"] for answer in answers}) == len(answers)
    return {answer["custom_id"]: answer for answer in answers}


async def run(engine: FakeEngine, source: Path, target: Path, at_once: int = 4) -> int:
    entries = read_entries(source, NAMES)
    with Output(target, entries) as output:
        return await run_batch(app_for(engine), engine, source, entries, output, at_once=at_once, quiet=True)


async def test_answers_and_errors_are_lines(tmp_path: Path) -> None:
    chat = {"model": MODEL, "messages": [{"role": "user", "content": "é"}]}
    source = write(
        tmp_path / "in.jsonl",
        request("a"),
        request("wrong", body={"model": MODEL, "prompt": "a", "temperature": 9}),
        request("chat", url="/v1/chat/completions", body=chat),
        request("numbers", url="/v1/embeddings", body={"model": MODEL, "input": "a"}),
    )
    assert await run(FakeEngine(), source, tmp_path / "out.jsonl") == 1
    answers = read(tmp_path / "out.jsonl")
    assert set(answers) == {"a", "wrong", "chat", "numbers"}
    assert answers["a"]["response"]["status_code"] == 200
    assert answers["a"]["response"]["body"]["choices"][0]["text"] == "one two three"
    assert answers["a"]["response"]["request_id"] == answers["a"]["response"]["body"]["id"]
    assert answers["a"]["error"] is None
    assert answers["wrong"]["response"]["status_code"] == 400
    assert answers["wrong"]["response"]["body"]["error"]["param"] == "temperature"
    assert answers["chat"]["response"]["body"]["object"] == "chat.completion"
    assert len({answer["id"] for answer in answers.values()}) == 4


async def test_as_many_run_at_once_as_may(tmp_path: Path) -> None:
    running = most = 0

    async def counted(request: Any) -> Any:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.001)
        running -= 1
        yield TokenEvent(request.request_id, (5,), text="x", finish_reason="stop")

    source = write(tmp_path / "in.jsonl", *(request(str(number)) for number in range(40)))
    assert await run(FakeEngine(counted), source, tmp_path / "out.jsonl", at_once=7) == 0
    assert most == 7
    assert len(read(tmp_path / "out.jsonl")) == 40


@pytest.mark.parametrize("torn", [b"", b'{"id": "batch_req_1", "custom_id": "2", "resp', b'{"custom_id": "2"}'])
async def test_a_run_goes_on_where_the_last_was_killed(torn: bytes, tmp_path: Path) -> None:
    """The end of a file that was being written: nothing, half a line, or a line without its newline."""
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write(source, *(request(str(number)) for number in range(4)))
    await run(FakeEngine(), source, target)
    whole = target.read_bytes().splitlines(keepends=True)
    target.write_bytes(b"".join(whole[:2]) + torn)
    engine = FakeEngine()
    await run(engine, source, target)
    assert len(engine.requests) == 2
    assert set(read(target)) == {"0", "1", "2", "3"}
    assert target.read_bytes().splitlines(keepends=True)[:2] == whole[:2]


async def test_what_the_engine_cannot_take_now_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "RETRY_S", 0.001)
    full = 2

    async def full_at_first(request: Any) -> Any:
        nonlocal full
        if full:
            full -= 1
            raise QueueFull("full", retry_after_s=1)
        yield TokenEvent(request.request_id, (5,), text="x", finish_reason="stop")

    source = write(tmp_path / "in.jsonl", request("a"), request("b"))
    assert await run(FakeEngine(full_at_first), source, tmp_path / "out.jsonl") == 0
    assert {answer["response"]["status_code"] for answer in read(tmp_path / "out.jsonl").values()} == {200}


async def test_an_engine_that_ends_is_no_answer(tmp_path: Path) -> None:
    engine = FakeEngine(failing(EngineNotReady("rank 0 is gone", retry_after_s=1)))
    engine.healthy = False
    source = write(tmp_path / "in.jsonl", request("a"))
    with pytest.raises(BatchStopped, match="rank 0 is gone"):
        await run(engine, source, tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == ""


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "line 2 is not a JSON object"),
        (b"[]", "line 2 is not a JSON object"),
        (b"\xff", "line 2 is not a JSON object"),
        (json.dumps(request("a")).encode(), "line 2: custom_id 'a' is that of line 1 as well"),
        (json.dumps(request("")).encode(), "custom_id must be a text"),
        (json.dumps(request("b", method="GET")).encode(), "method must be POST"),
        (json.dumps(request("b", url="/v1/files")).encode(), "url one of /v1/chat/completions"),
        (json.dumps(request("b", body=[])).encode(), "body must be an object"),
        (json.dumps(request("b", body={"stream": True})).encode(), "stream is not possible in a batch"),
        (json.dumps(request("b", body={"model": "gpt-4"})).encode(), "no model 'gpt-4' here, only fake; --set"),
    ],
)
def test_a_file_that_cannot_be_answered(line: bytes, message: str, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(json.dumps(request("a")).encode() + b"\n" + line)
    with pytest.raises(SettingsError, match=message):
        read_entries(source, NAMES)


def test_a_body_is_read_from_its_place(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(json.dumps(request("é")).encode() + b"\n\n" + json.dumps(request("b")).encode())
    entries = read_entries(source, NAMES)
    assert [read_body(source, entry)["prompt"] for entry in entries] == ["é", "b"]


def test_an_output_is_of_one_input_and_one_run(tmp_path: Path) -> None:
    entries = read_entries(write(tmp_path / "in.jsonl", request("a")), NAMES)
    other = write(tmp_path / "other.jsonl", {"custom_id": "b"})
    with pytest.raises(SettingsError, match="line 1: 'b' is no answer to this input"):
        Output(other, entries)
    assert other.read_text() == '{"custom_id": "b"}\n'
    twice = write(tmp_path / "twice.jsonl", {"custom_id": "a"}, {"custom_id": "a"})
    with pytest.raises(SettingsError, match="line 2: 'a' is no answer"):
        Output(twice, entries)
    with Output(tmp_path / "out.jsonl", entries), pytest.raises(SettingsError, match="written by another batch"):
        Output(tmp_path / "out.jsonl", entries)
    with pytest.raises(SettingsError, match="cannot be written"):
        Output(tmp_path, entries)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a real engine, in this process; then again, with nothing left to do."""
    model = write_checkpoint(tmp_path / "tiny")
    body = {"model": "tiny", "prompt": "the quick", "max_tokens": 4, "temperature": 0}
    source = write(tmp_path / "in.jsonl", *(request(str(number), body=body) for number in range(5)))
    arguments = ["batch", str(source), str(tmp_path / "out.jsonl"), "--model", str(model), "--quiet"]
    assert main([*arguments, "--set", "kv_cache.memory=1048576"]) == 0
    assert capsys.readouterr().out == "5 requests answered, 0 of them with an error; 0 were answered before.\n"
    answers = read(tmp_path / "out.jsonl")
    assert len({answer["response"]["body"]["choices"][0]["text"] for answer in answers.values()}) == 1
    assert main(arguments) == 0
    assert capsys.readouterr().out == "0 requests answered, 0 of them with an error; 5 were answered before.\n"
    assert main(["batch", "/nowhere.jsonl", str(tmp_path / "no.jsonl"), "--model", str(model)]) == 2
    assert "/nowhere.jsonl cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "no.jsonl").exists()
