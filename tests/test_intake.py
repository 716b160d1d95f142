"""Publishing over HTTP, on a running relay and both brokers."""

import json
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from pages import got
from relay import Relay, run
from servers import PATIENCE, PostgresServer, RedisServer, until

TOKEN = "p" * 40
BEARER = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture(scope="module", params=["postgres", "redis"])
def relay(request, tmp_path_factory):
    server = request.getfixturevalue(f"{request.param}_server")
    home = tmp_path_factory.mktemp("intake")
    with Relay(home, "--workers", "1", **server.environment, RELAY_PUBLISH_TOKEN=TOKEN) as running:
        yield running


def post(relay, path, body, headers=BEARER):
    content = body if isinstance(body, bytes) else json.dumps(body)
    return httpx.post(f"{relay.url}{path}", content=content, headers=headers, timeout=PATIENCE)


def test_event_arrives(relay, pages, channel):
    """By either address of a channel, with all its fields, as notify() sends it."""
    (page,) = pages.open(relay.port, [f"/channel={channel}"])
    first = post(
        relay, f"/channel={channel}", {"event": "NEW", "id": 7, "data": {"a": "ü"}, "retry": 5, "comment": "c"}
    )
    assert (first.status_code, first.content) == (202, b"")
    assert post(relay, f"/{channel}", {"data": "2"}).status_code == 202
    assert post(relay, f"/events?channel={channel}", {"data": "3"}).status_code == 202
    got(pages, page, '{"a":"ü"}', "2", "3")
    assert (page.events[0].event, page.events[0].id, page.parser.retry) == ("NEW", "7", 5)


def test_event_goes_into_the_history(kept, tmp_path, pages, channel):
    """It is on the path of notify(): kept, with a size of its own on PostgreSQL as well."""
    with Relay(tmp_path, "--workers", "1", **kept.environment, RELAY_PUBLISH_TOKEN=TOKEN) as relay:
        until(lambda: "the history is at" in relay.log, "the history is set up")
        large = "x" * 500_000
        for data in ("1", large, "3"):
            assert post(relay, f"/channel={channel}", {"data": data, "id": data[:5]}).status_code == 202
        (page,) = pages.open(relay.port, [f"/channel={channel}?last_event_id=1"])
        got(pages, page, large, "3")


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": TOKEN},
        {"Authorization": f"Basic {TOKEN}"},
        {"Authorization": f"Bearer {TOKEN}x"},
        {"Authorization": f"Bearer {TOKEN[:-1]}"},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer ü".encode()},
        {"Cookie": f"relay_token={TOKEN}"},
    ],
)
def test_without_the_token_nothing_is_sent(relay, pages, channel, headers):
    """Whatever else there is; the answer shows nothing of it."""
    (page,) = pages.open(relay.port, [f"/channel={channel}"])
    refused = post(relay, f"/channel={channel}?token={TOKEN}", {"data": "no"}, headers)
    assert refused.status_code == 401
    assert refused.headers["WWW-Authenticate"] == "Bearer"
    assert "Authorization: Bearer" in refused.json()["error"]
    post(relay, f"/channel={channel}", {"data": "yes"})
    got(pages, page, "yes")
    assert TOKEN not in refused.text + relay.log


@pytest.mark.parametrize(
    ("body", "status", "field", "said"),
    [
        (b"", 400, None, "not JSON"),
        (b"{", 400, None, "not JSON"),
        (b"\xff", 400, None, "not JSON"),
        (b"[" * 100_000, 400, None, "not JSON"),
        (b'{"data": NaN}', 400, None, "NaN"),
        (b"[]", 400, None, "not list"),
        (b'"text"', 400, None, "not str"),
        ({}, 400, None, "empty"),
        ({"data": "x", "more": 1}, 400, "more", "unknown key 'more'"),
        ({"event": "a\nb"}, 400, "event", "event['event']"),
        ({"id": "a\0"}, 400, "id", "event['id']"),
        ({"id": 1.5}, 400, "id", "whole number"),
        ({"data": "x", "retry": -1}, 400, "retry", "milliseconds"),
        ({"comment": 1}, 400, "comment", "must be text"),
        ({"data": "x", "sep": ";"}, 400, "sep", "must be"),
        (b'{"data": "\\ud800"}', 400, "data", "surrogate"),
        (b'{"data": "' + b"x" * 1_048_576 + b'"}', 413, None, "1048576 bytes"),
    ],
)
def test_event_that_cannot_be_sent_is_told_why(relay, pages, channel, body, status, field, said):
    """In JSON that names the field; nothing is sent."""
    (page,) = pages.open(relay.port, [f"/channel={channel}"])
    refused = post(relay, f"/channel={channel}", body)
    assert refused.status_code == status
    assert refused.headers["Content-Type"] == "application/json"
    assert said in refused.json()["error"]
    assert refused.json().get("field") == field
    post(relay, f"/channel={channel}", {"data": "next"})
    got(pages, page, "next")
    assert "Traceback" not in relay.log


