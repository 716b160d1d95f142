"""Requests and payloads that nobody in their senses would send, from a seed."""

import json
import random
import selectors
import socket
import struct
import time
from collections import Counter
from urllib.parse import quote

import jwt
from servers import PATIENCE

TOKEN, SECRET = "p" * 40, "s" * 40
GRANTED = jwt.encode({"channels": ["*"], "exp": time.time() + 10**6}, SECRET).encode()
WORDS = [
    "orders",
    "Orders",
    "user-7",
    "*",
    "a b",
    "ä",
    "🦄",
    "x" * 200,
    "x" * 201,
    "",
    "..",
    "%",
    "a/b",
    "a&b=c",
    "\n",
    "\0",
]
WORDS += [
    "'; DROP TABLE x; --",
    '"; SELECT 1; --',
    "$1",
    "%s",
    "\r\nPUBLISH a b\r\n",
    "\x7f",
    "\u202e",
    "sse_relay_long_names",
]
BYTES = [
    b"",
    b"\0",
    b"\xff\xfe",
    b"\r\n",
    b"\n",
    b"\r",
    b" ",
    b"\t",
    b"%",
    b"%zz",
    b"%00",
    b"%u0041",
    b"\xc3",
    b"\xed\xa0\x80",
    b":",
    b"=",
]
METHODS = (
    [b"GET"] * 12
    + [b"POST"] * 6
    + [b"HEAD", b"OPTIONS", b"PUT", b"DELETE", b"PATCH", b"TRACE", b"CONNECT", b"get", b"G\0T", b"PRI", b"X" * 300]
)
VERSIONS = [b"HTTP/1.1"] * 12 + [
    b"HTTP/1.0",
    b"HTTP/0.9",
    b"HTTP/2.0",
    b"HTTP/1.2",
    b"HTTP/x",
    b"http/1.1",
    b"",
    b"HTTP/1.1 x",
]
NUMBERS = [
    b"0",
    b"1",
    b"5",
    b"100",
    b"-1",
    b"+5",
    b"5, 5",
    b"5, 6",
    b"0x5",
    b"1e3",
    b" 5",
    b"1048577",
    b"99999999999999999999",
    "٣".encode(),
    b"",
]


def name(rng):
    """A channel's name, or something in its place, as it stands in an address."""
    kind = rng.random()
    if kind < 0.5:
        return quote(rng.choice(WORDS[:8]), safe=rng.choice(["", "/*", "~"])).encode()
    if kind < 0.8:
        return quote(rng.choice(WORDS), safe="").encode()
    return b"".join(rng.choice([*BYTES, rng.randbytes(3), rng.choice(WORDS).encode()]) for _ in range(rng.randrange(5)))


def target(rng):
    kind = rng.random()
    if kind < 0.35:
        path = b"/channel=" + name(rng)
    elif kind < 0.5:
        path = b"/" + name(rng)
    elif kind < 0.75:
        path = b"/events?" + b"&".join(b"channel=" + name(rng) for _ in range(rng.choice([0, 1, 1, 2, 3, 101])))
    elif kind < 0.9:
        path = rng.choice(
            [b"/healthz", b"/readyz", b"/", b"/relay.js", b"/metrics", b"/status", b"/favicon.ico", b"/a/b/c"]
        )
    else:
        path = rng.choice(
            [b"*", b"", b"//", b"/..", b"?", b"#", b"x", b"host:80", b"/" + b"y" * 70_000, rng.randbytes(20)]
        )
    if rng.random() < 0.3:
        query = rng.choice(
            [b"last_event_id=" + identity(rng), b"token=" + token(rng), name(rng), b"channel=" + name(rng)]
        )
        path += (b"&" if b"?" in path else b"?") + query
    if rng.random() < 0.05:
        path = (
            rng.choice([b"http://relay", b"https://x:y@relay:1", b"//relay", b"ftp://", b"http://[::1", b"http://"])
            + path
        )
    return path


def identity(rng):
    own = b"%08x-%d" % (rng.getrandbits(32), rng.getrandbits(rng.choice([4, 31, 63, 80])))
    return rng.choice([own, b"earliest", b"none", b"0", b"-1", name(rng), b"z" * 300, "é".encode(), b"\xff"])


def token(rng):
    if rng.random() < 0.4:
        return GRANTED
    return rng.choice(
        [
            b"",
            b"a.b.c",
            b"..",
            b"eyJhbGciOiJub25lIn0.e30.",
            rng.randbytes(30).hex().encode() * 3,
            b"[" * 2000,
            b"e30.e30.e30",
        ]
    )


