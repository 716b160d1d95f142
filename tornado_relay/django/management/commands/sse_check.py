"""``manage.py sse_check``."""

from __future__ import annotations

import secrets
import time
from typing import Any

from django.core import checks
from django.core.management.base import BaseCommand, CommandError
from django.db import Error

from tornado_relay import RelayError, eventsource, notify, project, publish
from tornado_relay.address import stream_url

# Seconds that an event may take from `notify` to a stream.
TIMEOUT = 5.0


class Command(BaseCommand):
    """Looks at the settings, and sends an event the whole way."""

    help = "Check the settings, send an event through broker and relay to a stream, and exit with 1 if anything fails."
    requires_system_checks: tuple[str, ...] = ()

    def handle(self, *_: Any, **__: Any) -> None:
        """See `BaseCommand`."""
        failed = False
        try:
            found = checks.run_checks(tags=["sse_relay", checks.Tags.database], databases=[project.alias()])
            for message in found:
                if str(message.id).startswith("sse_relay."):
                    failed = failed or message.is_serious()
                    self._say("FAIL" if message.is_serious() else "warn", f"{message.msg} ({message.hint})")
            broker, connection = publish.target()
            where = f"Django's database {connection.alias!r}" if broker is None else broker[0]
            self._say("ok", f"events go to {where}")
            self._say("ok", f"an event took {self._send() * 1000:.1f} ms from notify() to a stream of the relay")
        except (RelayError, Error) as exc:
            failed = True
            self._say("FAIL", " ".join(str(exc).split()))
        if failed:
            raise CommandError("something is wrong; see above")

    def _say(self, verdict: str, text: str) -> None:
        self.stdout.write(f"{verdict:<5} {text}")

    @staticmethod
    def _send() -> float:
        """Return the seconds that an event takes from `notify` to a stream."""
        channel = f"sse_relay_check_{secrets.token_hex(8)}"
        connection = eventsource.Connection(stream_url([channel]), timeout=TIMEOUT)
        try:
            begin = time.monotonic()
            notify(channel, {"data": channel})
            received = connection.next(TIMEOUT)
            if received is None or received.data != channel:
                raise RelayError(
                    f"an event did not come within {TIMEOUT:.0f} s; does the relay read the broker that notify() sends to?"
                )
            return time.monotonic() - begin
        finally:
            connection.close()
