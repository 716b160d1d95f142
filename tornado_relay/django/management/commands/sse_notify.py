"""``manage.py sse_notify orders '{"event": "paid"}'``."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from tornado_relay import RelayError, events, notify


class Command(BaseCommand):
    """Sends one event."""

    help = "Send one event to a channel, as notify() does."

    def add_arguments(self, parser: CommandParser) -> None:
        """See `BaseCommand`."""
        parser.add_argument("channel", metavar="CHANNEL")
        parser.add_argument("event", metavar="EVENT", help='JSON: {"event": ..., "data": ...}, or just the data')
        parser.add_argument("--database", metavar="ALIAS", help="as notify(using=...)")

    def handle(self, *_: Any, channel: str, event: str, database: str | None, **__: Any) -> None:
        """See `BaseCommand`."""
        try:
            notify(channel, events.of_argument(event), using=database)
        except RelayError as exc:
            raise CommandError(str(exc)) from exc
