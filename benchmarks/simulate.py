"""A worker's loop with its true hub, on a clock that measured costs move: python benchmarks/simulate.py [--measure].

Says how busy a worker of each plan in docs/scaling.md is, and when events arrive. With --measure, two loads are first
simulated and then run, on a Redis of its own; give it a machine that has nothing else to do.
"""

import argparse
import random
import re
import resource
import sys
import tempfile
import time
from pathlib import Path

import httpx
from costs import relay, streams
from fanout import cpu

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from servers import RedisServer, free_port

from tornado_relay.brokers.message import Message
from tornado_relay.hub import Hub
from tornado_relay.sizing import BUSY, COSTS, HEARTBEAT_SECONDS, Load, plan

# Streams, channels, events a second of one worker.
POINTS = ((4000, 1, 15), (5000, 100, 500))
# What the streams of docs/scaling.md hear.
LOADS = {
    "a channel each, an event in 100 s": lambda streams: Load(streams, streams / 100, 1),
    "rooms of 100, an event in 10 s": lambda streams: Load(streams, streams / 1000, 100),
    "all the same, an event a second": lambda streams: Load(streams, 1, streams),
}
SECONDS = 20
EVENT = COSTS.event + Load.size * COSTS.gzip


class Clock:
    """Seconds, by what the worker has done."""

    now = 0.0


class Sink:
    """A stream whose write takes its time, and who notes when each event has come."""

    labels, position, reached = False, 0, 0

    def __init__(self, channel, clock, late):
        self.channels = self.audible = (channel,)
        self.clock, self.late = clock, late

    def send(self, data):
        """See `tornado_relay.fanout.Sink`."""
        self.clock.now += COSTS.delivery
        # The bytes are the same object for all streams: read once.
        if self.late.read is not data:
            self.late.read = data
            self.late.sent = [float(sent) for sent in re.findall(rb"data: (\S+)", data)]
        for sent in self.late.sent:
            self.late.seconds.append(self.clock.now - sent)


class Late:
    """How late events are."""

    def __init__(self):
        self.seconds, self.read, self.sent = [], None, []


def simulate(number, channels, rate, seconds=SECONDS):
    """Return how busy a worker is, and the mean and the 99th percentile of the seconds that a delivery takes."""
    clock, late, ready = Clock(), Late(), []
    hub = Hub(later=ready.append)
    for n in range(number):
        hub.add(Sink(f"c{n % channels}", clock, late))
    dice, due, busy = random.Random(1), 0.0, 0.0
    while due < seconds:
        if not ready and due > clock.now:
            clock.now = due
        began, batch = clock.now, []
        while due <= clock.now:
            batch.append(Message(f"c{dice.randrange(channels)}", f"{due!r}"))
            due += dice.expovariate(rate)
        if batch:
            clock.now += EVENT * len(batch)
            hub.deliver(batch)
        turn, ready[:] = list(ready), []
        for go_on in turn:
            go_on()
        busy += clock.now - began
    late.seconds.sort()
    return (
        busy / clock.now + number * COSTS.heartbeat / HEARTBEAT_SECONDS,
        sum(late.seconds) / len(late.seconds),
        late.seconds[int(len(late.seconds) * 0.99)],
    )


def measure(server, home, number, channels, rate):
    """Return the same of a relay."""
    admin = free_port()
    paths = [f"/channel=c{n % channels}" for n in range(number)]
    with (
        relay(home, "--admin-port", str(admin), **server.environment) as (port, pid),
        streams(port, paths) as load,
    ):
        dice, begin, due = random.Random(1), time.monotonic(), 0.0
        before = cpu(pid)
        while due < SECONDS:
            while (wait := begin + due - time.monotonic()) > 0:
                load.read(wait)
            server.client.publish(f"c{dice.randrange(channels)}", "x" * 100)
            due += dice.expovariate(rate)
        spent = cpu(pid) - before
        page = httpx.get(f"http://127.0.0.1:{admin}/metrics").text
    total, count = (
        float(re.search(rf"^sse_relay_delivery_latency_seconds_{what}(?:{{}})? (\S+)", page, re.MULTILINE)[1])
        for what in ("sum", "count")
    )
    buckets = [
        (float(bound), float(value))
        for bound, value in re.findall(
            r'^sse_relay_delivery_latency_seconds_bucket{le="([^"]+)"} (\S+)', page, re.MULTILINE
        )
    ]
    return spent / SECONDS, total / count, next(bound for bound, value in buckets if value >= 0.99 * count)


def table():
    """Yield the rows of docs/scaling.md."""
    yield "| streams | what they hear | hosts | busy | an event takes | 99 % within | used up first |"
    yield "|---|---|---|---|---|---|---|"
    for number in (10**4, 10**5, 10**6, 10**7):
        for name, load_of in LOADS.items():
            load = load_of(number)
            found = plan(load)
            heard = load.heard(found.left)
            streams = round(load.streams / found.left)
            channels = max(1, round(streams * heard / (load.deliveries / found.left)))
            busy, mean, most = simulate(streams, channels, heard)
            used_up = "; ".join(f"{limit.name} ({limit.used:.0%})" for limit in found.limits() if limit.used > BUSY)
            yield (
                f"| {number:,} | {name} | {found.hosts} of {found.each} workers | {busy:.0%} | {milliseconds(mean)} "
                f"| {milliseconds(most)} | {used_up or 'nothing by half'} |"
            )


def milliseconds(seconds):
    return f"{seconds * 1000:.0f} ms" if seconds >= 0.001 else "under 1 ms"


def show(what, found):
    busy, mean, most = found
    print(f"{what}: busy {busy:.0%}, an event takes {mean * 1000:.2g} ms, 99 % within {most * 1000:.2g} ms", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--measure", action="store_true")
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if parser.parse_args().measure:
        with tempfile.TemporaryDirectory(prefix="simulate-") as home:
            server = RedisServer(Path(home))
            try:
                for point in POINTS:
                    show(f"{point} simulated", simulate(*point))
                    show(f"{point} measured", measure(server, home, *point))
            finally:
                server.stop()
    else:
        for row in table():
            print(row, flush=True)


if __name__ == "__main__":
    main()
