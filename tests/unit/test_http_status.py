"""/health, /ready, /v1/models, unknown routes, and the life of the application."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.fake_engine import MODEL, FakeEngine, app_for, http


async def get(engine: FakeEngine, path: str) -> tuple[int, Any]:
    async with http(engine) as client:
        response = await client.get(path)
    return response.status_code, response.json()


async def test_health() -> None:
    status, answer = await get(FakeEngine(), "/health")
    assert status == 200
    assert answer["status"] == "healthy"
    assert answer["ranks"] == [
        {"rank": 0, "pid": 4711, "node": "node", "device": "cpu", "state": "ready", "last_step_age_s": 0.5}
    ]
    assert answer["kv"] == {"pages_total": 30, "pages_used": 4}
    assert (answer["running"], answer["waiting"], answer["recoveries"]) == (1, 2, 0)
    assert answer["replica"] == "replica-1"
    assert answer["config"]["parallel"]["tensor"] == 1
    assert "auth" not in answer["config"]


async def test_an_engine_that_cannot_go_on_is_unhealthy() -> None:
    engine = FakeEngine()
    engine.healthy = engine.ready = False
    status, answer = await get(engine, "/health")
    assert (status, answer["status"]) == (503, "unhealthy")


async def test_an_engine_that_replaces_a_rank_says_so_and_is_not_replaced_itself() -> None:
    engine = FakeEngine()
    engine.recovering = True
    status, answer = await get(engine, "/health")
    assert (status, answer["status"]) == (200, "recovering")


async def test_ready() -> None:
    engine = FakeEngine()
    assert await get(engine, "/ready") == (200, {"status": "ready"})
    engine.ready = False
    assert await get(engine, "/ready") == (
        503,
        {"status": "not ready", "ranks_not_ready": {"0": "dead"}, "unproved": []},
    )


async def test_models_have_a_length() -> None:
    _, listed = await get(FakeEngine(max_model_len=77), "/v1/models")
    assert [model["max_model_len"] for model in listed["data"]] == [77, 77]
    status, model = await get(FakeEngine(), "/v1/models/other/alias")
    assert (status, model["id"]) == (200, "other/alias")


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("GET", "/v2/models", 404, "no route GET /v2/models"),
        ("GET", "/docs", 404, "no route GET /docs; GET /openapi.json lists those that there are."),
        ("POST", "/chat/completions", 404, "no route POST /chat/completions; did you mean /v1/chat/completions?"),
        ("POST", "/v1/v1/embeddings", 404, "did you mean /v1/embeddings?"),
        ("POST", "/v1/token_classify", 404, "did you mean /token_classify?"),
        ("GET", "/v1/completions", 405, "GET /v1/completions is not possible; use POST."),
        ("DELETE", "/health", 405, "DELETE /health is not possible; use GET."),
        ("GET", "/v1/models/unknown", 404, f"possible: {MODEL}, other/alias"),
    ],
)
async def test_routes_that_do_not_exist(method: str, path: str, status: int, message: str) -> None:
    async with http(FakeEngine()) as client:
        response = await client.request(method, path)
    assert response.status_code == status
    assert message in response.json()["error"]["message"]
    assert ("allow" in response.headers) is (status == 405)


async def test_a_body_is_not_read_beyond_its_limit() -> None:
    read = 0

    async def endless() -> Any:
        nonlocal read
        while True:
            read += 512
            yield b" " * 512

    limit = {"limits": {"max_body_bytes": 4096}}
    json_type = {"Content-Type": "application/json"}
    async with http(FakeEngine(), limit) as client:
        streamed = await client.post("/v1/completions", content=endless(), headers=json_type)
        declared = await client.post("/v1/completions", content=b" " * 5000, headers=json_type)
        fits = await client.post("/tokenize", content=b'{"prompt": "' + b"a" * 4000 + b'"}', headers=json_type)
    assert streamed.status_code == declared.status_code == 413
    assert read <= 4096 + 512
    assert "4096 bytes" in streamed.json()["error"]["message"]
    assert fits.status_code == 200


async def test_tokenize_and_back() -> None:
    async with http(FakeEngine()) as client:
        ids = (await client.post("/tokenize", json={"prompt": "añ"})).json()
        assert ids == {"count": 3, "max_model_len": 100, "tokens": [1, 97, 241]}
        text = await client.post("/detokenize", json={"tokens": ids["tokens"]})
        chat = await client.post("/tokenize", json={"messages": [{"role": "user", "content": "a"}]})
    assert text.json() == {"prompt": "añ"}
    assert chat.json()["count"] == len("<user>a<assistant>") + 1


async def test_the_application_stops_its_engine() -> None:
    engine = FakeEngine()
    app = app_for(engine)
    async with app.router.lifespan_context(app):
        assert not engine.stopped
    assert engine.stopped
