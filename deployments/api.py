"""The HTTP application around one engine. Knows no ray: tests give it an engine that follows a script."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from difflib import get_close_matches

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect

from deployments.access_log import CLIENT_LEFT, AccessLog, record_of
from deployments.admission import KeyLimit, Pace, RequireKey
from deployments.body import BodyLimit
from deployments.errors import ApiError, internal
from deployments.experts import Experts
from deployments.generation import Generation
from deployments.live import Live
from deployments.metrics import Metrics
from deployments.openapi import PATHS
from deployments.pooling import Poolers
from deployments.prompts import Prompts
from deployments.resolve import Resolved
from deployments.serving import Engine, Service
from deployments.status import Status
from deployments.tokenization import Tokenization

KEEP_ALIVE_S = 10.0  # a comment in streams where nothing comes, so that nobody between takes them for dead


def create_app(
    engine: Engine,
    resolved: Resolved,
    live: Live,
    *,
    replica: str = "local",
    metrics: Metrics | None = None,
    beside: AbstractContextManager[object] | None = None,
    keep_alive_s: float = KEEP_ALIVE_S,
) -> FastAPI:
    """The application owns the engine from here on: it stops it when it shuts down.

    metrics: those that the engine tells its steps. beside: what runs for as long as the application does.
    """
    metrics = metrics or Metrics(resolved.model_names[0], replica)
    metrics.watch(engine)
    task = engine.task if resolved.settings.task == "auto" else resolved.settings.task
    service = Service(engine, task, resolved.model_names, resolved.fingerprint, live, Pace(), metrics, keep_alive_s)
    prompts = Prompts(engine)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        with beside or nullcontext():
            yield
        await engine.stop()

    app = FastAPI(
        title="mixtral-serve",
        openapi_url=None,
        lifespan=lifespan,
        middleware=[
            Middleware(AccessLog, answered=metrics.answered),
            Middleware(RequireKey, live=live),  # before the rest, so that a stranger costs nothing
            Middleware(KeyLimit, live=live),
            Middleware(BodyLimit, live=live),
        ],
        exception_handlers={
            ApiError: _api_error,
            HTTPException: _http_exception,
            ClientDisconnect: _client_disconnect,
            Exception: _our_mistake,
        },
    )
    app.include_router(Generation(service, prompts).router())
    app.include_router(Poolers(service, prompts).router())
    app.include_router(Tokenization(service, prompts).router())
    app.include_router(Experts(service, replica).router())
    app.include_router(Status(service, resolved.config(), replica).router())
    return app


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    record_of(request.scope).error = error.code
    return error.response()


async def _http_exception(request: Request, error: Exception) -> Response:
    """The router's own: no such route, or not with this method."""
    assert isinstance(error, HTTPException)
    route = f"{request.method} {request.url.path[:80]}"
    if error.status_code == 404:
        nearest = get_close_matches(request.url.path[:80], PATHS, n=1, cutoff=0.75)
        instead = f"did you mean {nearest[0]}?" if nearest else "GET /openapi.json lists those that there are."
        return ApiError(404, f"There is no route {route}; {instead}", code="route_not_found").response()
    headers = error.headers or {}
    possible = f" is not possible; use {headers['Allow']}" if "Allow" in headers else f": {error.detail}"
    response = ApiError(error.status_code, f"{route}{possible}.").response()
    response.headers.update(headers)
    return response


async def _client_disconnect(_: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_LEFT)


async def _our_mistake(_: Request, error: Exception) -> Response:
    """Starlette raises the error again once this is sent; the server logs it."""
    return internal().response()
