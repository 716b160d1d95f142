"""The event codec: broker payload -> Event -> frame. No I/O.

A payload on the broker is JSON text. An object that has only the keys of `KEYS`, and at least one, is
an event; anything else is the data of a plain ``message`` event. `serialize` is the publisher's strict
half, `parse` and `encode` are the relay's lenient half: what a publisher of another kind got wrong is
made harmless there, never dropped.

The wire format is the HTML standard's, section "Server-sent events": a field ends at CR, LF or CRLF, so
a line break inside ``event`` or ``id`` would start a field of the sender's choice (CWE-93), and NUL in
``id`` makes a browser ignore it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Mapping
from typing import Any

from .errors import EventError, PayloadTooLarge

KEYS = ("event", "id", "data", "retry", "comment", "sep")
MAX_KEPT_BYTES = 1_048_576
MAX_OWN_ID = 200
SEPARATORS = ("\n", "\r\n", "\r")

OPEN = "stream-open"
POSITION = "stream-position"
OF_THE_STREAM = frozenset({OPEN, POSITION})
"""Types of the events that tell a client its position; no publisher has sent them."""

HEARTBEAT = b":\n"
"""A comment line. Some clients would take a blank line behind it for an event without data."""

_KEY_SET = frozenset(KEYS)
_LINE_BREAK = re.compile("\r\n|\r|\n")
_BREAKS_A_FIELD = re.compile("[\r\n\0]")
_DIGITS = re.compile("[0-9]{1,15}")  # re's \d would let other scripts' digits in; browsers want ASCII


def _not_json(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


# Made once: json.loads and json.dumps make anew for each event whatever is not the default.
_from_json = json.JSONDecoder(parse_constant=_not_json).decode
_to_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


@dataclasses.dataclass(frozen=True, slots=True)
class Event:
    """One Server-Sent Event; a field that is None is not sent."""

    data: str | None = None
    event: str | None = None
    id: str | None = None
    retry: int | None = None
    """Milliseconds that the browser waits before it reconnects."""
    comment: str | None = None
    sep: str = "\n"


def serialize(payload: Mapping[str, Any]) -> str:
    """
    Check an event as ``notify()`` takes it and return its JSON for the broker.

    Args:
        payload: ``event`` (text), ``id`` (text or whole number), ``data`` (text, or anything JSON can
            hold), ``retry`` (milliseconds), ``comment`` (text), ``sep`` (line ending); all optional.

    Raises:
        EventError: If a field is unknown or cannot be sent exactly as given.

    """
    if not isinstance(payload, Mapping):
        raise EventError(f"sse_payload must be a dict with keys of {', '.join(KEYS)}, not {type(payload).__name__}")
    if unknown := [key for key in payload if key not in _KEY_SET]:
        raise EventError(
            f"sse_payload has the unknown key {unknown[0]!r}; known are {', '.join(KEYS)}. "
            'To send an object of your own, put it under "data"',
            str(unknown[0]),
        )
    if not payload:
        raise EventError(f"sse_payload is empty; give at least one of {', '.join(KEYS)}")
    for key in ("event", "id"):
        _check_line(key, payload.get(key))
    _check_retry(payload.get("retry"))
    if not isinstance(payload.get("comment", ""), str | None):
        raise EventError(f"sse_payload['comment'] must be text, not {type(payload['comment']).__name__}", "comment")
    if payload.get("sep") not in (None, *SEPARATORS):
        raise EventError(f"sse_payload['sep'] is {payload['sep']!r}; it must be '\\n', '\\r\\n' or '\\r'", "sep")
    return "{" + ",".join(f'"{key}":{_field(key, value)}' for key, value in payload.items()) + "}"


def of_argument(text: str) -> dict[str, Any]:
    """
    Return the event that a command's argument stands for: a JSON object, or any other JSON as its data.

    Raises:
        EventError: If it is no JSON.

    """
    try:
        payload = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise EventError(f"EVENT is not JSON: {exc}; a plain text is given as '\"text\"'") from exc
    return payload if isinstance(payload, dict) else {"data": payload}


def own_id(payload: Mapping[str, Any]) -> str | None:
    """Return the id that a checked event has of its publisher's own, if a history is to find the event by it."""
    text = str(payload["id"]) if payload.get("id") is not None else ""
    return text if 0 < len(text) <= MAX_OWN_ID else None


def check_kept_size(payload: str) -> None:
    """
    Check the JSON of an event that a history is to keep.

    Raises:
        PayloadTooLarge: If it is over 1 MiB.

    """
    if (size := len(payload.encode())) > MAX_KEPT_BYTES:
        raise PayloadTooLarge(
            f"the event is {size:,} bytes of JSON; {MAX_KEPT_BYTES:,} is the limit. "
            "Send a key, and let the page fetch the rest"
        )


