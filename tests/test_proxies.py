"""nginx, Caddy and HAProxy, as docs/proxies has them, between the relay and curl or Chromium, over TLS."""

import json
import os
import re
import signal
from contextlib import ExitStack, contextmanager
from urllib.parse import quote

import crowd
import pytest
from fronts import FILES, NAME, SOCKET, Front, configuration
from relay import ROOT, Relay
from servers import free_port, until
from test_readme import block

from tornado_relay.settings import FIELDS
from tornado_relay.tokens import subscribe_token

PAGE_OF_DOCS = (ROOT / "docs/proxies.md").read_text()
LANGUAGES = {"nginx": "nginx", "caddy": "caddyfile", "haproxy": "haproxy"}
# Bytes of an address.
LONGEST = {"nginx": 8 * 1024, "caddy": 64 * 1024, "haproxy": 15 * 1024}
STREAM = {"Accept": "text/event-stream"}
SECRET, TOKEN = "s" * 40, "p" * 40
TIMEOUTS = "proxy_read_timeout|read_timeout|timeout server|timeout client"
# How long the old configuration may last beside the new one.
GRACES = "worker_shutdown_timeout|grace_period|hard-stop-after"


@pytest.fixture(params=FILES)
def kind(request):
    """Each proxy in turn."""
    return request.param


@pytest.fixture
def folder(home, channel):
    """Where the proxies' users reach the relay's socket."""
    path = home / f"proxies-{channel}"
    path.mkdir()
    return path


@contextmanager
def behind(kind, folder, certificate, *flags, text=None, **variables):
    """A relay of one worker, and the proxy in front of it."""
    path = folder / f"{os.urandom(4).hex()}.sock"
    variables = {"RELAY_TRUSTED_PROXIES": "unix", **variables}
    with (
        Relay(folder, "--workers", "1", *flags, unix_socket=str(path), **variables) as relay,
        Front(kind, folder, certificate, path, text) as front,
    ):
        yield relay, front


def over_tcp(text, port):
    """The configuration for a relay at a port."""
    return re.sub(r"unix(:|/|@)/run/[\w/.-]+", f"127.0.0.1:{port}", text)


def test_events_pass_at_once(kind, folder, certificate, redis_server, channel):
    """Each is there before the next is sent, however small, compressed or not, over HTTP/2 and HTTP/1.1."""
    ways = {
        "HTTP/2": (),
        "HTTP/2 gzip": ("--compressed",),
        "HTTP/1.1": ("--http1.1",),
        "HTTP/1.1 gzip": ("--http1.1", "--compressed"),
    }
    with behind(kind, folder, certificate, **redis_server.environment) as (relay, front), ExitStack() as stack:
        visits = {way: stack.enter_context(front.visit(f"/channel={channel}", *flags)) for way, flags in ways.items()}
        until(lambda: relay.log.count(f"on {channel}") == len(ways), "the streams are open")
        for data in ("x", "y" * 2000, "z"):
            redis_server.publish(channel, json.dumps({"data": data}))
            assert {way: visit.next() for way, visit in visits.items()} == dict.fromkeys(ways, data)
        for way, visit in visits.items():
            protocol, status, headers = visit.head
            assert (protocol, status) == (way.split()[0], "200")
            assert headers["content-type"] == "text/event-stream"
            assert headers["cache-control"] == "no-store, no-transform"
            assert headers.get("content-encoding") == ("gzip" if "gzip" in way else None)
            assert headers["vary"] == "Accept-Encoding"


def test_idle_streams_live_on(kind, folder, certificate, redis_server, channel):
    """The heartbeat keeps one open for longer than the proxy waits; without a heartbeat in that time it is cut."""
    text, count = re.subn(rf"^(\s*(?:{TIMEOUTS})) 60s", r"\1 4s", configuration(kind), flags=re.MULTILINE)
    assert count > 0
    with ExitStack() as stack:
        visits = []
        for heartbeat in (1, 3600):
            flags = ("--workers", "1", "--heartbeat", heartbeat)
            relay = stack.enter_context(Relay(folder, *flags, **redis_server.environment))
            front = stack.enter_context(Front(kind, folder, certificate, text=over_tcp(text, relay.port)))
            visits.append(stack.enter_context(front.visit(f"/channel={channel}")))
        alive, cut = visits
        cut.wait_end()
        # What the proxy waits for has passed by now.
        for _ in range(5):
            alive.next(b":\n")
        redis_server.publish(channel, "still there")
        assert alive.next() == "still there"


