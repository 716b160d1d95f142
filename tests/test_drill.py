"""The drill of docs/operations.md: what is seen of each trouble in the metrics, at /readyz, in the log and by `check`."""

import os
import re
import signal
import subprocess

import httpx
import psycopg2
import pytest
from clock import Clock
from outages import Proxy
from pooler import PgBouncer
from programs import program
from relay import COMMAND, ROOT, run, watched
from servers import PATIENCE, PostgresServer, RedisServer, until

from tornado_relay import subscribe_token

OPERATIONS = (ROOT / "docs/operations.md").read_text()


def ready(relay):
    """Status and text of /readyz."""
    answer = httpx.get(f"{relay.relay.url}/readyz")
    return answer.status_code, answer.text.strip()


def checked(tmp_path, variables, *flags, **options):
    """The lines of ``check`` that are not about settings, and whether it is content."""
    done = run("check", "--workers", "1", *flags, cwd=tmp_path, **variables, **options)
    return "\n".join(
        line for line in done.stdout.splitlines() if not re.match(" +[A-Z_]+=", line)
    ), done.returncode == 0


def documented(trouble, *said):
    """What the page says of a trouble has each of these in it, which were seen."""
    (row,) = re.findall(rf"^\| {trouble}[^|]*\|.*", OPERATIONS, re.MULTILINE)
    for text in said:
        assert text in row, (text, row)


@pytest.fixture
def own(request, home, channel):
    """A server of the kind that is asked for, which may be stopped."""
    folder = home / f"drill-{channel}"
    folder.mkdir(mode=0o755)
    server = PostgresServer(folder) if request.param == "postgres" else RedisServer(folder)
    yield server
    try:
        server.stop("immediate")
    except (psycopg2.Error, subprocess.CalledProcessError):
        pass


@pytest.mark.parametrize("own", ["postgres", "redis"], indirect=True)
def test_broker_is_down(own, tmp_path, pages):
    """All four say so, and that it is back."""
    name = "PostgreSQL" if own.kind == "postgres" else "Redis"
    with watched(tmp_path, workers=1, **own.environment) as relay:
        pages.open(relay.relay.port, ["/channel=x"])
        assert ready(relay) == (200, "ok")
        own.stop()
        until(lambda: relay.metrics()["sse_relay_broker_up", "0"] == 0, "the metric")
        status, text = ready(relay)
        assert (status, text.startswith(f"{name}: ")) == (503, True)
        until(
            lambda: re.search(rf" WARNING .*{name} is not reachable, next try in [\d.]+ s: ", relay.relay.log),
            "the log",
        )
        assert httpx.get(f"{relay.relay.url}/healthz").status_code == 200
        text, content = checked(tmp_path, own.environment)
        assert (content, bool(re.search(rf"^FAIL +{name} \(used\): cannot be reached", text, re.MULTILINE))) == (
            False,
            True,
        )
        own.start()
        until(lambda: ready(relay) == (200, "ok"), "it is back", 40)
        assert relay.metrics()["sse_relay_broker_reconnects_total",] == 1
        assert checked(tmp_path, own.environment)[1]
    documented("The broker is down", "sse_relay_broker_up", "503", "is not reachable, next try in", "cannot be reached")


def test_worker_is_stuck(redis_server, tmp_path, pages):
    """The others serve and say which one it is, until it is killed and replaced."""
    with watched(tmp_path, workers=2, **redis_server.environment) as relay:
        pages.open(relay.relay.port, ["/channel=x"] * 10)
        victim = relay.status()["workers"][1]["pid"]
        os.kill(victim, signal.SIGSTOP)
        until(lambda: relay.metrics()["sse_relay_worker_up", "1"] == 0, "the metric")
        assert relay.metrics()["sse_relay_worker_up", "0"] == 1
        assert relay.status()["workers"][1]["state"] == "no answer"
        killed = rf" ERROR .*worker 1 \({victim}\) is stuck for \d+ s, killing it"
        until(lambda: re.search(killed, relay.relay.log), "the log", 40)
        until(lambda: relay.metrics()["sse_relay_worker_up", "1"] == 1, "the next one")
        assert relay.metrics()["sse_relay_worker_restarts_total", "stuck"] == 1
        assert ready(relay) == (200, "ok")
        assert checked(tmp_path, redis_server.environment)[1]
    documented("A worker is stuck", "sse_relay_worker_up", "is stuck for", "killing it", "no answer")


