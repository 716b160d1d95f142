"""sse-relay-server check: what it says of a machine, brokers, an application and a proxy, with what to do about each."""

import json
import re
import subprocess
from contextlib import contextmanager

import psycopg2
import pytest
from clock import Clock
from programs import program
from relay import COMMAND, Relay, environment, run
from servers import PATIENCE, PostgresServer, RedisServer, accepts, free_port, until

from tornado_relay.limits import shares
from tornado_relay.settings import FIELDS
from tornado_relay.sockets import BACKLOG


def findings(tmp_path, *flags, command=(), **variables):
    """What it finds, by name, in JSON."""
    done = subprocess.run(
        [*command, COMMAND, "check", "--json", *flags],
        cwd=tmp_path,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=PATIENCE * 3,
        check=False,
    )
    told = json.loads(done.stdout)
    levels = {found["level"] for found in told["findings"]}
    assert levels <= {"ok", "warning", "failure"}
    assert (done.returncode, told["ok"]) == ((1, False) if "failure" in levels else (0, True))
    assert done.stderr == ""
    for found in told["findings"]:
        assert bool(found["advice"]) == (found["level"] == "warning") or found["level"] == "failure", found
    return {found["name"]: found for found in told["findings"]}


def test_working_brokers(postgres_server, redis_server, tmp_path):
    """Each that is set is sent an event, whether it is used or not."""
    done = run("check", cwd=tmp_path, **postgres_server.environment, **redis_server.environment)
    assert done.returncode == 0, done.stdout
    for shown in (
        r"Redis \(used\): 127.0.0.1:\d+/0, version .*: an event took [\d.]+ ms",
        r"PostgreSQL \(set, not used\): relay@127.0.0.1:\d+/relay, version .*: an event took",
    ):
        assert re.search(f"^ok +{shown}", done.stdout, re.MULTILINE)


def test_settings_are_shown_without_passwords(postgres_server, tmp_path):
    """Also one in the query string."""
    done = run(
        "check",
        cwd=tmp_path,
        DATABASE_URL=postgres_server.url,
        REDIS_URL="redis://127.0.0.1:1/0?password=hush",
        RELAY_USE_PG="yes",
        RELAY_JWT_SECRET="hush" * 10,
    )
    password = re.search(":([^:@]+)@", postgres_server.url)[1]
    assert password not in done.stdout + done.stderr
    assert "hush" not in done.stdout + done.stderr
    assert "DATABASE_URL=postgresql://relay:***@127.0.0.1" in done.stdout
    for field in FIELDS:
        assert f"{field.metadata['variable']}=" in done.stdout


def test_broker_that_fails(tmp_path):
    """Status 1, and the reason in a line."""
    done = run("check", cwd=tmp_path, REDIS_URL=f"redis://127.0.0.1:{free_port()}/0")
    assert done.returncode == 1
    assert re.search(r"^FAIL +Redis \(used\): .*refused", done.stdout, re.MULTILINE)
    assert "Traceback" not in done.stderr


