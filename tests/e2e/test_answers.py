"""Relations between answers of a real model: streamed = whole, alone = together, and constraints that hold."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.e2e.in_process import application, streamed

pytestmark = pytest.mark.asyncio(loop_scope="module")

CASES = 200 if os.environ.get("MIXTRAL_TEST_ALL") else 20

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"enum": ["Paris", "Rome"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3}},
    "required": ["ok", "tags"],
    "additionalProperties": False,
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def http(checkpoint: Path) -> AsyncIterator[httpx.AsyncClient]:
    async with application(checkpoint) as client:
        yield client


async def complete(http: httpx.AsyncClient, **fields: Any) -> Any:
    body = {"model": "tiny", "prompt": "a router looks", "max_tokens": 12} | fields
    response = await http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


async def chat(http: httpx.AsyncClient, **fields: Any) -> Any:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "tokens"}], "max_tokens": 12, "seed": 3} | fields
    response = await http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json() if not fields.get("stream") else streamed(response.text)


def merged(chunks: list[Any], field: str, n: int) -> list[Any]:
    """Per choice: its text, how it ended, and its tokens' log-probabilities, as a client puts them together."""
    texts, reasons, tokens = [""] * n, [None] * n, [[] for _ in range(n)]  # type: ignore[var-annotated]
    for chunk in chunks:
        for choice in chunk["choices"]:
            index = choice["index"]
            assert reasons[index] is None, "something came after the end of a choice"
            texts[index] += choice["text"] if field == "text" else choice["delta"].get("content", "")
            reasons[index] = choice["finish_reason"]
            logprobs = choice["logprobs"] or {}
            tokens[index] += logprobs.get("tokens", []) or [one["token"] for one in logprobs.get("content", [])]
    return list(zip(texts, reasons, tokens, strict=True))


options = st.fixed_dictionaries(
    {"seed": st.integers(0, 1000), "max_tokens": st.integers(1, 24)},
    optional={
        "temperature": st.sampled_from([0, 0.7, 1.5]),
        "top_p": st.sampled_from([0.3, 0.9]),
        "top_k": st.integers(1, 50),
        "n": st.integers(1, 3),
        "stop": st.lists(st.sampled_from(["e", "th", " the", "\n", "ex"]), min_size=1, max_size=2),
        "include_stop_str_in_output": st.booleans(),
        "presence_penalty": st.sampled_from([-1.5, 1.0]),
        "frequency_penalty": st.sampled_from([-1.0, 1.5]),
        "repetition_penalty": st.sampled_from([0.8, 1.4]),
        "min_tokens": st.just(1),
        "ignore_eos": st.booleans(),
        "skip_special_tokens": st.booleans(),
        "logit_bias": st.dictionaries(st.sampled_from(["20", "40", "60"]), st.sampled_from([-100, 5]), max_size=2),
        "return_token_ids": st.booleans(),
    },
)


@settings(max_examples=CASES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fields=options, prompt=st.sampled_from(["the quick brown", "pages of", "你好"]), logprobs=st.booleans())
async def test_streamed_is_whole(http: httpx.AsyncClient, fields: dict[str, Any], prompt: str, logprobs: bool) -> None:
    n = fields.get("n", 1)
    with_logprobs: Any = {"logprobs": 1} if logprobs else {}
    whole = await complete(http, prompt=prompt, **fields, **with_logprobs)
    body = {"model": "tiny", "prompt": prompt, "stream": True} | fields | with_logprobs
    chunks = streamed((await http.post("/v1/completions", json=body)).text)
    expected = [
        (choice["text"], choice["finish_reason"], (choice["logprobs"] or {}).get("tokens", []))
        for choice in whole["choices"]
    ]
    assert merged(chunks, "text", n) == expected

    with_logprobs = {"logprobs": True} if logprobs else {}
    whole = await chat(http, **fields, **with_logprobs)
    chunks = await chat(http, stream=True, **fields, **with_logprobs)
    expected = [
        (
            choice["message"]["content"],
            choice["finish_reason"],
            [one["token"] for one in (choice["logprobs"] or {}).get("content", [])],
        )
        for choice in whole["choices"]
    ]
    assert merged(chunks, "content", n) == expected


async def test_choices_are_answers_of_neighbouring_seeds(http: httpx.AsyncClient) -> None:
    together = await complete(http, seed=5, n=3)
    alone = [await complete(http, seed=5 + index) for index in range(3)]
    assert [choice["text"] for choice in together["choices"]] == [one["choices"][0]["text"] for one in alone]


async def test_echo_is_prompt_and_answer(http: httpx.AsyncClient) -> None:
    plain = await complete(http, temperature=0)
    echoed = await complete(http, temperature=0, echo=True)
    assert echoed["choices"][0]["text"] == "a router looks" + plain["choices"][0]["text"]


async def test_logprobs_are_probabilities_in_their_places(http: httpx.AsyncClient) -> None:
    answer = await complete(http, temperature=0, logprobs=5, echo=True, return_token_ids=True)
    [choice] = answer["choices"]
    logprobs = choice["logprobs"]
    ids = choice["prompt_token_ids"] + choice["token_ids"]
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == len(ids)
    assert logprobs["token_logprobs"][0] is None
    for token, logprob, top in list(zip(*(logprobs[name] for name in ("tokens", "token_logprobs", "top_logprobs")),
                                        strict=True))[1:]:  # fmt: skip
        assert top[token] == logprob <= 0
        assert sum(map(math.exp, top.values())) <= 1 + 1e-5
    generated = len(choice["token_ids"])
    for token, top in list(zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True))[-generated:]:
        assert max(top, key=top.get) == token  # greedy
    for token, offset in zip(logprobs["tokens"][1:], logprobs["text_offset"][1:], strict=True):
        if "�" not in token and token != "</s>":
            assert choice["text"][offset:].startswith(token.lstrip()) or choice["text"][offset:].startswith(token)


