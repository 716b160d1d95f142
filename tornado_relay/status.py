"""What workers tell of themselves, and what that is of the whole relay. No I/O."""

from __future__ import annotations

import heapq
import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from operator import itemgetter
from typing import Any

from . import __version__
from .counts import BYTES, CLOSED, DELIVERIES, EVENTS, OPENED, REFUSED
from .relay import Relay

LARGEST = 100
"""Channels that are shown, those with the most streams."""
# In a line: whoever writes or reads one keeps the loop for some tenths of a millisecond.
CHANNELS = 500

_COUNTED = {
    "opened": OPENED,
    "closed": CLOSED,
    "refused": REFUSED,
    "events": EVENTS,
    "deliveries": DELIVERIES,
    "bytes": BYTES,
}
SUMS = ("streams", "cut", *_COUNTED)
"""What is added up over all workers."""


class Account:
    """
    What one worker has told of itself.

    Args:
        number: Its place among the workers, from 0.
        pid: Its process id; None where there is no process.
        channels: Where the streams of each channel are added up, over all workers.

    """

    def __init__(self, number: int, pid: int | None, channels: Counter[str]) -> None:
        self._channels = channels
        self.worker: dict[str, Any] = {"number": number, "pid": pid, "state": "no answer"}
        # What it knows of the broker; None until it has told anything.
        self.broker: dict[str, Any] | None = None

    def take(self, line: bytes) -> None:
        """
        Take in one of the lines of `tell`.

        Raises:
            ValueError: If it is none, or half of one.

        """
        told = json.loads(line)
        if self.broker is None:
            self.broker = told.pop("broker")
            self.worker = told
        else:
            self._channels.update(told)


def tell(relay: Relay, number: int, began: float) -> Iterator[bytes]:
    """Yield this worker's account: a line of numbers, then its channels, in as many lines as they take."""
    counts, reader = relay.hub.counts, relay.reader
    numbers = {
        "number": number,
        "pid": os.getpid(),
        "state": "draining" if relay.draining else "serving",
        "uptime": time.monotonic() - began,
        "streams": len(relay.hub),
        "cut": counts.own(CLOSED, "cut"),
        **{name: counts.own(metric) for name, metric in _COUNTED.items()},
        "lag_ms": counts.lag * 1000,
        "broker": {
            "kind": relay.settings.broker[0] if relay.settings.broker else None,
            "trouble": reader.trouble,
            "latency_ms": None if reader.latency is None else reader.latency * 1000,
        },
    }
    yield _line(numbers)
    sizes = relay.hub.sizes()
    while part := list(itertools.islice(sizes, CHANNELS)):
        streams: Counter[str] = Counter()
        for channel, size in part:
            streams[channel] += size
        yield _line(streams)


def whole(accounts: list[Account], channels: Counter[str], uptime: float) -> dict[str, Any]:
    """
    Return the state of the relay by the accounts of its workers, and the streams that these have on each channel.

    Sums are over the workers that there are: what a worker has counted ends with it.
    """
    largest = sorted(heapq.nlargest(LARGEST, channels.items(), key=itemgetter(1)), key=lambda pair: (-pair[1], pair[0]))
    workers = [account.worker for account in accounts]
    return {
        "version": __version__,
        "uptime": uptime,
        "broker": _broker([account.broker for account in accounts if account.broker]),
        **{name: sum(worker.get(name, 0) for worker in workers) for name in SUMS},
        "channels": {
            "total": len(channels),
            "largest": [{"channel": name, "streams": streams} for name, streams in largest],
        },
        "workers": sorted(workers, key=lambda worker: (worker["number"], worker["pid"] or 0)),
    }


def _broker(told: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return what the worst off of the workers knows of the broker."""
    brokers = list(told)
    troubles = [broker["trouble"] for broker in brokers if broker["trouble"]]
    return {
        "kind": brokers[0]["kind"],
        "connected": not troubles,
        "trouble": troubles[0] if troubles else None,
        "latency_ms": max((each["latency_ms"] for each in brokers if each["latency_ms"] is not None), default=None),
    }


def _line(what: dict[str, Any]) -> bytes:
    return json.dumps(what, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
