"""notify() inside a real Django project: each driver of PostgreSQL, Redis, transactions."""

import json
import subprocess
import sys
import textwrap

import pytest
from relay import Relay, environment
from test_readme import block


@pytest.fixture
def project(tmp_path, postgres_server):
    """Run code in a Django project of its own process, on the test's PostgreSQL."""
    from urllib.parse import urlsplit

    parts = urlsplit(postgres_server.url)
    databases = {
        "default": {
            "ENGINE": "django.db.backends.postgresql",
            "NAME": parts.path[1:],
            "USER": parts.username,
            "PASSWORD": parts.password,
            "HOST": parts.hostname,
            "PORT": parts.port,
        },
        "files": {"ENGINE": "django.db.backends.sqlite3", "NAME": str(tmp_path / "db.sqlite3")},
    }

    databases["kept"] = {**databases["default"], "NAME": "kept"}

    def run(code, driver="psycopg2", database="default", **env):
        chosen = {**databases, "default": databases[database]} if database else {}
        # Django prefers psycopg; where it is not importable, psycopg2 is used.
        hide = "sys.modules['psycopg'] = None" if driver == "psycopg2" else ""
        program = f"import sys\n{hide}\nimport django\nfrom django.conf import settings\n"
        program += f"settings.configure(DATABASES={chosen!r})\ndjango.setup()\n"
        program += (
            "from django.db import connection, transaction\n"
            "from tornado_relay import current_event_id, notify\nimport tornado_relay\n"
        )
        program += textwrap.dedent(code)
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=tmp_path,
            env=environment(**env),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


ROLL_BACK_THEN_COMMIT = """
    try:
        with transaction.atomic():
            notify("{channel}", {{"data": "rolled back"}})
            raise RuntimeError
    except RuntimeError:
        pass
    with transaction.atomic():
        notify("{channel}", {{"event": "paid", "id": 5, "data": {{"it's": "\\u00e9"}}}})
        try:
            with transaction.atomic():
                notify("{channel}", {{"data": "rolled back to the savepoint"}})
                raise RuntimeError
        except RuntimeError:
            pass
    notify("{channel}", {{"data": "autocommit"}})
"""


@pytest.mark.parametrize("driver", ["psycopg2", "psycopg"])
def test_event_lives_and_dies_with_djangos_transaction_on_postgres(
    project, postgres_server, tmp_path, pages, channel, driver
):
    """Rolled back: never seen. Committed: always. With either driver, and with no setting at all."""
    with Relay(tmp_path, "--workers", "1", **postgres_server.environment) as relay:
        (page,) = pages.open(relay.port, [f"/channel={channel}"])
        project(ROLL_BACK_THEN_COMMIT.format(channel=channel), driver=driver)
        pages.until(lambda: "autocommit" in page.data, "the last event")
    assert [(event.event, event.data) for event in page.events] == [
        ("paid", '{"it\'s":"é"}'),
        ("message", "autocommit"),
    ]


@pytest.mark.parametrize("driver", ["psycopg2", "psycopg"])
def test_history_is_used_by_itself(project, kept_postgres, tmp_path, pages, channel, driver):
    """Where init-db was run, with either driver: what commits is kept, what is rolled back is not, and 100 kB are no matter."""
    project(ROLL_BACK_THEN_COMMIT.format(channel=channel), driver=driver, database="kept")
    project(f"notify('{channel}', {{'data': 'x' * 100_000}})", driver=driver, database="kept")
    with Relay(tmp_path, "--workers", "1", **kept_postgres.environment) as relay:
        (page,) = pages.open(relay.port, [f"/channel={channel}?last_event_id=earliest"])
        pages.until(lambda: len(page.events) >= 3, "what is kept")
        assert page.data == ['{"it\'s":"é"}', "autocommit", "x" * 100_000]
        assert page.events[0].id == "5"


@pytest.mark.parametrize("broker_kind", ["postgres", "redis"])
def test_page_that_is_rendered_first_misses_nothing(
    project, kept_postgres, kept_redis, tmp_path, pages, channel, broker_kind
):
    """current_event_id() in a view, and what is published before the page connects with it."""
    kept = kept_postgres if broker_kind == "postgres" else kept_redis
    env = {} if broker_kind == "postgres" else {"REDIS_URL": kept.url}
    kept.publish(channel, "before")
    out = project("print(current_event_id())", database="kept", **env)
    kept.publish(channel, "between")
    with Relay(tmp_path, "--workers", "1", **kept.environment) as relay:
        (page,) = pages.open(relay.port, [f"/channel={channel}?last_event_id={out.strip()}"])
        kept.publish(channel, "after")
        pages.until(lambda: len(page.events) >= 2, "the events")
        assert page.data == ["between", "after"]


