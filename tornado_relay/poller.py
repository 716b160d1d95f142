"""Watches the sockets of a worker's streams.

An epoll of its own, which the loop watches in its turn (epoll(7) allows that): a stream costs the loop nothing, where
a handler on the loop costs more memory than all the rest of the stream.
"""

from __future__ import annotations

import select
from typing import Protocol

from tornado.ioloop import IOLoop

# Events taken in one turn of the loop.
BATCH = 256

_READ, _WRITE = select.EPOLLIN, select.EPOLLOUT


class Watcher(Protocol):
    """What wants to know of its socket."""

    def readable(self) -> None:
        """Read, or see that the other side has gone; never raises."""

    def writable(self) -> None:
        """Write what waits; never raises."""


class Poller:
    """The sockets of one worker, by descriptor."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._watchers: dict[int, Watcher] = {}

    def start(self) -> None:
        """Call watchers from the running loop."""
        IOLoop.current().add_handler(self._epoll, self._turn, IOLoop.READ)

    def watch(self, descriptor: int, watcher: Watcher) -> None:
        """Call ``watcher`` from now on, in place of the one before it, whenever ``descriptor`` can be read."""
        if descriptor not in self._watchers:
            self._epoll.register(descriptor, _READ)
        self._watchers[descriptor] = watcher

    def want_writable(self, descriptor: int, wanted: bool) -> None:
        """Call the watcher of ``descriptor`` also whenever it can be written, or no more."""
        self._epoll.modify(descriptor, _READ | _WRITE if wanted else _READ)

    def forget(self, descriptor: int) -> None:
        """Watch ``descriptor`` no more; before it is closed, since its number comes again."""
        if self._watchers.pop(descriptor, None) is not None:
            self._epoll.unregister(descriptor)

    def _turn(self, *_: object) -> None:
        for descriptor, mask in self._epoll.poll(0, BATCH):
            # The one before it may have closed it.
            if mask & _WRITE and (watcher := self._watchers.get(descriptor)):
                watcher.writable()
            if mask & ~_WRITE and (watcher := self._watchers.get(descriptor)):
                watcher.readable()
