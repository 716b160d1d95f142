"""The Django app in a real project: migration, checks, commands, events of models."""

import json
import signal

import pytest
from pooler import PgBouncer
from programs import program
from relay import Relay, run
from servers import PATIENCE, execute, until
from team import Project
from test_readme import block

SECRET = "s" * 32


@pytest.fixture
def project(tmp_path, postgres_server):
    return Project(tmp_path, postgres_server)


def history(project):
    return execute(project.url, "SELECT to_regnamespace('sse_relay') IS NOT NULL")[0][0]


@pytest.mark.parametrize("driver", ["psycopg2", "psycopg"])
def test_migration_sets_up_the_history_and_takes_it_away(project, tmp_path, pages, channel, driver):
    """Forward, back, and forward again; events that were kept are resumed."""
    project.driver = driver
    project.run("migrate")
    assert "No changes detected" in project.run("makemigrations", "--check")
    with Relay(tmp_path, "--workers", "1", DATABASE_URL=project.url, RELAY_HISTORY="100") as relay:
        project.run("sse_notify", channel, json.dumps({"data": "x" * 20_000}))
        (page,) = pages.open(relay.port, [f"/channel={channel}?last_event_id=earliest"])
        pages.until(lambda: page.events, "what is kept")
        assert page.data == ["x" * 20_000]
    project.run("migrate", "sse_relay", "zero")
    assert not history(project)
    assert not execute(project.url, "SELECT 1 FROM pg_proc WHERE proname = 'relay_notify'")
    project.run("migrate")
    assert history(project)


def test_migration_takes_what_init_db_has_set_up(project, tmp_path):
    """And init-db what the migration has; nothing that is kept is lost."""
    assert run("init-db", cwd=tmp_path, DATABASE_URL=project.url).returncode == 0
    project.python("notify('c', {'data': 'kept'})")
    project.run("migrate")
    assert execute(project.url, "SELECT count(*) FROM sse_relay.event") == [(1,)]
    assert "as before" in run("init-db", cwd=tmp_path, DATABASE_URL=project.url).stdout


def test_migration_leaves_other_databases_alone(project):
    """SQLite has no history, and a database that no events go to needs none."""
    project.sse_relay = {"DATABASE": "files", "REDIS_URL": "redis://127.0.0.1:1"}
    project.run("migrate")
    project.run("migrate", "--database", "files")
    assert not history(project)


@pytest.mark.parametrize(
    ("sse_relay", "database", "said"),
    [
        ({}, "files", ["(sse_relay.W005)", "Django's database 'default' is sqlite"]),
        ({"REDIS_ULR": "redis://x"}, "default", ["(sse_relay.E002)", "'REDIS_ULR'", "did you mean REDIS_URL?"]),
        ("text", "default", ["(sse_relay.E001)", "SSE_RELAY is a str; it must be a dictionary"]),
        ({"DATABASE": "other"}, "default", ["(sse_relay.W005)", "'other'", "known are default, files"]),
        ({"RELAY_USE_PG": "perhaps"}, "default", ["(sse_relay.E003)", "RELAY_USE_PG: 'perhaps'"]),
        ({"RELAY_JWT_SECRET": "short"}, "default", ["(sse_relay.W001)", "has 5 bytes; it should have 32"]),
        ({"RELAY_URL": "http:///events"}, "default", ["(sse_relay.E004)", "'http:///events'"]),
        ({"RELAY_URL": "events.example.com"}, "default", ["(sse_relay.E004)", "'events.example.com'"]),
    ],
)
def test_check_says_what_is_wrong(project, sse_relay, database, said):
    """In one line that names it, and what would be right."""
    project.sse_relay = sse_relay
    project.databases["default"] = project.databases[database]
    wrong = ".E" in said[0]
    answer = project.run("check", status=1 if wrong else 0)
    assert all(text in answer for text in said), answer


def test_check_finds_nothing_where_all_is_right(project):
    """Also not by the database's own check."""
    project.sse_relay = {"RELAY_URL": "/events", "RELAY_JWT_SECRET": SECRET, "RELAY_USE_PG": True}
    project.sse_relay["DATABASE_URL"] = project.url
    project.run("migrate")
    assert "no issues" in project.run("check", "--database", "default")


def test_database_check_finds_what_only_the_database_knows(project, home, postgres_server):
    """No history, a pooler, and a clock that goes wrong."""
    assert "(sse_relay.W003)" in project.run("check", "--database", "default")
    project.run("migrate")
    name = project.databases["default"]["NAME"]
    execute(project.url, "CREATE SCHEMA wrong")
    execute(
        project.url,
        "CREATE FUNCTION wrong.clock_timestamp() RETURNS timestamptz LANGUAGE sql "
        "AS $$ SELECT pg_catalog.clock_timestamp() + interval '1 minute' $$",
    )
    execute(project.url, f"ALTER DATABASE {name} SET search_path = wrong, pg_catalog, public")
    answer = project.run("check", "--database", "default")
    assert ("(sse_relay.W004)" in answer, "differ by 60 s" in answer, "W002" in answer, "W003" in answer) == (
        True,
        True,
        False,
        False,
    )
    with PgBouncer(program("pgbouncer"), home, postgres_server, "transaction") as pooler:
        project.databases["default"]["PORT"] = pooler.port
        assert "(sse_relay.W002)" in project.run("check", "--database", "default")


