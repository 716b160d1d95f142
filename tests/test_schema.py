"""The history in PostgreSQL: init-db, its grants, and what its tables and functions promise, also while they are raced."""

import io
import itertools
import random
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import psycopg2
import pytest
from psycopg2.errors import DivisionByZero, InsufficientPrivilege, SerializationFailure
from relay import Relay, run
from servers import PostgresServer, free_port, patience, until

from tornado_relay import BrokerRefused, schema
from tornado_relay.brokers.message import Message, read
from tornado_relay.history.spans import Cursor, Spans
from tornado_relay.publish import open_publisher

PUBLISH = "SELECT sse_relay.publish(%s, %s, NULL)"
PRUNE = "SELECT sse_relay.prune(%s, %s, %s)"
IDS = "SELECT id FROM sse_relay.event ORDER BY id"
EVENTS = "SELECT token, id, channel, payload FROM sse_relay.event ORDER BY id"
CHANNELS = [f"channel-{number}" for number in range(4)]
DAY = 86_400


@contextmanager
def session(url, **options):
    """An autocommit connection's cursor."""
    with closing(psycopg2.connect(url, **options)) as connection:
        connection.autocommit = True
        yield connection.cursor()


def sql(url, statement, *arguments):
    """The rows of a statement; where they have one column, its values."""
    with session(url) as cursor:
        cursor.execute(statement, arguments or None)
        return [row[0] if len(row) == 1 else row for row in cursor] if cursor.description else []


def publish(url, *events):
    with session(url) as cursor:
        cursor.executemany(PUBLISH, events)


@contextmanager
def listen(url, *channels):
    """Yields what waits for some notifications, and returns all as the relay reads them, and NOTIFY's channel of each."""
    with session(url) as cursor:
        cursor.execute(";".join(f'LISTEN "{channel}"' for channel in channels))

        def received(count):
            notifies, poll = cursor.connection.notifies, cursor.connection.poll
            until(lambda: poll() or len(notifies) >= count, f"{count} notifications")
            return [(read(each.channel, each.payload), each.channel) for each in notifies]

        yield received


@pytest.fixture(scope="module")
def postgres_server(home):
    """A server of these tests' own, which they may stop."""
    (home / "schema").mkdir(mode=0o755)
    server = PostgresServer(home / "schema")
    yield server
    server.stop("immediate")


@pytest.fixture
def database(postgres_server, channel):
    """The URL of an empty database of the test's own."""
    postgres_server.execute(f'CREATE DATABASE "{channel}"')
    yield postgres_server.url.rpartition("/")[0] + f"/{channel}"
    postgres_server.execute(f'DROP DATABASE "{channel}" WITH (FORCE)')


@pytest.fixture
def history(database):
    """The same with a history."""
    list(schema.install(database))
    return database


@pytest.fixture
def roles(database):
    """The URLs of an application and of a relay, by their names in grants.sql, which may connect and no more."""
    names = ["application_role", "relay_role"]
    sql(database, ";".join(f"CREATE ROLE {name} LOGIN PASSWORD 'secret'" for name in names))
    yield [re.sub("//[^@]*@", f"//{name}:secret@", database) for name in names]
    sql(database, ";".join(f"DROP OWNED BY {name}; DROP ROLE {name}" for name in names))


def test_init_db_says_what_it_does_and_does_it_once(database, tmp_path):
    """Two at the same time as well, as when two containers start; one that finds it done changes nothing."""
    with ThreadPoolExecutor() as pool:
        done = list(pool.map(lambda url: run("init-db", cwd=tmp_path, DATABASE_URL=url), [database] * 2))
    assert [(each.returncode, each.stderr) for each in done] == [(0, "")] * 2
    assert sorted(each.stdout.startswith("version 1: creating\n") for each in done) == [False, True]
    publish(database, ("c", "{}"))
    again = run("init-db", cwd=tmp_path, DATABASE_URL=database)
    assert (again.returncode, again.stderr, "creating" in again.stdout) == (0, "", False)
    assert "has version 1 of the history, as before\n" in again.stdout
    assert all(schema.grants() in each.stdout for each in [again, *done])
    assert sql(database, "SELECT version, id FROM sse_relay.version, sse_relay.event") == [(1, 1)]


