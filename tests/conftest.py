import asyncio
import itertools
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from pages import Pages
from relay import Relay
from servers import PostgresServer, RedisServer
from tornado.ioloop import IOLoop

sys.path.insert(0, str(Path(__file__).parent))

_numbers = itertools.count(1)


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
