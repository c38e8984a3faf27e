"""A real server of two ranks, spoken to by plain HTTP."""

import json
import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from serving.http.server import JSON, Server, children, cpu_seconds, exists

from xccl.cli import main

QUEUE = 200
SLOTS = 4


@pytest.fixture(scope="module")
def server(tiny_model):
    with Server(tiny_model, "-n", "2", "--batch", str(SLOTS), "--queue", str(QUEUE)) as running:
        yield running


@pytest.fixture(scope="module")
def small(tiny_model, tmp_path_factory):
    """Two slots, room for two more, and a key."""
    key = tmp_path_factory.mktemp("key") / "key"
    key.write_text("se\u00e7ret\n")
    arguments = ["-n", "2", "--batch", "2", "--queue", "2", "--api-key", f"@{key}"]
    with Server(tiny_model, *arguments) as running:
        running.client = httpx.Client(
            base_url=running.url, timeout=60, headers={"Authorization": "Bearer se\u00e7ret".encode()}
        )
        yield running


def test_the_text_is_that_of_xccl_serve_with_check(server, tiny_model, tmp_path, capfd):
    path = tmp_path / "out.json"
    arguments = ["--model", str(tiny_model), "--prompt", "abc", "--prompt", "de", "--seed", "7", "--max-tokens", "40"]
    assert main(["serve", *arguments, "--temperature", "0.9", "--top-p", "0.9", "--check", "--json", str(path)]) == 0
    expected = [request["text"] for request in json.loads(path.read_text())["requests"]]
    capfd.readouterr()
    sampling = {"seed": 7, "max_tokens": 40, "temperature": 0.9, "top_p": 0.9}
    answer = server.post(prompt=["abc", "de"], **sampling).json()
    assert [choice["text"] for choice in answer["choices"]] == expected
    assert server.text("abc", **sampling) == expected[0]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]


def test_a_seed_gives_the_same_text_whatever_else_runs(server):
    def ask(seed):
        return server.text("In the beginning", seed=seed, max_tokens=30)

    alone = {seed: ask(seed) for seed in range(6)}
    assert len(set(alone.values())) > 1
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda number: (number % 6, ask(number % 6)), range(24)))
    assert all(text == alone[seed] for seed, text in together)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_stream_is_the_whole_answer_in_pieces(server, path):
    ask = {"prompt": "abc"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "abc"}]}
    sampling = {"seed": 3, "max_tokens": 50, "n": 3, "temperature": 1.5}
    whole = server.post(path, **ask, **sampling).json()
    events = server.events(path, **ask, **sampling, stream_options={"include_usage": True})
    assert events[-1]["choices"] == []
    assert events[-1]["usage"] == whole["usage"]
    assert all(event["usage"] is None for event in events[:-1])
    assert len({event["id"] for event in events}) == 1
    for index, choice in enumerate(whole["choices"]):
        chunks = [c for event in events[:-1] for c in event["choices"] if c["index"] == index]
        if path == "/v1/completions":
            assert "".join(chunk["text"] for chunk in chunks) == choice["text"]
        else:
            assert chunks[0]["delta"] == {"role": "assistant", "content": ""}
            assert chunks[-1]["delta"] == {}
            assert "".join(c["delta"].get("content", "") for c in chunks) == choice["message"]["content"]
        reasons = [chunk["finish_reason"] for chunk in chunks]
        assert reasons == [None] * (len(chunks) - 1) + [choice["finish_reason"]]
    assert whole["usage"]["total_tokens"] == whole["usage"]["prompt_tokens"] + whole["usage"]["completion_tokens"]


def test_a_stream_without_the_option_has_no_usage(server):
    assert not any("usage" in event for event in server.events(prompt="a", max_tokens=3))


def test_stop_strings_cut_the_text(server):
    ask = {"seed": 1, "max_tokens": 200, "temperature": 1.0}
    text = server.text("abc", **ask)
    stop = text[10:12]
    end = min(text.index(stop), text.index("\n") if "\n" in text else len(text))
    answer = server.post(prompt="abc", stop=[stop, "\n"], **ask).json()
    assert answer["choices"][0]["text"] == text[:end]
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] < 40
    streamed = server.events(prompt="abc", stop=[stop, "\n"], **ask)
    assert "".join(event["choices"][0]["text"] for event in streamed) == text[:end]


