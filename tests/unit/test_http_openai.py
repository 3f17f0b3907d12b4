"""The official client against the API: whole and streamed answers of both generation routes."""

from __future__ import annotations

import openai as openai_package
import pytest

from cluster.errors import QueueFull
from tests.unit.fake_engine import MODEL, FakeEngine, failing, openai


async def test_chat() -> None:
    engine = FakeEngine()
    answer = await openai(engine).chat.completions.create(
        model=MODEL, messages=[{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Count."}]
    )
    assert answer.choices[0].message.content == "one two three"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == MODEL
    prompt = engine.tokenizer.encode("<system>Be brief.<user>Count.<assistant>")
    assert engine.requests[0].prompt_ids == tuple(prompt)
    assert engine.requests[0].sampling.max_tokens == engine.max_model_len - len(prompt)
    assert engine.requests[0].sampling.temperature == 1
    assert not engine.requests[0].continues_prompt
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), 3)
    assert answer.usage.total_tokens == len(prompt) + 3
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 1


async def test_chat_streamed() -> None:
    stream = await openai(FakeEngine()).chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Count."}], stream=True
    )
    chunks = [chunk async for chunk in stream]
    assert [chunk.choices[0].delta.content for chunk in chunks] == ["", "one", " two", " three", None]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * 4 + ["stop"]
    assert all(chunk.usage is None for chunk in chunks)
    assert len({chunk.id for chunk in chunks}) == 1


async def test_chat_streamed_with_usage() -> None:
    stream = await openai(FakeEngine()).chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Count."}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 3
    assert all(chunk.usage is None for chunk in chunks[:-1])


async def test_an_answer_can_be_sent_back_as_it_came() -> None:
    client = openai(FakeEngine(max_model_len=1000))
    first = await client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Count."}])
    message = first.choices[0].message
    again = await client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Count."}, message, {"role": "user", "content": "More."}],  # type: ignore[list-item]
    )
    assert again.choices[0].finish_reason == "stop"


async def test_completions_of_several_prompts() -> None:
    engine = FakeEngine()
    answer = await openai(engine).completions.create(model=MODEL, prompt=["a", "bc"])
    assert [(choice.index, choice.text) for choice in answer.choices] == [(0, "one two three"), (1, "one two three")]
    assert [request.prompt_ids for request in engine.requests] == [(1, 97), (1, 98, 99)]
    assert {request.sampling.max_tokens for request in engine.requests} == {16}
    assert all(request.continues_prompt for request in engine.requests)
    assert len({request.request_id for request in engine.requests}) == 2
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 6)


async def test_completions_of_several_prompts_streamed() -> None:
    stream = await openai(FakeEngine()).completions.create(model=MODEL, prompt=[[5, 6], [7]], stream=True)
    texts = ["", ""]
    finished = []
    async for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
        finished += [chunk.choices[0].index] if chunk.choices[0].finish_reason else []
    assert texts == ["one two three"] * 2
    assert sorted(finished) == [0, 1]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("a", [(1, 97)]), (["a"], [(1, 97)]), ([5, 6], [(5, 6)]), ([[5, 6]], [(5, 6)]), ([[5], [6]], [(5,), (6,)])],
)
async def test_every_form_of_a_prompt(prompt: list[int], expected: list[tuple[int, ...]]) -> None:
    engine = FakeEngine()
    await openai(engine).completions.create(model=MODEL, prompt=prompt)
    assert [request.prompt_ids for request in engine.requests] == expected


async def test_every_sampling_field_reaches_the_engine() -> None:
    engine = FakeEngine()
    await openai(engine).completions.create(
        model=MODEL,
        prompt="a",
        max_tokens=5,
        temperature=0.5,
        top_p=0.9,
        seed=7,
        stop=["x", "yz"],
        extra_body={
            "top_k": 3,
            "min_p": 0.1,
            "stop_token_ids": [9],
            "ignore_eos": True,
            "add_special_tokens": False,
            "request_id": "mine-1",
        },
    )
    request = engine.requests[0]
    assert request.prompt_ids == (97,)
    assert request.request_id.startswith("cmpl-mine-1")
    sampling = request.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.seed) == (5, 0.5, 0.9, 7)
    assert (sampling.stop, sampling.top_k, sampling.min_p) == (("x", "yz"), 3, 0.1)
    assert (sampling.stop_token_ids, sampling.ignore_eos) == ((9,), True)


async def test_chat_takes_either_name_of_the_maximum() -> None:
    engine = FakeEngine()
    client = openai(engine)
    for extra in ({"max_tokens": 4}, {"max_completion_tokens": 4}, {"max_tokens": 4, "max_completion_tokens": 4}):
        await client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "Count."}], extra_body=extra
        )
    assert [request.sampling.max_tokens for request in engine.requests] == [4, 4, 4]


async def test_the_same_request_id_twice_at_once_is_two_requests() -> None:
    engine = FakeEngine()
    client = openai(engine)
    for _ in range(2):
        await client.completions.create(model=MODEL, prompt="a", extra_body={"request_id": "mine"})
    assert engine.requests[0].request_id != engine.requests[1].request_id


async def test_models() -> None:
    client = openai(FakeEngine())
    listed = await client.models.list()
    assert [model.id for model in listed.data] == [MODEL, "other/alias"]
    assert (await client.models.retrieve(MODEL)).id == MODEL
    with pytest.raises(openai_package.NotFoundError):
        await client.models.retrieve("unknown")


async def test_errors_are_the_clients_own_exceptions() -> None:
    client = openai(FakeEngine(failing(QueueFull("8 requests wait already", retry_after_s=1.5))))
    with pytest.raises(openai_package.RateLimitError) as full:
        await client.completions.create(model=MODEL, prompt="a", stream=True)
    assert full.value.response.headers["retry-after"] == "10"
    assert full.value.code == "queue_full"
    with pytest.raises(openai_package.NotFoundError) as unknown:
        await client.completions.create(model="gpt-4", prompt="a")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai_package.BadRequestError) as wrong:
        await client.completions.create(model=MODEL, prompt="a", temperature=3)
    assert wrong.value.param == "temperature"
