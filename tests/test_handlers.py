"""The HTTP surface of one worker, over a socket, in the test's own loop, on a real Redis."""

import asyncio
import socket

import pytest
import tornado.httpclient
from servers import free_port

from tornado_relay.application import RelayApplication
from tornado_relay.brokers.reader import Reader
from tornado_relay.brokers.redis.listener import RedisListener
from tornado_relay.hub import Hub
from tornado_relay.limits import Seats, Tally
from tornado_relay.relay import Relay
from tornado_relay.settings import Settings
from tornado_relay.visit import MAX_CHANNELS

ORIGIN = "https://shop.example"


@pytest.fixture
def settings():
    return Settings(allowed_origins=(ORIGIN,), debug=True)


@pytest.fixture
def redis_url(redis_server):
    return redis_server.url


@pytest.fixture
def relay(io_loop, settings, redis_url):
    hub = Hub()

    async def make():
        reader = Reader(RedisListener(redis_url, hub.deliver), hub.counts, lambda again: None, lambda: None)
        first = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(reader.run(first.set_result))
        await first
        relay = Relay(settings, hub, reader, Seats(Tally(1), 0, 0, 0))
        relay.poller.start()
        return relay, task

    async def end():
        task.cancel()
        await asyncio.wait({task})

    relay, task = io_loop.run_sync(make)
    yield relay
    io_loop.run_sync(end)


@pytest.fixture
def app(relay):
    return RelayApplication(relay)


@pytest.fixture
def fetch(http_client, base_url):
    def fetch(path, **options):
        return http_client.fetch(base_url + path, raise_error=False, **options)

    return fetch


class TestWithoutBroker:
    @pytest.fixture
    def redis_url(self):
        return f"redis://127.0.0.1:{free_port()}/0"

    @pytest.mark.gen_test
    async def test_eventsource_is_told_to_come_back(self, fetch):
        """EventSource gives up for good on a 503, so it gets a 200 that ends, with a retry time."""
        answer = await fetch("/channel=x", headers={"Accept": "text/event-stream", "Origin": ORIGIN})
        assert answer.code == 200
        assert answer.headers["Content-Type"] == "text/event-stream"
        assert answer.headers["Access-Control-Allow-Origin"] == ORIGIN
        assert b"\nretry: " in answer.body

    @pytest.mark.gen_test
    async def test_other_clients_get_503_with_the_reason(self, fetch):
        """And the time after which to try again."""
        answer = await fetch("/channel=x", headers={"Accept": "*/*"})
        assert answer.code == 503
        assert int(answer.headers["Retry-After"]) >= 2
        assert answer.body.startswith(b"Redis: ")

    @pytest.mark.gen_test
    async def test_not_ready_but_healthy(self, fetch):
        """/readyz says why streams cannot be served; /healthz that there is no reason to restart."""
        ready, healthy = await fetch("/readyz"), await fetch("/healthz")
        assert (ready.code, healthy.code) == (503, 200)
        assert b"Redis: " in ready.body

    @pytest.mark.gen_test
    async def test_head_gets_503_too(self, fetch):
        """What GET would say, without a body."""
        assert (await fetch("/channel=x", method="HEAD")).code == 503


@pytest.mark.gen_test
async def test_ready_and_healthy(fetch):
    """With the broker connected both are 200."""
    assert [(await fetch(path)).code for path in ("/readyz", "/healthz")] == [200, 200]


@pytest.mark.gen_test
async def test_draining_worker_is_not_ready_and_opens_no_stream(fetch, relay):
    """A load balancer sees it, and a page is told to come back."""
    relay.draining = True
    assert (await fetch("/readyz")).code == 503
    answer = await fetch("/channel=x", headers={"Accept": "text/event-stream"})
    assert b"retry: " in answer.body


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/events", b"no channel"),
        ("/events?channel=", b"empty"),
        ("/channel=", b"empty"),
        ("/channel=" + "x" * 201, b"201 characters; 200"),
        ("/channel=a%0Ab", b"control character"),
        ("/events?channel=a%00b", b"control character"),
        ("/channel=%ff", b"nicode"),
        ("/events?" + "channel=x&" * (MAX_CHANNELS + 1), b"at most 100"),
        ("/channel=%25s%0A", b"control character"),
    ],
)
@pytest.mark.gen_test
async def test_wrong_channel_is_a_400_that_says_why(fetch, path, said):
    """One line of plain text, never a traceback."""
    answer = await fetch(path)
    assert answer.code == 400
    assert said in answer.body
    assert answer.body.count(b"\n") == 1


