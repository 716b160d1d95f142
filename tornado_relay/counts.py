"""What is counted, and where: in memory that the parent shares with its workers, as it does for `limits`. No I/O.

Each process writes to a row of its own, so there is no lock. A row that a worker leaves is taken up by another one,
which counts on in it: the sum over all rows never falls, and what a worker that was killed has counted is not lost.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
from bisect import bisect_left
from time import monotonic

LATENCIES = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Metric:
    """
    Something that is counted.

    Args:
        kind: "counter"; "gauge", which a worker has for itself and leaves as 0; or "histogram".
        name: As Prometheus shows it, without prefix, and a counter without ``_total``.
        meaning: One sentence.
        label: By what it is told apart; empty for nothing.
        values: What the label may be.
        bounds: The upper bounds of a histogram's buckets.

    """

    def __init__(
        self,
        kind: str,
        name: str,
        meaning: str,
        *,
        label: str = "",
        values: tuple[str, ...] = ("",),
        bounds: tuple[float, ...] = (),
    ) -> None:
        self.kind = kind
        self.name = name
        self.meaning = meaning
        self.label = label
        self.bounds = bounds
        # Buckets, the last without a bound, and the sum of what was observed; or one cell for each value of the label.
        self.cells = len(bounds) + 2 if bounds else len(values)
        self.at = dict.fromkeys(values, 0)
        self.start = self.sum = 0

    def place(self, start: int) -> int:
        """Have the cells from ``start`` on in each row, and return where the next metric's begin."""
        self.at = {value: start + number for number, value in enumerate(self.at)}
        self.start, self.sum = start, start + self.cells - 1
        return start + self.cells


OPENED = Metric("counter", "streams_opened", "Streams that were opened.")
CLOSED = Metric(
    "counter",
    "streams_closed",
    "Streams that ended: client, by the client; cut, for a reader that was slower than RELAY_CLIENT_BUFFER allows; "
    "expired, at its token's end or by RELAY_MAX_STREAM_SECONDS; drain, as the worker was told to end; died, with it.",
    label="reason",
    values=("client", "cut", "expired", "drain", "died"),
)
REFUSED = Metric(
    "counter",
    "refusals",
    "Requests for streams that were not let in: for good, by origin, token, channel (that the token does not cover), "
    "application (RELAY_AUTH_URL), request (that cannot be); or told to come back, by broker, authority (no answer of "
    "the application), draining, full (RELAY_MAX_CONNECTIONS), address (RELAY_MAX_CONNECTIONS_PER_IP), descriptors, "
    "channels (the worker has too many), client-channels (one client has too many, or brings them too fast).",
    label="reason",
    values=(
        *("origin", "token", "channel", "application", "request"),
        *("broker", "authority", "draining", "full", "address", "descriptors"),
        *("channels", "client-channels"),
    ),
)
EVENTS = Metric("counter", "events_received", "Events that came from the broker, in each worker that listens to them.")
DELIVERIES = Metric("counter", "deliveries", "Events to streams: one to 100 streams is 100.")
BYTES = Metric("counter", "delivered_bytes", "Bytes of deliveries, before they are compressed.")
LATENCY = Metric(
    "histogram",
    "delivery_latency_seconds",
    "For each stream that events went to, the time from when they were read from the broker's connection to when they "
    "were written to the stream's socket.",
    bounds=LATENCIES,
)
FANOUT = Metric(
    "histogram",
    "fanout_seconds",
    "Passes over all streams that a batch of events was for, with the turns of other channels in between.",
    bounds=(0.0001, 0.00025, *LATENCIES),
)
RESETS = Metric(
    "counter",
    "resets",
    "Streams that were told by a stream-reset that they may have missed events.",
    label="reason",
    values=(
        *("broker-reconnect", "unknown-id", "pruned-id", "history-lost"),
        *("not-kept", "unreadable-payload", "unreadable-history"),
    ),
)
REPLAYS = Metric(
    "counter", "replays", "Streams that came back to a place in the history, and got what they had missed."
)
REPLAYED = Metric("counter", "replayed_bytes", "Bytes that streams got from the history.")
HISTORY_FAILURES = Metric("counter", "history_failures", "Times that the history could not be read or pruned.")
PUBLISHES = Metric(
    "counter",
    "publishes",
    "Events over HTTP: accepted by the broker; refused, for what they were or who sent them; or failed, at the broker.",
    label="result",
    values=("accepted", "refused", "failed"),
)
RECONNECTS = Metric("counter", "broker_reconnects", "Times that a worker was connected to the broker again.")
RESTARTS = Metric(
    "counter",
    "worker_restarts",
    "Workers that ended by themselves: died; stuck, and killed for it; or failed, before they served.",
    label="reason",
    values=("died", "stuck", "failed"),
)
RELOADS = Metric("counter", "reloads", "Reloads (SIGHUP).", label="result", values=("done", "failed"))
LAG = Metric(
    "histogram",
    "loop_lag_seconds",
    "How late the tick of each second was in a worker: what an event may have to wait for the loop.",
    bounds=LATENCIES,
)

