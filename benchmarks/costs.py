"""What a stream, an event and a wake-up cost, for `sse-relay-server size`: python benchmarks/costs.py.

CPU time and memory, from /proc, of one worker or of the broker's processes, on servers of its own. It prints what
belongs into `tornado_relay.sizing.Costs`, and takes two minutes.
"""

import contextlib
import json
import os
import re
import resource
import secrets
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psycopg2
from fanout import Load, cpu, machine, memory

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from servers import PostgresServer, RedisServer, accepts, free_port, until

from tornado_relay import schema
from tornado_relay.packing import deflate
from tornado_relay.publish import open_publisher

STREAMS = 5000
RETURNS = 2000
LISTENERS = (0, 1, 8, 64)


def event(size):
    """One that `fanout.Load` counts, of so many bytes of data."""
    return json.dumps({"event": "tick", "data": "x" * size})


@contextlib.contextmanager
def relay(home, *flags, **env):
    """One worker; yields its port and the id of its parent."""
    port = free_port()
    command = [Path(sys.executable).with_name("sse-relay-server"), "--port", str(port), "--workers", "1", *flags]
    kept = {key: value for key, value in os.environ.items() if not key.endswith("_URL")}
    process = subprocess.Popen(command, env=kept | env | {"LOG_LEVEL": "ERROR"}, cwd=home)
    try:
        until(lambda: accepts(port), "the relay listens")
        yield port, process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


@contextlib.contextmanager
def streams(port, paths):
    """Open streams, and go on when all have been answered."""
    load = Load(port, paths)
    load.wait(lambda: len(load.answered) == len(paths), "all streams are open")
    yield load
    load.close()


@contextlib.contextmanager
def spending(what, times, pid):
    """Print the CPU time that a process and those below it spend meanwhile, for one of so many times."""
    before = cpu(pid)
    yield
    time.sleep(0.5)  # what is left to do, such as to free memory
    print(f"{what}: {(cpu(pid) - before) / times * 1e6:.1f} µs", flush=True)


@contextlib.contextmanager
def drained(connections):
    """Take in, and throw away, what comes by any of them."""
    descriptors = [connection.fileno() for connection in connections]
    enough = threading.Event()

    def read():
        while not enough.is_set():
            for descriptor in select.select(descriptors, [], [], 0.05)[0]:
                os.read(descriptor, 1 << 18)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield
    finally:
        enough.set()
        reader.join()


def of_streams(home, broker):
    """Print what a stream takes of a worker, and an event to all of them."""
    with relay(home, "--heartbeat", "3600", **broker.environment) as (port, pid), streams(port, ["/channel=one"]):
        publisher = open_publisher(broker.kind, broker.url)
        held, kernel = memory(pid), slab()
        print(f"memory of a relay with one worker: {held / 1024:.0f} MiB")
        with contextlib.ExitStack() as stack:
            with spending(f"connect, {broker.kind}", STREAMS, pid):
                load = stack.enter_context(streams(port, ["/channel=x"] * STREAMS))
            print(f"memory of a stream: {(memory(pid) - held) / STREAMS:.1f} KiB")
            print(f"memory of the kernel for both of its ends: {(slab() - kernel) / STREAMS:.1f} KiB")
            for size in (100, 4000):
                before = sum(load.counts.values())
                with spending(f"delivery of {size} bytes, {broker.kind}", 40 * STREAMS, pid):
                    # One at a time: events that wait for each other share a write.
                    for number in range(1, 41):
                        publisher.publish("x", event(size))
                        load.wait(lambda n=before + number * STREAMS: sum(load.counts.values()) == n, "the event")
        publisher.close()


def of_events(home, broker):
    """Print what an event takes of a worker that goes to one stream."""
    with (
        relay(home, "--heartbeat", "3600", **broker.environment) as (port, pid),
        streams(port, [f"/channel=c{n}" for n in range(STREAMS)]) as load,
    ):
        publisher = open_publisher(broker.kind, broker.url)
        with spending(f"event with one delivery, {broker.kind}", STREAMS, pid):
            for n in range(STREAMS):
                publisher.publish(f"c{n}", event(100))
                load.read(0)
            load.wait(lambda: sum(load.counts.values()) == STREAMS, "all events")
        publisher.close()


def of_heartbeats(home, broker):
    """Print what a heartbeat takes."""
    with (
        relay(home, "--heartbeat", "1", **broker.environment) as (port, pid),
        streams(port, ["/channel=x"] * STREAMS) as load,
        spending("heartbeat", 10 * STREAMS, pid),
    ):
        end = time.monotonic() + 10
        while time.monotonic() < end:
            load.read()


