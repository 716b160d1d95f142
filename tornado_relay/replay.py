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
import logging
from typing import NamedTuple, Protocol, cast

from .counts import HISTORY_FAILURES, REPLAYED
from .errors import BrokerError, BrokerRefused, BrokerUnavailable
from .fanout import Sink
from .history import History
from .history.page import FramedPage, Frames, Part, part
from .history.spans import EARLIEST, Cursor, Spans, parse
from .hub import Hub

log = logging.getLogger(__name__)

# Pages of one read: at most, and at first. There are fewer where events are large.
MAX_PLACES = 200
FIRST_PLACES = 8
# Events and bytes of one read, about; each page has one event at least.
EVENTS = 1000
READ_BYTES = 2_097_152
# Bytes of one page, but for its last event.
PAGE_BYTES = 131_072
# Streams that are served in one go; then others of the loop get a turn.
STREAMS = 200
RETRY_SECONDS = 0.5
# An id of an unknown span is looked up again at most this often.
REOPEN_SECONDS = 1.0


class Stream(Sink, Protocol):
    """A sink that can be waited for."""

    told: dict[str, int]
    """Up to where it has been told that events of a channel are pruned."""

    def drained(self) -> asyncio.Future[None] | None:
        """Return what resolves when nothing waits to be written, or None if nothing does."""


_Place = tuple[str, int]


class _Read(NamedTuple):
    """What one read of the history brought."""

    streams: list[Stream]
    pages: dict[_Place, FramedPage]
    recorded: dict[str, Frames]
    """What has come live since it began, on the channels that it was for."""
    head: Cursor


