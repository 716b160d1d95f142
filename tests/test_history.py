"""Streams over the losses that history is for: on real servers, with real signals, while events are published."""

import os
import random
import signal
import socket
import time
from contextlib import ExitStack, suppress

import psycopg2
import pytest
from fleet import Fleet, Numbers
from outages import Proxy, end_listeners
from pages import Pages
from redis.exceptions import RedisError
from relay import Relay, run
from servers import PostgresServer, RedisServer, standing_still, until
from storm import CHANNELS, EVENTS, difference, kept_events, storm


@pytest.fixture
def server(request, home, channel, tmp_path):
    """A broker of the test's own, of the kind in ``request.param``, that keeps a history where it is asked to."""
    folder = home / f"kept-{channel}"
    folder.mkdir(mode=0o755)
    if request.param == "postgres":
        server = PostgresServer(folder, log_statement="none")
    else:
        server = RedisServer(folder, persistent=True)
    try:
        if request.param == "postgres":
            assert run("init-db", cwd=tmp_path, **server.environment).returncode == 0
        yield server
    finally:
        server.stop("immediate")


both = pytest.mark.parametrize("server", ["postgres", "redis"], indirect=True)
redis = pytest.mark.parametrize("server", ["redis"], indirect=True)


def only_once(stream):
    return stream.connections == 1


@both
def test_workers_are_killed(server, tmp_path):
    """kill -9 of random workers, ten times."""

    def disturb(relays, fleets):
        for _ in range(10):
            time.sleep(0.4)
            for relay in relays:
                os.kill(random.choice(until(relay.workers, "workers")), signal.SIGKILL)

    fleets = storm(server, tmp_path, disturb, untouched=only_once)
    assert any(stream.connections > 2 for stream in fleets[0].streams)


@both
def test_reload(server, tmp_path):
    """SIGHUP, five times."""

    def disturb(relays, fleets):
        for times in range(1, 6):
            for relay in relays:
                relay.signal(signal.SIGHUP)
            for relay in relays:
                until(lambda relay=relay, times=times: relay.log.count(" reloaded") == times, "reloaded", 60)

    storm(server, tmp_path, disturb, untouched=only_once)


@both
def test_relay_stops_and_starts(server, tmp_path):
    """The whole relay, as in an upgrade; another one takes its port."""
    with ExitStack() as stack:

        def disturb(relays, fleets):
            for relay, history in zip(list(relays), ("100000", "0"), strict=True):
                assert relay.stop() == 0
                stack.enter_context(
                    Relay(tmp_path, "--workers", "2", "--history", history, port=relay.port, **server.environment)
                )

        storm(server, tmp_path, disturb)


@both
@pytest.mark.parametrize("how", ["cut off", "fast", "immediate", pytest.param("stopped", marks=pytest.mark.heavy)])
def test_broker_goes_away(server, tmp_path, how):
    """Sessions ended by pg_terminate_backend or CLIENT KILL, restarts with the data, and a server that stands still for 20 s."""

    def disturb(relays, fleets):
        if how == "cut off":
            for _ in range(5):
                time.sleep(0.5)
                end_listeners(server)
        elif how == "stopped":
            with standing_still(*server.processes()):
                time.sleep(20)
        else:
            server.stop(how)
            server.start()
        until(lambda: len(listeners(server)) == 4, "all workers are back", 40)

    storm(server, tmp_path, disturb)


@redis
def test_redis_throws_its_readers_out(server, tmp_path):
    """They stand still while it has more for them than client-output-buffer-limit allows."""

    def disturb(relays, fleets):
        overflow(server, relays)
        until(lambda: len(listeners(server)) == 4, "all workers are back", 40)

    storm(server, tmp_path, disturb)


@pytest.mark.heavy
@both
def test_network_is_cut(server, tmp_path):
    """Not a packet for 30 s, in either direction: noticed by a probe, not after the kernel's two hours."""
    with Proxy(server.port) as proxy:
        url = server.url.replace(f":{server.port}/", f":{proxy.port}/")

        def disturb(relays, fleets):
            proxy.freeze()
            for relay in relays:
                until(lambda relay=relay: relay.log.count("is not reachable") >= 2, "both workers notice", 28)
            time.sleep(2)
            proxy.thaw()
            until(lambda: len(listeners(server)) >= 4, "all workers are back", 40)

        storm(server, tmp_path, disturb, environment=dict.fromkeys(server.environment, url))


@both
def test_stream_that_leaves_one_relay_goes_on_at_the_other(server, tmp_path, channel):
    """Two relays on one broker, and streams that take turns between them."""
    with (
        Relay(tmp_path, "--workers", "1", "--history", "100000", **server.environment) as one,
        Relay(tmp_path, "--workers", "1", "--history", "100000", **server.environment) as other,
        Fleet([f"/channel={name}" for name in CHANNELS for _ in range(10)], one.port, other.port) as fleet,
    ):
        numbers = Numbers(server, CHANNELS, EVENTS)
        numbers.start()
        while numbers.is_alive():
            fleet.step()
            (stream,) = random.sample(fleet.streams, 1)
            if stream.page.status and not stream.page.closed:
                with suppress(OSError):  # its end may have come already, unread
                    stream.page.socket.shutdown(socket.SHUT_RDWR)
            numbers.enough.set()
        truth = {name: kept_events(server, name) for name in CHANNELS}
        expected = [(stream, truth[stream.path.removeprefix("/channel=")]) for stream in fleet.streams]
        fleet.until(lambda: all(stream.got[-1:] == kept[-1:] for stream, kept in expected), "the last event")
        for stream, kept in expected:
            assert stream.got == kept, difference(stream, kept)
            assert not stream.resets
        assert max(stream.connections for stream in fleet.streams) > 3


def listeners(server):
    """The relays' sessions, asked for in a way that a server that is not back yet does not fail."""
    try:
        return server.listeners()
    except (psycopg2.Error, ConnectionError, RedisError):
        return []


def overflow(server, relays):
    """Let Redis find its readers too slow: they stand still while it has more for them than it may keep."""
    server.client.config_set("client-output-buffer-limit", "pubsub 1mb 0 0")
    with Pages() as pages:
        for relay in relays:
            pages.open(relay.port, ["/channel=flood"] * 16)  # some of them on each worker
        workers = [pid for relay in relays for pid in relay.workers()]
        for pid in workers:
            os.kill(pid, signal.SIGSTOP)
        try:
            for _ in range(64):  # the kernel's buffers take some
                server.publish("flood", "x" * 1_000_000)
            assert not server.listeners()
        finally:
            for pid in workers:
                os.kill(pid, signal.SIGCONT)
