"""relay.js in a real Chromium: one connection for all tabs, and nothing lost or doubled whatever ends."""

import gzip
import json
import os
import shutil
import signal
import subprocess
from urllib.parse import quote

import httpx
import pytest
from conftest import Kept
from programs import program
from relay import ROOT, Relay, run
from servers import PATIENCE, accepts, free_port, until
from test_eventsource import RETRIES
from test_readme import block

from tornado_relay import subscribe_token

SECRET = "s" * 64

PAGE = """<!doctype html><meta charset="utf-8"><title>page</title>
<script>
  const [script, url, options] = JSON.parse(decodeURIComponent(location.hash.slice(1)))
  window.seen = []
  window.states = []
  eval(options.before ?? "")
</script>
<script>document.write(`<script src="${script}"><` + "/script>")</script>
<script>
  const source = new RelaySource(url, { ...options, token: options.token && (async () => (await fetch(options.token)).text()) })
  source.onopen = () => states.push("open")
  source.onerror = () => states.push(source.readyState == RelaySource.CLOSED ? "closed" : "away")
  const show = e => seen.push([e.type, e.data, e.lastEventId])
  for (const type of ["message", "stream-reset", "STOP", "named"]) source.addEventListener(type, show)
</script>"""


@pytest.fixture
def site(site):
    site.page = PAGE
    return site


@pytest.fixture
def tab(site, browser):
    """Open a tab whose source listens to ``url``; the script comes from ``base``."""

    def tab(base, path, **options):
        hash_ = quote(json.dumps([f"{base}/relay.js", base + path, options]))
        return browser.tab(f"{site.url}/page#{hash_}")

    return tab


@pytest.fixture
def running(site, tmp_path):
    """Start a relay that the site's pages may listen to."""
    started = []

    def running(environment, *flags, **more):
        flags = ("--workers", "2", "--allowed-origins", site.url, *flags)
        started.append(Relay(tmp_path, *flags, **environment, **more).__enter__())
        return started[-1]

    yield running
    for relay in started:
        relay.stop()


def seen(tab):
    return tab.evaluate("window.seen") or []


def data(tab):
    return [text for kind, text, _ in seen(tab) if kind == "message"]


def states(tab):
    return tab.evaluate("window.states") or []


def is_open(tab):
    return states(tab)[-1:] == ["open"]


def streams(relay):
    return relay.log.count("stream opened") - relay.log.count("stream ended")


