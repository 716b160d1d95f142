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

    from ..brokers.redis import scripts  # noqa: PLC0415
    from ..brokers.redis import url as urls  # noqa: PLC0415
    from ..brokers.redis.listener import links_to  # noqa: PLC0415  (Tornado)

    url, name = settings.redis_url, "sse-relay-check"
    links, clients = None, {}
    try:
        links = links_to(url, name)
        # The server of the history is the first of several.
        servers = [server.partition("/")[0] for server in links.masters]  # without the election
        clients = {server: redis.Redis(connection_pool=urls.pool(url, name, server)) for server in servers}
        main, client = next(iter(clients.items()))
        version = client.info("server")["redis_version"]
        place = urls.shown(url) + (f", now at {', '.join(clients)}" if main else "")
        yield Finding(OK, "redis", f"{place}, version {version}: an event took {_event(url, links) * 1000:.1f} ms")
        if used:
            for server, each in clients.items():
                yield from _limits(settings, server, each, keeps=bool(settings.history) and server == main)
            yield from _clock(client)
            if settings.history:
                yield from _history(main, client, scripts.Keys(urls.prefix(url)).state)
    except redis.RedisError as exc:
        raise RelayError(f"cannot be reached: {exc}") from exc
    finally:
        for each in clients.values():
            each.connection_pool.disconnect()
        if links:
            links.close()


def _event(url: str, links: Any) -> float:
    """Return how many seconds an event takes."""
    channel = f"sse_relay_check_{secrets.token_hex(8)}"
    publisher = open_publisher("redis", url)
    try:
        links.send([("SUBSCRIBE", [channel])])
        _until_there(links, b"subscribe")
        started = time.monotonic()
        publisher.publish(channel, "{}")
        _until_there(links, b"message")
        return time.monotonic() - started
    finally:
        publisher.close()


def _until_there(links: Any, kind: bytes) -> None:
    """Read until a reply of this kind is there."""
    from ..brokers.redis.link import REFUSED  # noqa: PLC0415

    end = time.monotonic() + TIMEOUT
    while time.monotonic() < end:
        for link in links.wait()[1]:
            for found, _, text in links.checked(link.batch()[0]):
                if found == kind:
                    return
                if found == REFUSED:
                    raise RelayError(f"a subscription was refused: {text}")
    raise RelayError("a PUBLISH did not come back to SUBSCRIBE")


def _limits(settings: Settings, server: str, client: Any, *, keeps: bool) -> Iterator[Finding]:
    """Look at one server, which the relay's history is read from if it ``keeps`` that."""
    at = f"{server}: " if server else ""
    clients, limit = client.info("clients"), _config(client, "maxclients")
    if limit:
        each = 1 + keeps + bool(settings.publish_token)
        yield from of_room(
            "redis",
            f"{at}maxclients {limit}",
            int(limit) - clients["connected_clients"],
            2 * settings.worker_count * each,
            "raise maxclients, or start fewer workers",
        )
    buffer = _config(client, "client-output-buffer-limit")
    name = "redis.pubsub-buffer"
    if buffer is None:
        yield Finding(OK, name, f"{at}how much Redis keeps for a subscriber is not shown to this user (CONFIG GET)")
    else:
        hard, soft, seconds = map(int, buffer.partition("pubsub ")[2].split()[:3])
        text = f"{at}Redis keeps {_bytes(hard)} for a subscriber, or {_bytes(soft)} for {seconds} s, and throws it out then"
        if hard and hard < PUBSUB_BYTES:
            advice = "CONFIG SET client-output-buffer-limit 'pubsub 256mb 64mb 60', as events come in bursts"
            yield Finding(WARNING, name, text, advice)
        else:
            yield Finding(OK, name, text if hard else f"{at}Redis keeps for a subscriber whatever it does not read")


def _clock(client: Any) -> Iterator[Finding]:
    before = time.time()
    seconds, microseconds = client.time()
    yield from of_clock("redis", seconds + microseconds / 1e6 - (before + time.time()) / 2)


def _history(server: str, client: Any, state: str) -> Iterator[Finding]:
    name, at = "redis.history", f"{server}: " if server else ""
    memory, persistence = client.info("memory"), client.info("persistence")
    if memory.get("maxmemory") and memory.get("maxmemory_policy") != "noeviction":
        text = (
            f"{at}maxmemory-policy is {memory['maxmemory_policy']}: when Redis is full, events of the history go unsaid"
        )
        yield Finding(
            FAILURE, "redis.eviction", text, "CONFIG SET maxmemory-policy noeviction, or give it a Redis of its own"
        )
    saves = _config(client, "save")
    if not persistence.get("aof_enabled") and not saves:
        text = f"{at}Redis keeps nothing on disk: when it starts again the history is gone, and every page is told so"
        yield Finding(WARNING, "redis.persistence", text, "CONFIG SET appendonly yes")
    elif not persistence.get("aof_enabled"):
        text = f"{at}Redis saves from time to time: a crash loses the events since then, and every page is told so"
        yield Finding(WARNING, "redis.persistence", text, "CONFIG SET appendonly yes")
    keep, seconds = client.hmget(state, "keep", "seconds")
    used = f"Redis takes {_bytes(memory['used_memory'])}"
    if keep is None:
        text = f"{at}no history is kept yet; {used}"
        yield Finding(OK, name, f"{text}. The first relay that starts with RELAY_HISTORY has it kept")
    else:
        text = f"{at}{int(keep)} events of each channel are kept for {float(seconds):.0f} s; {used}"
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
