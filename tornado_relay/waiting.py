"""Who may wait, and for how long, until their request has come. No I/O of its own."""

from __future__ import annotations

from collections.abc import Callable


class Waiting:
    """
    The connections that have not sent the whole of a request, oldest first.

    Whoever opens connections and sends half a request takes the places of others who do: a request that comes in one
    piece is served at once, and is not among them.

    Args:
        limit: How many there may be.

    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        # Since when each waits, and how it is closed.
        self._connections: dict[object, tuple[float, Callable[[], object]]] = {}

    def __len__(self) -> int:
        return len(self._connections)

    def add(self, connection: object, now: float, close: Callable[[], object]) -> None:
        """Let ``connection`` wait, and close the oldest if that is one too many."""
        self.discard(connection)
        self._connections[connection] = now, close
        if len(self._connections) > self._limit:
            self.close_oldest(now)

    def discard(self, connection: object) -> None:
        """Forget a connection that has a request, or has ended."""
        self._connections.pop(connection, None)

    def any_since(self, time: float) -> bool:
        """Return whether one has begun to wait at ``time`` or later."""
        newest = next(reversed(self._connections), None)
        return newest is not None and self._connections[newest][0] >= time

    def close_oldest(self, before: float) -> bool:
        """Close the one that has waited for longest, and return True, if it has since ``before`` or earlier."""
        oldest = next(iter(self._connections), None)
        if oldest is None or self._connections[oldest][0] > before:
            return False
        _, close = self._connections.pop(oldest)
        close()
        return True
