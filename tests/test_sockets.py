"""Addresses that the relay listens on: names, both families, and what a machine does not have."""

import errno
import socket
import subprocess
import sys

import httpx
import pytest
from programs import program
from relay import Relay, run
from servers import PATIENCE, free_port

from tornado_relay import SettingsError
from tornado_relay.sockets import bind

NOWHERE = (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("2001:db8::1", 0, 0, 0))
HERE = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))


@pytest.fixture
def names():
    """Bind, and return the addresses of the first worker's sockets, which are the same for all."""

    def names(host):
        groups = bind(host, 0, 3)
        found = [[listener.getsockname()[:2] for listener in group] for group in groups]
        for listener in (listener for group in groups for listener in group):
            listener.close()
        assert found == [found[0]] * 3
        assert len({port for _, port in found[0]}) == 1
        return [address for address, _ in found[0]]

    return names


@pytest.fixture
def ipv6():
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            pytest.skip("this machine has no IPv6")


@pytest.mark.parametrize("order", [[NOWHERE, HERE], [HERE, NOWHERE]])
def test_address_that_the_machine_does_not_have_is_left_out(monkeypatch, names, order):
    """A name may have several; the relay listens on those that there are."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: order)
    assert names("a-name") == ["127.0.0.1"]


def test_name_of_which_no_address_can_be_bound_is_an_error(monkeypatch):
    """It says why."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [NOWHERE])
    with pytest.raises(SettingsError, match=r"cannot listen on a-name:0 .*: Cannot assign requested address"):
        bind("a-name", 0, 1)


def test_address_that_is_taken_is_an_error_even_if_another_is_free(monkeypatch):
    """Otherwise the clients of that address would come to another program."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        found = [(*HERE[:4], ("127.0.0.2", port)), (*HERE[:4], ("127.0.0.1", port))]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
        with pytest.raises(SettingsError, match="Address already in use"):
            bind("a-name", port, 1)


@pytest.mark.parametrize("host", ["*", "::", "::0", "0:0:0:0:0:0:0:0"])
def test_kernel_without_ipv6_has_ipv4(monkeypatch, names, host):
    """Such as one that was booted with ipv6.disable=1."""

    class Socket(socket.socket):
        def __init__(self, family=-1, *arguments, **options):
            if family == socket.AF_INET6:
                raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
            super().__init__(family, *arguments, **options)

    monkeypatch.setattr(socket, "socket", Socket)
    assert names(host) == ["0.0.0.0"]


def test_localhost_where_the_hosts_file_has_more_than_the_kernel(tmp_path):
    """As in Docker for years: "::1 localhost" in /etc/hosts, and no ::1."""
    (hosts := tmp_path / "hosts").write_text("127.0.0.1 localhost\n::1 localhost\n")
    code = (
        "from tornado_relay.sockets import bind; print([each.getsockname()[0] for each in bind('localhost', 0, 1)[0]])"
    )
    script = """
        ip link set lo up && echo 1 > /proc/sys/net/ipv6/conf/lo/disable_ipv6
        mount --make-rprivate / && mount --bind "$1" /etc/hosts && exec "$2" -c "$3"
    """
    unshare = [program("unshare"), "--net", "--mount"]
    if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine lets us make no network namespace")
    command = [*unshare, "sh", "-ec", script, "sh", hosts, sys.executable, code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("['127.0.0.1']\n", "")


@pytest.mark.parametrize(
    ("host", "serves"),
    [
        ("*", ["127.0.0.1", "[::1]"]),
        ("::", ["127.0.0.1", "[::1]"]),
        ("[::]", ["127.0.0.1", "[::1]"]),
        ("::1", ["[::1]"]),
        ("[::1]", ["[::1]"]),
        ("0.0.0.0", ["127.0.0.1"]),
    ],
)
def test_families_of_a_host(ipv6, redis_server, tmp_path, host, serves):
    """The relay and its admin listener serve all of them, and no other one."""
    admin = free_port()
    flags = ("--workers", "2", "--host", host, "--admin-host", host, "--admin-port", admin)
    with Relay(tmp_path, *flags, **redis_server.environment) as relay:
        for address in ("127.0.0.1", "[::1]"):
            for port in (relay.port, admin):
                url = f"http://{address}:{port}/healthz"
                if address in serves:
                    assert httpx.get(url, timeout=PATIENCE).status_code == 200
                else:
                    with pytest.raises(httpx.ConnectError):
                        httpx.get(url)


def test_taken_port_of_an_ipv6_address_is_named_as_in_a_url(ipv6, redis_server, tmp_path):
    """So that the end of the address and the port are told apart."""
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as other:
        port = other.getsockname()[1]
        done = run("--host", "::1", "--port", port, cwd=tmp_path, **redis_server.environment)
    assert f"cannot listen on [::1]:{port} (--host, --port): Address already in use" in done.stderr