def test_files(relay):
    """Under 4 KB compressed, kept by browsers for minutes and then asked for anew by its ETag, and loaded by any page."""
    plain, packed = (httpx.get(f"{relay.url}/relay.js", headers={"Accept-Encoding": coding}) for coding in ("", "gzip"))
    assert plain.text == packed.text
    assert int(packed.headers["content-length"]) < 4096
    assert len(gzip.compress(plain.content)) < 4096
    assert "//" not in plain.text.replace("https://", "")
    for answer in (plain, packed):
        assert answer.headers["content-type"] == "text/javascript; charset=UTF-8"
        assert answer.headers["cache-control"] == "public, max-age=300"
        assert answer.headers["access-control-allow-origin"] == "*"
        assert answer.headers["cross-origin-resource-policy"] == "cross-origin"
        assert "Accept-Encoding" in answer.headers["vary"]
    again = httpx.get(f"{relay.url}/relay.js", headers={"If-None-Match": packed.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert "class RelaySource" in httpx.get(f"{relay.url}/relay.d.ts").text


def test_eight_tabs_have_one_connection(kept, running, tab, channel):
    """On channels of their own; the leading tab is closed amid events, and each of the others has each of its own once."""
    relay = running(kept.environment)
    names = [f"{channel}-{number % 3}" for number in range(8)]
    tabs = []
    for name in names:
        tabs.append(tab(relay.url, f"/channel={name}"))
        until(lambda: is_open(tabs[-1]), "the tab is connected", seconds=40)
    until(lambda: streams(relay) == 1, "one stream")
    for number in range(60):
        kept.publish(f"{channel}-{number % 3}", str(number))
        if number == 30:
            until(lambda: data(tabs[0]), "the first tab has something")
            tabs.pop(0).close()
            names.pop(0)
    for name, each in zip(names, tabs, strict=True):
        expected = [str(number) for number in range(60) if name == f"{channel}-{number % 3}"]
        until(lambda each=each, expected=expected: len(data(each)) >= len(expected), "all events")
        assert data(each) == expected
        assert all(kind == "message" for kind, _, _ in seen(each))
    until(lambda: streams(relay) == 1, "one stream")


def test_without_history_nothing_is_disturbed(broker, running, tab, channel):
    """A tab on another channel has a stream of its own; when the leader goes, what may have been missed is told."""
    relay = running(broker.environment)
    first = tab(relay.url, f"/channel={channel}")
    until(lambda: is_open(first), "the first tab is connected", seconds=40)
    others = [tab(relay.url, f"/channel={name}") for name in (channel, f"{channel}-2")]
    until(lambda: all(map(is_open, others)), "all are")
    assert streams(relay) == 2
    broker.publish(channel, "1")
    until(lambda: data(first) == data(others[0]) == ["1"], "the event is on both")
    first.close()
    until(lambda: all(seen(each)[-1:] and seen(each)[-1][0] == "stream-reset" for each in others), "they are told")
    broker.publish(channel, "2")
    broker.publish(f"{channel}-2", "3")
    until(lambda: [data(each) for each in others] == [["1", "2"], ["3"]], "the next events")
    assert streams(relay) == 1


def test_tab_that_comes_later_needs_no_connection(kept, running, tab, channel):
    """It gets what its page was rendered before from the leader, and what is older by a new connection."""
    relay = running(kept.environment)
    first = tab(relay.url, f"/channel={channel}")
    until(lambda: is_open(first), "the first tab is connected", seconds=40)
    kept.publish(channel, *map(str, range(5)))
    until(lambda: len(seen(first)) == 5, "the events")
    ids = [event_id for _, _, event_id in seen(first)]
    later = tab(relay.url, f"/channel={channel}?last_event_id={ids[1]}")
    until(lambda: data(later) == ["2", "3", "4"], "what it missed")
    assert relay.log.count("stream opened") == 1
    kept.publish(channel, *map(str, range(5, 100)))
    until(lambda: len(seen(later)) == 98, "more events than are kept by the leader")
    last = tab(relay.url, f"/channel={channel}?last_event_id={ids[3]}")
    until(lambda: data(last) == [str(number) for number in range(4, 100)], "what it missed")
    assert data(first) == [str(number) for number in range(100)]
    assert data(later) == [str(number) for number in range(2, 100)]
    assert streams(relay) == 1


def test_more_channels_than_a_stream_takes(kept, running, tab, channel):
    """They are on two."""
    relay = running(kept.environment)
    names = [[f"{channel}-{number}" for number in range(start, start + 60)] for start in (0, 60)]
    tabs = [tab(relay.url, "/events?" + "&".join(f"channel={name}" for name in half)) for half in names]
    until(lambda: all(map(is_open, tabs)), "both are connected", seconds=40)
    for half in names:
        kept.publish(half[-1], "hello")
    until(lambda: all(data(each) == ["hello"] for each in tabs), "each has its own")
    assert streams(relay) == 2


def test_deploy_behind_nginx(kept, running, tab, channel, tmp_path):
    """While the relay is away nginx answers 502, at which EventSource gives up; every tab has all by itself afterwards."""
    port, relay_port = free_port(), free_port()
    (tmp_path / "nginx.conf").write_text(
        f"pid {tmp_path}/pid; error_log {tmp_path}/error.log; daemon off; events {{}}\n"
        f"http {{ access_log {tmp_path}/access.log; proxy_temp_path {tmp_path}/b; server {{ listen 127.0.0.1:{port}; location / {{"
        f" proxy_pass http://127.0.0.1:{relay_port}; proxy_http_version 1.1; proxy_buffering off; }} }} }}\n"
    )
    relay = running(kept.environment, port=relay_port)
    command = [program("nginx"), "-c", tmp_path / "nginx.conf", "-e", tmp_path / "error.log"]
    nginx = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        base = f"http://127.0.0.1:{port}"
        until(lambda: accepts(port), "nginx listens")
        tabs = [tab(base, f"/channel={channel}") for _ in range(3)]
        until(lambda: all(map(is_open, tabs)), "all are connected", seconds=40)
        kept.publish(channel, "before")
        until(lambda: all(data(each) == ["before"] for each in tabs), "the first event")
        relay.stop()
        until(lambda: " 502 " in (tmp_path / "access.log").read_text(), "nginx answers for the relay", seconds=30)
        kept.publish(channel, "meanwhile", "and again")
        running(kept.environment, port=relay_port)
        until(lambda: all(len(data(each)) == 3 for each in tabs), "they are back", seconds=40)
        assert all(data(each) == ["before", "meanwhile", "and again"] for each in tabs)
        assert all(states(each) == ["open", *["away"] * states(each).count("away"), "open"] for each in tabs)
    finally:
        nginx.terminate()
        nginx.wait(PATIENCE)


def test_many_tokens(kept_redis, running, tab, channel):
    """Each source has its own: one for a channel goes into the address, and one that is too long for a proxy is two."""
    relay = running(kept_redis.environment, RELAY_JWT_SECRET=SECRET)

    def path(name, ttl):
        return f"/channel={name}?token={subscribe_token(name, ttl=ttl, key=SECRET)}"

    page = tab(relay.url, path(channel, 3600))
    until(lambda: is_open(page), "connected", seconds=40)
    names = [channel] * 110 + [f"{channel}-{number}" for number in range(61)]
    urls = [relay.url + path(name, 1000 + number) for number, name in enumerate(names)]
    page.evaluate(f"void (window.more = {json.dumps(urls)}.map(url => new RelaySource(url)))")
    all_open = "[source, ...more].every(one => one.readyState == 1)"
    until(lambda: page.evaluate(all_open) and streams(relay) == 2, "all are open")
    asked = page.evaluate(
        "performance.getEntriesByType('resource').map(one => one.name).filter(url => url.includes('labels'))"
    )
    assert max(map(len, asked)) < 8000
    for worker in relay.workers():
        os.kill(worker, signal.SIGKILL)
    until(lambda: page.evaluate("source.readyState") == 0, "the connection is lost")
    until(lambda: page.evaluate(all_open), "all are back", seconds=40)
    until(lambda: streams(relay) - 2 == 2, "two streams")  # those of the killed workers have no line of their end


def test_token_that_runs_out(kept, running, tab, site, channel):
    """A new one comes from the page's callback, also where that fails at first, and the stream goes on."""
    relay = running(kept.environment, RELAY_JWT_SECRET=SECRET)
    answers = iter([(500, ""), (200, subscribe_token(channel, key=SECRET))])
    site.answers["/token"] = lambda: next(answers)
    path = f"/channel={channel}?token={subscribe_token(channel, ttl=3, key=SECRET)}"
    before = "const real = fetch; fetch = async (url, init) => { const answer = await real(url, init); if (answer.status == 500) throw Error(); return answer }"
    page = tab(relay.url, path, token="/token", before=before)
    until(lambda: is_open(page), "connected", seconds=40)
    kept.publish(channel, "1")
    until(lambda: data(page) == ["1"], "the first event")
    until(lambda: "away" in states(page), "the token has run out")
    kept.publish(channel, "2")
    until(lambda: data(page) == ["1", "2"], "what came meanwhile", seconds=30)
    assert "closed" not in states(page)
    assert not any(kind == "stream-reset" for kind, _, _ in seen(page))


def test_login_page_is_no_token(kept_redis, running, browser, site, channel):
    """Where the view of the tag's data-refresh leads to a login there is no new token: the source is closed."""
    relay = running(kept_redis.environment, RELAY_JWT_SECRET=SECRET)
    url = f"{relay.url}/channel={channel}?token=x"
    page = f'<script src="{relay.url}/relay.js" data-stream="{url}" data-refresh="/token"></script>'
    site.answers |= {"/shop": lambda: (200, page), "/token": lambda: (302, "/login")}
    opened = browser.tab(f"{site.url}/shop")
    until(lambda: opened.evaluate("window.relay?.readyState") == 2, "it has given up", seconds=40)


def test_refused_tab_harms_no_other(kept, running, tab, channel):
    """Who may not listen is told by CLOSED, at once; the others' connection goes on, each with its own token."""
    relay = running(kept.environment, RELAY_JWT_SECRET=SECRET)

    def path(name, **token):
        return f"/channel={name}?token={subscribe_token(**{'channels': name, 'key': SECRET} | token)}"

    good = [tab(relay.url, path(f"{channel}-{number}")) for number in range(2)]
    until(lambda: all(map(is_open, good)), "connected", seconds=40)
    bad = [
        tab(relay.url, path(f"{channel}-3", channels="another")),
        tab(relay.url, path(f"{channel}-3", key="x" * 64)),
        tab(relay.url, f"/channel={channel}-3"),
    ]
    until(lambda: all(states(each) == ["closed"] for each in bad), "they are refused")
    for number in range(2):
        kept.publish(f"{channel}-{number}", "hello")
    until(lambda: all(data(each) == ["hello"] for each in good), "the others go on")
    assert [states(each) for each in good] == [["open"]] * 2
    assert streams(relay) == 1


def test_page_that_is_loaded_again_goes_on(kept, running, tab, site, channel):
    """What is published while it loads arrives."""
    relay = running(kept.environment)
    meanwhile = []
    site.answers["/meanwhile"] = lambda: (200, str([kept.publish(channel, meanwhile.pop()) for _ in [*meanwhile]]))
    before = "const asked = new XMLHttpRequest(); asked.open('GET', '/meanwhile', false); asked.send()"
    page = tab(relay.url, f"/channel={channel}", before=before)
    until(lambda: is_open(page), "connected", seconds=40)
    kept.publish(channel, "1")
    until(lambda: data(page) == ["1"], "the first event")
    meanwhile.append("2")
    page.reload()
    until(lambda: data(page) == ["2"], "what came meanwhile")


@pytest.fixture
def fresh(postgres_server, channel, tmp_path):
    """A history in which nothing has been published."""
    name = f"fresh_{channel.replace('-', '_')}"
    postgres_server.execute(f"CREATE DATABASE {name}")
    url = postgres_server.url.removesuffix("relay") + name
    assert run("init-db", cwd=tmp_path, DATABASE_URL=url).returncode == 0
    kept = Kept("postgres", postgres_server, url)
    yield kept
    kept.publisher.close()


def test_fresh_history_is_a_position_like_any_other(fresh, running, tab, site, channel):
    """Pages at its position 0 share a connection, and go on from there after a reload."""
    relay = running(fresh.environment)
    until(lambda: "the history is at" in relay.log, "the history is set up")
    zero = fresh.publisher.newest()
    assert zero.endswith("-0")
    meanwhile = []
    site.answers["/meanwhile"] = lambda: (200, str([fresh.publish(channel, meanwhile.pop()) for _ in [*meanwhile]]))
    before = "const asked = new XMLHttpRequest(); asked.open('GET', '/meanwhile', false); asked.send()"
    first = tab(relay.url, f"/channel={channel}?last_event_id={zero}")
    until(lambda: is_open(first), "the first is connected", seconds=40)
    others = [
        tab(relay.url, f"/channel={channel}?last_event_id={zero}"),
        tab(relay.url, f"/channel={channel}", before=before),
    ]
    until(lambda: all(map(is_open, others)), "all are connected")
    assert relay.log.count("stream opened") == 1
    meanwhile.append("1")
    others[1].reload()
    until(lambda: all(data(each) == ["1"] for each in (first, *others)), "each has the event")
    assert streams(relay) == 1


def test_page_that_is_loaded_again_for_a_reset_begins_anew(kept_redis, running, tab, channel):
    """Or it would be told of the same loss again, and load for ever."""
    relay = running(kept_redis.environment)
    before = """
        sessionStorage.loads = +(sessionStorage.loads ?? 0) + 1
        if (sessionStorage.loads == 2)
          for (const key of Object.keys(sessionStorage)) if (key != "loads") sessionStorage[key] = "ffffffff-1"
        addEventListener("load", () => source.addEventListener("stream-reset", () => location.reload()))
    """
    page = tab(relay.url, f"/channel={channel}", before=before)
    until(lambda: is_open(page), "connected", seconds=40)
    kept_redis.publish(channel, "1")
    until(lambda: data(page) == ["1"], "the first event")
    page.reload()
    until(lambda: page.evaluate("sessionStorage.loads") == "3" and is_open(page), "loaded again, and again")
    kept_redis.publish(channel, "2")
    until(lambda: data(page) == ["2"], "the next event")
    assert len(seen(page)) == 1


def test_events_of_every_kind(kept, running, tab, channel):
    """Names, ids of the publisher's own, line ends, and strings of all kinds arrive as they were sent; STOP closes."""
    relay = running(kept.environment)
    page = tab(relay.url, f"/events?channel={channel}&channel={channel}-2")
    until(lambda: is_open(page), "connected", seconds=40)
    texts = [
        "",
        " ",
        "a\nb",
        "a\rb\r\nc\r",
        "\n\n",
        "\0",
        "é🎉\u2028\x85\x0b",
        ": id: data: x",
        "🎉" * 250_000,
        '{"a": [1]}',
    ]
    for text in texts:
        for sep in ("\n", "\r", "\r\n"):
            kept.publish(channel, text, sep=sep)
    kept.publish(f"{channel}-2", "x", event="named", id="own ü")
    kept.publish(channel, "bye", event="STOP")
    kept.publish(channel, "after")
    until(lambda: seen(page) and seen(page)[-1][0] == "STOP", "all")
    expected = [text.replace("\r\n", "\n").replace("\r", "\n") for text in texts for _ in range(3)]
    assert data(page) == expected
    assert seen(page)[-2] == ["named", "x", "own ü"]
    until(lambda: streams(relay) == 0, "it has closed")
    assert page.evaluate("source.readyState") == 2


@pytest.mark.parametrize(
    ("before", "kind"),
    [
        ("Object.defineProperty(navigator, 'locks', { value: undefined })", "RelaySource"),
        (
            "Object.defineProperty(navigator.locks, 'request', { value: () => Promise.reject(new DOMException('', 'SecurityError')) })",
            "RelaySource",
        ),
        ("delete self.TextDecoderStream", "EventSource"),
    ],
)
def test_browser_that_lacks_something(kept_redis, running, tab, channel, before, kind):
    """Each tab has a connection of its own then; where streams cannot be read by fetch() it is a plain EventSource's."""
    relay = running(kept_redis.environment)
    tabs = [tab(relay.url, f"/channel={channel}", before=before) for _ in range(2)]
    until(lambda: all(map(is_open, tabs)), "both are connected", seconds=40)
    assert streams(relay) == 2
    kept_redis.publish(channel, "hello")
    kept_redis.publish(channel, "bye", event="STOP")
    until(lambda: all(len(seen(each)) == 2 for each in tabs), "both events")
    until(lambda: streams(relay) == 0, "both are closed")
    assert [each.evaluate("source.constructor.name") for each in tabs] == [kind] * 2


@pytest.mark.heavy
def test_leader_that_hangs_is_replaced(kept_redis, running, tab, channel):
    """A tab that is stuck leads no longer after half a minute, and nothing is lost; nor doubled when it is back."""
    relay = running(kept_redis.environment)
    stuck = tab(relay.url, f"/channel={channel}")
    until(lambda: is_open(stuck), "the leader is connected", seconds=40)
    other = tab(relay.url, f"/channel={channel}")
    until(lambda: is_open(other), "the other is connected")
    # The answer comes when it hangs already.
    stuck.evaluate(
        "void queueMicrotask(() => setTimeout(() => { const end = Date.now() + 45_000; while (Date.now() < end); }))"
    )
    kept_redis.publish(channel, "1", "2")
    until(lambda: data(other) == ["1", "2"], "the events", seconds=40)
    until(lambda: data(stuck) == ["1", "2"], "it is back", seconds=60)
    kept_redis.publish(channel, "3")
    until(lambda: data(stuck) == data(other) == ["1", "2", "3"], "the next")
    assert streams(relay) == 1


def test_history_that_begins_anew(postgres_server, running, tab, channel, tmp_path):
    """Its numbers are lower than what the page has had: it is told, and takes them all the same."""
    name = f"anew_{channel.replace('-', '_')}"
    postgres_server.execute(f"CREATE DATABASE {name}")
    url = postgres_server.url.removesuffix("relay") + name

    def set_up():
        assert run("init-db", cwd=tmp_path, DATABASE_URL=url).returncode == 0
        return Kept("postgres", postgres_server, url)

    kept = set_up()
    relay = running(kept.environment)
    page = tab(relay.url, f"/channel={channel}")
    until(lambda: is_open(page), "connected", seconds=40)
    kept.publish(channel, *map(str, range(5)))
    until(lambda: len(data(page)) == 5, "the events")
    kept.execute("DROP FUNCTION relay_notify; DROP SCHEMA sse_relay CASCADE")
    kept.publisher.close()
    kept = set_up()
    kept.publish(channel, "new", "and again")
    until(lambda: data(page)[5:] == ["new", "and again"], "the new events")
    assert [json.loads(text)["reason"] for kind, text, _ in seen(page) if kind == "stream-reset"] == ["history-lost"]
    kept.publisher.close()


def test_handler_that_throws(kept_redis, running, tab, channel):
    """Its error is the page's, and neither it nor the other tabs lose an event for it."""
    relay = running(kept_redis.environment)
    tabs = [tab(relay.url, f"/channel={channel}") for _ in range(2)]
    until(lambda: all(map(is_open, tabs)), "both are connected", seconds=40)
    for each in tabs:
        each.evaluate(
            "window.errors = 0; addEventListener('error', () => errors++); source.onmessage = () => { throw Error('mine') }"
        )
    kept_redis.publish(channel, *map(str, range(50)))
    for each in tabs:
        until(lambda each=each: each.evaluate("errors") == 50, "all have been handled")
        assert data(each) == [str(number) for number in range(50)]
        assert states(each) == ["open"]


def test_source_made_later_hears_all(kept_redis, running, tab, channel):
    """In the leading tab too what it missed, and that it is open, comes behind the script that makes it."""
    relay = running(kept_redis.environment)
    page = tab(relay.url, f"/channel={channel}")
    until(lambda: is_open(page), "connected", seconds=40)
    kept_redis.publish(channel, "1", "2", "3")
    until(lambda: len(data(page)) == 3, "the events")
    url = f"{relay.url}/channel={channel}?last_event_id={seen(page)[0][2]}"
    page.evaluate(
        f"window.got = []; window.second = new RelaySource('{url}');"
        "second.onopen = () => got.push('open'); second.onmessage = e => got.push(e.data)"
    )
    until(lambda: page.evaluate("got.length") == 3, "all that it is to hear")
    assert page.evaluate("got") == ["open", "2", "3"]


def test_retry_of_nothing(kept_redis, running, tab, channel):
    """An event's retry: 0 is no reason to come back never, nor at once and for ever."""
    relay = running(kept_redis.environment)
    page = tab(relay.url, f"/channel={channel}")
    until(lambda: is_open(page), "connected", seconds=40)
    kept_redis.publish(channel, "1", retry=0)
    until(lambda: data(page) == ["1"], "the event")
    for worker in relay.workers():
        os.kill(worker, signal.SIGKILL)
    until(lambda: states(page) == ["open", "away", "open"], "it is back", seconds=40)


def test_retry_of_any_length(kept_redis, running, tab):
    """A pause of thousands of digits is none, and the stream goes on."""
    relay = running(kept_redis.environment)
    streams = [
        BEGIN + f"retry: {value}\n\nchannel: {number}\ndata: on\n\n" for number, (value, _) in enumerate(RETRIES)
    ]
    before = f"""
      window.streams = {json.dumps(streams)}
      fetch = async url => new Response(new ReadableStream({{
        start(pieces) {{ pieces.enqueue(new TextEncoder().encode(streams[+new URL(url).searchParams.get("channel")])) }}
      }}))
    """
    page = tab(relay.url, "/channel=0?last_event_id=own", before=before)
    until(lambda: data(page) == ["on"], "the first is read", seconds=40)
    # An id of the page's own shares no connection.
    page.evaluate(f"""void (window.got = streams.map((_, number) => {{
      const source = new RelaySource(`{relay.url}/channel=${{number}}?last_event_id=own`)
      const one = {{ source, data: [] }}
      source.onmessage = e => one.data.push(e.data)
      return one
    }}))""")
    until(lambda: page.evaluate("got.every(one => one.data[0] == 'on')"), "all are read")
    pauses = page.evaluate("got.map(one => [...one.source._line.streams][0].retry)")
    assert pauses == [pause or 3000 for _, pause in RETRIES]


def test_module(kept_redis, running, browser, site, channel):
    """relay.mjs exports what the script sets."""
    relay = running(kept_redis.environment)
    code = f"import {{ RelaySource }} from '{relay.url}/relay.mjs'; const source = new RelaySource('{relay.url}/{channel}')"
    page = f"<script type=module>{code}; source.onmessage = e => document.title = e.data</script>"
    site.answers["/module"] = lambda: (200, page)
    tab = browser.tab(f"{site.url}/module")
    until(lambda: streams(relay) == 1, "connected", seconds=40)
    kept_redis.publish(channel, "hello")
    until(lambda: tab.evaluate("document.title") == "hello", "the event")


def test_script_of_the_readme(kept_redis, running, browser, site):
    """The page as it stands there logs the order's total."""
    relay = running(kept_redis.environment)
    script = block("html", 'new RelaySource("').replace("http://localhost:8001", relay.url)
    site.answers["/shop"] = lambda: (200, script.replace("console.log(", "((total) => document.title = total)("))
    page = browser.tab(f"{site.url}/shop")
    until(lambda: streams(relay) == 1, "connected", seconds=40)
    kept_redis.publish("orders", '{"total": "12.50"}', event="NEW_ORDER")
    until(lambda: page.evaluate("document.title") == "12.50", "the event")


# Of a stream: how it begins, and events with every line end, in one of which a character has four bytes.
BEGIN = (
    ": sse-relay-server\nretry: 3000\nheartbeat: 15\nfolds: 0\n"
    'id: none\nevent: stream-open\ndata: {"id":"none","resumed":false}\n\n'
)
BLOCKS = (
    "channel: {0}\rdata: a\rdata: b\r\rchannel: {0}\r\ndata: 🎉\r\nevent: named\r\n\r\n:\n\nchannel: {0}\ndata:c\n\n"
)


def test_parser_at_every_cut(kept_redis, running, tab):
    """In whatever two pieces a stream's bytes come: what is read of them is the same."""
    relay = running(kept_redis.environment)
    before = f"""
      fetch = async url => {{
        const name = new URL(url).searchParams.get("channel"), cut = +name
        const bytes = new TextEncoder().encode({json.dumps(BEGIN)} + {json.dumps(BLOCKS)}.replaceAll("{{0}}", name))
        return new Response(new ReadableStream({{ async start(pieces) {{
          if (cut) pieces.enqueue(bytes.slice(0, cut))
          await new Promise(done => setTimeout(done))
          pieces.enqueue(bytes.slice(cut))
        }} }}))
      }}
    """
    page = tab(relay.url, "/channel=0", before=before)
    until(lambda: is_open(page), "the first is open", seconds=40)
    cuts = len((BEGIN + BLOCKS.replace("{0}", "100")).encode())
    # An id of the page's own shares no connection.
    page.evaluate(f"""void (window.got = Array.from({{ length: {cuts} }}, (_, cut) => {{
      const events = [], source = new RelaySource(`{relay.url}/channel=${{cut}}?last_event_id=own`)
      for (const type of ["message", "named"]) source.addEventListener(type, e => events.push(type, e.data))
      return events
    }}))""")
    expected = ["message", "a\nb", "named", "🎉", "message", "c"]
    until(lambda: page.evaluate("got.every(events => events.length >= 6)"), "all are read")
    assert page.evaluate("got") == [expected] * cuts


def test_types(tmp_path):
    """They compile strictly, a RelaySource can stand where an EventSource does, and what is wrong is an error."""
    npm, npx = program("npm"), program("npx")
    subprocess.run(
        [npm, "install", "--silent", "--no-audit", "--no-fund", "typescript@5"],
        cwd=tmp_path,
        check=True,
        timeout=PATIENCE * 9,
    )
    shutil.copy(ROOT / "tornado_relay/static/relay.d.ts", tmp_path)
    (tmp_path / "page.ts").write_text(
        """
        import { RelaySource, type StreamReset } from "./relay"

        const source = new RelaySource("/channel=orders", { token: async () => (await fetch("/token/")).text() })
        const show = (event: MessageEvent<string>) => JSON.parse(event.data).total
        source.addEventListener("NEW_ORDER", show)
        source.removeEventListener("NEW_ORDER", show)
        source.addEventListener("stream-reset", (event) => (JSON.parse(event.data) as StreamReset).channels.length)
        source.onmessage = (event) => event.data.length
        source.onerror = () => source.readyState === RelaySource.CLOSED
        const plain: EventSource = source
        // @ts-expect-error: a token is text
        new RelaySource("/channel=orders", { token: () => 1 })
        // @ts-expect-error: there is no such option
        new RelaySource("/channel=orders", { shared: true })
        """
    )
    command = [
        npx,
        "tsc",
        "--noEmit",
        "--strict",
        "--target",
        "es2022",
        "--moduleResolution",
        "bundler",
        "--module",
        "esnext",
    ]
    done = subprocess.run([*command, "page.ts"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
