"""A reset comes before any block that moves the client past the gap: plain units, on a fake history."""

import asyncio
import itertools
import re

import pytest

from tornado_relay.brokers.message import Message
from tornado_relay.errors import BrokerRefused
from tornado_relay.eventsource import Parser
from tornado_relay.history.page import Page, Row
from tornado_relay.history.spans import Cursor, Spans
from tornado_relay.hub import Hub
from tornado_relay.replay import STREAMS, Replay
from tornado_relay.upkeep import Upkeep

TOKEN, NEXT = "aaaaaaaa", "bbbbbbbb"
PAGES = [
    Page([Row(3, f"{TOKEN}-3", '{"data":"3"}')], end=3, through=0),
    Page([Row(4, f"{TOKEN}-4", '{"data":"4"}')], end=None, through=0),
]


class FakeHistory:
    """The history of one channel: its pages are read in turn, and the last of them again and again."""

    hint = ""

    def __init__(self, *pages):
        self.pages = list(pages)
        self.spans = [(TOKEN, 1)]
        self.head = 4
        self.error = None

    async def open(self):
        return Cursor(self.spans[-1][0], self.head), Spans(self.spans)

    async def find(self, own_id, channels):
        return None

    async def read(self, places, limit, size, total):
        if places and self.error:
            raise self.error
        page = self.pages.pop(0) if places and len(self.pages) > 1 else self.pages[0]
        return [page for _ in places], Cursor(self.spans[-1][0], self.head)

    async def prune(self):
        return False


class Stream:
    """A stream that comes back with the id of the second event."""

    def __init__(self, *, slow=False):
        self.channels = self.audible = ("a",)
        self.labels = False
        self.position = 2
        self.told = {}
        self.sent = b""
        # Pending while a slow reader has not taken what it was given.
        self.waiting = asyncio.get_running_loop().create_future() if slow else None

    def send(self, data):
        self.sent += data

    def drained(self):
        return self.waiting if self.waiting and not self.waiting.done() else None


async def until(condition):
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0)


def in_a_worker(scenario, *pages):
    """Run ``scenario(replay, hub, history)`` beside a replay that is connected."""

    async def main():
        hub, history = Hub(history=True), FakeHistory(*pages)
        replay = Replay(hub, history)
        replay.back(False)
        task = asyncio.create_task(replay.run())
        try:
            await until(lambda: replay.active)
            return await scenario(replay, hub, history)
        finally:
            task.cancel()

    return asyncio.run(main())


async def pruned(replay, hub, history):
    replay.admit(stream := Stream(), behind=True)
    return stream


async def not_kept_before(replay, hub, history):
    hub.deliver([Message("a", "by hand")])
    replay.admit(stream := Stream(), behind=True)
    return stream


async def not_kept_during(replay, hub, history):
    replay.admit(stream := Stream(), behind=True)
    hub.deliver([Message("a", "by hand")])
    return stream


async def unreadable(replay, hub, history):
    history.error = BrokerRefused("no")
    replay.admit(stream := Stream(), behind=True)
    await until(lambda: stream.sent)
    hub.deliver([Message("a", "x", f"{TOKEN}-5", 5)])
    return stream


async def lost_history(replay, hub, history):
    replay.admit(stream := Stream(), behind=True)
    replay.lost()
    history.spans, history.head = [(NEXT, 1)], 9
    replay.back(True)
    return stream


async def reconnect(replay, hub, history):
    hub.deliver([Message("a", "by hand")])
    stream = Stream()
    hub.add(stream)
    replay.lost()
    replay.back(True)
    return stream


