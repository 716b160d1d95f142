"""``{% load sse_relay %}``: the stream of the page that is rendered."""

from __future__ import annotations

import logging

from django import template
from django.utils.html import escape, format_html, format_html_join

from ... import address
from ...errors import BrokerError
from ...publish import current_event_id

log = logging.getLogger(__name__)

register = template.Library()


@register.simple_tag
def sse_url(*channels: str, since: str | None = None, ttl: float = 3600) -> str:
    """
    Return the address of a stream on ``channels``, such as for ``sse-connect`` of htmx.

    It has a token for exactly these channels where ``RELAY_JWT_SECRET`` is set, and begins at the moment of rendering:
    what is sent between that and the page's connect is not lost, where the broker keeps a history.

    Args:
        channels: Names of channels.
        since: What `current_event_id` returned before the page's data was read; by default it is asked for now.
        ttl: Seconds until the token ends.

    Raises:
        ChannelError: If a name cannot be a channel's.
        SettingsError: If ``RELAY_URL`` is not set.

    """
    return address.stream_url(channels, ttl=ttl, last_event_id=_newest() if since is None else since)


@register.simple_tag(takes_context=True)
def sse_stream(
    context: template.Context,
    *channels: str,
    name: str = "relay",
    refresh: str = "",
    credentials: bool = False,
    since: str | None = None,
    ttl: float = 3600,
) -> str:
    """
    Render the script tag that opens a stream on ``channels`` as the global `RelaySource` ``name``.

    With no channels it loads relay.js only. A nonce of Django's CSP (or django-csp's) is taken over.

    Args:
        context: The template's.
        channels: Names of channels.
        name: Of the page's global variable.
        refresh: Address of a view that answers with a new token, as text, when the old one has ended.
        credentials: Whether cookies go to a relay of another origin.
        since: As for `sse_url`.
        ttl: As for `sse_url`.

    Raises:
        ChannelError: If a name cannot be a channel's.
        SettingsError: If ``RELAY_URL`` is not set.

    """
    attributes = {
        "nonce": context.get("csp_nonce") or getattr(context.get("request"), "csp_nonce", ""),
        "data-stream": sse_url(*channels, since=since, ttl=ttl) if channels else "",
        "data-name": name if channels else "",
        "data-refresh": refresh,
        "data-credentials": "include" if credentials else "",
    }
    # Texts that are written in a template count as safe, and would go in as they are.
    given = [(key, escape(value)) for key, value in attributes.items() if value]
    rendered: str = format_html(
        '<script src="{}/relay.js"{}></script>',
        escape(address.relay_url()),
        format_html_join("", ' {}="{}"', given),
    )
    return rendered


def _newest() -> str:
    try:
        return current_event_id()
    except BrokerError as exc:
        # The page is worth more than its stream, which begins when it connects then.
        log.warning("a page is rendered without the id of the newest event: %s", exc)
        return ""
