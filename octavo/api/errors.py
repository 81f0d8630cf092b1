"""Errors as OpenAI's clients expect them: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from octavo.api.requests import KINDS_OF_PROMPTS

_TYPES = {
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}
_RETRY_SECONDS = "1"


class ErrorInfo(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorInfo


class ApiError(Exception):
    """A request that is not answered as asked.

    Attributes:
        status: of the HTTP response.
        param: the parameter it is about.
        code: a word for programs.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


def error_body(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """The JSON object of an error."""
    kind = _TYPES.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    headers: Any = None,
) -> JSONResponse:
    """The answer that tells an error."""
    if status in (429, 503):
        headers = {"Retry-After": _RETRY_SECONDS}
    return JSONResponse(error_body(status, message, param, code), status, headers)


def add_error_handlers(app: FastAPI, on_error: Callable[[str, int], None]) -> None:
    """Have every error of an app told in that shape.

    Args:
        app: the app.
        on_error: called with the path and the status of each.
    """

    @app.exception_handler(ApiError)
    async def told(request: Request, error: ApiError) -> JSONResponse:
        on_error(request.url.path, error.status)
        return error_response(error.status, str(error), error.param, error.code)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        on_error(request.url.path, 400)
        return error_response(400, *_explain(error.errors()))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        on_error(request.url.path, error.status_code)
        return error_response(error.status_code, str(error.detail), headers=error.headers)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        on_error(request.url.path, 500)
        return error_response(500, "The server failed at this request; its log has the details.")


def _explain(errors: Sequence[Any]) -> tuple[str, str | None]:
    """The first thing that is wrong with a body, and the parameter it is about."""
    first = errors[0]
    place = [str(part) for part in first["loc"][1:] if part not in KINDS_OF_PROMPTS]
    if first["type"] == "json_invalid":
        return f"The body is not JSON: {first['ctx']['error']}.", None
    if not place:
        return f"The body: {first['msg']}. Expected a JSON object, and its content type.", None
    param = ".".join(place)
    if first["type"] == "extra_forbidden":
        return f"This server has no parameter {param}. Leave it out.", param
    message = first["msg"].removeprefix("Value error, ")
    return f"{param}: {message}.", param
