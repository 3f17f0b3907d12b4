"""return_routing: which experts each token went to, live in streams and whole in documents."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cluster.messages import TokenEvent
from tests.unit.fake_engine import MODEL, FakeEngine, Script, http, routing_of, spelling

ROUTES = ["/v1/completions", "/v1/chat/completions"]


async def post(engine: FakeEngine, path: str, status: int = 200, **fields: Any) -> Any:
    body: dict[str, Any] = {"model": MODEL, "return_routing": True, "max_tokens": 9}
    body |= {"prompt": "ab"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "a"}]}
    async with http(engine) as client:
        response = await client.post(path, json=body | fields)
    assert response.status_code == status, response.text
    if status != 200 or not fields.get("stream"):
        return response.json()
    return [json.loads(line.removeprefix("data: ")) for line in response.text.split("\n\n")[:-2]]


def shown(token: int) -> Any:
    return [[{"expert": expert, "weight": weight} for expert, weight in layer] for layer in routing_of(token)]


@pytest.mark.parametrize("path", ROUTES)
async def test_every_token_has_its_experts_in_every_layer(path: str) -> None:
    answer = await post(FakeEngine(spelling("xy", "z")), path, n=2, return_token_ids=True)
    for choice, tokens in zip(answer["choices"], ([120, 121, 2], [122, 2]), strict=True):
        assert choice["token_ids"] == tokens
        assert choice["routing"] == [shown(token) for token in tokens]


@pytest.mark.parametrize("path", ROUTES)
async def test_a_chunk_has_the_routing_of_its_own_tokens(path: str) -> None:
    engine = FakeEngine(spelling("xy"))
    chunks = await post(engine, path, stream=True)
    assert engine.requests[0].sampling.return_routing
    routings = [choice["routing"] for chunk in chunks for choice in chunk["choices"] if "routing" in choice]
    assert routings == [[shown(token)] for token in (120, 121, 2)]


def silent(script: Script) -> Script:
    """The same tokens, which show no text yet: as where a stop text may have begun."""

    async def events(request: Any) -> Any:
        async for event in script(request):
            yield TokenEvent("", event.token_ids, finish_reason=event.finish_reason, routing=event.routing)

    return events


@pytest.mark.parametrize("path", ROUTES)
async def test_routing_does_not_wait_for_text(path: str) -> None:
    chunks = await post(FakeEngine(silent(spelling("xy"))), path, stream=True)
    routings = [choice["routing"] for chunk in chunks for choice in chunk["choices"] if "routing" in choice]
    assert routings == [[shown(token)] for token in (120, 121, 2)]


@pytest.mark.parametrize("path", ROUTES)
async def test_nobody_gets_it_unasked(path: str) -> None:
    engine = FakeEngine(spelling("x"))
    answer = await post(engine, path, return_routing=False)
    assert "routing" not in answer["choices"][0]
    assert not engine.requests[0].sampling.return_routing


@pytest.mark.parametrize("path", ROUTES)
async def test_a_document_that_would_hold_too_many_is_refused(path: str) -> None:
    engine = FakeEngine(spelling("x"), max_model_len=10_000)
    answer = await post(engine, path, 400, max_tokens=1025, n=4)
    assert answer["error"]["param"] == "return_routing"
    assert "may get 4100" in answer["error"]["message"]
    assert not engine.requests
    assert await post(engine, path, max_tokens=1024, n=4)
    assert await post(engine, path, max_tokens=1025, n=4, stream=True)
