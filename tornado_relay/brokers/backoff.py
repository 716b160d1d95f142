"""Delays between tries to reach something that is down."""

from __future__ import annotations

import random


class Backoff:
    """
    Jittered, growing delays in seconds; `reset` after a success.

    Each delay is drawn between half of a ceiling and the ceiling, which doubles up to ``limit``, so that
    many workers do not come back in step.
    """

    def __init__(self, first: float = 0.2, limit: float = 10.0) -> None:
        self.first = first
        self.limit = limit
        self._ceiling = first

    def next(self) -> float:
        """Return how long to wait before the next try."""
        ceiling, self._ceiling = self._ceiling, min(self._ceiling * 2, self.limit)
        return random.uniform(ceiling / 2, ceiling)

    def reset(self) -> None:
        """Start again from the shortest delay."""
        self._ceiling = self.first
