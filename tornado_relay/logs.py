"""What a log line looks like."""

from __future__ import annotations

import json
import logging
import sys

from .settings import TRACE


def setup(level: str, form: str) -> None:
    """Send the log to stderr at ``level``, as ``text`` or as one JSON object a line."""
    logging.addLevelName(TRACE, "TRACE")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logging.basicConfig(level=TRACE if level == "TRACE" else level, handlers=[handler], force=True)
    # Their DEBUG is about themselves.
    for name in ("asyncio", "tornado", "push_response"):
        logging.getLogger(name).setLevel(logging.WARNING)


class TextFormatter(logging.Formatter):
    """Time, level, process and text."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-8s [%(process)d] %(message)s")


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line for ``record``."""
        entry = {
            "time": self.formatTime(record),
            "level": record.levelname,
            "logger": record.name,
            "process": record.process,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)
