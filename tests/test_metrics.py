"""/metrics of running relays: each number is that of what happened, whatever becomes of the workers."""

import json
import os
import signal
import subprocess

import httpx
from pages import Page
from programs import program
from relay import COMMAND, ROOT, watched
from servers import RedisServer, until

from tornado_relay import __version__, subscribe_token
from tornado_relay.counts import GAUGES, METRICS, PROBE


def named(metrics, name):
    """The samples of one name, by their label."""
    return {label[0] if label else "": value for (found, *label), value in metrics.items() if found == name}


def counted(relay, name):
    """The samples of one counter that are not 0."""
    return {label: value for label, value in named(relay.metrics(), f"sse_relay_{name}_total").items() if value}


def test_metrics_count_over_all_workers(broker, tmp_path, pages):
    """Whichever worker is asked tells of all of them, at once."""
    with watched(tmp_path, workers=2, **broker.environment) as relay:
        paths = ["/channel=orders"] * 30 + ["/channel=stock"] * 10 + ["/events?channel=orders&channel=news"] * 5
        opened = pages.open(relay.relay.port, paths)
        for page in opened[:3]:
            pages.close(page)
        until(lambda: counted(relay, "streams_closed") == {"client": 3}, "those that left are noticed")
        broker.publish("orders", "x" * 100)
        broker.publish("stock", "hello")
        pages.until(lambda: all(page.events for page in opened[3:]), "the events, by all")
        until(lambda: sum(named(relay.metrics(), "sse_relay_channels").values()) >= 3, "a tick")
        told = relay.metrics()
    kind = "postgres" if "DATABASE_URL" in broker.environment else "redis"
    assert {frozenset(labels) for name, *labels in told if name == "sse_relay_info"} == {frozenset([__version__, kind])}
    assert sum(named(told, "sse_relay_streams").values()) == 42
    assert told["sse_relay_streams_opened_total",] == 45
    assert told["sse_relay_deliveries_total",] == 42
    assert told["sse_relay_delivered_bytes_total",] == 32 * len(f"data: {'x' * 100}\n\n") + 10 * len("data: hello\n\n")
    assert 2 <= told["sse_relay_events_received_total",] <= 4
    # Each stream got one event, of which there were at most two passes a worker.
    assert told["sse_relay_delivery_latency_seconds_count",] == 42
    assert told["sse_relay_delivery_latency_seconds_bucket", "+Inf"] == 42
    assert told["sse_relay_delivery_latency_seconds_sum",] > 0
    assert 2 <= told["sse_relay_fanout_seconds_count",] <= 4
    for name in ("worker_up", "broker_up"):
        assert named(told, f"sse_relay_{name}") == {"0": 1, "1": 1}
    assert all(number > 42 for number in named(told, "sse_relay_streams_capacity").values())
    for name in ("resident_memory_bytes", "cpu_seconds_total", "open_fds", "max_fds"):
        assert named(told, f"process_{name}").keys() == {"0", "1", "parent"}


