"""The admin listener, over real workers: the numbers are right, whatever becomes of a worker, and nowhere else."""

import json
import os
import shutil
import signal
import socket
from pathlib import Path

import httpx
import pytest
from pages import Page
from programs import program
from relay import COMMAND, Relay, run, watched
from servers import PATIENCE, free_port, standing_still, until

from tornado_relay import __version__
from tornado_relay.status import CHANNELS, LARGEST

BOTH = [(0, "serving"), (1, "serving")]


def test_status_counts_over_all_workers(broker, tmp_path, pages):
    """Streams, channels, events, deliveries and bytes are those that there were, in all and by worker."""
    with watched(tmp_path, workers=2, **broker.environment) as relay:
        paths = ["/channel=orders"] * 30 + ["/channel=stock"] * 10 + ["/events?channel=orders&channel=news"] * 5
        opened = pages.open(relay.relay.port, paths)
        for page in opened[:3]:
            pages.close(page)
        until(lambda: relay.status()["closed"] == 3, "those that left are noticed")
        broker.publish("orders", "x" * 100)
        broker.publish("stock", "hello")
        pages.until(lambda: all(page.events for page in opened[3:]), "the events, by all")
        told = relay.status()
    kind = "postgres" if "DATABASE_URL" in broker.environment else "redis"
    assert told["version"] == __version__
    assert (told["broker"]["kind"], told["broker"]["connected"], told["broker"]["trouble"]) == (kind, True, None)
    assert told["channels"] == {
        "total": 3,
        "largest": [
            {"channel": "orders", "streams": 32},
            {"channel": "stock", "streams": 10},
            {"channel": "news", "streams": 5},
        ],
    }
    assert (told["streams"], told["opened"], told["closed"]) == (42, 45, 3)
    assert (told["deliveries"], told["bytes"]) == (42, 32 * len(f"data: {'x' * 100}\n\n") + 10 * len("data: hello\n\n"))
    workers = told["workers"]
    assert [(worker["number"], worker["state"]) for worker in workers] == BOTH
    for name in ("streams", "opened", "closed", "events", "deliveries", "bytes", "cut", "refused"):
        assert sum(worker[name] for worker in workers) == told[name]
    assert all(0 < worker["uptime"] <= told["uptime"] for worker in workers)


def test_channels_beyond_the_largest_are_counted(redis_server, tmp_path, pages):
    """The list ends, the number does not, also where a worker's account takes several lines."""
    number = 2 * CHANNELS + 10
    with watched(tmp_path, workers=2, **redis_server.environment) as relay:
        paths = ["/events?" + "&".join(f"channel=c{n + k}" for k in range(60)) for n in range(0, number, 60)]
        pages.open(relay.relay.port, [*paths, "/channel=c7", "/channel=c8"])
        channels = relay.status()["channels"]
    assert channels["total"] == 60 * len(paths)
    assert len(channels["largest"]) == LARGEST
    assert channels["largest"][:2] == [{"channel": "c7", "streams": 2}, {"channel": "c8", "streams": 2}]


def test_worker_that_does_not_answer_is_shown_as_that(redis_server, tmp_path, pages):
    """Others are not waited for in vain, and it is back with its numbers when it goes on."""
    with watched(tmp_path, workers=3, **redis_server.environment) as relay:
        pages.open(relay.relay.port, ["/channel=x"] * 30)
        before = relay.status()["workers"]
        victim = before[1]["pid"]
        os.kill(victim, signal.SIGSTOP)
        try:
            # Whoever comes to the stopped one waits for it: it may have been accepting.
            told = relay.status()
            assert told["workers"][1] == {"number": 1, "pid": victim, "state": "no answer"}
            assert [told["workers"][n]["streams"] for n in (0, 2)] == [before[n]["streams"] for n in (0, 2)]
            assert told["streams"] == 30 - before[1]["streams"]
        finally:
            os.kill(victim, signal.SIGCONT)
        assert relay.status()["streams"] == 30


def test_worker_that_was_killed_is_missing_until_the_next_serves(redis_server, tmp_path, pages):
    """Its place is shown as empty, its streams are gone, and its socket is."""
    with watched(tmp_path, workers=2, **redis_server.environment) as relay:
        pages.open(relay.relay.port, ["/channel=x"] * 20)
        first, second = relay.status()["workers"]
        (folder,) = folders(relay.relay.process.pid)
        for _ in range(2):  # the second time the next one waits for longer
            number, pid, _ = entry(relay.status(), 0)
            with standing_still(relay.relay.process.pid):  # or the next one may serve before anybody has looked
                os.kill(pid, signal.SIGKILL)
                until(lambda number=number: (number, "no answer") in relay.states(), "it is missed")
            until(lambda: relay.states() == BOTH, "the next one serves")
        told = relay.status()
        assert told["streams"] == second["streams"]
        assert told["workers"][0]["pid"] not in (first["pid"], second["pid"])
        pids = {str(worker["pid"]) for worker in told["workers"]}
        assert {path.name.partition("-")[2] for path in folder.iterdir()} == pids


