"""The routes of the server."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from xccl.serving.config import ModelConfig
from xccl.serving.http.answers import DONE, Answer, ChatAnswer, CompletionAnswer, event, usage
from xccl.serving.http.errors import ApiError
from xccl.serving.http.generation import Finish, Generation
from xccl.serving.http.limits import Job, Limits
from xccl.serving.http.metrics import CONTENT_TYPE, Metrics
from xccl.serving.http.pool import RankPool
from xccl.serving.http.schema import ChatRequest, CompletionRequest, parse

_PAGE = Path(__file__).parent / "page"
_MAX_BODY_BYTES = 1 << 20
_HUNG_UP = 499  # nobody reads it; logs of other servers use this number


class Api:
    """Everything that the server answers. :attr:`app` is the ASGI application."""

    def __init__(self, pool: RankPool, limits: Limits, config: ModelConfig, api_key: str | None) -> None:
        self._pool = pool
        self._limits = limits
        self._api_key = api_key
        self._created = int(time.time())
        self._metrics = Metrics(pool, config)
        self.app = Starlette(
            routes=[
                Route("/v1/completions", self._completions, methods=["POST"]),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/v1/models", self._models),
                Route("/v1/models/{name:path}", self._model),
                Route("/health", self._health),
                Route("/metrics", self._exposition),
                Route("/state", self._state),
                Route("/", _page("index.html")),
                Route("/page.css", _page("page.css")),
                Route("/page.js", _page("page.js")),
            ],
            exception_handlers={ApiError: _refuse, HTTPException: _refuse_http, Exception: _refuse_bug},
        )

    async def _completions(self, request: Request) -> Response:
        return await self._text(
            request, lambda body: self._limits.completion(parse(CompletionRequest, body)), CompletionAnswer
        )

    async def _chat(self, request: Request) -> Response:
        return await self._text(request, lambda body: self._limits.chat(parse(ChatRequest, body)), ChatAnswer)

    async def _text(
        self, request: Request, check: Callable[[bytes], Job], wording: Callable[[str], Answer]
    ) -> Response:
        try:
            self._authorise(request)
            job = check(await _body(request))
            generation = Generation(self._pool, job, self._limits.tokenizer, self._metrics.note_text)
        except ApiError:
            self._metrics.note_request("refused")
            raise
        run = _Run(generation, job, wording(self._limits.model), self._metrics)
        if job.stream:
            return _EventStream(run)
        return await run.whole(request)

    async def _models(self, request: Request) -> Response:
        self._authorise(request)
        return JSONResponse({"object": "list", "data": [self._describe_model()]})

    async def _model(self, request: Request) -> Response:
        self._authorise(request)
        self._limits.check_model(request.path_params["name"])
        return JSONResponse(self._describe_model())

    async def _health(self, request: Request) -> Response:
        if self._pool.failure is not None:
            return self._pool.failure.response()
        return JSONResponse({"status": "ok", "ranks": len(self._pool.ranks), "unfinished": self._pool.num_unfinished})

    async def _exposition(self, request: Request) -> Response:
        return Response(self._metrics.exposition(), headers={"Content-Type": CONTENT_TYPE})

    async def _state(self, request: Request) -> Response:
        picture = {"model": self._limits.model, "context": self._limits.max_tokens, **self._metrics.picture()}
        return JSONResponse({**picture, "needs_key": self._api_key is not None})

    def _describe_model(self) -> dict[str, Any]:
        return {"id": self._limits.model, "object": "model", "created": self._created, "owned_by": "xccl"}

    def _authorise(self, request: Request) -> None:
        """Raises ApiError unless the request carries the key, if the server has one."""
        if self._api_key is None:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not secrets.compare_digest(
            key.strip().encode("latin-1"),  # the bytes that came
            self._api_key.encode(),
        ):
            raise ApiError(
                "this server wants its key: send the header  Authorization: Bearer KEY",
                status=401,
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )


class _Run:
    """A generation on its way to one client; counted once, however it ends."""

    def __init__(self, generation: Generation, job: Job, answer: Answer, metrics: Metrics) -> None:
        self._generation = generation
        self._job = job
        self._answer = answer
        self._metrics = metrics
        self._outcome: str | None = None

    async def whole(self, request: Request) -> Response:
        """The answer in one, or nothing if the client hangs up first."""
        texts = asyncio.ensure_future(self._collect())
        gone = asyncio.ensure_future(_hang_up(request))
        try:
            await asyncio.wait({texts, gone}, return_when=asyncio.FIRST_COMPLETED)
            return texts.result() if texts.done() else Response(status_code=_HUNG_UP)
        finally:
            texts.cancel()
            gone.cancel()
            self.close()

    async def events(self) -> AsyncIterator[bytes]:
        """The answer as server-sent events; a failure is one of them."""
        # every chunk has the field if the client asked for the counts, as OpenAI has it
        more: dict[str, Any] = {"usage": None} if self._job.include_usage else {}
        try:
            for chunk in self._answer.beginning(len(self._job.prompts)):
                yield event(chunk | more)
            async for piece in self._generation.pieces():
                for chunk in self._answer.piece(piece):
                    yield event(chunk | more)
        except ApiError as error:
            self._outcome = "failed"
            yield event(error.body)
            return
        if self._job.include_usage:
            yield event(self._answer.chunk([]) | {"usage": self._usage()})
        self._outcome = "answered"
        yield DONE

    def close(self) -> None:
        """Free what still runs, and count the request."""
        self._generation.close()
        self._metrics.note_request(self._outcome or "hung_up", self._job.num_prompt_tokens, self._generation.num_tokens)

    async def _collect(self) -> Response:
        texts = ["" for _ in self._job.prompts]
        finishes: list[Finish] = ["length" for _ in texts]
        try:
            async for piece in self._generation.pieces():
                texts[piece.index] += piece.text
                finishes[piece.index] = piece.finish_reason or "length"
        except ApiError as error:
            self._outcome = "failed"
            return error.response()
        self._outcome = "answered"
        return JSONResponse(self._answer.whole(texts, finishes, self._usage()))

    def _usage(self) -> dict[str, int]:
        return usage(self._job.num_prompt_tokens, self._generation.num_tokens)


class _EventStream(StreamingResponse):
    """Sends a run's events; when the client hangs up, or anything else ends it, the run is closed."""

    def __init__(self, run: _Run) -> None:
        super().__init__(run.events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._run = run

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it all."""
        try:
            await super().__call__(scope, receive, send)
        except ClientDisconnect:
            pass
        finally:
            self._run.close()


def _page(name: str) -> Callable[[Request], Awaitable[Response]]:
    async def send(request: Request) -> Response:
        return FileResponse(_PAGE / name)

    return send


async def _body(request: Request) -> bytes:
    """The body of a request. Raises ApiError unless it is JSON by its header and of bounded size."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(f"Content-Type is {kind or 'missing'}, expected application/json")
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if len(body) > _MAX_BODY_BYTES:
                raise ApiError(f"the body is longer than {_MAX_BODY_BYTES} bytes", status=413)
    except ClientDisconnect:
        raise ApiError("the client hung up before its request was complete", status=_HUNG_UP) from None
    return bytes(body)


async def _hang_up(request: Request) -> None:
    """Returns when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _refuse(request: Request, error: Exception) -> Response:
    if not isinstance(error, ApiError):
        raise error
    return error.response()


async def _refuse_http(request: Request, error: Exception) -> Response:
    """No such page, or not with this method."""
    status = getattr(error, "status_code", 404)
    message = f"{request.method} {request.url.path}: {getattr(error, 'detail', 'not found')}"
    return ApiError(message, status=status, headers=getattr(error, "headers", None)).response()


async def _refuse_bug(request: Request, error: Exception) -> Response:
    return ApiError(f"the server failed: {type(error).__name__}", status=500, kind="server_error").response()
