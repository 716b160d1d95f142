"""The browser's client: the files that pages load."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

from .handlers import RelayHandler
from .packing import accepts_gzip
from .relay import Relay

# Seconds. After an upgrade of the relay pages have the old client for so long.
MAX_AGE = 300

_STATIC = Path(__file__).parent / "static"
_INDENTS_AND_COMMENTS = re.compile(rb"^\s*//.*\n|^\s+", re.MULTILINE)


class ClientHandler(RelayHandler):
    """Serves one file; scripts without their comments, compressed where the client takes that."""

    def initialize(self, relay: Relay, name: str, content_type: str) -> None:  # type: ignore[override]
        """Take what the route gives."""
        super().initialize(relay)
        self._name = name
        self._type = content_type

    def get(self) -> None:
        body, packed = _file(self._name)
        self.set_header("Content-Type", f"{self._type}; charset=UTF-8")
        self.set_header("Cache-Control", f"public, max-age={MAX_AGE}")
        # Pages that isolate themselves (COEP) load nothing without it.
        self.set_header("Cross-Origin-Resource-Policy", "cross-origin")
        self.add_header("Vary", "Accept-Encoding")
        if accepts_gzip(self.request.headers.get("Accept-Encoding", "")):
            self.set_header("Content-Encoding", "gzip")
            body = packed
        self.finish(body)

    head = get


_files: dict[str, tuple[bytes, bytes]] = {}


def _file(name: str) -> tuple[bytes, bytes]:
    """Return what is served of the file ``name``, as it is and compressed."""
    if name not in _files:
        body = (_STATIC / name).read_bytes()
        if name.endswith("js"):
            body = _INDENTS_AND_COMMENTS.sub(b"", body)
        _files[name] = body, gzip.compress(body, mtime=0)
    return _files[name]
