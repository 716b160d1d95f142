"""Who is on which channel, and what each is to be sent. No I/O."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from time import monotonic

from . import events
from .brokers.message import Message
from .counts import RESETS, Counts, Ledger
from .passes import TURN, MixedPass, Pass, Passes, Sink, Times
from .unkept import Unkept

BEATS = 240
"""Heartbeats that are told apart: a small number is an object that all share."""


class Hub:
    """
    The map from channels to streams.

    Within a stream, events keep the order in which the broker gave them, also across its channels. All
    that one batch holds for a stream goes out in one `Sink.send`.

    A pass over more than `TURN` streams gives way after as many, and goes on by ``later``; events of other channels
    overtake it then, those of its own do not.

    With ``history`` events carry the ids that the history gave them. A stream is *held* while it is brought
    up to date, and then *joins*.
    """

    def __init__(
        self,
        *,
        history: bool = False,
        later: Callable[[Callable[[], None]], object] | None = None,
        counts: Counts | None = None,
    ) -> None:
        self.history = history
        self.counts = counts or Counts(Ledger(1), 0)
        self._passes = Passes(self.counts, later)
        # How often a stream has been put anywhere: what is delivered later is not for the same ones.
        self._additions = 0
        # The last message that was delivered of those that a history keeps, by number and by id.
        self.seq = 0
        self.id = ""
        # How often numbers have begun anew.
        self.epoch = 0

        self.unkept = Unkept()

        # Streams on this channel alone, which share one piece of bytes; dicts as ordered sets.
        self._solo: dict[str, dict[Sink, None]] = {}
        # The same for those that want labels.
        self._labelled: dict[str, dict[Sink, None]] = {}
        # Streams on this and other channels, for which each batch is put together one by one.
        self._mixed: dict[str, dict[Sink, None]] = {}
        # Streams that the history has brought further than the broker's messages have come. What they have
        # already must not come again.
        self._ahead: dict[str, dict[Sink, None]] = {}
        # Streams that get nothing of the history for the time being.
        self._held: dict[str, dict[Sink, None]] = {}
        # All streams, and which of the five maps each is in.
        self._sinks: dict[Sink, dict[str, dict[Sink, None]]] = {}
        # How many of them want labels: without any, nothing is labelled.
        self._labels = 0
        # What has been delivered since `record`, of the channels that it was given.
        self._recording: dict[str, list[tuple[int, bytes]]] = {}

    def __len__(self) -> int:
        return len(self._sinks)

    def __iter__(self) -> Iterator[Sink]:
        return iter(list(self._sinks))

    def __contains__(self, sink: object) -> bool:
        return sink in self._sinks

    def sizes(self) -> Iterator[tuple[str, int]]:
        """
        Yield how many streams hear each channel, in parts that add up; others may come and go meanwhile.

        Whoever asked for a channel with a twin hears both.
        """
        for place in (self._solo, self._labelled, self._mixed, self._ahead, self._held):
            for channel in list(place):
                yield channel, len(place.get(channel, ()))

    def add(self, sink: Sink) -> None:
        """Deliver to ``sink`` from now on."""
        self._place(sink, self._mixed if len(sink.audible) > 1 else self._labelled if sink.labels else self._solo)

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
        return tuple(channel for channel in sink.audible if self.unkept.missed(channel, sink.position))

    def remove(self, sink: Sink) -> bool:
        """Stop delivering to ``sink``; return whether it was still there."""
        if sink not in self._sinks:
            return False
        self._unplace(sink)
        del self._sinks[sink]
        self._labels -= sink.labels
        return True

    def record(self, channels: Iterable[str]) -> dict[str, list[tuple[int, bytes]]]:
        """Collect number and frame of what is delivered on ``channels``, in place of what was recorded until now."""
        self._recording = {channel: [] for channel in channels}
        return self._recording

    def deliver(self, messages: Sequence[Message], arrived: float | None = None) -> None:
        """
        Send a batch of messages, each encoded once for all its streams.

        Args:
            messages: In the order of the broker.
            arrived: When they came from it, by `time.monotonic`; now, if that is not known.

        """
        began = monotonic()
        deliveries = size = 0
        shared: dict[tuple[str, bool], list[bytes]] = {}
        own: dict[Sink, list[bytes]] = {}
        for message in messages:
            channel, seq = message.channel, message.seq
            if self.history:
                if message.payload is None and message.reason == "broker-reconnect" and channel not in self.unkept:
                    continue  # a gap in what no history keeps, and there was nothing of that
                self._note(message, own)
            solo, mixed, ahead = self._solo.get(channel), self._mixed.get(channel), self._ahead.get(channel)
            labelled = self._labelled.get(channel) if self._labels else None
            recording = self._recording.get(channel) if seq else None
            if solo is None and labelled is None and mixed is None and ahead is None and recording is None:
                continue
            frame = self._frame(message)
            with_label = events.label(channel, seq) + frame if self._labels else frame
            streams = len(solo or ()) + len(labelled or ()) + len(mixed or ())
            if recording is not None:
                recording.append((seq, frame))
            if solo is not None:
                shared.setdefault((channel, False), []).append(frame)
            if labelled is not None:
                shared.setdefault((channel, True), []).append(with_label)
            for sink in mixed or ():
                own.setdefault(sink, []).append(with_label if sink.labels else frame)
            for sink in ahead or ():
                if not seq or seq > sink.position:
                    own.setdefault(sink, []).append(with_label if sink.labels else frame)
                    streams += 1
            deliveries += streams
            size += streams * len(frame)
            if message.payload is None:
                self.counts.add(RESETS, message.reason, streams)
        # Here, for all streams of a batch: sending is what happens most often.
        self.counts.deliver(len(messages), deliveries, size)
        self._send(shared, own, (began if arrived is None else arrived, began))
        if self._ahead:
            self._settle()

    def finish(self) -> None:
        """Send now all that has given way."""
        self._passes.finish()

    def tell(self, sink: Sink, reason: str, channels: tuple[str, ...]) -> None:
        """Tell a stream that it may have missed events on ``channels``."""
        sink.send(events.stream_reset(reason, channels))
        self.counts.add(RESETS, reason)

    def _send(self, shared: dict[tuple[str, bool], list[bytes]], own: dict[Sink, list[bytes]], times: Times) -> None:
        sent = 0
        for key, frames in shared.items():
            channel, labels = key
            sinks = (self._labelled if labels else self._solo).get(channel, {})
            if self._passes.extend(key, frames, self._additions):
                continue
            if len(sinks) > TURN or key in self._passes:
                # Those that are there now: whoever comes meanwhile comes behind this event.
                self._passes.add(key, Pass(list(sinks), frames, self._additions, times))
            else:
                data = b"".join(frames)
                for sink in list(sinks):
                    sink.send(data)
                sent += len(sinks)
        if len(own) > TURN or None in self._passes:
            self._passes.add(None, MixedPass(own, self._additions, times))
        else:
            for sink, frames in own.items():
                sink.send(b"".join(frames))
            sent += len(own)
        if sent:
            self.counts.sent(sent, times, whole=True)

    def heartbeat(self, part: int = 0, parts: int = 1) -> None:
        """
        Send a comment to a part of all streams, and the newest id to those that have all up to it, to come back there.

        Spread over ``parts``, since one to all at a time would keep events waiting.
        """
        # What is still to be sent must not be behind its own id.
        known = self.history and self.id and not self._passes
        here = b":\n" + events.position(self.id) if known else b":\n\n"
        for sink, place in [pair for pair in self._sinks.items() if pair[0].beat % parts == part]:
            sink.send(here if place is not self._held and sink.position <= self.seq else b":\n\n")

    def reset(self, reason: str) -> None:
        """Tell every stream that it may have missed events, and on which of its channels."""
        self.finish()
        for sink in self:
            self.tell(sink, reason, sink.channels)

    def restart(self, reason: str, position: int, held: int | None = None) -> None:
        """
        Tell every stream so, and put all at ``position``: what they had before is of another history.

        Those that are held are put at ``held``, where it is given, unless they are before that.
        """
        self.reset(reason)
        self.seq, self.id = 0, ""
        self.epoch += 1
        self.unkept.restart()
        for sink, place in list(self._sinks.items()):
            sink.position = position if held is None or place is not self._held else min(sink.position, held)
            if place is self._ahead:
                self.add(sink)

    def _note(self, message: Message, own: dict[Sink, list[bytes]]) -> None:
        """Remember how far the history has come; what it does not keep, held streams are told, who will not get it."""
        if message.seq:
            if message.seq <= self.seq:
                self.restart("history-lost", message.seq - 1)
            self.seq, self.id = message.seq, message.id
            self.unkept.place(message.seq)
        else:
            self.unkept.note(message.channel)
            for sink in self._held.get(message.channel, ()):
                own.setdefault(sink, []).append(events.stream_reset("not-kept", (message.channel,)))
                self.counts.add(RESETS, "not-kept")

    def _frame(self, message: Message) -> bytes:
        if message.payload is None:
            return events.stream_reset(message.reason, (message.channel,))
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
        if self._passes and sink in self._sinks:
            self.finish()
        self._unplace(sink)
        self._additions += 1
        if sink not in self._sinks:
            sink.beat = self._additions % BEATS
            self._labels += sink.labels
        self._sinks[sink] = place
        for channel in sink.audible:
            place.setdefault(channel, {})[sink] = None

    def _settle(self) -> None:
        for sink in dict.fromkeys(sink for sinks in self._ahead.values() for sink in sinks):
            if sink.position <= self.seq:
                self.add(sink)
