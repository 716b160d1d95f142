"""One open stream: it owns the writing to its socket.

A frame goes to the socket at once when nothing waits before it, and into the stream's buffer otherwise.
There is no task, timer or queue of a subscriber's own.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from tornado.iostream import IOStream, StreamBufferFullError, StreamClosedError

log = logging.getLogger(__name__)

# A page has nothing to say after its request; this much of what a client sends is kept, then it is cut.
MAX_UNREAD = 4096


class Subscriber:
    """A `hub.Sink` on an `IOStream` that has been detached from its HTTP connection."""

    __slots__ = (
        "address",
        "audible",
        "buffer",
        "channels",
        "ends_at",
        "on_close",
        "opened_at",
        "position",
        "reason",
        "stream",
        "told",
    )

    def __init__(
        self,
        channels: tuple[str, ...],
        audible: tuple[str, ...],
        *,
        address: str,
        ends_at: float | None,
        on_close: Callable[[Subscriber], None],
    ) -> None:
        self.channels = channels
        self.audible = audible
        self.address = address
        # The loop's time at which the stream is to end, if it has to.
        self.ends_at = ends_at
        self.on_close = on_close
        # See `hub.Sink`.
        self.position = 0
        # Up to where it has been told of what is pruned, by channel.
        self.told: dict[str, int] = {}
        # None until `open`: what is delivered before the head is out was published before the page
        # could know that it is subscribed, and is not sent.
        self.stream: IOStream | None = None
        self.buffer = 0
        self.opened_at = 0.0
        # Why the stream was closed from our side, for the log.
        self.reason = "closed by the client"

    def open(self, stream: IOStream, head: bytes, buffer: int, now: float) -> bool:
        """
        Send the head and deliver from now on; return False if the client has gone already.

        ``buffer`` is how many bytes may wait for a slow reader before it is cut.
        """
        self.stream = stream
        self.opened_at = now
        self.buffer = buffer
        stream.max_buffer_size = MAX_UNREAD
        # A stream that is closed before it has a callback never calls one.
        stream.set_close_callback(self._closed)
        if stream.closed():
            return False
        self.send(head)
        return True

    def send(self, data: bytes) -> None:
        """
        Write ``data``, or queue it behind what waits already; a reader that is too slow is cut.

        What comes when nothing waits is taken whatever its size, and leaves room for as much behind it as a
        reader may be behind. Large pieces wait as views of bytes that all streams share.
        """
        stream = self.stream
        if stream is None or stream.closed():
            return
        try:
            if not stream.writing():
                try:
                    sent = stream.write_to_fd(memoryview(data))
                except BlockingIOError:
                    sent = 0
                if sent == len(data):
                    return
                stream.max_write_buffer_size = self.buffer + len(data) - sent
                stream.write(memoryview(data)[sent:])
            else:
                stream.write(data)
        except StreamBufferFullError:
            self.cut()
        except StreamClosedError:
            pass
        except OSError as exc:
            stream.close(exc)

    def drained(self) -> asyncio.Future[None] | None:
        """Return what resolves when nothing waits to be written, or None if nothing does."""
        stream = self.stream
        if stream is None or stream.closed() or not stream.writing():
            return None
        try:
            return stream.write(b"")
        except StreamClosedError:
            return None

    def cut(self) -> None:
        """End the stream of a reader that does not keep up, so that it costs no other stream anything."""
        self.reason = "cut: it read too slowly"
        log.info("cutting a slow reader: %s", self)
        if self.stream:
            self.stream.close()

    def end(self, reason: str, retry: int) -> None:
        """Close the stream; its page comes back after ``retry`` milliseconds."""
        self.reason = reason
        self.send(b"retry: %d\n\n" % retry)
        if self.stream:
            self.stream.close()

    def _closed(self) -> None:
        self.on_close(self)

    def __str__(self) -> str:
        return f"{self.address} on {', '.join(self.channels)}"
