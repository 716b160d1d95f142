"""The relay beside its predecessor, nchan and bare write(2) on the same work: make bench.

    python benchmarks/fanout.py [--streams N] [--seconds N] [--out DIRECTORY]

Each server runs one worker and is given the same streams and events, in turn; what counts is the CPU time and the
memory of its processes, read from /proc, so neither the load generator nor a busy machine is in the figures. Writes
two tables (fanout.md) and a chart (fanout.svg) to DIRECTORY, docs by default. nchan is measured where nginx has it
(Debian: libnginx-mod-nchan), the predecessor where it can be installed, the floor where there is a C compiler.
`pressure.py` measures the second table: the relay alone, up to twice the rate that it can send.
"""

import argparse
import datetime
import http.client
import json
import os
import platform
import re
import resource
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import NamedTuple

import redis

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

import pressure  # noqa: E402
from servers import RedisServer, free_port, until  # noqa: E402

from tornado_relay import __version__  # noqa: E402

RATE = 60
PATIENCE = 30
DATA = {"n": 1, "text": "x" * 120}
TICK = os.sysconf("SC_CLK_TCK")
# With the drivers that it imports, both of them, and does not ask for.
PREDECESSOR = ("sse-relay-server==1.0.14", "psycopg[binary]", "redis")
FLOOR = "write(2) in C"
NGINX = """
load_module modules/ngx_nchan_module.so;
worker_processes 1; pid {home}/pid; error_log {home}/error.log; daemon off; worker_rlimit_nofile 60000;
events {{ worker_connections 50000; }}
http {{ access_log off; nchan_shared_memory_size 256M;
  server {{ listen 127.0.0.1:{port} backlog=4096;
    location = /publish {{ nchan_publisher; nchan_channel_id x; nchan_message_buffer_length 1000; }}
    location = /x {{ nchan_subscriber eventsource; nchan_channel_id x; nchan_subscriber_first_message newest; }} }} }}
"""

UNDER_PRESSURE = (
    "The delay of events from PUBLISH to a socket (99th percentile) and the memory of the worker, with {streams:,} streams. At "
    "the rate 1 x the worker could just send each event to each stream with a system call of its own, by the CPU of a delivery "
    "above. Beyond it the worker sends several events in one call. Publisher, Redis and reader share the machine."
)


class Figures(NamedTuple):
    """What one server spent."""

    name: str
    version: str
    connect: float
    """CPU microseconds for each stream that was opened."""
    delivery: float
    """CPU microseconds for each event that reached a stream."""
    memory: float
    """KiB for each open stream, shared pages shared out (PSS)."""


class Server(NamedTuple):
    """How one server is started and published to."""

    name: str
    version: str
    command: list
    port: int
    path: str
    publisher: Callable
    """Takes the process, and returns what publishes one event."""
    environment: dict | None = None


class Load:
    """Streams that are read and counted, on one thread."""

    def __init__(self, port, paths):
        self.selector = selectors.DefaultSelector()
        self.counts = {}
        for path in paths:
            connection = socket.create_connection(("127.0.0.1", port), 20)
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: text/event-stream\r\n\r\n".encode())
            connection.setblocking(False)
            self.selector.register(connection, selectors.EVENT_READ)
            self.counts[connection] = 0
        self.answered = set()

    def read(self, timeout=0.05):
        """Take in what has arrived."""
        for key, _ in self.selector.select(timeout):
            data = key.fileobj.recv(1 << 16)
            self.answered.add(key.fileobj)
            # The event's name comes once in each event, and nowhere else.
            self.counts[key.fileobj] += data.count(b"event: tick")

    def wait(self, condition, what):
        """Read until ``condition()`` holds."""
        until(lambda: self.read() or condition(), what, 60)

    def close(self):
        """End all."""
        for connection in self.counts:
            connection.close()


