"""POST /v1/experts/rebalance, and what /ready says of what is not proved."""

from __future__ import annotations

from pathlib import Path

from cluster.errors import EngineNotReady
from tests.unit.fake_engine import FakeEngine, http

ROUTE = "/v1/experts/rebalance"


async def test_it_says_what_has_moved() -> None:
    async with http(FakeEngine()) as client:
        response = await client.post(ROUTE)
    assert response.status_code == 200
    assert response.json() == {
        "object": "rebalancing",
        "placement": 4,
        "moves": 1,
        "imbalance_before": [1.5],
        "imbalance_after": [1.0],
        "replica": "replica-1",
    }


async def test_not_now_is_503_with_a_time_to_come_back() -> None:
    engine = FakeEngine()
    engine.moves_refused = EngineNotReady("experts are being moved already", retry_after_s=5)
    async with http(engine) as client:
        response = await client.post(ROUTE)
    assert response.status_code == 503
    assert response.headers["retry-after"] == "5"


async def test_only_an_administrator_may(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("alice sk-alice\nadmin-bob sk-bob\nsk-nameless\n")
    async with http(FakeEngine(), {"auth": {"api_keys_file": str(keys)}}) as client:
        statuses = {}
        for key in ("sk-alice", "sk-nameless", "sk-bob", "sk-wrong"):
            response = await client.post(ROUTE, headers={"Authorization": f"Bearer {key}"})
            statuses[key] = (response.status_code, response.json().get("error", {}).get("code"))
    assert statuses == {
        "sk-alice": (403, "not_admin"),
        "sk-nameless": (403, "not_admin"),
        "sk-bob": (200, None),
        "sk-wrong": (401, "invalid_api_key"),
    }


async def test_ready_is_503_while_something_is_unproved_and_health_is_not() -> None:
    engine = FakeEngine()
    engine.unproved = [f"layer {layer}, expert slots 0" for layer in range(99)]
    async with http(engine) as client:
        ready = await client.get("/ready")
        assert ready.status_code == 503
        assert ready.json()["unproved"] == engine.unproved[:16]
        assert (await client.get("/health")).status_code == 200
        engine.unproved = []
        assert (await client.get("/ready")).status_code == 200