def test_wrong_setting(tmp_path):
    """A failure like any other."""
    done = run("check", "--port", "x", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (
        1,
        "FAIL  --port: 'x' is not a port; give one number from 1 to 65535, such as 8001\n",
    )


@pytest.mark.parametrize(
    ("variable", "url", "shown"),
    [
        ("DATABASE_URL", "postgresql://dbhost/shop?user=app&password=hunter@2secret", "postgresql://dbhost/shop"),
        ("DATABASE_URL", "postgresql://app:hunter@2secret@dbhost/shop", "(set)"),
        ("DATABASE_URL", "postgresql://app:hunter/2secret@dbhost/shop", "(set)"),
        ("REDIS_URL", "redis://h/0?password=hunter@2secret", "redis://h/0"),
        ("REDIS_URL", "hunter2secret", "(set)"),
    ],
)
def test_no_piece_of_a_password_is_shown(tmp_path, variable, url, shown):
    """Wherever in the URL it stands, also where the URL is wrong."""
    done = run("check", cwd=tmp_path, **{variable: url})
    assert f"{variable}={shown}\n" in done.stdout
    for piece in ("hunter", "2secret"):
        assert piece not in done.stdout + done.stderr


def test_no_broker_and_wrong_broker(tmp_path):
    """What to set."""
    done = run("check", cwd=tmp_path)
    assert (done.returncode, "no broker: set REDIS_URL" in done.stdout) == (1, True)
    done = run("check", cwd=tmp_path, DATABASE_URL="sqlite:///x")
    assert (done.returncode, "must start with postgresql://" in done.stdout) == (1, True)


def test_notify_that_does_not_come_back(postgres_server, tmp_path):
    """As through a pooler in transaction mode: here LISTEN is on another database."""
    other = postgres_server.url.removesuffix("relay") + "postgres"
    done = run("check", cwd=tmp_path, DATABASE_URL=postgres_server.url, RELAY_LISTEN_DATABASE_URL=other)
    assert done.returncode == 1
    assert "RELAY_LISTEN_DATABASE_URL" in done.stdout.rpartition("FAIL")[2]


def test_what_is_right_needs_no_advice(kept, tmp_path):
    """Each thing that is looked at is said, and nothing is wrong with it but what is so on this machine."""
    found = findings(tmp_path, **kept.environment)
    names = {"machine.descriptors", "machine.reuseport", "machine.backlog", kept.kind, f"{kept.kind}.connections"}
    names |= {f"{kept.kind}.clock"}
    names |= (
        {"postgres.queue", "postgres.pruning"} if kept.kind == "postgres" else {"redis.pubsub-buffer", "redis.history"}
    )
    assert names <= set(found)
    machine = {name for name in found if name.startswith("machine.")}
    # The tests' Redis keeps nothing on disk.
    wrong = {name for name, each in found.items() if each["level"] != "ok"} - machine - {"redis.persistence"}
    assert wrong == set()


def test_text_says_what_to_do(tmp_path):
    """In a line under the finding."""
    done = run("check", cwd=tmp_path)
    assert re.search(r"^FAIL  no broker: set REDIS_URL.*\n      -> set one of them$", done.stdout, re.MULTILINE)


def test_settings_that_are_wrong_are_json_too(tmp_path):
    """As a finding like any other."""
    found = findings(tmp_path, "--port", "x")
    assert "'x' is not a port" in found["settings"]["text"]


def test_descriptors(tmp_path):
    """Fewer than a worker can use, or than RELAY_MAX_CONNECTIONS asks for."""
    narrow = (program("prlimit"), "--nofile=500:500")
    few = findings(tmp_path, "--workers", "3", command=narrow)["machine.descriptors"]
    streams, _ = shares(500)
    assert few["level"] == "warning"
    assert f"500 descriptors a process are {streams} streams a worker, {3 * streams} in all" in few["text"]
    assert "LimitNOFILE=" in few["advice"]
    wide = (program("prlimit"), "--nofile=12000:12000")
    assert findings(tmp_path, command=wide)["machine.descriptors"]["level"] == "ok"
    asked = findings(tmp_path, "--max-connections", "1000000", command=wide)["machine.descriptors"]
    assert (asked["level"], "fewer than RELAY_MAX_CONNECTIONS=1000000" in asked["text"]) == ("warning", True)


def test_backlog_of_the_kernel(tmp_path):
    """Shorter than what the relay asks for, or as long; in a network of its own, where it can be set."""
    for limit, level in ((128, "warning"), (BACKLOG, "ok")):
        script = f'echo {limit} > /proc/sys/net/core/somaxconn && exec "$@"'
        command = (program("unshare"), "--net", "sh", "-c", script, "sh")
        backlog = findings(tmp_path, command=command)["machine.backlog"]
        assert (backlog["level"], f"keeps {limit} " in backlog["text"]) == (level, True)


@pytest.mark.parametrize("broker", ["postgres", "redis"], indirect=True)
def test_clock_that_is_wrong(broker, tmp_path):
    """By how much, and in which direction."""
    clock = Clock(tmp_path)
    clock.set("+1h")
    found = findings(tmp_path, **broker.environment | clock.environment)[f"{broker.kind}.clock"]
    assert (found["level"], "3600 s behind" in found["text"], "NTP" in found["advice"]) == ("warning", True, True)


@pytest.fixture(scope="module")
def small_postgres(home):
    """A server with hardly any room."""
    folder = home / "small"
    folder.mkdir(mode=0o755)
    server = PostgresServer(folder, max_connections="12")
    yield server
    server.stop("immediate")


def test_connections_of_postgres(small_postgres, tmp_path):
    """Of the server, of the role and of the database, against what the workers take."""
    variables = small_postgres.environment
    few = findings(tmp_path, "--workers", "8", **variables)["postgres.connections"]
    assert (few["level"], "takes 16 while it is reloaded" in few["text"]) == ("warning", True)
    assert findings(tmp_path, "--workers", "2", **variables)["postgres.connections"]["level"] == "ok"
    for limited in ("ROLE relay", "DATABASE relay"):
        small_postgres.execute(f"ALTER {limited} CONNECTION LIMIT 3")
        assert findings(tmp_path, "--workers", "2", **variables)["postgres.connections"]["level"] == "warning"
        small_postgres.execute(f"ALTER {limited} CONNECTION LIMIT -1")


def test_queue_of_notifications(small_postgres, tmp_path):
    """Which a session that listens in an open transaction keeps."""
    keeper = psycopg2.connect(small_postgres.url)
    with keeper.cursor() as cursor:
        cursor.execute("LISTEN anything")
        keeper.commit()
        cursor.execute("SELECT 1")
        small_postgres.execute("SELECT pg_notify('anything', repeat('x', 7900) || n) FROM generate_series(1, 13000) n")
        found = findings(tmp_path, "--workers", "1", **small_postgres.environment)["postgres.queue"]
    keeper.close()
    assert found["level"] == "warning"
    assert re.search(r"1\.\d% of the queue of notifications is taken: a session that listens", found["text"])
    assert "pg_stat_activity" in found["advice"]


def test_encoding_of_the_database(small_postgres, tmp_path):
    """What it has no characters for is no event."""
    small_postgres.execute("CREATE DATABASE latin ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
    url = small_postgres.url.removesuffix("relay") + "latin"
    found = findings(tmp_path, "--workers", "1", DATABASE_URL=url)["postgres.encoding"]
    assert (found["level"], "LATIN1" in found["text"]) == ("warning", True)


def test_history_of_postgres(small_postgres, tmp_path):
    """That is not there, that nobody asks for, and whose old events stay."""
    small_postgres.execute("CREATE DATABASE history")
    variables = {"DATABASE_URL": small_postgres.url.removesuffix("relay") + "history", "RELAY_WORKERS": "1"}
    missing = findings(tmp_path, RELAY_HISTORY="10", **variables)["postgres.history"]
    assert (missing["level"], missing["advice"]) == ("failure", "sse-relay-server init-db")
    assert run("init-db", cwd=tmp_path, **variables).returncode == 0
    assert findings(tmp_path, **variables)["postgres.history"]["level"] == "warning"
    run("notify", "x", "old", cwd=tmp_path, **variables)
    assert findings(tmp_path, RELAY_HISTORY="10", **variables)["postgres.pruning"]["level"] == "ok"
    old = "UPDATE sse_relay.event SET at = at - interval '2 days'"
    with psycopg2.connect(variables["DATABASE_URL"]) as connection, connection.cursor() as cursor:
        cursor.execute(old)
    connection.close()
    late = findings(tmp_path, RELAY_HISTORY="10", **variables)["postgres.pruning"]
    assert (late["level"], "RELAY_HISTORY_SECONDS is 86400" in late["text"]) == ("warning", True)


@pytest.fixture(scope="module")
def own_redis(home):
    """A server whose settings may be changed."""
    folder = home / "own-redis"
    folder.mkdir()
    server = RedisServer(folder)
    yield server
    server.stop()


@pytest.mark.parametrize(
    ("name", "setting", "value", "level"),
    [
        ("redis.pubsub-buffer", "client-output-buffer-limit", "pubsub 1mb 1mb 60", "warning"),
        ("redis.pubsub-buffer", "client-output-buffer-limit", "pubsub 0 0 0", "ok"),
        ("redis.connections", "maxclients", "12", "warning"),
        ("redis.connections", "maxclients", "100", "ok"),
        ("redis.persistence", "appendonly", "yes", "none"),
        ("redis.persistence", "appendonly", "no", "warning"),
    ],
)
def test_settings_of_redis(own_redis, tmp_path, name, setting, value, level):
    """Those that a relay feels."""
    own_redis.client.config_set(setting, value)
    found = findings(tmp_path, "--workers", "3", RELAY_HISTORY="10", **own_redis.environment)
    assert found.get(name, {"level": "none"})["level"] == level


def test_eviction_in_redis(own_redis, tmp_path):
    """A history that the server may delete from is none."""
    own_redis.client.config_set("maxmemory", "100mb")
    own_redis.client.config_set("maxmemory-policy", "allkeys-lru")
    variables = own_redis.environment
    assert findings(tmp_path, RELAY_HISTORY="10", **variables)["redis.eviction"]["level"] == "failure"
    assert "redis.eviction" not in findings(tmp_path, **variables)


def test_redis_user_who_may_not_see_settings(own_redis, tmp_path):
    """As on many a hosted Redis: that is said, and no failure."""
    own_redis.client.execute_command("ACL", "SETUSER", "app", "on", ">pw", "~*", "&*", "+@all", "-config")
    url = own_redis.url.replace("//", "//app:pw@")
    found = findings(tmp_path, REDIS_URL=url)
    assert (found["redis.pubsub-buffer"]["level"], found["redis"]["level"]) == ("ok", "ok")
    assert "not shown to this user" in found["redis.pubsub-buffer"]["text"]
    assert "redis.connections" not in found


@contextmanager
def nginx(folder, port, server):
    """Run nginx with the body of a ``server`` block."""
    (folder / "nginx.conf").write_text(
        f"daemon off; pid {folder}/pid; error_log {folder}/error.log;\n"
        f"events {{}} http {{ access_log off; client_body_temp_path {folder}/b; proxy_temp_path {folder}/p;\n"
        f"fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;\n"
        f"server {{ listen 127.0.0.1:{port}{server} }} }}\n"
    )
    process = subprocess.Popen([program("nginx"), "-p", folder, "-c", folder / "nginx.conf"], stderr=subprocess.DEVNULL)
    try:
        until(lambda: accepts(port), "nginx listens")
        yield
    finally:
        process.terminate()
        process.wait(PATIENCE)


def test_public_address(broker, tmp_path, certificate):
    """An event comes by it at once; by HTTP/1.1 six tabs are all that a browser has, by HTTP/2 not."""
    secret = "s" * 40
    with Relay(tmp_path, "--workers", "1", RELAY_JWT_SECRET=secret, **broker.environment) as relay:
        variables = broker.environment | {"RELAY_JWT_SECRET": secret}
        found = findings(tmp_path, "--url", f"{relay.url}/", **variables)
        assert "an event took" in found["public"]["text"]
        assert (found["public.protocol"]["level"], "seventh tab" in found["public.protocol"]["text"]) == (
            "warning",
            True,
        )
        port = free_port()
        server = f" ssl http2; ssl_certificate {certificate}/pem; ssl_certificate_key {certificate}/key;"
        with nginx(tmp_path, port, f"{server} location /live/ {{ proxy_pass {relay.url}/; proxy_http_version 1.1; }}"):
            url = f"https://127.0.0.1:{port}/live"
            found = findings(tmp_path, "--url", url, SSL_CERT_FILE=f"{certificate}/pem", **variables)
            assert (found["public"]["level"], found["public.protocol"]["level"]) == ("ok", "ok")
            assert "certificate" in findings(tmp_path, "--url", url, **variables)["public"]["text"]


def test_proxy_that_buffers(redis_server, tmp_path):
    """Is what is said of it, and not that nobody answers."""
    port = free_port()
    with (
        Relay(tmp_path, "--workers", "1", **redis_server.environment) as relay,
        nginx(tmp_path, port, f"; location / {{ proxy_pass {relay.url}; proxy_ignore_headers X-Accel-Buffering; }}"),
    ):
        found = findings(tmp_path, "--url", f"http://127.0.0.1:{port}", **redis_server.environment)["public"]
    assert (found["level"], "keeps it back" in found["text"]) == ("failure", True)


def test_address_that_leads_elsewhere(redis_server, postgres_server, tmp_path, site, pages):
    """To a web site, to nobody, to a relay on another broker, to one that is full, to one that wants a token."""
    variables = redis_server.environment

    def told(url):
        found = findings(tmp_path, "--url", url, **variables)["public"]
        assert found["level"] == "failure"
        return found["text"]

    assert "answers with text/html" in told(f"http://127.0.0.1:{site.server_port}")
    assert "refused" in told(f"http://127.0.0.1:{free_port()}")
    assert "is not the address of a stream" in told("events.example.com")
    with Relay(tmp_path, "--workers", "1", **postgres_server.environment) as relay:
        assert "a relay on another broker" in told(relay.url)
    with Relay(tmp_path, "--workers", "1", RELAY_MAX_CONNECTIONS="1", **variables) as relay:
        pages.open(relay.port, ["/channel=x"])
        assert "closed at once" in told(relay.url)
    with Relay(tmp_path, "--workers", "1", RELAY_JWT_SECRET="s" * 40, **variables) as relay:
        assert "401" in told(relay.url)
