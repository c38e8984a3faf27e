"""Serves requests that arrive while others run: one rank of a server."""

from __future__ import annotations

import os
import signal
import time
from typing import cast

import numpy as np
from threadpoolctl import threadpool_limits

import xccl
from xccl.errors import XcclError
from xccl.serving.config import ModelConfig
from xccl.serving.engine import Engine
from xccl.serving.exchange import GathersArrays
from xccl.serving.link import Cancel, Command, Link, RankInfo, RankStatus, Submit, Tokens
from xccl.serving.service import BLAS_THREADS, ServiceOptions, build_engine, expert_parallel, slots_of_rank
from xccl.serving.traffic import MeteredTransport
from xccl.serving.transport import ExpertTransport

_STATUS_SECONDS = 0.25


def serve_online(comm: xccl.Communicator, options: ServiceOptions, link: Link) -> None:
    """Serve what comes over ``link`` until the launcher ends this rank. Collective.

    Raises XcclError if the other end of ``link`` closes.
    """
    # Ctrl-C reaches every process of the terminal; the launcher alone decides what it means
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    config = ModelConfig.load(options.model / "config.json")
    parallel = expert_parallel(comm, config, options)
    transport = MeteredTransport(
        cast(ExpertTransport, parallel),
        parallel.expert_map,
        comm.size,
        config.num_moe_layers + options.mtp,
        options.quant,
    )
    slots = slots_of_rank(options.batch, comm.rank, comm.size)
    with threadpool_limits(BLAS_THREADS), np.errstate(over="ignore"):
        engine = build_engine(transport, options, slots, parallel.local_experts)
        link.send(
            RankInfo(
                rank=comm.rank,
                pid=os.getpid(),
                roles=("attention", "expert"),
                slots=slots,
                kv_blocks=engine.num_blocks,
                local_experts=tuple(parallel.local_experts.tolist()),
            )
        )
        OnlineRank(comm, engine, transport, link).run()


class OnlineRank:
    """The loop of one rank: take commands, step, tell the news; sleep while no rank has work.

    All ranks step together, so all must fall asleep after the same step and wake for the same one. Every rank counts
    the requests that it received (their sum: what has arrived) and knows from every command how many the front had
    sent. They sleep if nobody has an unfinished request and all that was sent has arrived. Whatever is sent later
    reaches every rank as a Submit or a Wake, and so ends every rank's sleep, in whatever order the sockets deliver.
    """

    def __init__(self, comm: GathersArrays, engine: Engine, transport: MeteredTransport, link: Link) -> None:
        self._comm = comm
        self._engine = engine
        self._transport = transport
        self._link = link
        self._received = 0
        self._submitted = 0
        self._asleep = True
        self._steps = 0
        self._status_due = 0.0

    def run(self) -> None:
        """Serve until the link closes, which raises XcclError."""
        while True:
            self._take_commands()
            self._step()
            self._tell_status()

    def _take_commands(self) -> None:
        try:
            self._obey(self._link.receive())
            while self._asleep:
                self._link.wait()
                self._obey(self._link.receive())
        except EOFError:
            raise XcclError("the server's front has ended, so nobody reads what this rank generates") from None

    def _obey(self, commands: list[Command]) -> None:
        for command in commands:
            if isinstance(command, Cancel):
                self._engine.cancel(command.request_id)
                continue
            self._asleep = False
            self._submitted = command.submitted
            if isinstance(command, Submit):
                self._received += 1
                self._engine.add([command.request])

    def _step(self) -> None:
        news = self._engine.step()
        self._steps += 1
        if news.request_ids:
            self._link.send(Tokens(news.request_ids, news.tokens.tolist(), news.ended))
        else:
            self._link.flush()
        counts = np.array([self._engine.num_unfinished, self._received, self._submitted], np.int64)
        unfinished, received, submitted = self._comm.all_gather(counts).T
        self._asleep = not unfinished.any() and int(received.sum()) == int(submitted.max())

    def _tell_status(self) -> None:
        now = time.monotonic()
        if now < self._status_due and not self._asleep:
            return
        self._status_due = now + _STATUS_SECONDS
        occupancy = self._engine.occupancy
        self._link.send(
            RankStatus(
                steps=self._steps,
                waiting=occupancy.waiting,
                running=occupancy.running,
                kv_blocks=occupancy.kv_blocks,
                bytes_to=self._transport.bytes_to.tolist(),
                bytes_from=self._transport.bytes_from.tolist(),
                expert_load=self._transport.expert_load.tolist(),
                drafted=self._engine.drafted,
                accepted=self._engine.accepted,
            )
        )
