"""Bringing streams up to date from the history, and joining them to what comes live.

Each turn reads one bounded page for each place that streams are at, on each of their channels, and gives a
stream the next page only when it has taken the one before. So neither the loop nor the memory is held by a
backlog, and a thousand streams at one place cost one read.

The join: a stream is subscribed before its first read, and what comes live during a read is recorded. A page
that ends the history, and what was recorded behind it, are all there is up to this moment; from the next
message on the hub delivers. Nothing awaits between these two.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
from typing import NamedTuple, Protocol, cast

from . import events
from .errors import BrokerError, BrokerRefused, BrokerUnavailable
from .history.spans import EARLIEST, Cursor, Spans, parse
from .hub import Hub, Sink

log = logging.getLogger(__name__)

# Pages of one read, and events of all of them together, about.
PAGES = 200
EVENTS = 1000
# After a read that the broker refused, this many reads are for one stream each.
ALONE = 200
# Bytes that a stream gets at a time, but for the last event.
PART_BYTES = 131_072
# Streams that are served in one go; then others of the loop get a turn.
STREAMS = 200
# Seconds between two looks for what is to be deleted, and pauses while there is more.
PRUNE_SECONDS = 10.0
PRUNE_PAUSE = 0.05
RETRY_SECONDS = 0.5
# An id of an unknown span is looked up again at most this often.
REOPEN_SECONDS = 1.0


class Row(NamedTuple):
    """One event that is kept."""

    seq: int
    id: str
    payload: str


class Page(NamedTuple):
    """The events of one channel behind a place."""

    rows: list[Row]
    complete: bool
    """Whether there are no more."""
    through: int
    """Up to where events of this channel have been, or may have been, deleted."""


class History(Protocol):
    """The history of one broker. All raise `BrokerError`."""

    hint: str
    """What to do where the broker keeps none."""

    async def open(self) -> tuple[Cursor, Spans] | None:
        """Return where it ends and what it consists of, or None if the broker keeps none. Called at each connect."""

    async def find(self, own_id: str, channels: tuple[str, ...]) -> int | None:
        """Return the number of the one event on ``channels`` with this id of its publisher's own; None if there is not one."""

    async def read(self, places: list[tuple[str, int]], limit: int) -> tuple[list[Page], Cursor | None]:
        """
        Return a page of at most ``limit`` events for each (channel, number), and where the history ended then.

        All of it is of one moment. There is no end where the broker has forgotten that it keeps a history.
        """

    async def prune(self) -> bool:
        """Delete some of what is too old or too much; return whether there is more."""


class Stream(Sink, Protocol):
    """A sink that can be waited for."""

    told: dict[str, int]
    """Up to where it has been told that events of a channel are pruned."""

    def drained(self) -> asyncio.Future[None] | None:
        """Return what resolves when nothing waits to be written, or None if nothing does."""


class _Part(NamedTuple):
    """What a stream at some place on some channels gets in this turn."""

    data: bytes
    position: int
    complete: bool
    gaps: dict[str, int]


_Frames = list[tuple[int, bytes]]


