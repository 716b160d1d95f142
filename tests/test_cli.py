"""The command line, through the installed command."""

import json
import re
import signal
import subprocess
from pathlib import Path

import pytest
from relay import COMMAND, Relay, environment, run
from servers import PATIENCE, free_port, until

from tornado_relay import __version__
from tornado_relay.settings import FIELDS


def test_version(tmp_path):
    """One line with the name and the number."""
    assert run("--version", cwd=tmp_path).stdout == f"sse-relay-server {__version__}\n"


def test_help_names_the_variable_of_each_flag(tmp_path):
    """So that whoever reads it can set either."""
    text = " ".join(run("--help", cwd=tmp_path).stdout.split())
    for field in FIELDS:
        assert re.search(rf"{field.metadata['flag']}\b.*?\(variable {field.metadata['variable']}[;)]", text), field.name


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--port", "8001:8001"], "--port: '8001:8001' is not a port"),
        (["--port", "http"], "--port: 'http'"),
        (["--port"], "--port: expected one argument"),
        (["--workers", "many"], "--workers: 'many'"),
        (["--host", ""], "--host is empty"),
        (["--prot", "8001"], "there is no flag --prot"),
        (["--log-level", "LOUD"], "--log-level: 'LOUD' is not one of CRITICAL"),
        (["--redis-url", "localhost:6379"], "REDIS_URL must start with redis://"),
        (["--redis-url", "redis://:pw/@h:x/0"], "REDIS_URL cannot be read"),
        (["--database-url", "postgresql://u:p/w@h:5432/d"], "DATABASE_URL cannot be read"),
        (["--redis-url", "redis://h/0?foo=bar"], "REDIS_URL has an option that cannot be used"),
        (["--database-url", "postgresql://h/\udcff"], "DATABASE_URL (or RELAY_LISTEN_DATABASE_URL) cannot be read"),
        (["--database-url", "postgresql://h/d?foo=bar"], "DATABASE_URL (or RELAY_LISTEN_DATABASE_URL) cannot be read"),
        (
            ["--database-url", "postgresql://h/d", "--listen-database-url", "redis://h"],
            "RELAY_LISTEN_DATABASE_URL must start",
        ),
        (["--redis-url", "redis://h", "--use-pg"], "RELAY_USE_PG is true, but DATABASE_URL is not set"),
        (["--redis-url", "redis://h", "--host", "a..b"], "cannot listen on a..b"),
        (["notify", "c", "[" * 60_000], "EVENT is not JSON"),
        (["--env-file", "nowhere.env"], "'nowhere.env'"),
        (["--allowed-origins", "shop.example"], "--allowed-origins: 'shop.example'"),
        (["serve"], "invalid choice: 'serve'"),
        (["notify", "c"], "the following arguments are required: EVENT"),
    ],
)
def test_wrong_usage_is_answered_in_one_line_that_names_it(arguments, said, tmp_path):
    """Without a usage text, a traceback or a password."""
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode in (1, 2)
    lines = [line for line in done.stderr.strip().splitlines() if " WARNING " not in line]
    assert len(lines) == 1
    assert said in lines[0]
    assert "p/w" not in done.stderr
    assert "pw/" not in done.stderr.replace(" ".join(arguments), "")


def test_without_a_broker_two_lines_say_what_to_set(tmp_path):
    """And how to try the relay without one."""
    done = run(cwd=tmp_path)
    assert done.returncode == 2
    first, second = done.stderr.strip().splitlines()
    assert "DATABASE_URL" in first
    assert "REDIS_URL" in first
    assert "--embedded" in second


