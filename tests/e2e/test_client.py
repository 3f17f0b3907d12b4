"""The official client against a running server: what its users do, together and all at once."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel, Field

from tests.e2e.server import Server, eventually

ASK: list[Any] = [{"role": "user", "content": "a router looks at"}]


class Weather(BaseModel):
    """What the weather is."""

    city: Literal["Paris", "Rome"]
    days: int = Field(ge=1, le=9)


# Random weights like every kind of white space equally well, and JSON may have any amount of it between its values.
NO_LINES = {str(3 + byte): -100 for byte in b"\t\r\n"}  # <0x09>, <0x0A>, <0x0D>
TOOL = openai.pydantic_function_tool(Weather)


def test_choices_with_their_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=ASK, n=3, seed=1, max_tokens=6, logprobs=True, top_logprobs=2
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    for choice in answer.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content
        assert all(len(token.top_logprobs) == 2 for token in choice.logprobs.content)
    assert answer.system_fingerprint is not None
    assert answer.system_fingerprint.startswith("fp_")


def test_an_answer_parsed_into_a_type(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="tiny", messages=ASK, response_format=Weather, logit_bias=NO_LINES, seed=3, max_tokens=200
    )
    assert isinstance(answer.choices[0].message.parsed, Weather)


def test_a_call_streamed_and_answered(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model="tiny",
        messages=ASK,
        tools=[TOOL],
        tool_choice="required",
        parallel_tool_calls=False,
        logit_bias=NO_LINES,
        seed=3,
    ) as stream:
        for _ in stream:
            pass
        message = stream.get_final_completion().choices[0].message
    assert message.tool_calls
    [call] = message.tool_calls
    assert isinstance(call.function.parsed_arguments, Weather)
    history: list[Any] = [*ASK, message, {"role": "tool", "tool_call_id": call.id, "content": "rain"}]
    answer = client.chat.completions.create(model="tiny", messages=history, tools=[TOOL], max_tokens=4)
    assert answer.choices[0].finish_reason in ("stop", "length", "tool_calls")


def test_routing_comes_with_each_token(client: openai.OpenAI) -> None:
    """The experts of a token are the same in a stream, in a document, and with other tokens beside it."""
    options: dict[str, Any] = {"model": "tiny", "prompt": "a router looks", "temperature": 0, "max_tokens": 6}
    asked = options | {"extra_body": {"return_routing": True, "return_token_ids": True, "ignore_eos": True}}
    whole: Any = client.completions.create(**asked).choices[0]
    assert len(whole.routing) == len(whole.token_ids) == 6
    for layers in whole.routing:
        assert len(layers) == 2
        for chosen in layers:
            assert [one["expert"] for one in chosen] == list(dict.fromkeys(one["expert"] for one in chosen))
            assert len(chosen) == 2
            assert chosen[0]["weight"] >= chosen[1]["weight"] > 0
            assert sum(one["weight"] for one in chosen) == pytest.approx(1, abs=2e-4)
    chunks: list[Any] = [chunk.choices[0] for chunk in client.completions.create(**asked, stream=True)]
    assert [routing for chunk in chunks for routing in chunk.routing] == whole.routing
    assert all(len(chunk.routing) == len(chunk.token_ids) for chunk in chunks)
    together: Any = client.completions.create(**asked | {"n": 2, "prompt": ["a router looks", "pages of"]})
    assert [choice.routing for choice in together.choices[:2]] == [whole.routing] * 2


def test_embeddings(client: openai.OpenAI) -> None:
    one, two = client.embeddings.create(model="tiny", input=["the quick", "the quick"]).data
    assert one.embedding == pytest.approx(two.embedding, abs=1e-6)
    with pytest.raises(openai.BadRequestError, match="dimensions"):
        client.embeddings.create(model="tiny", input="a", dimensions=2)


def test_errors_are_typed(client: openai.OpenAI) -> None:
    for fields in ({"n": 17}, {"logit_bias": {"999999": 1}}, {"extra_body": {"structured_outputs": {"regex": "("}}}):
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model="tiny", messages=ASK, **fields)  # type: ignore[arg-type]
    with pytest.raises(openai.BadRequestError, match="generates text"):
        client.post("/../classify", body={"model": "tiny", "input": "a"}, cast_to=object)


async def test_many_at_once_are_each_alone(server: Server) -> None:
    prompts = [f"{word} {number}" for word in ("tokens", "pages", "wizards") for number in range(8)]
    options: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 12}
    async with openai.AsyncOpenAI(api_key="none", base_url=f"{server.url}/v1", max_retries=0, timeout=120) as client:

        async def streamed(prompt: str) -> str:
            stream = await client.completions.create(prompt=prompt, stream=True, **options)
            return "".join([chunk.choices[0].text async for chunk in stream])

        together = await asyncio.gather(*map(streamed, prompts))
        alone = [(await client.completions.create(prompt=prompt, **options)).choices[0].text for prompt in prompts[:6]]
    assert together[:6] == alone


def test_the_log_of_the_server_is_json(access_log: Path, client: openai.OpenAI) -> None:
    """Only requests are in it, and it is where the settings said."""
    name = f"seen-{time.time_ns()}"
    fields: Any = {"request_id": name, "ignore_eos": True}
    client.completions.create(model="tiny", prompt="the quick", max_tokens=2, extra_body=fields)
    eventually(lambda: name in access_log.read_text(), "the request is logged")  # which is once it is over
    lines = [json.loads(line) for line in access_log.read_text().splitlines()]
    [line] = [line for line in lines if line["id"] == f"cmpl-{name}"]
    assert (line["status"], line["completion_tokens"], line["finish_reason"]) == (200, 2, "length")
    assert not any(line["route"] in ("/health", "/ready") for line in lines)
