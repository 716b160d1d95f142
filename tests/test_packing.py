"""One gzip for all streams."""

import gzip
import json
import subprocess
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pages import data_of
from programs import program
from relay import Relay
from servers import PATIENCE, until

from tornado_relay import packing
from tornado_relay.packing import Packer, accepts_gzip, chunk, deflate

GZIP = {"Accept-Encoding": "gzip, deflate, br"}


def inflate(*pieces):
    return zlib.decompressobj(16 + zlib.MAX_WBITS).decompress(packing.GZIP_HEADER + b"".join(pieces))


@given(st.lists(st.binary(max_size=500) | st.binary(max_size=9).map(lambda data: data * 9000)))
def test_stream_may_begin_at_any_piece(pieces):
    """Each is whole by itself: what has come is readable at once, whatever came before it."""
    packed = [deflate(piece) for piece in pieces]
    # As zlib's flush ends what it has deflated: some readers, Go's among them, hand nothing on before that.
    assert all(piece.endswith(b"\0\0\xff\xff") for piece in packed)
    for first in range(len(pieces)):
        stream = zlib.decompressobj(16 + zlib.MAX_WBITS)
        stream.decompress(packing.GZIP_HEADER)
        assert [stream.decompress(piece) for piece in packed[first:]] == pieces[first:]