def test_current_event_id_is_the_snapshots(project, kept_postgres, tmp_path, pages, channel):
    """In REPEATABLE READ it belongs to the data that the transaction reads, whatever commits meanwhile."""
    kept_postgres.publish(channel, "before")
    out = project(
        f"""
        with transaction.atomic():
            with connection.cursor() as cursor:
                cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            first = current_event_id()
            import threading
            other = threading.Thread(target=lambda: (notify("{channel}", {{"data": "meanwhile"}}), connection.close()))
            other.start()
            other.join()
            assert current_event_id() == first
        assert current_event_id() != first
        print(first)
        """,
        database="kept",
    )
    with Relay(tmp_path, "--workers", "1", **kept_postgres.environment) as relay:
        (page,) = pages.open(relay.port, [f"/channel={channel}?last_event_id={out.strip()}"])
        pages.until(lambda: page.events, "the event")
        assert page.data == ["meanwhile"]


def test_without_a_history_there_is_no_current_event_id(project):
    """It is empty, which a page may connect with all the same."""
    assert project("print(repr(current_event_id()))").strip() == "''"


@pytest.mark.parametrize("database", ["default", "files"])
def test_event_waits_for_djangos_commit_on_redis(project, redis_server, tmp_path, pages, channel, database):
    """Whatever Django's own database is."""
    with Relay(tmp_path, "--workers", "1", **redis_server.environment) as relay:
        (page,) = pages.open(relay.port, [f"/channel={channel}"])
        project(ROLL_BACK_THEN_COMMIT.format(channel=channel), database=database, **redis_server.environment)
        pages.until(lambda: "autocommit" in page.data, "the last event")
    assert [event.event for event in page.events] == ["paid", "message"]


def test_django_on_another_database_uses_database_url_after_the_commit(
    project, postgres_server, tmp_path, pages, channel
):
    """Django on SQLite, the relay on PostgreSQL: still nothing of a transaction that is rolled back."""
    with Relay(tmp_path, "--workers", "1", **postgres_server.environment) as relay:
        (page,) = pages.open(relay.port, [f"/channel={channel}"])
        project(ROLL_BACK_THEN_COMMIT.format(channel=channel), database="files", **postgres_server.environment)
        pages.until(lambda: "autocommit" in page.data, "the last event")
    assert [event.event for event in page.events] == ["paid", "message"]


def test_project_without_databases_uses_redis(project, redis_server, tmp_path, pages, channel):
    """Also after a request, when Django has put a dummy in their place."""
    with Relay(tmp_path, "--workers", "1", **redis_server.environment) as relay:
        (page,) = pages.open(relay.port, [f"/channel={channel}"])
        project(
            f"""
            notify("{channel}", {{"data": "first"}})
            from django.core.signals import request_started
            request_started.send(None)
            notify("{channel}", {{"data": "second"}})
            """,
            database=None,
            **redis_server.environment,
        )
        pages.until(lambda: len(page.events) == 2, "both events")


def test_use_pg_without_database_url_is_djangos_database(project, postgres_server, tmp_path, pages, channel):
    """REDIS_URL may be there for a cache."""
    with Relay(tmp_path, "--workers", "1", **postgres_server.environment) as relay:
        (page,) = pages.open(relay.port, [f"/channel={channel}"])
        project(f"notify('{channel}', {{'data': 'x'}})", REDIS_URL="redis://127.0.0.1:1/0", RELAY_USE_PG="true")
        pages.until(lambda: page.events, "the event")


def test_using_names_the_alias(project, postgres_server, tmp_path, pages, channel):
    """An alias that is no database of the project is named; one that is, is used."""
    out = project(
        """
        for using in ("missing", "files"):
            try:
                notify("c", {"data": "x"}, using=using)
            except tornado_relay.SettingsError as exc:
                print(exc)
        """
    )
    missing, files = out.splitlines()
    assert "'missing' is not in DATABASES; known are default, files" in missing
    assert "'files' is sqlite" in files


def test_payload_over_the_limit_leaves_djangos_transaction_usable(project, postgres_server, tmp_path, pages, channel):
    """The size is checked before anything is executed."""
    with Relay(tmp_path, "--workers", "1", **postgres_server.environment) as relay:
        (page,) = pages.open(relay.port, [f"/channel={channel}"])
        project(f"""
            with transaction.atomic():
                try:
                    notify("{channel}", {{"data": "x" * 9000}})
                except tornado_relay.PayloadTooLarge:
                    notify("{channel}", {{"data": "too large"}})
            """)
        pages.until(lambda: page.events, "the event")
    assert page.data == ["too large"]


def test_safe_snippet_works(project, postgres_server, tmp_path, pages, channel):
    """SELECT pg_notify(%s, %s) by hand, for those who do not install the package."""
    snippet = block("python", "pg_notify(%s, %s)")
    payload = {"event": "NEW_NOTIFICATION", "id": 1, "data": json.dumps({"message": "it's new"})}
    with Relay(tmp_path, "--workers", "1", **postgres_server.environment) as relay:
        (page,) = pages.open(relay.port, [f"/channel={channel}"])
        project(f"{snippet}\nnotify({channel!r}, {payload!r})\n")
        pages.until(lambda: page.events, "the event")
    assert json.loads(page.data[0]) == {"message": "it's new"}
