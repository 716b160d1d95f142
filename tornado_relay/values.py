"""The kinds of values that settings have: from text, or a ValueError that says what would be right. Only `pem` reads a file."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

PEM = "-----BEGIN "
"""What a key in PEM begins with (RFC 7468)."""

BOOLEANS = {"1": True, "true": True, "yes": True, "on": True, "t": True, "y": True}
BOOLEANS |= {"0": False, "false": False, "no": False, "off": False, "f": False, "n": False}

_DEFAULT_PORTS = {"http": 80, "https": 443}


def text(value: str) -> str:
    """Return any text."""
    return value


def host(value: str) -> str:
    """Return a host; an IPv6 address may have the brackets that it has in a URL."""
    return value[1:-1] if value.startswith("[") and value.endswith("]") else value


def boolean(value: str) -> bool:
    """Return a boolean."""
    if value.lower() not in BOOLEANS:
        raise ValueError("is not a boolean; use true or false (1/0, yes/no, on/off)")
    return BOOLEANS[value.lower()]


def number(low: int, high: int, unit: str) -> Callable[[str], int]:
    """Return a parser of whole numbers from ``low`` to ``high``; ``unit`` is what they are."""

    def parse(value: str) -> int:
        if not re.fullmatch("[0-9]{1,12}", value) or not low <= int(value) <= high:
            raise ValueError(f"is not {unit}; give a whole number from {low} to {high}")
        return int(value)

    return parse


def seconds(low: float, high: float) -> Callable[[str], float]:
    """Return a parser of seconds from ``low`` to ``high``."""

    def parse(value: str) -> float:
        if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,6})?", value) or not low <= float(value) <= high:
            raise ValueError(f"is not a number of seconds from {low:g} to {high:g}")
        return float(value)

    return parse


def port(value: str) -> int:
    """Return a TCP port."""
    try:
        return number(0, 65535, "a port")(value)
    except ValueError:
        hint = " (docker publishes a port with: docker run -p 8001:8001)" if ":" in value else ""
        raise ValueError(f"is not a port; give one number from 1 to 65535, such as 8001{hint}") from None


def choice(*choices: str) -> Callable[[str], str]:
    """Return a parser of one of ``choices``, in any case of letters."""

    def parse(value: str) -> str:
        for choice in choices:
            if value.lower() == choice.lower():
                return choice
        raise ValueError(f"is not one of {', '.join(choices)}")

    return parse


def origins(value: str) -> tuple[str, ...]:
    """Return comma-separated origins."""
    return _each(value, _origin)


def _origin(text: str) -> str:
    """Return an origin as browsers send it (RFC 6454, section 6.2): lower case, without a default port."""
    if text == "*":
        return text
    try:
        parts = urlsplit(text)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        host, port, parts = "", None, urlsplit("")
    rest = (parts.path.strip("/"), parts.query, parts.fragment, parts.username)
    if parts.scheme not in _DEFAULT_PORTS or not host or "*" in host or any(rest):
        raise ValueError(
            f"holds {text!r}, which is not an origin; give scheme, host and port of the pages, "
            "comma-separated, such as https://shop.example,http://localhost:8000"
        )
    host = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{host}" + (f":{port}" if port not in (None, _DEFAULT_PORTS[parts.scheme]) else "")


def http_url(value: str) -> str:
    """Return the URL of a page."""
    try:
        parts = urlsplit(value)
        host, _ = parts.hostname, parts.port
        (host or "").encode("idna")
    except ValueError:
        host, parts = None, urlsplit("")
    # A fragment is never sent, and a user would take the place of the browser's own Authorization.
    if (
        parts.scheme not in _DEFAULT_PORTS
        or not host
        or parts.fragment
        or "@" in parts.netloc
        or parts.netloc.endswith(":")
    ):
        raise ValueError("is not the URL of a page; give such as http://127.0.0.1:8000/may-listen/")
    if not re.fullmatch("[!-~]+", value):
        raise ValueError("has characters that a URL has only percent-encoded")
    return value


def pem(value: str) -> str:
    r"""Return the PEM text that this is, with its line ends perhaps written as ``\n``, or that is in this file."""
    if PEM not in value:
        try:
            value = Path(value).expanduser().read_text()
        except (OSError, UnicodeDecodeError) as exc:
            why = getattr(exc, "strerror", None) or "it is no text"
            raise ValueError(f"is neither a PEM text nor a file that can be read: {why}") from exc
        if PEM not in value:
            raise ValueError("is a file without a PEM text (-----BEGIN PUBLIC KEY-----)")
    return value.replace("\\n", "\n").strip()


def token(value: str) -> str:
    """Return a bearer token."""
    if not re.fullmatch("[!-~]{1,4096}", value):
        raise ValueError("is no bearer token; give printable ASCII characters without blanks")
    return value


def proxies(value: str) -> tuple[Any, ...]:
    """Return comma-separated addresses and networks, and the word ``unix``."""
    return _each(value, _proxy)


def _proxy(text: str) -> Any:
    if text == "unix":
        return text
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise ValueError(
            f"holds {text!r}, which is no address or network; give such as 127.0.0.1,10.0.0.0/8, or unix for the Unix socket"
        ) from None


def _each(value: str, parse: Callable[[str], Any]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(parse(text.strip()) for text in value.split(",") if text.strip()))
