"""GET routes about the server itself: health, readiness, metrics, models, the description of the API."""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from deployments.openapi import document
from deployments.prompts import check_model
from deployments.serving import Service

MAX_DOUBTS = 16  # lines that an answer names


class Status:
    def __init__(self, service: Service, config: dict[str, Any], replica: str) -> None:
        self._service = service
        self._engine = service.engine
        self._config = config
        self._replica = replica
        self._started = int(time.time())

    def router(self) -> APIRouter:
        router = APIRouter()
        router.add_api_route("/health", self.health, methods=["GET"])
        router.add_api_route("/ready", self.ready, methods=["GET"])
        router.add_api_route("/openapi.json", self.openapi, methods=["GET"])
        router.add_api_route("/metrics", self.metrics, methods=["GET"], include_in_schema=False)  # not JSON
        router.add_api_route("/v1/models", self.models, methods=["GET"])
        router.add_api_route("/v1/models/{name:path}", self.model, methods=["GET"])  # names may hold slashes
        return router

    async def health(self, request: Request) -> Response:
        healthy, live = self._engine.healthy, self._service.live
        status = "unhealthy" if not healthy else "recovering" if self._engine.recovering else "healthy"
        answer: dict[str, Any] = {"status": status}
        if live.keys.accept(request.headers.get("authorization")):
            stats = self._engine.stats()
            answer |= {
                "config": self._config | {"limits": live.limits.model_dump(), "scheduler": live.scheduler.model_dump()},
                "ranks": [asdict(rank) for rank in self._engine.ranks()],
                "recoveries": stats.recoveries,
                "kv": {"pages_total": stats.pages_total, "pages_used": stats.pages_used},
                "running": stats.running,
                "waiting": stats.waiting,
                "replica": self._replica,
            }
            if live.problem is not None:
                answer["user_config"] = live.problem
        return JSONResponse(answer, 200 if healthy else 503)

    async def ready(self) -> Response:
        doubts = self._engine.doubts()
        if self._engine.ready and not doubts:
            return JSONResponse({"status": "ready"})
        states = {str(rank.rank): rank.state for rank in self._engine.ranks() if rank.state != "ready"}
        return JSONResponse({"status": "not ready", "ranks_not_ready": states, "unproved": doubts[:MAX_DOUBTS]}, 503)

    async def metrics(self) -> Response:
        text = await asyncio.to_thread(self._service.metrics.text)  # milliseconds, where there are many experts
        return Response(text, media_type="text/plain; version=0.0.4")

    async def openapi(self) -> Response:
        return JSONResponse(document())

    async def models(self) -> Response:
        return JSONResponse({"object": "list", "data": [self._card(name) for name in self._service.model_names]})

    async def model(self, name: str) -> Response:
        check_model(name, self._service.model_names)
        return JSONResponse(self._card(name))

    def _card(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._started,
            "owned_by": "mixtral-serve",
            "max_model_len": self._engine.max_model_len,
        }