@pytest.fixture
def listen(tmp_path):
    """Start `sse-relay-server listen` with these arguments; ended with the test."""
    started = []

    def listen(*arguments):
        process = subprocess.Popen(
            [COMMAND, "listen", *arguments],
            cwd=tmp_path,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield listen
    for process in started:
        process.kill()
        process.communicate()


def opened(relay, channel):
    until(lambda: f"on {channel}" in relay.log, "the stream is open")


def next_data(listening):
    return json.loads(listening.stdout.readline())["data"]


def test_notify_and_listen(relay, broker, channel, tmp_path, listen):
    """What one sends the other prints, as one JSON object a line, until it is interrupted."""
    listening = listen(channel, "--port", str(relay.port))
    opened(relay, channel)
    for event in ('{"event":"e","id":1,"data":"a\\nb"}', '"just text"', "[1, 2]"):
        assert run("notify", channel, event, cwd=tmp_path, **broker.environment).returncode == 0
    assert json.loads(listening.stdout.readline()) == {"event": "e", "data": "a\nb", "id": "1"}
    assert [next_data(listening), next_data(listening)] == ["just text", "[1,2]"]
    listening.send_signal(signal.SIGINT)
    assert listening.wait(PATIENCE) == 130
    assert "Traceback" not in listening.stderr.read()


def test_listen_takes_a_url_and_comes_back_after_a_restart(redis_server, channel, tmp_path, listen):
    """As a browser does, and says why it waits."""
    port = free_port()
    with Relay(tmp_path, "--workers", "1", port=port, **redis_server.environment) as relay:
        listening = listen(f"{relay.url}/channel={channel}")
        opened(relay, channel)
    lines = [listening.stderr.readline() for _ in range(3)]
    assert "the stream ended; trying again" in lines[1]
    assert "no relay at" in lines[2]
    with Relay(tmp_path, "--workers", "1", port=port, **redis_server.environment) as relay:
        opened(relay, channel)
        assert json.loads(next_data(listening))["reason"] == "unknown-id"
        redis_server.publish(channel, "hello")
        assert next_data(listening) == "hello"


def test_listen_says_when_the_relay_refuses(redis_server, tmp_path):
    """A 400 will not get better by trying again."""
    with Relay(tmp_path, "--workers", "1", **redis_server.environment) as relay:
        done = run("listen", f"{relay.url}/channel=a%0Ab", cwd=tmp_path)
    assert done.returncode == 1
    assert "400" in done.stderr
    assert "control character" in done.stderr


def test_listen_takes_any_text_in_a_url(redis_server, channel, tmp_path, listen):
    """Blanks, and letters of any script."""
    with Relay(tmp_path, "--workers", "1", **redis_server.environment) as relay:
        listening = listen(f"{relay.url}/channel={channel} café")
        opened(relay, f"{channel} café")
        redis_server.publish(f"{channel} café", "hello")
        assert next_data(listening) == "hello"


def test_listen_refuses_what_is_no_address(tmp_path):
    """It will not get better by trying again."""
    done = run("listen", "http://h:80x/a", cwd=tmp_path)
    assert done.returncode == 1
    assert "is not the address of a stream" in done.stderr
    assert "Traceback" not in done.stderr


def test_listen_uses_the_unix_socket(redis_server, channel, tmp_path, listen):
    """Where the relay has no port."""
    path = str(tmp_path / "s")
    with Relay(tmp_path, "--workers", "1", unix_socket=path, **redis_server.environment) as relay:
        listening = listen(channel, "--unix-socket", path)
        opened(relay, channel)
        redis_server.publish(channel, "hello")
        assert next_data(listening) == "hello"


@pytest.mark.parametrize(
    ("channel", "event", "said"),
    [
        ("c", "hello", "EVENT is not JSON"),
        ("c", "{event: x}", "EVENT is not JSON"),
        ("c", '{"evnt":"x"}', "unknown key 'evnt'"),
        ("", '"x"', "channel is empty"),
        ("c", '{"id":"a\\nb"}', "'id'"),
    ],
)
def test_notify_refuses_what_cannot_be_sent(redis_server, tmp_path, channel, event, said):
    """In one line."""
    done = run("notify", channel, event, cwd=tmp_path, **redis_server.environment)
    assert done.returncode in (1, 2)
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_notify_says_when_the_broker_is_not_there(tmp_path):
    """Status 1, one line."""
    for env in (
        {"REDIS_URL": f"redis://127.0.0.1:{free_port()}/0"},
        {"DATABASE_URL": f"postgresql://u:secret@127.0.0.1:{free_port()}/d"},
    ):
        done = run("notify", "c", '"x"', cwd=tmp_path, **env)
        assert done.returncode == 1
        assert "cannot be reached" in done.stderr
        assert done.stderr.count("\n") == 1
        assert "secret" not in done.stderr


def test_listen_database_url_is_what_the_workers_use(postgres_server, tmp_path, pages, channel):
    """DATABASE_URL may be a pooler that knows no LISTEN."""
    pooler = f"postgresql://u@127.0.0.1:{free_port()}/d"
    with Relay(tmp_path, "--workers", "1", DATABASE_URL=pooler, RELAY_LISTEN_DATABASE_URL=postgres_server.url) as relay:
        (page,) = pages.open(relay.port, [f"/channel={channel}"])
        postgres_server.publish(channel, "x")
        pages.until(lambda: page.events, "the event")


@pytest.mark.parametrize("left", ["", "5", "[]", "null", "{}", '{"version": 1}'])
def test_variable_that_is_for_the_relay_itself(tmp_path, left):
    """Whoever sets it reads in one line that it has to go."""
    done = run("--redis-url", "redis://127.0.0.1:1", cwd=tmp_path, SSE_RELAY_HANDOVER=left)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "SSE_RELAY_HANDOVER is for the relay's own use; remove it from the environment" in done.stderr


def test_descriptor_limit_is_raised_to_the_hard_one(redis_server, tmp_path):
    """A stream is a descriptor, and the usual soft limit is 1,024."""
    with Relay(tmp_path, "--workers", "1", **redis_server.environment) as relay:
        (worker,) = relay.workers()
        limits = Path(f"/proc/{worker}/limits").read_text()
    soft, hard = re.search(r"Max open files +(\d+) +(\d+)", limits).groups()
    assert soft == hard


def test_output_that_nobody_reads_ends_quietly(tmp_path):
    """sse-relay-server check | head -1."""
    done = subprocess.run(
        f"{COMMAND} check | head -1",
        shell=True,
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""
