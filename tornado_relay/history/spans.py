"""Where in a history a stream is, and whether that place is still one. No I/O.

A place is written ``TOKEN-SEQ``: the id of the event up to which a stream has everything. The token names a
*span*, a run of numbers that one broker drew on one copy of its data. A broker that lost data draws the
same numbers again, under another token, so that an old place is never taken for a new one.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator
from typing import NamedTuple

EARLIEST = "earliest"
"""As a last event id: all that is kept."""

_CURSOR = re.compile("([0-9a-f]{8})-(0|[1-9][0-9]{0,18})")


class Cursor(NamedTuple):
    """A place in a history."""

    token: str
    seq: int

    def __str__(self) -> str:
        return f"{self.token}-{self.seq}"


def parse(text: str) -> Cursor | None:
    """Return the place that a last event id names, or None if it is none of ours."""
    match = _CURSOR.fullmatch(text)
    return Cursor(match[1], int(match[2])) if match else None


class Spans:
    """The spans of a history, each a token and its first number, in the order in which they began."""

    def __init__(self, spans: Iterable[tuple[str, int]] = ()) -> None:
        ordered = list(spans)
        ends: list[int | None] = [first for _, first in ordered[1:]]
        # The place just before a span's first event is in it as well: a stream may begin there.
        self._ranges = {token: (first - 1, end) for (token, first), end in zip(ordered, [*ends, None], strict=False)}

    def __contains__(self, token: str) -> bool:
        return token in self._ranges

    def __iter__(self) -> Iterator[str]:
        return iter(self._ranges)

    @property
    def begin(self) -> int:
        """The place just before the first event of the first span."""
        return min((start for start, _ in self._ranges.values()), default=0)

    def behind(self, tokens: Container[str], head: int) -> int:
        """Return the place where the last span of ``tokens`` ends, ``head`` if it goes on, or that where all begin."""
        place = self.begin
        for token, (_, end) in self._ranges.items():
            if token in tokens:
                place = head if end is None else end - 1
        return place

    def admits(self, cursor: Cursor) -> bool:
        """Return whether all that came up to ``cursor`` is what this history holds, or has held."""
        if cursor.token not in self._ranges:
            return False
        start, end = self._ranges[cursor.token]
        return start <= cursor.seq and (end is None or cursor.seq < max(end, start + 1))
