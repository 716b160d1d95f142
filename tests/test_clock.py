"""A relay whose machine's clock is set while it runs, by libfaketime: what lasts, lasts as long as it should."""

import socket

import pytest
from clock import Clock
from relay import Relay, watched
from servers import PATIENCE, until

from tornado_relay import subscribe_token

SECRET = "s" * 32


@pytest.fixture
def clock(tmp_path):
    return Clock(tmp_path)


@pytest.mark.parametrize("jump", ["-1h", "+1h"])
def test_streams_go_on_when_the_clock_is_set(broker, tmp_path, clock, pages, channel, jump):
    """Heartbeats come, events come, nothing expires, and no worker counts as stuck."""
    environment = broker.environment | clock.environment | {"RELAY_JWT_SECRET": SECRET}
    flags = ("--heartbeat", "1", "--max-stream-seconds", "1000", "--compression", "off")
    with watched(tmp_path, *flags, workers=1, **environment) as relay:
        token = subscribe_token([channel], ttl=1000, key=SECRET)
        (page,) = pages.open(relay.relay.port, [f"/channel={channel}?token={token}"])
        half = socket.create_connection(("127.0.0.1", relay.relay.port), PATIENCE)
        half.sendall(b"GET /healthz HTTP/1.1\r\n")
        until(lambda: relay.metrics()["sse_relay_connections_waiting", "0"] == 1, "half a request")
        workers = relay.relay.workers()
        clock.set(jump)
        beats = page.body.count(b":\n")
        pages.until(lambda: page.body.count(b":\n") >= beats + 3, "three heartbeats")
        broker.publish(channel, "still there")
        pages.until(lambda: page.data == ["still there"], "an event")
        half.sendall(b"Host: relay\r\n\r\n")
        assert half.recv(100).startswith(b"HTTP/1.1 200")
        half.close()
        assert relay.metrics()["sse_relay_worker_up", "0"] == 1
        assert relay.relay.workers() == workers
        # By the new time a token that ended is one that ended.
        (late,) = pages.open(relay.relay.port, [f"/channel={channel}?token={token}"])
        assert late.status == (401 if jump == "+1h" else 200)
        assert relay.metrics()["sse_relay_loop_lag_seconds_sum",] < 100


def test_clock_of_the_test_is_set(tmp_path, clock, redis_server):
    """The relay tells the time that it has been told."""
    with Relay(tmp_path, **redis_server.environment | clock.environment) as relay:

        def year():
            with socket.create_connection(("127.0.0.1", relay.port), PATIENCE) as connection:
                connection.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
                head = connection.recv(1000).decode()
            return int(head.partition("Date: ")[2].split()[3])

        before = year()
        clock.set("-730d")
        until(lambda: year() == before - 2, "another year")
