"""What a running relay logs: who it is about, what happens to streams and requests, and no secret."""

import json
import logging
import re
import signal
import subprocess

import httpx
import pytest
from relay import COMMAND, Relay, environment, run
from servers import PATIENCE, until

from tornado_relay import logs, subscribe_token
from tornado_relay.logs import Throttle

SECRET = "the-secret-of-the-tokens-is-long-enough"


def entries(relay):
    """The lines of a log in JSON."""
    return [json.loads(line) for line in relay.log.splitlines()]


def test_each_line_says_whose_it_is(redis_server, tmp_path, pages):
    """The parent's, or that of a worker by its number; its process id beside it."""
    with Relay(tmp_path, "--workers", "2", **redis_server.environment) as relay:
        pids = relay.workers()
        pages.open(relay.port, ["/channel=x"] * 20)
        until(lambda: relay.log.count("stream opened") == 20, "all are logged")
        for number, pid in enumerate(pids):
            assert re.search(rf" INFO     \[{pid} worker {number}\] stream opened: ", relay.log)
        assert f" INFO     [{relay.process.pid} parent] listening on " in relay.log
        assert all(
            re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ +\[\d+ (parent|worker [01])\] ", line)
            for line in relay.log.splitlines()
        )


def test_stream_is_two_objects_in_json(redis_server, tmp_path, pages):
    """At its start and at its end, with the same request id: the proxy's if there is one."""
    with Relay(tmp_path, "--workers", "1", "--log-format", "json", **redis_server.environment) as relay:
        given, own = pages.open(relay.port, ["/events?channel=x&channel=y"], {"X-Request-ID": "abc-1.2"}) + pages.open(
            relay.port, ["/channel=x"]
        )
        pages.close(given)
        pages.close(own)
        until(lambda: relay.log.count("stream ended") == 2, "both ends")
        about = [entry for entry in entries(relay) if "request" in entry]
    keys = {"time", "level", "logger", "process", "worker", "message", "client", "channels", "request"}
    assert [entry["message"].split()[1].rstrip(":") for entry in about] == ["opened", "opened", "ended", "ended"]
    assert all(set(entry) == keys for entry in about[:2])
    assert all(set(entry) == keys | {"seconds", "reason"} for entry in about[2:])
    first, second, *ended = about
    assert (first["client"], first["channels"], first["request"], first["worker"]) == (
        "127.0.0.1",
        ["x", "y"],
        "abc-1.2",
        0,
    )
    assert re.fullmatch("[0-9a-f]{16}", second["request"])
    assert [entry["request"] for entry in ended] == ["abc-1.2", second["request"]]
    assert {entry["reason"] for entry in ended} == {"client"}
    assert "worker" in entries(relay)[0]
    assert {entry["worker"] for entry in entries(relay)} == {None, 0}


@pytest.mark.parametrize("given", ["two words", "x" * 129, "<script>", "a\tb", "ümlaut"])
def test_request_id_that_could_be_anything_is_replaced(redis_server, tmp_path, pages, given):
    """By one of ours; whatever a client sends cannot make a line of its own."""
    with Relay(tmp_path, "--workers", "1", **redis_server.environment) as relay:
        pages.open(relay.port, ["/channel=x"], {"X-Request-ID": given})
        until(lambda: "stream opened" in relay.log, "it is logged")
        assert re.search(r"stream opened: 127\.0\.0\.1 on x, request [0-9a-f]{16}\n", relay.log)


@pytest.mark.parametrize("level", ["DEBUG", "TRACE"])
def test_events_are_shown_at_trace_only(kept, tmp_path, pages, channel, level):
    """One line each there; below, nothing that there is of events."""
    with Relay(tmp_path, "--workers", "1", "--log-level", level, **kept.environment) as relay:
        (page,) = pages.open(relay.port, [f"/channel={channel}"])
        kept.publish(channel, *(f"mark-{number}" for number in range(50)))
        pages.until(lambda: len(page.data) == 50, "all of them")
        marked = [line for line in relay.log.splitlines() if "mark-" in line]
        # A probe may come in between, and the end of the replay.
        about = [line for line in relay.log.splitlines() if channel in line]
    assert len(marked) == (50 if level == "TRACE" else 0)
    assert len(about) == len(marked) + 1
    assert all(" TRACE " in line for line in marked)