@pytest.mark.parametrize("path", ["/channel=x", "/x", "/events?channel=x", "/healthz", "/readyz", "/", "/a/b"])
@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://shop.example", "https://shop.example:8443"])
@pytest.mark.gen_test
async def test_page_of_another_origin_gets_403(fetch, path, origin, relay):
    """Whatever it asks for, and before anything is subscribed to."""
    answer = await fetch(path, headers={"Origin": origin})
    assert answer.code == 403
    # Its page may read that it is refused, by which relay.js gives up, and nothing else.
    assert answer.headers["Access-Control-Allow-Origin"] == "*"
    assert "Access-Control-Allow-Credentials" not in answer.headers
    assert answer.body == b"pages of this origin may not connect; see ALLOWED_ORIGINS\n"
    assert len(relay.hub) == 0


@pytest.mark.parametrize(
    ("path", "method"), [("/channel=" + "x" * 201, "GET"), ("/channel=x", "PUT"), ("/a/b", "POST")]
)
@pytest.mark.parametrize("origin", ["https://evil.example", "null"])
@pytest.mark.gen_test
async def test_page_of_another_origin_reads_no_other_error(fetch, path, method, origin):
    """Whatever else is wrong with its request, it reads nothing but the refusal of its origin."""
    body = None if method == "GET" else "x"
    answer = await fetch(path, headers={"Origin": origin}, method=method, body=body)
    assert answer.code >= 400
    if "Access-Control-Allow-Origin" in answer.headers:
        assert answer.body.startswith(b"pages of this origin")


@pytest.mark.gen_test
async def test_preflight_of_an_allowed_page(fetch):
    """It may send Last-Event-ID and credentials."""
    answer = await fetch(
        "/channel=x", method="OPTIONS", headers={"Origin": ORIGIN, "Access-Control-Request-Method": "GET"}
    )
    assert answer.code == 204
    assert answer.headers["Access-Control-Allow-Origin"] == ORIGIN
    assert answer.headers["Access-Control-Allow-Credentials"] == "true"
    assert "GET" in answer.headers["Access-Control-Allow-Methods"]
    assert "Last-Event-ID" in answer.headers["Access-Control-Allow-Headers"]
    assert answer.headers["Vary"] == "Origin"


@pytest.mark.gen_test
async def test_stream_of_an_allowed_page_has_cors_with_credentials(fetch):
    """On HEAD, whose headers are those of GET."""
    answer = await fetch("/channel=x", method="HEAD", headers={"Origin": ORIGIN})
    assert answer.headers["Access-Control-Allow-Origin"] == ORIGIN
    assert answer.headers["Access-Control-Allow-Credentials"] == "true"
    assert answer.headers["Vary"] == "Origin, Accept-Encoding"


@pytest.mark.gen_test
async def test_error_can_be_read_by_an_allowed_page(fetch):
    """Without CORS headers fetch() would tell it of a broken network."""
    answer = await fetch("/channel=", headers={"Origin": ORIGIN})
    assert (answer.code, answer.headers["Access-Control-Allow-Origin"]) == (400, ORIGIN)
    assert answer.headers["Vary"] == "Origin"
    refused = await fetch("/channel=", headers={"Origin": "https://evil.example"})
    assert (refused.code, refused.headers["Access-Control-Allow-Origin"]) == (403, "*")  # not what else is wrong
    assert "Access-Control-Allow-Credentials" not in refused.headers