def test_nothing_is_generated_long_after_a_stop(server):
    ask = {"prompt": "abc", "max_tokens": 200, "temperature": 0}
    stop = server.text(**ask)[5:8]
    before = server.wait_until_idle()["generated"]
    answer = server.post(n=100, stop=stop, **ask).json()
    assert all(choice["finish_reason"] == "stop" for choice in answer["choices"])
    after = server.wait_until_idle()["generated"]
    assert after - before < 100 * 100


def test_the_end_of_the_context_is_a_length(server):
    answer = server.post("/v1/chat/completions", messages=[{"role": "user", "content": "x" * 230}], seed=5).json()
    assert answer["choices"][0]["finish_reason"] in ("length", "stop")
    assert answer["usage"]["total_tokens"] <= 256


def test_models_health_and_what_is_not_there(server):
    models = server.client.get("/v1/models").json()
    assert [model["id"] for model in models["data"]] == [server.model]
    assert server.client.get(f"/v1/models/{server.model}").json()["object"] == "model"
    assert server.client.get("/v1/models/other").json()["error"]["code"] == "model_not_found"
    assert server.client.get("/health").json()["status"] == "ok"
    assert "<textarea" in server.client.get("/").text
    for method, path, status in (("GET", "/v1/completions", 405), ("POST", "/v1/nothing", 404), ("GET", "/x", 404)):
        response = server.client.request(method, path)
        assert response.status_code == status
        assert path in response.json()["error"]["message"]
    assert server.client.get("/../../engine.py").status_code == 404


@pytest.mark.parametrize(
    ("headers", "content", "status", "said"),
    [
        ({}, b"{}", 400, "expected application/json"),
        ({"Content-Type": "text/plain"}, b"{}", 400, "expected application/json"),
        (JSON, b"{", 400, "the body is not JSON"),
        (JSON, b"{}", 400, "model is missing"),
        (JSON, b" " * (1 << 20) + b"{}", 413, "longer than 1048576 bytes"),
    ],
)
def test_bad_bodies(server, headers, content, status, said):
    response = server.client.post("/v1/completions", headers=headers, content=content)
    assert response.status_code == status
    assert said in response.json()["error"]["message"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    fields=st.dictionaries(
        st.sampled_from(["prompt", "n", "stop", "seed", "temperature", "max_tokens", "stream", "messages", "odd"]),
        st.none()
        | st.booleans()
        | st.integers(-3, 300)
        | st.floats()
        | st.text(max_size=9)
        | st.lists(st.integers(-1, 300)),
        max_size=4,
    ),
    chat=st.booleans(),
)
def test_any_request_gets_an_answer_or_a_reason(server, fields, chat):
    path = "/v1/chat/completions" if chat else "/v1/completions"
    body = json.dumps({"model": server.model, "max_tokens": 2, "prompt": "a", **fields}).encode()
    response = server.client.post(path, headers=JSON, content=body)
    assert response.status_code in (200, 400)
    if response.status_code == 400:
        assert response.json()["error"]["message"]


