import asyncio
import itertools
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import httpx
import pytest
from browser import Browser
from pages import Pages
from programs import program
from relay import Relay, run
from servers import PATIENCE, PostgresServer, RedisServer, execute, until
from tornado.ioloop import IOLoop
from website import Website

from tornado_relay.events import own_id, serialize
from tornado_relay.publish import open_publisher

sys.path.insert(0, str(Path(__file__).parent))

_numbers = itertools.count(1)

# The time limits of a request that names none; httpx's own are 5 s, which a busy machine may take.
for limit in ("connect", "read", "write", "pool"):
    setattr(httpx.get.__kwdefaults__["timeout"], limit, PATIENCE)


@pytest.fixture(scope="session")
def home():
    """A folder that servers' users can reach, which pytest's own is not."""
    path = Path(tempfile.mkdtemp(prefix="sse-relay-test-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres_server(home):
    server = PostgresServer(home)
    yield server
    server.stop("immediate")


@pytest.fixture(scope="session")
def redis_server(home):
    server = RedisServer(home)
    yield server
    server.stop()


@pytest.fixture(params=["postgres", "redis"])
def broker(request):
    """Each broker in turn."""
    return request.getfixturevalue(f"{request.param}_server")


@pytest.fixture
def channel():
    """A channel that no other test uses."""
    return f"test-{next(_numbers)}"


@pytest.fixture
def relay(broker, tmp_path):
    with Relay(tmp_path, "--workers", "2", **broker.environment) as running:
        yield running


@pytest.fixture
def io_loop():
    """pytest-tornado's, without its use of what asyncio and Tornado have deprecated."""
    asyncio.set_event_loop(asyncio.new_event_loop())
    loop = IOLoop.current()
    yield loop
    loop.close(all_fds=True)
    asyncio.set_event_loop(None)


@pytest.fixture
def pages():
    with Pages() as opened:
        yield opened


class Kept:
    """A broker whose events are kept: a database of its own, with the history set up."""

    def __init__(self, kind, server, url):
        self.kind = kind
        self.server = server
        self.url = url
        self.environment = {"DATABASE_URL" if kind == "postgres" else "REDIS_URL": url, "RELAY_HISTORY": "10000"}
        self.publisher = open_publisher(kind, url)

    def publish(self, channel, *data, **fields):
        """Publish an event for each of ``data``, as notify() does."""
        for each in data:
            event = {"data": each, **fields}
            self.publisher.publish(channel, serialize(event), own_id(event))

    def by_hand(self, channel, payload):
        """Publish what no history keeps."""
        self.server.publish(channel, payload) if self.kind == "redis" else self.execute(
            "SELECT pg_notify(%s, %s)", channel, payload
        )

    def execute(self, statement, *arguments):
        return execute(self.url, statement, *arguments)


@pytest.fixture(scope="session")
def kept_postgres(postgres_server, tmp_path_factory):
    postgres_server.execute("CREATE DATABASE kept")
    url = postgres_server.url.removesuffix("relay") + "kept"
    done = run("init-db", cwd=tmp_path_factory.mktemp("init-db"), DATABASE_URL=url)
    assert done.returncode == 0, done.stderr
    yield (kept := Kept("postgres", postgres_server, url))
    kept.publisher.close()


@pytest.fixture(scope="session")
def kept_redis(redis_server, tmp_path_factory):
    url = redis_server.url.removesuffix("0") + "5"
    # The first relay that wants a history is what sets it up.
    with Relay(tmp_path_factory.mktemp("first"), "--workers", "1", REDIS_URL=url, RELAY_HISTORY="10000") as relay:
        until(lambda: "the history is at" in relay.log, "the history is set up")
    yield (kept := Kept("redis", redis_server, url))
    kept.publisher.close()


@pytest.fixture(params=["postgres", "redis"])
def kept(request):
    """Each broker in turn, with a history."""
    return request.getfixturevalue(f"kept_{request.param}")


@pytest.fixture
def browse(tmp_path):
    """Open a page in a headless Chromium that ends with the test."""
    browsers = []

    def browse(url, *flags):
        browsers.append(Browser(tmp_path / "profile", url, *flags))
        return browsers[-1]

    yield browse
    for browser in browsers:
        browser.close()


@pytest.fixture
def browser(browse):
    """A headless Chromium for several tabs."""
    return browse("about:blank")


@pytest.fixture
def site():
    with Website() as server:
        yield server


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    """A certificate for the proxies."""
    folder = tmp_path_factory.mktemp("certificate")
    command = [program("openssl"), "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command += ["-subj", "/CN=events.example.com", "-addext", "subjectAltName=DNS:events.example.com,IP:127.0.0.1"]
    command += ["-keyout", folder / "key", "-out", folder / "pem"]
    subprocess.run(command, check=True, capture_output=True)
    return folder