def test_what_would_grow_is_stored():
    """Small or random data cost five bytes for each 65,535, and five for the end."""
    for data in (b":\n", b"data: 1\n\n", bytes(range(256)) * 1, gzip.compress(b"x" * 10**6) * 99):
        assert len(deflate(data)) <= len(data) + 5 * (len(data) // 65_535 + 2)
    assert inflate(deflate(b"")) == b""


def test_json_of_a_kilobyte_takes_two_fifths():
    """An order as a shop would send it."""
    lines = [
        {"article": f"A-{n * 7919 % 1000}", "name": f"Chair {n}", "price": f"{n * 13 % 100}.50", "pieces": n % 4}
        for n in range(14)
    ]
    data = (
        b"event: NEW_ORDER\ndata: " + json.dumps({"order": 81723, "customer": "Ann", "lines": lines}).encode() + b"\n\n"
    )
    assert 900 < len(data) < 1200
    assert len(deflate(data)) < 0.4 * len(data)


def test_piece_is_deflated_once_for_all_streams(monkeypatch):
    """Also while others are on their way."""
    calls = []
    monkeypatch.setattr(packing, "deflate", lambda data: calls.append(data) or deflate(data))
    packer, pieces = Packer(gzip=True), [b"a" * 200, b"b" * 200]
    for _ in range(20):
        packer.pack(bytes(bytearray(1 << 20)))
    calls.clear()
    for _ in range(100):
        assert [packer.pack(piece) for piece in pieces] == [chunk(deflate(piece)) for piece in pieces]
    assert calls == pieces


@pytest.mark.parametrize("others", [[b"%d" % number for number in range(100)], [bytes(1 << 20)] * 5])
def test_pieces_are_not_kept_for_ever(monkeypatch, others):
    """Neither many small ones nor a few large ones."""
    calls = []
    monkeypatch.setattr(packing, "chunk", lambda data: calls.append(data) or chunk(data))
    packer, piece = Packer(gzip=False), b"a" * 200
    for each in (piece, *(bytes(bytearray(other)) for other in others), piece):
        packer.pack(each)
    assert calls == [piece, *others, piece]


def test_large_piece_is_packed_once_as_well(monkeypatch):
    """However large: it may go to thousands."""
    calls = []
    monkeypatch.setattr(packing, "chunk", lambda data: calls.append(data) or chunk(data))
    packer, piece = Packer(gzip=False), bytes(packing.REMEMBERED_BYTES)
    assert packer.pack(piece) is packer.pack(piece)
    assert len(calls) == 1


def test_chunk_is_http_s():
    """RFC 9112, section 7.1: the size in hexadecimal digits, and the data."""
    assert chunk(b"x" * 26) == b"1a\r\n" + b"x" * 26 + b"\r\n"


@pytest.mark.parametrize(
    ("header", "taken"),
    [
        ("gzip", True),
        ("gzip, deflate, br, zstd", True),
        ("br;q=1.0, GZIP;q=0.8, *;q=0.1", True),
        ("x-gzip", True),
        ("", False),
        ("identity", False),
        ("br, gzip;q=0", False),
        ("gzip; q=0.000", False),
        ("*", False),
        ("notgzip", False),
    ],
)
def test_who_takes_gzip(header, taken):
    """By its own word, and weight."""
    assert accepts_gzip(header) is taken


def test_compressed_and_plain_streams_get_the_same(kept, tmp_path, pages, channel):
    """Live, on several channels, after a return, and as large as may be; heartbeats and resets too."""
    with Relay(tmp_path, "--workers", "1", "--heartbeat", "1", **kept.environment) as relay:
        paths = [f"/channel={channel}", f"/events?channel={channel}&channel={channel}-2"]
        plain, packed = pages.open(relay.port, paths), pages.open(relay.port, paths, GZIP)
        sent = ["small", "x" * 1000, json.dumps(list(range(3000))), "\U0001f984" * 100_000, "last"]
        kept.publish(channel, *sent)
        pages.until(lambda: all(page.data[-1:] == ["last"] for page in [*plain, *packed]), "all events")
        assert all(page.data == sent for page in [*plain, *packed])
        assert all(page.headers["content-encoding"] == "gzip" for page in packed)
        assert all("content-encoding" not in page.headers for page in plain)
        assert all(page.headers["vary"] == "Accept-Encoding" for page in [*plain, *packed])
        assert all(page.packed < 0.1 * len(page.body) for page in packed)
        beats = packed[0].body.count(b"\n:")
        pages.until(lambda: packed[0].body.count(b"\n:") > beats + 1, "heartbeats")
        (back,) = pages.open(relay.port, paths[:1], {**GZIP, "Last-Event-ID": packed[0].events[1].id})
        pages.until(lambda: data_of(back)[-1:] == ["last"], "what it missed")
        assert data_of(back) == sent[2:]
        (lost,) = pages.open(relay.port, paths[:1], {**GZIP, "Last-Event-ID": "unknown"})
        pages.until(lambda: lost.events, "the reset")
        assert lost.events[0].event == "stream-reset"


def test_compression_can_be_turned_off(redis_server, tmp_path, pages):
    """Then nobody has it, and no cache needs to know of it."""
    with Relay(tmp_path, "--workers", "1", "--compression", "off", **redis_server.environment) as relay:
        (page,) = pages.open(relay.port, ["/channel=x"], GZIP)
        assert not {"content-encoding", "vary"} & page.headers.keys()


@pytest.fixture
def packed_relay(redis_server, tmp_path):
    with Relay(tmp_path, "--workers", "1", **redis_server.environment) as relay:
        yield relay


def next_data(client):
    line = b""
    while not line.startswith(b"data: "):
        line = client.stdout.readline()
        assert line, "the event did not come"
    return line


def events_of_curl(redis_server, relay, channel, *command):
    """Each event is there before the next one is sent."""
    client = subprocess.Popen(
        [program("curl"), "-sN", "--compressed", "-m", str(PATIENCE), *command], stdout=subprocess.PIPE
    )
    try:
        until(lambda: f"on {channel}" in relay.log, "the stream is open")
        assert b"resumed" in next_data(client)
        for number in range(5):
            data = f"{number}" + "abc" * 400
            redis_server.publish(channel, json.dumps({"data": data}))
            assert next_data(client).decode() == f"data: {data}\n"
    finally:
        client.kill()
        client.communicate()


def test_curl_reads_it_live(redis_server, packed_relay, channel):
    """As it comes."""
    events_of_curl(redis_server, packed_relay, channel, f"{packed_relay.url}/channel={channel}")
