"""What all requests share, health, and the inspector page of debug mode."""

from __future__ import annotations

import json
import logging
import socket
from pathlib import Path
from typing import Any

from tornado.iostream import StreamClosedError
from tornado.web import HTTPError, RequestHandler

from . import __version__, access
from .access import UNIX
from .counts import PUBLISHES, REFUSED
from .refusal import Refusal
from .relay import Relay

log = logging.getLogger(__name__)

# Why a page of another origin is refused.
ORIGIN = "origin"

STATIC = Path(__file__).parent / "static"


class RelayHandler(RequestHandler):
    """Base of all handlers: short errors, in JSON for publishers, and no page that is not allowed."""

    def initialize(self, relay: Relay) -> None:
        self.relay = relay
        self.origin = self.request.headers.get("Origin")
        context = self.request.connection.context  # type: ignore[union-attr]
        self.peer = UNIX if context.address_family == socket.AF_UNIX else context.remote_ip
        # The field of an event that is wrong.
        self.field: str | None = None

    def set_default_headers(self) -> None:
        self.set_header("Server", f"sse-relay-server/{__version__}")
        self.set_header("Content-Type", "text/plain; charset=UTF-8")
        self.set_header("Cache-Control", "no-store")

    def prepare(self) -> None:
        if not self.relay.origins.admits(self.origin):
            raise Refusal(403, ORIGIN, "pages of this origin may not connect; see ALLOWED_ORIGINS")
        self._allow_origin()

    def _allow_origin(self) -> None:
        for name, value in self.relay.origins.headers(self.origin).items():
            self.set_header(name, value)

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        self.count(status_code, kwargs.get("exc_info", (None, None))[1])
        told = self.told(status_code, **kwargs)
        if self.request.method == "POST":
            self.set_header("Content-Type", "application/json")
            told = json.dumps({"error": told} | ({"field": self.field} if self.field else {}))
        self.finish(f"{told}\n")

    def count(self, status_code: int, error: BaseException | None) -> None:
        """Count an error as what it is: of a publisher, or of one who wanted a stream."""
        if self.request.method == "POST":
            self.relay.hub.counts.add(PUBLISHES, "failed" if status_code >= 500 else "refused")
        elif isinstance(error, Refusal):
            self.relay.hub.counts.add(REFUSED, error.refused_for)

    def told(self, status_code: int, **kwargs: Any) -> str:
        """Return what an error's answer says, and set the headers that it has."""
        if status_code == 405:
            self.set_header("Allow", access.ALLOWED_METHODS)
        elif status_code == 401:
            self.set_header("WWW-Authenticate", "Bearer")
        elif status_code == 503:
            self.set_header("Retry-After", "1")
        if self.relay.origins.admits(self.origin):  # or else a page could not read it
            self._allow_origin()
        error = kwargs.get("exc_info", (None, None))[1]
        if isinstance(error, Refusal) and error.refused_for == ORIGIN:
            # relay.js tells by it that the refusal is final; it says nothing else about anybody.
            self.set_header("Access-Control-Allow-Origin", "*")
        return error.log_message % error.args if isinstance(error, HTTPError) and error.log_message else self._reason

    def answer_and_close(self, data: bytes) -> None:
        """Send ``data``, status line and headers included, and close the connection."""
        self.log_access(200)
        stream = self.detach()
        try:
            # It has room for that, or else an answer before it was not read: nobody is waited for.
            stream.write(data)
        except StreamClosedError:
            pass  # the client did not wait
        stream.close()

    def log_access(self, status: int) -> None:
        """Write a line of the access log, if there is one."""
        if self.relay.access_log:
            self.relay.access_log.answered(self.request, self.peer, status)

    def log_exception(self, typ: Any, value: Any, tb: Any) -> None:
        if not isinstance(value, HTTPError):
            # Tornado would log the whole address, with the token in it.
            log.error("%s %s failed", self.request.method, self.request.path, exc_info=(typ, value, tb))
        else:
            log.debug("%d %s %s: %s", value.status_code, self.request.method, self.request.path, value.log_message)


class NotFoundHandler(RelayHandler):
    """Whatever has no address of its own."""

    def prepare(self) -> None:
        super().prepare()
        raise HTTPError(404, log_message="nothing here; streams are at /channel=NAME and /events?channel=A&channel=B")


class HealthHandler(RelayHandler):
    """Whether this worker's loop turns."""

    def get(self) -> None:
        self.finish("ok\n")

    head = get


class ReadyHandler(RelayHandler):
    """Whether streams can be opened now."""

    def get(self) -> None:
        if trouble := self.relay.trouble:
            self.set_status(503)
            self.finish(f"{trouble}\n")
        else:
            self.finish("ok\n")

    head = get


class InspectorHandler(RelayHandler):
    """A page to try the relay with, in debug mode only."""

    def get(self) -> None:
        if not self.relay.settings.debug:
            raise HTTPError(404, log_message="nothing here; RELAY_SERVER_DEBUG=true shows a page to try the relay with")
        self.set_header("Content-Type", "text/html; charset=UTF-8")
        page = (STATIC / "inspector.html").read_bytes()
        self.finish(page.replace(b'data-publish="off"', b'data-publish="on"', 1) if self.relay.intake else page)

    head = get
