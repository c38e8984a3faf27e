"""Runs `xccl serve --http` as users do, for tests."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

JSON = {"Content-Type": "application/json"}


class Server:
    """A server of its own on a free port; ends with the `with` block."""

    def __init__(self, model: Path | None, *arguments: str, seconds: int = 170) -> None:
        command = [sys.executable, "-m", "xccl", "serve", "--http", "0", "--timeout", str(seconds), *arguments]
        if model is not None:
            command += ["--model", str(model)]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        line = self.process.stdout.readline()
        found = re.search(r"xccl serve: (\S+) on (\d+) ranks? at (http://\S+)", line)
        if not found:
            self.process.kill()
            raise AssertionError(f"{line}\n{self.process.communicate()[1]}")
        self.model, self.url = found[1], found[3]
        self.client = httpx.Client(base_url=self.url, timeout=60)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        if self.process.poll() is None:
            self.process.terminate()
        self.process.communicate(timeout=20)

    def post(self, path: str = "/v1/completions", **fields: Any) -> httpx.Response:
        return self.client.post(path, json={"model": self.model, **fields})

    def text(self, prompt: str, **fields: Any) -> str:
        """The text of one completion."""
        response = self.post(prompt=prompt, **fields)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]["text"]

    def events(self, path: str = "/v1/completions", **fields: Any) -> list[Any]:
        """The events of a stream; the last must be [DONE]."""
        response = self.post(path, stream=True, **fields)
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [event.removeprefix("data: ") for event in response.text.split("\n\n")]
        assert events[-2:] == ["[DONE]", ""], events[-3:]
        return [json.loads(event) for event in events[:-2]]

    def state(self) -> dict[str, Any]:
        return self.client.get("/state").json()

    def pids(self) -> list[int]:
        """Of the ranks."""
        return [rank["pid"] for rank in self.state()["ranks"]]

    def wait_until_idle(self, seconds: float = 30) -> dict[str, Any]:
        """The state when no rank has a request or a KV block; fails if that never comes."""
        deadline = time.monotonic() + seconds
        while True:
            state = self.state()
            busy = [rank for rank in state["ranks"] if rank["running"] or rank["waiting"] or rank["kv_blocks_used"]]
            if not busy and not state["unfinished"]:
                return state
            assert time.monotonic() < deadline, busy
            time.sleep(0.02)

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Send a signal, to all processes if it is that of Ctrl-C; returns exit code and standard error."""
        if number == signal.SIGINT:
            os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)
        return self.wait()

    def wait(self) -> tuple[int, str]:
        """Exit code and standard error, when it has ended."""
        error = self.process.communicate(timeout=20)[1]
        return self.process.returncode, error


def children(pid: int) -> list[int]:
    """Processes that a process has started."""
    listing = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in listing.split()]


def exists(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def cpu_seconds(pid: int) -> float:
    """Processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