def optional(rng):
    """Headers that a relay looks at, each with values of all kinds."""
    return [
        lambda: b"Accept: " + rng.choice([b"text/event-stream", b"*/*", b""]),
        lambda: b"Origin: " + rng.choice([b"null", b"https://shop.example", b"http://evil", b""]),
        lambda: b"Last-Event-ID: " + quote(identity(rng), safe="").encode(),
        lambda: b"Cookie: " + rng.choice([b"relay_token=" + token(rng), b";;==;", b"a" * 5000, b'a="\\x"; b']),
        lambda: (
            b"Authorization: "
            + rng.choice([b"Bearer " + TOKEN.encode(), b"Bearer " + token(rng), b"Basic x", b"Bearer"])
        ),
        lambda: b"X-Forwarded-For: " + rng.choice([b"1.2.3.4", b"::1, x", b",,", b"[", b"999.9.9.9"]),
        lambda: b"Connection: " + rng.choice([b"close", b"keep-alive", b"Upgrade", b"x, y"]),
        lambda: b"Upgrade: websocket",
        lambda: b"Access-Control-Request-Method: GET",
        lambda: (
            b"Content-Type: " + rng.choice([b"multipart/form-data; boundary=x", b"application/x-www-form-urlencoded"])
        ),
        lambda: b"Content-Encoding: " + rng.choice([b"gzip", b"x"]),
    ]


def headers(rng, body):
    found = [b"Host: relay"] if rng.random() < 0.95 else []
    found += [line() for line in rng.sample(optional(rng), k=rng.choice([0, 0, 1, 2, 4]))]
    if rng.random() < 0.3:
        found.append(
            rng.choice(
                [
                    *(
                        b"no colon",
                        b": empty",
                        b" folded",
                        b"\tfolded",
                        b"a b: c",
                        b"X: " + rng.randbytes(9),
                        b"X\0: y",
                        b"X: \0",
                    ),
                    *(
                        b"Expect: 100-continue",
                        b"Expect: x",
                        b"Last-Event-ID: " + identity(rng),
                        b"Cookie: " + name(rng),
                    ),
                    *(b"Origin: " + name(rng), b"Authorization: " + name(rng), b"Long: " + b"l" * 66_000),
                    b"\r\n".join(b"H%d: v" % number for number in range(300)),
                ]
            )
        )
    if body or rng.random() < 0.1:
        kind = rng.random()
        if kind < 0.7:
            found.append(b"Content-Length: %d" % len(body))
        elif kind < 0.85:
            found.append(b"Content-Length: " + rng.choice(NUMBERS))
        else:
            found.append(
                b"Transfer-Encoding: "
                + rng.choice([b"chunked", b"Chunked", b"gzip, chunked", b"identity", b"x", b"chunked, chunked"])
            )
            body = chunked(rng, body)
    rng.shuffle(found)
    return found, body


def chunked(rng, body):
    pieces = [body[at : at + 7] for at in range(0, len(body), 7)][:20]
    text = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
    if rng.random() < 0.4:
        text = text.replace(
            *rng.choice(
                [
                    (b"\r\n", b"\n"),
                    (b"7", b"-7"),
                    (b"7", b"ffffffffffffffff"),
                    (b"0\r\n", b"0\r\nX: y\r\n"),
                    (b"7\r\n", b"7;x=y\r\n"),
                ]
            )
        )
    return text


def payload(rng):
    """What somebody may put on a broker's channel: an event, or nearly."""
    kind = rng.random()
    if kind < 0.1:
        return rng.choice(WORDS) * rng.choice([0, 1, 30])
    if kind < 0.2:
        return "".join(
            chr(rng.choice([rng.randrange(1, 0xD800), rng.randrange(0xE000, 0x110000), rng.randrange(1, 32)]))
            for _ in range(rng.randrange(40))
        )
    if kind < 0.25:
        return rng.choice(
            [
                "[" * 3000,
                '{"data":' * 500,
                '{"data":1e999999}',
                '{"data":' + "9" * 5000 + "}",
                "NaN",
                '{"data":NaN}',
                "\x1e",
                "\x1e1234abcd-0\x1eother\x1ex",
                '{"channel":"x","payload":"y"}',
            ]
        )
    values = [
        *WORDS,
        "a\nb",
        "a\r\nid: 9",
        "a\rdata: x",
        "\ud800",
        "\0",
        0,
        7,
        -1,
        1.5,
        2**70,
        None,
        True,
        [],
        {},
        ["x", {"y": None}],
        {"data": "x"},
        "line\n" * 50,
    ]
    keys = ["event", "id", "data", "retry", "comment", "sep", "Data", "more", "", "constructor"]
    event = {rng.choice(keys[: rng.choice([6, 6, 6, 10])]): rng.choice(values) for _ in range(rng.randrange(5))}
    text = json.dumps(event, ensure_ascii=rng.random() < 0.5)
    if rng.random() < 0.2:
        at = rng.randrange(len(text) + 1)
        text = text[:at] + rng.choice(["", '"', "}", "\\", "\\ud800", ",", "\x1f"]) + text[at + rng.randrange(3) :]
    return text


