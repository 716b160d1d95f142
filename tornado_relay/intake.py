"""Events that come over HTTP, on their way to the broker: the same as that of ``notify()``."""

from __future__ import annotations

import asyncio
import hmac
import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NoReturn

from . import events
from .errors import BrokerUnavailable, EventError
from .publish import Publisher

THREADS = 4
# So many events may wait for the broker; publishers of more are told to come back.
MAX_WAITING = 1000


class Intake:
    """
    Publishes for whoever has the token.

    Args:
        publisher: The broker's. It blocks, so threads call it.
        token: What a publisher has to know.

    """

    def __init__(self, publisher: Publisher, token: str) -> None:
        self._publisher = publisher
        self._token = token.encode()
        self._executor = ThreadPoolExecutor(THREADS, thread_name_prefix="intake")
        self._waiting = 0

    def admits(self, token: str) -> bool:
        """Whether ``token`` is the right one; how long that takes says nothing of it."""
        return hmac.compare_digest(token.encode(), self._token)

    async def publish(self, channel: str, body: bytes) -> None:
        """
        Publish the event that ``body``, an object in JSON, describes.

        Raises:
            EventError: If it is none, or has a field that cannot be sent.
            BrokerError: If the broker cannot be reached, refuses, or has too much to do.

        """
        try:
            event = json.loads(body, parse_constant=_not_json)
        except (ValueError, RecursionError) as exc:
            raise EventError(f"the body is not JSON: {exc}") from exc
        try:
            payload = events.serialize(event)
        except EventError as exc:
            raise EventError(str(exc).replace("sse_payload", "event"), exc.field) from exc
        if self._waiting >= MAX_WAITING:
            raise BrokerUnavailable(f"{self._waiting} events are waiting for the broker")
        self._waiting += 1
        try:
            publish = partial(self._publisher.publish, channel, payload, events.own_id(event))
            await asyncio.get_running_loop().run_in_executor(self._executor, publish)
        finally:
            self._waiting -= 1


def _not_json(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is none of its numbers")
