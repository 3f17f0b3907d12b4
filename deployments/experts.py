"""GET /v1/experts: where every expert is, and how much it is used lately."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from cluster.messages import ExpertsStatus
from deployments.serving import Service


class Experts:
    def __init__(self, service: Service, replica: str) -> None:
        self._engine = service.engine
        self._replica = replica

    def router(self) -> APIRouter:
        router = APIRouter()
        router.add_api_route("/v1/experts", self.show, methods=["GET"])
        return router

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
