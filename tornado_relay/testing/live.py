"""A relay that runs for as long as a test does."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote, urlencode

from .. import project, publish, settings
from ..address import stream_url
from ..errors import BrokerUnavailable, RelayError, SettingsError
from ..eventsource import Connection, Received

START_SECONDS = 20.0
"""In which a relay must have started."""

_LISTENING = re.compile(r"listening on (http://\S+)")


class Stream:
    """
    One stream, as a page holds it.

    Args:
        url: Its address.
        timeout: Seconds to wait for an event.

    """

    def __init__(self, url: str, timeout: float = 5) -> None:
        self._timeout = timeout
        self._connection = Connection(url, timeout=timeout)

    def next(self) -> Received:
        """
        Return the next event: its ``event``, ``data`` and ``id``.

        Raises:
            BrokerUnavailable: If none comes in time, or the stream has ended.

        """
        received = self._connection.next(self._timeout)
        if received is None:
            raise BrokerUnavailable(f"no event came within {self._timeout:g} s, or the stream has ended")
        return received

    def close(self) -> None:
        """End the stream."""
        self._connection.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class LiveRelay:
    """A running relay."""

    def __init__(self, url: str) -> None:
        self.url = url
        """Where it is, such as ``http://127.0.0.1:40123``."""

    def stream(self, *names: str, timeout: float = 5) -> Stream:
        """Open a stream on the channels ``names``, with a token if need be; what is sent after that reaches it."""
        return Stream(stream_url(names, base=self.url), timeout)


@contextmanager
def live_relay(**variables: str) -> Iterator[LiveRelay]:
    """
    Run a relay of one worker on the broker that ``notify()`` uses now, a test's database among them.

    What runs in a ``TestCase`` never commits, so its events do not come: use ``TransactionTestCase`` or
    ``LiveServerTestCase``. In Django, ``SSE_RELAY["RELAY_URL"]`` leads to this relay meanwhile.

    Args:
        variables: Settings of the relay, such as ``RELAY_HISTORY="100"``.

    Raises:
        SettingsError: If there is no broker that a relay could read.
        RelayError: If it does not start; the text is its log.

    """
    environment = {name: text for name, text in os.environ.items() if name not in _OURS}
    environment |= {"RELAY_SERVER_DEBUG": "true", **_broker(), **_secret(), **variables}
    command = [sys.executable, "-m", "tornado_relay", "--host", "127.0.0.1", "--port", "0", "--workers", "1"]
    with tempfile.TemporaryDirectory(prefix="sse-relay-") as home:
        log = Path(home) / "log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [*command, "--drain-seconds", "0"], cwd=home, env=environment, stdout=file, stderr=file
            )
        try:
            url = _url(process, log)
            with _known_to_django(url):
                yield LiveRelay(url)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(START_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


_OURS = {field.metadata["variable"] for field in settings.FIELDS}


def _url(process: subprocess.Popen[bytes], log: Path) -> str:
    begin = time.monotonic()
    while process.poll() is None and time.monotonic() - begin < START_SECONDS:
        if found := _LISTENING.search(log.read_text()):
            return found[1]
        time.sleep(0.02)
    raise RelayError(f"the relay has not started:\n{log.read_text()}")


def _secret() -> dict[str, str]:
    secret = settings.of_application("RELAY_JWT_SECRET")
    return {"RELAY_JWT_SECRET": secret} if secret else {}


def _broker() -> dict[str, str]:
    """Return the variables that lead a relay to where `notify` sends."""
    broker, connection = publish.target()
    if broker is not None:
        return {"REDIS_URL" if broker[0] == "redis" else "DATABASE_URL": broker[1]}
    return {"DATABASE_URL": _url_of(connection.settings_dict)}


def _url_of(database: Mapping[str, Any]) -> str:
    """Return the URL of one of Django's ``DATABASES``."""
    user, password, host, port, name = (
        str(database.get(key) or "") for key in ("USER", "PASSWORD", "HOST", "PORT", "NAME")
    )
    if not name:
        raise SettingsError("the database has no NAME, as with a service file; give live_relay(DATABASE_URL=...)")
    query = {key: str(value) for key, value in database.get("OPTIONS", {}).items() if key.startswith("ssl")}
    if host.startswith("/"):
        query, host = {**query, "host": host}, ""
    login = f"{quote(user, safe='')}{':' + quote(password, safe='') if password else ''}@" if user else ""
    where = f"[{host}]" if ":" in host else host
    return f"postgresql://{login}{where}{':' + port if port else ''}/{quote(name, safe='')}?{urlencode(query)}".rstrip(
        "?"
    )


@contextmanager
def _known_to_django(url: str) -> Iterator[None]:
    if project.conf() is None:
        yield
        return
    from django.test import override_settings  # noqa: PLC0415

    with override_settings(SSE_RELAY={**project.own(), "RELAY_URL": url}):
        yield