STREAMS = Metric("gauge", "streams", "Open streams.")
CAPACITY = Metric("gauge", "streams_capacity", "Streams for which the worker has descriptors.")
WAITING = Metric("gauge", "connections_waiting", "Connections whose request has not come yet.")
CHANNELS = Metric("gauge", "channels", "Channels that the worker has the broker send.")
BROKER_UP = Metric(
    "gauge", "broker_up", "1 while the worker is connected to the broker and streams can be opened, or 0."
)
PROBE = Metric("gauge", "broker_probe_seconds", "How long the last probe of the quiet broker connection took.")
SERVING = Metric("gauge", "worker_up", "1 while the worker serves and its loop turns, or 0.")

# What is not shown as it is: whose row it is, and since when and of when the last tick is, by `time.monotonic`.
NUMBER = Metric("gauge", "", "")
PID = Metric("gauge", "", "")
BEGAN = Metric("gauge", "", "")
TICKED = Metric("gauge", "", "")

METRICS = (
    *(OPENED, CLOSED, REFUSED, EVENTS, DELIVERIES, BYTES, LATENCY, FANOUT, RESETS, REPLAYS, REPLAYED, HISTORY_FAILURES),
    *(PUBLISHES, RECONNECTS, RESTARTS, RELOADS, LAG),
)
GAUGES = (STREAMS, CAPACITY, WAITING, CHANNELS, BROKER_UP, PROBE, SERVING)
_OWN = (*GAUGES, NUMBER, PID, BEGAN, TICKED)

_ROW = 0
for _metric in (*METRICS, *_OWN):
    _ROW = _metric.place(_ROW)
LAYOUT = hashlib.sha256(repr([(each.name, each.at, each.bounds) for each in (*METRICS, *_OWN)]).encode()).hexdigest()
"""What tells a row of these metrics from one of others."""
# For what is counted at each event.
_DELIVERIES, _BYTES = (metric.at[""] for metric in (DELIVERIES, BYTES))


class Counts:
    """
    The counts of one process.

    Args:
        ledger: The counts of all.
        row: Which of them these are.

    """

    __slots__ = ("_before", "_cells", "lag", "ledger")

    def __init__(self, ledger: Ledger, row: int) -> None:
        self.ledger = ledger
        self._cells = ledger.cells[row * _ROW : (row + 1) * _ROW]
        self._before = self._cells.tolist()
        # By how many seconds the loop's last tick was late.
        self.lag = 0.0

    def add(self, metric: Metric, value: str = "", number: float = 1) -> None:
        """Count ``number`` more, of those with this ``value`` of the label."""
        self._cells[metric.at[value]] += number

    def observe(self, metric: Metric, seconds: float, times: int = 1) -> None:
        """Count so many of the same in a histogram."""
        self._cells[metric.start + bisect_left(metric.bounds, seconds)] += times
        self._cells[metric.sum] += seconds * times

    def deliver(self, deliveries: int, size: int) -> None:
        """Count deliveries, and the bytes of all."""
        cells = self._cells
        cells[_DELIVERIES] += deliveries
        cells[_BYTES] += size

    def sent(self, streams: int, times: tuple[float, float] | None, *, whole: bool) -> None:
        """Time streams that were written to, and, if it was the whole or the rest of them, the pass; see `fanout.Times`."""
        if times is None:
            return
        now, (arrived, began) = monotonic(), times
        self.observe(LATENCY, now - arrived, streams)
        if whole:
            self.observe(FANOUT, now - began)

    def set(self, metric: Metric, number: float) -> None:
        """Have the gauge be ``number``."""
        self._cells[metric.at[""]] = number

    def get(self, metric: Metric, value: str = "") -> float:
        """Return what is counted in this row."""
        return self._cells[metric.at[value]]

    def own(self, metric: Metric, value: str | None = None) -> int:
        """Return what this process has counted, with any or with this ``value`` of the label."""
        places = metric.at.values() if value is None else [metric.at[value]]
        return int(sum(self._cells[at] - self._before[at] for at in places))

    def cells(self, metric: Metric) -> list[float]:
        """Return the cells of a histogram."""
        return list(self._cells[metric.start : metric.start + metric.cells])

    def tick(self, lag: float) -> None:
        """Note that the loop turns, and by how many seconds it was late."""
        self.lag = lag
        self.set(TICKED, monotonic())
        self.observe(LAG, lag)

    def begin(self, number: int) -> None:
        """Give the row to the next worker at this place."""
        self.set(NUMBER, number)
        self.set(BEGAN, monotonic())
        self.set(TICKED, monotonic())

    def end(self) -> None:
        """Leave the row to the next one: whoever counted here has ended."""
        self.add(CLOSED, "died", self.get(STREAMS))
        for metric in _OWN:
            self.set(metric, 0)


class Ledger:
    """
    The counts of all processes.

    Args:
        rows: How many there may be at a time.
        descriptor: The memory of another one with as many rows, to count on in if `LAYOUT` is that ``layout``: of another
            version it may be another, and what is counted begins anew.

    """

    def __init__(self, rows: int, descriptor: int = -1, layout: str = "") -> None:
        if layout != LAYOUT:
            descriptor = os.memfd_create("ledger", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(descriptor, rows * _ROW * 8)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        self.descriptor = descriptor
        self.cells = memoryview(mmap.mmap(descriptor, rows * _ROW * 8)).cast("d")
        self._rows = rows

    def rows(self) -> list[Counts]:
        """Return the counts of all that there may be."""
        return [Counts(self, row) for row in range(self._rows)]