class Attack:
    """One connection: what is sent, in which pieces, and how it ends. ``whole`` is whether it must be answered."""

    def __init__(self, rng):
        self.whole = rng.random() < 0.5
        text = b"".join(whole(rng) if self.whole else rubbish(rng) for _ in range(rng.choice([1] * 12 + [2, 3, 8])))
        if not self.whole and rng.random() < 0.3:
            at = rng.randrange(len(text))
            text = text[:at] + rng.choice(BYTES) + text[at + rng.randrange(4) :]
        if not self.whole and rng.random() < 0.2:
            text = text[: rng.randrange(len(text))]
        self.pieces = [text]
        if rng.random() < 0.15:
            size = rng.choice([1, 3, 50]) if len(text) < 300 else rng.choice([100, 1000, 40_000])
            self.pieces = [text[at : at + size] for at in range(0, len(text), size)]
        self.pieces.reverse()
        self.end = rng.choice(["close"] * 6 + ["reset", "shut"])
        # Turns of the loop in which nothing comes before it goes away.
        self.patience = rng.randrange(40)
        self.received = b""


def whole(rng):
    """A request that HTTP allows."""
    lines = [b"Host: relay", *(line() for line in rng.sample(optional(rng), k=rng.choice([0, 1, 2, 3])))]
    body = payload(rng).encode("utf-8", "replace") if rng.random() < 0.3 else b""
    if body:
        lines += [b"Content-Length: %d" % len(body), b"Authorization: Bearer " + TOKEN.encode()][
            : rng.choice([1, 2, 2])
        ]
    rng.shuffle(lines)
    method = rng.choice([b"GET", b"GET", b"GET", b"HEAD", b"OPTIONS", b"PUT"]) if not body else b"POST"
    path = rng.choice([b"/channel=", b"/", b"/events?channel="]) + quote(rng.choice(WORDS), safe="").encode()
    return (
        b"\r\n".join(
            [method + b" " + path + rng.choice([b"", b"?last_event_id=earliest"]) + b" HTTP/1.1", *lines, b"", b""]
        )
        + body
    )


def rubbish(rng):
    """Something that looks like a request."""
    body = b""
    if rng.random() < 0.3:
        body = rng.choice(
            [payload(rng).encode("utf-8", "replace"), rng.randbytes(50), b"{}", b'{"data":"x"}', b"z" * 100_000]
        )
    lines, body = headers(rng, body)
    head = rng.choice(METHODS) + b" " + target(rng) + b" " + rng.choice(VERSIONS)
    return rng.choice([b"\r\n"] * 20 + [b"\n"]).join([head, *lines, b"", b""]) + body


class Attacker:
    """
    Sends ``count`` attacks to a port, ``AT_ONCE`` at a time, and counts the statuses of what is answered.

    Args:
        meanwhile: Called every now and then.

    """

    AT_ONCE = 64

    def __init__(self, port, seed, meanwhile):
        self.port = port
        self.rng = random.Random(seed)
        self.meanwhile = meanwhile
        self.statuses = Counter()
        self.selector = selectors.DefaultSelector()
        self.open = {}

    def run(self, count):
        begun = 0
        while begun < count or self.open:
            while begun < count and len(self.open) < self.AT_ONCE:
                self._begin()
                begun += 1
                if begun % 500 == 0:
                    self.meanwhile()
            self._turn()
        self.selector.close()

    def _begin(self):
        connection = socket.create_connection(("127.0.0.1", self.port), PATIENCE)
        connection.setblocking(False)
        attack = Attack(self.rng)
        attack.deadline = time.monotonic() + PATIENCE
        self.open[connection] = attack
        self.selector.register(connection, selectors.EVENT_READ | selectors.EVENT_WRITE)

    def _turn(self):
        ready = {key.fileobj: events for key, events in self.selector.select(0.001)}
        for connection, attack in list(self.open.items()):
            try:
                closed = self._move(connection, attack, ready.get(connection, 0))
            except OSError:
                closed = True
            if closed or (not attack.pieces and self._enough(attack)):
                self._done(connection, attack)

    def _move(self, connection, attack, events):
        if events & selectors.EVENT_READ:
            data = connection.recv(65536)
            attack.received += data
            attack.patience += 2
            if not data:
                return True
        if events & selectors.EVENT_WRITE and attack.pieces:
            piece = attack.pieces.pop()
            sent = connection.send(piece) if piece else 0
            if sent < len(piece):
                attack.pieces.append(piece[sent:])
            if not attack.pieces:
                self.selector.modify(connection, selectors.EVENT_READ)
                if attack.end == "shut":
                    connection.shutdown(socket.SHUT_WR)
        return False

    def _enough(self, attack):
        attack.patience -= 1
        if attack.whole and not attack.received:
            assert time.monotonic() < attack.deadline, "a request without an answer"
            return False
        return attack.patience < 0

    def _done(self, connection, attack):
        for line in attack.received.split(b"\r\n"):
            if line.startswith(b"HTTP/1.1 "):
                self.statuses[int(line[9:12])] += 1
        if attack.end == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.selector.unregister(connection)
        connection.close()
        del self.open[connection]
