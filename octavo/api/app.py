"""The routes of the API."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from octavo.api.body_limit import BodyLimit
from octavo.api.errors import ErrorBody, add_error_handlers
from octavo.api.jobs import chat_job, completion_job
from octavo.api.requests import MAX_BODY_BYTES, ChatBody, CompletionBody
from octavo.api.service import Service
from octavo.version import __version__

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": what}
    for status, what in {
        400: "The request is not one that can be answered",
        404: "Another model",
        413: "The body is too large",
        429: "Too many requests wait",
        500: "The engine failed",
        503: "The server is loading or draining",
    }.items()
}
_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {"application/json": {}, "text/event-stream": {}},
        "description": "The answer",
    },
    **_ERRORS,
}
_UNAVAILABLE: dict[int | str, dict[str, Any]] = {503: _ERRORS[503]}


def create_app(service: Service) -> FastAPI:
    """The app that serves a model; it loads it when it starts and closes it when it ends."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.begin()
        yield
        service.close()

    app = FastAPI(
        title="Octavo",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.add_middleware(BodyLimit, most=MAX_BODY_BYTES)
    add_error_handlers(app, service.metrics.count_error)
    _add_description(app, service)
    _add_completions(app, service)
    return app


def _add_description(app: FastAPI, service: Service) -> None:
    """What the server says of itself."""

    @app.get("/health", responses=_UNAVAILABLE)
    async def health() -> dict[str, str]:
        """Whether requests are taken."""
        service.served()
        return {"status": service.state}

    @app.get("/version")
    async def version() -> dict[str, str]:
        """The engine's version."""
        return {"version": __version__}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Counts and times, for Prometheus."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    def card() -> dict[str, Any]:
        served = service.served()
        return {
            "id": served.name,
            "object": "model",
            "created": served.created,
            "owned_by": "octavo",
            "max_model_len": served.max_positions,
        }

    @app.get("/v1/models", responses=_UNAVAILABLE)
    async def models() -> dict[str, Any]:
        """The model."""
        return {"object": "list", "data": [card()]}

    @app.get("/v1/models/{model:path}", responses={404: _ERRORS[404], **_UNAVAILABLE})
    async def model(model: str) -> dict[str, Any]:
        """The model, by its name."""
        service.named(model)
        return card()


def _add_completions(app: FastAPI, service: Service) -> None:
    """What the server is for."""

    @app.post("/v1/completions", responses=_ANSWERS)
    async def completions(body: CompletionBody, http: Request) -> Response:
        """Continue texts."""
        job = await completion_job(service.named(body.model), body)
        return await service.answer(job, http)

    @app.post("/v1/chat/completions", responses=_ANSWERS)
    async def chat(body: ChatBody, http: Request) -> Response:
        """Answer the last message of a conversation."""
        job = await chat_job(service.named(body.model), body)
        return await service.answer(job, http)
