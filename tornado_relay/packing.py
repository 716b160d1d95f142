"""How a stream's bytes are put on the wire: in HTTP's chunks, and compressed if the client takes that. No I/O.

Chunks (RFC 9112, section 7.1) are for HTTP/1.1. Without them some clients, python-requests among them, hand on nothing
before a buffer of theirs is full.

A gzip member is a header and deflate's blocks (RFC 1952, RFC 1951). Each piece here is blocks that refer to nothing
before them and end at a byte, so it may follow any other, and one gzip serves all streams. The member has no end, as
its stream has none.
"""

from __future__ import annotations

import struct
import zlib

GZIP_HEADER = b"\x1f\x8b\x08\0\0\0\0\0\0\xff"

LEVEL = 6
# Smaller ones gain nothing, but for the time.
MIN_BYTES = 128
# Larger ones are histories, each for one stream: a fifth of the time, for a third more bytes.
LARGE_BYTES = 16_384
LARGE_LEVEL = 1
# Pieces that are remembered, and their bytes: several channels' may be on their way to many streams. The newest one is
# whatever its size.
REMEMBERED = 16
REMEMBERED_BYTES = 4 << 20

END = b"0\r\n\r\n"
"""The last chunk of all."""

_MAX_STORED = 0xFFFF
# An empty block, as zlib's flush writes it: before one, Go's reader, and so Caddy, hands nothing on.
_FLUSH = b"\0\0\0\xff\xff"


class Packer:
    """Packs the pieces of one worker for one kind of client, each once, however many streams it goes to."""

    def __init__(self, *, gzip: bool) -> None:
        self.headers = {"Transfer-Encoding": "chunked"}
        if gzip:
            self.headers["Content-Encoding"] = "gzip"
        self._gzip = gzip
        # By identity, which holds as long as the piece is kept.
        self._packed: dict[int, tuple[bytes, bytes]] = {}
        self._size = 0

    def begin(self, data: bytes) -> bytes:
        """Return a stream's first piece."""
        return chunk(GZIP_HEADER + deflate(data)) if self._gzip else chunk(data)

    def pack(self, data: bytes) -> bytes:
        """Return any other piece; there must be something in it, as an empty chunk ends a stream."""
        known = self._packed.get(id(data))
        if known is not None:
            return known[1]
        packed = chunk(deflate(data) if self._gzip else data)
        size = len(data) + len(packed)
        while len(self._packed) >= REMEMBERED or (self._packed and self._size + size > REMEMBERED_BYTES):
            self._size -= sum(map(len, self._packed.pop(next(iter(self._packed)))))
        self._packed[id(data)] = data, packed
        self._size += size
        return packed


def chunk(data: bytes) -> bytes:
    """Return ``data`` as one chunk."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def deflate(data: bytes) -> bytes:
    """Return ``data`` as blocks that end at a byte, deflated or, where that would be longer, stored."""
    stored = len(data) + 5 * -(-len(data) // _MAX_STORED) + len(_FLUSH)
    if len(data) >= MIN_BYTES:
        level = LEVEL if len(data) < LARGE_BYTES else LARGE_LEVEL
        compressor = zlib.compressobj(level, zlib.DEFLATED, -zlib.MAX_WBITS)
        packed = compressor.compress(data) + compressor.flush(zlib.Z_FULL_FLUSH)
        if len(packed) < stored:
            return packed
    parts = [data[at : at + _MAX_STORED] for at in range(0, len(data), _MAX_STORED)]
    return b"".join([*(b"\0" + struct.pack("<HH", len(part), len(part) ^ 0xFFFF) + part for part in parts), _FLUSH])


def accepts_gzip(accept_encoding: str) -> bool:
    """Whether a client with this ``Accept-Encoding`` header takes gzip (RFC 9110, section 12.5.3)."""
    for text in accept_encoding.lower().split(","):
        coding, _, weight = text.replace(" ", "").partition(";q=")
        if coding in ("gzip", "x-gzip"):
            return weight.strip("0.") != "" or not weight
    return False
