"""The application, where it is asked who may listen (``RELAY_AUTH_URL``)."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import logging
from typing import NamedTuple
from urllib.parse import urlencode

from tornado.httpclient import HTTPClientError, HTTPRequest
from tornado.httputil import HTTPHeaders
from tornado.ioloop import IOLoop
from tornado.iostream import UnsatisfiableReadError
from tornado.simple_httpclient import SimpleAsyncHTTPClient

from . import __version__
from .errors import AuthorityUnavailable
from .logs import Throttle

log = logging.getLogger(__name__)

TIMEOUT = 5.0
"""Seconds that an answer may take, the wait for others' included."""
CONCURRENT = 10
"""Questions that a worker asks at a time."""
FRESH_SECONDS = 3.0
"""How long an answer counts."""

REFUSALS = (401, 403)


class Question(NamedTuple):
    """Whether a client may listen to all of these channels; empty texts are headers that it did not send."""

    channels: tuple[str, ...]
    cookie: str
    authorization: str
    address: str
    """The client's; empty if it has none."""


@dataclasses.dataclass
class _Asking:
    """A question that is asked, or was a moment ago."""

    answer: asyncio.Task[int]
    askers: int = 0
    """How many wait for the answer."""


class Authority:
    """
    Asks the application, and keeps its answers for a moment.

    Clients that ask the same within that moment, as all tabs of a browser do, share one answer.

    Args:
        url: Where it answers. It gets the channels as ``channel`` in the query, the client's address as
            ``X-Forwarded-For``, and the client's ``Cookie`` and ``Authorization``.

    """

    def __init__(self, url: str) -> None:
        self._url = url + ("&" if "?" in url else "?")
        self._client = SimpleAsyncHTTPClient(force_instance=True, max_clients=CONCURRENT)
        # By digests, since what a client sends may be long.
        self._asked: dict[bytes, _Asking] = {}
        self._free = asyncio.Semaphore(CONCURRENT)
        self._failures_log = Throttle(log)

    async def ask(self, question: Question) -> int:
        """
        Return the status of the answer: 2xx lets the client in, one of `REFUSALS` does not.

        Raises:
            AuthorityUnavailable: If there is no such answer.

        """
        key = hashlib.sha256(repr(question).encode()).digest()
        asking = self._asked.get(key)
        if asking is None:
            asking = self._asked[key] = _Asking(asyncio.create_task(self._when_free(key, question)))
            asking.answer.add_done_callback(lambda answer: self._answered(key, answer))
        asking.askers += 1
        try:
            # Shielded: the others go on waiting when one of them leaves.
            return await asyncio.wait_for(asyncio.shield(asking.answer), TIMEOUT)
        except asyncio.TimeoutError as exc:
            raise self._failed(f"does not answer within {TIMEOUT:.0f} s") from exc
        finally:
            asking.askers -= 1

    def _answered(self, key: bytes, answer: asyncio.Task[int]) -> None:
        if answer.cancelled() or answer.exception():
            del self._asked[key]
        else:
            IOLoop.current().call_later(FRESH_SECONDS, self._asked.pop, key)

    async def _when_free(self, key: bytes, question: Question) -> int:
        async with self._free:
            if not self._asked[key].askers:
                raise AuthorityUnavailable("nobody waits for the answer any more")
            return await self._ask(question)

    async def _ask(self, question: Question) -> int:
        headers = HTTPHeaders()
        for name, value in (
            ("Cookie", question.cookie),
            ("Authorization", question.authorization),
            ("X-Forwarded-For", question.address),
        ):
            if value:
                headers[name] = value
        request = HTTPRequest(
            self._url + urlencode([("channel", name) for name in question.channels]),
            headers=headers,
            connect_timeout=TIMEOUT,
            request_timeout=TIMEOUT,
            user_agent=f"sse-relay-server/{__version__}",
            # A page to log in at is no answer.
            follow_redirects=False,
            # Its body says nothing.
            streaming_callback=lambda _: None,
            decompress_response=False,
        )
        try:
            status = (await self._client.fetch(request, raise_error=False)).code
        except (HTTPClientError, OSError, ValueError, UnsatisfiableReadError) as exc:
            raise self._failed(f"does not answer: {exc}") from exc
        if 200 <= status < 300 or status in REFUSALS:
            return status
        raise self._failed(f"answered {status}, where 2xx lets in, and 401 and 403 refuse")

    def _failed(self, why: str) -> AuthorityUnavailable:
        text = "RELAY_AUTH_URL %s; pages are told to come back"
        self._failures_log.write(logging.WARNING, text, why)
        return AuthorityUnavailable(f"RELAY_AUTH_URL {why}")