def entry(told, number):
    worker = told["workers"][number]
    return worker["number"], worker["pid"], worker["state"]


def answers(path):
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


def folders(pid):
    """The folders with sockets of the workers of the relay that is process ``pid``."""
    workers = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    sockets = [line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines() if "/sse-relay-" in line]
    return {Path(path).parent for path in sockets if Path(path).name.partition("-")[2] in workers}


def test_reload_keeps_the_listener(redis_server, tmp_path, pages):
    """It answers at all times meanwhile, shows the old workers as long as they drain, and then the new ones alone."""
    with watched(tmp_path, "--drain-seconds", "2", workers=2, **redis_server.environment) as relay:
        pages.open(relay.relay.port, ["/channel=x"] * 20)
        before = {worker["pid"] for worker in relay.status()["workers"]}
        relay.relay.signal(signal.SIGHUP)
        until(lambda: "draining" in {state for _, state in relay.states()}, "an old one drains")
        assert relay.status()["streams"] > 0
        until(lambda: "reloaded" in relay.relay.log and relay.states() == BOTH, "the new ones alone")
        told = relay.status()
        assert not before & {worker["pid"] for worker in told["workers"]}
        assert told["streams"] == 0


def test_nothing_of_it_is_left_behind(redis_server, tmp_path):
    """The folder is the relay's alone, and ends with it; so does the port."""
    with watched(tmp_path, workers=2, **redis_server.environment) as relay:
        relay.status()
        (folder,) = folders(relay.relay.process.pid)
        assert folder.stat().st_mode & 0o777 == 0o700
        relay.relay.stop()
        assert not folder.exists()
        with pytest.raises(httpx.ConnectError):
            relay.status()
        assert "Traceback" not in relay.relay.log


def test_folder_that_is_cleaned_up_is_made_again(redis_server, tmp_path):
    """systemd-tmpfiles removes what is old: dead workers are replaced, a reload goes through, and all are shown."""
    with watched(tmp_path, workers=2, **redis_server.environment) as relay:
        (folder,) = folders(relay.relay.process.pid)
        shutil.rmtree(folder)
        os.kill(relay.relay.workers()[0], signal.SIGKILL)
        until(lambda: relay.states() == BOTH, "both are shown")
        assert len(relay.relay.workers()) == 2
        assert folder.stat().st_mode & 0o777 == 0o700
        shutil.rmtree(folder)
        relay.relay.signal(signal.SIGHUP)
        until(lambda: " reloaded" in relay.relay.log and relay.states() == BOTH, "both new ones are shown")
        shutil.rmtree(folder)
        until(lambda: len(list(folder.glob("*"))) == 2 and relay.states() == BOTH, "both are back by themselves")
        assert httpx.get(f"{relay.url}/").status_code == 200
        assert relay.relay.stop() == 0
        assert not folder.exists()
        assert "Traceback" not in relay.relay.log


@pytest.mark.parametrize("planted", ["link", "open", "file"])
def test_something_else_in_place_of_the_folder_is_not_used(redis_server, tmp_path, pages, planted):
    """A worker starts without its socket, and has one again when there can be a folder."""
    with watched(tmp_path, workers=2, **redis_server.environment) as relay:
        (folder,) = folders(relay.relay.process.pid)
        shutil.rmtree(folder)
        (elsewhere := tmp_path / "elsewhere").mkdir(0o700)
        match planted:
            case "link":
                folder.symlink_to(elsewhere)
            case "open":
                folder.mkdir()
                folder.chmod(0o777)
            case "file":
                folder.touch()
        workers = relay.relay.workers()
        try:
            for pid in workers:
                os.kill(pid, signal.SIGKILL)
            until(lambda: relay.relay.log.count("cannot have its socket in") >= 2, "it is said")
            until(lambda: not set(workers) & set(relay.relay.workers()), "they are replaced")
            assert pages.open(relay.relay.port, ["/channel=x"])[0].status == 200
            assert sorted(state for _, state in relay.states()) == ["no answer", "serving"]
            assert not list(elsewhere.iterdir())
            assert not folder.is_dir() or not list(folder.iterdir())
        finally:
            folder.rmdir() if planted == "open" else folder.unlink()
        until(lambda: relay.states() == BOTH, "both have a socket again")


