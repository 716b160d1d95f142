"""What so many streams and events take, and what is used up first. Arithmetic on measured costs; no I/O."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from .errors import SettingsError

MEASURED_ON = "2 x AMD EPYC, Linux 6.18, Python 3.11, PostgreSQL 15, Redis 7"

KIB, GIB, MBIT = 1024, 1024**3, 1_000_000


class Costs(NamedTuple):
    """CPU seconds and bytes of memory, as ``benchmarks/costs.py`` measures them."""

    delivery: float = 6e-6
    """A worker's, for one event to one stream: nearly all of it is the kernel's write(2)."""
    event: float = 42e-6
    """A worker's, for an event that any of its streams hears, beside the deliveries."""
    gzip: float = 5e-9
    """A worker's, for each byte of such an event: it is compressed, once for all streams."""
    heartbeat: float = 10e-6
    """A worker's, to one stream."""
    resume: float = 160e-6
    """A worker's, for a stream that comes back to a history; one that comes without takes 70e-6."""
    stream: int = 8 * KIB
    """Memory of an idle stream, half of it the kernel's."""
    worker: int = 40 << 20
    """Memory of a worker without streams."""
    notify: float = 150e-6
    """PostgreSQL's, for a commit with a NOTIFY and a history; 30e-6 without."""
    commit: float = 1e-3
    """Seconds until a commit is on disk; not measured, since it is your disk's: 0.2e-3 on a fast one."""
    wake: float = 15e-6
    """PostgreSQL's, for each session that listens; before PostgreSQL 19 all are woken, also those on other channels."""
    publish: float = 21e-6
    """Redis', for a PUBLISH."""
    subscriber: float = 3.5e-6
    """Redis', for each connection that it hands the event on to."""


COSTS = Costs()

BUSY = 0.5
"""A core is planned to be busy for this share of its time: the rest is for bursts, and for those that come back."""
HEARTBEAT_SECONDS = 15.0
LIFETIME_SECONDS = 3600.0
"""How long a stream lasts until its page is left or asks again."""
PACKET = 66
"""Bytes that Ethernet, IP and TCP add to what is written at once."""

# What there is of each, unless somebody does something about it.
PORTS = 28_232
"""Connections from one address of a proxy to one of a host: net.ipv4.ip_local_port_range of Linux."""
POSTGRES_CONNECTIONS = 100
"""``max_connections``."""
CARD = 10_000 * MBIT
"""Bits a second of a network card."""
STREAMS = 50_000
"""Of one worker at most: heartbeats, and the return of others' streams, have to fit in between its events."""


@dataclass(frozen=True)
class Load:
    """What there is to do."""

    streams: int
    """Open at the same time."""
    rate: float
    """Events a second, on all channels."""
    reach: int
    """Streams that get one event, on average."""
    size: int = 200
    """Bytes of an event, as it is sent to a stream."""
    cores: int = 8
    """Of one host."""

    @property
    def deliveries(self) -> float:
        """A second."""
        return self.rate * self.reach

    def heard(self, workers: int) -> float:
        """Return how many events a second each worker has streams for, if streams are spread evenly."""
        others = self.streams - self.streams / workers
        if self.reach > others:
            return self.rate
        # That all whom an event reaches are among the others': a draw without putting back.
        missed = math.lgamma(others + 1) - math.lgamma(others - self.reach + 1)
        missed -= math.lgamma(self.streams + 1) - math.lgamma(self.streams - self.reach + 1)
        return self.rate * (1 - math.exp(missed))

    @property
    def event(self) -> float:
        """CPU seconds that a worker takes for an event before it goes to any stream."""
        return COSTS.event + self.size * COSTS.gzip

    def busy(self, workers: int) -> float:
        """Return the share of a core that each worker is busy."""
        return self.heard(workers) * self.event + (self.deliveries * COSTS.delivery + self.upkeep) / workers

    @property
    def upkeep(self) -> float:
        """CPU seconds a second that streams take without events: heartbeats, and those that come in the place of others."""
        return self.streams * (COSTS.heartbeat / HEARTBEAT_SECONDS + COSTS.resume / LIFETIME_SECONDS)


class Limit(NamedTuple):
    """Something that can be used up."""

    name: str
    used: float
    """The share of it that is used: 1 is all of it."""
    text: str
    advice: str