@pytest.mark.parametrize(("path", "said"), [("/events", "no channel"), ("/channel=%0A", "control"), ("/events?channel=a&channel=b", "2 channels")])  # fmt: skip
def test_wrong_channel_is_told(relay, path, said):
    """As for a stream."""
    refused = post(relay, path, {"data": "x"})
    assert refused.status_code == 400
    assert said in refused.json()["error"]


def test_event_over_the_brokers_limit_is_a_413(postgres_server, tmp_path, channel):
    """Without a history PostgreSQL takes 7,999 bytes: limit, size and way out are named."""
    with Relay(tmp_path, "--workers", "1", **postgres_server.environment, RELAY_PUBLISH_TOKEN=TOKEN) as relay:
        refused = post(relay, f"/channel={channel}", {"data": "x" * 9000})
        assert refused.status_code == 413
        assert "9,011 bytes" in refused.json()["error"]
        assert "7,999" in refused.json()["error"]
        assert "init-db" in refused.json()["error"]


@pytest.fixture
def held_up(home, tmp_path, pages, channel):
    """A relay, a page, and the answer to a publisher who waits since Redis stands still, beside the page's heartbeats."""
    folder = home / f"intake-{channel}"
    folder.mkdir(mode=0o755)
    server = RedisServer(folder)
    try:
        flags = ("--workers", "1", "--heartbeat", "1")
        with (
            Relay(tmp_path, *flags, **server.environment, RELAY_PUBLISH_TOKEN=TOKEN) as relay,
            ThreadPoolExecutor(1) as executor,
        ):
            (page,) = pages.open(relay.port, [f"/channel={channel}"])
            server.process.send_signal(signal.SIGSTOP)
            try:
                answer = executor.submit(post, relay, f"/channel={channel}", {"data": "late"})
                beats = page.body.count(b"\n:")
                pages.until(lambda: page.body.count(b"\n:") > beats + 2, "heartbeats")
                assert not answer.done()
                yield server, relay, page, answer
            finally:
                server.process.send_signal(signal.SIGCONT)
    finally:
        server.stop()


def test_event_is_answered_for_while_the_worker_ends(held_up):
    """By 503, if it is not known whether the broker has it: never by 500."""
    _, relay, _, answer = held_up
    relay.signal(signal.SIGTERM)
    assert answer.result().status_code == 503
    assert "Traceback" not in relay.log


def test_body_that_is_too_large_is_not_read(relay, channel):
    """The answer comes before it is sent."""
    with socket.create_connection(("127.0.0.1", relay.port)) as connection:
        head = f"POST /channel={channel} HTTP/1.1\r\nHost: x\r\nContent-Length: {10**12}\r\n"
        connection.sendall(f"{head}Authorization: Bearer {TOKEN}\r\n\r\n".encode())
        connection.settimeout(10)
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize("size", [10, 2_000_000, 20_000_000])
def test_who_may_not_publish_is_told_whatever_the_size(relay, channel, size):
    """Also a client that sends all before it reads, as most do; with 20 MB it is told by the head alone."""
    with socket.create_connection(("127.0.0.1", relay.port)) as connection:
        connection.settimeout(20)
        connection.sendall(f"POST /channel={channel} HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n\r\n".encode())
        if size < 8 * 2**20:
            connection.sendall(b"x" * size)
        assert connection.recv(100).startswith(b"HTTP/1.1 401 ")


