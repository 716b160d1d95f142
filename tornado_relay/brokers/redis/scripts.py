"""The Lua scripts, and the keys that they work on."""

from __future__ import annotations

import hashlib
from pathlib import Path

_FOLDER = Path(__file__).parent.parent.parent / "lua"

STATE = "sse-relay:history"
SPANS = "sse-relay:spans"


def events_key(channel: str) -> str:
    """Return the key of the stream that keeps a channel's events."""
    return f"sse-relay:events:{channel}"


def own_ids_key(channel: str) -> str:
    """Return the key of the ids that publishers gave to a channel's events."""
    return f"sse-relay:ids:{channel}"


def text(name: str) -> str:
    """Return a script."""
    return (_FOLDER / f"{name}.lua").read_text()


def digest(script: str) -> str:
    """Return the name by which EVALSHA knows a script."""
    return hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest()
