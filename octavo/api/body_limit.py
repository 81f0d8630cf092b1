"""No body is read beyond a limit."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class BodyLimit:
    """Middleware that refuses larger bodies with 413, as the app's other errors are told.

    Starlette's own does so in plain text.
    """

    def __init__(self, app: ASGIApp, most: int) -> None:
        """
        Args:
            app: what reads bodies.
            most: bytes of one.
        """
        self._app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        read = 0
        # Servers see to it that this is a number. What is announced need not be read.
        announced = int(dict(scope.get("headers", ())).get(b"content-length", 0))

        async def limited() -> Message:
            nonlocal read
            if announced <= self._most:
                message = await receive()
                read += len(message.get("body", b""))
                if read <= self._most:
                    return message
            raise HTTPException(413, f"The body is larger than {self._most:,} bytes.")

        await self._app(scope, limited, send)
