"""A relay or a Redis whose clock is set while it runs, by libfaketime: what lasts, lasts as long as it should."""

import json
import socket
from contextlib import closing

import pytest
from clock import Clock
from outages import Proxy
from pages import come_back, data_of, got, resets
from redis_group import Member
from relay import Relay, watched
from servers import PATIENCE, old_redis_binary, until

from tornado_relay import subscribe_token
from tornado_relay.publish import open_publisher

SECRET = "s" * 32


class ClockedRedis(Member):
    """A Redis with a clock of its own. It is the wheel's, because libfaketime does not work with jemalloc."""

    def __init__(self, folder, *options, **more):
        folder.mkdir(mode=0o755)
        self.clock = Clock(folder)
        super().__init__(folder / "data", *options, binary=old_redis_binary(), **more)

    def command(self):
        return ["env", *(f"{name}={value}" for name, value in self.clock.environment.items()), *super().command()]


@pytest.fixture
def clocked(home, channel):
    """Make such servers, and end them."""
    made = []

    def make(*options, **more):
        made.append(ClockedRedis(home / f"{channel}-clocked-{len(made)}", *options, **more))
        return made[-1]

    yield make
    for each in made:
        each.end()


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


class Kept:
    """A Redis with its clock, behind an address, whose events are kept for four seconds."""

    def __init__(self, server, proxy, channel):
        self.server = server
        self.key = f"sse-relay:events:{channel}"
        self.channel = channel
        self.environment = {"REDIS_URL": f"redis://127.0.0.1:{proxy.port}", "RELAY_HISTORY": "100"}
        self.publisher = open_publisher("redis", self.environment["REDIS_URL"])

    def publish(self, data):
        self.publisher.publish(self.channel, json.dumps({"data": data}))

    def wait_until_expired(self):
        until(lambda: not self.server.client.exists(self.key), "the events have expired")


def pruned(pages, relay, channel, last_event_id):
    """Come back, and be told that events have expired."""
    back = come_back(pages, relay, channel, last_event_id)
    pages.until(lambda: resets(back), "an answer")
    assert resets(back) == [{"reason": "pruned-id", "channels": [channel]}]
    return back


@pytest.mark.parametrize("how", ["is set back", "is behind after a restart", "is behind on the successor"])
def test_expired_events_are_announced_if_the_clock_of_redis(clocked, tmp_path, pages, channel, how):
    """Numbers are ahead of the time then, for an hour. A page whose channel lost nothing is not told."""
    server = clocked(persistent=True)
    server.clock.set("+1h")
    if how == "is behind on the successor":
        successor = clocked("--replicaof", "127.0.0.1", str(server.port), "--repl-diskless-sync-delay", "0")
    with Proxy(server.port) as proxy:
        kept = Kept(server, proxy, channel)
        flags = ("--workers", "1", "--history-seconds", "4")
        with Relay(tmp_path, *flags, **kept.environment) as relay, closing(kept.publisher):
            (page,) = pages.open(relay.port, [f"/channel={channel}"])
            kept.publish("0")
            got(pages, page, "0")
            if how == "is set back":
                server.clock.set("+0")
            elif how == "is behind after a restart":
                server.stop()
                server.clock.set("+0")
                server.start()
            else:
                until(lambda: successor.client.xlen(kept.key) == 1, "the successor has all")
                successor.client.replicaof("NO", "ONE")
                kept.server = successor
                proxy.lead_to(successor.port)
            if how != "is set back":
                until(lambda: relay.log.count("Redis connected") == 2, "the relay is back", 40)
            kept.publish("1")
            got(pages, page, "0", "1")
            place = page.events[-1].id
            assert int(place.partition("-")[2]) / 1e6 > kept.server.client.time()[0] + 3000
            kept.publish("2")
            kept.wait_until_expired()
            pruned(pages, relay, channel, place)
            kept.publish("3")
            got(pages, pruned(pages, relay, channel, place), "3")
            # Events that are still kept are no reason to tell anybody.
            kept.publish("4")
            pages.until(lambda: data_of(page)[-1:] == ["4"], "the event")
            last = page.parser.last_event_id
            kept.publish("5")
            (back, quiet) = (come_back(pages, relay, name, last) for name in (channel, f"{channel}-quiet"))
            got(pages, back, "5")
            assert not resets(back)
            assert not resets(quiet)


def test_events_that_expired_while_the_clock_of_redis_was_ahead_are_announced(clocked, tmp_path, pages, channel):
    """For a moment only, in which no event came. By the right time they would still be there."""
    server = clocked()
    with Proxy(server.port) as proxy:
        kept = Kept(server, proxy, channel)
        flags = ("--workers", "1", "--history-seconds", "1000")
        with Relay(tmp_path, *flags, **kept.environment) as relay, closing(kept.publisher):
            (page,) = pages.open(relay.port, [f"/channel={channel}"])
            kept.publish("1")
            kept.publish("2")
            got(pages, page, "1", "2")
            before = int(server.client.hget("sse-relay:history", "seq"))
            server.clock.set("+1h")
            kept.wait_until_expired()
            until(
                lambda: int(server.client.hget("sse-relay:history", "seq")) > before + 3 * 10**9, "a look at the time"
            )
            server.clock.set("+0")
            pruned(pages, relay, channel, page.events[0].id)
