"""What the relay promises at size: the numbers of streams, connections and tries."""

import json
import os
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from relay import Relay

from tornado_relay.publish import open_publisher


def test_1000_streams_on_50_channels_over_4_workers(broker, tmp_path, pages):
    """Every stream gets each event of its channel once and in order; the broker sees one connection a worker."""
    with Relay(tmp_path, "--workers", "4", **broker.environment) as relay:
        opened = pages.open(relay.port, [f"/channel=room-{number % 50}" for number in range(1000)])
        assert Counter(page.status for page in opened) == {200: 1000}
        assert len(broker.listeners()) == 4
        publisher = open_publisher(broker.kind, broker.url)
        for number in range(20):
            for room in range(50):
                publisher.publish(f"room-{room}", json.dumps({"id": number, "data": f"{room}:{number}"}))
        pages.until(lambda: all(len(page.events) >= 20 for page in opened), "all events", seconds=60)
        for index, page in enumerate(opened):
            assert page.data == [f"{index % 50}:{number}" for number in range(20)]


def test_streams_spread_evenly_over_4_workers(redis_server, tmp_path, pages):
    """Of 2,000 streams the busiest worker holds at most 1.25 times those of the quietest."""
    with Relay(tmp_path, "--workers", "4", **redis_server.environment) as relay:
        pages.open(relay.port, ["/channel=spread"] * 2000)
        held = [_streams_of(pid, relay.port) for pid in relay.workers()]
        assert sum(held) == 2000
        assert max(held) <= 1.25 * min(held), held


def test_event_published_as_the_headers_arrive_is_delivered(broker, tmp_path, pages):
    """200 means subscribed: of 2,000 events, each published the moment a stream on a new channel opened, none is missed."""
    publisher = open_publisher(broker.kind, broker.url)
    with Relay(tmp_path, "--workers", "2", **broker.environment) as relay:
        for number in range(2000):
            (page,) = pages.open(relay.port, [f"/channel=instant-{number}"])
            publisher.publish(f"instant-{number}", '{"data":"now"}')
            pages.until(lambda: page.events, f"event {number}")
            pages.close(page)


@pytest.mark.heavy
def test_idle_streams_cost_next_to_nothing(broker, tmp_path, pages):
    """500 idle streams, heartbeats included, take under 2 percent of a core."""
    with Relay(tmp_path, "--workers", "2", **broker.environment) as relay:
        pages.open(relay.port, [f"/channel=idle-{number % 50}" for number in range(500)])
        begin, spent = time.monotonic(), relay.cpu_seconds()
        pages.until(lambda: time.monotonic() - begin > 16, "one heartbeat interval", seconds=30)
        assert (relay.cpu_seconds() - spent) / (time.monotonic() - begin) < 0.02


def test_killed_worker_is_replaced_and_no_connect_is_refused(broker, tmp_path, pages):
    """kill -9 ends the worker's streams only; those that connect meanwhile wait for the new worker, two seconds at most."""
    with Relay(tmp_path, "--workers", "2", **broker.environment) as relay:
        opened = pages.open(relay.port, ["/channel=kill"] * 40)
        victim, survivor = relay.workers()
        lost = _streams_of(victim, relay.port)
        os.kill(victim, signal.SIGKILL)
        again = pages.open(relay.port, ["/channel=kill"] * 40, seconds=2)
        assert Counter(page.status for page in again) == {200: 40}
        assert victim not in relay.workers()
        assert survivor in relay.workers()
        pages.until(lambda: sum(page.closed for page in opened) == lost, "the victim's streams ended")
        broker.publish("kill", "still here")
        alive = [page for page in [*opened, *again] if not page.closed]
        assert len(alive) == 80 - lost
        pages.until(lambda: all(page.events for page in alive), "all others get events")


def test_no_worker_shares_the_others_sockets(redis_server, tmp_path):
    """Each worker listens on one socket of its own; the parent keeps all of them."""
    with Relay(tmp_path, "--workers", "3", **redis_server.environment) as relay:
        assert [len(_listening(pid, relay.port)) for pid in relay.workers()] == [1, 1, 1]
        assert len(_listening(relay.process.pid, relay.port)) == 3


def _sockets(pid, port, state):
    """Inodes of the process's TCP sockets on ``port`` that are in ``state`` (0A listen, 01 established)."""
    table = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    wanted = {row[9] for row in table if int(row[1].partition(":")[2], 16) == port and row[3] == state}
    links = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            links.add(str(link.readlink()))
        except FileNotFoundError:
            continue
    return {inode for inode in wanted if f"socket:[{inode}]" in links}


def _listening(pid, port):
    return _sockets(pid, port, "0A")


def _streams_of(pid, port):
    return len(_sockets(pid, port, "01"))
