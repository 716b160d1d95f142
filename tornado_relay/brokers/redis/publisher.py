"""PUBLISH from the application."""

from __future__ import annotations

from typing import Any

import redis

from ... import events
from ...errors import BrokerError, BrokerUnavailable, PayloadTooLarge
from ...history.spans import Cursor
from . import scripts
from . import url as urls


class RedisPublisher:
    """One pool of connections per process; redis-py keeps it safe for threads and forks."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._pool = urls.pool(url, "sse-relay-notify")
        self._client = redis.Redis(connection_pool=self._pool)
        self._script = scripts.text("publish")
        self._digest = scripts.digest(self._script)

    def publish(self, channel: str, payload: str, own_id: str | None = None) -> None:
        """
        Send one event, and keep it where a relay has asked for that; ``own_id`` is the id that its publisher gave it.

        Raises:
            PayloadTooLarge: If the event is over a history's limit.
            BrokerUnavailable: If Redis cannot be reached.
            BrokerError: If Redis refused the event, or the connection broke under way.

        """
        keys = (scripts.STATE, scripts.SPANS, scripts.events_key(channel), scripts.own_ids_key(channel))
        try:
            try:
                self._evaluate(keys, channel, payload, own_id or "")
            except redis.exceptions.NoPermissionError:
                # A user that may do no more than PUBLISH. The relay tells streams what no history keeps.
                self._client.publish(channel, payload)
        except (redis.ConnectionError, redis.TimeoutError) as exc:
            raise BrokerUnavailable(f"Redis cannot be reached: {exc}") from exc
        except redis.RedisError as exc:
            if "TOOLARGE" in str(exc):
                events.check_kept_size(payload)
                raise PayloadTooLarge(str(exc)) from exc
            raise BrokerError(f"Redis did not take the event: {exc}") from exc

    def _evaluate(self, keys: tuple[str, ...], *arguments: str) -> None:
        connection: Any = self._pool.get_connection()
        try:
            # Which server it is, is known only now that there is a connection.
            server = urls.server_of(self._url, connection)
            try:
                connection.send_command("EVALSHA", self._digest, len(keys), *keys, *arguments, "", server)
                connection.read_response()
            except redis.exceptions.NoScriptError:
                connection.send_command("EVAL", self._script, len(keys), *keys, *arguments, "1", server)
                connection.read_response()
        except (redis.ConnectionError, redis.TimeoutError):
            connection.disconnect()
            raise
        finally:
            self._pool.release(connection)

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
        try:
            found: Any = self._client.hmget(scripts.STATE, ["keep", "token", "seq"])
        except redis.RedisError as exc:
            raise BrokerUnavailable(f"Redis cannot be reached: {exc}") from exc
        keep, token, seq = found
        return str(Cursor(token.decode(), int(seq))) if keep and token and seq else ""

    def close(self) -> None:
        """Close the connections; the next `publish` opens others."""
        self._pool.disconnect()