def test_init_db_that_cannot_says_why_in_a_line_and_leaves_nothing(database, roles, tmp_path):
    """No URL, a wrong one, nobody there, no right at all, the right to half of it (public is not the role's), a newer one."""

    def refused(url, status, text):
        done = run("init-db", cwd=tmp_path, DATABASE_URL=url)
        assert (done.returncode, done.stderr.count("\n"), "as before" in done.stdout) == (status, 1, False)
        assert re.search(text, done.stderr), done.stderr

    refused("", 2, "DATABASE_URL is not set")
    refused("mysql://host/database", 2, "DATABASE_URL")
    refused(f"postgresql://u:p@127.0.0.1:{free_port()}/d", 1, "cannot be reached")
    refused(roles[0], 1, "permission denied for database .*owner")
    sql(database, f'GRANT CREATE ON DATABASE "{database.rpartition("/")[2]}" TO application_role')
    refused(roles[0], 1, "permission denied for schema public.*owner")
    assert sql(database, "SELECT nspname FROM pg_namespace WHERE nspname = 'sse_relay'") == []
    list(schema.install(database))
    sql(database, "INSERT INTO sse_relay.version VALUES (1000)")
    refused(database, 1, "version 1000 .* knows 1 only")


def test_printed_sql_makes_what_init_db_makes(database, tmp_path):
    """For who must not, or cannot, let a program do it."""
    script = run("init-db", "--print-sql", cwd=tmp_path)
    assert (script.returncode, script.stderr) == (0, "")
    beside = Path(*sql(database, "SELECT setting FROM pg_config WHERE name = 'BINDIR'")) / "psql"
    if psql := shutil.which("psql") or (beside.exists() and beside):
        subprocess.run([psql, "-X", "-v", "ON_ERROR_STOP=1", database], input=script.stdout, text=True, check=True)
    else:
        sql(database, script.stdout)
    assert "as before" in run("init-db", cwd=tmp_path, DATABASE_URL=database).stdout


def test_application_role_may_publish_and_no_more(history, roles):
    """notify(), relay_notify() and current_event_id(), no table; without the grants it is told of them, and nothing goes."""
    url = roles[0]
    with closing(open_publisher("postgres", url)) as publisher, listen(history, "c") as received:
        with pytest.raises(BrokerRefused, match=r"GRANT.*init-db"):
            publisher.publish("c", "refused")
        sql(history, schema.grants())
        publisher.publish("c", "taken")
        sql(url, "SELECT relay_notify('c', '[]')")
        assert publisher.newest().endswith("-2")
        assert [each.payload for each, _ in received(2)] == ["taken", "[]"]
    for statement in (
        *("SELECT FROM sse_relay.event", "DELETE FROM sse_relay.event", "TRUNCATE sse_relay.event"),
        *("SELECT FROM sse_relay.outbox", "INSERT INTO sse_relay.outbox (channel, payload) VALUES ('c', '{}')"),
        *(
            "UPDATE sse_relay.state SET pruned_through = 0",
            "SELECT sse_relay.prune(0, 0, 100)",
            "SELECT sse_relay.open()",
        ),
    ):
        with pytest.raises(InsufficientPrivilege):
            sql(url, statement)