def of_returns(home, broker):
    """Print what it takes of the worker, and of the broker, that a stream comes back to a history."""
    server = broker.processes()[0]
    with relay(home, "--history", "1000", **broker.environment) as (port, pid), streams(port, ["/channel=one"]) as load:
        publisher = open_publisher(broker.kind, broker.url)
        until(publisher.newest, "the history is there")
        publisher.publish("one", event(100))
        load.wait(lambda: sum(load.counts.values()), "an event")
        for missed in (0, 5):
            here = publisher.newest()
            for n in range(RETURNS * missed):
                publisher.publish(f"back-{n % RETURNS}", event(100))
            what = f"return to {missed} events, {broker.kind}"
            paths = [f"/channel=back-{n}?last_event_id={here}" for n in range(RETURNS)]
            with (
                spending(f"{what}, broker", RETURNS, server),
                spending(f"{what}, worker", RETURNS, pid),
                streams(port, paths) as back,
            ):
                back.wait(lambda n=missed, load=back: sum(load.counts.values()) == n * RETURNS, "what was missed")
        publisher.close()


def of_listeners(server):
    """Print what a commit with a NOTIFY takes of PostgreSQL, by the number of sessions that listen to it, or to another."""
    publisher = psycopg2.connect(server.url)
    publisher.autocommit = True
    cursor = publisher.cursor()
    for channel in ("theirs", "another's"):
        for number in LISTENERS:
            sessions = [psycopg2.connect(server.url) for _ in range(number)]
            for session in sessions:
                session.autocommit = True
                session.cursor().execute("LISTEN theirs")
            what = f"NOTIFY, {number} sessions listen{'' if channel == 'theirs' else ' to another channel'}"
            with drained(sessions), spending(what, 2000, server.processes()[0]):
                for n in range(2000):
                    cursor.execute("SELECT pg_notify(%s, %s)", (channel, f"{n} {event(100)}"))
                    time.sleep(0.0005)  # so that none of them finds two at once
            for session in sessions:
                session.close()
            listen = "SELECT 1 FROM pg_stat_activity WHERE query = 'LISTEN theirs'"
            until(lambda: not server.execute(listen), "their sessions have ended")  # noqa: B023  (now)
    publisher.close()


def of_subscribers(server):
    """Print what a PUBLISH takes of Redis, by the number of connections that hear it."""
    for number in LISTENERS:
        connections = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(number)]
        for each in connections:
            each.sendall(b"SUBSCRIBE theirs\r\n")
        with drained(connections), spending(f"PUBLISH, {number} subscribe", 10_000, server.process.pid):
            for _ in range(10_000):
                server.publish("theirs", event(100))
        for each in connections:
            each.close()


def of_kept_events(server):
    """Print what notify() takes of PostgreSQL with a history, which nobody hears."""
    publisher = open_publisher("postgres", server.url)
    with spending("notify() with a history", 2000, server.processes()[0]):
        for _ in range(2000):
            publisher.publish("kept", event(100))
            time.sleep(0.0005)
    publisher.close()


def of_compression():
    """Print what it takes a worker to compress an event."""
    for rows in (2, 20, 80):
        data = json.dumps(
            [{"id": n, "name": secrets.token_hex(5), "total": n * 12.5, "open": True} for n in range(rows)]
        )
        frame = f"event: tick\ndata: {data}\n\n".encode()
        before = time.process_time()
        for _ in range(2000):
            deflate(frame)
        print(f"to compress {len(frame)} bytes: {(time.process_time() - before) / 2000 * 1e6:.1f} µs")


def slab():
    """KiB of the kernel's own objects, such as sockets."""
    return int(re.search(r"^Slab: +(\d+)", Path("/proc/meminfo").read_text(), re.MULTILINE)[1])


def main():
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with tempfile.TemporaryDirectory(prefix="costs-") as folder:
        home = Path(folder)
        home.chmod(0o755)
        (home / "redis").mkdir()
        postgres, store = PostgresServer(home, log_statement="none"), RedisServer(home / "redis")
        try:
            print(machine())
            of_listeners(postgres)
            of_subscribers(store)
            for broker in (store, postgres):
                of_streams(home, broker)
                of_events(home, broker)
            of_heartbeats(home, store)
            of_compression()
            list(schema.install(postgres.url))
            of_kept_events(postgres)
            for broker in (store, postgres):
                of_returns(home, broker)
        finally:
            postgres.stop("immediate")
            store.stop()


if __name__ == "__main__":
    main()
