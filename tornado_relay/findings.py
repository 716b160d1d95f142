"""What ``sse-relay-server check`` finds out about settings and brokers."""

from __future__ import annotations

import asyncio
import re
import secrets
import select
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .errors import RelayError, SettingsError
from .publish import open_publisher
from .settings import FIELDS, Settings

# How long an event may take through a broker before it counts as lost.
TIMEOUT = 5.0


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    ok: bool
    text: str


def of_settings(settings: Settings) -> Iterator[str]:
    """Yield a line for each setting, without passwords."""
    for field in FIELDS:
        value = getattr(settings, field.name)
        if value and (field.metadata.get("secret") or "\n" in str(value)):
            value = _without_password(value) if field.name.endswith("url") else "(set)"
        elif isinstance(value, tuple):
            value = ",".join(map(str, value))
        yield f"{field.metadata['variable']}={value}"


def of_brokers(settings: Settings) -> Iterator[Finding]:
    """Send an event through each broker that is set, and yield what came of it."""
    try:
        broker = settings.broker
    except SettingsError as exc:
        yield Finding(False, str(exc))
        return
    if broker is None:
        yield Finding(False, "no broker: set REDIS_URL, or DATABASE_URL (postgresql://...)")
        return
    kinds = [broker[0]] + [kind for kind in ("redis", "postgres") if kind != broker[0] and _is_set(settings, kind)]
    for kind in kinds:
        name, ping = ("Redis", _ping_redis) if kind == "redis" else ("PostgreSQL", _ping_postgres)
        use = "used" if kind == broker[0] else "set, not used"
        yield _tried(f"{name} ({use})", ping, settings)


def of_authority(settings: Settings) -> Iterator[Finding]:
    """Ask the application for a client that sends nothing, if the relay is to ask it, and yield what it says."""
    if settings.auth_url:
        yield _tried("application", _ask_authority, settings)


def _is_set(settings: Settings, kind: str) -> bool:
    url = settings.redis_url if kind == "redis" else settings.database_url
    return url.startswith(("redis", "unix") if kind == "redis" else "postg")


def _tried(name: str, ping: Callable[[Settings], str], settings: Settings) -> Finding:
    try:
        return Finding(True, f"{name}: {ping(settings)}")
    except ModuleNotFoundError as exc:
        return Finding(False, f"{name}: {exc.name} is not installed")
    except (RelayError, OSError) as exc:
        return Finding(False, f"{name}: {' '.join(str(exc).split())}")


def _ping_postgres(settings: Settings) -> str:
    import psycopg2  # noqa: PLC0415

    from .brokers.postgres import dsn  # noqa: PLC0415
    from .brokers.postgres.publisher import PostgresPublisher  # noqa: PLC0415

    channel = f"sse_relay_check_{secrets.token_hex(8)}"
    try:
        connection = psycopg2.connect(dsn.complete(settings.listen_url, "sse-relay-check"))
    except psycopg2.Error as exc:
        raise RelayError(f"cannot be reached: {exc}") from exc
    publisher = PostgresPublisher(settings.database_url)
    try:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute("SHOW server_version")
            (version,) = cursor.fetchone() or ("?",)
            cursor.execute(f'LISTEN "{channel}"')
        started = time.monotonic()
        publisher.publish(channel, "{}")
        poller = select.poll()
        poller.register(connection.fileno(), select.POLLIN)
        # A pooler in transaction mode may have handed us the notifications of another.
        while not any(notify.channel == channel for notify in connection.notifies):
            if not poller.poll(max(0.0, started + TIMEOUT - time.monotonic()) * 1000):
                raise RelayError(
                    "a NOTIFY did not come back to LISTEN; is a pooler in transaction mode in between? "
                    "Set RELAY_LISTEN_DATABASE_URL to the server itself"
                )
            connection.poll()
        taken = time.monotonic() - started
        place = dsn.shown(settings.listen_url)
        if "," in place:
            place += f", of which {connection.info.host}:{connection.info.port} takes writes"
        way = f" through the pooler at {dsn.shown(settings.database_url)}" if publisher.pooled() else ""
        return f"{place}, version {version}: an event took {taken * 1000:.1f} ms{way}"
    except psycopg2.Error as exc:
        raise RelayError(str(exc)) from exc
    finally:
        connection.close()
        publisher.close()


def _ask_authority(settings: Settings) -> str:
    from .authority import REFUSALS, Authority, Question  # noqa: PLC0415  (Tornado)

    channel = f"sse_relay_check_{secrets.token_hex(8)}"

    async def ask() -> int:
        return await Authority(settings.auth_url).ask(Question((channel,), "", "", ""))

    status = asyncio.run(ask())
    done = "refuses" if status in REFUSALS else "lets in"
    return f"RELAY_AUTH_URL {done} a client without cookies that asks for {channel} ({status})"


def _ping_redis(settings: Settings) -> str:
    import redis  # noqa: PLC0415

    from .brokers.redis import url as urls  # noqa: PLC0415

    channel = f"sse_relay_check_{secrets.token_hex(8)}"
    client = redis.Redis(connection_pool=urls.pool(settings.redis_url, "sse-relay-check"))
    publisher = open_publisher("redis", settings.redis_url)
    try:
        version = client.info("server")["redis_version"]
        with client.pubsub(ignore_subscribe_messages=True) as pubsub:  # type: ignore[no-untyped-call]
            pubsub.subscribe(channel)
            pubsub.get_message(timeout=TIMEOUT)  # the confirmation
            started = time.monotonic()
            publisher.publish(channel, "{}")
            if pubsub.get_message(timeout=TIMEOUT) is None:
                raise RelayError("a PUBLISH did not come back to SUBSCRIBE")
            taken = time.monotonic() - started
        return f"{urls.shown(settings.redis_url)}, version {version}: an event took {taken * 1000:.1f} ms"
    except redis.RedisError as exc:
        raise RelayError(f"cannot be reached: {exc}") from exc
    finally:
        client.connection_pool.disconnect()
        publisher.close()


def _without_password(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    authority, *behind = re.split("[/?#]", rest, maxsplit=1)
    path = "".join(behind).partition("?")[0]
    if not separator or authority.count("@") > 1 or "@" in path:  # where the password ends is not clear
        return "(set)"
    userinfo, at, hosts = authority.rpartition("@")
    user, colon, _ = userinfo.partition(":")
    return f"{scheme}://{user}{':***' if colon else ''}{at}{hosts}/{path}".rstrip("/")
