"""
A real-time relay: events from PostgreSQL or Redis to browsers, as Server-Sent Events.

``notify()`` is all that an application needs. Importing this package starts nothing, reads no environment
and loads no Tornado.
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
)
from .publish import notify

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
    "__version__",
    "notify",
]
