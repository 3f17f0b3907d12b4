"""The application with a real engine in this process: no Ray and no sockets, but the same answers, in a second."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx

from cluster.launch import launch_in_process
from deployments.api import create_app
from deployments.live import Live
from deployments.resolve import Machine, resolve
from deployments.settings import load


@asynccontextmanager
async def application(directory: Path) -> AsyncIterator[httpx.AsyncClient]:
    resolved = resolve(load({"model": str(directory), "served_model_name": "tiny"}), Machine(1, 0))
    engine = await launch_in_process(resolved.engine)
    app = create_app(engine, resolved, Live(resolved.settings, {}))
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            yield client
