"""Where a stream is, as a page, a command or a test asks for it."""

from __future__ import annotations

from collections.abc import Iterable
from urllib.parse import quote, urlencode

from . import channels, settings
from .errors import SettingsError
from .tokens import subscribe_token


def stream_url(names: Iterable[str], *, base: str = "", ttl: float = 3600, last_event_id: str = "") -> str:
    """
    Return the address of a stream on the channels ``names``, with a token for exactly them if the relay wants tokens.

    Args:
        names: The channels.
        base: Where the relay is; by default what ``RELAY_URL`` says.
        ttl: Seconds until the token ends, and the stream with it.
        last_event_id: The event after which the stream is to begin; empty for now.

    Raises:
        ChannelError: If a name cannot be a channel's.
        SettingsError: If ``RELAY_URL`` is not set, neither in ``SSE_RELAY`` nor in the environment.

    """
    wanted = [channels.check(name) for name in names]
    base = base.rstrip("/") or relay_url()
    query = [("channel", name) for name in wanted]
    if settings.of_application("RELAY_JWT_SECRET"):
        query.append(("token", subscribe_token(wanted, ttl)))
    if last_event_id:
        query.append(("last_event_id", last_event_id))
    return f"{base}/events?{urlencode(query, quote_via=quote)}"


def relay_url() -> str:
    """
    Return the address at which browsers reach the relay, without a slash at its end.

    Raises:
        SettingsError: If ``RELAY_URL`` is not set, neither in ``SSE_RELAY`` nor in the environment.

    """
    base = settings.of_application("RELAY_URL").rstrip("/")
    if not base:
        raise SettingsError(
            "RELAY_URL is not set; give the address at which browsers reach the relay, such as "
            "SSE_RELAY = {'RELAY_URL': 'https://events.example.com'}"
        )
    return base
