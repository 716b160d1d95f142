"""Which address has which handler."""

from __future__ import annotations

from typing import Any

from tornado.httputil import HTTPServerRequest
from tornado.web import Application, RequestHandler, stream_request_body

from .handlers import HealthHandler, InspectorHandler, NotFoundHandler, ReadyHandler, Relay, RelayHandler
from .streams import StreamHandler

MAX_BODY = 1_048_576
"""Bytes of a request's body."""


@stream_request_body
class TooLargeHandler(RelayHandler):
    """A request with a body that is not worth reading; Tornado itself would answer without a word."""

    async def prepare(self) -> None:  # type: ignore[override]
        text = b'{"error": "the body has more than %d bytes"}\n' % MAX_BODY
        head = b"HTTP/1.1 413 Request Entity Too Large\r\nContent-Type: application/json\r\nConnection: close\r\n"
        await self.answer_and_close(head + b"Content-Length: %d\r\n\r\n" % len(text) + text)

    def data_received(self, chunk: bytes) -> None:
        """Nothing is read."""


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
                (r"/relay\.js", NotFoundHandler, self._shared),
                (r"/events", StreamHandler, self._shared),
                (r"/channel=(.*)", StreamHandler, self._shared),
                (r"/([^/]+)", StreamHandler, self._shared),
            ],
            default_handler_class=NotFoundHandler,
            default_handler_args=self._shared,
            log_function=_log_nothing,
        )

    def find_handler(self, request: HTTPServerRequest, **kwargs: Any) -> Any:
        """See `tornado.web.Application`; called before the body is read."""
        length = request.headers.get("Content-Length", "")
        if length.isdecimal() and int(length[:20]) > MAX_BODY:
            return self.get_handler_delegate(request, TooLargeHandler, self._shared)
        return super().find_handler(request, **kwargs)


def _log_nothing(handler: HTTPServerRequest | RequestHandler) -> None:
    """Streams are logged where they open and end; nothing else is worth a line."""
