"""EventSource and RelaySource keep the promises in Chromium, Firefox and WebKit."""

import json

import httpx
import pytest
from browser import Browser
from outages import Proxy
from relay import Relay
from servers import until
from webdriver import Firefox, WebKit

ENGINES = {"chromium": Browser, "firefox": Firefox, "webkit": WebKit}
CLIENTS = ["EventSource", "RelaySource"]

# Each source as the README makes it, and what it has said since.
LISTEN = """
  window.seen = {}
  window.states = {}
  window.positions = {}
  window.sources = %s.map(([name, url, options]) => {
    const source = new %s(url, ...options)
    seen[name] = []
    states[name] = []
    const show = e => seen[name].push([e.type, e.data])
    for (const type of ["message", "stream-reset"]) source.addEventListener(type, show)
    source.addEventListener("stream-position", e => { positions[name] = e.lastEventId })
    source.onopen = () => states[name].push("open")
    source.onerror = () => states[name].push(source.readyState == 2 ? "closed" : "away")
    return source
  })
  void 0
"""


class Listener:
    """One tab with a source for each of ``channels``, all of one kind."""

    def __init__(self, tab, client, relay_url, base, channels, *options, alone=False):
        self.evaluate = tab.evaluate
        self.channels = channels
        script = "Object.defineProperty(navigator, 'locks', { value: undefined });\n" if alone else ""
        self.evaluate(f"{script}{httpx.get(f'{relay_url}/relay.js').text}\nvoid 0")
        made = [[name, f"{base}/channel={name}", options] for name in channels]
        self.evaluate(LISTEN % (json.dumps(made), client))

    def data(self, channel):
        return [text for kind, text in self.evaluate("seen")[channel] if kind == "message"]

    def resets(self, channel):
        told = self.evaluate("seen")[channel]
        return [json.loads(text) for kind, text in told if kind == "stream-reset"]

    def until_all_are(self, state):
        def all_are():
            return all(told[-1:] == [state] for told in self.evaluate("states").values())

        until(all_are, f"all are {state}", 40)

    def until_all_have(self, data):
        def all_have():
            return all(self.data(name)[-1:] == [data] for name in self.channels)

        until(all_have, f"{data} is on all", 40)


@pytest.fixture(scope="module", params=ENGINES)
def engine(request, tmp_path_factory):
    """A browser of each engine in turn, in which each test opens tabs of its own."""
    profile = tmp_path_factory.mktemp(request.param) / "profile"
    browser = ENGINES[request.param](profile, "about:blank")
    yield browser
    browser.close()


@pytest.fixture
def tab(engine):
    """Open a tab that is closed after the test."""
    opened = []

    def tab(url):
        opened.append(engine.tab(url))
        # A script that comes before the page would be left behind in the empty document before it.
        loaded = f"document.readyState == 'complete' && location.href.startsWith('{url}')"
        until(lambda: opened[-1].evaluate(loaded), f"{url} is loaded")
        return opened[-1]

    yield tab
    for each in opened:
        each.close()


@pytest.fixture
def listen(tab):
    """Open a tab on the origin of a proxy before the relay, and listen there."""

    def listen(client, relay, proxy, channels, **options):
        base = f"http://127.0.0.1:{proxy.port}"
        return Listener(tab(f"{base}/healthz"), client, relay.url, base, channels, **options)

    return listen


class Cut:
    """Ends all connections through ``proxy``, and lets none through until the block ends."""

    def __init__(self, relay, proxy, listener):
        self.relay, self.proxy, self.listener = relay, proxy, listener

    def __enter__(self):
        self.proxy.freeze()
        self.proxy.lead_to(self.relay.port)
        self.listener.until_all_are("away")
        self.proxy.asked = b""

    def __exit__(self, *_):
        self.proxy.thaw()


