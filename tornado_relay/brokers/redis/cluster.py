"""Redis Cluster: which server has which slots, and the connections to all that a reader listens to.

The URL is the one that limits and Centrifugo take, with some of the servers, from which the others are learnt:

    redis+cluster://user:password@host1:6379,host2:6379

``rediss+cluster`` is TLS to all of them, and options are redis-py's.

An event travels on its channel's shard: SPUBLISH, where servers have it, from version 7 on. Those that a history keeps
travel by PUBLISH on the server that has the history, all of whose keys are in one slot; a script may not SPUBLISH to
another server's channel. A reader listens to both, PUBLISH on the history's own server, so that such an event does not
depend on the bus between the servers.
"""

from __future__ import annotations

import random
import time
from bisect import bisect_right
from collections.abc import Callable
from contextlib import suppress
from operator import itemgetter
from typing import Any

import redis
from redis.crc import key_slot

from ...errors import SettingsError
from . import hosts
from .link import MOVED, REFUSED, Command, Link, Poll
from .watch import ASK_SECONDS

SCHEMES = ("redis+cluster", "rediss+cluster")
EXAMPLE = "redis+cluster://user:password@host1:6379,host2:6379"
PORT = 6379

TAG = "{sse-relay}"
"""What all keys of the history begin with: the braces put them in one slot."""
# In the same slot, so that the server says when it has lost that.
_BEACON = f"{TAG}:beacon"

HISTORY_SLOT = int(key_slot(TAG.encode()))

CHANGING = (redis.exceptions.AskError, redis.exceptions.TryAgainError, redis.exceptions.ClusterDownError)
"""What servers answer, without doing anything, while slots move between them; `AskError` is also what MOVED is."""

# Seconds before a channel is asked for again that two servers each take for the other's.
_PAUSE = 0.05

GAP = "gap"
"""What stands for a channel that is listened to again, on another server: this, and the channel."""


def is_cluster(url: str) -> bool:
    """Return whether ``url`` is one of a Cluster."""
    return url.partition("://")[0] in SCHEMES


def parse(url: str) -> hosts.Hosts:
    """
    Return the parts of ``url``.

    Raises:
        SettingsError: If it names no server, or a database: a Cluster has one only.

    """
    parts = hosts.split(url, PORT)
    if not parts.addresses or parts.path not in ("", "0"):
        raise SettingsError(f"REDIS_URL of a Cluster names some of its servers and no database, such as {EXAMPLE}")
    return parts


def slot_of(name: str) -> int:
    """Return the slot of a key or a channel."""
    return int(key_slot(name.encode()))


