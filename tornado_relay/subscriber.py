"""One open stream: it owns its socket, and all writing to it.

A frame goes to the socket at once when nothing waits before it, and into the stream's queue otherwise. There is no
task, timer or buffer of a subscriber's own as long as its client reads.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
from collections import deque
from collections.abc import Callable

from . import packing
from .packing import Packer
from .poller import Poller

log = logging.getLogger(__name__)

# A page has nothing to say after its request; one that sends more than this is cut.
MAX_UNREAD = 4096
# Pieces that one system call takes; the kernel's limit is 1,024 (IOV_MAX).
PIECES = 64

_NOTHING: dict[str, int] = {}


class Subscriber:
    """A `fanout.Sink`, and a `poller.Watcher` of its socket."""

    __slots__ = (
        "_drained",
        "_poller",
        "_queue",
        "_queued",
        "_room",
        "_socket",
        "_unread",
        "address",
        "audible",
        "beat",
        "buffer",
        "channels",
        "ends_at",
        "labels",
        "on_close",
        "opened_at",
        "packer",
        "position",
        "reached",
        "reason",
        "request_id",
        "told",
    )

    def __init__(
        self,
        channels: tuple[str, ...],
        audible: tuple[str, ...],
        *,
        address: str,
        request_id: str,
        labels: bool,
        ends_at: float | None,
        on_close: Callable[[Subscriber], None],
    ) -> None:
        self.channels = channels
        self.audible = audible
        self.address = address
        self.request_id = request_id
        self.labels = labels
        # When the stream is to end, by `time.monotonic`, if it has to.
        self.ends_at = ends_at
        self.on_close = on_close
        # See `fanout.Sink`.
        self.position = 0
        self.beat = 0
        self.reached = 0
        # Up to where it has been told of what is pruned, by channel.
        self.told = _NOTHING
        # None until `open`: what is delivered before the head is out was published before the page
        # could know that it is subscribed, and is not sent. And None again from its end on.
        self._socket: socket.socket | None = None
        # What waits to be written; None when nothing does.
        self._queue: deque[memoryview] | None = None
        self._queued = 0
        # How much may wait.
        self._room = 0
        self._unread = 0
        # Resolved when nothing waits any more.
        self._drained: asyncio.Future[None] | None = None
        # How what is sent is put on the wire; None for a client of HTTP/1.0, for which it goes as it is.
        self.packer: Packer | None = None
        # Why it ended, as `counts.CLOSED` has it.
        self.reason = "client"

    def open(self, connection: socket.socket, poller: Poller, head: bytes, buffer: int, now: float) -> None:
        """
        Send the head and deliver from now on; ``connection`` is this stream's own.

        ``buffer`` is how many bytes may wait for a slow reader before it is cut.
        """
        self._socket = connection
        self._poller = poller
        self.opened_at = now
        self.buffer = buffer
        poller.watch(connection.fileno(), self)
        self.send(head)

    def send(self, data: bytes) -> None:
        """
        Write ``data``, or queue it behind what waits already; a reader that is too slow is cut.

        What comes when nothing waits is taken whatever its size, and leaves room for as much behind it as a
        reader may be behind. Large pieces wait as views of bytes that all streams share.
        """
        if self._socket is None:
            return
        if self.packer:
            data = self.packer.pack(data)
        if self._queue is None:
            try:
                sent = self._socket.send(data, socket.MSG_DONTWAIT)
            except BlockingIOError:
                sent = 0
            except OSError:
                self._close()
                return
            if sent < len(data):
                self._queue = deque([memoryview(data)[sent:]])
                self._queued = len(data) - sent
                self._room = self.buffer + self._queued
                self._poller.want_writable(self._socket.fileno(), True)
        elif self._queued + len(data) > self._room:
            self.cut()
        else:
            self._queue.append(memoryview(data))
            self._queued += len(data)

    def drained(self) -> asyncio.Future[None] | None:
        """Return what resolves when nothing waits to be written, or None if nothing does."""
        if self._queue is None:
            return None
        if self._drained is None:
            self._drained = asyncio.get_running_loop().create_future()
        return self._drained

    def cut(self) -> None:
        """End the stream of a reader that does not keep up, so that it costs no other stream anything."""
        self.reason = "cut"
        log.info("cutting a slow reader: %s", self)
        self._close()

    def end(self, reason: str, retry: int) -> None:
        """Close the stream, unless it has ended; its page comes back after ``retry`` milliseconds."""
        if self._socket is None:
            return
        self.reason = reason
        last = b"retry: %d\n\n" % retry
        if self.packer:
            last, self.packer = self.packer.pack(last) + packing.END, None
        self.send(last)
        self._close()

    def readable(self) -> None:
        """See `poller.Watcher`."""
        if self._socket is None:
            return
        try:
            data = self._socket.recv(MAX_UNREAD, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self._unread += len(data)
        if not data or self._unread > MAX_UNREAD:
            self._close()

    def writable(self) -> None:
        """See `poller.Watcher`."""
        queue = self._queue
        try:
            while queue and self._socket:
                sent = self._socket.sendmsg(list(itertools.islice(queue, PIECES)), [], socket.MSG_DONTWAIT)
                self._queued -= sent
                while queue and sent >= len(queue[0]):
                    sent -= len(queue.popleft())
                if sent:
                    queue[0] = queue[0][sent:]
        except BlockingIOError:
            return
        except OSError:
            self._close()
            return
        if self._socket:
            self._queue = None
            self._poller.want_writable(self._socket.fileno(), False)
            self._resolve()

    def _close(self) -> None:
        if self._socket is None:
            return
        self._poller.forget(self._socket.fileno())
        self._socket.close()
        self._socket = self._queue = None
        self._resolve()
        # Later: whoever sends to many streams must not see one leave meanwhile.
        asyncio.get_running_loop().call_soon(self.on_close, self)

    def _resolve(self) -> None:
        if self._drained and not self._drained.done():
            self._drained.set_result(None)
        self._drained = None

    def fields(self) -> dict[str, object]:
        """Return what a log of objects says of it."""
        return {"client": self.address, "channels": self.channels, "request": self.request_id}

    def __str__(self) -> str:
        return f"{self.address} on {', '.join(self.channels)}, request {self.request_id}"
