"""The process between clients and ranks: an event loop with uvicorn, the tokenizer, and a link to every rank."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import uvicorn

from xccl._binding import check, lib
from xccl.serving.config import ModelConfig
from xccl.serving.http.app import Api
from xccl.serving.http.limits import Limits
from xccl.serving.http.pool import RankPool
from xccl.serving.link import Link
from xccl.serving.report import counted
from xccl.serving.tokenizer import Tokenizer

_GRACE_SECONDS = 1  # for answers that are being written when the server ends


@dataclass(frozen=True)
class FrontSettings:
    """What the front needs to know. ``queue`` bounds the requests that wait beyond the slots of the ranks."""

    model: Path
    model_name: str
    kv_blocks: int | None
    queue: int
    api_key: str | None


def front_main(
    launcher: int, settings: FrontSettings, listener: socket.socket, ends: Sequence[socket.socket], orders: Connection
) -> None:
    """Body of the process: serves until ``orders`` brings the reason to end, then ends the process.

    ``launcher`` is the pid of the process that forked this one, ``ends`` are the sockets to the ranks.
    """
    check(lib.xccl_shm_die_with_parent(launcher))
    # Ctrl-C reaches every process of the terminal; the launcher alone decides what it means
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    code = 0
    try:
        asyncio.run(_serve(settings, listener, ends, orders))
    except BaseException:
        sys.stderr.write(traceback.format_exc())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # the launcher's exit handlers and buffers are not this process's
    os._exit(code)


async def _serve(
    settings: FrontSettings, listener: socket.socket, ends: Sequence[socket.socket], orders: Connection
) -> None:
    config = ModelConfig.load(settings.model / "config.json")
    tokenizer = Tokenizer.load(settings.model / "tokenizer.json", config.eot_token)
    limits = Limits(settings.model_name, config, tokenizer, settings.kv_blocks)
    pool = RankPool([Link(end) for end in ends], settings.queue)
    ended = asyncio.ensure_future(_reason_to_end(orders))
    ready = asyncio.ensure_future(pool.start())
    await asyncio.wait({ended, ready}, return_when=asyncio.FIRST_COMPLETED)
    if not ready.done():
        return
    server = _Server(
        uvicorn.Config(
            Api(pool, limits, config, settings.api_key).app,
            log_level="warning",
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=_GRACE_SECONDS,
            server_header=False,
        )
    )
    serving = asyncio.ensure_future(server.serve([listener]))
    _announce(settings, listener, pool)
    await asyncio.wait({ended, serving}, return_when=asyncio.FIRST_COMPLETED)
    if ended.done():
        orders.send(pool.num_unfinished)
        pool.end(ended.result())
        # the launcher says why all ends; that clients are still connected is no news
        logging.getLogger("uvicorn.error").disabled = True
        server.should_exit = True
    await serving


class _Server(uvicorn.Server):
    """uvicorn without its own meaning of signals: the launcher says when to end."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


async def _reason_to_end(orders: Connection) -> str:
    """Waits for the launcher's word."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(orders, readable.set)
    try:
        await readable.wait()
        return str(orders.recv())
    except EOFError:
        return "its launcher is gone"
    finally:
        loop.remove_reader(orders)


def _announce(settings: FrontSettings, listener: socket.socket, pool: RankPool) -> None:
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    sys.stdout.write(
        f"xccl serve: {settings.model_name} on {counted(len(pool.ranks), 'rank')} at http://{shown}:{port}  "
        "(Ctrl-C ends it)\n"
    )
    sys.stdout.flush()
