"""What ``sse-relay-server check`` finds out: of the machine, the brokers, the application, and the public address."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from ..errors import RelayError, SettingsError
from ..settings import FIELDS, Settings
from .application import of_application
from .finding import FAILURE, OK, WARNING, Finding
from .machine import of_machine
from .postgres import of_postgres
from .public import of_public
from .redis import of_redis

__all__ = ["FAILURE", "OK", "WARNING", "Finding", "look", "of_settings"]


def of_settings(settings: Settings) -> dict[str, str]:
    """Return each setting by its variable, without passwords."""
    shown = {}
    for field in FIELDS:
        value = getattr(settings, field.name)
        if value and (field.metadata.get("secret") or "\n" in str(value)):
            value = _without_password(value) if field.name.endswith("url") else "(set)"
        elif isinstance(value, tuple):
            value = ",".join(map(str, value))
        shown[field.metadata["variable"]] = str(value)
    return shown


def look(settings: Settings, public_url: str = "") -> Iterator[Finding]:
    """
    Look at all that there is, and yield each finding as soon as it is there.

    Args:
        settings: Those of the relay.
        public_url: Where browsers find it; empty to leave that out.

    """
    yield from of_machine(settings)
    try:
        broker = settings.broker
    except SettingsError as exc:
        yield Finding(FAILURE, "broker", str(exc), "correct the URL")
        return
    if broker is None:
        yield Finding(
            FAILURE, "broker", "no broker: set REDIS_URL, or DATABASE_URL (postgresql://...)", "set one of them"
        )
        return
    for kind in dict.fromkeys((broker[0], "redis", "postgres")):
        if kind == broker[0] or _is_set(settings, kind):
            yield from _broker(settings, kind, used=kind == broker[0])
    if settings.auth_url:
        yield from _tried("application", "application", lambda: of_application(settings))
    if public_url:
        yield from _tried("public", "public address", lambda: of_public(settings, public_url))


def _broker(settings: Settings, kind: str, *, used: bool) -> Iterator[Finding]:
    title, find = ("Redis", of_redis) if kind == "redis" else ("PostgreSQL", of_postgres)
    title += " (used)" if used else " (set, not used)"
    yield from _tried(kind, title, lambda: find(settings, used=used))


def _is_set(settings: Settings, kind: str) -> bool:
    url = settings.redis_url if kind == "redis" else settings.database_url
    return url.startswith(("redis", "unix") if kind == "redis" else "postg")


def _tried(name: str, title: str, find: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """Yield what ``find`` does under a title, and as a failure what ends it."""
    try:
        for found in find():
            yield Finding(found.level, found.name, f"{title}: {found.text}", found.advice)
    except ModuleNotFoundError as exc:
        advice = f"pip install 'sse-relay-server[{name}]'"
        yield Finding(FAILURE, name, f"{title}: {exc.name} is not installed", advice)
    except (RelayError, OSError) as exc:
        yield Finding(FAILURE, name, f"{title}: {' '.join(str(exc).split())}")


def _without_password(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    authority, *behind = re.split("[/?#]", rest, maxsplit=1)
    path = "".join(behind).partition("?")[0]
    if not separator or authority.count("@") > 1 or "@" in path:  # where the password ends is not clear
        return "(set)"
    userinfo, at, hosts = authority.rpartition("@")
    user, colon, _ = userinfo.partition(":")
    shown = path if rest[len(authority) :].startswith("/") else ""  # else it is options
    return f"{scheme}://{user}{':***' if colon else ''}{at}{hosts}/{shown}".rstrip("/")