@pytest.mark.parametrize(
    ("scenario", "pages", "reasons"),
    [
        (pruned, [PAGES[1]._replace(through=3)], ["pruned-id"]),
        (not_kept_before, PAGES, ["not-kept"]),
        (not_kept_during, PAGES, ["not-kept"]),
        (unreadable, PAGES, ["unreadable-history"]),
        (lost_history, [Page([], None, 0)], ["history-lost"]),
        (reconnect, [Page([], None, 0)], ["broker-reconnect"]),
    ],
)
def test_resets_of_a_resume_come_before_the_next_position(scenario, pages, reasons):
    """A page that is cut behind the reset, or before it, comes back with its old id and is told."""

    async def told(replay, hub, history):
        stream = await scenario(replay, hub, history)
        await until(lambda: b"\nid: " in b"\n" + stream.sent)
        return stream.sent

    sent = in_a_worker(told, *pages)
    events = list(Parser().feed(sent.decode()))
    assert [event.event for event in events[: len(reasons)]] == ["stream-reset"] * len(reasons)
    assert re.findall(rb'"reason":"([^"]*)"', sent) == [reason.encode() for reason in reasons]


def test_page_that_was_away_during_a_reconnect_is_told():
    """Events outside the history may be lost then, also for a stream that comes back only after it."""

    async def told(replay, hub, history):
        hub.deliver([Message("a", "x", f"{TOKEN}-1", 1), Message("a", "by hand"), Message("a", "x", f"{TOKEN}-2", 2)])
        replay.lost()
        replay.back(True)
        await until(lambda: replay.newest)
        replay.admit(stream := Stream(), behind=True)
        await until(lambda: b"data: 4" in stream.sent)
        return re.findall(rb'"reason":"([^"]*)"|data: (\d)\n', stream.sent)

    assert in_a_worker(told, *PAGES) == [(b"not-kept", b""), (b"", b"3"), (b"", b"4")]


def test_slow_reader_is_told_of_a_reconnect():
    """A stream that has not taken its page yet is told as well that events outside the history may be lost."""

    async def told(replay, hub, history):
        hub.deliver([Message("a", "by hand")])
        stream = Stream(slow=True)
        replay.admit(stream, behind=True)
        await until(lambda: b"data: 3" in stream.sent)
        replay.lost()
        replay.back(True)
        stream.waiting.set_result(None)
        await until(lambda: b"data: 4" in stream.sent)
        return re.findall(rb'"reason":"([^"]*)"|data: (\d)\n', stream.sent)

    assert in_a_worker(told, *PAGES) == [(b"not-kept", b""), (b"", b"3"), (b"broker-reconnect", b""), (b"", b"4")]


def test_slow_reader_is_told_of_a_lost_history_once():
    """The reset covers what has been deleted of the new history, too."""

    async def told(replay, hub, history):
        stream = Stream(slow=True)
        replay.admit(stream, behind=True)
        await until(lambda: b"data: 3" in stream.sent)
        replay.lost()
        history.spans, history.head = [(NEXT, 1)], 9
        history.pages = [Page([], None, 8)]
        replay.back(True)
        await until(lambda: b"history-lost" in stream.sent)
        stream.waiting.set_result(None)
        await until(lambda: NEXT.encode() in stream.sent)
        return re.findall(rb'"reason":"([^"]*)"', stream.sent)

    assert in_a_worker(told, *PAGES) == [b"history-lost"]


def test_streams_of_a_quiet_channel_are_moved_on_in_turns():
    """However many there are on it, only some are sent to between two reads, and all get the same bytes."""

    async def moved(replay, hub, history):
        streams = [Stream() for _ in range(3 * STREAMS)]
        for stream in streams:
            stream.position = 0
            hub.add(stream)
        sent = []
        read = history.read

        async def counted(*arguments):
            sent.append(sum(bool(stream.sent) for stream in streams))
            return await read(*arguments)

        history.read, history.pages = counted, [Page([], None, 0)]
        upkeep = Upkeep(hub, history, replay, 0.08)
        task = asyncio.create_task(upkeep.run())
        await until(lambda: all(stream.sent for stream in streams))
        task.cancel()
        assert len({id(stream.sent) for stream in streams}) <= 3
        return max(later - earlier for earlier, later in itertools.pairwise(sent))

    assert in_a_worker(moved) == STREAMS