def test_sse_relay_comes_before_the_environment(project, redis_server, tmp_path, pages, channel):
    """Broker, secret, and the database of events."""
    project.databases["events"] = project.databases["default"]
    project.databases["default"] = project.databases["files"]
    with Relay(tmp_path, "--workers", "1", DATABASE_URL=project.url) as relay:
        (page,) = pages.open(relay.port, [f"/channel={channel}"])
        project.sse_relay = {"DATABASE": "events", "RELAY_JWT_SECRET": SECRET}
        out = project.python(
            "import os; os.environ['RELAY_JWT_SECRET'] = 'another'\n"
            f"notify('{channel}', {{'data': 1}}); print(subscribe_token('c'))"
        )
        pages.until(lambda: page.events, "the event of PostgreSQL")
    import jwt

    assert jwt.decode(out.strip(), SECRET, algorithms=["HS256"])["channels"] == ["c"]
    with Relay(tmp_path, "--workers", "1", **redis_server.environment) as relay:
        (page,) = pages.open(relay.port, [f"/channel={channel}"])
        project.sse_relay["REDIS_URL"] = redis_server.url
        project.python(
            f"import os; os.environ['REDIS_URL'] = 'redis://127.0.0.1:1'\nnotify('{channel}', {{'data': 2}})"
        )
        pages.until(lambda: page.events, "the event of Redis")


@pytest.mark.parametrize("broker_kind", ["postgres", "redis"])
def test_anotify(project, redis_server, tmp_path, pages, channel, broker_kind):
    """In asynchronous code, where Django allows no query; and what is wrong is raised."""
    env = {"DATABASE_URL": project.url} if broker_kind == "postgres" else redis_server.environment
    project.sse_relay = {} if broker_kind == "postgres" else {"REDIS_URL": redis_server.url}
    with Relay(tmp_path, "--workers", "1", **env) as relay:
        (page,) = pages.open(relay.port, [f"/channel={channel}"])
        out = project.python(
            f"""
import asyncio
from asgiref.sync import sync_to_async
from django.db import connections
from tornado_relay import EventError
from tornado_relay.django import anotify

async def view():
    await anotify("{channel}", {{"data": "a"}}, using="default")
    try:
        await anotify("{channel}", {{"unknown": 1}})
    except EventError:
        print("refused")
    await anotify("{channel}", {{"data": "b"}})
    await sync_to_async(connections.close_all)()  # as Django does at the end of a request

asyncio.run(view())
"""
        )
        pages.until(lambda: len(page.events) >= 2, "the events")
        assert (page.data, out) == (["a", "b"], "refused\n")


@pytest.mark.parametrize("broker_kind", ["postgres", "redis"])
def test_changes_of_rows_are_events(project, redis_server, tmp_path, pages, broker_kind):
    """In the transaction that makes them: created, updated, deleted; on a channel of the row's own, or none."""
    env = {"DATABASE_URL": project.url} if broker_kind == "postgres" else redis_server.environment
    project.sse_relay = {} if broker_kind == "postgres" else {"REDIS_URL": redis_server.url}
    project.run("migrate")
    with Relay(tmp_path, "--workers", "1", **env) as relay:
        orders, mine = pages.open(relay.port, ["/channel=orders", "/channel=customer-1"])
        project.python(
            """
import datetime, decimal
ann = Customer.objects.create(name="Ann")
order = Order.objects.create(customer=ann, total=decimal.Decimal("12.50"), day=datetime.date(2026, 11, 25))
try:
    with transaction.atomic():
        order.total = 1
        order.save()
        raise RuntimeError
except RuntimeError:
    pass
order.total, order.note = decimal.Decimal("13.00"), "f\u00fcr Ann"
order.save()
order.delete()
"""
        )
        pages.until(lambda: len(orders.events) >= 3 and len(mine.events) >= 2, "the events")
    first = {"id": 1, "total": "12.50", "customer": 1, "day": "2026-11-25"}
    assert [(event.event, json.loads(event.data)) for event in orders.events] == [
        ("order.created", first),
        ("order.updated", first | {"total": "13.00"}),
        ("order.deleted", first | {"total": "13.00"}),
    ]
    assert [(event.event, event.data) for event in mine.events] == [
        ("order.updated", '{"note":"für Ann"}'),
        ("order.deleted", '{"note":"für Ann"}'),
    ]


