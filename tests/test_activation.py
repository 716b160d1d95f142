"""Listening sockets that systemd holds, given as it gives them; tests/test_systemd.py has systemd itself."""

import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from callers import Callers
from programs import program
from relay import COMMAND, Relay, environment, giving
from servers import PATIENCE, free_port, until
from test_limits import statuses

from tornado_relay import __version__


@pytest.fixture
def listen():
    """Make a listening socket, as systemd does."""
    made = []

    def listen(address=("127.0.0.1", 0), *, reuse_port=False):
        family = (
            socket.AF_UNIX if isinstance(address, str) else socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        )
        made.append(listener := socket.socket(family))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, reuse_port)
        listener.bind(address)
        listener.listen(4096)
        return listener

    yield listen
    for listener in made:
        listener.close()


def start(sockets, cwd, **env):
    """Run the command with ``sockets`` to its end."""
    return subprocess.run(
        giving(sockets),
        cwd=cwd,
        env=environment(**env),
        pass_fds=[each.fileno() for each in sockets],
        capture_output=True,
        text=True,
        timeout=PATIENCE * 3,
        check=False,
    )


def held(pid):
    return sum(str(link.readlink()).startswith("socket:") for link in Path(f"/proc/{pid}/fd").iterdir())


def test_sockets_of_systemd_are_listened_on(broker, tmp_path, pages, channel, listen):
    """TCP and a Unix socket together, by all workers; no port of our own, and no child hears of them."""
    path = str(tmp_path / "relay.sock")
    given = [listen(), listen(path)]
    Path(path).chmod(0o660)
    with Relay(tmp_path, "--workers", "2", given=given, **broker.environment) as relay:
        assert relay.port == given[0].getsockname()[1]
        assert f"unix:{path}" in relay.log
        opened = pages.open(relay.port, [f"/channel={channel}"] * 20)
        opened += pages.open(None, [f"/channel={channel}"] * 20, unix_socket=path)
        broker.publish(channel, "hello")
        pages.until(lambda: all(page.data == ["hello"] for page in opened), "the event")
        assert _inodes(relay.process.pid) == {os.fstat(each.fileno()).st_ino for each in given}
        relay.signal(signal.SIGHUP)
        until(lambda: " reloaded" in relay.log, "the reload")
        (page,) = pages.open(None, [f"/channel={channel}"], unix_socket=path)
        assert page.status == 200
        assert relay.stop() == 0
    assert stat.S_IMODE(Path(path).stat().st_mode) == 0o660, "the file is systemd's"
    for each in given:
        with socket.socket(each.family) as client:
            client.connect(each.getsockname())


