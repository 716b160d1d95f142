"""The unit on a real systemd, process 1 of namespaces of its own: installed as the README says, sandboxed as it stands."""

import os
import re
import shlex
import signal
import subprocess
from pathlib import Path

import httpx
import pytest
from callers import Callers
from fleet import Fleet, Numbers
from pages import data_of
from programs import program
from relay import ROOT
from servers import free_port, until
from test_readme import block

from tornado_relay import __version__
from tornado_relay.tokens import subscribe_token

SECRET, TOKEN = "s" * 40, "p" * 40
SYSTEMD = "/lib/systemd/systemd"
NAMESPACES = ["--fork", "--kill-child", "--pid", "--mount-proc", "--mount", "--uts", "--ipc", "--cgroup"]
RUNTIME = "/run/sse-relay-server"
# Nothing of it touches the machine's own files: what is written goes to memory, and away with the namespaces. Of the
# machine's services none is started; what the unit waits for is there.
BOOT = """
set -eu
mount -t tmpfs tmpfs /run
mkdir /run/source
tar -C {root} --exclude=.venv --exclude=.git --exclude='*.egg-info' --exclude=build --exclude=tests -c . | tar -C /run/source -x
mount -t tmpfs tmpfs /tmp
for folder in etc opt var; do
    mkdir -p /run/over/$folder /run/work/$folder
    mount -t overlay overlay -o lowerdir=/$folder,upperdir=/run/over/$folder,workdir=/run/work/$folder /$folder
done
mount -t cgroup2 cgroup2 /sys/fs/cgroup
cd /run/source
{install}
printf '%s\\n' {variables} >> /etc/sse-relay-server/.env
mkdir -p /run/systemd/system/sse-relay-server.service.d
ln -s /dev/null /run/systemd/system/network-online.target
printf '[Unit]\\nDefaultDependencies=no\\n[Service]\\nStandardOutput=file:/run/log\\nStandardError=file:/run/log\\n' \\
    > /run/systemd/system/sse-relay-server.service.d/test.conf
{socket}
printf '[Unit]\\nDefaultDependencies=no\\nWants={units}\\n' > /run/systemd/system/test.target
exec env -i container=test PATH="$PATH" {systemd} --system --unit=test.target --log-target=console --show-status=0
"""


# What an administrator gives to `systemctl edit sse-relay-server.socket`.
SOCKET = """
{install}
mkdir -p /run/systemd/system/sse-relay-server.socket.d
printf '%s\\n' '[Unit]' DefaultDependencies=no '[Socket]' ListenStream= ListenStream={port} ListenStream={path} \\
    > /run/systemd/system/sse-relay-server.socket.d/test.conf
printf '%s\\n' '[Unit]' DefaultDependencies=no '[Socket]' ListenStream=127.0.0.1:{admin} FileDescriptorName=admin \\
    Service=sse-relay-server.service > /run/systemd/system/admin.socket
"""