def test_relay_role_may_serve_and_prune_and_no_more(history, roles, channel, pages, tmp_path):
    """A stream that comes back gets what it missed; nobody publishes with the relay's password."""
    sql(history, schema.grants())
    url = roles[1]
    with Relay(tmp_path, "--workers", "1", DATABASE_URL=url, RELAY_HISTORY="100") as relay:
        (page,) = pages.open(relay.port, [f"/channel={channel}"])
        publish(history, (channel, '{"data":"seen"}'))
        pages.until(lambda: page.data == ["seen"], "the event")
        pages.close(page)
        publish(history, (channel, '{"data":"missed"}'))
        (page,) = pages.open(relay.port, [f"/channel={channel}"], {"Last-Event-ID": page.events[-1].id})
        pages.until(lambda: page.data == ["missed"], "what was missed")
        publish(history, (channel, f'{{"data":"{"live" * 4000}"}}'))
        pages.until(lambda: page.data == ["missed", "live" * 4000], "what is live")
    assert (sql(url, PRUNE, 1, DAY, 100), sql(url, IDS)) == ([False], [3])
    for statement in (PUBLISH, "SELECT relay_notify(%s, %s)", "INSERT INTO sse_relay.outbox VALUES (DEFAULT, %s, %s)"):
        with pytest.raises(InsufficientPrivilege):
            sql(url, statement, channel, "{}")
    with pytest.raises(BrokerRefused):
        open_publisher("postgres", url).publish(channel, "{}")


def test_relay_notify_in_a_row_trigger(history):
    """As an application without Python would use it; what is rolled back is not published."""
    call = "relay_notify('orders', jsonb_build_object('event', 'NEW', 'id', NEW.id, 'data', to_jsonb(NEW)))"
    body = f"$$ BEGIN PERFORM {call}; RETURN NULL; END $$"
    sql(history, f"CREATE TABLE orders (id int); CREATE FUNCTION tell() RETURNS trigger LANGUAGE plpgsql AS {body}")
    sql(history, "CREATE TRIGGER tell AFTER INSERT ON orders FOR EACH ROW EXECUTE FUNCTION tell()")
    sql(history, "INSERT INTO orders VALUES (7)")
    with pytest.raises(DivisionByZero):
        sql(history, "INSERT INTO orders VALUES (8); SELECT 1 / (count(*) - 2) FROM orders")
    rows = sql(history, "SELECT channel, payload::jsonb, own_id FROM sse_relay.event")
    assert rows == [("orders", {"event": "NEW", "id": 7, "data": {"id": 7}}, "7")]


def test_relay_notify_says_what_is_wrong(history):
    """At the call, not at the commit."""
    for name, payload, text in (
        *((name, "'{}'", "1 to 200 characters") for name in ("NULL", "''", "repeat('x', 201)")),
        *((name, "'{}'", "control character") for name in ("E'a\\nb'", "chr(30)", "chr(127)", "chr(159)")),
        *(("'c'", "NULL", "NULL"), ("'c'", "to_jsonb(repeat('x', 1048575))", "1048577 bytes, 1048576 is the limit")),
        ("'c'", "to_jsonb(repeat('é', 524288))", "1048578 bytes, 1048576 is the limit"),
    ):
        with pytest.raises(psycopg2.Error, match=f"relay_notify: .*{text}"):
            sql(history, f"SELECT 1 / (relay_notify({name}, {payload}) IS NULL)::int")
    sql(history, "SELECT relay_notify(repeat('é', 200), to_jsonb(repeat('x', 1048574)))")
    assert sql(history, "SELECT length(channel), length(payload) FROM sse_relay.event") == [(200, 1 << 20)]


def test_own_id_is_that_of_an_event_only(history):
    """An object of another kind is data, and its id is none; the same as for notify()."""
    expected = [
        *(('{"id": 5}', "5"), ('{"id": "a b", "event": "e", "data": [], "retry": 1, "comment": "", "sep": ""}', "a b")),
        *((f'{{"id": "{"é" * 200}"}}', "é" * 200), (f'{{"id": "{"é" * 201}"}}', None)),
        *((f'{{"id": {text}}}', None) for text in ('5, "other": 1', "null", '""')),
        *((text, None) for text in ('{"data": {"id": 1}}', "{}", "[]", '["id"]', '"id"', "5", "null")),
    ]
    for payload, _ in expected:
        sql(history, "SELECT relay_notify('c', %s)", payload)
    found = sql(history, "SELECT own_id FROM sse_relay.event ORDER BY id")
    assert list(zip([payload for payload, _ in expected], found, strict=True)) == expected