@pytest.fixture
def full_disk(tmp_path, home, channel):
    """A PostgreSQL with a history, on a disk of its own that is small; yields it and what fills the disk."""
    folder = home / f"disk-{channel}"
    folder.mkdir(mode=0o755)
    mount, umount = program("mount"), program("umount")
    subprocess.run([mount, "-t", "tmpfs", "-o", "size=160m,mode=755", "tmpfs", folder], check=True)
    try:
        server = PostgresServer(folder, max_wal_size="48MB", min_wal_size="32MB")
        try:
            done = run("init-db", cwd=tmp_path, **server.environment)
            assert done.returncode == 0, done.stderr
            yield server, folder / "filler"
        finally:
            server.stop("immediate")
    finally:
        subprocess.run([umount, "--lazy", folder], check=True)


def test_disk_is_full_for_the_history(full_disk, tmp_path, pages):
    """Whoever publishes gets the reason, streams stay, and when there is room it goes on: nothing that was accepted is lost."""
    server, filler = full_disk
    variables = server.environment | {"RELAY_HISTORY": "100000", "RELAY_PUBLISH_TOKEN": "p" * 20}
    with watched(tmp_path, workers=1, **variables) as relay:
        (page,) = pages.open(relay.relay.port, ["/channel=x"])
        accepted = []

        def publish(number, size=5000):
            body = {"data": f"{number} " + "x" * size}
            headers = {"Authorization": "Bearer " + "p" * 20}
            answer = httpx.post(f"{relay.relay.url}/channel=x", json=body, headers=headers, timeout=PATIENCE * 2)
            if answer.status_code == 202:
                accepted.append(str(number))
            return answer

        assert publish(0).status_code == 202
        with filler.open("wb") as file:
            try:
                while True:
                    file.write(b"x" * 65536)
                    file.flush()
            except OSError:
                pass
        numbers = iter(range(1, 100_000))
        refused = until(lambda: (answer := publish(next(numbers))).status_code != 202 and answer, "it is full", 60)
        assert refused.status_code == 503
        assert "No space left on device" in refused.text
        assert relay.metrics()["sse_relay_publishes_total", "failed"] == 1
        # Small ones still go into what the last page has left, and so does that of `check`.
        until(lambda: publish(next(numbers), 0).status_code == 503, "that is full too", 60)
        text, content = checked(tmp_path, variables)
        assert (content, "No space left on device" in text) == (False, True)
        filler.unlink()
        until(lambda: publish(next(numbers)).status_code == 202, "there is room", 60)
        pages.until(lambda: len(page.data) == len(accepted), "all that was accepted")
        assert [data.split()[0] for data in page.data] == accepted
        assert checked(tmp_path, variables)[1]
    documented("The history's disk is full", 'result="failed"', "No space left on device", "503")


@pytest.mark.parametrize("own", ["redis"], indirect=True)
def test_memory_is_full_for_the_history(own, tmp_path, pages):
    """Redis refuses to keep more; what it refuses is nowhere, and whoever publishes is told."""
    variables = own.environment | {"RELAY_HISTORY": "100000", "RELAY_PUBLISH_TOKEN": "p" * 20}
    with watched(tmp_path, workers=1, **variables) as relay:
        (page,) = pages.open(relay.relay.port, ["/channel=x"])
        headers = {"Authorization": "Bearer " + "p" * 20}

        def publish(data):
            return httpx.post(f"{relay.relay.url}/channel=x", json={"data": data}, headers=headers)

        until(lambda: publish("before").status_code == 202, "accepted")
        own.client.config_set("maxmemory-policy", "noeviction")
        own.client.config_set("maxmemory", "1mb")
        refused = publish("too much")
        assert (refused.status_code, "OOM" in refused.text or "memory" in refused.text) == (503, True)
        assert relay.metrics()["sse_relay_publishes_total", "failed"] == 1
        text, content = checked(tmp_path, variables)
        assert (content, "memory" in text) == (False, True)
        own.client.config_set("maxmemory", "0")
        assert publish("after").status_code == 202
        pages.until(lambda: "after" in page.data, "it goes on")
        assert "too much" not in page.data
    documented("Redis' memory is full", 'result="failed"', "503")


