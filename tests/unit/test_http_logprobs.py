"""Log-probabilities: both of OpenAI's forms, prompts, offsets, and the same in streams."""

from __future__ import annotations

import json
from typing import Any

from cluster.messages import TokenEvent, TokenLogprob
from tests.unit.fake_engine import MODEL, FakeEngine, http, openai, spelling


async def post(engine: FakeEngine, path: str, **fields: Any) -> Any:
    body: dict[str, Any] = {"model": MODEL}
    body |= {"prompt": "ab"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "a"}]}
    async with http(engine) as client:
        response = await client.post(path, json=body | fields)
    assert response.status_code == 200, response.text
    if not fields.get("stream"):
        return response.json()
    return [json.loads(line.removeprefix("data: ")) for line in response.text.split("\n\n")[:-2]]


async def test_completions() -> None:
    answer = await post(FakeEngine(spelling("xy")), "/v1/completions", logprobs=2)
    assert answer["choices"][0]["logprobs"] == {
        "tokens": ["x", "y", chr(2)],
        "token_logprobs": [-0.5, -0.5, -0.5],
        "top_logprobs": [{"x": -0.5, "y": -1.0}, {"y": -0.5, "z": -1.0}, {chr(2): -0.5, chr(3): -1.0}],
        "text_offset": [0, 1, 2],
    }


async def test_the_sampled_token_is_always_there() -> None:
    answer = await post(FakeEngine(spelling("x")), "/v1/completions", logprobs=0)
    assert answer["choices"][0]["logprobs"]["top_logprobs"][0] == {"x": -0.5}


async def test_chat() -> None:
    answer = await post(FakeEngine(spelling("é")), "/v1/chat/completions", logprobs=True, top_logprobs=1)
    first = {"token": "é", "logprob": -0.5, "bytes": [0xC3, 0xA9]}
    logprobs = answer["choices"][0]["logprobs"]
    assert logprobs["content"][0] == first | {"top_logprobs": [first]}
    assert len(logprobs["content"]) == answer["usage"]["completion_tokens"]
    assert logprobs["refusal"] is None


async def test_chat_without_alternatives() -> None:
    answer = await post(FakeEngine(spelling("x")), "/v1/chat/completions", logprobs=True)
    assert answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


async def test_the_official_types_hold_them() -> None:
    client = openai(FakeEngine(spelling("xy")))
    conversation = await client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "a"}], logprobs=True, top_logprobs=2
    )
    content = conversation.choices[0].logprobs
    assert content is not None
    assert content.content is not None
    assert [token.token for token in content.content[0].top_logprobs] == ["x", "y"]
    completion = await client.completions.create(model=MODEL, prompt="a", logprobs=1, echo=True)
    columns = completion.choices[0].logprobs
    assert columns is not None
    assert columns.tokens == [chr(1), "a", "x", "y", chr(2)]


async def test_echo_has_the_prompts_as_well() -> None:
    answer = await post(FakeEngine(spelling("xyz")), "/v1/completions", logprobs=1, echo=True)
    [choice] = answer["choices"]
    assert choice["text"] == "abxyz"
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == [chr(1), "a", "b", "x", "y", "z", chr(2)]
    assert logprobs["token_logprobs"][:2] == [None, -0.5]
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["text_offset"] == [0, 0, 1, 2, 3, 4, 5]


async def test_every_choice_of_an_echo_has_the_prompts() -> None:
    """They come with the first choice only, which need not be the first to say something."""

    async def late_first_choice(request: Any) -> Any:
        yield TokenEvent(request.request_id, (ord("y"),), 1, text="y", logprobs=(one("y"),))
        yield TokenEvent(request.request_id, (ord("z"),), 1, text="z", logprobs=(one("z"),), finish_reason="length")
        known = (None, *(one(chr(token)) for token in request.prompt_ids[1:]))
        yield TokenEvent(request.request_id, (ord("x"),), 0, "x", "length", logprobs=(one("x"),), prompt_logprobs=known)

    def one(text: str) -> TokenLogprob:
        return TokenLogprob(ord(text), -0.25, 1, ())

    answer = await post(FakeEngine(late_first_choice), "/v1/completions", logprobs=0, echo=True, n=2)
    tokens = [choice["logprobs"]["tokens"] for choice in answer["choices"]]
    assert tokens == [[chr(1), "a", "b", "x"], [chr(1), "a", "b", "y", "z"]]


async def test_prompts() -> None:
    answer = await post(FakeEngine(spelling("x")), "/v1/completions", prompt_logprobs=1)
    assert answer["choices"][0]["prompt_logprobs"] == [
        None,
        {"97": {"logprob": -0.5, "rank": 1, "decoded_token": "a"}},
        {"98": {"logprob": -0.5, "rank": 1, "decoded_token": "b"}},
    ]
    assert answer["choices"][0]["logprobs"] is None
    conversation = await post(FakeEngine(spelling("x")), "/v1/chat/completions", prompt_logprobs=0)
    assert len(conversation["prompt_logprobs"]) == len("<user>a<assistant>") + 1


async def test_an_impossible_token_has_a_number() -> None:
    async def impossible(request: Any) -> Any:
        logprob = TokenLogprob(120, float("-inf"), 900, ((121, float("-inf")),))
        yield TokenEvent(request.request_id, (120,), text="x", finish_reason="length", logprobs=(logprob,))

    completion = await post(FakeEngine(impossible), "/v1/completions", logprobs=1)
    assert completion["choices"][0]["logprobs"]["top_logprobs"] == [{"y": -9999.0, "x": -9999.0}]
    conversation = await post(FakeEngine(impossible), "/v1/chat/completions", logprobs=True)
    assert conversation["choices"][0]["logprobs"]["content"][0]["logprob"] == -9999.0


async def test_tokens_without_text_yet_are_streamed() -> None:
    async def held_back(request: Any) -> Any:
        for token, text in ((120, ""), (121, "xy")):
            yield TokenEvent(request.request_id, (token,), text=text, logprobs=(TokenLogprob(token, -1.0, 1, ()),))
        yield TokenEvent(request.request_id, (), finish_reason="stop")

    for path, fields in (("/v1/completions", {"logprobs": 0}), ("/v1/chat/completions", {"logprobs": True})):
        whole = await post(FakeEngine(held_back), path, **fields)
        chunks = await post(FakeEngine(held_back), path, stream=True, **fields)
        seen = [chunk["choices"][0]["logprobs"] for chunk in chunks if chunk["choices"][0]["logprobs"]]
        column = "tokens" if path == "/v1/completions" else "content"
        assert len(seen) == 2
        assert [token for part in seen for token in part[column]] == whole["choices"][0]["logprobs"][column]
