"""The Redis URL, and the connections made from it."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from ...errors import SettingsError

# A PUBLISH that is tried again may be delivered twice, and a reader that reconnects by itself hides a
# gap, so redis-py's own retries are off.
_OPTIONS: dict[str, Any] = {
    "protocol": 2,
    "retry": Retry(NoBackoff(), 0),
    "socket_connect_timeout": 5,
    "socket_timeout": 10,
    "socket_keepalive": True,
}

_FOR_UNIX = ("protocol", "retry", "socket_timeout")


def pool(url: str, client_name: str) -> redis.ConnectionPool:
    """
    Return a pool for ``url``, whose own query string wins over our defaults. Connects nothing.

    Raises:
        SettingsError: If ``url`` is not one that redis-py understands.

    """
    options = {key: value for key, value in _OPTIONS.items() if key in _FOR_UNIX or not url.startswith("unix:")}
    try:
        return redis.ConnectionPool.from_url(url, client_name=client_name, **options)
    except ValueError:  # its text may hold a piece of the password
        raise SettingsError(
            "REDIS_URL cannot be read; give redis://user:password@host:6379/0, "
            "with special characters of the password percent-encoded"
        ) from None


def connection(url: str, client_name: str) -> Any:
    """
    Return a connection of its own for ``url``, not connected yet.

    It speaks protocol 2, whatever ``url`` says: with 3 redis-py hands messages out in another way.

    Raises:
        SettingsError: If ``url`` has an option that redis-py does not know.

    """
    made = pool(url, client_name)
    try:
        return made.connection_class(**{**made.connection_kwargs, "protocol": 2, "retry": _OPTIONS["retry"]})
    except (TypeError, ValueError, redis.RedisError) as exc:
        raise SettingsError(f"REDIS_URL has an option that cannot be used: {exc}") from exc


def shown(url: str) -> str:
    """Return where ``url`` leads, without its password."""
    parts = urlsplit(url)
    host = parts.hostname or "localhost"
    return f"{host}:{parts.port or 6379}{parts.path}" if parts.scheme != "unix" else parts.path
