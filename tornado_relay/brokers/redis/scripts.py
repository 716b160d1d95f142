"""The Lua scripts, and the keys that they work on."""

from __future__ import annotations

import hashlib
from pathlib import Path

_FOLDER = Path(__file__).parent.parent.parent / "lua"
# The files that each script is made of.
_PARTS = {
    "open": ("state", "span", "open"),
    "publish": ("state", "span", "publish"),
    "read": ("state", "read"),
}


class Keys:
    """The keys of one history, which all begin with ``prefix``."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self.state = f"{prefix}:history"
        self.spans = f"{prefix}:spans"

    def events(self, channel: str) -> str:
        """Return the key of the stream that keeps a channel's events."""
        return f"{self._prefix}:events:{channel}"

    def own_ids(self, channel: str) -> str:
        """Return the key of the ids that publishers gave to a channel's events."""
        return f"{self._prefix}:ids:{channel}"


def text(name: str) -> str:
    """Return a script."""
    return "\n".join((_FOLDER / f"{part}.lua").read_text() for part in _PARTS[name])


def digest(script: str) -> str:
    """Return the name by which EVALSHA knows a script."""
    return hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest()