class Topology:
    """
    Which server is the master of a slot; servers are named as ``host:port``.

    Args:
        url: The Cluster's.
        pool: Returns connections to a server.

    """

    def __init__(self, url: str, pool: Callable[[str], redis.ConnectionPool]) -> None:
        self._pool = pool
        self._seeds = [f"{host}:{port}" for host, port in parse(url).addresses]
        self._known = self._seeds
        self._ranges: list[tuple[int, int, str]] = []
        # What servers have said since, of single slots.
        self._moved: dict[int, str] = {}

    def refresh(self) -> None:
        """
        Ask one of the servers, not the same each time; raise redis.ConnectionError if none answers.

        One that is cut off from most of the others does not count: it names what was, also when another one is elected.
        """
        reasons = []
        for server in random.sample(self._known, len(self._known)):
            try:
                found = self._ask(server)
            except (redis.ConnectionError, redis.TimeoutError) as exc:
                reasons.append(str(exc))
                continue
            self._ranges = sorted((start, end, names[0]) for (start, end), names in found.items())
            self._moved = {}
            # The URL's stay: a server that was cut off may have come to know itself alone.
            self._known = list(dict.fromkeys([*(name for names in found.values() for name in names), *self._seeds]))
            return
        raise redis.ConnectionError(f"no server of the Cluster answers: {'; '.join(dict.fromkeys(reasons))}")

    def master(self, slot: int) -> str:
        """Return the master of ``slot``; raise redis.ConnectionError if it has none."""
        if server := self._moved.get(slot):
            return server
        ranges = self._ranges  # another thread may be at `refresh`
        place = bisect_right(ranges, slot, key=itemgetter(0)) - 1
        if place < 0 or slot > ranges[place][1]:
            raise redis.ConnectionError(f"no server of the Cluster has slot {slot}")
        return ranges[place][2]

    def follow(self, moved: redis.exceptions.MovedError) -> None:
        """Believe what a server says of a slot that it has not: others may hear of that later."""
        host, port = moved.node_addr
        if host not in ("", "?"):
            self._moved[moved.slot_id] = f"{host}:{port}"
        else:
            self.refresh()

    def left(self, servers: list[str]) -> str:
        """Ask, and return why a reader is to leave ``servers``, the history's first; nothing if it is not."""
        self.refresh()
        if servers and self.master(HISTORY_SLOT) != servers[0]:
            return f"the history is at {self.master(HISTORY_SLOT)} now"
        return ", ".join(f"{server} is no master any more" for server in servers if server not in self.masters)

    @property
    def masters(self) -> set[str]:
        """All servers that have slots."""
        return {master for _, _, master in self._ranges}

    def _ask(self, server: str) -> dict[tuple[int, int], list[str]]:
        """Return the servers of each range of slots, the master first."""
        pool = self._pool(server)
        # One that stands still must not hold up the next.
        pool.connection_kwargs.update(socket_connect_timeout=1, socket_timeout=1)
        client: Any = redis.Redis(connection_pool=pool)
        try:
            found = client.execute_command("CLUSTER SLOTS")
            # A server that may not be asked for it is believed.
            with suppress(redis.exceptions.NoPermissionError):
                if client.cluster("INFO")["cluster_state"] != "ok":
                    raise redis.ConnectionError(f"to {server} the Cluster is down")
        finally:
            pool.disconnect()
        if not found:
            raise redis.ConnectionError(f"{server} is in no Cluster yet")
        own = server.rpartition(":")[0]
        # A server may leave out the hosts: then they are where it is.
        return {
            (start, end): [f"{(host or b'').decode() or own}:{port}" for host, port, *_ in nodes]
            for start, end, *nodes in found
        }


class Shards:
    """
    A publisher's connections, a pool to each server.

    A master that was replaced may go on taking SPUBLISH, without an error, so where the slots are is asked for every
    `ASK_SECONDS` of use.
    """

    def __init__(self, url: str, pool: Callable[[str], redis.ConnectionPool]) -> None:
        self._topology = Topology(url, pool)
        self._pool = pool
        self._pools: dict[str, redis.ConnectionPool] = {}
        self._ask_at = 0.0

    def pool(self, slot: int) -> redis.ConnectionPool:
        """Return connections to the master of ``slot``; raise redis.ConnectionError if there is none."""
        if time.monotonic() >= self._ask_at:
            self._topology.refresh()
            self._ask_at = time.monotonic() + ASK_SECONDS
        server = self._topology.master(slot)
        if server not in self._pools:
            self._pools.setdefault(server, self._pool(server))
        return self._pools[server]

    def follow(self, moved: redis.exceptions.MovedError) -> None:
        """See `Topology`."""
        self._topology.follow(moved)

    def look_again(self) -> None:
        """See where the slots are before the next command: they have moved, or a server is away."""
        self._ask_at = 0.0

    def close(self) -> None:
        """Close all connections."""
        for pool in self._pools.values():
            pool.disconnect()


