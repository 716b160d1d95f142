"""Who is on which channel, and what each is to be sent. No I/O."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from time import monotonic

from . import events
from .brokers.message import Message
from .counts import EVENTS, RESETS, Counts, Ledger
from .fanout import TURN, Batch, Fanout, Group, Sink
from .unkept import Unkept

BEATS = 240
"""Heartbeats that are told apart: a small number is an object that all share."""

_Streams = dict[Sink, None]
"""An ordered set."""
_Map = defaultdict[str, Group] | defaultdict[str, _Streams]
"""The streams on each channel."""


class Hub:
    """
    The map from channels to streams.

    Within a stream, events keep the order in which the broker gave them, also across its channels. All that waits for
    a stream goes out in one `Sink.send`. Events for many streams give way to those of other channels; see `fanout`.

    With ``history`` events carry the ids that the history gave them. A stream is *held* while it is brought up to
    date, and then *joins*. If the history has brought it further than the broker's messages have come, it is *ahead*
    until they are there as well.
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
        self._fanout = Fanout(self.counts, later)
        # The number of the last frame.
        self._number = 0
        # The last message that was delivered of those that a history keeps, by number and by id.
        self.seq = 0
        self.id = ""
        # How often numbers have begun anew.
        self.epoch = 0

        self.unkept = Unkept()

        # Streams on this channel alone: those that want no labels, and those that do.
        self._shared: tuple[defaultdict[str, Group], ...] = defaultdict(Group), defaultdict(Group)
        # Streams on several channels; and those that are ahead, which must not get again what they have already.
        self._individual: defaultdict[str, _Streams] = defaultdict(dict)
        # Streams that get nothing of the history for the time being.
        self._held: defaultdict[str, _Streams] = defaultdict(dict)
        # All streams, and which of these maps each is in.
        self._sinks: dict[Sink, _Map] = {}
        # The streams that are ahead.
        self._ahead: _Streams = {}
        # How many streams there have been.
        self._additions = 0
        # How many of the streams want labels: without any, nothing is labelled.
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
        maps: tuple[_Map, ...] = *self._shared, self._individual, self._held
        for streams_of in maps:
            for channel in list(streams_of):
                yield channel, len(streams_of.get(channel, ()))

    def add(self, sink: Sink) -> None:
        """Deliver to ``sink`` from now on."""
        self._place(sink, self._individual if len(sink.audible) > 1 else self._shared[sink.labels])

    def join(self, sink: Sink) -> None:
        """Deliver to ``sink`` what is behind its position, from now on."""
        if sink.position > self.seq:
            self._place(sink, self._individual)
            self._ahead[sink] = None
        else:
            self.add(sink)

    def hold(self, sink: Sink) -> None:
        """Deliver nothing of the history to ``sink`` for the time being."""
        self._place(sink, self._held)

    def live(self) -> list[Sink]:
        """Return the streams that are not held."""
        return [sink for sink, streams_of in self._sinks.items() if streams_of is not self._held]

    def hold_all(self) -> list[Sink]:
        """Hold every stream, each with the position that it has now, and return those that were not held."""
        # With the others', so that all share what is joined and packed.
        self._fanout.finish()
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
        self._displace(sink)
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
        times = began if arrived is None else arrived, began
        if self._ahead:
            self._settle()
        batch = Batch(times)
        for message in messages:
            if self.history:
                if message.payload is None and message.reason == "broker-reconnect":
                    if message.channel not in self.unkept:
                        continue  # a gap in what no history keeps, and there was nothing of that
                elif message.seq and message.seq <= self.seq:
                    self._send(batch)
                    batch = Batch(times)
                    self.restart("history-lost", message.seq - 1)
                self._note(message, batch)
            self._route(message, batch)
        self.counts.add(EVENTS, number=len(messages))
        self._send(batch)

    def send(self, sink: Sink, data: bytes) -> None:
        """Send ``data`` to one stream, behind what waits for it."""
        self.flush(sink)
        sink.send(data)

    def flush(self, sink: Sink) -> None:
        """Send now what waits for one stream."""
        waiting = self._fanout.take(sink)
        if (group := self._group(sink)) is not None:
            waiting = group.take(sink)
        if waiting:
            sink.send(waiting)

    def tell(self, sink: Sink, reason: str, channels: tuple[str, ...]) -> None:
        """Tell a stream that it may have missed events on ``channels``."""
        self.send(sink, events.stream_reset(reason, channels))
        self.counts.add(RESETS, reason)

    def heartbeat(self, part: int = 0, parts: int = 1) -> None:
        """
        Send the newest position to those streams of a part that have moved to it, and a comment to the others.

        Spread over ``parts``, since one to all at a time would keep events waiting.
        """
        here = events.position(self.id) if self.history and self.id else b""
        for sink in [sink for sink in self._sinks if sink.beat % parts == part]:
            # A position must not overtake the events up to it.
            if here and sink.position < self.seq and self._is_up_to_date(sink):
                sink.position = self.seq
                sink.send(here)
            else:
                sink.send(events.HEARTBEAT)

    def reset(self, reason: str) -> None:
        """Tell every stream that it may have missed events, and on which of its channels."""
        batch = Batch(None)
        self._number += 1
        for groups in self._shared:
            for channel, group in groups.items():
                batch.add_for(group, self._number, events.stream_reset(reason, (channel,)))
        for sink in self._sinks:
            if self._group(sink) is None:
                batch.add_for_one(sink, events.stream_reset(reason, sink.channels))
        self.counts.add(RESETS, reason, len(self._sinks))
        self._fanout.send(batch)

    def restart(self, reason: str, position: int, held: int | None = None) -> None:
        """
        Tell every stream so, and put all at ``position``: what they had before is of another history.

        Those that are held are put at ``held``, where it is given, unless they are before that.
        """
        self.reset(reason)
        self.seq, self.id = 0, ""
        self.epoch += 1
        self.unkept.restart()
        for sink, streams_of in list(self._sinks.items()):
            sink.position = position if held is None or streams_of is not self._held else min(sink.position, held)
        self._settle()

    def _note(self, message: Message, batch: Batch) -> None:
        """Remember how far the history has come. Held streams will not get an event outside it, and are told."""
        if message.seq:
            self.seq, self.id = message.seq, message.id
            self.unkept.place(message.seq)
        else:
            self.unkept.note(message.channel)
            for sink in self._held.get(message.channel, ()):
                batch.add_for_one(sink, events.stream_reset("not-kept", (message.channel,)))
                self.counts.add(RESETS, "not-kept")

    def _route(self, message: Message, batch: Batch) -> None:
        """Add the frame of ``message`` for all streams that it is for."""
        channel, seq = message.channel, message.seq
        group, individual = self._shared[0].get(channel), self._individual.get(channel)
        labelled = self._shared[1].get(channel) if self._labels else None
        recording = self._recording.get(channel) if seq else None
        if group is None and labelled is None and individual is None and recording is None:
            return
        frame = self._frame(message)
        with_label = events.label(channel, seq) + frame if self._labels else frame
        self._number += 1
        streams = 0
        if recording is not None:
            recording.append((seq, frame))
        for each, form in (group, frame), (labelled, with_label):
            if each is not None:
                batch.add_for(each, self._number, form)
                streams += len(each)
        if individual is not None:
            own, times = batch.own, batch.times
            for sink in individual:
                if not seq or seq > sink.position:
                    own.setdefault(sink, [times]).append(with_label if sink.labels else frame)
                    streams += 1
        batch.deliveries += streams
        batch.size += streams * len(frame)
        if message.payload is None:
            self.counts.add(RESETS, message.reason, streams)

    def _send(self, batch: Batch) -> None:
        # Counted for all streams of a batch: sending is what happens most often.
        self.counts.deliver(batch.deliveries, batch.size)
        self._fanout.send(batch)

    def _frame(self, message: Message) -> bytes:
        if message.payload is None:
            return events.stream_reset(message.reason, (message.channel,))
        if not self.history:
            return events.frame(message.payload)
        return events.frame(message.payload, message.id)

    def _place(self, sink: Sink, streams_of: _Map) -> None:
        if sink in self._sinks:
            self.flush(sink)
            self._displace(sink)
        else:
            self._additions += 1
            sink.beat = self._additions % BEATS
            self._labels += sink.labels
        self._sinks[sink] = streams_of
        for channel in sink.audible:
            streams_of[channel][sink] = None
        # The frames before this are not for it.
        sink.reached = self._number

    def _displace(self, sink: Sink) -> None:
        streams_of = self._sinks[sink]
        for channel in sink.audible:
            del streams_of[channel][sink]
            if not streams_of[channel]:
                del streams_of[channel]
        self._ahead.pop(sink, None)
        # Neither what waits for it nor a pass that is under way is for it any more.
        self._fanout.take(sink)
        sink.reached = self._number

    def _settle(self) -> None:
        """Put streams that were ahead among the others, once the broker's messages are as far; a turn of them at a time."""
        arrived = (sink for sink in self._ahead if sink.position <= self.seq)
        for sink in list(islice(arrived, TURN)):
            self.add(sink)

    def _group(self, sink: Sink) -> Group | None:
        """Return the group that ``sink`` is in, if it is in one."""
        group = self._sinks[sink].get(sink.audible[0]) if sink in self._sinks else None
        return group if isinstance(group, Group) else None

    def _is_up_to_date(self, sink: Sink) -> bool:
        """Return whether ``sink`` has been sent all that was delivered."""
        group = self._group(sink)
        return group.idle if group is not None else sink not in self._fanout and self._sinks[sink] is not self._held
