"""Which address has which handler."""

from __future__ import annotations

import re
from typing import Any

from tornado.httputil import HTTPServerRequest
from tornado.web import Application, HTTPError, RequestHandler, stream_request_body

from . import access, client
from .client import ClientHandler
from .handlers import HealthHandler, InspectorHandler, NotFoundHandler, ReadyHandler, RelayHandler
from .relay import Relay
from .streams import StreamHandler, publisher_refusal

MAX_BODY = 1_048_576
"""Bytes of a request's body."""

MAX_SKIPPED = 8 * MAX_BODY


@stream_request_body
class UnreadHandler(RelayHandler):
    """
    A request whose body is not to be kept.

    It is refused once the body has gone by, since a client that still sends when the connection is closed may not see
    the answer (RFC 9112, section 9.6); or at once, if that would take long.
    """

    def initialize(self, relay: Relay, refusal: HTTPError) -> None:  # type: ignore[override]
        super().initialize(relay)
        self.refusal = refusal

    def prepare(self) -> None:
        length = _length(self.request) or 0
        self.request.connection.set_max_body_size(max(length, MAX_SKIPPED))  # type: ignore[union-attr]
        if length > MAX_SKIPPED:
            raise self.refusal

    def data_received(self, chunk: bytes) -> None:
        """Keep nothing."""

    def post(self, *_: str) -> None:
        raise self.refusal

    get = head = put = patch = delete = options = post


class RelayApplication(Application):
    """
    The Tornado application of one worker.

    Args:
        relay: What its handlers share.

    """

    def __init__(self, relay: Relay) -> None:
        self._shared = {"relay": relay}
        super().__init__(
            [
                (r"/", InspectorHandler, self._shared),
                (r"/healthz", HealthHandler, self._shared),
                (r"/readyz", ReadyHandler, self._shared),
                *((re.escape(f"/{name}"), ClientHandler, self._shared | {"name": name}) for name in client.FILES),
                (r"/events", StreamHandler, self._shared),
                (r"/channel=(.*)", StreamHandler, self._shared),
                (r"/([^/]+)", StreamHandler, self._shared),
            ],
            default_handler_class=NotFoundHandler,
            default_handler_args=self._shared,
            log_function=_log if relay.access_log else log_nothing,
        )

    def find_handler(self, request: HTTPServerRequest, **kwargs: Any) -> Any:
        """See `tornado.web.Application`; called before the body is read."""
        if refusal := self._refusal(request):
            return self.get_handler_delegate(request, UnreadHandler, self._shared | {"refusal": refusal})
        return super().find_handler(request, **kwargs)

    def _refusal(self, request: HTTPServerRequest) -> HTTPError | None:
        """Return why the body that comes with ``request`` is not to be kept in memory, if there is one."""
        length = _length(request)
        if length is None:
            return HTTPError(400, log_message="Content-Length is not one plain number")
        if not length and "Transfer-Encoding" not in request.headers:
            return None
        if request.method != "POST":
            status = 400 if request.method in access.ALLOWED_METHODS.split(", ") else 405
            return HTTPError(status, "a %s has no body here; an event is published by POST", request.method)
        if refusal := publisher_refusal(self._shared["relay"], request):
            return refusal
        return HTTPError(413, "the body has more than %d bytes", MAX_BODY) if length > MAX_BODY else None


def _length(request: HTTPServerRequest) -> int | None:
    """Return the body's length; None where it is in a form that Tornado may take for a number and we do not."""
    length = request.headers.get("Content-Length", "0")
    return int(length) if re.fullmatch("0|[1-9][0-9]{0,18}", length, re.ASCII) else None


def _log(handler: HTTPServerRequest | RequestHandler) -> None:
    if isinstance(handler, RelayHandler):
        handler.log_access(handler.get_status())


def log_nothing(handler: HTTPServerRequest | RequestHandler) -> None:
    """Streams are logged where they open and end; nothing else is worth a line."""
