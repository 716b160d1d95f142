"""The short way in: a stream that is asked for as EventSource does is opened here; all else goes through Tornado's server.

It takes requests of one form only, whole, in one piece, and never answers with an error: whatever it does not take, or
would refuse, it leaves unread for Tornado's handlers, which say why.
"""

from __future__ import annotations

import asyncio
import re
import socket

from tornado.escape import url_unescape
from tornado.httputil import HTTPHeaders, HTTPInputError, HTTPServerRequest, RequestStartLine
from tornado.web import HTTPError

from .access import Grant
from .counts import REFUSED
from .refusal import NotNow
from .relay import Relay
from .visit import Visit

MAX_HEAD = 8192

_REQUEST = re.compile(
    rb"GET (/(?:channel=|events\?)[!-~]+) HTTP/1\.1\r\n((?:[A-Za-z0-9-]+:[\t -~\x80-\xff]*\r\n)+)\r\n"
)
# Of a request with one of these there is more to say than that it wants a stream.
_MORE = ("Content-Length", "Transfer-Encoding", "Expect", "Upgrade")


class Entry:
    """
    Opens streams for whole requests.

    Args:
        relay: What the worker has.

    """

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._opening: set[asyncio.Task[None]] = set()

    def take(self, connection: socket.socket, data: bytes, peer: str) -> bool:
        """
        Open a stream for the request that ``data`` is, all that has come by ``connection``, still unread.

        Returns:
            Whether it was taken: if not, the connection is as it was.

        """
        relay, match = self._relay, _REQUEST.fullmatch(data)
        if match is None or relay.authority or relay.trouble:
            return False
        try:
            headers = HTTPHeaders.parse(match[2].decode("latin-1"))
            start_line = RequestStartLine("GET", match[1].decode(), "HTTP/1.1")
            request = HTTPServerRequest(headers=headers, start_line=start_line)
            if (
                "text/event-stream" not in headers.get("Accept", "")
                or not relay.origins.admits(headers.get("Origin"))
                or any(name in headers for name in _MORE)
            ):
                return False
            prefix, _, name = request.path.partition("=")
            visit = Visit(
                relay,
                request,
                url_unescape(name, encoding=None, plus=False).decode() if prefix == "/channel" else None,
                peer,
            )
            grant = visit.grant()
            visit.take_seat()
        except (HTTPInputError, HTTPError, NotNow, UnicodeError):
            return False
        connection.recv(len(data))
        task = asyncio.create_task(self._open(visit, grant, connection, request, peer))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)
        return True

    async def _open(
        self, visit: Visit, grant: Grant, connection: socket.socket, request: HTTPServerRequest, peer: str
    ) -> None:
        opened = False
        try:
            with self._relay.opening():
                opened = await visit.open(grant, lambda: connection)
        except (NotNow, asyncio.CancelledError) as exc:
            self._relay.hub.counts.add(REFUSED, exc.reason if isinstance(exc, NotNow) else "draining")
            try:
                connection.send(self._relay.come_back(request.headers.get("Origin")), socket.MSG_DONTWAIT)
            except OSError:
                pass  # the client did not wait
            if self._relay.access_log:
                self._relay.access_log.answered(request, peer, 200)
        finally:
            if not opened:
                visit.leave()
                connection.close()