def hang_up(server, path="/v1/completions", read=False, **fields):
    """Send a request, wait for the first bytes if asked, and close the connection."""
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps({"model": server.model, **fields}).encode()
    with socket.create_connection((host, int(port))) as connection:
        head = (
            f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        connection.sendall(head.encode() + body)
        if read:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        else:
            while not server.state()["unfinished"]:
                time.sleep(0.01)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_its_slots_and_its_place_in_the_queue(server, stream):
    before = server.wait_until_idle()["generated"]
    hang_up(server, read=stream, prompt="abc", n=100, max_tokens=250, stream=stream)
    after = server.wait_until_idle()["generated"]
    assert after - before < 100 * 100
    assert server.text("abc", seed=1, max_tokens=3) == server.text("abc", seed=1, max_tokens=3)


def test_half_a_request_harms_nobody(server):
    host, port = server.url.removeprefix("http://").split(":")
    for part in (
        b"",
        b"POST",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: 50\r\nContent-Type: application/json\r\n\r\n{",
    ):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(part)
    assert server.client.get("/health").status_code == 200


def test_ranks_without_requests_sleep(server):
    steps = [rank["steps"] for rank in server.wait_until_idle()["ranks"]]
    used = sum(map(cpu_seconds, server.pids()))
    time.sleep(0.5)
    assert sum(map(cpu_seconds, server.pids())) - used <= 0.02
    assert [rank["steps"] for rank in server.state()["ranks"]] == steps


def test_metrics_are_prometheus_and_count(server):
    def samples():
        families = text_string_to_metric_families(server.client.get("/metrics").text)
        return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}

    before = samples()
    usage = server.post(prompt="abc", n=2, max_tokens=5).json()["usage"]
    assert server.post(prompt="abc", n=0).status_code == 400
    server.wait_until_idle()
    after = samples()

    def grown(*key):
        return after[key] - before.get(key, 0)

    assert grown("xccl_requests_total", "answered") == 1
    assert grown("xccl_requests_total", "refused") == 1
    assert grown("xccl_tokens_total", "generated") == usage["completion_tokens"]
    assert grown("xccl_tokens_total", "prompt") == usage["prompt_tokens"] == 4
    assert grown("xccl_time_to_first_token_seconds_count") == 2
    assert after["xccl_kv_blocks_used", "0"] == after["xccl_requests_running", "1"] == 0
    assert grown("xccl_expert_bytes_total", "0", "1") > 0
    assert len(after) < 70


def test_the_picture_adds_up(server):
    server.text("abc" * 20, max_tokens=20)
    state = server.wait_until_idle()
    assert [rank["roles"] for rank in state["ranks"]] == [["attention", "expert"]] * 2
    assert sorted(expert for rank in state["ranks"] for expert in rank["experts"]) == list(range(6))
    assert list(state["expert_load"]) == ["layer 1", "layer 2", "MTP"]
    # every token takes two experts of each layer: float32 rows come back from each, to the rank of the token
    load = sum(sum(layer) for layer in state["expert_load"].values())
    rows_back = load * 32 * 4
    assert rows_back < sum(map(sum, state["bytes"])) <= rows_back + load * (32 + 4)


def test_overload_is_429_until_there_is_room(small):
    hold = {"prompt": "abc", "n": 4, "max_tokens": 250, "seed": 1}
    with small.client.stream("POST", "/v1/completions", json={"model": small.model, "stream": True, **hold}) as held:
        assert held.status_code == 200
        refused = small.post(prompt="x")
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["Retry-After"]) <= 60
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert sum(1 for _ in held.iter_lines()) > 4
    small.wait_until_idle()
    assert small.post(prompt="x", max_tokens=1).status_code == 200
    too_many = small.post(prompt="x", n=5)
    assert (too_many.status_code, too_many.json()["error"]["param"]) == (400, "n")


@pytest.mark.parametrize("key", [None, "", "Bearer", "Bearer wrong", "Basic se\u00e7ret"])
def test_a_key_guards_the_api(small, key):
    headers = {} if key is None else {"Authorization": key.encode()}
    with httpx.Client(base_url=small.url) as stranger:
        for method, path in (("POST", "/v1/completions"), ("POST", "/v1/chat/completions"), ("GET", "/v1/models")):
            response = stranger.request(method, path, headers=headers, json={})
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
        assert stranger.get("/health").status_code == stranger.get("/").status_code == 200
        assert stranger.get("/state").json()["needs_key"]


def open_requests(server, count=3):
    """Streams that have begun, and one answer that is waited for, each read to its end by a thread of its own."""
    pool = ThreadPoolExecutor(count + 1)
    ask = {"model": server.model, "prompt": "abc", "n": 100, "max_tokens": 250}

    def read(stream):
        try:
            with httpx.Client(base_url=server.url, timeout=60) as client:
                response = client.post("/v1/completions", json={**ask, "stream": stream})
                return response.status_code, response.text
        except httpx.HTTPError as error:
            return 0, repr(error)

    futures = [pool.submit(read, number < count) for number in range(count + 1)]
    while server.state()["unfinished"] < 100 * (count + 1):
        time.sleep(0.01)
    pool.shutdown(wait=False)
    return futures


