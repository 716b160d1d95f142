"""Whether a server that a reader is connected to still has the say in its group."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import redis

ASK_SECONDS = 1.0
"""How old what a publisher knows of its group may be."""

LEAVE_SECONDS = 3.0
"""
How often a reader asks; it leaves a server when another one has had the say for so long. That must be longer than
`ASK_SECONDS` and the two seconds in which Sentinels tell each other.
"""


class Watch:
    """Asks on a thread; ``ask`` returns why the server is to be left, or an empty text."""

    def __init__(self, ask: Callable[[], str]) -> None:
        self._ask = ask

    async def run(self, leave: Callable[[Exception], None]) -> None:
        """Call ``leave`` when the answer has been the same for `LEAVE_SECONDS`. Cancel it to end."""
        before = ""
        while True:
            await asyncio.sleep(LEAVE_SECONDS)
            try:
                why = await asyncio.to_thread(self._ask)
            except redis.RedisError:
                continue  # who cannot ask stays: the connection itself says when the server is gone
            if why and why == before:
                leave(redis.ConnectionError(why))
            before = why