def test_timeouts_are_longer_than_the_heartbeat(kind):
    """By the default of both, and with room."""
    heartbeat = next(field.default for field in FIELDS if field.name == "heartbeat")
    waits = re.findall(rf"^\s*(?:{TIMEOUTS}) (\d+)s", configuration(kind), re.MULTILINE)
    assert waits
    assert min(map(int, waits)) > 2 * heartbeat


def test_address_is_the_browsers(kind, folder, certificate, redis_server, channel):
    """In the log and for the limit; what the browser itself says of it counts for nothing."""
    # A page that leaves is not noticed by a heartbeat.
    flags = ("--max-connections-per-ip", "1", "--heartbeat", "3600")
    path = f"/channel={channel}"

    def visit(address, says, headers=STREAM):
        return front.visit(path, "--interface", address, headers=headers | {"X-Forwarded-For": says})

    with behind(kind, folder, certificate, *flags, **redis_server.environment) as (relay, front):
        for address in ("127.0.0.2", "127.0.0.3"):
            with visit(address, "6.6.6.6") as first:
                first.next(b": sse-relay-server")
                until(lambda address=address: f"stream opened: {address} on {channel}" in relay.log, "it is in the log")
                for says in ("7.7.7.7", "127.0.0.9, unix"):
                    assert visit(address, says).read().startswith(": not now\nretry: ")
                # The relay's own words pass as they are.
                refused = visit(address, "8.8.8.8", {"Accept": "*/*", "Origin": "https://shop.example"})
                assert f"{address} has 1 streams (RELAY_MAX_CONNECTIONS_PER_IP)\n" == refused.read()
                assert (refused.status, refused.headers["access-control-allow-origin"]) == (503, "*")
            until(lambda address=address: re.search(f"stream ended after .*{address}", relay.log), "it is noticed")
        assert not re.search(r"6\.6\.6\.6|7\.7\.7\.7|8\.8\.8\.8|unix on", relay.log)


def test_request_passes_whole(kind, folder, certificate, kept_redis, channel):
    """Channel, token in each place, origin, last id, and events to publish; nothing of the admin listener."""
    name = f"{channel}/ä//b/../c %2F?+"
    path = f"/channel={quote(name, safe='')}"
    token = subscribe_token([name, "status"], ttl=600, key=SECRET)
    variables = kept_redis.environment | {"RELAY_JWT_SECRET": SECRET, "RELAY_PUBLISH_TOKEN": TOKEN}
    page = {"Origin": "https://shop.example", **STREAM}
    flags = ("--allowed-origins", page["Origin"], "--admin-port", free_port())
    with behind(kind, folder, certificate, *flags, **variables) as (relay, front):
        with front.visit(path, "-b", f"a=1; relay_token={token}; b=2", headers=page) as first:
            last = first.next(b"id: ")
            assert first.headers["access-control-allow-origin"] == page["Origin"]
            assert first.headers["access-control-allow-credentials"] == "true"
            for number in range(3):
                answer = front.visit(
                    path, "-d", f'{{"data": "{number}"}}', headers={"Authorization": f"Bearer {TOKEN}"}
                )
                assert (answer.read(), answer.status) == ("", 202)
                assert first.next() == str(number)
        for sent, query in (({"Authorization": f"Bearer {token}"}, ""), ({}, f"?token={token}")):
            with front.visit(path + query, headers=page | sent | {"Last-Event-ID": last}) as again:
                assert [again.next() for _ in range(3)] == ["0", "1", "2"]
        with front.visit(path, "-I", headers={"Authorization": f"Bearer {token}"}) as head:
            head.read()
            assert (head.status, head.headers["content-type"]) == (200, "text/event-stream")
        refused = [front.visit(path, headers=sent) for sent in ({}, page, page | {"Origin": "https://other.example"})]
        for answer in refused:
            answer.read()
        assert [answer.status for answer in refused] == [401, 401, 403]
        assert "RelaySource" in front.visit("/relay.js", "--compressed").read()
        assert front.visit("/healthz").read() == "ok\n"
        # There the admin listener has other answers.
        with front.visit("/status", headers={"Authorization": f"Bearer {token}"}) as status:
            assert status.next(b": sse-relay-server") == ""
        with front.visit(f"{path}?token={token}&{'x' * (LONGEST[kind] - 1000)}", headers=page) as long:
            assert long.next(b": sse-relay-server") == ""
        nothing = front.visit("/")
        nothing.read()
        assert nothing.status == 404
        if kind != "caddy":
            logged = re.compile(r"GET /channel=.* ([0-9a-f-]{32,36})$", re.MULTILINE)
            until(
                lambda: any(f", request {each}" in relay.log for each in logged.findall(front.access_log.read_text())),
                "a stream's id is in both logs",
            )
        for log in (relay.log, front.access_log.read_text(), front.log_path.read_text()):
            assert token not in log


