"""Which channels a reader's connection listens to, and which it should. No I/O.

A channel is *held* by the streams that are on it, *confirmed* once the broker has said so, and *idle*
when its last stream has gone: then it stays confirmed for `LINGER` seconds, because a page that reloads
comes back at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

LINGER = 10.0


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


class Subscriptions:
    """
    The books of one reader.

    The reader calls `take` for what to send next, and `confirm` when the broker has answered. The order
    of what it sends must be the order in which it took it: a channel may be dropped and wanted again.
    """

    def __init__(self) -> None:
        self._holders: dict[str, int] = {}
        self._confirmed: set[str] = set()
        # Wanted from the broker and not confirmed yet, in the order of asking, each with the streams that wait for it.
        self._waiters: dict[str, list[_Waiter]] = {}
        # The waiters' channels that no command has been sent for.
        self._to_add: dict[str, None] = {}
        # Confirmed, but without a holder since this time.
        self._idle: dict[str, float] = {}
        self._to_drop: dict[str, None] = {}

    def __len__(self) -> int:
        return len(self._confirmed)

    @property
    def waiting(self) -> bool:
        """Whether the broker has yet to confirm something that is wanted."""
        return bool(self._waiters)

    def acquire(self, names: Iterable[str], now: float) -> asyncio.Future[None] | None:
        """Hold ``names`` for a stream, and return what it must wait for, if anything. Pair it with `release`."""
        missing = []
        for name in names:
            self._holders[name] = self._holders.get(name, 0) + 1
            self._idle.pop(name, None)
            self._to_drop.pop(name, None)
            if name not in self._confirmed:
                if name not in self._waiters:
                    self._want(name)
                missing.append(name)
        if not missing:
            return None
        waiter = _Waiter(len(missing), now)
        for name in missing:
            self._waiters[name].append(waiter)
        return waiter.confirmed

    def release(self, names: Iterable[str], now: float) -> None:
        """End the hold of a stream on ``names``; ``now`` is the loop's time in seconds."""
        for name in names:
            self._holders[name] -= 1
            if not self._holders[name]:
                del self._holders[name]
                self._idle[name] = now

    def sweep(self, now: float) -> bool:
        """Mark what has been idle for long enough to be dropped; return whether there is any."""
        for name, since in list(self._idle.items()):
            if now - since >= LINGER and name in self._confirmed:
                del self._idle[name]
                self._to_drop[name] = None
        return bool(self._to_drop)

    def take(self, limit: int) -> tuple[list[str], list[str]]:
        """Return at most ``limit`` channels to add and as many to drop, each given out once."""
        add, drop = list(self._to_add)[:limit], list(self._to_drop)[:limit]
        for name in add:
            del self._to_add[name]
        for name in drop:
            del self._to_drop[name]
            self._confirmed.discard(name)
        return add, drop

    def confirm(self, names: Iterable[str]) -> None:
        """Record that the broker listens to ``names``, and let their streams begin."""
        for name in names:
            self._confirmed.add(name)
            for waiter in self._waiters.pop(name, ()):
                waiter.missing -= 1
                if not waiter.missing and not waiter.confirmed.done():
                    waiter.confirmed.set_result(None)

    def refuse(self, name: str, error: Exception) -> None:
        """Record that the broker will not send ``name``, and fail the streams that wait for it."""
        for waiter in self._waiters.pop(name, ()):
            waiter.fail(error)

    def overdue(self, since: float, error: Exception) -> None:
        """Fail with ``error`` who waits ``since`` that time or longer; the channels stay wanted."""
        for waiters in self._waiters.values():
            for waiter in waiters:
                if waiter.since <= since:
                    waiter.fail(error)

    def lost(self, error: Exception) -> None:
        """Forget what the broker knew, fail who waits with ``error``, and want again what is held."""
        lost, self._waiters = self._waiters, {}
        self._confirmed.clear()
        self._idle.clear()
        self._to_drop.clear()
        self._to_add.clear()
        for waiters in lost.values():
            for waiter in waiters:
                waiter.fail(error)
        for name in self._holders:
            self._want(name)

    def _want(self, name: str) -> None:
        self._to_add[name] = None
        self._waiters[name] = []