@pytest.mark.parametrize(("method", "code"), [("POST", 404), ("PUT", 405), ("DELETE", 405), ("PATCH", 405)])
@pytest.mark.gen_test
async def test_other_methods(fetch, method, code):
    """Publishing by HTTP is not there, and nothing else is."""
    answer = await fetch("/channel=x", method=method, body=None if method == "DELETE" else "{}")
    assert answer.code == code
    if code == 405:
        assert answer.headers["Allow"] == "GET, HEAD, OPTIONS"


@pytest.mark.parametrize("path", ["/a/b", "/relay.js/x", "/channel/x"])
@pytest.mark.gen_test
async def test_unknown_path_is_a_404_that_tells_where_streams_are(fetch, path):
    """In one line."""
    answer = await fetch(path)
    assert answer.code == 404
    assert b"/channel=NAME" in answer.body


@pytest.mark.gen_test
async def test_inspector_page_in_debug_mode(fetch):
    """It is one page with nothing from elsewhere."""
    answer = await fetch("/")
    assert answer.headers["Content-Type"].startswith("text/html")
    assert b"<script src" not in answer.body


class TestNotInDebugMode:
    @pytest.fixture
    def settings(self):
        return Settings()

    @pytest.mark.gen_test
    async def test_there_is_no_inspector(self, fetch):
        """A relay on the internet shows nothing at /."""
        assert (await fetch("/")).code == 404

    @pytest.mark.gen_test
    async def test_without_allowed_origins_any_page_may_connect_without_credentials(self, fetch):
        """Open by default, as far as a browser lets it be."""
        answer = await fetch("/channel=x", method="HEAD", headers={"Origin": "https://any.example"})
        assert answer.headers["Access-Control-Allow-Origin"] == "*"
        assert "Access-Control-Allow-Credentials" not in answer.headers


@pytest.mark.gen_test
async def test_stream_that_ends_is_forgotten(relay, base_url, http_client):
    """Nothing is kept of a client that went away, also of one that goes before it is answered."""
    _, port = base_url.rsplit(":", 1)
    clients = []
    for number in range(20):
        client = socket.create_connection(("127.0.0.1", int(port)))
        client.sendall(b"GET /channel=x%d HTTP/1.1\r\nHost: x\r\n\r\n" % number)
        if number % 2:
            client.close()
        clients.append(client)
    await _until(lambda: len(relay.hub) == 10)
    for client in clients:
        client.close()
    await _until(lambda: len(relay.hub) == 0)
    await _until(lambda: not relay.reader._subscriptions._held)  # noqa: SLF001


@pytest.mark.gen_test
async def test_client_that_talks_into_its_stream_is_cut(relay, base_url, http_server):
    """What a client sends after its request is not collected."""
    _, port = base_url.rsplit(":", 1)
    client = socket.create_connection(("127.0.0.1", int(port)))
    client.sendall(b"GET /channel=x HTTP/1.1\r\nHost: x\r\n\r\n")
    await _until(lambda: len(relay.hub) == 1)
    client.sendall(b"x" * 50_000)
    await _until(lambda: len(relay.hub) == 0)
    client.close()


@pytest.mark.gen_test
async def test_malformed_request_is_answered_or_dropped(base_url, fetch):
    """Rubbish in place of HTTP does not disturb the next request."""
    _, port = base_url.rsplit(":", 1)
    for rubbish in (b"\r\n\r\n", b"GET\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", b"GET /x HTTP/1.1\r\nHost : x\r\n\r\n"):
        client = socket.create_connection(("127.0.0.1", int(port)))
        client.sendall(rubbish)
        client.close()
    assert (await fetch("/healthz")).code == 200


async def _until(condition):
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"not within 5 s: {condition}")


def test_client_library_is_tornados():
    """pytest-tornado's client is the simple one, which HEAD and OPTIONS are tested with."""
    assert tornado.httpclient.AsyncHTTPClient.configurable_default().__name__ == "SimpleAsyncHTTPClient"