def test_access_log_has_a_line_for_each_answer(redis_server, tmp_path, pages):
    """Whichever way the request takes, with the client that a proxy names, and without the query."""
    flags = ("--log-access", "--log-format", "json", "--workers", "1")
    variables = {"RELAY_TRUSTED_PROXIES": "127.0.0.1", "RELAY_PUBLISH_TOKEN": "p" * 20, "RELAY_MAX_CONNECTIONS": "2"}
    with Relay(tmp_path, *flags, **variables, **redis_server.environment) as relay:
        client = {"X-Forwarded-For": "10.0.0.7", "X-Request-ID": "abc"}
        pages.open(relay.port, ["/channel=x?token=hush"], client)
        pages.open(relay.port, ["/x?token=hush"], client)
        pages.open(relay.port, ["/channel=x"], client)
        for path in ("/healthz", "/relay.js", "/nothing/here", "/channel=x", "/events"):
            httpx.get(relay.url + path, headers=client)
        post = client | {"Authorization": "Bearer " + "p" * 20}
        httpx.post(f"{relay.url}/channel=x?key=hush", content=b'{"data": "1"}', headers=post)
        httpx.post(f"{relay.url}/channel=x", content=b'{"data": "1"}', headers=client)
        until(lambda: relay.log.count('"POST /channel=x') == 2, "all answers")
        told = [entry for entry in entries(relay) if "method" in entry]
    assert [(each["method"], each["path"], each["status"]) for each in told] == [
        ("GET", "/channel=x", 200),
        ("GET", "/x", 200),
        ("GET", "/channel=x", 200),  # and closed, as there is no room
        ("GET", "/healthz", 200),
        ("GET", "/relay.js", 200),
        ("GET", "/nothing/here", 404),
        ("GET", "/channel=x", 503),
        ("GET", "/events", 400),
        ("POST", "/channel=x", 202),
        ("POST", "/channel=x", 401),
    ]
    assert {(each["client"], each["request"], each["worker"]) for each in told} == {("10.0.0.7", "abc", 0)}
    assert all(0 <= each["milliseconds"] < 10_000 for each in told)
    assert told[3]["message"].startswith('10.0.0.7 "GET /healthz" 200 in ')
    assert "hush" not in relay.log


def test_access_log_is_there_at_any_level(redis_server, tmp_path, pages):
    """Nothing else is, and without being asked for it is not."""
    for flag, expected in (("--log-access", 1), ("--no-log-access", 0)):
        with Relay(tmp_path, "--workers", "1", flag, **redis_server.environment) as relay:
            httpx.get(f"{relay.url}/healthz")
            relay.stop()
            assert relay.log.count('"GET /healthz" 200') == expected
    with Relay(tmp_path, "--workers", "1", "--log-access", **redis_server.environment) as relay:
        (tmp_path / ".env").write_text("LOG_LEVEL=ERROR\n")
        (old,) = relay.workers()
        relay.signal(signal.SIGHUP)
        until(lambda: relay.workers() and old not in relay.workers(), "the old worker is gone")

        def logged():
            httpx.get(f"{relay.url}/readyz")
            return re.search(rf" INFO     \[{relay.workers()[-1]} worker 0\] .*/readyz", relay.log)

        until(logged, "the next worker logs it")
        before = relay.log
        pages.open(relay.port, ["/channel=x"])
        until(lambda: '"GET /channel=x" 200' in relay.log.removeprefix(before), "a line of its answer")
        assert "stream opened" not in relay.log


