"""How a channel and its payload travel through NOTIFY. No I/O.

Limits of PostgreSQL (src/backend/commands/async.c): a channel has at most 63 bytes, a payload at most
7,999. A channel with a longer name shares one physical channel with all others of its kind, and its
payload says which one it is for.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable

from ...channels import twin
from ...errors import PayloadTooLarge
from ..message import Message, read

MAX_CHANNEL_BYTES = 63
MAX_PAYLOAD_BYTES = 7_999

# A stream on a channel of this very name must not get what is meant for others, so that name
# travels in an envelope as well.
SHARED_CHANNEL = "sse_relay_long_names"

_serial = itertools.count(1)
_BLANKS = str.maketrans("01", " \t")


def physical(channel: str) -> str:
    """Return the PostgreSQL channel on which events of ``channel`` travel."""
    if len(channel.encode()) > MAX_CHANNEL_BYTES or channel == SHARED_CHANNEL:
        return SHARED_CHANNEL
    return channel


def audible(channels: Iterable[str]) -> tuple[str, ...]:
    """Return ``channels`` with the lower-case twins that an unquoted ``NOTIFY`` would reach."""
    return tuple(dict.fromkeys(name for channel in channels for name in (channel, twin(channel)) if name))


def wrap(channel: str, payload: str) -> tuple[str, str]:
    """
    Return the arguments of ``pg_notify`` for the JSON object ``payload``.

    Blanks at the end make each payload unlike the one before it: PostgreSQL delivers equal payloads of
    one transaction once (NOTIFY, "Notes"), but two calls are two events.

    Raises:
        PayloadTooLarge: If PostgreSQL could not carry it.

    """
    target = physical(channel)
    if target == SHARED_CHANNEL:
        payload = f'{{"channel":{json.dumps(channel, ensure_ascii=False)},"payload":{payload}}}'
    room = MAX_PAYLOAD_BYTES - len(payload.encode())
    if room < 0:
        raise PayloadTooLarge(
            f"the event is {MAX_PAYLOAD_BYTES - room:,} bytes of JSON; PostgreSQL's NOTIFY takes at most "
            f"{MAX_PAYLOAD_BYTES:,}. Run sse-relay-server init-db, which lets events have 1 MiB; "
            "or send a key, and let the page fetch the rest"
        )
    blanks = format(next(_serial) & 0xFFFF, "b").translate(_BLANKS)
    return target, payload + (blanks[-room:] if room else "")  # the last ones change from call to call


def unwrap(target: str, payload: str) -> Message | None:
    """Return the message of a notification, or None if it is no envelope where one is due."""
    message = read(target, payload)
    if target != SHARED_CHANNEL or message.seq:
        return message
    try:
        envelope = json.loads(payload)
        channel, event = envelope["channel"], envelope["payload"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if not isinstance(channel, str) or physical(channel) != SHARED_CHANNEL:
        return None
    return Message(channel, event if isinstance(event, str) else json.dumps(event, ensure_ascii=False))
