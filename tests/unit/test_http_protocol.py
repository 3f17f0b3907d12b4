"""Request bodies: honoured, accepted at a neutral value, or refused by name. Never ignored, never a 422 or a 500."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest
from fastapi import Request
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsBase as CompletionParams
from openai.types.embedding_create_params import EmbeddingCreateParams as EmbeddingParams

from deployments.body import read_json
from deployments.body_fields import Body, parse
from deployments.chat_protocol import ChatRequest
from deployments.errors import ApiError
from deployments.field_table import markdown
from deployments.pooling_protocol import EmbeddingRequest
from deployments.protocol import CompletionRequest, GenerationRequest
from tests.unit.fake_engine import MODEL, FakeEngine, http

COMPLETION: dict[str, Any] = {"model": MODEL, "prompt": "a"}
CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "a"}]}
ROUTES = [("/v1/completions", COMPLETION, CompletionRequest), ("/v1/chat/completions", CHAT, ChatRequest)]


async def post(path: str, body: object) -> tuple[int, Any]:
    async with http(FakeEngine()) as client:
        response = await client.post(path, json=body)
    return response.status_code, response.json()


@pytest.mark.parametrize(
    ("official", "ours"),
    [(CompletionParams, CompletionRequest), (ChatParams, ChatRequest), (EmbeddingParams, EmbeddingRequest)],
    ids=["completions", "chat", "embeddings"],
)
def test_every_official_field_is_known(official: Any, ours: type[Body]) -> None:
    names = set(official.__annotations__) | ({"stream"} if issubclass(ours, GenerationRequest) else set())
    assert names <= set(ours.model_fields) | set(ours.neutral)
    assert not set(ours.model_fields) & set(ours.neutral)


def test_the_table_in_the_documentation_is_current() -> None:
    assert markdown() in Path("docs/openai.md").read_text(), "put there what python -m deployments.field_table prints"


@pytest.mark.parametrize(("path", "body", "kind"), ROUTES, ids=["completions", "chat"])
async def test_neutral_values_are_accepted(path: str, body: dict[str, Any], kind: type[GenerationRequest]) -> None:
    neutral = {name: values[0] for name, values in kind.neutral.items() if values}
    nothing_to_do = {"metadata": {"a": "b"}, "prompt_cache_key": "k", "safety_identifier": "s"}
    assert (await post(path, body | neutral | nothing_to_do))[0] == 200
    optional = {name: None for name, field in kind.model_fields.items() if not field.is_required()}
    assert (await post(path, dict.fromkeys(kind.neutral) | optional | body))[0] == 200


@pytest.mark.parametrize(("path", "body", "kind"), ROUTES, ids=["completions", "chat"])
async def test_any_other_value_is_refused_by_name(
    path: str, body: dict[str, Any], kind: type[GenerationRequest]
) -> None:
    async with http(FakeEngine()) as client:
        for name in kind.neutral:
            response = await client.post(path, json=body | {name: ["something else"]})
            assert response.status_code == 400, name
            error = response.json()["error"]
            assert error["param"] == name
            assert error["message"].startswith(f"{name}: ")


@pytest.mark.parametrize(
    ("path", "fields", "param", "message"),
    [
        ("/v1/completions", {"n": 17}, "n", "at most 16 here, limits.max_n of this server, not 17"),
        ("/v1/completions", {"n": 0}, "n", "greater than or equal to 1"),
        ("/v1/completions", {"n": 2, "prompt": ["a"] * 600}, "n", "more than 1024 choices"),
        ("/v1/completions", {"best_of": 2}, "best_of", "use 1"),
        ("/v1/completions", {"best_of": True}, "best_of", "use 1"),
        ("/v1/completions", {"suffix": "x"}, "suffix", 'use ""'),
        ("/v1/completions", {"echo": 0}, "echo", "valid boolean"),
        ("/v1/completions", {"n": True}, "n", "valid integer"),
        ("/v1/completions", {"logprobs": 21}, "logprobs", "less than or equal to 20"),
        ("/v1/completions", {"logprobs": True}, "logprobs", "valid integer"),
        (
            "/v1/completions",
            {"prompt_logprobs": 1, "stream": True},
            "prompt_logprobs",
            "prompt_logprobs is only possible without",
        ),
        ("/v1/completions", {"presence_penalty": 2.1}, "presence_penalty", "less than or equal to 2"),
        ("/v1/completions", {"frequency_penalty": -2.1}, "frequency_penalty", "greater than or equal to -2"),
        ("/v1/completions", {"repetition_penalty": 0}, "repetition_penalty", "greater than 0"),
        ("/v1/completions", {"logit_bias": {"a": 1}}, "logit_bias.a", "pattern"),
        ("/v1/completions", {"logit_bias": {"1": 101}}, "logit_bias.1", "less than or equal to 100"),
        ("/v1/completions", {"logit_bias": {"1000": 1}}, "logit_bias", "0 to 999"),
        ("/v1/completions", {"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", "at most 1024"),
        ("/v1/completions", {"allowed_token_ids": []}, "allowed_token_ids", "at least 1"),
        ("/v1/completions", {"allowed_token_ids": [1000]}, "allowed_token_ids", "0 to 999"),
        ("/v1/completions", {"min_tokens": 17}, "min_tokens", "17 is more than the 16 tokens"),
        ("/v1/completions", {"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "must be -1, or 1 or more"),
        ("/v1/completions", {"return_routing": 1}, "return_routing", "valid boolean"),
        ("/v1/completions", {"structured_outputs": {}}, "structured_outputs", "exactly one of json"),
        ("/v1/completions", {"structured_outputs": {"json": "{"}}, "structured_outputs.json", "not JSON"),
        ("/v1/completions", {"structured_outputs": {"choice": []}}, "structured_outputs.choice", "at least 1"),
        (
            "/v1/completions",
            {"structured_outputs": {"regex": "a", "choice": ["b"]}},
            "structured_outputs",
            "exactly one of json",
        ),
        (
            "/v1/completions",
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "",
            "either response_format or structured_outputs",
        ),
        ("/v1/chat/completions", {"response_format": {"type": "json_schema"}}, "response_format", "is required with"),
        ("/v1/chat/completions", {"response_format": "text"}, "response_format", "a valid dictionary, not 'text'."),
        (
            "/v1/chat/completions",
            {"response_format": {"type": "text", "json_schema": {"name": "a", "schema": {}}}},
            "response_format",
            "belongs to type json_schema, not text",
        ),
        ("/v1/chat/completions", {"response_format": {"type": "xml"}}, "response_format.type", "'json_object'"),
        ("/v1/chat/completions", {"top_logprobs": 2}, "top_logprobs", "only possible with logprobs: true"),
        ("/v1/chat/completions", {"logprobs": 1}, "logprobs", "valid boolean"),
        ("/v1/completions", {"temprature": 1}, "temprature", "did you mean temperature"),
        ("/v1/completions", {"temperature": 2.5}, "temperature", "less than or equal to 2"),
        ("/v1/completions", {"temperature": True}, "temperature", "valid number"),
        ("/v1/completions", {"temperature": "1"}, "temperature", "valid number"),
        ("/v1/completions", {"temperature": 10**400}, "temperature", "valid number"),
        ("/v1/completions", {"top_p": 0}, "top_p", "greater than 0"),
        ("/v1/completions", {"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ("/v1/completions", {"max_tokens": 1.5}, "max_tokens", "valid integer"),
        ("/v1/completions", {"seed": 1 << 63}, "seed", "less than"),
        ("/v1/completions", {"stop": ["a"] * 17}, "stop", "at most 16"),
        ("/v1/completions", {"stop": ""}, "stop[0]", "at least 1"),
        ("/v1/completions", {"stop_token_ids": [1000]}, "stop_token_ids", "0 to 999"),
        ("/v1/completions", {"stream_options": {"include_usage": True}}, "stream_options", "only possible with stream"),
        ("/v1/completions", {"stream": True, "stream_options": {"usage": 1}}, "stream_options.usage", "include_usage"),
        ("/v1/completions", {"request_id": "a b"}, "request_id", "pattern"),
        ("/v1/completions", {"prompt": None}, "prompt", "required"),
        ("/v1/completions", {"model": None}, "model", "required"),
        ("/v1/completions", {"prompt": []}, "prompt", "1 to 1024"),
        ("/v1/completions", {"prompt": {}}, "prompt", "1 to 1024"),
        ("/v1/completions", {"prompt": [[]]}, "prompt", "no tokens"),
        ("/v1/completions", {"prompt": "", "add_special_tokens": False}, "prompt", "no tokens"),
        ("/v1/completions", {"prompt": [1, "a"]}, "prompt", "token ids"),
        ("/v1/completions", {"prompt": [-1]}, "prompt", "0 to 999"),
        ("/v1/completions", {"prompt": [1000]}, "prompt", "0 to 999"),
        ("/v1/completions", {"prompt": "x" * 99}, "prompt", "100 tokens and this server takes 100"),
        ("/v1/chat/completions", {"messages": []}, "messages", "messages: should have at least 1 item, not []."),
        ("/v1/chat/completions", {"messages": "hello"}, "messages", "valid list"),
        ("/v1/chat/completions", {"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role", "'assistant'"),
        ("/v1/chat/completions", {"messages": [{"role": "tool", "content": "a"}]}, "messages[0]", "tool_call_id"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "a", "tool_call_id": "1"}]},
            "messages[0]",
            "belongs to messages of role tool",
        ),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "a", "name": "Bob"}]},
            "messages[0]",
            "name is not possible",
        ),
        ("/v1/chat/completions", {"messages": [{"role": "user"}]}, "messages[0].content", "required"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": 1}]}, "messages[0].content", "string"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content",
            "image_url",
        ),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "assistant", "content": "a", "tool_calls": [{"id": "1"}]}]},
            "messages[0].tool_calls[0].function",
            "required",
        ),
        ("/v1/chat/completions", {"messages": [{"role": "assistant", "content": "a"}]}, "messages", "user's"),
        ("/v1/chat/completions", {"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "differ"),
        ("/v1/chat/completions", {"service_tier": "flex"}, "service_tier", 'out, or use "auto" or "default".'),
        ("/tokenize", {"prompt": "a", "messages": CHAT["messages"]}, "", "either"),
        ("/detokenize", {"tokens": [5000]}, "tokens", "0 to 999"),
        ("/detokenize", {"tokens": [True]}, "tokens[0]", "valid integer"),
    ],
)
async def test_a_wrong_field_is_named(path: str, fields: dict[str, Any], param: str, message: str) -> None:
    base = {"/v1/completions": COMPLETION, "/v1/chat/completions": CHAT}.get(path, {})
    status, answer = await post(path, base | fields)
    assert status == 400
    assert answer["error"]["type"] == "invalid_request_error"
    assert answer["error"]["param"] == (param or None)
    assert message in answer["error"]["message"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[]", "JSON object, not list"),
        (b'{"temperature": NaN}', "NaN"),
        (b'{"temperature": -Infinity}', "Infinity"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"prompt": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"prompt": ' + b"[" * 70 + b"]" * 70 + b"}", "nested too deeply; 64 levels"),
        (b'{"metadata": ' + b'{"a": ' * 64 + b"1" + b"}" * 64 + b"}", "nested too deeply; 64 levels"),
        (b'{"prompt": "\\ud800"}', "UTF-8"),
        (b'{"prompt": "\xff"}', "UTF-8"),
        (b'{"model": 1e999, "prompt": "a"}', "model"),
        (b'{"model": "fake", "prompt": "a", "temperature": 1e999}', "temperature"),
    ],
)
async def test_a_hostile_body_is_a_400(content: bytes, message: str) -> None:
    async with http(FakeEngine()) as client:
        response = await client.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]


async def test_half_a_body_is_not_waited_for_forever() -> None:
    parts: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    parts.put_nowait({"type": "http.request", "body": b'{"prompt": ', "more_body": True})
    request = Request({"type": "http", "headers": [(b"content-type", b"application/json")]}, parts.get)
    with pytest.raises(ApiError, match=r"did not arrive within 0\.01 s"):
        await read_json(request, timeout_s=0.01)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "with a byte order mark"])
async def test_an_escaped_surrogate_pair_is_a_character(mark: bytes) -> None:
    body = mark + b'{"prompt": "\\ud83d\\ude00"}'
    async with http(FakeEngine()) as client:
        response = await client.post("/tokenize", content=body, headers={"Content-Type": "application/json"})
    assert response.json()["tokens"] == [1, 0x1F600]


async def test_a_body_that_is_not_json_is_refused() -> None:
    """A foreign web page can post text/plain to localhost without asking; it cannot post JSON."""
    async with http(FakeEngine()) as client:
        response = await client.post(
            "/v1/completions", content=json.dumps(COMPLETION), headers={"Content-Type": "text/plain"}
        )
    assert response.status_code == 400
    assert "application/json" in response.json()["error"]["message"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=2000 if os.environ.get("MIXTRAL_TEST_ALL") else 80, deadline=None)
@given(kind=st.sampled_from([CompletionRequest, ChatRequest]), data=st.data())
def test_no_body_breaks_the_parser(kind: type[GenerationRequest], data: st.DataObject) -> None:
    names = st.sampled_from([*kind.model_fields, *kind.neutral, "unknown"])
    body = data.draw(st.dictionaries(names, json_values, max_size=5)) | {"model": MODEL}
    try:
        parse(kind, body)
        status = 200
    except ApiError as error:
        status = error.status
    assert status in (200, 400)