def parse(payload: str) -> Event:
    """Return the event that a broker's payload stands for; never fails."""
    try:
        fields = _from_json(payload)
        if not isinstance(fields, dict) or not fields or not fields.keys() <= _KEY_SET:
            return Event(data=payload)
        sep = fields.get("sep")
        return Event(
            data=_text(fields["data"]) if "data" in fields else None,
            event=_line(fields.get("event")),
            id=_line(fields.get("id")),
            retry=_milliseconds(fields.get("retry")),
            comment=None if fields.get("comment") is None else _text(fields["comment"]),
            sep=sep if sep in SEPARATORS else "\n",
        )
    except (ValueError, RecursionError):  # no JSON, numbers over Python's limits, or nested past its stack
        return Event(data=payload)


def encode(event: Event) -> bytes:
    """
    Return the frame of an event: the bytes that every subscriber's socket gets.

    An event that has a name but no data gets an empty ``data`` field, since a browser fires nothing
    without one.
    """
    sep, lines = event.sep, []
    if event.comment is not None:
        lines += [f": {line}" for line in _LINE_BREAK.split(event.comment)]
    if event.id is not None:
        lines.append(f"id: {_BREAKS_A_FIELD.sub('', event.id)}")
    if event.event:
        lines.append(f"event: {_BREAKS_A_FIELD.sub('', event.event)}")
    if event.data is not None:
        lines += [f"data: {line}" for line in _LINE_BREAK.split(event.data)]
    elif event.event:
        lines.append("data: ")
    if event.retry is not None:
        lines.append(f"retry: {event.retry}")
    text = sep.join([*lines, "", ""])
    try:
        return text.encode()
    except UnicodeEncodeError:  # half a surrogate pair from a \u escape: UTF-8 has no form for it
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def frame(payload: str, kept_as: str = "") -> bytes:
    """
    Return the frame of a broker's payload.

    If a history knows the event as ``kept_as``, that goes with it, so that a browser that comes
    back says how far it got. An id of the publisher's own stays; `position` with ours follows.
    """
    event = parse(payload)
    if not kept_as:
        return encode(event)
    if event.id is None:
        return encode(dataclasses.replace(event, id=kept_as))
    return encode(event) + position(kept_as)


@functools.lru_cache(128)  # most streams of a moment begin at the same position
def stream_open(event_id: str, *, resumed: bool) -> bytes:
    """Return the event that begins a stream at ``event_id``, which the client sent if ``resumed``."""
    return encode(Event(event=OPEN, id=event_id, data=_to_json({"id": event_id, "resumed": resumed})))


def position(event_id: str) -> bytes:
    """
    Return the event that makes ``event_id`` a client's last event id.

    It has data because Firefox, WebKit and several libraries forget the id of a block without
    data, although the HTML standard says that they keep it ("dispatch the event").
    """
    return encode(Event(event=POSITION, id=event_id, data=_to_json({"id": event_id})))


def label(channel: str, seq: int) -> bytes:
    """
    Return the lines that tell, before an event's own, of which channel it is and its number in the history, if it has one.

    They are fields that the HTML standard does not know, which a browser's EventSource ignores.
    """
    name = b"channel: %b\n" % channel.encode()
    return name + b"seq: %d\n" % seq if seq else name


def stream_reset(reason: str, channels: tuple[str, ...]) -> bytes:
    """Return the frame that tells a stream on ``channels`` that it may have missed something."""
    data = _to_json({"reason": reason, "channels": channels})
    return encode(Event(event="stream-reset", data=data))


def _check_line(key: str, value: object) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise EventError(f"sse_payload[{key!r}] must be text or a whole number, not {type(value).__name__}", key)
    if isinstance(value, str) and (bad := _BREAKS_A_FIELD.search(value)):
        raise EventError(
            f"sse_payload[{key!r}] holds {bad[0]!r} at position {bad.start()}; CR, LF and NUL cannot be sent in it",
            key,
        )


def _check_retry(value: object) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 10**15):
        raise EventError(
            f"sse_payload['retry'] is {value!r}; it must be a whole number of milliseconds, 0 or more", "retry"
        )


def _field(key: str, value: object) -> str:
    try:
        text = _to_json(value)
        text.encode()
    except UnicodeEncodeError as exc:
        raise EventError(f"sse_payload[{key!r}] holds half a surrogate pair, which UTF-8 cannot carry", key) from exc
    except (TypeError, ValueError, RecursionError) as exc:
        raise EventError(f"sse_payload[{key!r}] cannot be written as JSON: {exc}", key) from exc
    return text


def _text(value: object) -> str:
    if isinstance(value, str):
        return value
    return _to_json(value)


def _line(value: object) -> str | None:
    return None if value is None else _BREAKS_A_FIELD.sub("", _text(value))


def _milliseconds(value: object) -> int | None:
    if value is None:
        return None
    text = value if isinstance(value, str) else _text(value)
    return int(text) if _DIGITS.fullmatch(text) else None