@pytest.mark.parametrize("change", ["opened", "moved"])
def test_folder_that_is_no_longer_private_is_named(redis_server, tmp_path, change):
    """The others do not look into it although the sockets are there, so each worker says that it is not shown."""
    with watched(tmp_path, workers=2, **redis_server.environment) as relay:
        (folder,) = folders(relay.relay.process.pid)
        if change == "opened":
            folder.chmod(0o755)
        else:
            folder.rename(tmp_path / "elsewhere")
            folder.symlink_to(tmp_path / "elsewhere")
        try:
            until(lambda: relay.relay.log.count("cannot have its socket in") == 2, "it is said")
            assert sorted(state for _, state in relay.states()) == ["no answer", "serving"]
        finally:
            if change == "opened":
                folder.chmod(0o700)
            else:
                folder.unlink()
        until(lambda: relay.states() == BOTH, "both are shown again")


def test_folder_of_a_killed_relay_is_removed_by_the_next(redis_server, tmp_path):
    """Those of relays that run stay, and so does what only looks like one."""
    (temporary := tmp_path / "tmp").mkdir()
    (temporary / "sse-relay-other").mkdir(0o700)
    (temporary / "sse-relay-other/1-1").touch()
    environment = redis_server.environment | {"TMPDIR": str(temporary)}

    def there():
        return {path for path in temporary.iterdir() if path.name != "sse-relay-other"}

    with watched(tmp_path, **environment) as killed, watched(tmp_path, **environment) as runs:
        (left,), (kept,) = folders(killed.relay.process.pid), folders(runs.relay.process.pid)
        killed.relay.process.kill()
        killed.relay.process.wait()
        until(lambda: not any(answers(path) for path in left.iterdir()), "the workers are gone")
        assert there() == {left, kept}
        with watched(tmp_path, **environment) as after:
            assert there() == {kept, *folders(after.relay.process.pid)}
            assert runs.states() == BOTH
    assert (temporary / "sse-relay-other/1-1").exists()


def test_public_port_has_nothing_of_it(redis_server, tmp_path):
    """There /status is a channel like any other, / is nothing, and so are streams on the admin port."""
    with watched(tmp_path, workers=1, **redis_server.environment) as relay:
        with httpx.stream("GET", f"{relay.relay.url}/status") as answer:
            assert answer.headers["Content-Type"] == "text/event-stream"
        assert httpx.get(f"{relay.relay.url}/").status_code == 404
        for path in ("/channel=x", "/x", "/events?channel=x", "/readyz", "/relay.js"):
            assert httpx.get(relay.url + path, headers={"Accept": "text/event-stream"}).status_code == 404
        assert httpx.post(f"{relay.url}/status", content=b"{}").status_code == 405
        assert httpx.get(f"{relay.url}/healthz").text == "ok\n"
        # A page of another origin can ask, and read nothing.
        for path in ("/status", "/metrics"):
            answer = httpx.get(relay.url + path, headers={"Origin": "https://any.example"})
            assert not any(name.startswith("access-control") for name in answer.headers)
        assert relay.status()["opened"] == 1