class ClusterLinks:
    """
    A reader's connections: one to the server of the history, for PUBLISH, and where there is SPUBLISH, one to each shard.

    See `link.Links`. A channel counts as listened to when both have confirmed it.
    """

    def __init__(self, url: str, pool: Callable[[str], redis.ConnectionPool], connect: Callable[[str], Any]) -> None:
        self._topology = Topology(url, pool)
        self._connect = connect
        self._links: dict[str, Link] = {}
        self._poll = Poll()
        self.wait = self._poll.wait
        # The shard that each channel is asked for at.
        self._places: dict[str, Link] = {}
        # Channels that the history's server has confirmed, and those that their shard has.
        self._plain: set[str] = set()
        self._sharded: set[str] = set()
        # Channels that were no more where they were just asked for.
        self._strays: set[str] = set()
        # Channels that were lost by a server, until another one has confirmed them.
        self._lost: set[str] = set()
        try:
            self._topology.refresh()
            self._main = self._link(self._topology.master(HISTORY_SLOT))
            self._has_shards = self._main.knows("SSUBSCRIBE", _BEACON)
        except BaseException:
            self.close()
            raise

    @property
    def process(self) -> str:
        """The run_id of the history's server, see `url.introduce`."""
        return self._main.process

    @property
    def servers(self) -> list[str]:
        """Those that there are connections to, the history's first."""
        return list(self._links)

    @property
    def masters(self) -> list[str]:
        """All that may be connected to, the history's first."""
        return list(dict.fromkeys([*self._links, *self._topology.masters]))

    @property
    def latency(self) -> float | None:
        """See `Link`; that of the slowest server."""
        known = [link.latency for link in list(self._links.values()) if link.latency is not None]
        return max(known, default=None)

    def send(self, commands: list[Command]) -> None:
        """Subscribe and unsubscribe."""
        self._main.send(commands)
        if not self._has_shards:
            return
        for command, names in commands:
            if command == "UNSUBSCRIBE":
                self._forget(names)
            else:
                self._ask_shards(names)

    def checked(self, replies: list[Any]) -> list[Any]:
        """Return ``replies`` as one connection would have given them, and see to the channels that have moved."""
        if not self._has_shards:
            return replies
        found: list[Any] = []
        moved = {}
        for reply in replies:
            kind, name = reply[:2]
            if kind == b"message":
                found.append(reply)
            elif kind == b"smessage":
                found.append((b"message", *reply[1:]))
            elif kind in (b"subscribe", b"ssubscribe"):
                found += self._confirmed(kind, name)
            elif kind == MOVED:
                moved[name] = reply[2]
            elif kind == REFUSED and name in self._lost:
                # There are streams on it, and they have to be told; that all are is rare enough.
                raise redis.ConnectionError(f"{name} is refused by the server that has it now: {reply[2]}")
            elif kind == REFUSED:
                found.append(reply)
        if moved:
            self._follow(moved)
        return found

    def close(self) -> None:
        """Close all connections."""
        for link in self._links.values():
            link.close()

    def _confirmed(self, kind: bytes, channel: bytes) -> list[Any]:
        name = channel.decode()
        if name not in self._places:
            return []  # it has been dropped since
        (self._sharded if kind == b"ssubscribe" else self._plain).add(name)
        if kind == b"ssubscribe" and name in self._lost:
            self._lost.discard(name)
            return [(GAP, channel, "")]
        return [(b"subscribe", channel, "")] if name in self._plain and name in self._sharded else []

    def _follow(self, moved: dict[str, Any]) -> None:
        if _BEACON in moved:
            raise redis.ConnectionError("the history's slot is at another server now")
        wanted = [name for name in moved if name in self._places]
        if not wanted:
            return
        if self._strays.intersection(wanted):
            time.sleep(_PAUSE)
        if not all(moved[name] for name in wanted):
            self._topology.refresh()
        self._strays = {name for name in wanted if moved[name]}
        for name in self._strays:
            self._topology.follow(moved[name])
        self._lost.update(self._sharded.intersection(wanted))
        self._sharded.difference_update(wanted)
        self._ask_shards(wanted)

    def _ask_shards(self, names: list[str]) -> None:
        commands: dict[Link, list[Command]] = {}
        for name in names:
            link = self._places[name] = self._link(self._topology.master(slot_of(name)))
            # A command may be for one slot only.
            commands.setdefault(link, []).append(("SSUBSCRIBE", [name]))
        for link, each in commands.items():
            link.send(each)

    def _forget(self, names: list[str]) -> None:
        commands: dict[Link, list[Command]] = {}
        for name in names:
            commands.setdefault(self._places.pop(name), []).append(("SUNSUBSCRIBE", [name]))
            for those in (self._plain, self._sharded, self._lost):
                those.discard(name)
        for link, each in commands.items():
            link.send([*each, ("PING", [])])

    def _link(self, server: str) -> Link:
        if server not in self._links:
            link = self._links[server] = Link(self._connect(server))
            self._poll.add(link)
        return self._links[server]
