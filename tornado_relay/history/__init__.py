"""The events that a broker keeps for streams that come back."""

from __future__ import annotations

from typing import Protocol

from .page import Page
from .spans import Cursor, Spans


class History(Protocol):
    """The history of one broker. All raise `BrokerError`."""

    hint: str
    """What to do where the broker keeps none."""

    async def open(self) -> tuple[Cursor, Spans] | None:
        """Return where it ends and what it consists of, or None if the broker keeps none. Called at each connect."""

    async def find(self, own_id: str, channels: tuple[str, ...]) -> int | None:
        """Return the number of the one event on ``channels`` with this id of its publisher's own; None if there is not one."""

    async def read(
        self, places: list[tuple[str, int]], limit: int, size: int, total: int
    ) -> tuple[list[Page], Cursor | None]:
        """
        Return a page for each (channel, number), and where the history ended then.

        A page has at most ``limit`` events, and with all but the last of them less than ``size`` bytes. All
        pages together have less than ``total`` bytes with all but the last, in the order of the events' numbers.
        All of it is of one moment. There is no end where the broker has forgotten that it keeps a history.
        """

    async def prune(self) -> bool:
        """Delete some of what is too old or too much; return whether there is more."""
