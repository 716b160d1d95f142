"""Channels with events that no history keeps. No I/O."""

from __future__ import annotations

from collections.abc import Iterator


class Unkept:
    """
    Remembers the channels that had an event outside the history, so that a stream that was away is told.

    Each channel has a place: the number of the first kept message that was delivered behind its last such event, or
    None before there is one.
    """

    def __init__(self, limit: int = 10_000) -> None:
        self._limit = limit
        # The channel of the newest event comes last.
        self._places: dict[str, int | None] = {}
        self._unplaced: dict[str, None] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __contains__(self, channel: object) -> bool:
        return channel in self._places

    def note(self, channel: str) -> None:
        """Remember an event on ``channel``."""
        self._places.pop(channel, None)
        self._places[channel] = None
        self._unplaced[channel] = None
        if len(self._places) > self._limit:
            oldest = next(iter(self._places))
            del self._places[oldest]
            self._unplaced.pop(oldest, None)

    def place(self, seq: int) -> None:
        """Take ``seq``, the number of a kept message, as the place of all events that have none yet."""
        for channel in self._unplaced:
            self._places[channel] = seq
        self._unplaced.clear()

    def restart(self) -> None:
        """Forget all places, because numbers begin anew."""
        self._places = dict.fromkeys(self._places)
        self._unplaced = dict.fromkeys(self._places)

    def missed(self, channel: str, position: int) -> bool:
        """Return whether a stream at ``position`` may have missed such an event on ``channel``."""
        place = self._places.get(channel, 0)
        return place is None or 0 <= position < place
