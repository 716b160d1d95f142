"""What Prometheus reads: the counts of all workers, whichever of them is asked."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from functools import partial
from time import monotonic

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.core import Metric as Family
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from . import __version__
from .counts import (
    BEGAN,
    BROKER_UP,
    CAPACITY,
    CHANNELS,
    METRICS,
    NUMBER,
    PID,
    PROBE,
    SERVING,
    STREAMS,
    TICKED,
    WAITING,
    Counts,
    Metric,
)
from .settings import Settings

PREFIX = "sse_relay_"

STALE_SECONDS = 5.0
"""A worker whose loop has not turned for this long does not count as up; it ticks each second."""


class Exposition(Collector):
    """
    All metrics at one moment.

    Args:
        rows: The counts of all processes.
        workers: How many workers there should be.
        settings: Those of the relay.
        channels: Names of channels and how many streams each has, if they are asked for.

    """

    def __init__(
        self, rows: list[Counts], workers: int, settings: Settings, channels: Iterable[tuple[str, int]] | None
    ) -> None:
        self._rows = rows
        self._settings = settings
        self._channels = channels
        # Where one worker follows another there are two for a while, the newer one last.
        taken = sorted((row for row in rows if row.get(PID)), key=lambda row: row.get(BEGAN))
        self._workers = {str(number): [row for row in taken if row.get(NUMBER) == number] for number in range(workers)}

    def text(self, accept: str) -> tuple[bytes, str]:
        """Return the page and its Content-Type; ``accept`` is the header, by which Prometheus says what it reads."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        encode, content_type = choose_encoder(accept)
        return encode(registry), content_type

    def collect(self) -> Iterator[Family]:
        """See `prometheus_client.registry.Collector`."""
        kind = self._settings.broker[0] if self._settings.broker else ""
        yield InfoMetricFamily(PREFIX[:-1], "What runs.", {"version": __version__, "broker": kind})
        for metric in METRICS:
            yield self._histogram(metric) if metric.bounds else self._counter(metric)
        yield from self._gauges()
        yield from self._processes()

    def _counter(self, metric: Metric) -> Family:
        family = CounterMetricFamily(
            PREFIX + metric.name, metric.meaning, labels=[metric.label] if metric.label else []
        )
        for value in metric.at:
            family.add_metric([value] if metric.label else [], sum(row.get(metric, value) for row in self._rows))
        return family

    def _histogram(self, metric: Metric) -> Family:
        *counts, total = map(sum, zip(*(row.cells(metric) for row in self._rows), strict=True))
        bounds = [*map(str, metric.bounds), "+Inf"]
        family = HistogramMetricFamily(PREFIX + metric.name, metric.meaning)
        family.add_metric([], list(zip(bounds, itertools.accumulate(counts), strict=True)), total)
        return family

    def _gauges(self) -> Iterator[Family]:
        now = monotonic()
        for metric in (STREAMS, CAPACITY, WAITING, CHANNELS):
            yield self._gauge(
                metric, {name: sum(row.get(metric) for row in rows) for name, rows in self._workers.items()}
            )
        newest = {name: rows[-1] for name, rows in self._workers.items() if rows}
        up = {name: int(row.get(SERVING) and now - row.get(TICKED) < STALE_SECONDS) for name, row in newest.items()}
        nobody: dict[str, float] = dict.fromkeys(self._workers, 0)
        yield self._gauge(SERVING, nobody | up)
        yield self._gauge(BROKER_UP, nobody | {name: row.get(BROKER_UP) for name, row in newest.items()})
        yield self._gauge(PROBE, {name: row.get(PROBE) for name, row in newest.items() if row.get(PROBE)})
        if limit := self._settings.max_connections:
            yield GaugeMetricFamily(f"{PREFIX}streams_limit", "RELAY_MAX_CONNECTIONS.", limit)
        if self._channels is not None:
            family = GaugeMetricFamily(
                f"{PREFIX}channel_streams", "Streams that hear a channel, of those with the most.", labels=["channel"]
            )
            for name, streams in self._channels:
                family.add_metric([name], streams)
            yield family

    def _gauge(self, metric: Metric, numbers: dict[str, float]) -> Family:
        family = GaugeMetricFamily(PREFIX + metric.name, metric.meaning, labels=["worker"])
        for name, number in numbers.items():
            family.add_metric([name], number)
        return family

    def _processes(self) -> Iterator[Family]:
        """Yield what the kernel knows of the workers, and of their parent: CPU, memory, descriptors."""
        pids = {name: int(rows[-1].get(PID)) for name, rows in self._workers.items() if rows}
        families: dict[str, Family] = {}
        for name, pid in {**pids, "parent": os.getppid()}.items():
            for found in ProcessCollector(pid=partial(int, pid), registry=None).collect():
                family = families.setdefault(found.name, Family(found.name, found.documentation, found.type))
                family.samples += [sample._replace(labels={"worker": name}) for sample in found.samples]
        yield from families.values()
