"""Sending to many streams, which gives way to other channels from time to time. No I/O."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from typing import Protocol

from .counts import Counts

TURN = 256
"""Streams that are sent to without a break: more of them would keep the events of all other channels waiting."""

Times = tuple[float, float]
"""When events came from the broker, and when the pass over their streams began, by `time.monotonic`."""

Key = tuple[str, bool] | None
"""The channel of a pass, and whether with labels; or None for one over streams on several channels."""


class Sink(Protocol):
    """What the hub delivers to: one open stream."""

    channels: tuple[str, ...]
    """The channels that its page asked for."""
    audible: tuple[str, ...]
    """Those, and their twins: the channels whose events it gets."""
    position: int
    """The place in the history up to which it has everything; 0 without one."""
    labels: bool
    """Whether it is told of which channel each event is; see `events.label`."""
    beat: int
    """Which of the heartbeats is its; set by the hub."""

    def send(self, data: bytes) -> None:
        """Write ``data`` or queue it; never raises and never blocks."""


class Pass:
    """What a channel's streams are still to be sent."""

    __slots__ = ("_frames", "_pairs", "_sinks", "additions", "times")

    def __init__(self, sinks: list[Sink], frames: list[bytes], additions: int, times: Times) -> None:
        self._sinks = sinks
        self._frames = frames
        # See `hub.Hub`.
        self.additions = additions
        # Those of the first events of it.
        self.times = times
        self._pairs: Iterator[tuple[Sink, bytes]] | None = None

    def extend(self, frames: list[bytes]) -> bool:
        """Take ``frames`` in as well, so that they go out in one write; return False if it has begun."""
        if self._pairs is None:
            self._frames += frames
        return self._pairs is None

    def turn(self) -> int:
        """Send to the next `TURN` streams, and return to how many: fewer, when all have been sent to."""
        if self._pairs is None:
            self._pairs = zip(self._sinks, itertools.repeat(b"".join(self._frames)), strict=False)
        number = 0
        for sink, data in itertools.islice(self._pairs, TURN):
            sink.send(data)
            number += 1
        return number


class MixedPass(Pass):
    """The same for streams on several channels, each of which gets its own."""

    __slots__ = ()

    def __init__(self, own: dict[Sink, list[bytes]], additions: int, times: Times) -> None:
        super().__init__([], [], additions, times)
        self._pairs = ((sink, b"".join(frames)) for sink, frames in own.items())


class Passes:
    """
    All that is still to be sent.

    Args:
        counts: What is told how long it took.
        later: Calls back soon, when others have had their turn; None to send all at once.

    """

    def __init__(self, counts: Counts, later: Callable[[Callable[[], None]], object] | None) -> None:
        self._counts = counts
        self._later = later
        # In each the oldest first.
        self._waiting: dict[Key, deque[Pass]] = {}
        # Whether they are to go on; a call is on its way then, also if there is nothing left for it.
        self._due = False

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def __contains__(self, key: Key) -> bool:
        return key in self._waiting

    def extend(self, key: Key, frames: list[bytes], additions: int) -> bool:
        """Send ``frames`` with the last pass of ``key``, if it has not begun, and is for the same streams."""
        passes = self._waiting.get(key)
        return passes is not None and passes[-1].additions == additions and passes[-1].extend(frames)

    def add(self, key: Key, what: Pass) -> None:
        """Send it when its turn comes."""
        self._waiting.setdefault(key, deque()).append(what)
        if self._later is None:
            self.finish()
        elif not self._due:
            self._due = True
            self._later(self._go_on)

    def finish(self) -> None:
        """Send now all that has given way."""
        while self._waiting:
            self._turn()

    def _go_on(self) -> None:
        if self._waiting:
            self._turn()
        self._due = bool(self._waiting)
        if self._due and self._later:
            self._later(self._go_on)

    def _turn(self) -> None:
        """Send the oldest pass of one channel to so many streams, and let the other channels have theirs first then."""
        key = next(iter(self._waiting))
        passes = self._waiting.pop(key)
        sent = passes[0].turn()
        self._counts.sent(sent, passes[0].times, whole=sent < TURN)
        if sent < TURN:
            passes.popleft()
        if passes:
            self._waiting[key] = passes