def test_page_is_told_to_come_back_while_there_is_no_relay(kind, folder, certificate, redis_server, channel):
    """As the relay itself says it, to pages of any origin and at times that differ; all others get an error."""
    path = folder / "relay.sock"
    with Front(kind, folder, certificate, path) as front:
        waits = set()
        for sent in (STREAM, STREAM | {"Origin": "https://shop.example"}) * 3:
            visit = front.visit(f"/channel={channel}", headers=sent)
            comment, retry, *rest = visit.read().split("\n")
            assert (comment, rest) == (": not now", ["", ""])
            waits.add(int(retry.removeprefix("retry: ")))
            assert visit.status == 200
            assert visit.headers["content-type"] == "text/event-stream"
            assert visit.headers["cache-control"] == "no-store, no-transform"
            assert visit.headers.get("access-control-allow-origin") == sent.get("Origin")
        assert len(waits) > 1
        assert all(2000 <= wait <= 5000 for wait in waits)
        # Over HTTP/2 HAProxy may take the stream back before curl has sent its event.
        for flags in ((), ("--http1.1", "-d", '{"data": "x"}')):
            answer = front.visit(f"/channel={channel}", *flags)
            answer.read()
            assert answer.status in {502, 503}
        # Nothing is remembered against it.
        flags = ("--workers", "1")
        with (
            Relay(folder, *flags, unix_socket=str(path), **redis_server.environment),
            front.visit(f"/channel={channel}", headers=STREAM) as visit,
        ):
            visit.next(b": sse-relay-server")


def shown(kind, holding):
    """What docs/proxies.md has for another case."""
    return block(LANGUAGES[kind], holding, PAGE_OF_DOCS)


def in_place_of(old, new, text):
    """``text`` with whole lines replaced, which are there once."""
    found = re.findall(rf"^[ \t]*{old}\n", text, re.MULTILINE)
    assert len(found) == 1, (old, found)
    return text.replace(found[0], new)


def on_the_sites_domain(kind):
    text = configuration(kind)
    if kind == "nginx":
        text = text.replace("    map ", shown(kind, "map $request_uri") + "    map ")
        return in_place_of(r"location / \{\n\s+proxy_pass http://relay;", shown(kind, "location /events/"), text)
    if kind == "caddy":
        (old,) = re.findall(r"^\treverse_proxy .*?^\t}\n", text, re.MULTILINE | re.DOTALL)
        return text.replace(old, shown(kind, "handle_path").replace("\t# reverse_proxy ... as it is\n", old))
    text = in_place_of("default_backend relay", shown(kind, "use_backend"), text)
    return in_place_of("backend relay", shown(kind, "set-path"), text)


def test_relay_on_the_sites_domain(kind, folder, certificate, redis_server, channel, site):
    """All of it is below a path, whatever a channel is called; the rest is the site's."""
    site.page = "the site"
    name = f"{channel}/ä//b/../c %2F?+"
    text = on_the_sites_domain(kind).replace("127.0.0.1:8000", f"127.0.0.1:{site.server_port}")
    with behind(kind, folder, certificate, text=text, **redis_server.environment) as (_, front):
        with (
            front.visit(f"/events/channel={quote(name, safe='')}", headers=STREAM) as one,
            front.visit(f"/events/events?channel={quote(name, safe='')}&channel=other", headers=STREAM) as two,
        ):
            for visit in (one, two):
                visit.next(b": sse-relay-server")
            redis_server.publish(name, "hello")
            assert [one.next(), two.next()] == ["hello"] * 2
        assert "RelaySource" in front.visit("/events/relay.js").read()
        for path in ("/", "/eventsource", f"/channel={channel}"):
            assert front.visit(path).read() == "the site"
    with Front(kind, folder, certificate, folder / "none.sock", text) as front:
        assert front.visit("/events/channel=x", headers=STREAM).read().startswith(": not now\nretry: ")


