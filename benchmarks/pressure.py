"""How late events are, and what memory a worker takes, up to twice the rate that the machine can send.

    python benchmarks/pressure.py RATE [--streams N] [--seconds N]

RATE is how many events a second the worker can send to all streams, one system call each; `fanout.py` measures it and
calls `measure`. A process of its own reads the streams, and one more stream measures the delay, from PUBLISH to socket.
"""

import argparse
import contextlib
import json
import re
import selectors
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import redis

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

from servers import RedisServer, free_port, until  # noqa: E402

from tornado_relay.events import serialize  # noqa: E402
from tornado_relay.publish import open_publisher  # noqa: E402

FACTORS = (0.5, 1.0, 2.0)
CHURN = 50
"""Streams that join each second, and as many that leave, on a channel of their own and on that of the events."""
MAX_RATE = 2000.0
"""Events a second that the publisher here can make."""
TEXT = "x" * 120


class Work(NamedTuple):
    """What streams ask for, and what happens beside them."""

    name: str
    path: str
    churn: bool = False
    history: int = 0


def _many(number):
    return "/events?" + "&".join(f"channel=x{n}" if n else "channel=x" for n in range(number))


WORKS = (
    Work("one channel", "/channel=x"),
    Work("two channels", _many(2)),
    Work("ten channels", _many(10)),
    Work(f"one channel, {CHURN} streams a second join and leave", "/channel=x", churn=True),
    Work("one channel, with a history", "/channel=x", history=1000),
    Work(f"two channels, with a history, {CHURN} a second join and leave", _many(2), churn=True, history=1000),
)


class Result(NamedTuple):
    """How one rate went."""

    delay: float
    """Milliseconds, the 99th percentile."""
    memory: float
    """MiB that the worker had at the end."""
    cut: int
    """Streams that were disconnected because they read too slowly."""


def connect(port, path):
    """Return a socket with a request for a stream."""
    connection = socket.create_connection(("127.0.0.1", port), 20)
    connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n\r\n".encode())
    return connection


def read(port, path, number):
    """Open streams, say so, and read them until standard input ends."""
    selector = selectors.DefaultSelector()
    for _ in range(number):
        connection = connect(port, path)
        connection.recv(1024)
        connection.setblocking(False)
        selector.register(connection, selectors.EVENT_READ)
    print("open", flush=True)
    selector.register(sys.stdin, selectors.EVENT_READ)
    buffer, ended = bytearray(1 << 18), 0
    while True:
        for key, _ in selector.select():
            if key.fileobj is sys.stdin:
                print(ended, flush=True)
                return
            with contextlib.suppress(BlockingIOError, ConnectionResetError):
                if key.fileobj.recv_into(buffer):
                    continue
            if key.fileobj.fileno() >= 0:
                selector.unregister(key.fileobj)
                key.fileobj.close()
                ended += 1


class Probe(threading.Thread):
    """One stream, and the delays of its events in milliseconds."""

    def __init__(self, port, path):
        super().__init__(daemon=True)
        self.connection = connect(port, path)
        self.delays = []
        self.start()

    def run(self):
        """Read until the relay ends the stream."""
        rest = b""
        while data := self.connection.recv(1 << 16):
            now = time.monotonic()
            *lines, rest = (rest + data).split(b"\n")
            self.delays += [1000 * (now - float(sent)) for line in lines for sent in re.findall(rb'"t":([\d.]+)', line)]

    def all(self, events):
        """Return the delays once so many events have come, or the relay has ended the stream."""
        until(lambda: len(self.delays) >= events or not self.is_alive(), "all events have come", 60)
        return self.delays


class Churn(threading.Thread):
    """Streams that join and leave, half of them on the channel of the events."""

    def __init__(self, port):
        super().__init__(daemon=True)
        self.port = port
        self.ended = threading.Event()

    def __enter__(self):
        self.start()

    def __exit__(self, *_):
        self.ended.set()
        self.join()

    def run(self):
        """Open a stream at a time, and close the one that is a second old."""
        young = []
        while not self.ended.wait(1 / CHURN):
            young.append(connect(self.port, f"/channel={'xz'[len(young) % 2]}"))
            if len(young) > CHURN:
                young[-CHURN - 1].close()
        for connection in young:
            connection.close()


def publisher(url, work):
    """Return what publishes an event that says when that was."""
    if not work.history:
        client = redis.Redis.from_url(url)
        return lambda: client.publish("x", json.dumps({"data": {"t": time.monotonic(), "text": TEXT}}))
    kept = open_publisher("redis", url)
    return lambda: kept.publish("x", serialize({"data": {"t": time.monotonic(), "text": TEXT}}))


def resident(pid):
    """Return MiB."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024


def run(url, home, work, rates, options):
    """Yield the `Result` of each rate."""
    for rate in rates:
        port, log = free_port(), home / "log"
        command = [Path(sys.executable).with_name("sse-relay-server"), "--host", "127.0.0.1"]
        command += ["--port", str(port), "--workers", "1", "--history", str(work.history)]
        environment = {"REDIS_URL": url, "LOG_LEVEL": "INFO", "PATH": "/usr/bin:/bin"}
        with log.open("wb") as output:
            relay = subprocess.Popen(command, env=environment, stderr=output, cwd=home)
        reader = None
        try:
            until(lambda log=log: b"listening on" in log.read_bytes(), "the relay listens")
            (worker,) = map(int, Path(f"/proc/{relay.pid}/task/{relay.pid}/children").read_text().split())
            reading = [sys.executable, __file__, "--read", str(port), work.path, str(options.streams)]
            reader = subprocess.Popen(reading, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            if reader.stdout.readline() != "open\n":
                raise SystemExit(f"the streams cannot be opened: {log.read_text()}")
            probe, begin = Probe(port, work.path), time.monotonic()
            publish = publisher(url, work)
            with Churn(port) if work.churn else contextlib.nullcontext():
                for number in range(round(rate * options.seconds)):
                    publish()
                    time.sleep(max(0.0, begin + (number + 1) / rate - time.monotonic()))
                delays = probe.all(round(rate * options.seconds))
            found = Result(
                statistics.quantiles(delays, n=100)[98], resident(worker), log.read_text().count("cutting a slow")
            )
        finally:
            if reader:
                reader.stdin.close()
                reader.wait(20)
            relay.send_signal(signal.SIGINT)
            relay.wait(20)
        yield found


def measure(rate, options):
    """Return the lines of a table: each work at each share of ``rate`` events a second."""
    home = Path(tempfile.mkdtemp(prefix="pressure-"))
    server = RedisServer(home)
    rates = [min(MAX_RATE, max(1.0, rate * factor)) for factor in FACTORS]
    heads = [f"{each:.0f} a second ({factor:g} x)" for each, factor in zip(rates, FACTORS, strict=True)]
    lines = [
        f"| streams on | {' | '.join(heads)} |",
        f"|---|{'---|' * len(rates)}",
    ]
    try:
        for work in WORKS:
            cells = []
            for found in run(server.url, home, work, rates, options):
                cut = f", {found.cut} disconnected" if found.cut else ""
                cells.append(f"{found.delay:.0f} ms, {found.memory:.0f} MiB{cut}")
            lines.append(f"| {work.name} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    finally:
        server.stop()
        shutil.rmtree(home, ignore_errors=True)
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("rate", type=float, metavar="RATE")
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--seconds", type=int, default=5)
    options = parser.parse_args()
    print("\n".join(measure(options.rate, options)))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--read"]:
        read(int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
    else:
        main()