@pytest.mark.parametrize("name", ["c", "é" * 31 + "x", "é" * 32, "€" * 200, "sse_relay_long_names"])
def test_notification_holds_what_fits_and_else_refers_to_the_row(history, name):
    """To the byte; channels that NOTIFY cannot have share one, and the message says which is meant."""
    shared = len(name.encode()) > 63 or name == "sse_relay_long_names"
    target = "sse_relay_long_names" if shared else name
    # RS, token of 8, -, id of one digit, RS, channel, RS, payload.
    room = 7999 - 13 - (len(name.encode()) if shared else 0)
    payloads = ["x" * room, "x" * (room + 1), "é" * (room // 2), "é" * (room // 2 + 1), "x" * (1 << 20), ""]
    with listen(history, target) as received:
        publish(history, *((name, payload) for payload in payloads))
        rows = sql(history, EVENTS)
        assert [row[2:] for row in rows] == [(name, payload) for payload in payloads]
        for (message, channel), (token, seq, _, payload) in zip(received(6), rows, strict=True):
            kept = payload if len(payload.encode()) <= room else None
            assert (channel, message) == (target, Message(name, kept, f"{token}-{seq}", seq))


def write(url, number, isolation, immediate):
    """Commit 40 transactions of all kinds, and return what is in them."""
    dice, serial, taken, commits = random.Random(f"{number} {isolation} {immediate}"), itertools.count(), [], 0
    with session(url) as cursor:
        while commits < 40:
            events = []
            try:
                cursor.execute(f"BEGIN ISOLATION LEVEL {isolation}")
                for _ in range(dice.randrange(1, 8)):
                    events.append((dice.choice(CHANNELS), f"{number} {next(serial)}"))
                    before = "SET CONSTRAINTS ALL IMMEDIATE;" if immediate and dice.random() < 0.2 else ""
                    fate = dice.choice(["", "", "RELEASE s", "ROLLBACK TO s"])
                    before = f"SAVEPOINT s; {before}" if fate else before
                    cursor.execute(f"{before} {PUBLISH}; SELECT pg_sleep({dice.random() * 0.004}); {fate}", events[-1])
                    del events[len(events) - (fate == "ROLLBACK TO s") :]
                cursor.execute(f"SELECT 1 / {dice.randrange(5)}; COMMIT")
                taken += events
                commits += 1
            except (DivisionByZero, SerializationFailure):
                cursor.execute("ROLLBACK")
    return taken


@pytest.mark.parametrize("immediate", [False, True], ids=["deferred", "immediate"])
@pytest.mark.parametrize("isolation", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
def test_ids_commits_and_notifications_are_in_one_order(history, isolation, immediate):
    """Eight writers at once: who has read up to an id never finds a lower one, and nothing is lost, doubled or torn."""
    polled, last_time = [], False
    with listen(history, *CHANNELS) as received, session(history) as cursor, ThreadPoolExecutor() as pool:
        isolations = [isolation, *["READ COMMITTED"] * 3] * 2
        writers = [pool.submit(write, history, *each, immediate) for each in enumerate(isolations)]
        while not last_time:
            last_time = all(writer.done() for writer in writers)
            cursor.execute(EVENTS.replace("ORDER", f"WHERE id > {polled[-1][1] if polled else 0} ORDER"))
            polled.extend(cursor)
        assert polled == sql(history, EVENTS)
        for number, writer in enumerate(writers):
            assert [event[2:] for event in polled if event[3].startswith(f"{number} ")] == writer.result()
        assert [(each.seq, each.channel, each.payload) for each, _ in received(len(polled))] == [e[1:] for e in polled]
    assert sql(history, "SELECT n FROM sse_relay.outbox") == []


def prune(url, keep, seconds, batch):
    """Prune to the end, and return what is gone; no step takes more than ``batch``."""
    left, gone, more = set(sql(url, IDS)), set(), True
    while more:
        (more,) = sql(url, PRUNE, keep, seconds, batch)
        step = left.difference(sql(url, IDS))
        assert len(step) <= batch
        left, gone = left - step, gone | step
    return gone


def through(url, *channels):
    """Up to where events of each channel are said to be deleted, as the relay asks."""
    one = "(SELECT through FROM sse_relay.pruned WHERE channel = %s)"
    return [sql(url, f"SELECT greatest({one}, pruned_through) FROM sse_relay.state", each)[0] for each in channels]


@pytest.mark.parametrize("batch", [3, 500])
def test_pruning_deletes_what_is_due_and_says_up_to_where(history, batch):
    """By age and by count, in batches; by age all channels are one, as nobody knows any more what was on which."""
    dice, gone = random.Random(batch), [0] * 4
    for keep, seconds in [(9, 10_000), (9, 400), (12, 300), (5, 300), (5, 200), (1, 200), (1, 1)]:
        publish(history, *[(CHANNELS[min(dice.randrange(8), 3)], "{}") for _ in range(25)])
        age = "5 * ((SELECT last_value + 1 FROM sse_relay.event_id) - id)"
        sql(history, f"UPDATE sse_relay.event SET at = now() - make_interval(secs => {age})")
        rows = sql(history, f"SELECT id, channel, {age} >= {seconds} FROM sse_relay.event ORDER BY id")
        old = [number for number, _, is_old in rows if is_old]
        surplus = [[number for number, name, _ in rows if name == channel][:-keep] for channel in CHANNELS]
        assert prune(history, keep, seconds, batch) == set(old).union(*surplus)
        gone = [max([so_far, *old, *numbers]) for so_far, numbers in zip(gone, surplus, strict=True)]
        assert through(history, *CHANNELS) == gone
    assert (gone, sql(history, "SELECT id FROM sse_relay.head()")) == ([175] * 4, [175])


def test_lower_keep_reaches_idle_channels(history):
    """They are looked at again, though nothing came on them since; who lost nothing is told of nothing."""
    publish(history, *[(name, "{}") for name in ("a", "b") for _ in range(5)], ("c", "{}"))
    for keep, gone in ((4, {1, 6}), (4, set()), (2, {2, 3, 7, 8}), (9, set()), (1, {4, 9})):
        assert prune(history, keep, DAY, 2) == gone
    assert through(history, "a", "b", "c") == [4, 9, 0]


def test_second_pruner_has_nothing_to_do(history):
    """It neither waits for the first nor deletes anything."""
    publish(history, *[("c", "{}")] * 9)
    with session(history) as first:
        first.execute(f"BEGIN; {PRUNE}", (5, DAY, 20))
        assert sql(history, f"SET lock_timeout = '1s'; {PRUNE}", 1, 0, 500) == [False]
        assert sql(history, IDS) == list(range(1, 10))
        first.execute("COMMIT")
    assert (sql(history, IDS), through(history, "c")) == (list(range(5, 10)), [4])


def test_a_million_events_go_while_others_come(history):
    """No writer waits for a pruner, however long its transaction is, and what is to be kept is kept."""
    keep, written, more = 20_000, [0] * 20, True
    values = "g, token, 'channel-' || g % 20, '', NULL, false, now() - CASE WHEN g <= 400000 THEN '2 days' ELSE '0' END::interval"  # fmt: skip
    sql(history, f"INSERT INTO sse_relay.event SELECT {values} FROM generate_series(1, 1000000) g, sse_relay.span")
    sql(history, "SELECT setval('sse_relay.event_id', 1000000)")

    def work(number):
        with session(history, options=f"-c lock_timeout={patience(5)}s") as cursor:
            while more:
                cursor.execute(PUBLISH, (CHANNELS[number], "new"))
                written[number] += 1

    with ThreadPoolExecutor() as pool, session(history) as cursor:
        writers = [pool.submit(work, number) for number in range(4)]
        try:
            while cursor.execute(f"BEGIN; {PRUNE}", (keep, DAY, 50_000)) or cursor.fetchone()[0]:
                before = written[:4]  # while this transaction holds what it holds, all of them go on
                until(lambda: all(map(int.__gt__, written[:4], before)), "all writers go on")
                cursor.execute("COMMIT")
            # Or it would be undone, and in the way of the next until the server sees that we have gone.
            cursor.execute("COMMIT")
        finally:
            more = False
    assert [writer.result() for writer in writers] == [None] * 4
    while sql(history, PRUNE, keep, DAY, 50_000) == [True]:
        pass
    kept = sql(history, "SELECT channel, array_agg(id ORDER BY id) FROM sse_relay.event GROUP BY 1")
    for channel, ids in kept:
        number = int(channel.removeprefix("channel-"))
        old = range(number or 20, 1_000_001, 20)[written[number] - keep :]
        assert (len(kept), len(ids), ids[: len(old)]) == (20, keep, list(old))
        assert through(history, channel) == [old[0] - 20]


def places(url):
    return [Cursor(*row[:2]) for row in sql(url, EVENTS)]


def admitted(url, *candidates):
    spans = Spans(sql(url, "SELECT token, first_id FROM sse_relay.span ORDER BY n"))
    return [place for place in candidates if spans.admits(place)]


def go_on(url, first):
    """A relay connects, or an application publishes before one does; return the places of three new events."""
    before = places(url)
    if first == "relay":
        sql(url, "SELECT sse_relay.open()")
    publish(url, *[("c", "new")] * 3)
    assert sql(url, "SELECT token, id FROM sse_relay.head()") == places(url)[-1:]
    return [place for place in places(url) if place not in before]


first_comes = pytest.mark.parametrize("first", ["relay", "writer"])


@first_comes
def test_places_stay_true_over_a_restart(postgres_server, history, first):
    """Also over a crash, which lets the sequence skip some."""
    events = go_on(history, first)
    for mode in ("immediate", "fast", "immediate"):
        postgres_server.stop(mode)
        postgres_server.start()
        assert sql(history, "SELECT token, id FROM sse_relay.head()") == events[-1:]
        events += go_on(history, first)
        assert admitted(history, *events) == events == places(history)


@first_comes
def test_who_missed_what_truncate_took_is_told(history, first):
    """By a place that is no longer one, or by a gap; what comes then has places as ever."""
    token = go_on(history, first)[0].token
    sql(history, "TRUNCATE sse_relay.event")
    new = go_on(history, first)
    assert admitted(history, *new) == new
    behind = admitted(history, *(Cursor(token, number) for number in range(3)))
    assert [place for place in behind if place.seq >= through(history, "c")[0]] == []


@first_comes
@pytest.mark.parametrize("how", ["stopped", "running"])
def test_places_of_a_lost_time_are_untrue(postgres_server, history, how, first):
    """Back to older files: a stopped server's, or a running one's, where the sequence skips some."""
    data, copy = postgres_server.cluster.data, postgres_server.cluster.home / "copy"
    before = go_on(history, first)
    if how == "stopped":
        postgres_server.stop()
    subprocess.run(["cp", "-a", data, copy], check=True)
    (copy / "postmaster.pid").unlink(missing_ok=True)
    if how == "stopped":
        postgres_server.start()
    publish(history, *[("c", "lost")] * 3)
    lost = places(history)[3:]
    postgres_server.stop()
    shutil.rmtree(data)
    copy.rename(data)
    postgres_server.start()
    new = go_on(history, first)
    assert (len(lost), len(new)) == (3, 3)
    assert admitted(history, *before, *lost, *new) == [*before, *new]


@first_comes
def test_places_of_a_lost_time_are_untrue_on_a_database_made_from_a_template(postgres_server, history, channel, first):
    """It is an older copy as well, on a server that did not start anew."""
    before = go_on(history, first)
    postgres_server.execute(f'CREATE DATABASE "{channel}-copy" TEMPLATE "{channel}"')
    lost, new = go_on(history, first), go_on(f"{history}-copy", first)
    assert admitted(f"{history}-copy", *before, *lost, *new) == [*before, *new]


@first_comes
@pytest.mark.parametrize(
    ("how", "kept"),
    [
        ("ALTER SEQUENCE sse_relay.event_id RESTART", True),
        ("ALTER SEQUENCE sse_relay.event_id RESTART", False),
        ("SELECT setval('sse_relay.event_id', 2)", True),
        ("SELECT setval('sse_relay.event_id', 3, false)", True),
        ("ALTER SEQUENCE sse_relay.event_id RESTART; DELETE FROM sse_relay.event", True),
    ],
)
def test_sequence_that_is_set_back_draws_no_id_twice(history, how, kept, first):
    """Publishers go on, and an old place stays one from which a stream goes on exactly, also if all events are pruned."""
    before = go_on(history, first)
    assert prune(history, 9, DAY if kept else 0, 500) == (set() if kept else {1, 2, 3})
    sql(history, how)
    new = go_on(history, first) + go_on(history, first)
    assert [place.seq for place in new] == [4, 5, 6, 7, 8, 9]
    assert admitted(history, *before, *new) == [*before, *new]


@first_comes
def test_sequence_that_is_set_forward_leaves_all_places_as_they_are(history, first):
    """Only the numbers in between are left out."""
    before = go_on(history, first)
    sql(history, "SELECT setval('sse_relay.event_id', 1000)")
    new = go_on(history, first)
    assert new == [(before[0].token, number) for number in (1001, 1002, 1003)]


@first_comes
def test_places_of_a_lost_time_are_untrue_after_a_data_only_restore(history, first):
    """The server runs on, all rows and the sequence are those of the dump, and the ids of the lost time are drawn anew."""
    before = go_on(history, first)
    tables = ("version", "event", "outbox", "span", "state", "pruned")
    dumped = {}
    with session(history) as cursor:
        for table in tables:
            cursor.copy_expert(f"COPY sse_relay.{table} TO STDOUT", dumped.setdefault(table, io.BytesIO()))
    lost = go_on(history, first)
    with session(history) as cursor:
        for table in tables:
            cursor.execute(f"DELETE FROM sse_relay.{table}")
            dumped[table].seek(0)
            cursor.copy_expert(f"COPY sse_relay.{table} FROM STDIN", dumped[table])
        cursor.execute("SELECT setval('sse_relay.event_id', 3)")
    new = go_on(history, first)
    assert [place.seq for place in new] == [place.seq for place in lost]
    assert admitted(history, *before, *lost, *new) == [*before, *new]
    assert sql(history, "SELECT count(*) FROM sse_relay.span") == [2]


def test_lock_is_not_held_while_a_deferred_check_waits(history):
    """A foreign key that waits for a row stops no other writer, and the row's owner may publish and commit."""
    sql(history, "CREATE TABLE parent (id int PRIMARY KEY); INSERT INTO parent VALUES (1)")
    sql(history, "CREATE TABLE child (parent int REFERENCES parent DEFERRABLE INITIALLY DEFERRED)")
    with (
        ThreadPoolExecutor(1) as pool,
        closing(psycopg2.connect(history)) as a,
        closing(psycopg2.connect(history)) as b,
    ):
        b.cursor().execute("SELECT FROM parent FOR UPDATE")
        a.cursor().execute(PUBLISH, ("c", "1"))
        a.cursor().execute("INSERT INTO child VALUES (1)")
        commit = pool.submit(a.commit)
        until(
            lambda: sql(history, "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"), "a waits for b's row"
        )
        publish(history, ("c", "2"))
        b.cursor().execute(PUBLISH, ("c", "3"))
        b.commit()
        commit.result(20)
    assert [payload for *_, payload in sql(history, EVENTS)] == ["2", "3", "1"]
