"""GET /v1/experts: where every expert is, and how much it is used lately. POST /v1/experts/rebalance moves them."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from cluster.errors import EngineError
from cluster.messages import ExpertsStatus
from deployments.errors import ApiError, from_engine
from deployments.serving import Service


class Experts:
    def __init__(self, service: Service, replica: str) -> None:
        self._service = service
        self._engine = service.engine
        self._replica = replica

    def router(self) -> APIRouter:
        router = APIRouter()
        router.add_api_route("/v1/experts", self.show, methods=["GET"])
        router.add_api_route("/v1/experts/rebalance", self.rebalance, methods=["POST"])
        return router

    async def rebalance(self, request: Request) -> Response:
        """Answers when the experts have moved. Requests go on meanwhile."""
        if not self._service.live.keys.accept_admin(request.headers.get("authorization")):
            raise ApiError(
                403,
                "This key may not move experts; a key may whose name in auth.api_keys_file begins with admin.",
                code="not_admin",
            )
        try:
            done = await self._engine.rebalance()
        except EngineError as error:
            raise from_engine(error, self._service.pace.retry_after_s) from None
        answer = {
            "object": "rebalancing",
            "placement": done.placement.number,
            "moves": done.moves,
            "imbalance_before": list(done.before),
            "imbalance_after": list(done.after),
            "replica": self._replica,
        }
        return JSONResponse(answer)

    async def show(self) -> Response:
        return JSONResponse(described(self._engine.experts()) | {"replica": self._replica})


def described(status: ExpertsStatus) -> dict[str, Any]:
    """Layer by layer, expert by expert: its ranks, and its share of the layer's rows (all 0: no rows yet)."""
    layers = [
        {
            "layer": layer,
            "imbalance": imbalance,
            "experts": [
                {"expert": expert, "ranks": list(holders), "load": share}
                for expert, (holders, share) in enumerate(zip(ranks, load, strict=True))
            ],
        }
        for layer, (ranks, load, imbalance) in enumerate(zip(status.ranks, status.load, status.imbalance, strict=True))
    ]
    return {"object": "experts", "placement": status.placement, "slices": status.slices, "layers": layers}
