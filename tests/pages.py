"""Many streams in one test: each a socket and the standard's parser, all on one thread."""

import codecs
import json
import selectors
import socket
import time
import zlib

from servers import PATIENCE, patience

from tornado_relay.events import OF_THE_STREAM
from tornado_relay.eventsource import Parser


class Page:
    """
    One stream, as a page would hold it.

    ``events`` is what it got, in order; ``positions`` are the events by which the relay told it where it is.
    """

    def __init__(self, port, path, headers=None, *, version="1.1", method="GET", unix_socket=""):
        if unix_socket:
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.connect(unix_socket)
        else:
            self.socket = socket.create_connection(("127.0.0.1", port), PATIENCE)
        lines = [f"{method} {path} HTTP/{version}", "Host: relay", "Accept: text/event-stream"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        self.socket.sendall("\r\n".join([*lines, "", ""]).encode())
        self.socket.setblocking(False)
        self.path = path
        self.port = port
        self.head = b""
        self.status = None
        self.body = b""
        self.events = []
        self.positions = []
        self.closed = False
        self.parser = Parser()
        # What has come of a chunk that is not whole yet, and whether the last one has come.
        self.chunk = b""
        self.ended = False
        # Bytes on the wire of a compressed stream.
        self.packed = 0
        self.inflate = zlib.decompressobj(16 + zlib.MAX_WBITS).decompress
        self._decode = codecs.getincrementaldecoder("utf-8")().decode

    def read(self):
        """Take in what has arrived."""
        try:
            data = self.socket.recv(1 << 18)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            return
        if self.status is None:
            self.head += data
            head, separator, data = self.head.partition(b"\r\n\r\n")
            if not separator:
                return
            self.head = head
            self.status = int(head.split()[1])
        if self.headers.get("transfer-encoding") == "chunked":
            data = self._whole_chunks(data)
        if self.headers.get("content-encoding") == "gzip":
            self.packed += len(data)
            data = self.inflate(data)
        self.body += data
        for event in self.parser.feed(self._decode(data)):
            (self.positions if event.event in OF_THE_STREAM else self.events).append(event)
        if len(self.body) >= int(self.headers.get("content-length", 1 << 40)):
            self.close()

    def _whole_chunks(self, data):
        """RFC 9112, section 7.1."""
        self.chunk += data
        found = []
        while not self.ended:
            size, line_end, rest = self.chunk.partition(b"\r\n")
            if not line_end or len(rest) < int(size, 16) + 2:
                break
            whole, after = rest[: int(size, 16)], rest[int(size, 16) :]
            assert after.startswith(b"\r\n")
            found.append(whole)
            self.chunk = after[2:]
            self.ended = not whole
        return b"".join(found)

    @property
    def headers(self):
        lines = self.head.decode().split("\r\n")[1:]
        return {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}

    @property
    def data(self):
        return [event.data for event in self.events]

    def close(self):
        self.closed = True
        self.socket.close()

    def fileno(self):
        return self.socket.fileno()


class Pages:
    """A set of streams that are read together."""

    def __init__(self):
        self.selector = selectors.DefaultSelector()
        self.all = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for page in self.all:
            page.close()
        self.selector.close()

    def open(self, port, paths, headers=None, seconds=60.0, **options):
        """Open a stream for each path, and return them when all have their first bytes."""
        opened = []
        for path in paths:
            opened.append(self.add(Page(port, path, headers, **options)))
            self.read(0)
        self.until(lambda: all(page.status or page.closed for page in opened), "all streams are open", seconds)
        return opened

    def add(self, page):
        """Read ``page`` from now on as well."""
        self.selector.register(page, selectors.EVENT_READ)
        self.all.append(page)
        return page

    def close(self, page):
        """End a stream from the page's side."""
        self.selector.unregister(page)
        page.close()

    def read(self, timeout):
        for key, _ in self.selector.select(timeout):
            page = key.fileobj
            number = page.fileno()
            page.read()
            if page.closed:
                self.selector.unregister(number)

    def until(self, condition, what, seconds=60.0):
        """Read until ``condition()`` holds."""
        end = time.monotonic() + patience(seconds)
        while not condition():
            assert time.monotonic() < end, f"not within {patience(seconds)} s: {what}"
            self.read(0.05)


def resets(page):
    return [json.loads(event.data) for event in page.events if event.event == "stream-reset"]


def come_back(pages, relay, channel, last_event_id):
    return pages.open(relay.port, [f"/channel={channel}"], {"Last-Event-ID": last_event_id})[0]


def data_of(page):
    return [event.data for event in page.events if event.event != "stream-reset"]


def got(pages, page, *data):
    pages.until(lambda: data_of(page)[-1:] == [data[-1]], f"{data[-1][:20]} arrives")
    assert data_of(page) == list(data)
