"""The systemd unit, the compose files and the built package, as the README has them."""

import os
import re
import shutil
import subprocess
import sys

import pytest
import yaml
from programs import program
from relay import COMMAND, ROOT, Relay, environment
from test_readme import block

from tornado_relay.settings import FIELDS

UNIT = ROOT / "systemd/sse-relay-server.service"


@pytest.fixture
def unit(tmp_path):
    """The unit with the command of this environment, which must exist for systemd's checks."""
    path = tmp_path / UNIT.name
    path.write_text(UNIT.read_text().replace("/opt/sse-relay-server/bin/sse-relay-server", COMMAND))
    shutil.copy(UNIT.with_suffix(".socket"), tmp_path)
    return path


def test_unit_is_verified_by_systemd(unit):
    """Without a word, and its socket as well."""
    units = [unit, unit.with_suffix(".socket")]
    done = subprocess.run([program("systemd-analyze"), "verify", *units], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_unit_is_hardened(unit):
    """An exposure of 2.0 or better, by systemd's own count."""
    done = subprocess.run(
        [program("systemd-analyze"), "security", "--offline=yes", unit], capture_output=True, text=True, check=False
    )
    exposure = re.search(r"Overall exposure level.*?: ([\d.]+)", done.stdout)
    assert float(exposure[1]) <= 2.0


def test_unit_has_what_the_relay_needs():
    """Readiness and watchdog as the supervisor speaks them, room for the drain, descriptors."""
    text = UNIT.read_text()
    lines = ("Type=notify", "LimitNOFILE=100000", "KillMode=mixed", "EnvironmentFile=-/etc/sse-relay-server/.env")
    for line in (*lines, f"RestartPreventExitStatus=2 {os.EX_CONFIG}"):
        assert f"\n{line}\n" in text
    assert int(re.search(r"WatchdogSec=(\d+)", text)[1]) >= 2
    drain = next(field.default for field in FIELDS if field.name == "drain_seconds")
    assert int(re.search(r"TimeoutStopSec=(\d+)", text)[1]) > drain + 5


def test_installation_commands_match_the_unit():
    """The README installs to where the unit looks."""
    commands, text = block("sh", "venv /opt"), UNIT.read_text()
    assert "ExecStart=/opt/sse-relay-server/bin/sse-relay-server\n" in text
    assert "venv /opt/sse-relay-server\n" in commands
    assert "/etc/sse-relay-server/.env" in commands
    assert (ROOT / ".env.example").exists()
    assert "install -m 644 systemd/sse-relay-server.service /etc/systemd/system/" in commands


@pytest.mark.parametrize("name", ["compose.yaml", "compose.postgres.yaml"])
def test_compose_file(name):
    """Its variables are settings, its broker is a service of its own, and it stops later than the drain ends."""
    services = yaml.safe_load((ROOT / name).read_text())["services"]
    relay = services["relay"]
    known = {field.metadata["variable"] for field in FIELDS}
    assert set(relay["environment"]) <= known
    url = relay["environment"].get("REDIS_URL") or relay["environment"]["DATABASE_URL"]
    host = re.search(r"(?:@|//)(\w+):\d+/", url)[1]
    assert host in services
    assert relay["depends_on"] == [host]
    assert relay["ports"] == ["8001:8001"]
    assert int(relay["stop_grace_period"].rstrip("s")) >= 10
    if "DATABASE_URL" in relay["environment"]:
        login = services["postgres"]["environment"]
        assert f"//{login['POSTGRES_USER']}:{login['POSTGRES_PASSWORD']}@postgres:5432/{login['POSTGRES_DB']}" in url


def test_built_package_works_in_an_empty_environment(redis_server, tmp_path):
    """The wheel has all its files: without the sources it serves, and shows its page."""
    venv = tmp_path / "venv"
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".venv", ".git", "*.egg-info", "build", "tests"))
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    subprocess.run([venv / "bin/pip", "install", "-q", "--disable-pip-version-check", f"{source}[redis]"], check=True)
    shutil.rmtree(source)
    command = (str(venv / "bin/sse-relay-server"),)
    with Relay(tmp_path, "--workers", "1", "--debug", command=command, **redis_server.environment) as relay:
        import httpx

        assert "<title>sse-relay-server" in httpx.get(f"{relay.url}/").text
    code = "from sse_relay_server import notify; notify('c', {'data': 'x'})"
    subprocess.run(
        [venv / "bin/python", "-c", code], cwd=tmp_path, env=environment(**redis_server.environment), check=True
    )
