"""Sending frames to streams, in turns of bounded length. No I/O.

All frames that wait for a stream go out in one write, however many batches they came in. So a worker that falls behind
sends larger writes, not more of them.

Streams on one channel form a `Group`, for which frames wait once. Frames have numbers that rise over all groups, and
each stream of a group keeps the number that it has *reached*. A stream that joins, leaves, or is sent to before the
others therefore costs the others nothing. Streams on several channels have frames waiting for each of them.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from .counts import Counts

TURN = 256
"""Streams that are sent to without a break. More of them would keep the events of all other channels waiting."""

Times = tuple[float, float] | None
"""
The time at which events came from the broker, and that at which the hub took them, by `time.monotonic`; None for what did
not come from the broker.
"""

Numbered = tuple[int, bytes]
"""A frame with its number."""


Backlog = list[Any]
"""Frames that wait for one stream, behind the `Times` of the first of them: one list is less to make for each stream."""


class Sink(Protocol):
    """One open stream, as the hub sees it."""

    channels: tuple[str, ...]
    """The channels that its page asked for."""
    audible: tuple[str, ...]
    """Those, and their twins: the channels whose events it gets."""
    position: int
    """The place in the history up to which it has everything; 0 without one."""
    labels: bool
    """Whether each event names its channel; see `events.label`."""
    beat: int
    """Which of the heartbeats is its; set by the hub."""
    reached: int
    """The number of the last frame of its group that it needs no more; set by the hub."""

    def send(self, data: bytes) -> None:
        """Write ``data`` or queue it; never raises and never blocks."""


class Lane(Protocol):
    """Streams that have their turns in common."""

    queued: bool
    """Whether frames wait for any of them, so that a turn will come."""

    def turn(self, counts: Counts) -> bool:
        """Send to some of the streams that frames wait for, and return whether frames still wait for others."""


class Group(dict[Sink, None]):
    """
    The streams on one channel, as an ordered set, and the frames that wait for them.

    A large group is sent to in a *pass* of several turns. Frames that come during a pass wait for the next one.
    """

    __slots__ = ("_pass", "queued", "times", "waiting")

    def __init__(self) -> None:
        super().__init__()
        # The frames that no pass has begun with, and the times of the first of them.
        self.waiting: Sequence[Numbered] = ()
        self.times: Times = None
        self._pass: Pass | None = None
        # Whether a turn will come, as a lane or in the lane of small groups.
        self.queued = False

    @property
    def idle(self) -> bool:
        """Whether no frame waits for any of the streams."""
        return not self.waiting and self._pass is None

    def append(self, number: int, frame: bytes, times: Times) -> None:
        """Let ``frame`` wait."""
        if isinstance(self.waiting, list):
            self.waiting.append((number, frame))
        else:
            self.waiting, self.times = [(number, frame)], times

    def send(self) -> int:
        """Send what waits to all streams at once, and return to how many it was sent."""
        frames, self.waiting = self.waiting, ()
        return _send(list(self), frames, _joined(frames), {})

    def turn(self, counts: Counts) -> bool:
        """See `Lane`."""
        if self._pass is None:
            self._pass = Pass(self.waiting, self.times, list(self))
            self.waiting = ()
        if self._pass.turn(counts):
            self._pass = None
        return not self.idle

    def take(self, sink: Sink) -> bytes:
        """Return the frames that wait for ``sink``, which the caller sends to it."""
        under_way = self._pass.frames if self._pass else ()
        frames = [entry for entry in (*under_way, *self.waiting) if entry[0] > sink.reached]
        if frames:
            sink.reached = frames[-1][0]
        return _joined(frames)


class Pass:
    """Some frames on their way to the streams of a large group that were there when it began."""

    __slots__ = ("_at", "_data", "_parts", "_streams", "_times", "frames")

    def __init__(self, frames: Sequence[Numbered], times: Times, streams: list[Sink]) -> None:
        self.frames = frames
        self._times = times
        self._streams = streams
        # How many of them have had their turn.
        self._at = 0
        self._data = _joined(frames)
        self._parts: dict[int, bytes] = {}

    def turn(self, counts: Counts) -> bool:
        """Send to the next streams, and return whether those were the last."""
        streams = self._streams[self._at : self._at + TURN]
        sent = _send(streams, self.frames, self._data, self._parts)
        self._at += len(streams)
        ended = self._at >= len(self._streams)
        counts.sent(sent, self._times, whole=ended)
        return ended


class SmallGroups(deque[Group]):
    """Groups of no more than `TURN` streams, which are sent to in one go."""

    queued = False

    def turn(self, counts: Counts) -> bool:
        """See `Lane`."""
        sent = 0
        while self and sent < TURN:
            group = self.popleft()
            group.queued = False
            if group:  # the streams of others have left
                counts.sent(group.send(), group.times, whole=True)
                sent += len(group)
        return bool(self)


class Individuals(dict[Sink, Backlog]):
    """Streams on several channels, each with the frames that wait for it."""

    queued = False

    def turn(self, counts: Counts) -> bool:
        """See `Lane`."""
        backlogs = list(itertools.islice(self.items(), TURN))
        if not backlogs:
            return False
        for sink, _ in backlogs:
            del self[sink]
        # Frames that are the same for several streams are joined once, and so packed once.
        joined: dict[tuple[int, ...], bytes] = {}
        sent, times = 0, backlogs[0][1][0]
        for sink, backlog in backlogs:
            if backlog[0] is not times:
                counts.sent(sent, times, whole=False)
                sent, times = 0, backlog[0]
            if len(backlog) == 2:
                data = backlog[1]
            else:
                key = tuple(map(id, backlog))
                data = joined.get(key) or joined.setdefault(key, b"".join(backlog[1:]))
            sink.send(data)
            sent += 1
        counts.sent(sent, times, whole=not self)
        return bool(self)


class Batch:
    """
    What a batch of messages is for its streams.

    Args:
        times: Of these messages.

    """

    __slots__ = ("deliveries", "groups", "own", "size", "times")

    def __init__(self, times: Times) -> None:
        self.times = times
        # The groups for which no frames waited before this batch.
        self.groups: list[Group] = []
        # The frames of streams on several channels.
        self.own: dict[Sink, Backlog] = {}
        # How many frames that is for all streams together, and their bytes.
        self.deliveries = 0
        self.size = 0

    def add_for(self, group: Group, number: int, frame: bytes) -> None:
        """Add a frame for all streams of ``group``."""
        if not group.waiting:
            self.groups.append(group)
        group.append(number, frame, self.times)

    def add_for_one(self, sink: Sink, frame: bytes) -> None:
        """Add a frame for one stream that is in no group."""
        self.own.setdefault(sink, [self.times]).append(frame)


class Fanout:
    """
    All that is still to be sent.

    Frames for a few streams go out at once. Those for many wait for their turn: each large group is a *lane*, and so
    are all small groups together, and all streams on several channels. Lanes take turns.

    Args:
        counts: Counts the streams that were sent to, and times them.
        later: Calls back soon, when others have had their turn; None to send all at once.

    """

    def __init__(self, counts: Counts, later: Callable[[Callable[[], None]], object] | None) -> None:
        self._counts = counts
        self._later = later
        self._lanes: deque[Lane] = deque()
        self._small = SmallGroups()
        self._individuals = Individuals()
        # Whether a call is on its way.
        self._due = False

    def __contains__(self, sink: Sink) -> bool:
        """Return whether frames wait for ``sink`` alone."""
        return sink in self._individuals

    def take(self, sink: Sink) -> bytes:
        """Return the frames that wait for ``sink`` alone, which the caller sends to it."""
        return b"".join(self._individuals.pop(sink, ())[1:])

    def send(self, batch: Batch) -> None:
        """Send what waits for the groups and streams of ``batch``: now if that is one turn, and otherwise later."""
        room, own = TURN, batch.own
        for group in batch.groups:
            if group.queued or not group.waiting:
                continue
            if len(group) <= room:
                room -= len(group)
                group.send()
            elif len(group) > TURN:
                self._queue(group)
            else:
                group.queued = True
                self._small.append(group)
                self._queue(self._small)
        large = len(own) > room
        if self._individuals:
            for sink in own.keys() & self._individuals.keys():
                self._individuals[sink] += own.pop(sink)[1:]
        if large:
            self._individuals.update(own)
            self._queue(self._individuals)
        else:
            room -= len(own)
            for sink, backlog in own.items():
                sink.send(backlog[1] if len(backlog) == 2 else b"".join(backlog[1:]))
        if room < TURN:
            self._counts.sent(TURN - room, batch.times, whole=True)
        self._go_on_later()

    def finish(self) -> None:
        """Send all that waits, now."""
        while self._lanes:
            self._turn()

    def _queue(self, lane: Lane) -> None:
        if not lane.queued:
            lane.queued = True
            self._lanes.append(lane)

    def _go_on_later(self) -> None:
        if self._later is None:
            self.finish()
        elif self._lanes and not self._due:
            self._due = True
            self._later(self._go_on)

    def _go_on(self) -> None:
        self._due = False
        if self._lanes:
            self._turn()
        self._go_on_later()

    def _turn(self) -> None:
        lane = self._lanes.popleft()
        lane.queued = lane.turn(self._counts)
        if lane.queued:
            self._lanes.append(lane)


def _joined(frames: Sequence[Numbered]) -> bytes:
    return b"".join([frame for _, frame in frames])


def _send(streams: Sequence[Sink], frames: Sequence[Numbered], data: bytes, parts: dict[int, bytes]) -> int:
    """
    Send ``frames``, joined as ``data``, to those of ``streams`` that need them, and return how many these are.

    A stream that came when some of the frames waited already gets the others.
    """
    first, last = frames[0][0], frames[-1][0]
    sent = len(streams)
    for sink in streams:
        if sink.reached < first:
            sink.reached = last
            sink.send(data)
        elif sink.reached < last:
            reached, sink.reached = sink.reached, last
            if reached not in parts:
                parts[reached] = _joined([entry for entry in frames if entry[0] > reached])
            sink.send(parts[reached])
        else:
            sent -= 1
    return sent
