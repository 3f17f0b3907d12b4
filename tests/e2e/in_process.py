"""The application with a real engine in this process: no Ray and no sockets, but the same answers, in a second."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from cluster.launch import launch_in_process
from deployments.api import create_app
from deployments.layout import Machine
from deployments.live import Live
from deployments.resolve import resolve
from deployments.settings import load


@asynccontextmanager
async def application(model: Path | str) -> AsyncIterator[httpx.AsyncClient]:
    resolved = resolve(load({"model": str(model), "served_model_name": "tiny"}), Machine(1, 0))
    engine = await launch_in_process(resolved.engine)
    app = create_app(engine, resolved, Live(resolved.settings, {}))
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            yield client


def streamed(text: str) -> list[Any]:
    """The chunks of a stream that ended well."""
    *events, done = [event for event in text.removesuffix("\n\n").split("\n\n") if not event.startswith(":")]
    assert done == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events]
