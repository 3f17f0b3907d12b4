"""GET /v1/experts."""

from __future__ import annotations

from tests.unit.fake_engine import FakeEngine, http


async def test_every_expert_has_its_ranks_and_its_share() -> None:
    async with http(FakeEngine()) as client:
        response = await client.get("/v1/experts")
    assert response.status_code == 200
    assert response.json() == {
        "object": "experts",
        "placement": 3,
        "slices": 1,
        "layers": [
            {
                "layer": 0,
                "imbalance": 1.25,
                "experts": [
                    {"expert": 0, "ranks": [0], "load": 0.25},
                    {"expert": 1, "ranks": [0, 1], "load": 0.75},
                ],
            }
        ],
        "replica": "replica-1",
    }


async def test_strangers_are_not_told() -> None:
    auth = {"auth": {"api_keys_env": "KEYS"}}
    async with http(FakeEngine(), auth, environment={"KEYS": "secret"}) as client:
        assert (await client.get("/v1/experts")).status_code == 401
        allowed = await client.get("/v1/experts", headers={"Authorization": "Bearer secret"})
    assert allowed.status_code == 200
