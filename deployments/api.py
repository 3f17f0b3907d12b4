"""The HTTP application around one engine. Knows no ray: tests give it an engine that follows a script."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect

from deployments.auth import Keys, RequireKey
from deployments.body import BodyLimit
from deployments.errors import ApiError, internal
from deployments.generation import Generation
from deployments.resolve import Resolved
from deployments.serving import Engine
from deployments.status import Status

KEEP_ALIVE_S = 10.0  # a comment in streams where nothing comes, so that nobody between takes them for dead


def create_app(
    engine: Engine, resolved: Resolved, keys: Keys, *, replica: str = "local", keep_alive_s: float = KEEP_ALIVE_S
) -> FastAPI:
    """The application owns the engine from here on: it stops it when it shuts down."""
    names, limits = resolved.model_names, resolved.settings.limits

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await engine.stop()

    app = FastAPI(
        title="mixtral-serve",
        openapi_url=None,
        lifespan=lifespan,
        middleware=[
            Middleware(RequireKey, keys=keys),  # first, so that a stranger costs nothing
            Middleware(BodyLimit, max_bytes=limits.max_body_bytes),
        ],
        exception_handlers={
            ApiError: _api_error,
            HTTPException: _http_exception,
            ClientDisconnect: _client_disconnect,
            Exception: _our_mistake,
        },
    )
    app.include_router(Generation(engine, names, limits, keep_alive_s).router())
    app.include_router(Status(engine, names, resolved.config(), keys, replica).router())
    return app


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _http_exception(request: Request, error: Exception) -> Response:
    """The router's own: no such route, or not with this method."""
    assert isinstance(error, HTTPException)
    route = f"{request.method} {request.url.path[:80]}"
    if error.status_code == 404:
        return ApiError(404, f"There is no route {route}.", code="route_not_found").response()
    response = ApiError(error.status_code, f"{route}: {error.detail}.").response()
    response.headers.update(error.headers or {})
    return response


async def _client_disconnect(_: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _our_mistake(_: Request, error: Exception) -> Response:
    """Starlette raises the error again once this is sent; the server logs it."""
    return internal().response()
