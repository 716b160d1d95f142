"""Who is on which channel, and what each is to be sent. No I/O."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from . import events
from .brokers.message import Message

# Channels whose events no history keeps are remembered, so that a stream on them that was away is told; this many.
MAX_UNKEPT = 10_000


class Sink(Protocol):
    """What the hub delivers to: one open stream."""

    channels: tuple[str, ...]
    """The channels that its page asked for."""
    audible: tuple[str, ...]
    """Those, and their twins: the channels whose events it gets."""
    position: int
    """The place in the history up to which it has everything; 0 without one."""

    def send(self, data: bytes) -> None:
        """Write ``data`` or queue it; never raises and never blocks."""


class Hub:
    """
    The map from channels to streams.

    Within a stream, events keep the order in which the broker gave them, also across its channels. All
    that one batch holds for a stream goes out in one `Sink.send`.

    With ``history`` events carry the ids that the history gave them. A stream is *held* while it is brought
    up to date, and then *joins*.
    """

    def __init__(self, *, history: bool = False) -> None:
        self.history = history
        # The last message that was delivered of those that a history keeps, by number and by id.
        self.seq = 0
        self.id = ""
        # How often numbers have begun anew.
        self.epoch = 0

        # Channels with events that no history keeps, the newest last: each with the number of the first message
        # that was delivered behind the last one, or None before there is one.
        self.unkept: dict[str, int | None] = {}
        self._unplaced: dict[str, None] = {}

        # Streams on this channel alone, which share one piece of bytes; dicts as ordered sets.
        self._solo: dict[str, dict[Sink, None]] = {}
        # Streams on this and other channels, for which each batch is put together one by one.
        self._mixed: dict[str, dict[Sink, None]] = {}
        # Streams that the history has brought further than the broker's messages have come. What they have
        # already must not come again.
        self._ahead: dict[str, dict[Sink, None]] = {}
        # Streams that get nothing of the history for the time being.
        self._held: dict[str, dict[Sink, None]] = {}
        # All streams, and which of the four maps each is in.
        self._sinks: dict[Sink, dict[str, dict[Sink, None]]] = {}
        # What has been delivered since `record`, of the channels that it was given.
        self._recording: dict[str, list[tuple[int, bytes]]] = {}

    def __len__(self) -> int:
        return len(self._sinks)

    def __iter__(self) -> Iterator[Sink]:
        return iter(list(self._sinks))

    def __contains__(self, sink: object) -> bool:
        return sink in self._sinks

    def add(self, sink: Sink) -> None:
        """Deliver to ``sink`` from now on."""
        self._place(sink, self._solo if len(sink.audible) == 1 else self._mixed)

    def join(self, sink: Sink) -> None:
        """Deliver to ``sink`` what is behind its position, from now on."""
        if sink.position > self.seq:
            self._place(sink, self._ahead)
        else:
            self.add(sink)

    def hold(self, sink: Sink) -> None:
        """Deliver nothing to ``sink`` for the time being."""
        self._place(sink, self._held)

    def live(self) -> list[Sink]:
        """Return the streams that are not held."""
        return [sink for sink, place in self._sinks.items() if place is not self._held]

    def hold_all(self) -> list[Sink]:
        """Hold every stream, each with the position that it has now, and return those that were not held."""
        held = self.live()
        for sink in held:
            sink.position = max(sink.position, self.seq)
            self.hold(sink)
        return held

    def missed_unkept(self, sink: Sink) -> tuple[str, ...]:
        """Return the channels with events that no history keeps and that ``sink``, where it is, may not have had."""
        return tuple(
            channel
            for channel in sink.audible
            if (place := self.unkept.get(channel, 0)) is None or 0 <= sink.position < place
        )

    def remove(self, sink: Sink) -> bool:
        """Stop delivering to ``sink``; return whether it was still there."""
        if sink not in self._sinks:
            return False
        self._unplace(sink)
        del self._sinks[sink]
        return True

    def record(self, channels: Iterable[str]) -> dict[str, list[tuple[int, bytes]]]:
        """Collect number and frame of what is delivered on ``channels``, in place of what was recorded until now."""
        self._recording = {channel: [] for channel in channels}
        return self._recording

    def deliver(self, messages: Iterable[Message]) -> None:
        """Send a batch of messages, each encoded once for all its streams."""
        shared: dict[str, list[bytes]] = {}
        own: dict[Sink, list[bytes]] = {}
        for message in messages:
            channel, seq = message.channel, message.seq
            if self.history:
                self._note(message, own)
            solo, mixed, ahead = self._solo.get(channel), self._mixed.get(channel), self._ahead.get(channel)
            recording = self._recording.get(channel) if seq else None
            if solo is None and mixed is None and ahead is None and recording is None:
                continue
            frame = self._frame(message)
            if recording is not None:
                recording.append((seq, frame))
            if solo is not None:
                shared.setdefault(channel, []).append(frame)
            for sink in mixed or ():
                own.setdefault(sink, []).append(frame)
            for sink in ahead or ():
                if not seq or seq > sink.position:
                    own.setdefault(sink, []).append(frame)
        for channel, frames in shared.items():
            data = b"".join(frames)
            # A stream that is cut while it is sent to leaves the dict, hence the copy.
            for sink in list(self._solo.get(channel, ())):
                sink.send(data)
        for sink, frames in own.items():
            sink.send(b"".join(frames))
        if self._ahead:
            self._settle()

    def heartbeat(self) -> None:
        """Send every stream a comment, and the newest id to those that have all up to it, so that they come back there."""
        here = b":\n" + events.position(self.id) if self.history and self.id else b":\n\n"
        for sink, place in list(self._sinks.items()):
            sink.send(here if place is not self._held and sink.position <= self.seq else b":\n\n")

    def reset(self, reason: str) -> None:
        """Tell every stream that it may have missed events, and on which of its channels."""
        for sink in self:
            sink.send(events.stream_reset(reason, sink.channels))

    def restart(self, reason: str, position: int) -> None:
        """Tell every stream so, and put all at ``position``: what they had before is of another history."""
        self.reset(reason)
        self.seq, self.id = 0, ""
        self.epoch += 1
        self.unkept = dict.fromkeys(self.unkept)
        self._unplaced = dict.fromkeys(self.unkept)
        for sink, place in list(self._sinks.items()):
            sink.position = position
            if place is self._ahead:
                self.add(sink)

    def _note(self, message: Message, own: dict[Sink, list[bytes]]) -> None:
        """Remember how far the history has come; what it does not keep, held streams are told, who will not get it."""
        if message.seq:
            if message.seq <= self.seq:
                self.restart("history-lost", message.seq - 1)
            self.seq, self.id = message.seq, message.id
            for channel in self._unplaced:
                self.unkept[channel] = message.seq
            self._unplaced.clear()
        else:
            self._note_unkept(message.channel)
            for sink in self._held.get(message.channel, ()):
                own.setdefault(sink, []).append(events.stream_reset("not-kept", (message.channel,)))

    def _frame(self, message: Message) -> bytes:
        if message.payload is None:
            return events.stream_reset("unreadable-payload", (message.channel,))
        if not self.history:
            return events.frame(message.payload)
        return events.frame(message.payload, message.id)

    def _unplace(self, sink: Sink) -> None:
        before = self._sinks.get(sink)
        if before is not None:
            for channel in sink.audible:
                del before[channel][sink]
                if not before[channel]:
                    del before[channel]

    def _place(self, sink: Sink, place: dict[str, dict[Sink, None]]) -> None:
        self._unplace(sink)
        self._sinks[sink] = place
        for channel in sink.audible:
            place.setdefault(channel, {})[sink] = None

    def _settle(self) -> None:
        for sink in dict.fromkeys(sink for sinks in self._ahead.values() for sink in sinks):
            if sink.position <= self.seq:
                self.add(sink)

    def _note_unkept(self, channel: str) -> None:
        self.unkept.pop(channel, None)
        self.unkept[channel] = None
        self._unplaced[channel] = None
        if len(self.unkept) > MAX_UNKEPT:
            oldest = next(iter(self.unkept))
            del self.unkept[oldest]
            self._unplaced.pop(oldest, None)