@pytest.fixture
def victim(tiny_model):
    with Server(tiny_model, "-n", "3", "--batch", "6", "--queue", "500") as running:
        running.processes = [*running.pids(), *children(running.process.pid), running.process.pid]
        yield running
    assert not any(map(exists, running.processes))


def test_a_killed_rank_ends_the_server_by_its_name_and_all_clients_are_told(victim):
    futures = open_requests(victim)
    os.kill(victim.pids()[1], signal.SIGKILL)
    code, error = victim.wait()
    assert code == 1
    assert error.count("\n") == 1
    assert "rank 1 (pid " in error
    assert "was killed by SIGKILL" in error
    *streams, whole = [future.result(60) for future in futures]
    assert whole[0] == 503
    for text in (whole[1], *(text.strip().split("\n\n")[-1].removeprefix("data: ") for _, text in streams)):
        told = json.loads(text)["error"]
        assert told["type"] == "server_error"
        assert "rank 1 (pid " in told["message"]


def test_a_rank_killed_while_all_sleep_ends_the_server(victim):
    os.kill(victim.pids()[2], signal.SIGKILL)
    code, error = victim.wait()
    assert code == 1
    assert "rank 2 (pid " in error


def test_a_killed_front_ends_the_server(victim):
    front = set(children(victim.process.pid)) - set(victim.pids())
    assert len(front) == 1
    open_requests(victim, 1)
    os.kill(front.pop(), signal.SIGKILL)
    code, error = victim.wait()
    assert code == 1
    assert "the HTTP process" in error
    assert "SIGKILL" in error


def test_a_killed_launcher_leaves_nobody(victim):
    open_requests(victim, 1)
    victim.process.kill()
    assert victim.wait()[0] == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while any(map(exists, victim.processes)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_all_with_one_message(victim, number, expected):
    futures = open_requests(victim)
    os.kill(victim.pids()[0], signal.SIGSTOP)  # even if a rank does not run
    code, error = victim.end(number)
    assert code == expected
    assert error == f"xccl serve: stopped by {number.name}, 400 unfinished requests told\n"
    for status, text in [future.result(60) for future in futures]:
        assert status in (200, 503)
        assert f"stopped by {number.name}" in text


def test_a_client_that_does_not_read_holds_nobody_up(victim):
    host, port = victim.url.removeprefix("http://").split(":")
    body = json.dumps({"model": victim.model, "prompt": "a", "n": 20, "max_tokens": 250, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        connection.connect((host, int(port)))
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        while not victim.state()["unfinished"]:
            time.sleep(0.01)
        assert victim.text("abc", seed=1, max_tokens=20)
        victim.wait_until_idle(60)
        assert victim.end(signal.SIGTERM) == (143, "xccl serve: stopped by SIGTERM\n")


def test_a_signal_while_all_sleep(victim):
    code, error = victim.end(signal.SIGINT)
    assert (code, error) == (130, "xccl serve: stopped by SIGINT\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--http", "0", "--prompt", "x"], "--prompt and --http exclude each other"),
        (["--http", "0", "--check", "--json", "f"], "--check, --json and --http exclude each other"),
        (["--http", "0", "--host", "nowhere.invalid"], "cannot listen at nowhere.invalid port 0"),
        (["--http", "0", "--api-key", ""], "--api-key is empty"),
        (["--http", "0", "--api-key", "@/no/such/file"], "cannot read the key from /no/such/file"),
        (["--http", "0", "--model", "/no/such/model"], "model folder /no/such/model has no config.json"),
    ],
)
def test_wrong_arguments(arguments, said, capfd):
    assert main(["serve", *arguments]) == 2
    assert said in capfd.readouterr().err


def test_a_port_that_is_taken(server, capfd):
    port = server.url.rpartition(":")[2]
    assert main(["serve", "--http", port]) == 2
    assert f"cannot listen at 127.0.0.1 port {port}: Address already in use" in capfd.readouterr().err


@pytest.mark.parametrize("port", ["-1", "65536", "x"])
def test_no_port(port, capfd):
    with pytest.raises(SystemExit):
        main(["serve", "--http", port])
    assert "expected a port from 0 to 65535" in capfd.readouterr().err