def test_without_a_port_there_is_no_listener(redis_server, tmp_path):
    """Nor a folder."""
    with Relay(tmp_path, "--workers", "1", **redis_server.environment) as relay:
        assert not folders(relay.process.pid)
        assert "admin listener" not in relay.log


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_port_that_is_taken_ends_the_start(redis_server, tmp_path, host):
    """By a message that names the flags; nothing serves."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = run("--port", "0", "--admin-host", host, "--admin-port", port, cwd=tmp_path, **redis_server.environment)
    assert done.returncode == 2
    said = done.stderr.strip().splitlines()[-1]
    assert (
        said == f"sse-relay-server: cannot listen on {host}:{port} (--admin-host, --admin-port): Address already in use"
    )
    assert "connected" not in done.stderr


def test_folder_that_cannot_be_ends_the_start(redis_server, tmp_path):
    """A path too long for a Unix socket is one reason."""
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    done = run("--port", "0", "--admin-port", free_port(), cwd=tmp_path, TMPDIR=str(deep), **redis_server.environment)
    assert done.returncode == 78
    assert f"cannot start: a worker cannot have its socket in {deep}" in done.stderr
    assert not list(deep.iterdir())


def test_slow_reader_that_is_cut_is_counted(redis_server, tmp_path, pages):
    """Once, and among the closed ones."""
    with watched(tmp_path, "--client-buffer", "4096", "--compression", "off", **redis_server.environment) as relay:
        slow = pages.add(Page(relay.relay.port, "/channel=x"))
        pages.open(relay.relay.port, ["/channel=y"])
        until(lambda: relay.status()["streams"] == 2, "both are open")

        def publish():
            redis_server.publish("x", "y" * 100_000)
            return relay.status()["cut"]

        until(publish, "the slow one is cut")
        told = relay.status()
        assert (told["cut"], told["closed"], told["streams"]) == (1, 1, 1)
        pages.close(slow)


def test_refusals_are_counted(redis_server, tmp_path, pages):
    """Those for want of a token, of a right, and of a seat."""
    environment = redis_server.environment | {"RELAY_MAX_CONNECTIONS": "1", "ALLOWED_ORIGINS": "https://shop.example"}
    with watched(tmp_path, **environment) as relay:
        pages.open(relay.relay.port, ["/channel=x", "/channel=x", "/channel=x"])
        pages.open(relay.relay.port, ["/channel=x"], {"Origin": "https://evil.example"})
        told = relay.status()
        assert (told["refused"], told["opened"]) == (3, 1)


def test_broker_that_is_away(home, tmp_path, channel):
    """Why, and that it is back."""
    from servers import RedisServer

    folder = home / f"away-{channel}"
    folder.mkdir()
    with RedisServer(folder) as server, watched(tmp_path, **server.environment) as relay:
        assert relay.status()["broker"]["connected"]
        server.stop()
        until(lambda: not relay.status()["broker"]["connected"], "it is missed")
        assert relay.status()["broker"]["trouble"]
        assert httpx.get(f"{relay.url}/healthz").status_code == 200
        server.start()
        until(lambda: relay.status()["broker"]["connected"], "it is back", 40)


def test_probe_latency(redis_server, tmp_path):
    """After some seconds of quiet there is one, in milliseconds."""
    with watched(tmp_path, **redis_server.environment) as relay:
        latency = until(lambda: relay.status()["broker"]["latency_ms"], "a probe", 40)
        assert 0 < latency < 5000


def test_half_requests_are_in_nobodys_way(redis_server, tmp_path):
    """On this port they wait with all others, of which the oldest make room, and a worker that has no descriptor says so."""
    port = free_port()
    narrow = (program("prlimit"), "--nofile=200", COMMAND)
    with Relay(tmp_path, "--workers", "1", "--admin-port", port, command=narrow, **redis_server.environment) as relay:
        half = [socket.create_connection(("127.0.0.1", port), PATIENCE) for _ in range(300)]
        for connection in half:
            connection.sendall(b"GET /status HTTP/1.1\r\n")
        assert httpx.get(f"http://127.0.0.1:{port}/status", timeout=PATIENCE).json()["streams"] == 0
        for connection in half:
            connection.close()
        assert "Traceback" not in relay.log


def rows(page, body):
    """The text of a table's cells, row by row."""
    cells = f"[...document.querySelectorAll('#{body} tr')].map(row => [...row.cells].map(cell => cell.textContent))"
    return json.loads(page.evaluate(f"JSON.stringify({cells})"))


def test_page_shows_the_numbers(redis_server, tmp_path, pages, browse):
    """Streams, workers and channels, live; a worker that does not answer; and that the whole relay does not."""
    with watched(tmp_path, workers=2, **redis_server.environment) as relay:
        opened = pages.open(relay.relay.port, ["/channel=orders"] * 7 + ["/channel=<b>stock</b>"])
        page = browse(f"{relay.url}/")

        def text(selector):
            return page.evaluate(f"document.querySelector('{selector}')?.textContent ?? ''")

        until(lambda: text("#charts .value") == "8", "the number of streams", 40)
        assert rows(page, "largest") == [["orders", "7", ""], ["<b>stock</b>", "1", ""]]
        assert [row[:2] for row in rows(page, "workers")] == [["0", "serving"], ["1", "serving"]]
        assert sum(int(row[4]) for row in rows(page, "workers")) == 8
        assert text("#state") == "All workers serve, the broker is connected"
        deliveries = "Number(document.querySelectorAll('#charts .value')[2]?.textContent.replace(',', ''))"

        def publish():
            redis_server.publish("orders", "hello")
            return page.evaluate(f"{deliveries} > 0")

        until(publish, "deliveries a second")
        for each in opened[:3]:
            pages.close(each)
        until(lambda: text("#charts .value") == "5", "what has changed")
        victim = relay.relay.workers()[1]
        os.kill(victim, signal.SIGSTOP)
        until(lambda: text("#state") == "1 of 2 workers does not answer", "the stopped one")
        assert "no answer" in [row[1] for row in rows(page, "workers")]
        os.kill(victim, signal.SIGCONT)
        until(lambda: text("#state") == "All workers serve, the broker is connected", "it goes on")
        assert text("#alarm") == ""
        relay.relay.stop()
        until(lambda: text("#alarm").startswith("The relay has not answered since"), "there is no relay")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
