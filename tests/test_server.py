"""Connections that send no request, or half of one, and those that are one too many."""

import itertools
import re
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

from tornado_relay.waiting import Waiting
from tornado_relay.worker import REQUEST_SECONDS

TOKEN = "p" * 40
HALVES = (
    b"",
    b"G",
    b"GET /channel=x HTTP/1.1\r\nHost: relay\r\n",
    b"GET /channel=x HTTP/1.1\r\nHost: relay\r\nX: " + b"x" * 2000,
    b"POST /channel=x HTTP/1.1\r\nHost: relay\r\nContent-Length: 100\r\n\r\n",
    b"POST /channel=x HTTP/1.1\r\nHost: relay\r\nContent-Length: 100,100\r\n\r\n{",
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
        waiting.add(connection, now, connection.close)
    waiting.discard(connections[0])
    for now, connection in enumerate(connections[2:], 2):
        waiting.add(connection, now, connection.close)
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


@pytest.mark.heavy
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


@pytest.mark.heavy
def test_answers_that_nobody_reads_hold_no_connection(redis_server, tmp_path, narrow):
    """Whoever sends requests and reads nothing makes room for others like all who wait, and is given up in the end."""
    request = b"GET / HTTP/1.1\r\nHost: relay\r\n\r\n" * 2000
    with (
        Relay(tmp_path, "--workers", "1", "--debug", command=narrow, **redis_server.environment) as relay,
        ExitStack() as stack,
    ):
        jammed = []
        for _ in range(100):
            connection = stack.enter_context(socket.socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", relay.port))
            connection.setblocking(False)
            connection.send(request)
            jammed.append(connection)
        assert httpx.get(f"{relay.url}/healthz", timeout=PATIENCE).status_code == 200
        (worker,) = relay.workers()

        def descriptors():
            return len(list(Path(f"/proc/{worker}/fd").iterdir()))

        until(lambda: descriptors() < 64 + 40, "the oldest have made room")
        until(lambda: descriptors() < 40, "the others are given up", REQUEST_SECONDS + PATIENCE)
        assert "Traceback" not in relay.log


@pytest.mark.parametrize("pieces", [[b"", None], [b"GET /chan", b"nel=x HTTP/1.1\r\nHost: relay\r\n", b"\r\n"]])
def test_request_may_come_late_and_in_pieces(redis_server, tmp_path, pages, pieces):
    """It is looked at when it comes, if the connection was taken before; each stream that opens meanwhile says so."""
    whole = b"GET /channel=x HTTP/1.1\r\nHost: relay\r\nAccept: text/event-stream\r\n\r\n"
    with (
        Relay(tmp_path, "--workers", "1", **redis_server.environment) as relay,
        socket.create_connection(("127.0.0.1", relay.port), PATIENCE) as late,
    ):
        for piece in pieces:
            late.sendall(whole if piece is None else piece)
            pages.open(relay.port, ["/channel=x"])
        assert late.recv(4096).startswith(b"HTTP/1.1 200 OK")


# As browsers, Node.js' and Python's EventSource send it, and what a user may make of it.
TAKEN = [
    ("/channel=x", {}),
    ("/channel=caf%C3%A9%20%2B+a/b", {"Last-Event-ID": "é 1"}),
    ("/channel=a?last_event_id=none&channel=b", {"Origin": "https://shop.example", "Cookie": 'a=b; c="d e"'}),
    ("/events?channel=a&channel=b%2Fc&channel=a", {"User-Agent": "x", "X-Empty": "", "Accept-Language": "de,en;q=0.5"}),
    (
        "/events?last_event_id=earliest&channel=x+y",
        {"Authorization": "Basic x", "X-Forwarded-For": "1.2.3.4, 10.0.0.1"},
    ),
]


@pytest.mark.parametrize(("path", "headers"), TAKEN)
def test_short_way_and_long_way_open_the_same_stream(kept, tmp_path, pages, path, headers):
    """A request that is read by us, and the same one with a header that leaves it to Tornado."""
    environment = kept.environment | {"RELAY_TRUSTED_PROXIES": "127.0.0.1", "ALLOWED_ORIGINS": "https://shop.example"}
    with Relay(tmp_path, "--workers", "1", **environment) as relay:
        short, long = pages.open(relay.port, [path], headers) + pages.open(
            relay.port, [path], headers | {"Upgrade": "x"}
        )
        assert (short.status, short.headers.keys()) == (200, long.headers.keys())
        shape = re.compile(rb"retry: \d+")
        pages.until(
            lambda: b"\n\n" in short.body and shape.sub(b"", short.body) == shape.sub(b"", long.body), "the same blocks"
        )
        opened = until(
            lambda: len(said := re.findall(r"stream opened: (.*), request", relay.log)) == 2 and said,
            "both are in the log",
        )
        assert opened[0] == opened[1]


REFUSED = [
    ("/channel=x", {"Origin": "https://evil.example"}, 403),
    ("/channel=x", {"Origin": "null"}, 403),
    ("/channel=%0A", {}, 400),
    ("/channel=%ff", {}, 400),
    ("/events?channel=%ff", {}, 400),
    ("/events?chan=x", {}, 400),
    ("/channel=", {}, 400),
    ("/channel=x?last_event_id=%ff", {}, 400),
    ("/channel=x", {"Content-Length": "5"}, 400),
    ("/channel=x", {"Transfer-Encoding": "chunked"}, 400),
]


@pytest.mark.parametrize(("path", "headers", "status"), REFUSED)
def test_short_way_refuses_nothing_by_itself(redis_server, tmp_path, pages, path, headers, status):
    """Whoever may not have a stream is told why, and by whom it always was."""
    with Relay(
        tmp_path, "--workers", "1", "--allowed-origins", "https://shop.example", **redis_server.environment
    ) as relay:
        page = pages.add(Page(relay.port, path, headers))
        if status == 400 and headers:
            page.socket.send(b"0\r\n\r\n")
        pages.until(lambda: page.status and page.body.endswith(b"\n"), "the answer")
        assert page.status == status
        assert "stream opened" not in relay.log