@pytest.mark.parametrize("client", CLIENTS)
def test_nothing_is_lost_with_a_history(listen, client, kept_postgres, channel, tmp_path):
    """
    Each event that is published during a cut arrives once, without a reset.

    That holds on a channel that has had no event before the cut, on one that has had one, and on
    one whose last event had an id of its publisher's own.
    """
    quiet, busy, own = channels = [f"{channel}-{name}" for name in ("quiet", "busy", "own")]
    with (
        Relay(tmp_path, "--workers", "1", **kept_postgres.environment) as relay,
        Proxy(relay.port) as proxy,
    ):
        listener = listen(client, relay, proxy, channels, alone=True)
        listener.until_all_are("open")
        kept_postgres.publish(busy, "before")
        kept_postgres.publish(own, "before", id="7")
        until(lambda: listener.data(busy) == listener.data(own) == ["before"], "the first events")
        with Cut(relay, proxy, listener):
            for name in channels:
                kept_postgres.publish(name, "meanwhile")
        listener.until_all_have("meanwhile")
        for name in channels:
            kept_postgres.publish(name, "after")
        listener.until_all_have("after")
        assert listener.data(quiet) == ["meanwhile", "after"]
        assert listener.data(busy) == listener.data(own) == ["before", "meanwhile", "after"]
        assert [listener.resets(name) for name in channels] == [[], [], []]


@pytest.mark.parametrize("client", CLIENTS)
def test_position_of_a_heartbeat_is_kept(listen, client, kept_redis, pages, channel, tmp_path):
    """A page on a quiet channel comes back to the position that the last heartbeat told."""
    flags = ("--workers", "1", "--heartbeat", "1")
    with Relay(tmp_path, *flags, **kept_redis.environment) as relay, Proxy(relay.port) as proxy:
        listener = listen(client, relay, proxy, [channel])
        listener.until_all_are("open")
        # A worker's heartbeats tell of events on all channels that it has streams on.
        pages.open(relay.port, [f"/channel={channel}-other"])
        kept_redis.publish(f"{channel}-other", "elsewhere")
        newest = kept_redis.publisher.newest()
        at = f"positions[{channel!r}]" if client == "EventSource" else "sources[0]._want.at"
        until(lambda: listener.evaluate(at) == newest, "a heartbeat has moved it")
        with Cut(relay, proxy, listener):
            kept_redis.publish(channel, "meanwhile")
        listener.until_all_have("meanwhile")
        assert newest.encode() in proxy.asked
        assert listener.data(channel) == ["meanwhile"]
        assert listener.resets(channel) == []
        told = {} if client == "RelaySource" else {channel: newest}
        assert listener.evaluate("positions") == told


@pytest.mark.parametrize("client", CLIENTS)
def test_each_page_is_told_without_a_history(listen, client, redis_server, channel, tmp_path):
    """After a cut each page is told once that it may have missed something, and goes on."""
    quiet, busy, own = channels = [f"{channel}-{name}" for name in ("quiet", "busy", "own")]
    environment = redis_server.environment
    with Relay(tmp_path, "--workers", "1", **environment) as relay, Proxy(relay.port) as proxy:
        listener = listen(client, relay, proxy, channels, alone=True)
        listener.until_all_are("open")
        redis_server.publish(busy, "before")
        redis_server.publish(own, '{"data": "before", "id": "7"}')
        until(lambda: listener.data(busy) == listener.data(own) == ["before"], "the first events")
        with Cut(relay, proxy, listener):
            for name in channels:
                redis_server.publish(name, "meanwhile")
        until(lambda: all(listener.resets(name) for name in channels), "all are told", 40)
        for name in channels:
            redis_server.publish(name, "after")
        listener.until_all_have("after")
        for name in channels:
            assert listener.resets(name) == [{"reason": "unknown-id", "channels": [name]}]
            assert listener.data(name) == (["after"] if name == quiet else ["before", "after"])


@pytest.mark.parametrize("credentials", [False, True])
@pytest.mark.parametrize("client", CLIENTS)
def test_other_origin_is_refused_for_good(tab, client, credentials, redis_server, tmp_path, site):
    """The source of a page whose origin may not connect is closed, also one that sends cookies."""
    flags = ("--workers", "1", "--allowed-origins", "https://shop.example")
    with Relay(tmp_path, *flags, **redis_server.environment) as relay, Proxy(relay.port) as proxy:
        base, options = f"http://127.0.0.1:{proxy.port}", {"withCredentials": credentials}
        listener = Listener(tab(site.url), client, relay.url, base, ["news"], options)
        listener.until_all_are("closed")
        assert listener.evaluate("states") == {"news": ["closed"]}
        assert listener.evaluate("sources[0].readyState") == 2
        assert "stream opened" not in relay.log
