"""PUBLISH from the application."""

from __future__ import annotations

import math
import time
from functools import partial
from typing import Any

import redis

from ... import events
from ...errors import BrokerError, BrokerUnavailable, PayloadTooLarge
from ...history.spans import Cursor
from . import cluster, scripts
from . import url as urls

# How long it is believed in a Cluster that no history is kept: such events need not go to its server.
_LOOK_SECONDS = 10.0
# How often a command is sent on, as redis-py's RedisCluster has it: servers may hear late of a slot that moves.
_REDIRECTIONS = 16


class RedisPublisher:
    """A pool of connections per process and server; redis-py keeps them safe for threads and forks."""

    def __init__(self, url: str) -> None:
        self._url = url
        pool = partial(urls.pool, url, "sse-relay-notify")
        self._one = pool()
        self._shards = cluster.Shards(url, pool) if cluster.is_cluster(url) else None
        # When to look whether a Cluster keeps a history; always that there is one where there is no SPUBLISH.
        self._look_at = 0.0 if self._shards else math.inf
        self._keeps = not self._shards
        self._keys = scripts.Keys(urls.prefix(url))
        self._script = scripts.text("publish")
        self._digest = scripts.digest(self._script)
        # The span of the newest event that this process knows of. A server that does not know it has missed something.
        self._seen = ""

    def publish(self, channel: str, payload: str, own_id: str | None = None) -> None:
        """
        Send one event, and keep it where a relay has asked for that; ``own_id`` is the id that its publisher gave it.

        Raises:
            PayloadTooLarge: If the event is over a history's limit.
            BrokerUnavailable: If Redis cannot be reached.
            BrokerError: If Redis refused the event, or the connection broke under way.

        """
        try:
            try:
                if time.monotonic() >= self._look_at:
                    self._look()
                if self._keeps or not self._publish_to_shard(channel, payload):
                    self._publish_by_script(channel, payload, own_id or "")
            except redis.exceptions.NoPermissionError:
                # A user that may do no more than PUBLISH. The relay tells streams what no history keeps.
                self._run(self._keys.state, ("PUBLISH", channel, payload))
        except (redis.ConnectionError, redis.TimeoutError, *cluster.CHANGING) as exc:
            raise BrokerUnavailable(f"Redis cannot be reached: {exc}") from exc
        except redis.RedisError as exc:
            if "TOOLARGE" in str(exc):
                events.check_kept_size(payload)
                raise PayloadTooLarge(str(exc)) from exc
            raise BrokerError(f"Redis did not take the event: {exc}") from exc

    def check(self, channel: str, payload: str) -> None:
        """Raise now what `publish` would of an event's size: PayloadTooLarge."""
        if len(payload.encode()) > events.MAX_KEPT_BYTES and self.newest():
            events.check_kept_size(payload)

    def newest(self) -> str:
        """
        Return the id of the newest event of the history, or nothing where there is none.

        Raises:
            BrokerUnavailable: If Redis cannot be reached.

        """
        state = self._keys.state
        try:
            keep, token, seq = self._run(state, ("HMGET", state, "keep", "token", "seq"))
        except redis.RedisError as exc:
            raise BrokerUnavailable(f"Redis cannot be reached: {exc}") from exc
        return str(Cursor(token.decode(), int(seq))) if keep and token and seq else ""

    def close(self) -> None:
        """Close the connections; the next `publish` opens others."""
        self._one.disconnect()
        if self._shards:
            self._shards.close()

    def _look(self) -> None:
        """See whether there is a history. Until that is known, no thread goes on without."""
        try:
            self._keeps = bool(self._run(self._keys.state, ("HGET", self._keys.state, "keep")))
        except redis.exceptions.NoPermissionError:
            self._keeps = False  # for a user that may not ask, as there would be no other answer the next time
        self._look_at = time.monotonic() + _LOOK_SECONDS

    def _publish_by_script(self, channel: str, payload: str, own_id: str) -> None:
        keys = (self._keys.state, self._keys.spans, self._keys.events(channel), self._keys.own_ids(channel))
        arguments = (len(keys), *keys, channel, payload, own_id)
        self._run(self._keys.state, ("EVALSHA", self._digest, *arguments, ""), ("EVAL", self._script, *arguments, "1"))

    def _publish_to_shard(self, channel: str, payload: str) -> bool:
        """Return whether the server knows how."""
        try:
            self._run(channel, ("SPUBLISH", channel, payload))
        except redis.ResponseError as exc:
            if "unknown command" not in str(exc).lower():
                raise
            self._keeps, self._look_at = True, math.inf
            return False
        return True

    def _run(self, key: str, command: tuple[Any, ...], with_script: tuple[Any, ...] | None = None) -> Any:
        """
        Return the reply to a command on the server that has ``key``; of a script that it does not know, to the other one.

        Scripts get the server's identity in their last arguments, because it is known only when there is a connection.
        """
        for left in reversed(range(_REDIRECTIONS)):
            try:
                return self._run_once(key, command, with_script)
            except redis.exceptions.MovedError as exc:
                # It has done nothing of it.
                if not self._shards or not left:
                    raise
                self._shards.follow(exc)
            except (redis.ConnectionError, redis.TimeoutError, *cluster.CHANGING):
                if self._shards:
                    self._shards.look_again()
                raise
            except redis.ResponseError as exc:
                # The server has become a replica, and has done nothing of it. New connections may lead to its successor.
                # Redis 6 has READONLY in the text only, if a script meets it.
                is_replica = isinstance(exc, redis.exceptions.ReadOnlyError) or "READONLY" in str(exc)
                if not is_replica or left < _REDIRECTIONS - 1:
                    raise
                self._one.disconnect(inuse_connections=False)
        return None

    def _run_once(self, key: str, command: tuple[Any, ...], with_script: tuple[Any, ...] | None) -> Any:
        pool = self._shards.pool(cluster.slot_of(key)) if self._shards else self._one
        connection: Any = pool.get_connection()
        if with_script:
            identity = (urls.server_of(self._url, connection), connection.process, self._seen)
        try:
            if not with_script:
                return _reply(connection, *command)
            try:
                token = _reply(connection, *command, *identity)
            except redis.exceptions.NoScriptError:
                token = _reply(connection, *with_script, *identity)
            # Without a history it is the number of subscribers.
            self._seen = token.decode() if isinstance(token, bytes) else ""
            return token
        except (redis.ConnectionError, redis.TimeoutError):
            connection.disconnect()
            raise
        finally:
            pool.release(connection)


def _reply(connection: Any, *command: Any) -> Any:
    connection.send_command(*command)
    return connection.read_response()
