"""What an operator changes while the server runs, and what happens to a change that cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.config import SchedulerConfig
from deployments import access_log
from deployments.api import create_app
from deployments.ingress import Ingress
from deployments.live import Live
from deployments.settings import SettingsError, load
from tests.unit.fake_engine import MODEL, FakeEngine, resolved


def client_of(live: Live, engine: FakeEngine | None = None) -> httpx.AsyncClient:
    app = create_app(engine or FakeEngine(), resolved(load({})), live)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


async def test_a_limit_changes_under_a_running_server() -> None:
    live = Live(load({"limits": {"max_n": 2, "max_body_bytes": 2048}}), {})
    async with client_of(live) as client:
        body = {"model": MODEL, "prompt": "a", "n": 3}
        assert (await client.post("/v1/completions", json=body)).status_code == 400
        live.apply({"limits": {"max_n": 1, "max_body_bytes": 1024}})
        answer = await client.post("/v1/completions", json=body)
        assert "at most 1 here" in answer.json()["error"]["message"]
        assert (await client.post("/tokenize", json={"prompt": "a" * 1500})).status_code == 413
        live.apply({"limits": {"max_n": 1, "max_body_bytes": 1024}, "scheduler": {"max_waiting": 7}})
        config = (await client.get("/health")).json()["config"]
        assert (config["limits"]["max_n"], config["scheduler"]["max_waiting"]) == (1, 7)
        live.apply(None)
        assert (await client.post("/tokenize", json={"prompt": "a" * 1500})).status_code == 200


async def test_the_engine_admits_by_the_limits_that_were_changed_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access_log, "keep", lambda *_: None)  # there is one log in a process
    ingress, engine = Ingress(resolved(load({"scheduler": {"max_running": 8}}))), FakeEngine()
    monkeypatch.setattr(ingress, "_engine", engine)  # as once it has been launched
    ingress.reconfigure({"scheduler": {"max_running": 4, "max_waiting": 0}})
    assert engine.limits == SchedulerConfig(4, 2048, 0)
    ingress.reconfigure({"scheduler": {"max_running": 9}})
    assert engine.limits == SchedulerConfig(4, 2048, 0)
    ingress.reconfigure(None)
    assert engine.limits == SchedulerConfig(8, 2048, 1024)


async def test_keys_appear_under_a_running_server(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("alice one\ntwo\n")
    live = Live(load({}), {})
    async with client_of(live) as client:
        assert (await client.get("/v1/models")).status_code == 200
        live.apply({"auth": {"api_keys_file": str(file)}})
        assert (await client.get("/v1/models")).status_code == 401
        assert (await client.get("/v1/models", headers={"Authorization": "Bearer one"})).status_code == 200
    assert live.keys.name_of("Bearer one") == "alice"
    assert live.keys.name_of("Bearer two") == "file-2"
    assert live.keys.name_of("Bearer alice") is None
    assert live.keys.name_of("Bearer alice one") is None


@pytest.mark.parametrize(
    ("user_config", "message"),
    [
        ({"limits": {"max_m": 1}}, r"limits\.max_m is not a field; did you mean max_n\?"),
        ({"limits": 3}, "limits: should be a valid dictionary"),
        ({"model": "x"}, "model is not a field"),
        ({"limits": {"request_timeout_s": 601}}, "can be lowered while serving, not raised above the 600"),
        ({"scheduler": {"max_running": 257}}, r"scheduler\.max_running can be lowered .* above the 256 of args"),
        ({"scheduler": {"max_running": 0}}, "scheduler.max_running"),
        ({"auth": {"api_keys_file": "/nowhere"}, "limits": {"max_n": 7}}, "cannot be read"),
    ],
)
async def test_a_change_that_cannot_be(user_config: dict[str, Any], message: str) -> None:
    live = Live(load({"limits": {"max_n": 5}}), {})
    with pytest.raises(SettingsError, match=message):
        live.apply(user_config)
    assert live.limits.max_n == 5
    live.change(user_config)  # with users already: all goes on, and /health says what is wrong
    assert live.limits.max_n == 5
    async with client_of(live) as client:
        assert (await client.get("/health")).json()["user_config"] == live.problem
        live.change({"limits": {"max_n": 6}})
        assert "user_config" not in (await client.get("/health")).json()
    assert live.limits.max_n == 6


def test_a_replica_does_not_start_with_a_wrong_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access_log, "keep", lambda *_: None)  # there is one log in a process
    ingress = Ingress(resolved(load({"access_log": None})))
    with pytest.raises(SettingsError, match="user_config"):
        ingress.reconfigure({"limits": {"max_n": 0}})
    ingress.reconfigure({"limits": {"max_n": 3}})