@pytest.mark.parametrize("length", ["1000001", "1000001, 1000001", "0" * 25 + "1000001"])
def test_body_of_a_stranger_takes_no_memory(relay, channel, length):
    """60 MB that are sent by those who may not publish leave the worker as it was, in whatever form they say so."""

    def resident():
        (worker,) = relay.workers()
        (line,) = [line for line in Path(f"/proc/{worker}/status").read_text().splitlines() if "VmRSS" in line]
        return int(line.split()[1]) * 1024

    before = resident()
    with ExitStack() as stack:
        for _ in range(60):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", relay.port)))
            head = f"POST /channel={channel} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n"
            connection.sendall(head.encode() + b"x" * 1_000_000)
        assert post(relay, f"/channel={channel}", {"data": "x"}).status_code == 202
        assert resident() - before < 30_000_000


@pytest.mark.parametrize(("method", "status"), [("GET", 400), ("HEAD", 400), ("OPTIONS", 400), ("PUT", 405)])
def test_other_methods_have_no_body(relay, channel, method, status):
    """It would be read for nothing; a length of 0 is none."""
    assert httpx.request(method, f"{relay.url}/channel={channel}", content=b"x").status_code == status
    refused = httpx.request(method, f"{relay.url}/healthz", content=iter([b"x"]))
    assert refused.status_code == status
    if method == "HEAD":
        assert (
            httpx.request(method, f"{relay.url}/channel={channel}", headers={"Content-Length": "0"}).status_code == 200
        )


@pytest.mark.parametrize("server_class", [PostgresServer, RedisServer])
def test_broker_that_is_away_is_a_503(server_class, home, tmp_path, channel):
    """With a time to come back after; and when it is back, events go on."""
    folder = home / f"intake-{channel}"
    folder.mkdir(mode=0o755)
    server = server_class(folder)
    try:
        with Relay(tmp_path, "--workers", "1", **server.environment, RELAY_PUBLISH_TOKEN=TOKEN) as relay:
            assert post(relay, f"/channel={channel}", {"data": "x"}).status_code == 202
            server.stop("immediate")
            refused = post(relay, f"/channel={channel}", {"data": "x"})
            assert refused.status_code == 503
            assert refused.headers["Retry-After"] == "1"
            assert "error" in refused.json()
            server.start()
            until(lambda: post(relay, f"/channel={channel}", {"data": "x"}).status_code == 202, "it is back")
            assert "Traceback" not in relay.log
    finally:
        server.stop("immediate")


def test_streams_go_on_while_the_broker_takes_its_time(held_up, pages):
    """A publish that waits, here for a server that stands still, holds no loop: a stream has its heartbeats."""
    server, _, page, answer = held_up
    server.process.send_signal(signal.SIGCONT)
    assert answer.result().status_code == 202
    got(pages, page, "late")


def test_publishing_is_off_without_a_token(broker, tmp_path, channel):
    """404, with what to set; a token that cannot be one stops the start, and is not shown."""
    with Relay(tmp_path, "--workers", "1", **broker.environment) as relay:
        refused = post(relay, f"/channel={channel}", {"data": "x"})
        assert refused.status_code == 404
        assert "RELAY_PUBLISH_TOKEN" in refused.json()["error"]
    done = run("--port", "0", cwd=tmp_path, **broker.environment, RELAY_PUBLISH_TOKEN="with a blank")
    assert done.returncode == 2
    assert "RELAY_PUBLISH_TOKEN: the value is no bearer token" in done.stderr
    assert "with a blank" not in done.stderr


def test_pages_of_other_origins_may_not_publish(broker, tmp_path, channel):
    """Not even with the token, and no preflight allows POST."""
    environment = broker.environment | {"RELAY_PUBLISH_TOKEN": TOKEN, "ALLOWED_ORIGINS": "https://shop.example"}
    with Relay(tmp_path, "--workers", "1", **environment) as relay:
        refused = post(relay, f"/channel={channel}", {"data": "x"}, BEARER | {"Origin": "https://evil.example"})
        assert refused.status_code == 403
        preflight = httpx.options(f"{relay.url}/channel={channel}", headers={"Origin": "https://shop.example"})
        assert "POST" not in preflight.headers["Access-Control-Allow-Methods"]
