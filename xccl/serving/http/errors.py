"""Refusals and failures in the format of OpenAI's API."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse


class ApiError(Exception):
    """What a client is told instead of a text.

    ``param`` names the parameter that is wrong, ``code`` is for programs; both as OpenAI has them where it has them.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers
        self.body: dict[str, Any] = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.body, self.status, self.headers)


def server_failed(reason: str) -> ApiError:
    """The server cannot finish what it had begun."""
    return ApiError(f"the server ends: {reason}", status=503, kind="server_error", code="server_ended")


def overloaded(waiting: int, retry_after: int) -> ApiError:
    """The queue is full; ``retry_after`` in seconds."""
    return ApiError(
        f"{waiting} requests are waiting already: try again in about {retry_after} s",
        status=429,
        kind="rate_limit_error",
        code="rate_limit_exceeded",
        headers={"Retry-After": str(retry_after)},
    )
