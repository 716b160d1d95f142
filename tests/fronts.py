"""nginx, Caddy and HAProxy in front of a relay, run as docs/proxies has them, and browsers' ways to them."""

import os
import signal
import subprocess

from programs import program
from relay import ROOT, environment
from servers import PATIENCE, accepts, free_port, until

from tornado_relay.events import OF_THE_STREAM

DOCS = ROOT / "docs/proxies"
FILES = {"nginx": "nginx.conf", "caddy": "Caddyfile", "haproxy": "haproxy.cfg"}
NAME = "events.example.com"
SOCKET = "/run/sse-relay-server/relay.sock"


def configuration(kind):
    return (DOCS / FILES[kind]).read_text()


class Front:
    """
    A proxy, used as a context manager; browsers reach it at ``port``.

    ``text`` is its configuration, in which what the machine decides is replaced: addresses, folders, and who it runs as.
    """

    def __init__(self, kind, folder, certificate, unix_socket=SOCKET, text=None):
        self.kind = kind
        self.folder = folder / f"{kind}-{os.urandom(4).hex()}"
        self.folder.mkdir()
        self.port = free_port()
        self.log_path = self.folder / "log"
        self.access_log = self.folder / "access.log" if kind == "nginx" else self.log_path
        self.path = self.folder / FILES[kind]
        text = text or configuration(kind)
        of_the_machine, self.command = getattr(self, f"_{kind}")(certificate)
        text = text.replace(SOCKET, str(unix_socket))
        for there, here in of_the_machine.items():
            assert there in text, there
            text = text.replace(there, here)
        self.path.write_text(text)

    def _nginx(self, certificate):
        kept = [
            f"{name}_temp_path {self.folder}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        ]
        return {
            "user www-data;": "user www-data;" if os.getuid() == 0 else "",
            "listen 443": f"listen 127.0.0.1:{self.port}",
            "listen [::]:443 ssl http2;": "",
            f"/etc/ssl/{NAME}.pem": f"{certificate}/pem",
            f"/etc/ssl/{NAME}.key": f"{certificate}/key",
            "/var/log/nginx/access.log": str(self.access_log),
            "http {": f"http {{ {' '.join(kept)}",
        }, [program("nginx"), "-c", self.path, "-e", "stderr", "-g", f"daemon off; pid {self.folder}/pid;"]

    def _caddy(self, certificate):
        return {
            "\tgrace_period": f"\tadmin localhost:{free_port()}\n\tauto_https off\n\tgrace_period",
            f"{NAME} {{": f"{NAME}:{self.port} {{\n\ttls {certificate}/pem {certificate}/key",
        }, [program("caddy"), "run", "--config", self.path]

    def _haproxy(self, certificate):
        (self.folder / "pem").write_text((certificate / "pem").read_text() + (certificate / "key").read_text())
        root = os.getuid() == 0
        return {
            "user haproxy": "user haproxy" if root else "",
            "group haproxy": "group haproxy" if root else "",
            # It does not start without descriptors for as many.
            "maxconn 50000": "maxconn 4000",
            "bind :::443 v4v6": f"bind 127.0.0.1:{self.port}",
            f"/etc/ssl/{NAME}.pem": f"{self.folder}/pem",
            "/dev/log": "stdout format raw",
        }, [program("haproxy"), "-W", "-f", self.path]

    def __enter__(self):
        self._environment = environment(**dict.fromkeys(("HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME"), str(self.folder)))
        with self.log_path.open("w") as log:
            self.process = subprocess.Popen(
                self.command, env=self._environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )

        def listens():
            assert self.process.poll() is None, self.log_path.read_text()
            return accepts(self.port)

        try:
            until(listens, f"{self.kind} listens")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        self.process.terminate()
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise

    def reload(self):
        """As Debian's units do."""
        if self.kind == "caddy":
            command = [self.command[0], "reload", "--force", "--config", self.path]
            subprocess.run(command, env=self._environment, check=True, capture_output=True)
        else:
            self.process.send_signal(signal.SIGHUP if self.kind == "nginx" else signal.SIGUSR2)

    def visit(self, path, *flags, headers=None):
        """Ask for ``path``, by HTTP/2 unless ``flags`` of curl say otherwise."""
        return Visit(self, path, flags, headers or {})


class Visit:
    """A request by curl, used as a context manager."""

    def __init__(self, front, path, flags, headers):
        self._head_path = front.folder / f"head-{os.urandom(4).hex()}"
        self._head_path.touch()
        address = f"{NAME}:{front.port}"
        fields = [part for name, value in headers.items() for part in ("-H", f"{name}: {value}")]
        self.process = subprocess.Popen(
            [
                *(program("curl"), "-skN", "--http2", "--path-as-is", "--max-time", str(PATIENCE)),
                *("--resolve", f"{address}:127.0.0.1", "-D", self._head_path),
                *(*flags, *fields, f"https://{address}{path}"),
            ],
            stdout=subprocess.PIPE,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def read(self):
        """Return the whole answer, which ends."""
        with self:
            return self.process.stdout.read().decode()

    def next(self, kind=b"data: "):
        """Return the rest of the next line that begins with ``kind``; no data that tells the position."""
        event = ""
        while line := self.process.stdout.readline():
            if line.startswith(b"event: "):
                event = line[7:].decode().strip()
            elif not line.strip():
                event = ""
            if line.startswith(kind) and not (kind == b"data: " and event in OF_THE_STREAM):
                return line[len(kind) :].decode().rstrip("\n")
        raise AssertionError(f"the stream ended: {self.head}")

    def wait_end(self):
        """Return when the stream has been cut."""
        self.process.stdout.read()
        assert self.process.wait() != 28, "it went on"  # curl(1): "Operation timeout"

    @property
    def head(self):
        """The protocol and the status, and the headers."""
        until(lambda: self._head_path.read_text().endswith("\n\n"), "the head of the answer")
        first, *lines = self._head_path.read_text().strip().split("\n")
        return *first.split()[:2], {
            name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)
        }

    @property
    def status(self):
        return int(self.head[1])

    @property
    def headers(self):
        return self.head[2]
