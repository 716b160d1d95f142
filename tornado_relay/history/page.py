"""Pages of a history, and what a stream gets of them. No I/O."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from .. import events
from .spans import Cursor

# Bytes that a stream gets at a time, but for the last event.
PART_BYTES = 131_072


class Row(NamedTuple):
    """One event that is kept."""

    seq: int
    id: str
    payload: str


class Page(NamedTuple):
    """The events of one channel behind a place."""

    rows: list[Row]
    end: int | None
    """Up to where it has all, or None if there are no more."""
    through: int
    """Up to where events of this channel have been, or may have been, deleted."""

    def framed(self) -> FramedPage:
        """Return the page with its events as they go to a socket."""
        frames = [(row.seq, events.frame(row.payload, row.id)) for row in self.rows]
        return FramedPage(frames, self.end, self.through)


Frames = list[tuple[int, bytes]]
"""Events in order, each with its number."""


class FramedPage(NamedTuple):
    """A `Page` of frames."""

    frames: Frames
    end: int | None
    through: int


class Part(NamedTuple):
    """What a stream at some place on some channels gets at a time."""

    data: bytes
    position: int
    """Where it is then."""
    complete: bool
    """Whether it has all then."""
    gaps: dict[str, int]
    """The channels on which events behind its place have been deleted, or may have been, and up to where."""


def part(
    position: int, pages: Mapping[str, FramedPage], tails: Sequence[Frames], head: Cursor, *, labels: bool = False
) -> Part:
    """
    Return what a stream at ``position`` on the channels of ``pages`` gets.

    Args:
        position: Up to where it has everything, or -1 if it takes what there is.
        pages: A page for each of its channels.
        tails: What has come live on its channels since the pages were asked for.
        head: Where the history ended when they were read.
        labels: Whether it is told of which channel each event is.

    """
    if labels:
        tails = [_labelled(name, frames) for name, frames in zip(pages, tails, strict=True)]
        pages = {name: page._replace(frames=_labelled(name, page.frames)) for name, page in pages.items()}
    gaps = {channel: page.through for channel, page in pages.items() if position < page.through}
    # Across channels a stream gets events in their order, so no further than the first page that was cut short.
    end = min((page.end for page in pages.values() if page.end is not None), default=None)
    # A stream gets no more at a time than a page, on however many channels it is.
    taken: Frames = []
    size = 0
    for seq, frame in heapq.merge(*(page.frames for page in pages.values())):
        if end is not None and seq > end:
            break
        if size >= PART_BYTES:
            end = taken[-1][0]
            break
        taken.append((seq, frame))
        size += len(frame)
    if end is not None:
        return Part(_joined(taken), end, False, gaps)
    # What was recorded and is no later than the head is in the pages.
    end = max(position, head.seq)
    tail = list(heapq.merge(*([pair for pair in frames if pair[0] > end] for frames in tails)))
    if tail:
        return Part(_joined([*taken, *tail]), tail[-1][0], True, gaps)
    # The last event may have told the end already. If there is none, the client may still have an
    # older id, which would be pruned some day, or one of a publisher's own.
    told = end > head.seq or (taken and taken[-1][0] == end)
    return Part(_joined(taken) + (b"" if told else events.position(str(head))), end, True, gaps)


def _labelled(channel: str, frames: Frames) -> Frames:
    return [(seq, events.label(channel, seq) + frame) for seq, frame in frames]


def _joined(frames: Frames) -> bytes:
    return b"".join(frame for _, frame in frames)
