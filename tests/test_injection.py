"""What a visitor or a publisher writes is never a statement or a command: the servers' own logs say so."""

import itertools
import re
import threading
from urllib.parse import quote

import httpx
import pytest
from relay import Relay
from servers import execute

TOKEN = "p" * 40
HARMLESS = ["orders", "stock", "a-name-that-is-longer-than-the-63-bytes-which-a-channel-of-postgresql-has"]
HOSTILE = [
    "'; DROP TABLE sse_relay.event; --",
    '"; DROP SCHEMA sse_relay CASCADE; --',
    "\\'; DROP TABLE sse_relay.event; --",
    '\\"; SELECT pg_sleep(10); --',
    "'||(SELECT pg_sleep(10))||'",
    "$$; SELECT pg_sleep(10); $$",
    "%s%(channels)s%%",
    "E'\\\\' OR 1=1 --",
    "\u02bc; \uff07; DROP TABLE sse_relay.event; --",
    "*1 $8 FLUSHALL",
    "x" * 64 + "'; DROP TABLE sse_relay.event; --",
    "x" * 64 + '","payload":{"data":"forged"}}',
]
# What may be data, but no name.
LINES = ["\r\nFLUSHALL\r\n", "*1\r\n$8\r\nFLUSHALL\r\n", "\0'; DROP TABLE sse_relay.event; --", "\n;\n"]
# One token of SQL each: a string with escapes, a string, an identifier, a number (PostgreSQL, "Lexical Structure").
TOKENS = re.compile(r"""E'(?:[^'\\]|''|\\.)*'|'(?:[^']|'')*'|"(?:[^"]|"")*"|\b\d+\b""", re.DOTALL)


def use_everything(kept, home, pages, texts, lines=()):
    """Put each text in every place that a visitor or a publisher has, and see it arrive as it was."""
    with Relay(home, "--workers", "1", **kept.environment, RELAY_PUBLISH_TOKEN=TOKEN) as relay:
        for text in texts:
            address, last = quote(text, safe=""), {"Last-Event-ID": f"not {text}"}
            opened = pages.open(relay.port, [f"/channel={address}", f"/events?channel={address}&channel=other"])
            opened += pages.open(relay.port, [f"/channel={address}?last_event_id={address}"], last)
            kept.publish(text, text, *lines, event=text)
            event = {"data": text, "event": text, "id": text}
            sent = httpx.post(
                f"{relay.url}/channel={address}", json=event, headers={"Authorization": f"Bearer {TOKEN}"}
            )
            assert sent.status_code == 202
            kept.publish(text, "last")
            pages.until(lambda opened=opened: all(page.data[-1:] == ["last"] for page in opened), "the last event")
            shown = [each.replace("\r\n", "\n") for each in [text, *lines, text, "last"]]
            for page in opened:
                assert [event.data for event in page.events if event.event != "stream-reset"] == shown
            assert {event.event for event in opened[0].events} == {text, "message"}
            (again,) = pages.open(relay.port, [f"/channel={address}"], {"Last-Event-ID": text})
            pages.until(lambda again=again: again.data[-1:] == ["last"], "it comes back")
            for page in [*opened, again]:
                pages.close(page)


def statements(log):
    """The shapes of what a log says was executed, with a ? in place of every literal and name."""
    entries = re.split(r"^(?=\d{4}-\d\d-\d\d )", log, flags=re.MULTILINE)
    texts = [entry.partition("statement: ")[2] for entry in entries if "LOG:  statement: " in entry]
    shapes = set()
    for text in texts:
        shape = " ".join(TOKENS.sub("?", text).split())
        # However many.
        shape = re.sub(r"((UN)?LISTEN \?;? ?)+", r"LISTEN ?", shape)
        shapes.add(re.sub(r"\[\?(, ?\?)*\]", "[?]", shape))
    return shapes


def test_postgres_executes_what_was_meant(kept_postgres, tmp_path, pages):
    """The statements of hostile names, ids, events and data have the shapes of those of harmless ones."""
    server = kept_postgres.server
    marks = [len(server.log)]
    for texts, lines in ((HARMLESS, LINES[3:]), (HOSTILE, LINES)):
        use_everything(kept_postgres, tmp_path, pages, texts, lines)
        marks.append(len(server.log))
    harmless, hostile = (statements(server.log[begin:end]) for begin, end in itertools.pairwise(marks))
    assert len(harmless) > 5
    assert hostile == harmless
    assert "syntax error" not in server.log[marks[0] :]
    # All is still there.
    assert execute(kept_postgres.url, "SELECT count(*) > 20 FROM sse_relay.event")[0][0]


def test_redis_runs_what_was_meant(kept_redis, tmp_path, pages):
    """No command comes with hostile texts that does not with harmless ones, by MONITOR."""
    runs = []
    for texts, lines in ((HARMLESS, LINES[3:]), (HOSTILE, LINES)):
        commands, monitor = [], kept_redis.server.client.monitor()
        with monitor:
            ready = threading.Event()

            def listen(monitor=monitor, commands=commands, ready=ready):
                ready.set()
                for command in monitor.listen():
                    commands.append(command["command"])
                    if command["command"] == "ECHO the-end":
                        return

            thread = threading.Thread(target=listen)
            thread.start()
            ready.wait()
            use_everything(kept_redis, tmp_path, pages, texts, lines)
            kept_redis.server.client.echo("the-end")
            thread.join()
        runs.append({command.split(" ")[0].upper() for command in commands})
    # What a relay does once only, the first has alone.
    assert {"SUBSCRIBE", "EVALSHA"} <= runs[1] <= runs[0]


@pytest.mark.parametrize("text", HOSTILE)
def test_tokens_of_the_test_itself(text):
    """The reader of statements takes a quoted text as one token, as PostgreSQL does."""
    from psycopg2.extensions import QuotedString

    quoted = QuotedString(text)
    quoted.encoding = "utf-8"
    assert TOKENS.sub("?", quoted.getquoted().decode()) == "?"
    assert TOKENS.sub("?", '"' + text.replace('"', '""') + '"') == "?"
