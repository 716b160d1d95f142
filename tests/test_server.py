"""Connections that send no request, or half of one, and those that are one too many."""

import itertools
import resource
import socket
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from pages import Page
from programs import program
from relay import COMMAND, Relay
from servers import PATIENCE, until

from tornado_relay.server import Waiting
from tornado_relay.worker import REQUEST_SECONDS

TOKEN = "p" * 40
HALVES = (
    b"",
    b"G",
    b"GET /channel=x HTTP/1.1\r\nHost: relay\r\n",
    b"GET /channel=x HTTP/1.1\r\nHost: relay\r\nX: " + b"x" * 2000,
    b"POST /channel=x HTTP/1.1\r\nHost: relay\r\nContent-Length: 100\r\n\r\n",
    b"POST /channel=x HTTP/1.1\r\nHost: relay\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
    b"POST /channel=x HTTP/1.1\r\nHost: relay\r\nAuthorization: Bearer "
    + TOKEN.encode()
    + b"\r\nContent-Length: 100\r\n\r\n{",
    b"GET /healthz HTTP/1.1\r\nHost: relay\r\n\r\nGET",
)


class Connection:
    """What `Waiting` holds."""

    def __init__(self):
        self.stream = self
        self.closed = False

    def close(self):
        self.closed = True


def test_oldest_of_those_who_wait_makes_room():
    """Those who have got their request served are not among them."""
    waiting, connections = Waiting(2), [Connection() for _ in range(5)]
    for now, connection in enumerate(connections[:2]):
        waiting.add(connection, now)
    waiting.discard(connections[0])
    for now, connection in enumerate(connections[2:], 2):
        waiting.add(connection, now)
    assert [connection.closed for connection in connections] == [False, True, True, False, False]
    assert [waiting.close_oldest(before) for before in (2, 3, 3, 4, 5)] == [False, True, False, True, False]
    waiting.discard(connections[4])


@pytest.fixture
def descriptors():
    """Let this process have many."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    yield before[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.fixture
def connect():
    """Send half a request on each of ``count`` connections."""
    with ExitStack() as stack:

        def connect(port, count):
            connections = []
            for half in itertools.islice(itertools.cycle(HALVES), count):
                connection = stack.enter_context(socket.create_connection(("127.0.0.1", port), PATIENCE))
                connection.sendall(half)
                connections.append(connection)
            return connections

        yield connect


def ended(connection):
    """Whether the relay has closed it."""
    connection.setblocking(False)
    try:
        while data := connection.recv(65536):
            assert data.startswith(b"HTTP/1.1 ")
        return True
    except BlockingIOError:
        return False
    except OSError:
        return True


def test_thousands_of_half_requests_are_in_nobodys_way(redis_server, tmp_path, pages, descriptors, connect):
    """5,000 wait with half a request; real streams open meanwhile, long before the half ones are given up."""
    assert descriptors > 6000, "the tests need 6,000 descriptors: ulimit -n"
    environment = redis_server.environment | {"RELAY_PUBLISH_TOKEN": TOKEN}
    with Relay(tmp_path, "--workers", "1", **environment) as relay:
        (before,) = pages.open(relay.port, ["/channel=x"])
        half = connect(relay.port, 5000)
        begin = time.monotonic()
        opened = [pages.open(relay.port, ["/channel=x"])[0] for _ in range(50)]
        assert time.monotonic() - begin < REQUEST_SECONDS
        redis_server.publish("x", "event")
        pages.until(lambda: all(page.events for page in [before, *opened]), "the event, by all")
        until(lambda: all(map(ended, half)), "the half ones are given up", REQUEST_SECONDS + PATIENCE)
        assert not before.closed
        assert "Traceback" not in relay.log
        assert httpx.post(f"{relay.url}/channel=x", json={"data": "x"}, headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 202  # fmt: skip


@pytest.fixture
def narrow():
    """A relay may have 200 descriptors a worker."""
    return (program("prlimit"), "--nofile=200", COMMAND)


def test_few_descriptors(redis_server, tmp_path, pages, narrow, connect):
    """Streams that are one too many are refused softly, half requests make room; health answers, nothing is logged of it."""
    with Relay(tmp_path, "--workers", "1", command=narrow, **redis_server.environment) as relay:
        opened = [pages.add(Page(relay.port, "/channel=x")) for _ in range(150)]
        welcome = b": sse-relay-server"
        pages.until(lambda: all(page.closed or page.body.startswith(welcome) for page in opened), "an answer to all")
        taken = [page for page in opened if page.body.startswith(welcome)]
        refused = [page for page in opened if page not in taken]
        assert len(taken) == 200 - 64 - 64
        assert all(page.status == 200 and page.parser.retry for page in refused)
        half = connect(relay.port, 400)
        assert httpx.get(f"{relay.url}/healthz").status_code == 200
        assert "LimitNOFILE" in httpx.get(f"{relay.url}/channel=x").text
        redis_server.publish("x", "event")
        pages.until(lambda: all(page.events for page in taken), "the event, by all")
        pages.close(taken.pop())
        until(lambda: pages.open(relay.port, ["/channel=x"])[0].status == 200, "its descriptor is free")
        assert len([connection for connection in half if not ended(connection)]) <= 64
        assert "Traceback" not in relay.log
        assert "cannot be accepted" not in relay.log


def test_no_descriptor_left(redis_server, tmp_path, pages, connect):
    """Half requests make room for whole ones; where there are only streams, whoever comes waits for one to end."""
    with Relay(tmp_path, "--workers", "1", **redis_server.environment) as relay:
        opened = pages.open(relay.port, ["/channel=x"] * 10)
        (worker,) = relay.workers()
        used = max(int(path.name) for path in Path(f"/proc/{worker}/fd").iterdir())
        subprocess.run([program("prlimit"), f"--pid={worker}", f"--nofile={used + 11}"], check=True)
        connect(relay.port, 40)
        assert httpx.get(f"{relay.url}/healthz").status_code == 200
        opened += pages.open(relay.port, ["/channel=x"] * 10)
        late = pages.add(Page(relay.port, "/channel=x"))
        redis_server.publish("x", "event")
        pages.until(lambda: all(page.events for page in opened), "the event, by all that are open")
        assert late.status is None
        pages.close(opened[0])
        pages.until(lambda: late.status == 200, "its turn")
        assert relay.log.count("cannot be accepted") == 1
        assert "Traceback" not in relay.log
