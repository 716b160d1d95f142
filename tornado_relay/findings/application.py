"""What the application says that is asked who may listen."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator

from ..settings import Settings
from .finding import OK, Finding


def of_application(settings: Settings) -> Iterator[Finding]:
    """
    Ask it for a client that sends nothing.

    Raises:
        RelayError: If it does not answer as it should.

    """
    from ..authority import REFUSALS, Authority, Question  # noqa: PLC0415  (Tornado)

    channel = f"sse_relay_check_{secrets.token_hex(8)}"

    async def ask() -> int:
        return await Authority(settings.auth_url).ask(Question((channel,), "", "", ""))

    status = asyncio.run(ask())
    done = "refuses" if status in REFUSALS else "lets in"
    yield Finding(
        OK, "application", f"RELAY_AUTH_URL {done} a client without cookies that asks for {channel} ({status})"
    )
