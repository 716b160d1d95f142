"""One pub/sub connection, as the thread that reads it has it."""

from __future__ import annotations

import select
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import redis

# At most this many channels in one command, and replies handed to the loop in one call.
BATCH = 1000
# So many messages are for one turn of the loop: each costs a little for every stream on several channels, before any of
# them is sent. 1,000 for 9,000 such streams took four seconds.
MESSAGES = 250
MESSAGES_BYTES = 1 << 19
# A connection that is quiet for this many seconds is sent a PING, and given as long again to answer.
QUIET = 5.0

REFUSED = "refused"
"""What stands for the reply to a channel that the server refused: this, the channel, and why."""
MOVED = "moved"
"""The same for a channel of a Cluster that the server does not serve, with its error, or serves no more, with nothing."""

Command = tuple[str, list[str]]

_MESSAGES = (b"message", b"smessage")


class Link:
    """Sends commands, and tells their replies from the messages that come in between."""

    def __init__(self, connection: Any) -> None:
        """Connect ``connection``, and see that the server takes commands."""
        self.connection = connection
        connection.connect()
        # A server that wants a password lets us connect without one, and refuses the first command.
        connection.send_command("PING", check_health=False)
        connection.read_response()
        self.process: str = connection.process
        """The run_id of the server, see `url.introduce`."""
        self.latency: float | None = None
        """Seconds that the last PING took."""
        # The commands that have no reply yet, each for one or more channels; Redis answers in order. One of SUNSUBSCRIBE may
        # come just when the channel's slot goes, which is told in the same words: such are over with the PING behind them.
        self._sent: deque[Command] = deque()
        # When something came last, or a PING was sent.
        self._heard = time.monotonic()
        self._pinged = False

    def fileno(self) -> int:
        """Return the descriptor to wait for."""
        # redis-py has no public way to wait for its socket and something else.
        return int(self.connection._sock.fileno())  # noqa: SLF001

    def knows(self, command: str, channel: str) -> bool:
        """Send a command to which there is one reply, before all others, and return whether the server knows it."""
        self.connection.send_command(command, channel, check_health=False)
        try:
            self.connection.read_response()
        except redis.exceptions.NoPermissionError as exc:
            if "channel" not in str(exc):  # the command itself, without which events would be lost
                raise
        except redis.ResponseError as exc:
            if "unknown command" not in str(exc).lower():
                raise
            return False
        return True

    def close(self) -> None:
        """Close the connection."""
        self.connection.disconnect()

    def send(self, commands: list[Command]) -> None:
        """Send all of them in one go; a PING behind those that SUNSUBSCRIBE."""
        packed = self.connection.pack_commands([(command, *names) for command, names in commands])
        self.connection.send_packed_command(packed, check_health=False)
        self._sent.extend(commands)

    def probe(self) -> None:
        """Send a PING if it is quiet; raise redis.ConnectionError if the last one was not answered."""
        now = time.monotonic()
        if now - self._heard < QUIET * 0.9:  # it may have been waited for exactly so long
            return
        if self._pinged:
            raise redis.ConnectionError(f"no answer to PING in {QUIET:.0f} s")
        self.send([("PING", [])])
        self._pinged, self._heard = True, now

    def batch(self) -> tuple[list[Any], bool]:
        """Return what can be read at once, up to the limits of a batch, and whether there is more; there must be something."""
        now = time.monotonic()
        if self._pinged:
            self.latency = now - self._heard
        self._pinged, self._heard = False, now
        replies: list[Any] = []
        messages = size = 0
        while True:
            try:
                reply = self.connection.read_response(disable_decoding=True)
            except redis.exceptions.ClusterDownError:
                raise
            except redis.ResponseError as exc:
                self._failed(exc, replies)
            else:
                if reply[0] in _MESSAGES:
                    messages += 1
                    size += len(reply[2])
                    replies.append(reply)
                else:
                    self._answered(reply, replies)
            if not self.connection.can_read():
                return replies, False
            if len(replies) >= BATCH or messages >= MESSAGES or size >= MESSAGES_BYTES:
                return replies, True

    def _failed(self, error: redis.ResponseError, replies: list[Any]) -> None:
        if self._sent[0][0] == "SUNSUBSCRIBE":
            return  # the slot was another server's already
        command, names = self._sent.popleft()
        if isinstance(error, redis.exceptions.MovedError):
            replies += [(MOVED, name, error) for name in names]
        elif len(names) > 1:
            # Because of one of them; that must fail alone.
            self.send([(command, [name]) for name in names])
        else:
            replies += [(REFUSED, name, str(error)) for name in names]

    def _answered(self, reply: list[Any] | bytes, replies: list[Any]) -> None:
        if reply[0] == b"pong" or isinstance(reply, bytes):  # +PONG where no channel is left
            while self._sent.popleft()[0] != "PING":
                pass
            return
        name = reply[1].decode()
        if reply[0] == b"sunsubscribe":
            # The channel's slot is another server's now, or nobody wants it any more.
            replies.append((MOVED, name, ""))
            return
        replies.append(reply)
        if name == self._sent[0][1][-1]:
            self._sent.popleft()


class Poll:
    """Waits for links, and for one descriptor beside them."""

    def __init__(self) -> None:
        self._poller = select.poll()
        self._links: dict[int, Link] = {}
        # When the links are to be probed, however busy others are.
        self._due = time.monotonic() + QUIET

    def add(self, link: Link) -> None:
        """Wait for ``link`` too."""
        self._links[link.fileno()] = link
        self._poller.register(link.fileno(), select.POLLIN)

    def wait(self, wake: int | None = None) -> tuple[bool, list[Link]]:
        """Return whether ``wake`` can be read, and the links that can be; raise redis.ConnectionError if one is dead."""
        if wake is not None:
            self._poller.register(wake, select.POLLIN)
        ready = self._poller.poll(QUIET * 1000)
        now = time.monotonic()
        if not ready or now >= self._due:
            self._due = now + QUIET
            waiting = {fd for fd, _ in ready}
            for fd, link in self._links.items():
                if fd not in waiting:  # what can be read may be the answer
                    link.probe()
        return any(fd == wake for fd, _ in ready), [self._links[fd] for fd, _ in ready if fd != wake]


class Links:
    """A reader's connections to its server: the one. For its thread alone."""

    def __init__(self, connection: Any, server_of: Callable[[Any], str]) -> None:
        self._link = Link(connection)
        self.servers = self.masters = [server_of(connection)]
        """Which server of a group it is, as `url.server_of` has it."""
        self.process = self._link.process
        poll = Poll()
        poll.add(self._link)
        self.wait = poll.wait

    @property
    def latency(self) -> float | None:
        """See `Link`."""
        return self._link.latency

    def send(self, commands: list[Command]) -> None:
        """Subscribe and unsubscribe."""
        self._link.send(commands)

    def checked(self, replies: list[Any]) -> list[Any]:
        """Return ``replies``."""
        return replies

    def close(self) -> None:
        """Close the connection."""
        self._link.close()
