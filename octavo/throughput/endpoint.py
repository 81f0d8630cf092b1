"""An OpenAI-compatible server, as it describes itself."""

from __future__ import annotations

import functools
import ssl
from typing import Any, NamedTuple

import httpx2

from octavo.errors import OctavoError, one_line
from octavo.throughput.stream import message_of

_SECONDS = 30.0


class Endpoint(NamedTuple):
    """A server that runs.

    Attributes:
        url: without ``/v1``.
        model: what it calls its model; the first, if it has several.
        engine: what it is, such as ``vllm``; None if it does not say.
        version: the engine's, likewise.
        max_positions: tokens of prompt and output together, at most, likewise.
    """

    url: str
    model: str
    engine: str | None
    version: str | None
    max_positions: int | None


def base_url(url: str) -> str:
    """``url`` without ``/v1``, with which most people write it, and without a final slash."""
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


@functools.cache
def tls() -> ssl.SSLContext:
    """The certificates to trust. Reading them takes longer than all else that a client begins with."""
    return httpx2.create_ssl_context(trust_env=False)


def ask(url: str) -> Endpoint:
    """Ask the server at ``url`` what it is.

    Raises:
        OctavoError: it is not reachable, or not an OpenAI-compatible server.
    """
    # Straight to the server: a proxy would be measured too.
    try:
        with httpx2.Client(base_url=url, timeout=_SECONDS, verify=tls(), trust_env=False) as client:
            models, version = client.get("/v1/models"), client.get("/version")
    except (httpx2.TransportError, httpx2.InvalidURL) as error:
        raise OctavoError(
            f"The server at {url} is not reachable: {one_line(error)}. Expected an "
            "OpenAI-compatible server, such as `octavo serve` starts; check address and port."
        ) from None
    card = _first_model(url, models)
    limit = card.get("max_model_len")
    return Endpoint(
        url=url,
        model=card["id"],
        engine=_text(card.get("owned_by")),
        version=_text(_object(version).get("version")) if version.is_success else None,
        max_positions=limit if isinstance(limit, int) else None,
    )


def _first_model(url: str, response: httpx2.Response) -> dict[str, Any]:
    models = _object(response).get("data")
    card = models[0] if isinstance(models, list) and models else None
    if response.is_success and isinstance(card, dict) and isinstance(card.get("id"), str):
        return card
    raise OctavoError(
        f"{url}/v1/models answered {response.status_code}, {message_of(_object(response) or response.text)!r}. Expected an "
        "OpenAI-compatible server with a model; pass its address without the path."
    )


def _object(response: httpx2.Response) -> dict[str, Any]:
    try:
        value = response.json()
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {}


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
