"""Many clients at once against `xccl serve --http`: no error but the announced ones, and nothing leaks.

    python tests/load_http.py --clients 200 --rounds 10 --seed 1

Clients ask for texts of mixed lengths, whole or streamed, greedy or sampled; one in ten hangs up at some moment, one in
ten sends what must be refused. A client that is told 429 tries again. Each text must be the one that the same
request always gets. Between rounds the server must be empty, and its processes, descriptors and memory as before.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parent))
from serving.http.server import Server, children

SLOTS = 16
QUEUE = 100
PROMPTS = ("In the beginning", "a", "And it came to pass in those days, that there went out a decree " * 2)
LENGTHS = (1, 5, 20, 100)
REFUSED: tuple[tuple[dict[str, Any], int], ...] = (
    ({"temperature": 7}, 400),
    ({"prompt": None}, 400),
    ({"prompt": "x" * 5000}, 400),
    ({"prompt": [[1, 2], ["a"]]}, 400),
    ({"n": 100000}, 400),
    ({"stop": [""]}, 400),
    ({"odd": 1}, 400),
    ({"model": "other"}, 404),
    ({"user": "x" * (1 << 20)}, 413),
)
# what the allocator may keep from the largest moment so far, a process
MEMORY_SLACK_BYTES = 24 << 20


@dataclass
class Tally:
    """What happened. `problems` must stay empty."""

    counts: Counter[str] = field(default_factory=Counter)
    texts: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def check_text(self, ask: dict[str, Any], text: str) -> None:
        key = json.dumps({name: ask[name] for name in ("prompt", "seed", "max_tokens", "temperature")})
        if self.texts.setdefault(key, text) != text:
            self.problems.append(f"two texts for {key}: {self.texts[key]!r} and {text!r}")


async def client(http: httpx.AsyncClient, model: str, seed: int, tally: Tally) -> None:
    """One client's requests: one, of a random kind."""
    rng = random.Random(seed)
    ask = {
        "model": model,
        "prompt": rng.choice(PROMPTS),
        "max_tokens": rng.choice(LENGTHS),
        "temperature": rng.choice([0, 1.0]),
        "seed": rng.randrange(3),
    }
    kind = rng.choices(["text", "hang up", "refused", "look"], [75, 10, 10, 5])[0]
    try:
        if kind == "refused":
            wrong, status = rng.choice(REFUSED)
            response = await http.post("/v1/completions", json={**ask, **wrong})
            if response.status_code != status or not response.json()["error"]["message"]:
                tally.problems.append(f"{str(wrong)[:60]}: {response.status_code} {response.text[:200]}")
        elif kind == "look":
            response = await http.get(rng.choice(["/state", "/metrics", "/health", "/"]))
            response.raise_for_status()
        elif kind == "hang up":
            await hang_up(http, ask, rng)
        else:
            await read_text(http, ask, rng, tally)
    except httpx.HTTPError as error:
        tally.problems.append(f"{kind}: {error!r}")
    tally.counts[kind] += 1


async def read_text(http: httpx.AsyncClient, ask: dict[str, Any], rng: random.Random, tally: Tally) -> None:
    """A text, whole or in pieces, until there is room for it."""
    stream = rng.random() < 0.6
    while True:
        response = await http.post("/v1/completions", json={**ask, "stream": stream})
        if response.status_code != 429:
            break
        tally.counts["told 429"] += 1
        if not 1 <= int(response.headers["Retry-After"]) <= 60:
            tally.problems.append(f"Retry-After {response.headers['Retry-After']}")
        await asyncio.sleep(rng.uniform(0.1, 0.5))  # less patient than they were asked to be
    if response.status_code != 200:
        tally.problems.append(f"{response.status_code}: {response.text[:200]}")
    elif stream:
        *events, done, rest = response.text.split("\n\n")
        if (done, rest) != ("data: [DONE]", ""):
            tally.problems.append(f"a stream ends with {done!r} {rest!r}")
        pieces = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
        tally.check_text(ask, "".join(piece["text"] for piece in pieces))
    else:
        tally.check_text(ask, response.json()["choices"][0]["text"])


async def hang_up(http: httpx.AsyncClient, ask: dict[str, Any], rng: random.Random) -> None:
    """Go away: while waiting for a whole answer, or in the middle of a stream."""
    ask = {**ask, "max_tokens": 100, "n": 2, "stream": rng.random() < 0.5}
    if not ask["stream"]:
        request = asyncio.ensure_future(http.post("/v1/completions", json=ask))
        await asyncio.sleep(rng.uniform(0, 0.3))
        request.cancel()
        await asyncio.wait({request})
        return
    async with http.stream("POST", "/v1/completions", json=ask) as response:
        left = rng.randrange(4)
        async for _ in response.aiter_lines():
            left -= 1
            if left < 0:
                break


async def play(server: Server, clients: int, seed: int, tally: Tally) -> None:
    """One round: all clients at once."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=server.url, limits=limits, timeout=120) as http:
        await asyncio.gather(*(client(http, server.model, seed * 100_000 + each, tally) for each in range(clients)))


@dataclass(frozen=True)
class Footprint:
    """What the server's processes hold: descriptors and bytes of private memory, by process."""

    descriptors: dict[int, int]
    memory: dict[int, int]


def footprint(server: Server) -> Footprint:
    pids = [server.process.pid, *children(server.process.pid)]
    return Footprint(
        {pid: len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in pids}, {pid: private_bytes(pid) for pid in pids}
    )


def private_bytes(pid: int) -> int:
    """Memory that a process alone holds."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"process {pid} has no RssAnon")


def leaks(before: Footprint, after: Footprint) -> list[str]:
    """What has grown."""
    found = []
    if before.memory.keys() != after.memory.keys():
        found.append(f"processes: {sorted(before.memory)} became {sorted(after.memory)}")
    for pid in before.memory.keys() & after.memory.keys():
        if after.descriptors[pid] > before.descriptors[pid]:
            found.append(f"process {pid}: {before.descriptors[pid]} descriptors became {after.descriptors[pid]}")
        if after.memory[pid] > before.memory[pid] + MEMORY_SLACK_BYTES:
            found.append(f"process {pid}: {before.memory[pid]} bytes became {after.memory[pid]}")
    return found


def run(server: Server, clients: int, rounds: int, seed: int) -> Tally:
    """All rounds; the first one shows how much the server needs."""
    tally = Tally()
    before = None
    for number in range(rounds):
        asyncio.run(play(server, clients, seed + number, tally))
        state = server.wait_until_idle(60)
        now = footprint(server)
        if before is not None:
            tally.problems += leaks(before, now)
        before = before or now
        sys.stderr.write(
            f"round {number}: {dict(tally.counts)}, {state['generated']} tokens, "
            f"{sum(now.memory.values()) >> 20} MiB, {len(tally.problems)} problems\n"
        )
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with Server(None, "-n", str(args.ranks), "--batch", str(SLOTS), "--queue", str(QUEUE), seconds=3600) as server:
        tally = run(server, args.clients, args.rounds, args.seed)
    for problem in tally.problems:
        sys.stdout.write(f"{problem}\n")
    sys.stdout.write(f"{len(tally.problems)} problems in {sum(tally.counts.values())} requests\n")
    return 1 if tally.problems else 0


if __name__ == "__main__":
    sys.exit(main())
