"""One gzip for all streams: each piece is deflated once, and a stream may begin with any of them. No I/O.

A gzip member is a header and deflate's blocks (RFC 1952, RFC 1951). Each piece here is blocks that refer to nothing
before them and end at a byte, so it may follow any other. The member has no end, as its stream has none.
"""

from __future__ import annotations

import struct
import zlib

HEADER = b"\x1f\x8b\x08\0\0\0\0\0\0\xff"

LEVEL = 6
# Smaller ones gain nothing, but for the time.
MIN_BYTES = 128
# Pieces that are remembered: several channels' may be on their way to many streams.
REMEMBERED = 16

_MAX_STORED = 0xFFFF


class Packer:
    """Deflates the pieces of one worker, each once, however many streams it goes to."""

    def __init__(self) -> None:
        # By identity, which holds as long as the piece is kept.
        self._packed: dict[int, tuple[bytes, bytes]] = {}

    def pack(self, data: bytes) -> bytes:
        """Return the blocks of ``data``."""
        known = self._packed.get(id(data))
        if known is not None:
            return known[1]
        packed = deflate(data)
        if len(self._packed) >= REMEMBERED:
            del self._packed[next(iter(self._packed))]
        self._packed[id(data)] = data, packed
        return packed


def deflate(data: bytes) -> bytes:
    """Return ``data`` as blocks that end at a byte, deflated or, where that would be longer, stored."""
    stored = len(data) + 5 * -(-len(data) // _MAX_STORED)
    if len(data) >= MIN_BYTES:
        compressor = zlib.compressobj(LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS)
        packed = compressor.compress(data) + compressor.flush(zlib.Z_FULL_FLUSH)
        if len(packed) < stored:
            return packed
    parts = [data[at : at + _MAX_STORED] for at in range(0, len(data), _MAX_STORED)]
    return b"".join(b"\0" + struct.pack("<HH", len(part), len(part) ^ 0xFFFF) + part for part in parts)


def accepts_gzip(accept_encoding: str) -> bool:
    """Whether a client with this ``Accept-Encoding`` header takes gzip (RFC 9110, section 12.5.3)."""
    for text in accept_encoding.lower().split(","):
        coding, _, weight = text.replace(" ", "").partition(";q=")
        if coding in ("gzip", "x-gzip"):
            return weight.strip("0.") != "" or not weight
    return False
