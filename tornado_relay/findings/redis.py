"""What there is to know of Redis."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from typing import Any

from ..errors import RelayError
from ..publish import open_publisher
from ..settings import Settings
from .finding import FAILURE, OK, TIMEOUT, WARNING, Finding, of_clock, of_room

# What Redis has when nobody changes it: a reader with more than this waiting for it is thrown out.
PUBSUB_BYTES = 32 * 1024 * 1024


def of_redis(settings: Settings, *, used: bool) -> Iterator[Finding]:
    """
    Send an event through Redis, and if the relay uses it, look at what limits it there.

    Raises:
        RelayError: If it does not come.

    """
    import redis  # noqa: PLC0415

    from ..brokers.redis import url as urls  # noqa: PLC0415

    client = redis.Redis(connection_pool=urls.pool(settings.redis_url, "sse-relay-check"))
    try:
        yield Finding(OK, "redis", _event(settings, client))
        if used:
            yield from _limits(settings, client)
            if settings.history:
                yield from _history(client)
    except redis.RedisError as exc:
        raise RelayError(f"cannot be reached: {exc}") from exc
    finally:
        client.connection_pool.disconnect()


def _event(settings: Settings, client: Any) -> str:
    from ..brokers.redis import url as urls  # noqa: PLC0415

    channel = f"sse_relay_check_{secrets.token_hex(8)}"
    publisher = open_publisher("redis", settings.redis_url)
    try:
        version = client.info("server")["redis_version"]
        with client.pubsub(ignore_subscribe_messages=True) as pubsub:
            pubsub.subscribe(channel)
            pubsub.get_message(timeout=TIMEOUT)  # the confirmation
            started = time.monotonic()
            publisher.publish(channel, "{}")
            if pubsub.get_message(timeout=TIMEOUT) is None:
                raise RelayError("a PUBLISH did not come back to SUBSCRIBE")
            taken = time.monotonic() - started
        return f"{urls.shown(settings.redis_url)}, version {version}: an event took {taken * 1000:.1f} ms"
    finally:
        publisher.close()


def _limits(settings: Settings, client: Any) -> Iterator[Finding]:
    clients, limit = client.info("clients"), _config(client, "maxclients")
    if limit:
        each = 1 + bool(settings.history) + bool(settings.publish_token)
        yield from of_room(
            "redis",
            f"maxclients {limit}",
            int(limit) - clients["connected_clients"],
            2 * settings.worker_count * each,
            "raise maxclients, or start fewer workers",
        )
    buffer = _config(client, "client-output-buffer-limit")
    name = "redis.pubsub-buffer"
    if buffer is None:
        yield Finding(OK, name, "how much Redis keeps for a subscriber is not shown to this user (CONFIG GET)")
    else:
        hard, soft, seconds = map(int, buffer.partition("pubsub ")[2].split()[:3])
        text = f"Redis keeps {_bytes(hard)} for a subscriber, or {_bytes(soft)} for {seconds} s, and throws it out then"
        if hard and hard < PUBSUB_BYTES:
            advice = "CONFIG SET client-output-buffer-limit 'pubsub 256mb 64mb 60', as events come in bursts"
            yield Finding(WARNING, name, text, advice)
        else:
            yield Finding(OK, name, text if hard else "Redis keeps for a subscriber whatever it does not read")
    before = time.time()
    seconds, microseconds = client.time()
    yield from of_clock("redis", seconds + microseconds / 1e6 - (before + time.time()) / 2)


def _history(client: Any) -> Iterator[Finding]:
    from ..brokers.redis import scripts  # noqa: PLC0415

    name = "redis.history"
    memory, persistence = client.info("memory"), client.info("persistence")
    if memory.get("maxmemory") and memory.get("maxmemory_policy") != "noeviction":
        text = f"maxmemory-policy is {memory['maxmemory_policy']}: when Redis is full, events of the history go unsaid"
        yield Finding(
            FAILURE, "redis.eviction", text, "CONFIG SET maxmemory-policy noeviction, or give it a Redis of its own"
        )
    saves = _config(client, "save")
    if not persistence.get("aof_enabled") and not saves:
        text = "Redis keeps nothing on disk: when it starts again the history is gone, and every page is told so"
        yield Finding(WARNING, "redis.persistence", text, "CONFIG SET appendonly yes")
    elif not persistence.get("aof_enabled"):
        text = "Redis saves from time to time: a crash loses the events since then, and every page is told so"
        yield Finding(WARNING, "redis.persistence", text, "CONFIG SET appendonly yes")
    keep, seconds = client.hmget(scripts.STATE, "keep", "seconds")
    used = f"Redis takes {_bytes(memory['used_memory'])}"
    if keep is None:
        text = f"no history is kept yet; {used}"
        yield Finding(OK, name, f"{text}. The first relay that starts with RELAY_HISTORY has it kept")
    else:
        text = f"{int(keep)} events of each channel are kept for {float(seconds):.0f} s; {used}"
        yield Finding(OK, name, text)


def _config(client: Any, name: str) -> str | None:
    """Return a setting of the server; None where this user may not see it, as on many a hosted Redis."""
    import redis  # noqa: PLC0415

    try:
        return str(client.config_get(name).get(name, "")) or None
    except redis.ResponseError:
        return None


def _bytes(number: int) -> str:
    return f"{number / 2**20:.0f} MiB" if number >= 2**20 else f"{number / 1024:.0f} KiB"