def test_several_relays(kind, folder, certificate, redis_server, channel):
    """Streams go to the one with the fewest, and past one that does not answer."""
    old = {
        "nginx": f"server unix:{SOCKET};",
        "caddy": rf"reverse_proxy unix/{SOCKET} \{{",
        "haproxy": f"server relay unix@{SOCKET}",
    }
    text = in_place_of(old[kind], shown(kind, "10.0.0.3"), configuration(kind))
    environment = redis_server.environment | {"RELAY_TRUSTED_PROXIES": "127.0.0.1"}
    with ExitStack() as stack:
        relays = [stack.enter_context(Relay(folder, "--workers", "1", **environment)) for _ in range(2)]
        for number, relay in enumerate(relays):
            text = text.replace(f"10.0.0.{number + 2}:8001", f"127.0.0.1:{relay.port}")
        front = stack.enter_context(Front(kind, folder, certificate, text=text))

        def visit():
            visit = stack.enter_context(front.visit(f"/channel={channel}", headers=STREAM))
            visit.next(b": sse-relay-server")
            return visit

        visits = [visit() for _ in range(6)]
        until(
            lambda: [relay.log.count("stream opened: 127.0.0.1 on") for relay in relays] == [3, 3], "each has its half"
        )
        relays[0].stop()
        visits = [visit() for _ in range(4)]
        redis_server.publish(channel, "hello")
        assert [visit.next() for visit in visits] == ["hello"] * 4


def test_pages_outlive_all_that_happens(folder, certificate, kept_redis, channel, site, browse):
    """
    Behind each proxy twenty EventSources of one page, which takes HTTP/2: none gives up, and none misses an event.

    While a worker is killed, all are replaced, the proxies are reloaded, and the relay is away.
    """
    path = folder / "relay.sock"
    site.page = crowd.PAGE
    flags = ("--workers", "2", "--allowed-origins", site.url)

    def start():
        return Relay(folder, *flags, unix_socket=str(path), RELAY_TRUSTED_PROXIES="unix", **kept_redis.environment)

    with ExitStack() as stack:
        relay = stack.enter_context(start())
        fronts = []
        for kind in FILES:
            text, count = re.subn(rf"({GRACES}) \d+s", r"\1 1s", configuration(kind))
            assert count == 1
            fronts.append(stack.enter_context(Front(kind, folder, certificate, path, text)))
        urls = [(front.kind, f"https://{NAME}:{front.port}/channel={channel}") for front in fronts]
        page = browse(
            f"{site.url}/#{quote(json.dumps(urls))}",
            "--ignore-certificate-errors",
            f"--host-resolver-rules=MAP {NAME} 127.0.0.1",
        )
        many = crowd.Crowd(page, kept_redis, channel)
        many.publish("first")
        many.until_all_has_come()

        os.kill(relay.workers()[0], signal.SIGKILL)
        many.publish("a worker was killed")
        until(lambda: any(sum(errors) for errors in many.errors().values()), "its streams have ended")
        many.until_all_has_come()

        def replace_workers():
            relay.signal(signal.SIGHUP)

        many.disturb(replace_workers)
        many.until_all_has_come()

        def reload_proxies():
            for front in fronts:
                front.reload()

        # Caddy leaves them open.
        many.disturb(reload_proxies, ["nginx", "haproxy"])
        many.until_all_has_come()

        many.disturb(relay.stop)
        # What the proxy says in the relay's place is a stream, too.
        opened = {kind: sum(many.told(kind, "opened")) for kind in FILES}
        many.until_each(lambda kind: sum(many.told(kind, "opened")) > opened[kind], "a page has asked")
        relay = stack.enter_context(start())
        many.until_all_has_come()
