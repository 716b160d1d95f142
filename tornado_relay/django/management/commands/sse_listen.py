"""``manage.py sse_listen orders``."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from tornado_relay import RelayError, eventsource
from tornado_relay.address import stream_url


class Command(BaseCommand):
    """Shows what a page on these channels would get."""

    help = "Print the events of a stream, one JSON object a line, until interrupted."
    requires_system_checks: tuple[str, ...] = ()

    def add_arguments(self, parser: CommandParser) -> None:
        """See `BaseCommand`."""
        parser.add_argument("channel", metavar="CHANNEL", nargs="+")

    def handle(self, *_: Any, channel: list[str], **__: Any) -> None:
        """See `BaseCommand`."""
        try:
            url = stream_url(channel)
            self.stderr.write(f"listening to {url.partition('?')[0]} on {', '.join(channel)}")
            for received in eventsource.listen(url, lambda why: self.stderr.write(f"{why}; trying again")):
                self.stdout.write(json.dumps(dataclasses.asdict(received), ensure_ascii=False))
                self.stdout.flush()
        except RelayError as exc:
            raise CommandError(str(exc)) from exc
        except KeyboardInterrupt:
            pass
