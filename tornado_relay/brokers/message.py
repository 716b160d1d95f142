"""What a broker hands on, and the mark of those messages that a history keeps. No I/O.

A message of the history travels as

    RS token "-" seq RS channel RS payload

with RS the control character 30, which no payload of another kind begins with: JSON cannot, and nobody
types it. The channel is empty where the broker's own says it. Where even the RS before the payload is
missing, the payload was too large, and the history has it.
"""

from __future__ import annotations

import re
from typing import NamedTuple

RS = "\x1e"

MAX_SEQ = 2**63 - 1
"""The highest number that a history draws: PostgreSQL's largest bigint."""

_MARK = re.compile(f"{RS}([0-9a-f]{{8}}-([1-9][0-9]{{0,18}})){RS}([^{RS}]*)(?:{RS}(.*))?", re.DOTALL)


class Message(NamedTuple):
    """One event on its way from the broker to the hub."""

    channel: str
    payload: str | None
    """What `events.parse` takes; None where there is a gap, of which the streams are to be told."""
    id: str = ""
    """The event's id on the wire; empty for what no history keeps."""
    seq: int = 0
    """Its place in the history: higher than that of all that were sent before it, on any channel."""
    reason: str = "unreadable-payload"
    """Why there is a gap, if there is one, as `stream-reset` has it."""


def read(channel: str, payload: str) -> Message:
    """Return the message that a ``payload`` on the broker's ``channel`` stands for; see above for None."""
    if not payload.startswith(RS):
        return Message(channel, payload)
    mark = _MARK.fullmatch(payload)
    if mark is None or int(mark[2]) > MAX_SEQ:
        return Message(channel, payload)
    event_id, seq, marked_channel, kept = mark.groups()
    return Message(marked_channel or channel, kept, event_id, int(seq))
