"""The channels that a reader's connection listens to, and those that it should. No I/O.

    queued ──take──► asked ──confirm──► confirmed ◄──► idle ──sweep──► dropping ──take──► forgotten
       │               └──refuse──► refused
       └── forgotten, like a refused channel, as soon as no stream holds it

A channel is *held* by the streams that are on it. A confirmed channel without a stream is *idle*: it
stays confirmed for `LINGER` seconds, because a page that reloads comes back at once.

The name of a channel may be a visitor's invention, so one visitor must not take what others need:

- The worker has at most `Subscriptions.limit` channels, and drops idle ones early to make room.
- A channel counts for the client whose stream brought it, as long as there is a stream on it. One client
  may have as many channels as there is room left: alone it gets half of the limit, two get a third each,
  and a newcomer finds room. (Switches share their buffers in this way: Choudhury and Hahne, "Dynamic
  queue length thresholds for shared-memory packet switches".)
- One client may bring `BURST` channels at once, and `RATE` more each second.
- The broker is asked for the channels of all clients in turn.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable

from ..errors import NoRoom
from ..limits import channels_of, descriptor_limit

LINGER = 10.0
# New channels that one client may bring at once: an office of 1,000 people behind one address may come
# back after a restart, with 10 channels each. The cost of a LISTEN in PostgreSQL grows with its list of
# channels: 10,000 take 0.2 s.
BURST = 10_000
# The same each second, later on. In a list of 25,000 they take PostgreSQL 0.08 s, and as long again when
# they are dropped.
RATE = 1_000
# When several clients wait, one batch has at most this many channels of each: those of one full stream.
# A channel is confirmed with its whole batch, so a large one would delay the others.
SHARE = 100

_NEW, _QUEUED, _ASKED, _CONFIRMED, _REFUSED = range(5)


class _Waiter:
    """A stream that waits until the broker has confirmed so many channels."""

    __slots__ = ("confirmed", "missing", "since")

    def __init__(self, missing: int, since: float) -> None:
        self.confirmed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.missing = missing
        self.since = since

    def fail(self, error: Exception) -> None:
        if not self.confirmed.done():
            self.confirmed.set_exception(error)
            self.confirmed.exception()  # marks it as seen: a stream that has gone does not look at it


class _Channel:
    """A channel that streams hold, or did a moment ago."""

    __slots__ = ("client", "holders", "state", "waiters")

    def __init__(self, client: str) -> None:
        self.client = client
        self.holders = 0
        self.state = _NEW
        # The streams that wait for the broker's answer.
        self.waiters: list[_Waiter] = []


class Subscriptions:
    """
    The books of one reader.

    The reader calls `take` for what to send next, and `confirm` when the broker has answered. The order
    of what it sends must be the order in which it took it: a channel may be dropped and wanted again.

    Args:
        limit: How many channels there may be; 0 for as many as this process may have.

    """

    def __init__(self, limit: int = 0) -> None:
        self.limit = limit or channels_of(descriptor_limit())
        self.on_refused: Callable[[str, Exception], None] = lambda name, error: None
        """Called with each channel that the broker refuses, and why."""

        self._channels: dict[str, _Channel] = {}
        self._confirmed = 0
        # The streams that wait, the one that has waited longest first.
        self._waiters: OrderedDict[_Waiter, None] = OrderedDict()
        # The channels that the streams of each client want; the client whose turn is next comes first.
        # A channel may be in the queues of several clients, so that none of them waits for another's turn.
        # It stays there if it is taken or forgotten meanwhile, until its turn comes.
        self._queues: OrderedDict[str, OrderedDict[str, None]] = OrderedDict()
        # How many channels are queued or asked for, and how many of them were taken since the last sweep.
        self._pending = 0
        self._asked = 0
        # Idle channels, each with the time since when it is, the longest first.
        self._idle: OrderedDict[str, float] = OrderedDict()
        self._to_drop: OrderedDict[str, None] = OrderedDict()
        # How many channels each client has brought that are not idle.
        self._held: dict[str, int] = {}
        # How many more it may bring at once, and the time when that was true: when it last brought some.
        # The client that did so last is at the end.
        self._allowances: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def __len__(self) -> int:
        return self._confirmed

    @property
    def waiting(self) -> bool:
        """Whether the broker has yet to confirm something that is wanted."""
        return self._pending > 0

    def acquire(self, names: Collection[str], now: float, client: str = "") -> asyncio.Future[None] | None:
        """
        Hold ``names`` for a stream, and return what it must wait for. Pair it with `release`.

        Args:
            names: The channels.
            now: The loop's time in seconds.
            client: The client whose stream it is; empty for one whose channels are not counted.

        Raises:
            NoRoom: If there is no room for those that are new. Nothing is held then.

        """
        channels = self._channels
        new = {name for name in names if name not in channels or channels[name].state == _REFUSED}
        if new:
            self._admit(len(new), client, now)
        missing = []
        for name in names:
            channel = channels.get(name)
            if channel is None:
                channel = channels[name] = _Channel(client)
                self._count(channel)
            if channel.state != _CONFIRMED:
                if channel.state != _ASKED:
                    self._queue(name, channel, client)
                missing.append(channel)
            elif not channel.holders:
                self._idle.pop(name, None)
                self._to_drop.pop(name, None)
                self._count(channel)
            channel.holders += 1
        if new:
            self._make_room()
        if not missing:
            return None
        waiter = _Waiter(len(missing), now)
        self._waiters[waiter] = None
        for channel in missing:
            channel.waiters.append(waiter)
        return waiter.confirmed

    def release(self, names: Iterable[str], now: float) -> None:
        """End the hold of a stream on ``names``; ``now`` is the loop's time in seconds."""
        for name in names:
            channel = self._channels[name]
            channel.holders -= 1
            if not channel.holders:
                self._let_go(name, channel, now)

    def sweep(self, now: float) -> bool:
        """Mark channels that have been idle for too long; return whether there is anything to take."""
        while self._idle and now - next(iter(self._idle.values())) >= LINGER:
            name, _ = self._idle.popitem(last=False)
            self._to_drop[name] = None
        # By now these clients may bring `BURST` again, like one that is not known.
        while self._allowances and now - next(iter(self._allowances.values()))[1] >= BURST / RATE:
            self._allowances.popitem(last=False)
        # A broker that leaves some unanswered is asked for others nevertheless.
        self._asked = 0
        return bool(self._to_drop or self._queues)

    def take(self, limit: int) -> tuple[list[str], list[str]]:
        """
        Return channels to add and to drop, at most ``limit`` of each, and each of them once.

        No more than ``limit`` wait for an answer at a time, so that a channel that is wanted now does
        not have to wait for all those that were wanted before.
        """
        add = self._next(limit - self._asked)
        self._asked += len(add)
        # The drops are sent first, and delay the others by no more time than those take themselves.
        count = min(max(SHARE, len(add)), limit) if add else limit
        drop = [self._to_drop.popitem(last=False)[0] for _ in range(min(count, len(self._to_drop)))]
        for name in drop:
            del self._channels[name]
        self._confirmed -= len(drop)
        return add, drop

    def confirm(self, names: Iterable[str], now: float) -> None:
        """Record that the broker listens to ``names``, and let their streams begin."""
        for name in names:
            channel = self._answered(name)
            if channel is None:
                continue
            channel.state = _CONFIRMED
            self._confirmed += 1
            waiters, channel.waiters = channel.waiters, []
            for waiter in waiters:
                waiter.missing -= 1
                if not waiter.missing:
                    self._waiters.pop(waiter, None)
                    if not waiter.confirmed.done():
                        waiter.confirmed.set_result(None)
            if not channel.holders:
                self._let_go(name, channel, now)

    def refuse(self, name: str, error: Exception) -> None:
        """Record that the broker will not send ``name``, and fail the streams that wait for it."""
        channel = self._answered(name)
        if channel is None:
            return
        self.on_refused(name, error)
        channel.state = _REFUSED
        waiters, channel.waiters = channel.waiters, []
        for waiter in waiters:
            waiter.fail(error)
            self._waiters.pop(waiter, None)
        if not channel.holders:
            self._let_go(name, channel, 0.0)

    def overdue(self, since: float, error: Exception) -> None:
        """Fail with ``error`` the streams that have waited since that time or longer."""
        while self._waiters and next(iter(self._waiters)).since <= since:
            waiter, _ = self._waiters.popitem(last=False)
            waiter.fail(error)

    def lost(self, error: Exception) -> None:
        """Forget what the broker knew, fail with ``error`` who waits, and want again what is held."""
        waiters, self._waiters = self._waiters, OrderedDict()
        for waiter in waiters:
            waiter.fail(error)
        self._idle.clear()
        self._to_drop.clear()
        self._queues.clear()
        self._held.clear()
        self._confirmed = self._pending = self._asked = 0
        for name, channel in list(self._channels.items()):
            channel.state, channel.waiters = _NEW, []
            if channel.holders:
                self._count(channel)
                self._queue(name, channel, channel.client)
            else:
                del self._channels[name]

    def _admit(self, count: int, client: str, now: float) -> None:
        """Raise `NoRoom` unless ``client`` may bring so many channels; count them for its rate."""
        # Idle channels give way.
        room = self.limit - (len(self._channels) - len(self._idle) - len(self._to_drop))
        if count > room:
            raise NoRoom("channels", f"the worker has {self.limit:,} channels, which is the limit")
        if not client:
            return
        held = self._held.get(client, 0)
        if held + count > room:
            text = f"{client} has {held:,} channels, and the worker has room for {room:,} more"
            raise NoRoom("client-channels", text)
        allowance, last = self._allowances.get(client, (float(BURST), now))
        allowance = min(float(BURST), allowance + (now - last) * RATE)
        if count > allowance:
            text = f"{client} wants more than {BURST:,} new channels, or {RATE:,} each second"
            raise NoRoom("client-channels", text)
        self._allowances[client] = allowance - count, now
        self._allowances.move_to_end(client)

    def _make_room(self) -> None:
        """Drop the longest idle channels if there are too many."""
        excess = len(self._channels) - len(self._to_drop) - self.limit
        while excess > 0 and self._idle:
            name, _ = self._idle.popitem(last=False)
            self._to_drop[name] = None
            excess -= 1

    def _queue(self, name: str, channel: _Channel, client: str) -> None:
        if channel.state != _QUEUED:
            channel.state = _QUEUED
            self._pending += 1
        self._queues.setdefault(client, OrderedDict())[name] = None

    def _next(self, limit: int) -> list[str]:
        """Take at most ``limit`` channels out of the queues, one of each client in turn."""
        queues, names = self._queues, list[str]()
        share = SHARE if len(queues) > 1 else limit
        for _ in range(share):
            if not queues:
                break
            for _ in range(len(queues)):
                if len(names) >= limit:
                    return names
                client, queue = queues.popitem(last=False)
                while queue:
                    name, _ = queue.popitem(last=False)
                    channel = self._channels.get(name)
                    if channel and channel.state == _QUEUED:
                        channel.state = _ASKED
                        names.append(name)
                        break
                if queue:
                    queues[client] = queue
        return names

    def _answered(self, name: str) -> _Channel | None:
        """Return the channel that the broker's answer is about, if it was asked for."""
        channel = self._channels.get(name)
        if channel is None or channel.state != _ASKED:
            return None
        self._asked = max(0, self._asked - 1)
        self._pending -= 1
        return channel

    def _let_go(self, name: str, channel: _Channel, now: float) -> None:
        """See to a channel that no stream holds any more."""
        if channel.state == _ASKED:
            return  # the broker's answer must find it
        if channel.state == _CONFIRMED:
            self._idle[name] = now
        else:
            self._pending -= channel.state == _QUEUED
            del self._channels[name]
        self._held[channel.client] -= 1
        if not self._held[channel.client]:
            del self._held[channel.client]

    def _count(self, channel: _Channel) -> None:
        self._held[channel.client] = self._held.get(channel.client, 0) + 1
