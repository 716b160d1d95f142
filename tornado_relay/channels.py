"""Channel names: what may be one, and its lower-case twin on PostgreSQL."""

from __future__ import annotations

import re
import string

from .errors import ChannelError

MAX_CHARACTERS = 200

# Unicode's Cc: C0, DEL and C1. They end lines in protocols and logs.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
# PostgreSQL folds an unquoted identifier's ASCII letters only, in a UTF-8 database.
_FOLD = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)


def check(name: object) -> str:
    """
    Return ``name`` if it can be a channel.

    Raises:
        ChannelError: If it is no string, empty, longer than 200 characters, or holds control
            characters or half a surrogate pair.

    """
    if not isinstance(name, str):
        raise ChannelError(f"channel must be a string, not {type(name).__name__}")
    if not name:
        raise ChannelError(f"channel is empty; give a name of 1 to {MAX_CHARACTERS} characters")
    if len(name) > MAX_CHARACTERS:
        raise ChannelError(f"channel has {len(name)} characters; {MAX_CHARACTERS} is the limit")
    if bad := _CONTROL.search(name) or _SURROGATE.search(name):
        kind = "a control character" if _CONTROL.match(bad[0]) else "half a surrogate pair"
        raise ChannelError(f"channel holds {kind} ({bad[0]!r} at position {bad.start()}); use printable text")
    return name


def twin(name: str) -> str | None:
    """
    Return the channel that an unquoted ``NOTIFY name`` reaches, or None if it is ``name`` itself.

    PostgreSQL folds unquoted identifiers to lower case (SQL syntax, section 4.1.1), so hand-written
    SQL for ``Orders`` arrives on ``orders``.
    """
    folded = name.translate(_FOLD)
    return folded if folded != name else None