@dataclass(frozen=True)
class Plan:
    """What a load takes: hosts, any one of which may be lost."""

    load: Load
    hosts: int
    """The one that may be lost is among them."""
    each: int
    """Workers of one host."""

    @property
    def workers(self) -> int:
        """All that there are; each is a connection to the broker."""
        return self.hosts * self.each

    @property
    def left(self) -> int:
        """Workers while a host is lost."""
        return (self.hosts - 1) * self.each

    @property
    def worker_streams(self) -> float:
        """Streams of a worker, while a host is lost."""
        return self.load.streams / self.left

    @property
    def host_streams(self) -> float:
        """Streams of a host, while another one is lost."""
        return self.worker_streams * self.each

    @property
    def host_memory(self) -> float:
        """Bytes."""
        return self.host_streams * COSTS.stream + self.each * COSTS.worker

    @property
    def host_bits(self) -> float:
        """A second, to the streams."""
        return self.load.deliveries / (self.hosts - 1) * (self.load.size + PACKET) * 8

    @property
    def pass_seconds(self) -> float:
        """How long an event is under way to the last of the streams that get it."""
        return self.load.event + math.ceil(self.load.reach / self.left) * COSTS.delivery

    @property
    def return_seconds(self) -> float:
        """How long the streams of a host that is lost keep the workers of the others busy."""
        return self.load.streams / self.hosts * COSTS.resume / self.left

    def limits(self) -> list[Limit]:
        """Return what is used of each thing, most of it first."""
        return sorted([*self._of_workers(), *self._of_hosts(), *self._of_brokers()], key=lambda limit: -limit.used)

    def _of_workers(self) -> Iterator[Limit]:
        heard = self.load.heard(self.left)
        yield Limit(
            "a worker's CPU, for taking events in",
            heard * self.load.event / BUSY,
            f"each worker hears {heard:,.0f} events a second, {heard * self.load.event:.0%} of its core",
            "what all workers hear does not become less by more of them: several relays, with a broker and channels each",
        )

    def _of_hosts(self) -> Iterator[Limit]:
        yield Limit(
            "ports between a proxy and a host",
            self.host_streams / PORTS,
            f"{self.host_streams:,.0f} streams a host, each a connection from the proxy, if that is by TCP",
            "net.ipv4.ip_local_port_range = 1024 65535 at the proxy; more addresses of the host's, or more proxies; none is "
            "used by a proxy on the host itself, with a Unix socket",
        )
        yield Limit(
            "a host's network card",
            self.host_bits / CARD,
            f"{self.host_bits / MBIT:,.1f} Mbit/s to the streams of a host",
            "smaller events, or more hosts with fewer cores",
        )

    def _of_brokers(self) -> Iterator[Limit]:
        rate, workers = self.load.rate, self.workers
        heard = self.load.heard(workers) * workers
        yield Limit(
            "PostgreSQL: commits with a NOTIFY",
            rate * COSTS.commit,
            f"{rate:,.0f} a second, one at a time, each until it is on disk: if that takes 1 ms, {rate * COSTS.commit:.0%} of all",
            "several notify() in a transaction, a faster disk, or Redis",
        )
        cpu = rate * (COSTS.notify + workers * COSTS.wake)
        yield Limit(
            "PostgreSQL: CPU of NOTIFY",
            cpu / (BUSY * self.load.cores),
            f"{cpu:.2f} cores to wake {workers} sessions {rate:,.0f} times a second",
            "Redis; or several notify() in a transaction, since a commit wakes once",
        )
        yield Limit(
            "PostgreSQL: max_connections",
            (workers + self.each) / POSTGRES_CONNECTIONS,
            f"{workers} sessions that listen, {workers + self.each} while a relay is reloaded, beside the application's",
            "raise it, or fewer and busier workers (--workers)",
        )
        cpu = rate * COSTS.publish + heard * COSTS.subscriber
        yield Limit(
            "Redis: its one core",
            cpu / BUSY,
            f"{cpu:.1%} of it to hand {rate:,.0f} events a second on to {workers} connections",
            "Redis Cluster without a history, where each server adds a core for its channels; or several relays, with a Redis each",
        )
        bits = heard * (self.load.size + PACKET) * 8
        yield Limit(
            "the broker's network card",
            bits / CARD,
            f"{bits / MBIT:,.1f} Mbit/s to the workers",
            "smaller events; or Redis Cluster without a history",
        )


def report(load: Load) -> Iterator[str]:
    """Yield the lines that say what a load takes, and what of it is used up."""
    found = plan(load)
    yield f"{load.streams:,} streams; {load.rate:,g} events a second of {load.size:,} bytes, each to {load.reach:,} of them"
    yield f"{load.deliveries:,.0f} deliveries a second take {load.deliveries * COSTS.delivery:,.2f} cores, heartbeats and new streams {load.upkeep:,.2f}"
    yield (
        f"{found.hosts} hosts of {load.cores} cores, each with --workers {found.each}: any one may be lost, "
        f"and the others' workers are busy for {load.busy(found.left):.0%} then"
    )
    yield (
        f"on each, then: {found.host_streams:,.0f} streams, {found.host_memory / GIB:,.1f} GiB of memory, "
        f"{found.worker_streams:,.0f} descriptors a worker, {found.host_bits / MBIT:,.1f} Mbit/s"
    )
    yield (
        f"the last of its streams has an event after {found.pass_seconds * 1000:,.0f} ms; the streams of a lost host take "
        f"{found.return_seconds:,.1f} s of the others to be open again"
    )
    yield ""
    yield "How much of what there is, if nothing is done about it, is used; first what is used up first:"
    for limit in found.limits():
        yield f"{limit.used:>7.0%}  {limit.name}: {limit.text}"
        if limit.used > BUSY:
            yield f"         -> {limit.advice}"
    yield ""
    yield f"Reckoned from what was measured on {MEASURED_ON}; your cores differ, so measure one of your workers too."


def plan(load: Load) -> Plan:
    """
    Return the fewest workers that are busy for no more than `BUSY`, on the hosts for them, and a host more.

    Raises:
        SettingsError: If there are none: what is for all costs every worker that has a stream.

    """
    least = math.ceil(load.streams / STREAMS)
    most = load.streams
    if load.busy(most) > BUSY:
        raise SettingsError(
            f"no number of workers carries --rate {load.rate:.12g}: each that has a stream would be busy for "
            f"{load.busy(most):.0%} of its time; divide the channels between relays with a broker each, or send several "
            "events as one"
        )
    workers = least + bisect.bisect_left(range(least, most + 1), True, key=lambda number: load.busy(number) <= BUSY)
    hosts = math.ceil(workers / load.cores)
    return Plan(load, hosts + 1, math.ceil(workers / hosts))
