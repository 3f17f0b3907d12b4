"""API keys: where they come from, what they open, and that nothing else is open."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import httpx
import pytest

from deployments.auth import Keys
from deployments.settings import Auth, SettingsError
from tests.unit.fake_engine import MODEL, FakeEngine, app_for, http

WITH_KEY = {"auth": {"api_keys_env": "KEYS"}}
ENVIRONMENT = {"KEYS": "first, second"}
ROUTES = [
    ("GET", "/v1/models"),
    ("GET", f"/v1/models/{MODEL}"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/embeddings"),
    ("POST", "/classify"),
    ("POST", "/token_classify"),
    ("POST", "/question_answering"),
    ("GET", "/openapi.json"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/unknown"),
    ("GET", "/health/"),
    ("GET", "//health"),
]


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize("header", [None, "Bearer wrong", "Bearer ", "first", "Basic first", "Bearer first, second"])
async def test_every_route_needs_a_key(method: str, path: str, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header}
    async with http(FakeEngine(), WITH_KEY, environment=ENVIRONMENT) as client:
        response = await client.request(method, path, headers=headers)
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("key", ["first", "second"])
async def test_every_key_opens(key: str) -> None:
    async with http(FakeEngine(), WITH_KEY, environment=ENVIRONMENT) as client:
        response = await client.get("/v1/models", headers={"Authorization": f"bearer {key}"})
    assert response.status_code == 200


async def test_a_stranger_cannot_make_us_read_a_body() -> None:
    async def body() -> object:
        raise AssertionError("the body was read")
        yield b""

    async with http(FakeEngine(), WITH_KEY, environment=ENVIRONMENT) as client:
        response = await client.post("/v1/completions", content=body())
    assert response.status_code == 401


async def test_probes_need_none_and_see_little() -> None:
    async with http(FakeEngine(), WITH_KEY, environment=ENVIRONMENT) as client:
        assert (await client.get("/health")).json() == {"status": "healthy"}
        assert (await client.get("/ready")).status_code == 200
        full = await client.get("/health", headers={"Authorization": "Bearer first"})
    assert "config" in full.json()


async def test_probes_are_open_below_a_route_prefix() -> None:
    """Serve leaves the prefix in the path and names it as root_path."""
    app = app_for(FakeEngine(), WITH_KEY, ENVIRONMENT)
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app, root_path="/mixtral"), base_url="http://test"
    ) as client:
        assert (await client.get("/mixtral/health")).json() == {"status": "healthy"}
        assert (await client.get("/mixtral/v1/models")).status_code == 401
        assert (await client.get("/mixtral/mixtral/health")).status_code == 401


def test_a_file_is_read_again_when_it_changes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\none\n\n")
    keys = Keys(Auth(api_keys_file=str(file)), {})
    assert keys.accept("Bearer one")
    assert not keys.accept("Bearer # ours")
    replacement = tmp_path / "new"
    replacement.write_text("two\n")
    os.replace(replacement, file)
    assert keys.accept("Bearer two")
    assert not keys.accept("Bearer one")
    file.write_bytes("schlüssel\n".encode() + b"\xff\xfe\n")
    assert keys.accept("Bearer " + "schlüssel".encode().decode("latin-1"))
    file.write_text("two\n")
    assert keys.accept("Bearer two")
    file.unlink()
    with caplog.at_level(logging.WARNING):
        assert keys.accept("Bearer two")
    assert "its earlier keys stay" in caplog.text
    assert "two" not in caplog.text


@pytest.mark.parametrize("content", [None, "", "# nothing\n"])
def test_a_source_without_keys_is_refused(content: str | None, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SettingsError, match="api_keys_file"):
        Keys(Auth(api_keys_file=str(file)), {})
    with pytest.raises(SettingsError, match="api_keys_env: the variable KEYS"):
        Keys(Auth(api_keys_env="KEYS"), {} if content is None else {"KEYS": " , "})


def test_keys_are_not_kept() -> None:
    keys = Keys(Auth(api_keys_env="KEYS"), {"KEYS": "very-secret"})
    assert "very-secret" not in repr(vars(keys))
