"""Ways for a broker to be away."""

import socket
import threading
from contextlib import suppress


def end_listeners(broker):
    if broker.kind == "postgres":
        broker.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'sse-relay-server'"
        )
    else:
        broker.client.client_kill_filter(_type="pubsub")


class Proxy:
    """
    A TCP proxy that can stop to forward, without closing anything.

    With ``slow`` it stops only what the server sends to clients that have sent these bytes.
    """

    def __init__(self, target, slow=b""):
        self.target = target
        self.slow = slow
        self.flowing = threading.Event()
        self.flowing.set()
        # Set once something is held back.
        self.holds = threading.Event()
        # The last that clients have sent.
        self.asked = b""
        # Bytes, in both directions.
        self.forwarded = 0
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = self.server.getsockname()[1]
        self.sockets = [self.server]
        threading.Thread(target=self.accept, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.cut()
        self.flowing.set()

    def cut(self):
        """End all connections, with what they hold, and accept no more."""
        for each in self.sockets:
            try:
                each.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            each.close()

    def freeze(self):
        self.flowing.clear()

    def thaw(self):
        self.flowing.set()

    def lead_to(self, target):
        """End the connections that there are; new ones go to another port."""
        self.target = target
        self.end_connections()

    def end_connections(self):
        """End the connections that there are."""
        _, *open_ones = list(self.sockets)
        for each in open_ones:
            try:
                each.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def accept(self):
        while True:
            try:
                client, _ = self.server.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self.target))
            except OSError:  # nobody listens there at the moment
                client.close()
                continue
            self.sockets += [client, server]
            threading.Thread(target=self.forward, args=(client, server), daemon=True).start()

    def forward(self, client, server):
        is_slow = threading.Event()
        answers = threading.Thread(target=self.pump, args=(server, client, is_slow, True), daemon=True)
        answers.start()
        self.pump(client, server, is_slow, False)
        answers.join()
        for each in (client, server):
            self.sockets.remove(each)
            each.close()

    def pump(self, source, sink, is_slow, answers):
        try:
            while data := source.recv(65536):
                if self.slow in data:
                    is_slow.set()
                if not self.flowing.is_set() and (not self.slow or (answers and is_slow.is_set())):
                    self.holds.set()
                    self.flowing.wait()
                if not answers:
                    self.asked = (self.asked + data)[-65536:]
                sink.sendall(data)
                self.forwarded += len(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:  # one of the two is gone, and the other one is to notice
            for each in (source, sink):
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
