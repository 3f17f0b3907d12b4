"""Texts to numbers: embeddings, labels, answers found in a text; and which checkpoints answer what."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest

from cluster.errors import QueueFull, RequestInvalid, StepFailed
from cluster.messages import EncodeRequest
from deployments.scores import best_span, context_offsets, label_probabilities, softmax, unit_length
from tests.unit.fake_engine import MODEL, FakeDecoder, FakeEngine, http, openai


async def post(engine: FakeEngine, path: str, status: int = 200, **fields: Any) -> Any:
    async with http(engine) as client:
        response = await client.post(path, json={"model": MODEL} | fields)
    assert response.status_code == status, response.text
    return response.json()


async def test_embeddings() -> None:
    engine = FakeEngine()
    answer = await post(engine, "/v1/embeddings", input=["a", "bc"])
    assert [item["index"] for item in answer["data"]] == [0, 1]
    assert answer["data"][0]["object"] == "embedding"
    assert answer["data"][0]["embedding"] == pytest.approx([0.6, 0.8])
    assert answer["usage"] == {"prompt_tokens": 5, "total_tokens": 5}
    assert answer["model"] == MODEL
    assert [request.token_ids for request in engine.encoded] == [(1, 97), (1, 98, 99)]
    assert {request.pooling for request in engine.encoded} == {"last"}


async def test_the_official_client_reads_them() -> None:
    client = openai(FakeEngine())  # asks for base64 unless told otherwise
    answer = await client.embeddings.create(model=MODEL, input="a")
    assert answer.data[0].embedding == pytest.approx([0.6, 0.8])
    floats = await client.embeddings.create(model=MODEL, input=[[5, 6]], encoding_format="float")
    assert floats.data[0].embedding == pytest.approx([0.6, 0.8])


async def test_embeddings_as_the_model_gives_them() -> None:
    engine = FakeEngine()
    fields = {"normalize": False, "pooling": "mean", "priority": 2, "user": "me", "add_special_tokens": False}
    answer = await post(engine, "/v1/embeddings", input="a", **fields)
    assert answer["data"][0]["embedding"] == [3.0 * 97, 4.0 * 97]
    [request] = engine.encoded
    assert (request.pooling, request.priority, request.user, request.token_ids) == ("mean", 2, ":me", (97,))
    assert request.deadline_s is not None


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"input": "a", "dimensions": 4}, "dimensions", "not possible in this version; leave it out"),
        ({"input": "x" * 100}, "input", "101 tokens and this server takes 100."),
        ({"input": ["a", ""], "add_special_tokens": False}, "input", "no tokens"),
        ({"input": [1000]}, "input", "0 to 999"),
        ({"input": []}, "input", "1 to 1024"),
        ({}, "input", "required"),
        ({"input": "a", "pooling": "cls"}, "pooling", "'last' or 'mean'"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "'base64'"),
    ],
)
async def test_what_cannot_be_embedded(fields: dict[str, Any], param: str, message: str) -> None:
    error = (await post(FakeEngine(), "/v1/embeddings", 400, **fields))["error"]
    assert error["param"] == param
    assert message in error["message"]


async def test_all_of_the_length_is_there_for_a_text() -> None:
    await post(FakeEngine(), "/v1/embeddings", input="x" * 99)
    answer = await post(FakeEngine(), "/v1/embeddings", input="x" * 200, truncate_prompt_tokens=7)
    assert answer["usage"]["total_tokens"] == 7


def scores(*rows: list[float]) -> Any:
    async def script(request: EncodeRequest) -> list[list[float]]:
        return list(rows) if request.pooling == "all" else [rows[-1]]

    return script


async def test_classify() -> None:
    engine = FakeEngine(task="classify", labels=("bad", "good", "so-so"), rows=scores([0.0, math.log(3), 0.0]))
    answer = await post(engine, "/classify", input=["a", "b"])
    assert [item["index"] for item in answer["data"]] == [0, 1]
    item = answer["data"][0]
    assert (item["label"], item["num_classes"]) == ("good", 3)
    assert item["probs"] == pytest.approx([0.2, 0.6, 0.2])
    assert answer["object"] == "list"
    assert answer["usage"]["prompt_tokens"] == 4


async def test_token_classify() -> None:
    engine = FakeEngine(task="token_classify", labels=("O", "NAME"), rows=scores([5.0, 0.0], [0.0, 5.0]))
    answer = await post(engine, "/token_classify", input="b")
    tokens = answer["data"][0]["tokens"]
    assert [(token["id"], token["token"], token["label"]) for token in tokens] == [(1, chr(1), "O"), (98, "b", "NAME")]
    assert sum(tokens[0]["probs"]) == pytest.approx(1)
    assert engine.encoded[0].pooling == "all"


async def test_question_answering() -> None:
    question, context = "who", "so  ann, yes"
    flat = [[0.0, 0.0] for _ in "?who?so  ann, yes"]  # one token before each text
    flat[5 + 3][0] = 9.0  # the second space
    flat[5 + 6][1] = 9.0  # the second n
    engine = FakeEngine(task="question_answering", labels=("start", "end"), rows=scores(*flat))
    answer = await post(engine, "/question_answering", question=question, context=context)
    assert (answer["answer"], answer["start"], answer["end"]) == ("ann", 4, 7)
    assert 0.9 < answer["score"] < 1
    assert answer["usage"]["prompt_tokens"] == len(flat)
    assert context[answer["start"] : answer["end"]] == "ann"


async def test_a_context_that_does_not_fit() -> None:
    engine = FakeEngine(task="question_answering")
    answer = await post(engine, "/question_answering", 400, question="a", context="x" * 100)
    assert answer["error"]["param"] == "context"


@pytest.mark.parametrize(
    ("task", "path", "body", "hint"),
    [
        ("generate", "/classify", {"input": "a"}, "ask /v1/chat/completions, /v1/completions or /v1/embeddings"),
        ("generate", "/token_classify", {"input": "a"}, "generates text"),
        ("generate", "/question_answering", {"question": "a", "context": "b"}, "generates text"),
        ("classify", "/v1/embeddings", {"input": "a"}, "ask /classify"),
        ("token_classify", "/classify", {"input": "a"}, "ask /token_classify"),
        ("question_answering", "/token_classify", {"input": "a"}, "ask /question_answering"),
    ],
)
async def test_a_route_the_checkpoint_cannot_answer(task: Any, path: str, body: dict[str, Any], hint: str) -> None:
    answer = await post(FakeEngine(task=task), path, 400, **body)
    assert answer["error"]["code"] == "wrong_task"
    assert hint in answer["error"]["message"]


@pytest.mark.parametrize(
    ("error", "status"),
    [(QueueFull("full", 1), 429), (RequestInvalid("too long"), 400), (StepFailed("rank 0 died"), 500)],
)
async def test_one_failure_ends_all(error: Exception, status: int) -> None:
    async def failing(request: EncodeRequest) -> list[list[float]]:
        if request.request_id.endswith("-1"):
            raise error
        await asyncio.Event().wait()
        return []

    engine = FakeEngine(rows=failing)
    await post(engine, "/v1/embeddings", status, input=["a", "b", "c"])
    assert len(engine.aborted) == 2


async def test_a_deadline() -> None:
    async def never(request: EncodeRequest) -> list[list[float]]:
        await asyncio.Event().wait()
        return []

    async def told_late(request: EncodeRequest) -> list[list[float]]:
        try:
            await asyncio.Event().wait()
        finally:
            raise StepFailed("deadline")

    for rows in (never, told_late):
        async with http(FakeEngine(rows=rows), {"limits": {"request_timeout_s": 0.02}}) as client:
            response = await client.post("/v1/embeddings", json={"model": MODEL, "input": "a"})
        assert response.status_code == 504
        assert "0.02 s" in response.json()["error"]["message"]


async def test_a_thousand_inputs_do_not_fill_the_engine() -> None:
    running = most = 0

    async def counted(request: EncodeRequest) -> list[list[float]]:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        return [[1.0]]

    answer = await post(FakeEngine(rows=counted), "/v1/embeddings", input=["a"] * 500)
    assert len(answer["data"]) == 500
    assert most == 64


def test_probabilities() -> None:
    assert softmax([1000.0, 1000.0]) == [0.5, 0.5]
    assert label_probabilities([0.0]) == [0.5]
    assert label_probabilities([-1e9]) == pytest.approx([0.0])


def test_unit_length() -> None:
    assert unit_length([0.0, 0.0]) == [0.0, 0.0]
    assert unit_length([-2.0]) == [-1.0]


def test_an_answer_ends_behind_its_start_and_is_short() -> None:
    rows = [[9.0, 9.0], [0.0, 0.0], [0.0, 5.0], [8.0, 0.0]]
    offsets = [(0, 0), (0, 2), (2, 4), (4, 6)]
    assert best_span(rows, offsets, 4) == best_span(rows, offsets, 3)
    span = best_span(rows, offsets, 3)
    assert (span.start, span.end) == (0, 4)  # the first token has no text, so it alone is no answer
    assert (best_span(rows, offsets, 1).start, best_span(rows, offsets, 1).end) == (4, 6)


def test_a_context_without_text_has_no_answer() -> None:
    assert best_span([[1.0, 1.0]], [(0, 0)], 5).score == 0


def test_where_tokens_stand() -> None:
    assert context_offsets([1, 97, 98], FakeDecoder()) == [(0, 0), (0, 1), (1, 2)]


async def test_a_generating_checkpoint_that_is_served_to_embed() -> None:
    engine = FakeEngine()
    async with http(engine, {"task": "embed"}) as client:
        fields = {"model": MODEL, "input": "a"}
        assert (await client.post("/v1/embeddings", json=fields)).status_code == 200
        answer = await client.post("/v1/completions", json={"model": MODEL, "prompt": "a"})
    assert answer.status_code == 400
    assert "embeds: ask /v1/embeddings" in answer.json()["error"]["message"]
