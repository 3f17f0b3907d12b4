"""What the fields of a generation request become: the engine's request, and the shape of the answer."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cluster.messages import Grammar
from tests.unit.fake_engine import MODEL, FakeEngine, http, openai, spelling

SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "string"}}}


async def complete(engine: FakeEngine, **fields: Any) -> Any:
    async with http(engine) as client:
        response = await client.post("/v1/completions", json={"model": MODEL, "prompt": "ab"} | fields)
    assert response.status_code == 200, response.text
    return response.json() if not fields.get("stream") else response.text


async def chat(engine: FakeEngine, **fields: Any) -> Any:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "a"}]} | fields
    async with http(engine) as client:
        response = await client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json() if not fields.get("stream") else response.text


def chunks(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.removesuffix("\n\n").split("\n\n")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


async def test_every_sampling_field_reaches_the_engine() -> None:
    engine = FakeEngine(spelling("x"))
    await complete(
        engine,
        min_tokens=2,
        presence_penalty=0.5,
        frequency_penalty=-1,
        repetition_penalty=1.1,
        logit_bias={"7": -100, "8": 2.5},
        allowed_token_ids=[5, 6, 5],
        bad_words=["xy"],
        include_stop_str_in_output=True,
        skip_special_tokens=False,
        logprobs=3,
        prompt_logprobs=2,
        n=2,
        echo=True,
        priority=-4,
        user="me",
        cache_salt="salt",
    )
    request = engine.requests[0]
    sampling = request.sampling
    assert (sampling.min_tokens, sampling.presence_penalty, sampling.frequency_penalty) == (2, 0.5, -1)
    assert sampling.repetition_penalty == 1.1
    assert sampling.logit_bias == ((7, -100), (8, 2.5))
    assert sampling.allowed_token_ids == (5, 6)
    assert sampling.bad_words == ((ord("x"), ord("y")), (ord(" "), ord("x"), ord("y")))
    assert (sampling.include_stop_str_in_output, sampling.skip_special_tokens) == (True, False)
    assert (sampling.logprobs, sampling.prompt_logprobs) == (3, 2)
    assert (request.n, request.echo, request.priority, request.cache_salt) == (2, True, -4, "salt")
    assert request.user == ":me"
    assert request.deadline_s is not None


async def test_nothing_is_asked_of_the_engine_by_default() -> None:
    engine = FakeEngine()
    await complete(engine)
    await chat(engine)
    for request in engine.requests:
        sampling = request.sampling
        assert (request.n, request.echo, request.priority, request.cache_salt) == (1, False, 0, "")
        assert (sampling.logprobs, sampling.prompt_logprobs, sampling.grammar) == (None, None, None)
        assert (sampling.bad_words, sampling.logit_bias, sampling.allowed_token_ids) == ((), (), None)
        assert sampling.skip_special_tokens


async def test_whose_request_it_is_is_the_keys_name_and_the_user() -> None:
    engine = FakeEngine()
    args = {"auth": {"api_keys_env": "KEYS"}}
    async with http(engine, args, environment={"KEYS": "first,second"}) as client:
        headers = {"Authorization": "Bearer second"}
        await client.post("/v1/completions", json={"model": MODEL, "prompt": "a", "user": "me"}, headers=headers)
    assert engine.requests[0].user == "env-2:me"


async def test_choices_end_on_their_own() -> None:
    engine = FakeEngine(spelling("a", "bcd", "ef"))
    answer = await complete(engine, prompt=["x", "y"], n=3)
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [
        (0, "a"), (1, "bcd"), (2, "ef"), (3, "a"), (4, "bcd"), (5, "ef")
    ]  # fmt: skip
    assert answer["usage"]["prompt_tokens"] == 4
    assert answer["usage"]["completion_tokens"] == 2 * (2 + 4 + 3)


async def test_choices_stream_side_by_side() -> None:
    stream = chunks(await chat(FakeEngine(spelling("a", "bcd")), n=2, stream=True))
    texts = ["", ""]
    ended = []
    for chunk in stream:
        [choice] = chunk["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
        ended += [choice["index"]] if choice["finish_reason"] == "stop" else []
    assert texts == ["a", "bcd"]
    assert ended == [0, 1]
    assert [chunk["choices"][0]["delta"] for chunk in stream[:2]] == [{"role": "assistant", "content": ""}] * 2


async def test_a_limit_on_choices_is_the_operators() -> None:
    async with http(FakeEngine(), {"limits": {"max_n": 2}}) as client:
        response = await client.post("/v1/completions", json={"model": MODEL, "prompt": "a", "n": 3})
    assert response.status_code == 400
    assert "at most 2 here" in response.json()["error"]["message"]


async def test_token_ids() -> None:
    whole = await complete(FakeEngine(spelling("xy")), return_token_ids=True)
    assert whole["choices"][0]["prompt_token_ids"] == [1, 97, 98]
    assert whole["choices"][0]["token_ids"] == [120, 121, 2]
    conversation = await chat(FakeEngine(spelling("xy")), return_token_ids=True)
    assert conversation["prompt_token_ids"][0] == 1
    assert conversation["choices"][0]["token_ids"] == [120, 121, 2]
    stream = chunks(await chat(FakeEngine(spelling("xy")), return_token_ids=True, stream=True))
    assert stream[1]["prompt_token_ids"] == conversation["prompt_token_ids"]
    assert [token for chunk in stream for token in chunk["choices"][0].get("token_ids", [])] == [120, 121, 2]


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"truncate_prompt_tokens": 3}, "xxx"),
        ({"truncate_prompt_tokens": 1000, "prompt": "abc"}, "abc"),
        ({"truncate_prompt_tokens": -1, "max_tokens": 90}, "x" * 10),
        ({"truncate_prompt_tokens": -1, "max_tokens": 500}, "x"),
    ],
)
async def test_the_end_of_a_long_prompt(fields: dict[str, Any], kept: str) -> None:
    engine = FakeEngine()
    await complete(engine, **{"prompt": "x" * 200, "add_special_tokens": False} | fields)
    request = engine.requests[0]
    assert FakeEngine().tokenizer.decode(request.prompt_ids) == kept
    assert len(request.prompt_ids) + request.sampling.max_tokens <= 100


@pytest.mark.parametrize(
    ("fields", "grammar"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Grammar("json_object", "")),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "s", "schema": SCHEMA, "strict": True},
                }
            },
            Grammar("json_schema", '{"type":"object","properties":{"b":{"type":"integer"},"a":{"type":"string"}}}'),
        ),
        (
            {"structured_outputs": {"json": json.dumps(SCHEMA)}},
            Grammar("json_schema", '{"type":"object","properties":{"b":{"type":"integer"},"a":{"type":"string"}}}'),
        ),
        ({"structured_outputs": {"json": {"const": "é"}}}, Grammar("json_schema", '{"const":"é"}')),
        ({"structured_outputs": {"regex": "a+"}}, Grammar("regex", "a+")),
        ({"structured_outputs": {"choice": ["a", "é"]}}, Grammar("choice", '["a","é"]')),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, Grammar("lark", 'start: "a"')),
        ({"structured_outputs": {"json_object": True, "regex": None}}, Grammar("json_object", "")),
    ],
)
async def test_what_an_answer_must_look_like(fields: dict[str, Any], grammar: Grammar | None) -> None:
    engine = FakeEngine()
    await chat(engine, **fields)
    await complete(engine, **fields)
    assert [request.sampling.grammar for request in engine.requests] == [grammar, grammar]


async def test_the_client_parses_into_a_schema() -> None:
    """What the openai package sends for a pydantic type, and reads back."""
    from pydantic import BaseModel

    class City(BaseModel):
        name: str
        people: int | None = None

    engine = FakeEngine(spelling('{"name": "Paris", "people": 2}'))
    answer = await openai(engine).chat.completions.parse(
        model=MODEL, messages=[{"role": "user", "content": "a"}], response_format=City
    )
    assert answer.choices[0].message.parsed == City(name="Paris", people=2)
    grammar = engine.requests[0].sampling.grammar
    assert grammar is not None
    assert json.loads(grammar.text)["title"] == "City"


async def test_a_stop_text_is_named() -> None:
    from cluster.messages import TokenEvent

    async def stopped(request: Any) -> Any:
        yield TokenEvent(request.request_id, (10,), text="a", finish_reason="stop", stop_reason="END")

    answer = await complete(FakeEngine(stopped))
    assert answer["choices"][0]["stop_reason"] == "END"
    stream = chunks(await chat(FakeEngine(stopped), stream=True))
    assert [chunk["choices"][0].get("stop_reason") for chunk in stream] == [None, None, "END"]


async def test_the_fingerprint_is_in_every_answer() -> None:
    assert (await complete(FakeEngine()))["system_fingerprint"] == "fp_fake"
    assert {chunk["system_fingerprint"] for chunk in chunks(await chat(FakeEngine(), stream=True))} == {"fp_fake"}


async def test_a_classifier_generates_nothing() -> None:
    async with http(FakeEngine(task="classify")) as client:
        for path, prompt in (("/v1/completions", {"prompt": "a"}), ("/v1/chat/completions", {"messages": [
            {"role": "user", "content": "a"}]})):  # fmt: skip
            response = await client.post(path, json={"model": MODEL} | prompt)
            assert response.status_code == 400
            assert "ask /classify" in response.json()["error"]["message"]
