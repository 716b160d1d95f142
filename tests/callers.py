"""Clients that connect again and again, for tests of refusals."""

import re
import socket
import threading
from collections import Counter

from servers import PATIENCE


class Callers(threading.Thread):
    """
    Opens a stream, reads its beginning and closes it, in a tight loop; ``with`` ends it.

    ``answers`` counts the `Server` headers that came, ``troubles`` has whatever else happened.
    """

    def __init__(self, port, *, unix_socket=""):
        super().__init__(daemon=True)
        self.address = unix_socket or ("127.0.0.1", port)
        self.ended = threading.Event()
        self.answers = Counter()
        self.troubles = []

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        self.join(PATIENCE)

    def run(self):
        while not self.ended.is_set():
            try:
                self.answers[self.call()] += 1
            except Exception as exc:
                self.troubles.append(repr(exc))

    def call(self):
        with socket.socket(socket.AF_UNIX if isinstance(self.address, str) else socket.AF_INET) as connection:
            connection.settimeout(PATIENCE)
            connection.connect(self.address)
            connection.sendall(b"GET /channel=x HTTP/1.1\r\nHost: relay\r\nAccept: text/event-stream\r\n\r\n")
            answer = b""
            while b"\r\n\r\n" not in answer:
                if not (data := connection.recv(4096)):
                    raise ConnectionError(f"closed after {answer!r}")
                answer += data
            return re.search(rb"Server: sse-relay-server/(\S+)", answer)[1].decode()