async def test_prompt_logprobs_do_not_depend_on_the_cache(http: httpx.AsyncClient) -> None:
    fields = {"prompt": "five boxing wizards watch the lazy dog", "prompt_logprobs": 2, "temperature": 0}
    first, second = [await complete(http, **fields) for _ in range(2)]
    assert first["choices"][0]["prompt_logprobs"] == second["choices"][0]["prompt_logprobs"]
    assert first["choices"][0]["prompt_logprobs"][0] is None


async def test_bans_and_biases(http: httpx.AsyncClient) -> None:
    free = (await complete(http, temperature=0, return_token_ids=True))["choices"][0]["token_ids"]
    banned = {str(free[0]): -100}
    biased = await complete(http, temperature=0, return_token_ids=True, logit_bias=banned)
    assert biased["choices"][0]["token_ids"][0] != free[0]
    allowed = await complete(http, return_token_ids=True, allowed_token_ids=[20, 30], ignore_eos=True)
    assert set(allowed["choices"][0]["token_ids"]) <= {20, 30}
    text = (await complete(http, temperature=0, max_tokens=24))["choices"][0]["text"]
    word = max(re.findall(r"[a-z]+", text), key=len)
    without = await complete(http, temperature=0, max_tokens=24, bad_words=[word])
    assert without["choices"][0]["text"] != text


@pytest.mark.parametrize("temperature", [0, 1.3])
async def test_answers_follow_what_was_asked(http: httpx.AsyncClient, temperature: float) -> None:
    common = {"temperature": temperature, "max_tokens": 200, "n": 3}
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA, "strict": True}}
    for choice in (await chat(http, response_format=form, **common))["choices"]:
        value = json.loads(choice["message"]["content"])
        assert value.keys() == {"ok", "tags"}
        assert isinstance(value["ok"], bool)
        assert set(value["tags"]) <= {"a", "b"}
    for choice in (await chat(http, structured_outputs={"choice": ["yes", "no"]}, **common))["choices"]:
        assert choice["message"]["content"] in ("yes", "no")
    for choice in (await complete(http, structured_outputs={"regex": "[0-9]{3}-x"}, **common))["choices"]:
        assert re.fullmatch("[0-9]{3}-x", choice["text"])
    for choice in (await chat(http, response_format={"type": "json_object"}, **common | {"max_tokens": 60}))["choices"]:
        assert choice["message"]["content"].lstrip().startswith("{")


async def test_a_form_that_makes_no_sense_is_a_400(http: httpx.AsyncClient) -> None:
    for outputs in ({"regex": "("}, {"grammar": "start: nothing"}, {"json": {"type": "nothing"}}):
        body = {"model": "tiny", "prompt": "a", "structured_outputs": outputs, "stream": True}
        response = await http.post("/v1/completions", json=body)
        assert response.status_code == 400, outputs


async def test_a_forced_call_is_a_call(http: httpx.AsyncClient) -> None:
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        fields = {"tools": [WEATHER], "tool_choice": choice, "max_tokens": 150, "parallel_tool_calls": False}
        whole = await chat(http, **fields)
        message = whole["choices"][0]["message"]
        [call] = message["tool_calls"]
        arguments = json.loads(call["function"]["arguments"])
        assert call["function"]["name"] == "weather"
        assert arguments["city"] in ("Paris", "Rome")
        assert 1 <= arguments["days"] <= 9
        deltas = [
            delta
            for chunk in await chat(http, stream=True, **fields)
            for delta in chunk["choices"][0]["delta"].get("tool_calls", [])
        ]
        assert "".join(delta["function"]["arguments"] for delta in deltas) == call["function"]["arguments"]
        result = {"role": "tool", "tool_call_id": call["id"], "content": "rain"}
        again = await chat(http, messages=[{"role": "user", "content": "weather?"}, message, result], tools=[WEATHER])
        assert again["choices"][0]["finish_reason"] in ("stop", "length")


async def test_special_tokens_are_shown_on_request_only(http: httpx.AsyncClient) -> None:
    fields = {"allowed_token_ids": [1], "max_tokens": 2, "ignore_eos": True}
    assert (await complete(http, **fields))["choices"][0]["text"] == ""
    assert (await complete(http, skip_special_tokens=False, **fields))["choices"][0]["text"] == "<s><s>"


async def test_embeddings_together_are_embeddings_alone(http: httpx.AsyncClient) -> None:
    texts = ["the quick brown fox", "pages", "a router looks at every token and chooses"]
    for pooling in ("last", "mean"):
        fields = {"model": "tiny", "pooling": pooling}
        together = (await http.post("/v1/embeddings", json=fields | {"input": texts})).json()["data"]
        for text, found in zip(texts, together, strict=True):
            alone = (await http.post("/v1/embeddings", json=fields | {"input": text})).json()["data"][0]
            assert found["embedding"] == pytest.approx(alone["embedding"], abs=1e-5)
            assert math.hypot(*found["embedding"]) == pytest.approx(1)
