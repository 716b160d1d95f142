"""Channels with events that no history keeps. No I/O."""

from __future__ import annotations

from collections.abc import Iterator


class Unkept:
    """
    Remembers the channels that had an event outside the history, so that a stream that was away is told.

    Each channel has a place: the number of the first kept message that was delivered behind its last such event, or
    None before there is one. Memory is bounded: of the channels that are dropped only the newest place stays, and it
    counts for every channel that is not remembered. So a stream may be told needlessly, but never too little.
    """

    def __init__(self, limit: int = 10_000) -> None:
        self._limit = limit
        # The channel of the newest event comes last.
        self._places: dict[str, int | None] = {}
        self._unplaced: dict[str, None] = {}
        # The newest place of all dropped channels; 0 before one was dropped.
        self._dropped: int | None = 0

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __contains__(self, channel: object) -> bool:
        return channel in self._places or self._dropped != 0

    def note(self, channel: str) -> None:
        """Remember an event on ``channel``."""
        self._places.pop(channel, None)
        self._places[channel] = None
        self._unplaced[channel] = None
        if len(self._places) > self._limit:
            oldest = next(iter(self._places))
            place = self._places.pop(oldest)
            self._unplaced.pop(oldest, None)
            self._dropped = None if place is None or self._dropped is None else max(self._dropped, place)

    def place(self, seq: int) -> None:
        """Take ``seq``, the number of a kept message, as the place of all events that have none yet."""
        for channel in self._unplaced:
            self._places[channel] = seq
        if self._dropped is None:
            self._dropped = seq
        self._unplaced.clear()

    def restart(self) -> None:
        """Forget all places: numbers begin anew, or there may have been more such events."""
        self._places = dict.fromkeys(self._places)
        self._unplaced = dict.fromkeys(self._places)
        self._dropped = None if self._dropped != 0 else 0

    def missed(self, channel: str, position: int) -> bool:
        """Return whether a stream at ``position`` may have missed such an event on ``channel``."""
        place = self._places.get(channel, self._dropped)
        return place is None or 0 <= position < place
