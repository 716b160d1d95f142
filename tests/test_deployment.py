"""The systemd unit, the compose files, the built package, and the proxies in front, as the README has them."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import yaml
from programs import program
from relay import COMMAND, ROOT, Relay, environment
from servers import PATIENCE, accepts, free_port, until
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
    for line in ("Type=notify", "LimitNOFILE=100000", "KillMode=mixed", "EnvironmentFile=-/etc/sse-relay-server/.env"):
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


def start_nginx(folder, upstream, certificate, port):
    server = (
        block("nginx", "proxy_pass")
        .replace("127.0.0.1:8001", f"127.0.0.1:{upstream}")
        .replace("443", f"127.0.0.1:{port}")
    )
    server = re.sub(r"/etc/ssl/\S+\.(pem|key);", rf"{certificate}/\1;", server)
    (folder / "nginx.conf").write_text(
        f"pid {folder}/pid; error_log {folder}/error.log; daemon off; events {{}}\n"
        f"http {{ access_log off; client_body_temp_path {folder}/a; proxy_temp_path {folder}/b; fastcgi_temp_path {folder}/c;"
        f" uwsgi_temp_path {folder}/d; scgi_temp_path {folder}/e;\n{server} }}\n"
    )
    return [program("nginx"), "-c", str(folder / "nginx.conf"), "-e", str(folder / "error.log")]


def start_caddy(folder, upstream, certificate, port):
    site = block("caddyfile", "reverse_proxy").replace("127.0.0.1:8001", f"127.0.0.1:{upstream}")
    site = site.replace(
        "events.example.com {", f"events.example.com:{port} {{\n    tls {certificate}/pem {certificate}/key"
    )
    (folder / "Caddyfile").write_text(f"{{\n    admin off\n    auto_https off\n}}\n{site}")
    return [program("caddy"), "run", "--config", str(folder / "Caddyfile"), "--adapter", "caddyfile"]


@pytest.mark.parametrize("start", [start_nginx, start_caddy])
@pytest.mark.parametrize("version", ["--http2", "--http1.1"])
def test_proxy_in_front_passes_events_at_once(redis_server, channel, tmp_path, certificate, start, version):
    """The README's configuration: TLS, HTTP/2 where the client speaks it, no buffering, idle streams live on."""
    curl, port = program("curl"), free_port()
    with Relay(tmp_path, "--workers", "1", "--heartbeat", "1", **redis_server.environment) as relay:
        proxy = subprocess.Popen(
            start(tmp_path, relay.port, certificate, port),
            env=environment(HOME=str(tmp_path), XDG_DATA_HOME=str(tmp_path), XDG_CONFIG_HOME=str(tmp_path)),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        client = None
        try:
            until(lambda: accepts(port), "the proxy listens")
            address = f"events.example.com:{port}"
            client = subprocess.Popen(
                [
                    curl,
                    "-skN",
                    "--max-time",
                    str(PATIENCE),
                    version,
                    "--resolve",
                    f"{address}:127.0.0.1",
                    "-D",
                    tmp_path / "head",
                    f"https://{address}/channel={channel}",
                ],
                stdout=subprocess.PIPE,
            )
            until(lambda: f"on {channel}" in relay.log, "the stream is open")
            for number in range(3):
                redis_server.publish(channel, json.dumps({"data": f"event {number}"}))
                line = b""
                while not line.startswith(b"data: "):
                    line = client.stdout.readline()
                    assert line, "the event did not come"
                assert line == b"data: event %d\n" % number
            heartbeats = 0
            while heartbeats < 2:
                line = client.stdout.readline()
                assert line, "no heartbeat came"
                heartbeats += line == b":\n"
            head = (tmp_path / "head").read_text().lower()
            assert head.startswith("http/2 200" if version == "--http2" else "http/1.1 200")
            assert "content-type: text/event-stream" in head
        finally:
            if client:
                client.kill()
                client.communicate()
            proxy.terminate()
            proxy.wait(20)


def test_nginx_waits_longer_than_the_heartbeat():
    """Otherwise it would cut idle streams."""
    heartbeat = next(field.default for field in FIELDS if field.name == "heartbeat")
    assert int(re.search(r"proxy_read_timeout (\d+)s", block("nginx", "proxy_pass"))[1]) > heartbeat
