"""Who is on which channel, and what each is to be sent. No I/O."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from . import events


class Sink(Protocol):
    """What the hub delivers to: one open stream."""

    channels: tuple[str, ...]
    """The channels that its page asked for."""
    audible: tuple[str, ...]
    """Those, and their twins: the channels whose events it gets."""

    def send(self, data: bytes) -> None:
        """Write ``data`` or queue it; never raises and never blocks."""


class Hub:
    """
    The map from channels to streams.

    Within a stream, events keep the order in which the broker gave them, also across its channels. All
    that one batch holds for a stream goes out in one `Sink.send`.
    """

    def __init__(self) -> None:
        # Streams on this channel alone, which share one piece of bytes; dicts as ordered sets.
        self._solo: dict[str, dict[Sink, None]] = {}
        # Streams on this and other channels, for which each batch is put together one by one.
        self._mixed: dict[str, dict[Sink, None]] = {}
        self._sinks: dict[Sink, None] = {}

    def __len__(self) -> int:
        return len(self._sinks)

    def __iter__(self) -> Iterator[Sink]:
        return iter(list(self._sinks))

    def add(self, sink: Sink) -> None:
        """Deliver to ``sink`` from now on."""
        self._sinks[sink] = None
        audience = self._audience(sink)
        for channel in sink.audible:
            audience.setdefault(channel, {})[sink] = None

    def remove(self, sink: Sink) -> bool:
        """Stop delivering to ``sink``; return whether it was still there."""
        if sink not in self._sinks:
            return False
        del self._sinks[sink]
        audience = self._audience(sink)
        for channel in sink.audible:
            del audience[channel][sink]
            if not audience[channel]:
                del audience[channel]
        return True

    def deliver(self, messages: Iterable[tuple[str, str]]) -> None:
        """Send a batch of (channel, broker payload), each encoded once for all its streams."""
        shared: dict[str, list[bytes]] = {}
        own: dict[Sink, list[bytes]] = {}
        for channel, payload in messages:
            solo, mixed = self._solo.get(channel), self._mixed.get(channel)
            if solo is None and mixed is None:
                continue
            frame = events.encode(events.parse(payload))
            if solo is not None:
                shared.setdefault(channel, []).append(frame)
            for sink in mixed or ():
                own.setdefault(sink, []).append(frame)
        for channel, frames in shared.items():
            data = b"".join(frames)
            # A stream that is cut while it is sent to leaves the dict, hence the copy.
            for sink in list(self._solo.get(channel, ())):
                sink.send(data)
        for sink, frames in own.items():
            sink.send(b"".join(frames))

    def broadcast(self, data: bytes) -> None:
        """Send ``data`` to every stream."""
        for sink in self:
            sink.send(data)

    def reset(self, reason: str) -> None:
        """Tell every stream that it may have missed events, and on which of its channels."""
        for sink in self:
            sink.send(events.stream_reset(reason, sink.channels))

    def _audience(self, sink: Sink) -> dict[str, dict[Sink, None]]:
        return self._solo if len(sink.audible) == 1 else self._mixed