class Replay:
    """The streams of one worker that are behind."""

    def __init__(self, hub: Hub, history: History) -> None:
        # Whether the broker keeps a history.
        self.active = False

        self._hub = hub
        self._history = history
        # What it consists of; None until it has been asked for on this connection.
        self._spans: Spans | None = None
        self._opened_at = 0.0
        # Where it ended when it was last read.
        self._head: Cursor | None = None
        self._connected = False
        # Which connection it is: what was read over another one joins to nothing.
        self._session = 0
        # So many streams are yet to be served one by one, since one of them makes the broker refuse.
        self._alone = 0
        # The streams to read for. Those that have yet to take what they were given are not among them.
        self._behind: dict[Stream, None] = {}
        # Who waits for the next read.
        self._asking: list[asyncio.Future[None]] = []
        self._work = asyncio.Event()

    # Called by handlers.

    async def find(self, last_event_id: str, audible: tuple[str, ...]) -> int | None:
        """
        Return the number of the event that a stream on ``audible`` channels had last, or None if it is not known.

        Raises:
            BrokerError: If the broker cannot be asked.

        """
        cursor = parse(last_event_id)
        if self._is_strange(cursor):
            # A span may have begun since. Many that come with what nobody knows must not ask the broker each.
            await asyncio.sleep(max(0.0, self._opened_at + REOPEN_SECONDS - _now()))
            if self._is_strange(cursor):
                self._spans = None
        if self._spans is None:
            await self._next_read()
        if not self.active or self._spans is None:
            return None
        if last_event_id == EARLIEST:
            return 0
        if cursor and cursor.token in self._spans:
            if self.newest and cursor.seq > self.newest.seq:
                await self._next_read()
            known = self.newest and cursor.seq <= self.newest.seq and self._spans and self._spans.admits(cursor)
            return cursor.seq if known else None
        return await self._history.find(last_event_id, audible)

    async def refresh(self) -> None:
        """
        Learn where the history ends, for a new stream whose channels have only now been subscribed to.

        Raises:
            BrokerError: If the broker cannot be asked.

        """
        if self._spans is None or self.active:
            await self._next_read()

    @property
    def newest(self) -> Cursor | None:
        """The newest place that is known; None without a history."""
        live = parse(self._hub.id)
        if not self.active or (self._head is None and live is None):
            return None
        return max((place for place in (self._head, live) if place), key=lambda place: place.seq)

    def admit(self, stream: Stream, *, behind: bool) -> None:
        """Let ``stream`` in, which has been opened and subscribed; one that is ``behind`` gets what it missed first."""
        if behind:
            self._tell_unkept(stream, "not-kept")
        if behind or not self._connected or self._spans is None:
            self._hub.hold(stream)
            self._wait_for_turn(stream)
        else:
            self._hub.add(stream)

    # Called by the reader.

    def lost(self) -> None:
        """Hold all streams: until the connection is back, and they have what they missed, nothing is live."""
        self._connected = False
        self._session += 1
        self._answer(BrokerUnavailable("the connection was lost"))
        if self.active:
            self._head = self.newest
            self._behind.update(dict.fromkeys(cast("list[Stream]", self._hub.hold_all())))

    def back(self, again: bool) -> None:
        """Go on: all channels are listened to. ``again`` says that there was a connection before this one."""
        self._connected = True
        self._spans = None
        if again and not self.active:
            self._hub.reset("broker-reconnect")
        for stream in self._behind:
            self._tell_unkept(stream, "broker-reconnect")
        self._work.set()

    # The work.

    async def run(self) -> None:
        """Serve the streams that are behind. Cancel it to end."""
        while True:
            await self._work.wait()
            self._work.clear()
            while self._connected and (self._spans is None or self._behind or self._asking):
                try:
                    await (self._open() if self._spans is None else self._turn())
                except BrokerError as exc:
                    # What one stream asks for must not keep the others from theirs.
                    self._alone = ALONE if isinstance(exc, BrokerRefused) and self._spans is not None else self._alone
                    log.warning("the history cannot be read, next try in %.1f s: %s", RETRY_SECONDS, exc)
                    self._answer(exc)
                    self._spans = None  # whether it is still there is seen by `_open`
                    self._hub.record(())
                    await asyncio.sleep(RETRY_SECONDS)

    async def prune(self) -> None:
        """Delete what is too old or too much, for ever. Cancel it to end."""
        while True:
            await asyncio.sleep(PRUNE_SECONDS)
            try:
                while self._connected and self.active and await self._history.prune():
                    await asyncio.sleep(PRUNE_PAUSE)
            except BrokerError as exc:
                log.warning("old events cannot be deleted: %s", exc)
            if self._connected and not self.active:  # it may have been set up meanwhile
                self._spans = None
                self._work.set()

    async def _open(self) -> None:
        begun = self._state()
        opened = await self._history.open()
        if begun != self._state():
            return
        self._opened_at = _now()
        if opened is None:
            self._do_without()
            return
        head, self._spans = opened
        if not self.active:
            log.info("the history is at %s", head)
            for sink in self._hub:
                sink.position = head.seq
        elif self._head and not self._spans.admits(self._head):
            log.error("the broker has lost events: its history does not go on from %s", self._head)
            self._hub.restart("history-lost", head.seq)
        self.active, self._head = True, head

    def _do_without(self) -> None:
        if self.active or self._spans is None:
            log.error("RELAY_HISTORY is set, but the broker keeps no history: %s", self._history.hint)
        if self.active:
            self._hub.restart("history-lost", 0)
        self.active, self._spans, self._head = False, Spans(), None
        for stream in self._behind:
            if stream in self._hub:
                self._hub.add(stream)
        self._hub.record(())
        self._behind.clear()
        self._answer()

    async def _turn(self) -> None:
        """Read once, and give every stream that it was read for what it gets."""
        asking, self._asking = self._asking, []
        streams, places = self._choose()
        recorded = self._hub.record(channel for channel, _ in places)
        head, begun = None, self._state()
        try:
            pages, head = await self._history.read(places, max(5, EVENTS // (len(places) or 1)))
        except BrokerRefused:
            if self._alone and len(streams) == 1:
                self._give_up(streams.pop())
            raise
        finally:
            if head is None or begun != self._state():
                self._asking += asking
                self._behind.update(dict.fromkeys(streams))
        if head is None or begun != self._state():
            self._spans = None
            self._hub.record(())
            return
        self._head = head
        _resolve(asking)
        framed: dict[tuple[str, int], tuple[_Frames, Page]] = {}
        for place, page in zip(places, pages, strict=True):
            framed[place] = [(row.seq, events.frame(row.payload, row.id)) for row in page.rows], page
        parts: dict[tuple[tuple[str, ...], int], _Part] = {}
        for number, stream in enumerate(streams, 1):
            if stream in self._hub:
                key = stream.audible, stream.position
                if key not in parts:
                    parts[key] = _part(*key, framed, recorded, head.seq)
                self._give(stream, parts[key])
            if number % STREAMS == 0:
                await asyncio.sleep(0)
                parts.clear()  # more may have been recorded
                if begun != self._state():
                    self._behind.update((each, None) for each in streams[number:] if each in self._hub)
                    break
        self._hub.record(())

    def _state(self) -> tuple[bool, int, int]:
        return self._connected, self._session, self._hub.epoch

    def _choose(self) -> tuple[list[Stream], list[tuple[str, int]]]:
        """Take as many streams as one read can serve, and return them with the places to read at."""
        streams: list[Stream] = []
        places: dict[tuple[str, int], None] = {}
        for stream in list(self._behind):
            wanted = [(channel, stream.position) for channel in stream.audible]
            if places and len(places) + sum(place not in places for place in wanted) > PAGES:
                continue
            del self._behind[stream]
            if stream in self._hub:
                places.update(dict.fromkeys(wanted))
                streams.append(stream)
                if self._alone:
                    self._alone -= 1
                    break
        return streams, list(places)

    def _give(self, stream: Stream, part: _Part) -> None:
        if gaps := tuple(name for name, through in part.gaps.items() if through > stream.told.get(name, 0)):
            stream.told |= part.gaps
            stream.send(events.stream_reset("pruned-id", gaps))
        if part.data:
            stream.send(part.data)
        stream.position = part.position
        if part.complete and stream in self._hub:
            self._hub.join(stream)
        elif waiting := stream.drained():
            waiting.add_done_callback(lambda _: self._wait_for_turn(stream))
        else:
            self._wait_for_turn(stream)

    def _give_up(self, stream: Stream) -> None:
        # Position and hub stay consistent: the reset covers all up to now, and from now on it is live.
        stream.position = self._head.seq if self._head else 0
        stream.send(events.stream_reset("unreadable-history", stream.audible))
        self._hub.join(stream)

    def _wait_for_turn(self, stream: Stream) -> None:
        if stream in self._hub:
            self._behind[stream] = None
            self._work.set()

    def _is_strange(self, cursor: Cursor | None) -> bool:
        return cursor is not None and self._spans is not None and self.active and cursor.token not in self._spans

    def _tell_unkept(self, stream: Stream, reason: str) -> None:
        unkept = tuple(channel for channel in stream.audible if channel in self._hub.unkept)
        if unkept:
            stream.send(events.stream_reset(reason, unkept))

    def _next_read(self) -> asyncio.Future[None]:
        """Return what resolves when a read that begins after this call is there."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self._connected:
            self._asking.append(future)
            self._work.set()
        else:
            future.set_exception(BrokerUnavailable("the connection was lost"))
        return future

    def _answer(self, error: BrokerError | None = None) -> None:
        asking, self._asking = self._asking, []
        _resolve(asking, error)


def _resolve(asking: list[asyncio.Future[None]], error: BrokerError | None = None) -> None:
    for future in asking:
        if not future.done():
            future.set_exception(error) if error else future.set_result(None)


def _part(
    audible: tuple[str, ...],
    position: int,
    framed: dict[tuple[str, int], tuple[_Frames, Page]],
    recorded: dict[str, _Frames],
    head: int,
) -> _Part:
    """Return what a stream at ``position`` gets of pages that were read when the history ended at ``head``."""
    found = {channel: framed[channel, position] for channel in audible}
    gaps = {channel: page.through for channel, (_, page) in found.items() if position and page.through > position}
    # Across channels a stream gets events in their order, so no further than the first page that was cut short.
    end = min((page.rows[-1].seq for _, page in found.values() if not page.complete), default=None)
    frames = heapq.merge(*(frames for frames, _ in found.values()))
    # A stream gets no more at a time than a page, on however many channels it is.
    taken: _Frames = []
    size = 0
    for seq, frame in frames:
        if end is not None and seq > end:
            break
        if size >= PART_BYTES:
            end = taken[-1][0]
            break
        taken.append((seq, frame))
        size += len(frame)
    if end is not None:
        return _Part(b"".join(frame for _, frame in taken), end, False, gaps)
    # What was recorded and is no later than the head is in the pages.
    end = max(position, head)
    tail = list(heapq.merge(*([pair for pair in recorded[channel] if pair[0] > end] for channel in audible)))
    data = b"".join(frame for _, frame in [*taken, *tail])
    return _Part(data, tail[-1][0] if tail else end, True, gaps)


def _now() -> float:
    return asyncio.get_running_loop().time()