def test_variables_are_for_the_relay_alone(redis_server, tmp_path, listen):
    """They name its process, and what it starts is not that."""
    given = [listen()]
    code = "import os, sys; from tornado_relay import settings; settings.systemd_variables(); print(*os.environ)"
    done = subprocess.run(
        giving(given, (sys.executable, "-c", code)),
        env=environment(LISTEN_FDS="1", LISTEN_FDNAMES="a"),
        pass_fds=[given[0].fileno()],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "LISTEN_" not in done.stdout
    # Those of another process, such as a shell that systemd has started, are not ours.
    with Relay(tmp_path, LISTEN_PID="1", LISTEN_FDS="1", **redis_server.environment) as relay:
        assert relay.port != given[0].getsockname()[1]


@pytest.mark.parametrize("count", [2, 4])
def test_streams_spread_over_the_workers_of_one_socket(redis_server, tmp_path, pages, listen, count):
    """Of 1,000 streams, opened at once or one by one, the busiest worker holds at most 1.25 times those of the quietest."""
    for at_once in (True, False):
        with Relay(tmp_path, "--workers", str(count), given=[listen()], **redis_server.environment) as relay:
            before = [held(pid) for pid in relay.workers()]
            for paths in [["/channel=x"] * 1000] if at_once else [["/channel=x"]] * 1000:
                pages.open(relay.port, paths)
            streams = [held(pid) - idle for pid, idle in zip(relay.workers(), before, strict=True)]
            assert sum(streams) == 1000
            assert max(streams) <= 1.25 * min(streams), streams


def test_worker_that_hangs_keeps_nobody_from_the_socket(redis_server, tmp_path, pages, listen):
    """Those that have more streams than their share wait for it a moment only."""
    with Relay(tmp_path, "--workers", "2", given=[listen()], **redis_server.environment) as relay:
        stuck, _ = relay.workers()
        os.kill(stuck, signal.SIGSTOP)
        opened = pages.open(relay.port, ["/channel=x"] * 100)
        assert all(page.status == 200 for page in opened)
        os.kill(stuck, signal.SIGCONT)


def test_several_sockets_of_one_address_are_dealt_out(redis_server, tmp_path, pages, listen):
    """ReusePort=yes: each worker has its own then, and none is left out."""
    first = listen(reuse_port=True)
    given = [first, *(listen(first.getsockname(), reuse_port=True) for _ in range(3))]
    for count, each in ((2, 2), (4, 1)):
        with Relay(tmp_path, "--workers", str(count), given=given, **redis_server.environment) as relay:
            listening = [_inodes(pid) & {os.fstat(one.fileno()).st_ino for one in given} for pid in relay.workers()]
            assert [len(inodes) for inodes in listening] == [each] * count
            assert len(set.union(*listening)) == 4
            assert {page.status for page in pages.open(relay.port, ["/channel=x"] * 40)} == {200}


def _inodes(pid):
    links = [str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()]
    return {int(link[8:-1]) for link in links if link.startswith("socket:[")}


def test_admin_listener_by_its_name(redis_server, tmp_path, pages, listen):
    """FileDescriptorName=admin; its pages are on no other socket."""
    public, admin = listen(), listen()
    port = admin.getsockname()[1]
    for order, names in (([public, admin], "relay:admin"), ([admin], "admin")):
        with Relay(
            tmp_path, given=order, LISTEN_FDNAMES=names, RELAY_HTTP_PORT="0", **redis_server.environment
        ) as relay:
            assert (relay.port == public.getsockname()[1]) == (public in order)
            status, streams = pages.open(port, ["/status", "/channel=x"])
            assert (status.status, streams.status) == (200, 404)
            relay.signal(signal.SIGHUP)
            until(lambda relay=relay: " reloaded" in relay.log, "the reload")
            assert pages.open(port, ["/status"])[0].status == 200


def test_settings_that_count_for_nothing_are_named(redis_server, tmp_path, listen):
    """The socket of systemd wins over host, port and path."""
    path = tmp_path / "own.sock"
    env = {"RELAY_HTTP_PORT": str(free_port()), "RELAY_UNIX_SOCKET": str(path), **redis_server.environment}
    with Relay(tmp_path, given=[listen()], **env) as relay:
        for name in ("RELAY_HTTP_PORT", "RELAY_UNIX_SOCKET"):
            assert f"{name} is not used: systemd gives the socket" in relay.log
        assert "RELAY_HTTP_HOST" not in relay.log
        assert not path.exists()


def test_ipv4_client_of_an_ipv6_socket(redis_server, tmp_path, pages, listen):
    """ListenStream=8001 takes both; an IPv4 address is then one client as ever, for limits and trusted proxies."""
    with socket.socket(socket.AF_INET6) as both:
        both.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        both.bind(("::", 0))
        both.listen()
        flags = ("--max-connections-per-ip", "2", "--trusted-proxies", "127.0.0.1", "--workers", "1")
        with Relay(tmp_path, *flags, given=[both], **redis_server.environment) as relay:
            for client in ("1.1.1.1", "1.1.1.2"):
                taken, refused = statuses(pages, relay, 3, {"X-Forwarded-For": client})
                assert (len(taken), len(refused)) == (2, 1)
            pages.open(relay.port, ["/channel=x"])
            pages.open(relay.port, ["/channel=x"], version="1.0")  # by Tornado's way
            until(lambda: relay.log.count("stream opened: 127.0.0.1 on x") == 2, "they are logged by their address")
            assert "stream opened: 1.1.1.2 on x" in relay.log


class TestWhatCannotBeListenedOn:
    """Ends the command with status 2, and a line that says what would be right."""

    def test_sockets(self, tmp_path, redis_server, listen):
        """Datagrams, a socket that does not listen, none at all."""
        with (
            socket.socket(type=socket.SOCK_DGRAM) as datagram,
            socket.socket() as idle,
            (tmp_path / "f").open("w") as file,
        ):
            datagram.bind(("127.0.0.1", 0))
            idle.bind(("127.0.0.1", 0))
            for wrong in (datagram, idle, file):
                done = start([listen(), wrong], tmp_path, LISTEN_FDS="2", **redis_server.environment)
                assert done.returncode == 2
                assert "ListenStream= and Accept=no" in done.stderr
                assert "descriptor 4" in done.stderr
                assert done.stderr.count("\n") == 1

    @pytest.mark.parametrize(
        ("name", "variables"),
        [
            ("LISTEN_FDS", {"LISTEN_FDS": "many"}),
            ("LISTEN_FDS", {"LISTEN_FDS": "-1"}),
            ("LISTEN_FDS", {}),
            ("LISTEN_FDS", {"LISTEN_FDS": "9"}),
            ("LISTEN_FDNAMES", {"LISTEN_FDS": "1", "LISTEN_FDNAMES": "a:b"}),
        ],
    )
    def test_variables(self, tmp_path, redis_server, listen, name, variables):
        """Garbage in what systemd sets."""
        done = start([listen()], tmp_path, **variables, **redis_server.environment)
        assert done.returncode == 2
        assert name in done.stderr
        assert done.stderr.count("\n") == 1


def test_restart_refuses_nobody(redis_server, tmp_path, listen):
    """Who connects in a tight loop while the relay ends and starts anew waits in the queue of systemd's socket."""
    path = str(tmp_path / "relay.sock")
    given = [listen(), listen(path)]
    with Callers(given[0].getsockname()[1]) as tcp, Callers(None, unix_socket=path) as unix:
        for times in range(1, 4):
            with Relay(tmp_path, "--workers", "2", given=given, drain="0", **redis_server.environment) as relay:
                until(lambda times=times: all(sum(c.answers.values()) > 50 * times for c in (tcp, unix)), "answers")
                assert relay.stop() == 0
        with Relay(tmp_path, "--workers", "2", given=given, **redis_server.environment):
            tcp.__exit__()
            unix.__exit__()
    assert (tcp.troubles, unix.troubles) == ([], [])
    assert set(tcp.answers) == {__version__}


def test_systemd_socket_activate(redis_server, tmp_path, pages):
    """As systemd's own tool starts it, at the first connection."""
    port = free_port()
    command = (program("systemd-socket-activate"), "-l", f"127.0.0.1:{port}", "--fdname=relay")
    variables = environment(**redis_server.environment)
    command += tuple(f"--setenv={name}" for name in variables)
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([*command, COMMAND], cwd=tmp_path, env=variables, stderr=log)
    try:
        until(lambda: "Listening on" in (tmp_path / "log").read_text(), "it listens")
        (page,) = pages.open(port, ["/channel=x"])
        assert page.status == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.wait()
