"""The admin listener's addresses: how the relay is, as JSON and as a page. They are on no other port."""

from __future__ import annotations

from typing import Any

from tornado.web import Application, HTTPError

from .application import log_nothing
from .handlers import STATIC, HealthHandler, RelayHandler
from .peers import Peers
from .relay import Relay


class AdminHandler(RelayHandler):
    """Base of these handlers: pages from elsewhere can read none of it, whatever `ALLOWED_ORIGINS` has."""

    def initialize(self, relay: Relay, peers: Peers) -> None:  # type: ignore[override]
        super().initialize(relay)
        self.peers = peers

    def prepare(self) -> None:
        """Let in whoever reaches the port."""

    def _allow_origin(self) -> None:
        """Allow none."""

    def count(self, *_: Any) -> None:
        """Nobody publishes here, or asks for a stream."""


class NothingHandler(AdminHandler):
    """Whatever has no address of its own: streams among them."""

    def prepare(self) -> None:
        raise HTTPError(
            404, log_message="nothing here; this is the admin listener, with /, /metrics, /status and /healthz"
        )


class AdminHealthHandler(AdminHandler, HealthHandler):
    """Whether the loop of this worker turns."""


class StatusHandler(AdminHandler):
    """Workers, broker and channels."""

    async def get(self) -> None:
        with self.relay.publishing():
            state = await self.peers.status()
        self.finish(state)

    head = get


class MetricsHandler(AdminHandler):
    """The same for Prometheus; with ``?channels=1`` the largest channels by name too."""

    async def get(self) -> None:
        try:
            # Only who is asked for it needs the memory.
            from .metrics import Exposition  # noqa: PLC0415
        except ModuleNotFoundError as exc:
            raise HTTPError(501, "%s is not installed; install sse-relay-server[metrics]", exc.name) from exc
        channels = None
        if self.get_query_argument("channels", "") == "1":
            with self.relay.publishing():
                state = await self.peers.status()
            channels = [(each["channel"], each["streams"]) for each in state["channels"]["largest"]]
        rows = self.relay.hub.counts.ledger.rows()
        exposition = Exposition(rows, self.peers.workers, self.relay.settings, channels)
        text, content_type = exposition.text(self.request.headers.get("Accept", ""))
        self.set_header("Content-Type", content_type)
        self.finish(text)

    head = get


class AdminPageHandler(AdminHandler):
    """A page that shows what `StatusHandler` tells."""

    def get(self) -> None:
        self.set_header("Content-Type", "text/html; charset=UTF-8")
        self.finish((STATIC / "admin.html").read_bytes())

    head = get


class AdminApplication(Application):
    """
    The Tornado application of the admin listener.

    Args:
        relay: What this worker has.
        peers: The other workers.

    """

    def __init__(self, relay: Relay, peers: Peers) -> None:
        shared: dict[str, Any] = {"relay": relay, "peers": peers}
        super().__init__(
            [
                (r"/", AdminPageHandler, shared),
                (r"/metrics", MetricsHandler, shared),
                (r"/status", StatusHandler, shared),
                (r"/healthz", AdminHealthHandler, shared),
            ],
            default_handler_class=NothingHandler,
            default_handler_args=shared,
            log_function=log_nothing,
        )
