"""What a worker has counted since it began. No I/O."""

from __future__ import annotations


class Counts:
    """Numbers that those add to who see it happen: for an event once, however many streams it goes to."""

    __slots__ = ("bytes", "closed", "cut", "deliveries", "events", "lag", "opened", "refused")

    def __init__(self) -> None:
        # Streams; those cut for a reader that was too slow are among the closed ones.
        self.opened = self.closed = self.cut = 0
        # Requests that were not let in, or told to come back.
        self.refused = 0
        # What the broker has sent, and what became of it: one event to one stream is a delivery.
        self.events = self.deliveries = 0
        # Of deliveries, as events are before they are compressed.
        self.bytes = 0
        # By how many seconds the loop's last tick was late.
        self.lag = 0.0

    def deliver(self, streams: int, size: int) -> None:
        """Count an event of ``size`` bytes that goes to so many streams."""
        self.deliveries += streams
        self.bytes += streams * size
