"""The browser's client: the files that pages load."""

from __future__ import annotations

import gzip
import re
from functools import cache

from .handlers import STATIC, RelayHandler
from .packing import accepts_gzip
from .relay import Relay

# Seconds. After an upgrade of the relay pages have the old client for so long.
MAX_AGE = 300

FILES = {"relay.js": "text/javascript", "relay.mjs": "text/javascript", "relay.d.ts": "text/plain"}
"""Each with its type."""

_INDENTS_AND_COMMENTS = re.compile(rb"^\s*//.*\n|^\s+", re.MULTILINE)
# No text in our scripts holds such spaces, and no operator there stands before a sign.
_SPACES = re.compile(rb" ([^\w\s]+) |(?<=,) ")


class ClientHandler(RelayHandler):
    """Serves one file: scripts without comments and most spaces, compressed on request."""

    def initialize(self, relay: Relay, name: str) -> None:  # type: ignore[override]
        """Take what the route gives: one of `FILES`."""
        super().initialize(relay)
        self._name = name

    def get(self) -> None:
        body, packed = _file(self._name)
        self.set_header("Content-Type", f"{FILES[self._name]}; charset=UTF-8")
        self.set_header("Cache-Control", f"public, max-age={MAX_AGE}")
        # Pages that isolate themselves (COEP) load nothing without it.
        self.set_header("Cross-Origin-Resource-Policy", "cross-origin")
        self.add_header("Vary", "Accept-Encoding")
        if accepts_gzip(self.request.headers.get("Accept-Encoding", "")):
            self.set_header("Content-Encoding", "gzip")
            body = packed
        self.finish(body)

    head = get


@cache
def _file(name: str) -> tuple[bytes, bytes]:
    """Return what is served of the file ``name``, as it is and compressed."""
    body = (STATIC / name).read_bytes()
    if name.endswith("js"):
        body = _SPACES.sub(rb"\1", _INDENTS_AND_COMMENTS.sub(b"", body))
    return body, gzip.compress(body, mtime=0)
