"""The Redis URL, and the connections made from it."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from ...errors import SettingsError
from . import cluster, sentinel

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


def pool(url: str, client_name: str, server: str = "") -> redis.ConnectionPool:
    """
    Return a pool for ``url``, whose own query string wins over our defaults. Connects nothing.

    With ``server``, as `server_of` has it, it is to that server of the group that ``url`` names.

    Raises:
        SettingsError: If ``url`` is not one that redis-py understands.

    """
    options = {key: value for key, value in _OPTIONS.items() if key in _FOR_UNIX or not url.startswith("unix:")}
    try:
        made = redis.ConnectionPool.from_url(_plain(url), client_name=client_name, **options)
    except SettingsError:
        raise
    except ValueError:  # its text may hold a piece of the password
        raise SettingsError(
            f"REDIS_URL cannot be read; give {_example(url)}, with special characters of the password percent-encoded"
        ) from None
    _connection(made, {})
    made.connection_kwargs["redis_connect_func"] = introduce
    if server:
        host, _, port = server.partition("/")[0].rpartition(":")
        made.connection_kwargs.update(host=host, port=int(port))
    elif sentinel.is_sentinel(url):
        for_all = {key: value for key, value in made.connection_kwargs.items() if key not in ("host", "port")}
        made = sentinel.MasterPool(url, **for_all)
    return made


def connection(url: str, client_name: str, server: str = "") -> Any:
    """
    Return a connection of its own, to what a `pool` would be to, not connected yet.

    It speaks protocol 2, whatever ``url`` says: with 3 redis-py hands messages out in another way.

    Raises:
        SettingsError: If ``url`` is not one that redis-py understands.

    """
    return _connection(pool(url, client_name, server), {"protocol": 2, "retry": _OPTIONS["retry"]})


def _connection(made: redis.ConnectionPool, options: dict[str, Any]) -> Any:
    try:
        return made.connection_class(**{**made.connection_kwargs, **options})
    except (TypeError, ValueError, redis.RedisError) as exc:
        raise SettingsError(f"REDIS_URL has an option that cannot be used: {exc}") from exc


def introduce(connection: Any) -> None:
    """
    Begin a session on ``connection``, and ask the server for the run_id of its process; empty if the user may not (INFO).

    redis-py calls this at each connect. So a connection that it makes anew, which may lead to another server, never keeps
    the identity of the old one.
    """
    connection.on_connect()
    connection.process = ""
    try:
        connection.send_command("INFO", "server", check_health=False)
        reply = connection.read_response(disable_decoding=True)
    except redis.exceptions.NoPermissionError:
        return
    except redis.ResponseError as exc:
        if "unknown command" not in str(exc).lower():
            raise
        return
    found = re.search(rb"run_id:(\w+)", reply)
    connection.process = found[1].decode() if found else ""


def _plain(url: str) -> str:
    """Return the URL that one server of a group has."""
    if sentinel.is_sentinel(url):
        return sentinel.parse(url).servers
    if cluster.is_cluster(url):
        parts = cluster.parse(url)
        return parts.url("", parts.options)
    return url


def _example(url: str) -> str:
    if sentinel.is_sentinel(url):
        return sentinel.EXAMPLE
    return cluster.EXAMPLE if cluster.is_cluster(url) else "redis://user:password@host:6379/0"


def names_group(url: str) -> bool:
    """Return whether ``url`` is one of several servers."""
    return sentinel.is_sentinel(url) or cluster.is_cluster(url)


def prefix(url: str) -> str:
    """Return what all keys of the history at ``url`` begin with."""
    return cluster.TAG if cluster.is_cluster(url) else "sse-relay"


def server_of(url: str, connected: Any) -> str:
    """
    Return which server of a group a connection leads to, as ``host:port``; nothing where ``url`` names one server.

    A master has ``/epoch`` behind it, which each election raises: when it is elected again, it has lost what the one
    before it took and what it had not handed on itself, and is another one to the history.
    """
    server = f"{connected.host}:{connected.port}"
    if sentinel.is_sentinel(url):
        return f"{server}/{connected.connection_pool.sentinel_manager.epoch}"
    return server if cluster.is_cluster(url) else ""


def shown(url: str) -> str:
    """Return where ``url`` leads, without its password."""
    if sentinel.is_sentinel(url):
        group = sentinel.parse(url)
        return f"{group.sentinels}/{group.name}"
    if cluster.is_cluster(url):
        return str(cluster.parse(url))
    parts = urlsplit(url)
    host = parts.hostname or "localhost"
    return f"{host}:{parts.port or 6379}{parts.path}" if parts.scheme != "unix" else parts.path