def test_all_there_is_is_shown(redis_server, tmp_path):
    """In the form of each of Prometheus' parsers; its own linter has nothing to say."""
    with watched(tmp_path, **redis_server.environment) as relay:
        names = {name for name, *_ in relay.metrics()}
        answer = httpx.get(f"{relay.url}/metrics")
        modern = httpx.get(f"{relay.url}/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
        head = httpx.head(f"{relay.url}/metrics")
    for metric in METRICS:
        assert f"sse_relay_{metric.name}{'_count' if metric.bounds else '_total'}" in names
    # The probe has not been sent yet.
    assert {f"sse_relay_{gauge.name}" for gauge in GAUGES if gauge is not PROBE} <= names
    assert answer.headers["Content-Type"].startswith("text/plain")
    assert modern.headers["Content-Type"].startswith("application/openmetrics-text")
    assert modern.text.endswith("# EOF\n")
    assert (head.status_code, head.text) == (200, "")
    check = [program("promtool"), "check", "metrics"]
    done = subprocess.run(check, input=answer.text, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_no_sum_falls_when_a_worker_is_killed(redis_server, tmp_path, pages):
    """What it has counted stays, its streams have died, and the next one counts on."""
    with watched(tmp_path, workers=2, **redis_server.environment) as relay:
        opened = pages.open(relay.relay.port, ["/channel=x"] * 20)
        redis_server.publish("x", "1")
        pages.until(lambda: all(page.events for page in opened), "the event")
        lost = named(relay.metrics(), "sse_relay_streams")["0"]
        os.kill(relay.status()["workers"][0]["pid"], signal.SIGKILL)
        until(lambda: counted(relay, "worker_restarts") == {"died": 1}, "it is missed")
        told = relay.metrics()
        assert named(told, "sse_relay_streams")["0"] == 0
        assert told["sse_relay_deliveries_total",] == told["sse_relay_streams_opened_total",] == 20
        assert counted(relay, "streams_closed") == {"died": lost}
        until(lambda: named(relay.metrics(), "sse_relay_worker_up") == {"0": 1, "1": 1}, "the next one serves")
        pages.open(relay.relay.port, ["/channel=x"] * 20)
        told = relay.metrics()
        assert told["sse_relay_streams_opened_total",] == 40
        assert told["sse_relay_deliveries_total",] == 20
        assert sum(named(told, "sse_relay_streams").values()) == 40 - lost


def test_reload_counts_on(redis_server, tmp_path, pages):
    """The streams of both workers of a place, as long as there are two; and the reload, also one that is refused."""
    with watched(tmp_path, "--drain-seconds", "2", workers=1, **redis_server.environment) as relay:
        pages.open(relay.relay.port, ["/channel=x"] * 5)
        relay.relay.signal(signal.SIGHUP)
        until(lambda: counted(relay, "streams_closed"), "the old one drains")
        assert named(relay.metrics(), "sse_relay_streams")["0"] > 0
        until(lambda: counted(relay, "streams_closed") == {"drain": 5}, "all of its streams")
        until(lambda: counted(relay, "reloads") == {"done": 1}, "it is done")
        assert named(relay.metrics(), "sse_relay_worker_up") == {"0": 1}
        (tmp_path / ".env").write_text("RELAY_HEARTBEAT=never\n")
        relay.relay.signal(signal.SIGHUP)
        until(lambda: counted(relay, "reloads") == {"done": 1, "failed": 1}, "the one that is refused")


def test_streams_are_closed_for_a_reason(redis_server, tmp_path, pages):
    """One that reads too slowly, one whose token ends."""
    environment = {"RELAY_JWT_SECRET": "s" * 32, "RELAY_COMPRESSION": "off"}
    with watched(tmp_path, "--client-buffer", "4096", **environment, **redis_server.environment) as relay:
        token = subscribe_token(["x", "y"], ttl=60, key="s" * 32)
        short = subscribe_token(["y"], ttl=2, key="s" * 32)
        slow = pages.add(Page(relay.relay.port, f"/channel=x?token={token}"))
        pages.open(relay.relay.port, [f"/channel=y?token={short}"])
        until(lambda: counted(relay, "streams_opened") == {"": 2}, "both are open")

        def publish():
            redis_server.publish("x", "y" * 100_000)
            return counted(relay, "streams_closed").get("cut")

        until(publish, "the slow one is cut")
        until(lambda: counted(relay, "streams_closed") == {"cut": 1, "expired": 1}, "the token's end")
        pages.close(slow)


def test_refusals_have_a_reason(redis_server, tmp_path, pages):
    """Each of those that there may be at one relay, by either way in."""
    environment = redis_server.environment | {
        "RELAY_MAX_CONNECTIONS": "3",
        "RELAY_MAX_CONNECTIONS_PER_IP": "1",
        "RELAY_JWT_SECRET": "s" * 32,
        "RELAY_TRUSTED_PROXIES": "127.0.0.1",
        "ALLOWED_ORIGINS": "https://shop.example",
    }
    with watched(tmp_path, workers=1, **environment) as relay:
        path = f"/channel=x?token={subscribe_token(['x'], ttl=60, key='s' * 32)}"
        clients = [{"X-Forwarded-For": f"10.0.0.{n}"} for n in range(4)]
        pages.open(relay.relay.port, ["/channel=x", path.replace("=x", "=z")])
        pages.open(relay.relay.port, [path], {"Origin": "https://evil.example"})
        pages.open(relay.relay.port, ["/events", "/events?channel=%00"])
        for client in clients:
            pages.open(relay.relay.port, [path], client)
        assert counted(relay, "refusals") == {"full": 1, "token": 1, "channel": 1, "origin": 1, "request": 2}
    with watched(tmp_path, workers=1, **environment | {"RELAY_MAX_CONNECTIONS": "0"}) as relay:
        pages.open(relay.relay.port, [path] * 3)
        assert counted(relay, "refusals") == {"address": 2}


def test_worker_without_descriptors(redis_server, tmp_path, pages):
    """What it refuses, and how many streams it has descriptors for."""
    narrow = (program("prlimit"), "--nofile=300", COMMAND)
    with watched(tmp_path, workers=1, command=narrow, **redis_server.environment) as relay:
        (capacity,) = named(relay.metrics(), "sse_relay_streams_capacity").values()
        pages.open(relay.relay.port, ["/channel=x"] * int(capacity))
        pages.open(relay.relay.port, ["/channel=x"])
        told = relay.metrics()
        assert counted(relay, "refusals") == {"descriptors": 1}
        assert named(told, "process_max_fds")["0"] == 300
        assert capacity < named(told, "process_open_fds")["0"] < 300


def test_broker_that_goes_and_comes(home, tmp_path, channel, pages):
    """It is down in each worker, streams are refused for it, and told of it when it is back."""
    folder = home / f"metrics-{channel}"
    folder.mkdir()
    with RedisServer(folder) as server, watched(tmp_path, workers=2, **server.environment) as relay:
        page, *_ = pages.open(relay.relay.port, ["/channel=x"] * 3)
        server.stop()
        until(lambda: named(relay.metrics(), "sse_relay_broker_up") == {"0": 0, "1": 0}, "it is missed")
        pages.open(relay.relay.port, ["/channel=x"] * 2)
        assert counted(relay, "refusals") == {"broker": 2}
        server.start()
        until(lambda: counted(relay, "broker_reconnects") == {"": 2}, "it is back", 40)
        assert named(relay.metrics(), "sse_relay_broker_up") == {"0": 1, "1": 1}
        pages.until(lambda: page.events, "the reset")
        assert counted(relay, "resets") == {"broker-reconnect": 3}
        until(lambda: named(relay.metrics(), "sse_relay_broker_probe_seconds"), "a probe", 40)


def test_replays_and_resets(kept, tmp_path, pages, channel):
    """A stream that comes back gets what it missed, or is told that this is not known."""
    with watched(tmp_path, workers=1, **kept.environment) as relay:
        (page,) = pages.open(relay.relay.port, [f"/channel={channel}"])
        kept.publish(channel, "one", "two")
        pages.until(lambda: page.data == ["one", "two"], "both")
        first = page.events[0].id
        assert counted(relay, "replays") == {}
        (back,) = pages.open(relay.relay.port, [f"/channel={channel}"], {"Last-Event-ID": first})
        pages.until(lambda: back.data == ["two"], "the second again")
        pages.open(relay.relay.port, [f"/channel={channel}"], {"Last-Event-ID": "nobody-knows-it"})
        told = relay.metrics()
        assert told["sse_relay_replays_total",] == 1
        assert told["sse_relay_replayed_bytes_total",] >= len("data: two\n\n")
        assert counted(relay, "resets") == {"unknown-id": 1}


def test_events_over_http_are_counted(redis_server, tmp_path):
    """Those that were accepted, and those that were not for what they are or who sent them."""
    with watched(tmp_path, RELAY_PUBLISH_TOKEN="t" * 20, **redis_server.environment) as relay:

        def post(body, token="t" * 20):
            headers = {"Authorization": f"Bearer {token}"}
            return httpx.post(f"{relay.relay.url}/channel=x", content=body, headers=headers).status_code

        statuses = [
            post(json.dumps({"data": "1"})),
            post("{"),
            post(json.dumps({"data": "1", "id": "\0"})),
            post("{}", "no"),
        ]
        assert statuses == [202, 400, 400, 401]
        assert counted(relay, "publishes") == {"accepted": 1, "refused": 3}
        assert counted(relay, "refusals") == {}


def test_channels_are_named_only_if_asked_for(redis_server, tmp_path, pages):
    """With the streams of each, over all workers."""
    with watched(tmp_path, workers=2, **redis_server.environment) as relay:
        pages.open(relay.relay.port, ["/channel=orders"] * 5 + ['/channel=sto"ck'])
        assert named(relay.metrics(), "sse_relay_channel_streams") == {}
        assert "orders" not in httpx.get(f"{relay.url}/metrics").text
        assert named(relay.metrics(channels="1"), "sse_relay_channel_streams") == {"orders": 5, 'sto"ck': 1}


def test_worker_that_is_stopped_is_not_up(redis_server, tmp_path, pages):
    """The others tell of it, with what it has counted, and nobody waits for it."""
    with watched(tmp_path, workers=2, **redis_server.environment) as relay:
        pages.open(relay.relay.port, ["/channel=x"] * 20)
        streams = named(relay.metrics(), "sse_relay_streams")
        victim = relay.status()["workers"][1]["pid"]
        os.kill(victim, signal.SIGSTOP)
        until(lambda: named(relay.metrics(), "sse_relay_worker_up") == {"0": 1, "1": 0}, "it is missed")
        assert named(relay.metrics(), "sse_relay_streams") == streams
        until(lambda: counted(relay, "worker_restarts") == {"stuck": 1}, "it is killed", 40)


def test_without_the_library_it_is_named(redis_server, tmp_path):
    """With the extra that has it; the rest of the listener works."""
    missing = 'raise ModuleNotFoundError("not here", name="prometheus_client")'
    (tmp_path / "prometheus_client.py").write_text(missing)
    with watched(tmp_path, PYTHONPATH=f"{tmp_path}:{ROOT}", **redis_server.environment) as relay:
        answer = httpx.get(f"{relay.url}/metrics")
        assert answer.status_code == 501
        assert answer.text == "prometheus_client is not installed; install sse-relay-server[metrics]\n"
        assert relay.status()["streams"] == 0
        assert "Traceback" not in relay.relay.log