def test_changes_in_another_database_are_sent_to_the_relays(project, tmp_path, pages):
    """When they have committed there; fixtures are no changes."""
    project.run("migrate")
    project.run("migrate", "--database", "files")
    with Relay(tmp_path, "--workers", "1", DATABASE_URL=project.url) as relay:
        (orders,) = pages.open(relay.port, ["/channel=orders"])
        project.python(
            """
ann = Customer.objects.using("files").create(name="Ann")
try:
    with transaction.atomic("files"):
        Order.objects.using("files").create(customer=ann, total=1)
        raise RuntimeError
except RuntimeError:
    pass
Order.objects.using("files").create(customer=ann, total=2)
from django.core import serializers
row = serializers.serialize("json", Order.objects.using("files").all()).replace('"total": "2.00"', '"total": "9.00"')
for each in serializers.deserialize("json", row, using="files"):
    each.save(using="files")
Order.objects.using("files").create(customer=ann, total=3)
"""
        )
        pages.until(lambda: len(orders.events) >= 2, "the events")
        assert [json.loads(event.data)["total"] for event in orders.events] == [2, 3]


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ("['nothing']", "FieldDoesNotExist"),
        ("['watchers']", "'watchers' of Order is no column"),
        ("[]", "at least one"),
    ],
)
def test_changes_of_what_is_no_field_are_refused(project, fields, error):
    """When it is set up, not when a row is saved."""
    assert error in project.python(
        "from tornado_relay.django.changes import publish_changes\n"
        f"try:\n    publish_changes(Order, 'c', {fields})\nexcept Exception as exc:\n    print(repr(exc))"
    )


def test_commands(project, tmp_path, channel):
    """sse_check looks at all, sse_listen prints what sse_notify sends; with the tokens that the relay wants."""
    project.run("migrate")
    flags = ("--workers", "1", "--history", "100")
    with Relay(tmp_path, *flags, DATABASE_URL=project.url, RELAY_JWT_SECRET=SECRET) as relay:
        project.sse_relay = {"RELAY_URL": relay.url, "RELAY_JWT_SECRET": SECRET}
        answer = project.run("sse_check")
        assert "ok    events go to Django's database 'default'" in answer
        assert "ms from notify() to a stream of the relay" in answer
        listening = project.start("manage.py", "sse_listen", channel, f"{channel}-2")
        try:
            assert listening.stderr.readline() == f"listening to {relay.url}/events on {channel}, {channel}-2\n"
            until(lambda: f"on {channel}, {channel}-2" in relay.log, "it listens")
            project.run("sse_notify", channel, '{"event": "paid", "id": "7", "data": {"sum": 1}}')
            project.run("sse_notify", f"{channel}-2", '"hello"', "--database", "default")
            got = [json.loads(listening.stdout.readline()) for _ in range(2)]
        finally:
            listening.send_signal(signal.SIGINT)
            _, errors = listening.communicate(timeout=PATIENCE)
        assert [(each["event"], each["data"]) for each in got] == [("paid", '{"sum":1}'), ("message", "hello")]
        assert listening.returncode == 0, errors
        assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["sse_notify", "c", "{event"], "EVENT is not JSON"),
        (["sse_notify", "c\n", "1"], "channel"),
        (["sse_notify", "c", "1", "--database", "x"], "known are default, files"),
        (["sse_listen", "c"], "RELAY_URL is not set"),
        (["sse_check"], "RELAY_URL is not set"),
        (["sse_listen", "c"], "'/events/events?channel=c' is not the address of a stream: it has no host"),
    ],
)
def test_commands_say_what_is_wrong(project, command, said):
    """In one line."""
    if "no host" in said:
        project.sse_relay = {"RELAY_URL": "/events"}
    assert said in project.run(*command, status=1)


def test_sse_check_fails_where_the_relay_reads_another_broker(project, redis_server, tmp_path):
    """The event does not come, and it says why that may be."""
    with Relay(tmp_path, "--workers", "1", "--heartbeat", "1", **redis_server.environment) as relay:
        project.sse_relay = {"RELAY_URL": relay.url}
        answer = project.run("sse_check", status=1)
    assert "does the relay read the broker that notify() sends to?" in answer
    assert "warn  the database 'default' has no history" in answer


def test_app_as_the_pages_have_it(project, tmp_path, pages):
    """Its settings are in order, and its shop sends what it says."""
    shown = {}
    exec(block("python", "# settings.py\nINSTALLED_APPS"), shown)
    assert shown["INSTALLED_APPS"] == ["tornado_relay.django"]
    project.sse_relay = shown["SSE_RELAY"]
    (tmp_path / "shop/apps.py").write_text(block("python", "# apps.py"))
    assert "no issues" in project.run("check")
    project.run("migrate")
    with Relay(tmp_path, "--workers", "1", DATABASE_URL=project.url) as relay:
        (page,) = pages.open(relay.port, ["/channel=customer-1"])
        project.python("Order.objects.create(customer=Customer.objects.create(name='Ann'), total='12.50')")
        pages.until(lambda: page.events, "the event")
    assert [(event.event, event.data) for event in page.events] == [("order.created", '{"id":1,"total":"12.50"}')]
