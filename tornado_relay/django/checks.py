"""System checks: ``manage.py check``, and with ``--database default`` what only the database can say."""

from __future__ import annotations

import difflib
import re
import time
from collections.abc import Sequence
from typing import Any

from django.core import checks

from .. import project, publish, schema, settings
from ..errors import SettingsError
from ..tokens import MIN_SECRET_BYTES

# Seconds by which a clock may differ before tokens are refused too early or too late for anybody to understand.
MAX_SKEW = 5.0

_ADDRESS = re.compile(r"https?://[^/?#\s]+[^?#\s]*$")


@checks.register("sse_relay")
def check_settings(**_: Any) -> list[checks.CheckMessage]:
    """Look at ``SSE_RELAY`` and the environment."""
    try:
        given = project.own()
    except SettingsError as exc:
        return [checks.Error(str(exc), id="sse_relay.E001")]
    found: list[checks.CheckMessage] = [_unknown(name) for name in given if name not in project.NAMES]
    try:
        settings.current_broker()
        secret, url = settings.of_application("RELAY_JWT_SECRET"), settings.of_application("RELAY_URL")
    except SettingsError as exc:
        return [*found, checks.Error(str(exc), id="sse_relay.E003")]
    try:
        publish.target()
    except SettingsError as exc:
        # No error: a team may well test and develop on SQLite.
        found.append(checks.Warning(str(exc), "notify() raises this wherever it is called", id="sse_relay.W005"))
    if 0 < (size := len(secret.encode())) < MIN_SECRET_BYTES:
        text = f"RELAY_JWT_SECRET has {size} bytes; it should have {MIN_SECRET_BYTES} or more"
        found.append(checks.Warning(text, "openssl rand -base64 32", id="sse_relay.W001"))
    if url and not url.startswith("/") and not _ADDRESS.match(url):
        text = (
            f"RELAY_URL is {url!r}; it must be an address such as https://events.example.com, or a path such as /events"
        )
        found.append(checks.Error(text, id="sse_relay.E004"))
    return found


@checks.register(checks.Tags.database)
def check_databases(databases: Sequence[str] | None = None, **_: Any) -> list[checks.CheckMessage]:
    """Look at the database that events go to, if it is one of ``databases``."""
    try:
        alias = project.alias()
        broker, connection = publish.target()
    except SettingsError:
        return []  # said by the other check
    if broker is not None or connection is None or alias not in (databases or ()):
        return []
    found: list[checks.CheckMessage] = []
    with connection.cursor() as cursor:
        before = time.time()
        cursor.execute("SELECT pg_backend_pid(), extract(epoch FROM clock_timestamp())")
        pid, clock = cursor.fetchone()
        skew = float(clock) - (before + time.time()) / 2
        version = schema.installed(cursor)
    if pid != connection.connection.info.backend_pid:
        found.append(
            checks.Warning(
                f"the database {alias!r} is reached through a pooler, which LISTEN does not work through",
                "notify() does; give the relay a RELAY_LISTEN_DATABASE_URL that leads to the server itself",
                id="sse_relay.W002",
            )
        )
    if version < (newest := schema.versions()[-1][0]):
        found.append(
            checks.Warning(
                f"the database {alias!r} has version {version} of the history of events, {newest} is the newest"
                if version
                else f"the database {alias!r} has no history of events: a page that was away is told so, and gets none",
                f"manage.py migrate sse_relay --database {alias}, and start the relay with RELAY_HISTORY=1000",
                id="sse_relay.W003",
            )
        )
    if abs(skew) > MAX_SKEW:
        found.append(
            checks.Warning(
                f"the clocks of this machine and of the database differ by {abs(skew):.0f} s: where the relay's does as "
                "well, tokens end too early or too late",
                "synchronise the clocks, as by NTP",
                id="sse_relay.W004",
            )
        )
    return found


def _unknown(name: object) -> checks.CheckMessage:
    close = difflib.get_close_matches(str(name), project.NAMES, 1)
    hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(project.NAMES)}"
    return checks.Error(f"SSE_RELAY has the unknown key {name!r}", hint, id="sse_relay.E002")
