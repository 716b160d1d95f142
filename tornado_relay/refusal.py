"""Why a client does not get the stream that it asks for, with the reason that `counts.REFUSED` has for it."""

from __future__ import annotations

from tornado.web import HTTPError


class NotNow(Exception):
    """
    A stream cannot be opened at the moment.

    Args:
        reason: For the metrics.
        text: For people.

    """

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


class Refusal(HTTPError):
    """
    The request is refused for good.

    Args:
        status: The status of the answer.
        reason: For the metrics.
        text: What the answer says; `HTTPError` puts ``args`` into it.

    """

    def __init__(self, status: int, reason: str, text: str, *args: object) -> None:
        super().__init__(status, text, *args)
        self.refused_for = reason
