"""PUBLISH from the application."""

from __future__ import annotations

import redis

from ...errors import BrokerError, BrokerUnavailable
from . import url as urls


class RedisPublisher:
    """One pool of connections per process; redis-py keeps it safe for threads and forks."""

    def __init__(self, url: str) -> None:
        self._client = redis.Redis(connection_pool=urls.pool(url, "sse-relay-notify"))

    def publish(self, channel: str, payload: str) -> None:
        """
        Send one event.

        Raises:
            BrokerUnavailable: If Redis cannot be reached.
            BrokerError: If Redis refused the event, or the connection broke under way.

        """
        try:
            self._client.publish(channel, payload)
        except (redis.ConnectionError, redis.TimeoutError) as exc:
            raise BrokerUnavailable(f"Redis cannot be reached: {exc}") from exc
        except redis.RedisError as exc:
            raise BrokerError(f"Redis did not take the event: {exc}") from exc

    def close(self) -> None:
        """Close the connections; the next `publish` opens others."""
        self._client.connection_pool.disconnect()