def test_descriptors_are_used_up(redis_server, tmp_path, pages):
    """New streams are told to come back, those that are open stay, and it is said what to raise."""
    narrow = (program("prlimit"), "--nofile=300", COMMAND)
    with watched(tmp_path, workers=1, command=narrow, **redis_server.environment) as relay:
        capacity = int(relay.metrics()["sse_relay_streams_capacity", "0"])
        opened = pages.open(relay.relay.port, ["/channel=x"] * capacity)
        (late,) = pages.open(relay.relay.port, ["/channel=x"])
        pages.until(lambda: late.closed, "it is told to come back")
        assert b"retry: " in late.body
        told = relay.metrics()
        assert told["sse_relay_refusals_total", "descriptors"] == 1
        assert told["sse_relay_streams", "0"] == told["sse_relay_streams_capacity", "0"]
        answer = httpx.get(f"{relay.relay.url}/channel=x")
        assert (answer.status_code, "LimitNOFILE" in answer.text) == (503, True)
        redis_server.publish("x", "still here")
        pages.until(lambda: all(page.data for page in opened), "an event")
        assert ready(relay) == (200, "ok")
    narrow = [program("prlimit"), "--nofile=300", COMMAND, "check", "--workers", "1"]
    said = subprocess.run(narrow, cwd=tmp_path, capture_output=True, text=True, check=False).stdout
    assert re.search(r"^WARN +300 descriptors a process are \d+ streams", said, re.MULTILINE)
    documented("Descriptors are used up", 'reason="descriptors"', "descriptors a process are", "LimitNOFILE")


def test_clock_has_jumped(redis_server, tmp_path, pages):
    """Streams go on; tokens are judged by the new time; `check` says by how much it is off."""
    clock, secret = Clock(tmp_path), "s" * 32
    variables = redis_server.environment | clock.environment | {"RELAY_JWT_SECRET": secret}
    with watched(tmp_path, workers=1, **variables) as relay:
        path = f"/channel=x?token={subscribe_token('x', 600, key=secret)}"
        (page,) = pages.open(relay.relay.port, [path])
        clock.set("+1h")
        (late,) = pages.open(relay.relay.port, [path])
        assert late.status == 401
        redis_server.publish("x", "still here")
        pages.until(lambda: page.data, "an event")
        told = relay.metrics()
        assert (told["sse_relay_refusals_total", "token"], told["sse_relay_worker_up", "0"]) == (1, 1)
        assert ready(relay) == (200, "ok")
        text, content = checked(tmp_path, variables)
        assert (content, bool(re.search(r"^WARN +Redis \(used\): its clock is 3600 s behind", text, re.MULTILINE))) == (
            True,
            True,
        )
    documented("The clock has jumped", 'reason="token"', "its clock is 3600 s behind")


def test_pooler_comes_in_between(postgres_server, home, tmp_path):
    """As by a change of DNS: it is named, at the start and later, with the setting that leads around it."""
    with PgBouncer(program("pgbouncer"), home, postgres_server, "transaction") as pooler:
        done = run("--port", "0", cwd=tmp_path, DATABASE_URL=pooler.url)
        assert (done.returncode, "RELAY_LISTEN_DATABASE_URL" in done.stderr) == (78, True)
        with Proxy(postgres_server.port) as way:
            variables = {"DATABASE_URL": re.sub(r":\d+/", f":{way.port}/", postgres_server.url)}
            with watched(tmp_path, workers=1, **variables) as relay:
                assert ready(relay) == (200, "ok")
                way.lead_to(pooler.port)
                until(lambda: relay.metrics()["sse_relay_broker_up", "0"] == 0, "the metric", 40)
                until(lambda: "RELAY_LISTEN_DATABASE_URL" in ready(relay)[1], "/readyz", 40)
                assert ready(relay)[0] == 503
                until(lambda: re.search(r" WARNING .*RELAY_LISTEN_DATABASE_URL", relay.relay.log), "the log")
                text, content = checked(tmp_path, variables)
                assert (content, "RELAY_LISTEN_DATABASE_URL" in text) == (False, True)
                way.lead_to(postgres_server.port)
                until(lambda: ready(relay) == (200, "ok"), "it is gone", 60)
    documented("A pooler is in between", "sse_relay_broker_up", "503", "RELAY_LISTEN_DATABASE_URL")


def test_every_alert_has_its_section():
    """With what to do."""
    alerts = re.findall(r"- alert: (\w+)", (ROOT / "monitoring/alerts.yml").read_text())
    assert re.findall(r"^### (Relay\w+)$", OPERATIONS, re.MULTILINE) == alerts