def processes(pid):
    """The process and all below it."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(below for child in children for below in processes(int(child)))]


def cpu(pid):
    """User and system seconds of the process and all below it."""
    ticks = 0
    for each in processes(pid):
        fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / TICK


def memory(pid):
    """KiB."""
    rollups = "".join(Path(f"/proc/{each}/smaps_rollup").read_text() for each in processes(pid))
    return sum(map(int, re.findall(r"^Pss: +(\d+)", rollups, re.MULTILINE)))


def measure(what, options):
    """Start a server, open streams, publish, and return what it spent."""
    server = subprocess.Popen(
        list(map(str, what.command)),
        env={key: value for key, value in os.environ.items() if not key.endswith("_URL")} | (what.environment or {}),
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=options.home,
    )
    try:
        until(lambda: accepts(what.port), f"{what.name} listens")
        publish = what.publisher(server)
        first = Load(what.port, [what.path])  # what a server does once only is not a stream's
        first.wait(lambda: first.answered, f"{what.name} answers")
        time.sleep(1)
        before, idle = cpu(server.pid), memory(server.pid)
        load = Load(what.port, [what.path] * options.streams)
        load.wait(lambda: len(load.answered) == options.streams, f"all streams of {what.name} are open")
        time.sleep(1)
        opened, held = cpu(server.pid), memory(server.pid)
        events, begin = RATE * options.seconds, time.monotonic()
        for number in range(events):
            publish()
            while time.monotonic() < begin + (number + 1) / RATE:
                load.read(0.002)
        # One that does not keep up has its time, and is measured by what it delivered.
        end, expected = time.monotonic() + PATIENCE, events * options.streams
        while (received := sum(load.counts.values())) < expected and time.monotonic() < end:
            load.read()
        spent = cpu(server.pid) - opened
        load.close()
        first.close()
        streams = options.streams
        return Figures(
            what.name + ("" if received == expected else ", which fell behind"),
            what.version,
            (opened - before) / streams * 1e6,
            spent / received * 1e6,
            (held - idle) / streams,
        )
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


def accepts(port):
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def by_redis(server):
    client, payload = redis.Redis(port=server.port), json.dumps({"event": "tick", "data": json.dumps(DATA)})
    return lambda _: lambda: client.publish("x", payload)


def listening_on(port):
    """The flags that relay and predecessor share."""
    return ["--host", "127.0.0.1", "--port", port, "--workers", "1"]


def of_relay(options, server):
    port = free_port()
    command = [Path(sys.executable).with_name("sse-relay-server"), *listening_on(port)]
    env = {"REDIS_URL": server.url, "LOG_LEVEL": "WARNING"}
    return measure(Server("sse-relay-server", __version__, command, port, "/channel=x", by_redis(server), env), options)


def of_predecessor(options, server):
    folder = options.home / "predecessor"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    install = [folder / "bin/pip", "install", "-q", "--disable-pip-version-check", *PREDECESSOR]
    if subprocess.run(install, capture_output=True, check=False).returncode:
        return None
    port = free_port()
    # -I: its package has the name of a module of ours.
    command = [folder / "bin/python", "-I", folder / "bin/sse-relay-server", *listening_on(port)]
    env = {"REDIS_URL": server.url, "LOG_LEVEL": "WARNING", "ALLOWED_ORIGINS": "http://localhost"}
    version = PREDECESSOR[0].partition("==")[2]
    return measure(Server("its predecessor (Starlette)", version, command, port, "/x", by_redis(server), env), options)


def of_nchan(options, _):
    nginx, module = shutil.which("nginx"), "modules/ngx_nchan_module.so"
    if not nginx or not any((Path(root) / module).exists() for root in ("/usr/lib/nginx", "/usr/share/nginx")):
        return None
    port = free_port()
    (options.home / "nginx.conf").write_text(NGINX.format(home=options.home, port=port))
    client, event = http.client.HTTPConnection("127.0.0.1", port), json.dumps(DATA)

    def publish():
        client.request("POST", "/publish", event, {"X-EventSource-Event": "tick"})
        client.getresponse().read()

    said = subprocess.run([nginx, "-v"], capture_output=True, text=True, check=True).stderr
    version = f"nginx {said.rpartition('/')[2].strip()}"
    command = [nginx, "-c", options.home / "nginx.conf", "-e", options.home / "error.log"]
    return measure(Server("nchan (C, in nginx)", version, command, port, "/x", lambda _: publish), options)


def of_floor(options, _):
    compiler, binary, port = shutil.which("cc"), options.home / "floor", free_port()
    if not compiler:
        return None
    subprocess.run([compiler, "-O2", "-o", binary, HERE / "floor.c"], check=True)
    frame = f"event: tick\ndata: {json.dumps(DATA)}\n\n".encode()

    def publisher(server):
        def publish():
            server.stdin.write(b"%04d" % len(frame) + frame)
            server.stdin.flush()

        return publish

    return measure(Server(FLOOR, platform.release(), [binary, port], port, "/", publisher), options)


def table(found, under_pressure, options):
    size, today = len(json.dumps(DATA)), datetime.datetime.now(tz=datetime.timezone.utc).date()
    work = f"{options.streams:,} streams on one channel, {RATE} events a second of {size} bytes for {options.seconds} s"
    lines = [
        "# Speed",
        "",
        f"One worker each, {work}, on {machine()}, {today}. CPU time of the server's processes, user and system.",
        "",
        "| server | version | CPU of a delivery | CPU of an opened stream | memory of an idle stream |",
        "|---|---|---|---|---|",
    ]
    for each in found:
        opened = "" if each.name == FLOOR else f"{each.connect:.0f} µs"
        kept = "" if each.name == FLOOR else f"{each.memory:.1f} KiB"
        lines.append(f"| {each.name} | {each.version} | {each.delivery:.1f} µs | {opened} | {kept} |")
    lines += [
        "",
        "## Under pressure",
        "",
        UNDER_PRESSURE.format(streams=options.streams),
        "",
        *under_pressure,
        "",
        "To repeat it: `make bench`.",
        "",
    ]
    return "\n".join(lines)


def machine():
    models = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"{len(models)} x {models[0]}, Linux {platform.release()}, Python {platform.python_version()}"


def chart(found, options):
    """Bars of the CPU of a delivery, in light and in dark."""
    # One that takes a hundred times as much would leave nothing to see of the others.
    longest, height = (
        max(each.delivery for each in found if each.delivery < 10 * found[0].delivery),
        46 * len(found) + 60,
    )
    rows = [
        f'<text x="0" y="16" class="title">CPU of a delivery, µs: {options.streams:,} streams, {RATE} events a second</text>'
    ]
    for number, each in enumerate(found):
        y, width = 36 + 46 * number, min(420.0, 420 * each.delivery / longest)
        beyond = "" if each.delivery <= longest else " (the bar is cut)"
        kind = "ours" if number == 0 else "other"
        rows.append(f'<text x="0" y="{y + 12}">{escape(each.name)}</text>')
        rows.append(f'<rect class="{kind}" x="0" y="{y + 18}" width="{width:.0f}" height="16" rx="2"/>')
        rows.append(f'<text x="{width + 8:.0f}" y="{y + 31}">{each.delivery:,.1f}{beyond}</text>')
    rows.append(f'<text x="0" y="{height - 8}" class="note">one worker each; {escape(machine())}</text>')
    style = (
        "text{font:13px sans-serif;fill:#24292f}.title{font-weight:600}.note{font-size:11px;fill:#57606a}"
        ".ours{fill:#1a7f64}.other{fill:#8c959f}"
        "@media(prefers-color-scheme:dark){text{fill:#e6edf3}.note{fill:#9198a1}.ours{fill:#3fb68b}.other{fill:#6e7681}}"
    )
    body = "\n".join(rows)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 {height}" width="640" height="{height}" role="img" '
        f'aria-label="CPU time of a delivery by server">\n<style>{style}</style>\n{body}\n</svg>\n'
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--seconds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs")
    options = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    options.home = Path(tempfile.mkdtemp(prefix="bench-"))
    server = RedisServer(options.home)
    try:
        found = []
        for of in (of_relay, of_nchan, of_floor, of_predecessor):
            figures = of(options, server)
            print(figures or f"{of.__name__[3:]}: not measured, it is not here", flush=True)
            found += [figures] if figures else []
    finally:
        server.stop()
        shutil.rmtree(options.home, ignore_errors=True)
    under_pressure = pressure.measure(1e6 / (found[0].delivery * options.streams), options)
    options.out.mkdir(exist_ok=True)
    (options.out / "fanout.md").write_text(table(found, under_pressure, options))
    (options.out / "fanout.svg").write_text(chart(found, options))
    print(table(found, under_pressure, options))


if __name__ == "__main__":
    main()
