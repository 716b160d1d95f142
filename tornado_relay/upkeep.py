"""What a history needs from time to time: old events deleted, and no stream left at a place that grows old."""

from __future__ import annotations

import asyncio
import logging

from . import events
from .counts import HISTORY_FAILURES
from .errors import BrokerError
from .fanout import Sink
from .history import History
from .hub import Hub
from .replay import MAX_PLACES, STREAMS, Replay, places_of

log = logging.getLogger(__name__)

# Seconds between two rounds, and pauses while there is more to delete.
ROUND_SECONDS = 5.0
PRUNE_PAUSE = 0.05


class Upkeep:
    """
    Looks after the history of one worker.

    Args:
        hub: The streams.
        history: What is looked after.
        replay: Knows whether there is one.
        seconds: How long an event is kept.

    """

    def __init__(self, hub: Hub, history: History, replay: Replay, seconds: float) -> None:
        self._hub = hub
        self._history = history
        self._replay = replay
        # Seconds after which a stream that nothing came to is moved on.
        self._stale = seconds / 8
        # Where the history ended a while ago, and when that was looked at.
        self._mark = 0
        self._marked_at = 0.0

    async def run(self) -> None:
        """Go on for ever. Cancel it to end."""
        replay = self._replay
        while True:
            await asyncio.sleep(min(ROUND_SECONDS, self._stale))
            if not replay.connected:
                continue
            if not replay.active:  # it may have been set up meanwhile
                replay.look_again()
                continue
            try:
                await replay.refresh()
                await self._move_on()
                while replay.connected and replay.active and await self._history.prune():
                    await asyncio.sleep(PRUNE_PAUSE)
            except BrokerError as exc:
                self._hub.counts.add(HISTORY_FAILURES)
                log.warning("the history cannot be looked after: %s", exc)

    async def _move_on(self) -> None:
        """Tell the streams that nothing has come to for long where they are: what is there now will be pruned."""
        now, newest = asyncio.get_running_loop().time(), self._replay.newest
        if now - self._marked_at < self._stale or newest is None:
            return
        mark, self._mark, self._marked_at = self._mark, newest.seq, now
        streams, begun, here = self._hub.live(), self._replay.state(), self._hub.seq
        while streams and here < mark:
            batch: list[Sink] = []
            places: dict[tuple[str, int], None] = {}
            while streams and len(places) < MAX_PLACES and len(batch) < STREAMS:
                batch.append(streams.pop())
                places.update(dict.fromkeys(places_of(batch[-1], here)))
            pages, head = await self._history.read(list(places), 1, 1, 1)
            if head is None or begun != self._replay.state() or here != self._hub.seq:
                return  # what came moves them on
            empty = {place for place, page in zip(places, pages, strict=True) if not page.rows and page.end is None}
            position = events.position(str(head))
            for stream in batch:
                if stream in self._hub and empty.issuperset(places_of(stream, here)):
                    stream.position = head.seq
                    self._hub.send(stream, position)
