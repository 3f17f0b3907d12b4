"""Conversations with the demo model: each answer, sent back as history, is the tokens that were generated."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio

from tests.e2e.in_process import application, streamed

pytestmark = pytest.mark.asyncio(loop_scope="module")

QUESTIONS = ("Who are you?", "What is a mixture of experts?", "Tell me a story.")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def http() -> AsyncIterator[httpx.AsyncClient]:
    async with application("demo") as client:
        yield client


async def chat(http: httpx.AsyncClient, messages: list[Any], **fields: Any) -> Any:
    body = {"model": "tiny", "messages": messages, "temperature": 0} | fields
    response = await http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return response


async def test_history_is_what_was_generated(http: httpx.AsyncClient) -> None:
    messages: list[Any] = []
    known: list[int] = []  # prompt and answer of the turn before
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        answer = (await chat(http, messages, return_token_ids=True)).json()
        prompt_ids = answer["prompt_token_ids"]
        assert prompt_ids[: len(known)] == known
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] >= (len(known) - 1) // 16 * 16
        [choice] = answer["choices"]
        text = choice["message"]["content"]
        assert text[:1].isalnum()
        chunks = streamed((await chat(http, messages, stream=True)).text)
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == text
        known = prompt_ids + choice["token_ids"]
        messages.append({"role": "assistant", "content": text})


async def test_the_space_before_a_message_is_in_its_tokens_only(http: httpx.AsyncClient) -> None:
    messages = [{"role": "user", "content": QUESTIONS[0]}]
    [choice] = (await chat(http, messages, logprobs=True)).json()["choices"]
    tokens = [entry["token"] for entry in choice["logprobs"]["content"]]
    assert "".join(tokens).removesuffix("</s>") == " " + choice["message"]["content"]


async def test_a_form_is_matched_to_the_first_letter(http: httpx.AsyncClient) -> None:
    """The model may write its space, which the text does not have."""
    messages = [{"role": "user", "content": QUESTIONS[0]}]
    for outputs, expected in (({"choice": ["yes", "no"]}, {"yes", "no"}), ({"regex": "I (am)"}, {"I am"})):
        [choice] = (await chat(http, messages, structured_outputs=outputs, logprobs=True)).json()["choices"]
        assert choice["message"]["content"] in expected
        assert choice["logprobs"]["content"][0]["token"].startswith(" ")


async def test_a_stop_text_is_looked_for_in_the_text(http: httpx.AsyncClient) -> None:
    messages = [{"role": "user", "content": QUESTIONS[0]}]
    text = (await chat(http, messages)).json()["choices"][0]["message"]["content"]
    first = text.split()[0]
    stopped = (await chat(http, messages, stop=[" " + first, first])).json()["choices"][0]
    assert (stopped["message"]["content"], stopped["stop_reason"]) == ("", first)
