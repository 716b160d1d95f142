"""What a log line looks like, and which process wrote it."""

from __future__ import annotations

import json
import logging
import sys
import time

from .settings import TRACE

# sd-daemon(3): syslog's numbers, by which `journalctl -p warning` finds a line.
_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6), (0, 7))

QUIET_SECONDS = 60.0
"""How often a line that repeats is written."""


def setup(level: str, form: str, *, journal: bool = False) -> None:
    """
    Send the log to stderr.

    Args:
        level: From which level on.
        form: ``text``, or ``json`` for one object a line.
        journal: Whether systemd's journal reads it, which has times and process ids of its own.

    """
    logging.addLevelName(TRACE, "TRACE")
    formatter = JsonFormatter() if form == "json" else JournalFormatter() if journal else TextFormatter()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Prioritized(formatter) if journal else formatter)
    logging.basicConfig(level=TRACE if level == "TRACE" else level, handlers=[handler], force=True)
    # Their DEBUG is about themselves.
    for name in ("asyncio", "tornado", "push_response"):
        logging.getLogger(name).setLevel(logging.WARNING)


def of_worker(number: int) -> None:
    """Have each line of this process say that it is of the worker at this place."""
    make = logging.getLogRecordFactory()

    def make_of_worker(*args: object, **kwargs: object) -> logging.LogRecord:
        record = make(*args, **kwargs)
        record.worker = number
        return record

    logging.setLogRecordFactory(make_of_worker)


class TextFormatter(logging.Formatter):
    """Time, level, process and text."""

    form = "%(asctime)s %(levelname)-8s [%(process)d %(who)s] %(message)s"

    def __init__(self) -> None:
        super().__init__(self.form)

    def format(self, record: logging.LogRecord) -> str:
        """Return the line for ``record``."""
        worker = getattr(record, "worker", None)
        record.who = "parent" if worker is None else f"worker {worker}"
        return super().format(record)


class JournalFormatter(TextFormatter):
    """What the journal does not know by itself."""

    form = "%(who)s: %(message)s"


class JsonFormatter(logging.Formatter):
    """One JSON object a line; what is said of streams and requests has fields of its own."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line for ``record``."""
        entry = {
            "time": self.formatTime(record),
            "level": record.levelname,
            "logger": record.name,
            "process": record.process,
            "worker": getattr(record, "worker", None),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


class Prioritized(logging.Formatter):
    """
    Lines of another formatter as systemd reads their level.

    Args:
        formatter: The other one.

    """

    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__()
        self._formatter = formatter

    def format(self, record: logging.LogRecord) -> str:
        """Return the lines for ``record``."""
        priority = next(number for level, number in _PRIORITIES if record.levelno >= level)
        return "\n".join(f"<{priority}>{line}" for line in self._formatter.format(record).splitlines())


class Throttle:
    """
    Writes one of the log lines that repeat in `QUIET_SECONDS`, and counts the others.

    Args:
        log: Where the lines go.

    """

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._quiet_until = 0.0
        self._omitted = 0

    def write(self, level: int, message: str, *args: object) -> None:
        """Write the line, with the number of lines left out since the last one; or leave it out."""
        now = time.monotonic()
        if now < self._quiet_until:
            self._omitted += 1
            return
        omitted, self._omitted, self._quiet_until = self._omitted, 0, now + QUIET_SECONDS
        if omitted:
            message += " (%d such lines were left out before this one)"
            args = (*args, omitted)
        self._log.log(level, message, *args)