class Replay:
    """
    The streams of one worker that are behind.

    Args:
        hub: Where they are when they are not.
        history: What brings them up to date.

    """

    def __init__(self, hub: Hub, history: History) -> None:
        # Whether the broker keeps a history, and whether it is connected.
        self.active = False
        self.connected = False

        self._hub = hub
        self._history = history
        # What the history consists of; None until it has been asked for on this connection.
        self._spans: Spans | None = None
        # The tokens of the spans that were there at the connection before, or are now.
        self._tokens: set[str] = set()
        self._opened_at = 0.0
        # Whether it is to be asked for again; until then what is known holds.
        self._reopen = False
        # Where it ended when it was last read.
        self._head: Cursor | None = None
        # Whether what this connection leads to has been seen to go on from there. Until then what comes live may be of
        # a server that has not got all.
        self._goes_on = False
        # Which connection it is: what was read over another one joins to nothing.
        self._session = 0
        # How many places the next read is for, at most.
        self._places = FIRST_PLACES
        # So many streams are yet to be read for one by one, since what one of them asks for is refused.
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

        It is -1 for one that takes all that is kept.

        Raises:
            BrokerError: If the broker cannot be asked.

        """
        cursor = parse(last_event_id)
        if self._is_strange(cursor):
            # A span may have begun since. Many that come with what nobody knows must not ask the broker each.
            await asyncio.sleep(max(0.0, self._opened_at + REOPEN_SECONDS - _now()))
            self._reopen = self._reopen or self._is_strange(cursor)
        if self._spans is None or self._reopen:
            await self._next_read()
        if cursor and self.newest and cursor.seq > self.newest.seq:
            await self._next_read()
        if self._spans is None:
            raise BrokerUnavailable("the history is being looked for")
        if not self.active:
            return None
        if last_event_id == EARLIEST:
            return -1
        if cursor and cursor.token in self._spans:
            known = self.newest and cursor.seq <= self.newest.seq and self._spans.admits(cursor)
            return cursor.seq if known else None
        found = await self._history.find(last_event_id, audible)
        return found if found is None or found > self._spans.begin else None

    async def refresh(self) -> None:
        """
        Learn where the history ends, such as for a new stream whose channels have only now been subscribed to.

        Raises:
            BrokerError: If the broker cannot be asked.

        """
        if self._spans is None or self.active:
            await self._next_read()

    def look_again(self) -> None:
        """See soon whether there is a history."""
        self._reopen = True
        self._work.set()

    @property
    def newest(self) -> Cursor | None:
        """The newest place that is known; None without a history."""
        live = parse(self._hub.id)
        if not self.active or (self._head is None and live is None):
            return None
        return max((place for place in (self._head, live) if place), key=lambda place: place.seq)

    def admit(self, stream: Stream, *, behind: bool) -> None:
        """Let ``stream`` in, which has been opened and subscribed; one that is ``behind`` gets what it missed first."""
        if behind and (missed := self._hub.missed_unkept(stream)):
            self._hub.tell(stream, "not-kept", missed)
        if behind or not self.connected or self._spans is None:
            self._hub.hold(stream)
            self._wait_for_turn(stream)
        else:
            self._hub.join(stream)

    # Called by the reader.

    def lost(self) -> None:
        """Hold all streams: until the connection is back, and they have what they missed, nothing is live."""
        self.connected = False
        self._session += 1
        self._answer(BrokerUnavailable("the connection was lost"))
        if self.active:
            self._head = self.newest if self._goes_on else self._head
            self._behind.update(dict.fromkeys(cast("list[Stream]", self._hub.hold_all())))

    def back(self, again: bool) -> None:
        """Go on: all channels are listened to. ``again`` says that there was a connection before this one."""
        self.connected = True
        self._spans, self._goes_on = None, False
        if again and not self.active:
            self._hub.reset("broker-reconnect")
        # There may have been more events that no history keeps. Every stream is held now, and a page that is away, or is
        # cut before the reset, is told when it comes back.
        if again:
            self._hub.unkept.restart()
        for stream in self._hub if self.active else ():
            if missed := tuple(channel for channel in stream.audible if channel in self._hub.unkept):
                self._hub.tell(stream, "broker-reconnect", missed)
        self._work.set()

    # The work.

    async def run(self) -> None:
        """Serve the streams that are behind. Cancel it to end."""
        while True:
            await self._work.wait()
            self._work.clear()
            while self.connected and (self._spans is None or self._reopen or self._behind or self._asking):
                try:
                    await (self._open() if self._spans is None or self._reopen else self._turn())
                except BrokerError as exc:
                    self._hub.counts.add(HISTORY_FAILURES)
                    log.warning("the history cannot be read, next try in %.1f s: %s", RETRY_SECONDS, exc)
                    self._answer(exc)
                    self._start_over()
                    await asyncio.sleep(RETRY_SECONDS)
            self._places = FIRST_PLACES

    async def _open(self) -> None:
        begun = self.state()
        opened = await self._history.open()
        if begun != self.state():
            return
        self._opened_at, self._reopen = _now(), False
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
            # Streams that are held get what there is behind the last event that may be lost.
            self._hub.restart("history-lost", head.seq, self._spans.behind({*self._tokens, self._head.token}, head.seq))
            for stream in cast("list[Stream]", list(self._hub)):
                stream.told = dict.fromkeys(stream.audible, head.seq)
        self.active, self._head, self._goes_on, self._tokens = True, head, True, set(self._spans)

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
        """Read once, and give every stream that it was for what it gets."""
        asked = len(self._asking)
        streams, places = self._choose()
        read, begun = None, self.state()
        try:
            read = await self._read(streams, places)
        except BrokerRefused as exc:
            if not streams:
                raise
            # What one stream asks for must not keep the others from theirs.
            self._hub.counts.add(HISTORY_FAILURES)
            log.warning("the history cannot be read for %d streams: %s", len(streams), exc)
            self._alone = max(self._alone, len(streams))
            if len(streams) == 1 and begun == self.state():
                self._give_up(streams[0])
        if read is None or begun != self.state():
            self._start_over()
            return
        self._head = read.head
        asking, self._asking = self._asking[:asked], self._asking[asked:]
        _resolve(asking)
        await self._serve(read, begun)
        self._hub.record(())

    async def _read(self, streams: list[Stream], places: list[_Place]) -> _Read | None:
        recorded = self._hub.record(channel for channel, _ in places)
        share = len(places) or 1
        size = min(PAGE_BYTES, READ_BYTES // share)
        # One stream on many channels gets their events in order, so all can share the room; of many streams none may
        # wait until another one has all.
        total = READ_BYTES if len(streams) == 1 else 8 * READ_BYTES
        pages, head = await self._history.read(places, max(5, EVENTS // share), size, total)
        if head is None:
            return None
        read = sum(len(row.payload) for page in pages for row in page.rows)
        if read > READ_BYTES:
            self._places = max(1, len(places) * READ_BYTES // read)
        elif len(places) >= self._places:
            self._places = min(MAX_PLACES, 2 * self._places)
        framed = (page.framed() for page in pages)
        return _Read(streams, dict(zip(places, framed, strict=True)), recorded, head)

    async def _serve(self, read: _Read, begun: tuple[bool, int, int]) -> None:
        parts: dict[tuple[tuple[str, ...], int, bool], Part] = {}
        for number, stream in enumerate(read.streams, 1):
            self._behind.pop(stream, None)
            if stream in self._hub:
                key = audible, position, labels = stream.audible, stream.position, stream.labels
                if key not in parts:
                    pages = {channel: read.pages[channel, position] for channel in audible}
                    tails = [read.recorded[channel] for channel in audible]
                    parts[key] = part(position, pages, tails, read.head, labels=labels)
                self._give(stream, parts[key])
            if number % STREAMS == 0:
                await asyncio.sleep(0)
                parts.clear()  # more may have been recorded
                if begun != self.state():
                    return

    def _start_over(self) -> None:
        """See anew whether the history is still there, and read for those who still wait."""
        self._spans = None
        self._hub.record(())

    def state(self) -> tuple[bool, int, int]:
        """Return what is another when something was lost meanwhile."""
        return self.connected, self._session, self._hub.epoch

    def _choose(self) -> tuple[list[Stream], list[_Place]]:
        """Take as many streams as one read can serve, and return them with the places to read at."""
        streams: list[Stream] = []
        places: dict[_Place, None] = {}
        room = self._places
        for stream in list(self._behind):
            wanted = places_of(stream)
            if stream not in self._hub:
                del self._behind[stream]
            elif not places or len(places) + sum(place not in places for place in wanted) <= room:
                # One on many channels is read for alone, or with those at the same places.
                room = len(wanted) if len(wanted) > FIRST_PLACES and not places else room
                places.update(dict.fromkeys(wanted))
                streams.append(stream)
                if self._alone:
                    self._alone -= 1
                    break
        return streams, list(places)

    def _give(self, stream: Stream, given: Part) -> None:
        gaps = tuple(name for name, through in given.gaps.items() if through > stream.told.get(name, -1))
        if given.gaps:
            stream.told = {**stream.told, **given.gaps}
        if gaps and stream.position >= 0:  # one that takes what there is misses nothing
            self._hub.tell(stream, "pruned-id", gaps)
        if given.data:
            self._hub.send(stream, given.data)
            self._hub.counts.add(REPLAYED, number=len(given.data))
        stream.position = given.position
        if given.complete and stream in self._hub:
            self._hub.join(stream)
        elif waiting := stream.drained():
            waiting.add_done_callback(lambda _: self._wait_for_turn(stream))
        else:
            self._wait_for_turn(stream)

    def _give_up(self, stream: Stream) -> None:
        # The reset covers all up to now, and from now on it is live.
        del self._behind[stream]
        stream.position = self._head.seq if self._head else 0
        self._hub.tell(stream, "unreadable-history", stream.audible)
        self._hub.join(stream)

    def _wait_for_turn(self, stream: Stream) -> None:
        if stream in self._hub:
            self._behind[stream] = None
            self._work.set()

    def _is_strange(self, cursor: Cursor | None) -> bool:
        return cursor is not None and self._spans is not None and self.active and cursor.token not in self._spans

    def _next_read(self) -> asyncio.Future[None]:
        """Return what resolves when a read that begins after this call is there."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self.connected:
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


def places_of(stream: Sink, least: int = -1) -> list[_Place]:
    """Return where to read for ``stream``, which has all up to ``least``."""
    return [(channel, max(stream.position, least)) for channel in stream.audible]


def _now() -> float:
    return asyncio.get_running_loop().time()
