"""The predecessor's import path: ``from sse_relay_server import notify`` keeps working."""

from tornado_relay import notify

__all__ = ["notify"]
