"""A line for each request, and the id by which a proxy's log and ours have it."""

from __future__ import annotations

import logging
import random
import re

from tornado.httputil import HTTPServerRequest

from .access import Proxies

log = logging.getLogger(__name__)

_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")


def id_of(request: HTTPServerRequest) -> str:
    """Return the id that a proxy gave to ``request`` (``X-Request-ID``), or an empty text."""
    given = request.headers.get("X-Request-ID", "")
    return given if _ID.fullmatch(given) else ""


def new_id() -> str:
    """Return an id for a request that has none; it is for finding lines that belong together, and no secret."""
    return f"{random.getrandbits(64):016x}"


class AccessLog:
    """
    Writes a line for each request, when its answer begins.

    Args:
        proxies: Whose word on the client's address is believed.

    """

    def __init__(self, proxies: Proxies) -> None:
        self._proxies = proxies
        # Asked for by a setting of its own, whatever the level of the others.
        log.setLevel(logging.INFO)

    def answered(self, request: HTTPServerRequest, peer: str, status: int, request_id: str = "") -> None:
        """Write the line. The query is left out: it may have a token."""
        client = self._proxies.client(peer, request.headers.get_list("X-Forwarded-For"))
        fields = {
            "client": client,
            "method": request.method,
            "path": request.path,
            "status": status,
            "milliseconds": round(request.request_time() * 1000, 1),
            "request": request_id or id_of(request),
        }
        log.info(
            '%(client)s "%(method)s %(path)s" %(status)d in %(milliseconds).1f ms, request %(request)s',
            fields,
            extra={"fields": fields},
        )
