"""The payloads that were too large for NOTIFY: read from the history, each once for all streams of the worker."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from ...errors import BrokerError, BrokerUnavailable
from ..message import Message

log = logging.getLogger(__name__)

# Payloads of one read.
BATCH = 16
_READ = "SELECT id, payload FROM sse_relay.event WHERE id = ANY(%s)"


class LargePayloads:
    """
    Passes messages on, in order, with the payloads that they lack.

    From the first message without a payload on, all messages wait until that has been read.

    Args:
        query: Runs a statement with arguments and returns its rows, or raises `BrokerError`.
        on_messages: Takes messages, and the time at which the first of them came.

    """

    def __init__(
        self,
        query: Callable[[str, Any], Awaitable[list[tuple[Any, ...]]]],
        on_messages: Callable[[list[Message], float], None],
    ) -> None:
        self._query = query
        self._on_messages = on_messages
        self._waiting: list[Message] = []
        self._waiting_since = 0.0
        self._reading: asyncio.Task[None] | None = None

    def pass_on(self, messages: list[Message], arrived: float) -> None:
        """Pass ``messages`` on, now if nothing has to be read for them; ``arrived`` is by `time.monotonic`."""
        if self._waiting or any(message.payload is None for message in messages):
            self._waiting_since = self._waiting_since if self._waiting else arrived
            self._waiting += messages
            if self._reading is None:
                self._reading = asyncio.create_task(self._read())
        elif messages:
            self._on_messages(messages, arrived)

    def clear(self) -> None:
        """Forget what waits: the connection was lost."""
        self._waiting.clear()
        if self._reading:
            self._reading.cancel()
            self._reading = None

    async def _read(self) -> None:
        try:
            while self._waiting:
                ready = list(self._waiting)
                wanted = [message.seq for message in ready if message.payload is None][:BATCH]
                if wanted:
                    payloads = dict(await self._query(_READ, (wanted,)))
                    ready = _filled(ready, wanted[-1], payloads)
                del self._waiting[: len(ready)]
                self._on_messages(ready, self._waiting_since)
        except BrokerUnavailable:
            pass  # the session ends as well: the streams get these from the history, or a reset
        except BrokerError as exc:
            log.error("large events cannot be read: %s", exc)
            waiting, self._waiting = self._waiting, []
            self._on_messages(waiting, self._waiting_since)
        finally:
            if self._reading is asyncio.current_task():  # else `clear` was called, and there may be another one
                self._reading = None


def _filled(messages: list[Message], last: int, payloads: dict[int, str]) -> list[Message]:
    """Return the messages up to the first that lacks its payload and is behind number ``last``, with ``payloads``."""
    filled = []
    for message in messages:
        if message.payload is None:
            if message.seq > last:
                break
            message = message._replace(payload=payloads.get(message.seq))  # noqa: PLW2901
        filled.append(message)
    return filled
