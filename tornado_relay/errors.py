"""Every error that this package raises on purpose.

RelayError
├── SettingsError        a setting, flag or `.env` line is wrong
├── ChannelError         a channel name that cannot be used
├── EventError           an event that cannot be sent as Server-Sent Events
│   └── PayloadTooLarge  an event over the broker's limit
├── TokenError           a token that lets nobody in
├── AuthorityUnavailable  the application does not say who may listen
├── NoRoom               a stream wants channels that there is no room for
└── BrokerError          PostgreSQL or Redis
    ├── BrokerUnavailable  cannot be reached now; trying again can help
    └── BrokerRefused      reached, but it will not have us: password, database, permission
"""

from __future__ import annotations


class RelayError(Exception):
    """Base of all errors of this package; its text is meant for users."""


class SettingsError(RelayError, ValueError):
    """A setting has a value that cannot be used; the text names it and says what would be right."""


class ChannelError(RelayError, ValueError):
    """A channel name is empty, too long, or holds characters that it may not."""


class EventError(RelayError, ValueError):
    """
    An event has a field that Server-Sent Events cannot carry; the text names the field.

    Args:
        text: What is wrong, and what would be right.
        field: The field's name, where it is one field.

    """

    def __init__(self, text: str, field: str | None = None) -> None:
        super().__init__(text)
        self.field = field


class PayloadTooLarge(EventError):
    """An event is larger than the broker takes; the text gives the limit and the size in bytes."""


class TokenError(RelayError):
    """A token is not one, is of another key, or has run out; the text says which, and nothing of the token."""


class AuthorityUnavailable(RelayError):
    """The application that knows who may listen did not answer, or neither yes nor no."""


class NoRoom(RelayError):
    """
    A stream wants channels that there is no room for at the moment.

    Args:
        reason: As `counts.REFUSED` has it.
        text: For people.

    """

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


class BrokerError(RelayError):
    """PostgreSQL or Redis did not do what was asked."""


class BrokerUnavailable(BrokerError):
    """The broker cannot be reached at the moment."""


class BrokerRefused(BrokerError):
    """The broker answered and refused: a wrong password, an unknown database, a missing permission."""
