"""
A real-time relay: events from PostgreSQL or Redis to browsers, as Server-Sent Events.

``notify()`` is what an application needs, ``current_event_id()`` where a page is to miss nothing, and
``subscribe_token()`` where not everybody may listen. Importing this package starts nothing, reads no environment and
loads no Tornado.
"""

from .errors import (
    BrokerError,
    BrokerRefused,
    BrokerUnavailable,
    ChannelError,
    EventError,
    PayloadTooLarge,
    RelayError,
    SettingsError,
    TokenError,
)
from .publish import current_event_id, notify
from .tokens import subscribe_token

__version__ = "2.0.0.dev0"

__all__ = [
    "BrokerError",
    "BrokerRefused",
    "BrokerUnavailable",
    "ChannelError",
    "EventError",
    "PayloadTooLarge",
    "RelayError",
    "SettingsError",
    "TokenError",
    "__version__",
    "current_event_id",
    "notify",
    "subscribe_token",
]
