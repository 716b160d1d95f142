"""What makes it fast, counted and not timed: the system calls of a worker (benchmarks measure the rest)."""

import re
import signal
import subprocess
from collections import Counter
from contextlib import contextmanager

import pytest
import redis
from programs import program
from relay import Relay
from servers import until

STREAMS = 200


@pytest.fixture
def relay(redis_server, tmp_path):
    """Nothing else happens in it meanwhile: no heartbeat, and a log that says nothing."""
    flags = ("--workers", "1", "--heartbeat", "3600", "--log-level", "INFO")
    with Relay(tmp_path, *flags, **redis_server.environment) as running:
        yield running


@contextmanager
def counted(relay, home):
    """Count the system calls of the worker by name; what is yielded is complete when the block has ended."""
    (worker,) = relay.workers()
    log = home / "strace.log"
    command = [program("strace"), "-f", "-o", log, "-p", str(worker)]
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    if "attached" not in (said := tracer.stderr.readline()):
        tracer.kill()
        tracer.communicate()
        pytest.skip(f"this machine lets us trace no process: {said}")
    calls = Counter()
    try:
        until(lambda: log.exists() and "epoll_wait" in log.read_text(), "it is traced")
        begin = len(log.read_text())
        yield calls
    finally:
        tracer.send_signal(signal.SIGINT)
        tracer.communicate()
    calls.update(re.findall(r"^\d+ +(\w+)\(", log.read_text()[begin:], re.MULTILINE))


def writes(calls):
    return calls["sendto"] + calls["sendmsg"] + calls["write"] + calls["writev"]


def test_event_is_one_write_a_stream(relay, redis_server, tmp_path, pages):
    """And next to nothing beside it: no poll, no task, no timer of a stream's own."""
    opened = pages.open(relay.port, ["/channel=x"] * STREAMS)
    with counted(relay, tmp_path) as calls:
        redis_server.publish("x", "event")
        pages.until(lambda: all(page.events for page in opened), "the event, by all")
    assert STREAMS <= calls["sendto"] < STREAMS + 5  # the thread that reads from Redis wakes the loop by one
    assert sum(calls.values()) < STREAMS + 60, calls


def test_events_that_wait_are_one_write_a_stream(relay, redis_server, tmp_path, pages):
    """A hundred that Redis sends at once are a few writes, not a hundred."""
    opened = pages.open(relay.port, ["/channel=x"] * STREAMS)
    pipeline = redis.Redis(port=redis_server.port).pipeline(transaction=False)
    for number in range(100):
        pipeline.publish("x", str(number))
    with counted(relay, tmp_path) as calls:
        pipeline.execute()
        pages.until(lambda: all(len(page.events) == 100 for page in opened), "all events, by all")
    assert calls["sendto"] <= 5 * STREAMS, calls


def test_channels_of_a_stream_are_one_round_trip(relay, redis_server, pages):
    """One SUBSCRIBE for all that are new."""

    def sent():
        return redis_server.client.info("commandstats").get("cmdstat_subscribe", {"calls": 0})["calls"]

    before = sent()
    pages.open(relay.port, ["/events?" + "&".join(f"channel=c{number}" for number in range(50))])
    assert sent() == before + 1


def test_stream_opens_in_a_few_calls(relay, tmp_path, pages):
    """Taken, looked at, read, watched, written to; the log's line; a share of the loop's turns."""
    pages.open(relay.port, ["/channel=x"])
    with counted(relay, tmp_path) as calls:
        pages.open(relay.port, ["/channel=x"] * STREAMS)
    assert calls["accept4"] >= STREAMS
    assert sum(calls.values()) < 12 * STREAMS, calls