def test_no_secret_is_in_any_log(broker, tmp_path, pages, channel):
    """At the level that shows most, with every secret that there is in use, and with wrong ones."""
    token = subscribe_token([channel], ttl=60, key=SECRET)
    publish_token = "publish-token-that-nobody-may-see"
    variables = broker.environment | {"RELAY_JWT_SECRET": SECRET, "RELAY_PUBLISH_TOKEN": publish_token}
    with Relay(tmp_path, "--workers", "1", "--log-level", "TRACE", "--log-access", **variables) as relay:
        pages.open(relay.port, [f"/channel={channel}?token={token}", f"/events?channel={channel}&token={token}"])
        pages.open(relay.port, [f"/channel={channel}"], {"Cookie": f"relay_token={token}; sessionid=hush-hush"})
        pages.open(relay.port, [f"/channel={channel}"], {"Authorization": f"Bearer {token}"})
        pages.open(relay.port, [f"/channel={channel}?token=wrong-and-hush", f"/channel=other?token={token}"])
        for each in (publish_token, "wrong-and-hush"):
            httpx.post(
                f"{relay.url}/channel={channel}", content=b'{"data": "1"}', headers={"Authorization": f"Bearer {each}"}
            )
        until(lambda: relay.log.count("stream opened") == 4, "all that open")
        relay.stop()
        said = relay.log
    for secret in (SECRET, publish_token, "hush", *token.split(".")[1:]):
        assert secret not in said
    assert '"POST' in said


@pytest.mark.parametrize("form", ["text", "json"])
def test_journal_gets_levels(redis_server, tmp_path, form):
    """As sd-daemon(3) has them, before each line, and neither time nor process id, which it knows itself."""
    log = tmp_path / "journal"
    with log.open("w") as stderr:
        status = log.stat()
        variables = redis_server.environment | {
            "JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}",
            "LOG_FORMAT": form,
        }
        process = subprocess.Popen(
            [COMMAND, "--port", "0", "--workers", "1"], cwd=tmp_path, env=environment(**variables), stderr=stderr
        )
        try:
            until(lambda: "listening on" in log.read_text(), "it listens")
        finally:
            process.terminate()
            process.wait(PATIENCE)
    lines = log.read_text().splitlines()
    assert all(re.match("<[2-7]>", line) for line in lines)
    (warning,) = [line for line in lines if "no authentication" in line]
    (listening,) = [line for line in lines if "listening on" in line]
    assert (warning[:3], listening[:3]) == ("<4>", "<6>")
    if form == "text":
        assert listening.startswith("<6>parent: listening on http://")
    else:
        assert json.loads(listening[3:])["message"].startswith("listening on")


def test_terminal_gets_no_levels(redis_server, tmp_path):
    """Nor does a file that a service redirects to: JOURNAL_STREAM is of another one then."""
    done = run("--port", "70000", cwd=tmp_path, JOURNAL_STREAM="1:1", **redis_server.environment)
    assert not done.stderr.startswith("<")
    with Relay(tmp_path, "--workers", "1", JOURNAL_STREAM="8:12345", **redis_server.environment) as relay:
        assert not re.search("^<", relay.log, re.MULTILINE)


def test_lines_that_repeat_are_counted(monkeypatch, caplog):
    """A throttle writes the first line, leaves out the others for its time, and then counts them."""
    now = [100.0]
    monkeypatch.setattr(logs.time, "monotonic", lambda: now[0])
    throttle = Throttle(logging.getLogger("test"))
    for _ in range(4):
        throttle.write(logging.ERROR, "no %s", "room")
    now[0] += logs.QUIET_SECONDS - 0.1
    throttle.write(logging.ERROR, "no %s", "room")
    now[0] += 0.1
    for _ in range(2):
        throttle.write(logging.ERROR, "still no %s", "room")
    assert [record.getMessage() for record in caplog.records] == [
        "no room",
        "still no room (4 such lines were left out before this one)",
    ]