class Machine:
    """A booted systemd with the installed unit."""

    def __init__(self, home, variables, socket="", units="sse-relay-server.service"):
        self.log_path = home / "boot.log"
        commands = block("sh", "venv /opt").replace("sudo ", "").replace("python3 -m venv", "/usr/bin/python3 -m venv")
        commands = (
            commands.replace('"sse-relay-server[', '"/run/source[')
            .replace(']>=2"', ']"')
            .replace("pip install", "pip install --quiet")
        )
        assert "systemctl enable --now sse-relay-server" in commands
        script = BOOT.format(
            root=shlex.quote(str(ROOT)),
            install="\n".join(line for line in commands.splitlines() if not line.startswith("systemctl")),
            variables=" ".join(shlex.quote(f"{name}={value}") for name, value in variables.items()),
            systemd=SYSTEMD,
            socket=socket,
            units=units,
        )
        with self.log_path.open("w") as log:
            self.process = subprocess.Popen(
                [program("unshare"), *NAMESPACES, "bash", "-c", script],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    @property
    def first(self):
        """What is process 1 inside."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return until(children.read_text, "process 1").strip()

    def run(self, *command):
        """Run a command inside, as root, and return what it says."""
        inside = ["nsenter", f"--target={self.first}", "--mount", "--pid", "--uts", "--ipc", "--wd=/"]
        done = subprocess.run([*inside, *command], capture_output=True, text=True, check=False)
        return done.stdout + done.stderr

    def state(self, name):
        return self.run("systemctl", "show", "--value", f"--property={name}", "sse-relay-server").strip()

    def wait_active(self):
        def active():
            assert self.process.poll() is None, self.log_path.read_text()
            assert self.state("ActiveState") != "failed", self.log
            return self.state("ActiveState") == "active"

        until(active, "the unit is active", 180)

    @property
    def log(self):
        return self.run("cat", "/run/log")

    def workers(self):
        main = self.state("MainPID")
        return self.run("cat", f"/proc/{main}/task/{main}/children").split()

    def kill(self, *pids):
        self.run("bash", "-c", f"kill -KILL {' '.join(pids)}")


@pytest.fixture
def bootable():
    probe = [program("unshare"), *NAMESPACES, "mount", "-t", "cgroup2", "cgroup2", "/sys/fs/cgroup"]
    if not Path(SYSTEMD).exists() or subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("systemd, and the right to make namespaces, are needed to boot it")


@pytest.fixture
def machine(bootable, kept, tmp_path):
    """One that listens on a port with PostgreSQL, and on a Unix socket in its runtime folder with Redis."""
    port, path = free_port(), RUNTIME + "/relay.sock" if kept.kind == "redis" else ""
    variables = {**kept.environment, "RELAY_HTTP_PORT": port, "RELAY_UNIX_SOCKET": path, "RELAY_WORKERS": 2}
    variables |= {"RELAY_JWT_SECRET": SECRET, "RELAY_PUBLISH_TOKEN": TOKEN, "RELAY_DRAIN_SECONDS": 1}
    with Machine(tmp_path, variables) as machine:
        machine.wait_active()
        machine.port, machine.unix_socket = port, f"/proc/{machine.first}/root{path}" if path else ""
        transport = httpx.HTTPTransport(uds=machine.unix_socket) if path else None
        with httpx.Client(transport=transport, base_url=f"http://127.0.0.1:{port}") as machine.http:
            yield machine


def test_unit_as_it_stands(machine, kept, pages, channel):
    """Streams, tokens, publishing, history, a killed worker, reload and stop, as an ordinary user who can write nowhere."""
    cookie = {"Cookie": f"relay_token={subscribe_token(channel, ttl=10**5, key=SECRET)}"}
    path = f"/channel={channel}"

    def stream(last=""):
        headers = cookie | ({"Last-Event-ID": last} if last else {})
        (page,) = pages.open(machine.port, [path], headers, unix_socket=machine.unix_socket)
        assert page.status == 200
        return page

    page = stream()
    kept.publish(channel, "one")
    bearer = {"Authorization": f"Bearer {TOKEN}"}
    assert machine.http.post(path, json={"data": "two"}, headers=bearer).status_code == 202
    pages.until(lambda: data_of(page) == ["one", "two"], "both events")
    assert machine.http.get(path).status_code == 401

    # Who runs it, and what it may.
    for pid in [machine.state("MainPID"), *machine.workers()]:
        status = machine.run("cat", f"/proc/{pid}/status")
        assert int(re.search(r"Uid:\s+(\d+)", status)[1]) > 60_000
        for name, value in (("NoNewPrivs", "1"), ("Seccomp", "2"), ("CapEff", "0" * 16), ("CapBnd", "0" * 16)):
            assert re.search(rf"{name}:\s+(\w+)", status)[1] == value
        assert re.search(r"Max open files\s+(\d+)\s+\1 ", machine.run("cat", f"/proc/{pid}/limits"))
    owner = re.search(r"Uid:\s+(\d+)", status)[1]

    # Worker killed, reloaded: with the history nothing is missed.
    for disturb in ("kill", "reload"):
        before = machine.workers()
        last = [event.id for event in page.events if event.id][-1]
        if disturb == "kill":
            machine.kill(*before)
        else:
            assert machine.run("systemctl", "reload", "sse-relay-server") == ""
        kept.publish(channel, disturb)
        until(
            lambda before=before: len(machine.workers()) == 2 and not set(machine.workers()) & set(before), "new ones"
        )
        until(lambda: machine.http.get("/readyz").status_code == 200, "they serve")
        page = stream(last)
        pages.until(lambda page=page, disturb=disturb: data_of(page)[-1:] == [disturb], "what was missed")

    # Restart=on-failure and the watchdog see to the rest.
    assert machine.state("WatchdogTimestamp")
    assert machine.state("NRestarts") == "0"
    machine.kill(machine.state("MainPID"))
    until(lambda: machine.state("NRestarts") == "1" and machine.state("ActiveState") == "active", "it is started again")
    stream()

    # All that is its own is in its runtime folder.
    owned = machine.run("find", "/run", "/tmp", "/var", "/dev/shm", "/etc", "/opt", "-user", owner)
    assert owned.split() == [RUNTIME, *([RUNTIME + "/relay.sock"] if machine.unix_socket else [])]
    assert machine.run("systemctl", "stop", "sse-relay-server") == ""
    assert (machine.state("ActiveState"), machine.state("Result")) == ("inactive", "success")
    for trouble in ("Traceback", "Errno", "not permitted", "denied", "Read-only"):
        assert trouble not in machine.log


def test_what_cannot_work_is_not_started_again(bootable, redis_server, tmp_path):
    """A wrong configuration fails the unit once, with its own status; a broker that is away is waited for."""
    with Machine(tmp_path, {"RELAY_HTTP_PORT": free_port(), "RELAY_WORKERS": 1}) as machine:
        until(lambda: machine.state("ActiveState") == "failed", "the unit has failed", 180)
        told = machine.run("systemctl", "status", "--no-pager", "sse-relay-server")
        assert "status=2" in told
        assert "no broker is set" in machine.log
        assert machine.state("NRestarts") == "0"

        def restart(url):
            change = f"sed -i /^REDIS_URL=/d $file && echo REDIS_URL={url} >> $file"
            script = f"file=/etc/sse-relay-server/.env; {change}; systemctl restart sse-relay-server"
            machine.run("bash", "-c", script)
            return [machine.state(name) for name in ("ActiveState", "ExecMainStatus", "NRestarts")]

        assert restart(redis_server.url.replace("//", "//:wrong@")) == ["failed", "78", "0"]
        assert "cannot start: Redis refused the connection" in machine.log
        assert restart(f"redis://127.0.0.1:{free_port()}/0") == ["active", "0", "0"]
        assert restart(redis_server.url) == ["active", "0", "0"]


@pytest.mark.heavy
def test_socket_unit_over_restart_and_upgrade(bootable, kept, tmp_path):
    """systemd holds the sockets: who connects meanwhile is answered, and streams that come back have missed nothing."""
    port, path, admin = free_port(), "/run/relay.sock", free_port()
    units = "sse-relay-server.socket admin.socket sse-relay-server.service"
    commands = block("sh", "sse-relay-server.socket").replace("sudo ", "").splitlines()
    install = [line for line in commands if line.startswith("install ")]
    assert commands[-1] == "systemctl enable --now sse-relay-server.socket sse-relay-server.service"
    socket = SOCKET.format(install="\n".join(install), port=f"127.0.0.1:{port}", path=path, admin=admin)
    variables = {**kept.environment, "RELAY_WORKERS": 2, "RELAY_DRAIN_SECONDS": 1, "RELAY_HTTP_PORT": free_port()}
    channels = [f"{kept.kind}-unit-{number}" for number in range(5)]
    with Machine(tmp_path, variables, socket, units) as machine:
        machine.wait_active()
        assert "RELAY_HTTP_PORT is not used: systemd gives the socket" in machine.log
        unix_socket = f"/proc/{machine.first}/root{path}"
        with (
            Fleet([f"/channel={channel}" for channel in channels for _ in range(10)], port) as fleet,
            Callers(port) as tcp,
            Callers(None, unix_socket=unix_socket) as unix,
        ):
            numbers = Numbers(kept, channels, 500)
            numbers.start()

            def serves(version):
                before = [callers.answers[version] for callers in (tcp, unix)]

                def more():
                    return all(
                        callers.answers[version] > answers + 20
                        for callers, answers in zip((tcp, unix), before, strict=True)
                    )

                fleet.until(more, f"{version} answers", 60)

            serves(__version__)
            first = machine.state("MainPID")
            assert machine.run("systemctl", "restart", "sse-relay-server") == ""
            serves(__version__)
            second = machine.state("MainPID")
            assert second != first
            machine.run(
                "bash",
                "-c",
                "sed -i 's/^__version__ = \"/&99./' /opt/sse-relay-server/lib/*/*/tornado_relay/__init__.py",
            )
            assert machine.run("systemctl", "reload", "sse-relay-server") == ""
            serves(f"99.{__version__}")
            until(lambda: " reloaded" in machine.log, "the reload has ended")
            assert machine.state("MainPID") == second
            assert len(httpx.get(f"http://127.0.0.1:{admin}/status").json()["workers"]) == 2
            numbers.enough.set()
            fleet.until(lambda: not numbers.is_alive(), "all are published")
            taken = {f"/channel={channel}": numbers.taken[channel] for channel in channels}
            last = lambda: all(stream.got[-1:] == taken[stream.path][-1:] for stream in fleet.streams)  # noqa: E731
            fleet.until(last, "the last events")
            for stream in fleet.streams:
                assert stream.got == taken[stream.path]
                assert not stream.resets
            tcp.__exit__()
            unix.__exit__()
            assert (tcp.troubles, unix.troubles) == ([], [])
        assert machine.state("NRestarts") == "0"
        assert machine.run("systemctl", "stop", *units.split()) == ""
        assert (machine.state("ActiveState"), machine.state("Result")) == ("inactive", "success")
        for trouble in ("Traceback", "Errno", "not permitted", "denied", "Read-only"):
            assert trouble not in machine.log
