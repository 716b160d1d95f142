"""The inspector page of debug mode, in Chromium."""

import json
import os
import signal

import pytest
from relay import Relay
from servers import until
from test_eventsource import RETRIES

TOKEN = "p" * 40


class Inspector:
    """The page, used by what is on it."""

    def __init__(self, browser):
        self.evaluate = browser.evaluate

    def text(self, element):
        return self.evaluate(f"document.getElementById('{element}')?.textContent")

    def rows(self, kind="tr:not(.stream)"):
        """Event, id, bytes, time, and data, newest first; without the events of the position."""
        rows = f"[...document.querySelectorAll('#rows {kind}')]"
        cells = f"{rows}.map(row => [...row.cells].slice(1).map(c => c.textContent))"
        return json.loads(self.evaluate(f"JSON.stringify({cells})"))

    def data(self):
        return [row[-1] for row in self.rows()]

    def click(self, element):
        self.evaluate(f"document.getElementById('{element}').click()")

    def fill(self, name, value):
        """Type into the field of this name or id, in place of what is there."""
        self.evaluate(
            f"(field => {{ field.value = {json.dumps(value)}; field.dispatchEvent(new Event('input')) }})"
            f"(document.querySelector('[name={name}], #{name}'))"
        )

    def submit(self, form):
        self.evaluate(f"document.getElementById('{form}').requestSubmit()")

    def connected(self, *channels):
        told = f"Connected to {', '.join(channels)}"
        until(lambda: self.text("state") == told, told, 40)


@pytest.fixture
def inspect(browse):
    """Open the page of a relay, with the channels in its address if there are any."""

    def inspect(relay, *channels):
        page = Inspector(browse(f"{relay.url}/{'?channel=' if channels else ''}{','.join(channels)}"))
        if channels:
            page.connected(*channels)
        else:
            until(lambda: page.text("state"), "the page is there", 40)
        return page

    return inspect


def test_events_of_every_type_are_shown(broker, tmp_path, inspect):
    """The page of make demo: name, id, size and data as text, newest first, whatever ends the lines."""
    with Relay(tmp_path, "--workers", "1", "--debug", **broker.environment) as relay:
        page = inspect(relay, "demo", "orders")
        sent = [
            ("demo", '{"event":"greeting","id":7,"data":"<b>hello</b>\\nyou"}', ["greeting", "7", "16", "", "<b>hello</b>\nyou"]),
            ("orders", "plain \u00fc\u2028", ["message", "7", "11", "", "plain \u00fc\u2028"]),
            ("demo", '{"id":8,"data":"a\\nb","sep":"\\r\\n"}', ["message", "8", "3", "", "a\nb"]),
            ("demo", '{"id":9,"data":"c\\nd","sep":"\\r"}', ["message", "9", "3", "", "c\nd"]),
            ("demo", '{"event":"bare","sep":"\\r"}', ["bare", "9", "0", "", ""]),
        ]  # fmt: skip
        for number, (channel, payload, shown) in enumerate(sent, 1):
            broker.publish(channel, payload)
            until(lambda number=number: len(page.rows()) == number, f"event {number}")
            assert page.rows()[0] == shown
        assert (page.text("events"), page.text("bytes"), page.text("last")) == ("5", "33 B", "9")


def test_positions_are_shown_and_not_counted(kept, channel, tmp_path, inspect):
    """The events that tell a position have rows with an explanation, and do not count."""
    with Relay(tmp_path, "--workers", "1", "--debug", **kept.environment) as relay:
        page = inspect(relay, channel)
        until(lambda: page.rows("tr.stream"), "the row of the opening")
        ((name, first, *_, data),) = page.rows("tr.stream")
        assert name == "stream-open"
        assert json.loads(data.partition("}")[0] + "}") == {"id": first, "resumed": False}
        assert data.endswith("Its events follow behind this position.")
        page.click("pause")
        kept.publish(channel, "hello", id="own")
        until(lambda: page.text("events") == "1", "the event")
        assert page.text("shown") == "Newest first: 0 of 1, 1 since the pause"
        page.click("pause")
        until(lambda: len(page.rows("tr")) == 3, "all rows")
        (moved, event, opened) = page.rows("tr")
        assert (moved[0], event[0], opened[0]) == ("stream-position", "message", "stream-open")
        assert (event[1], moved[1]) == ("own", page.text("last"))
        assert moved[1] != first
        assert page.text("shown") == "Newest first: 1 of 1"
        assert (page.text("events"), page.text("bytes")) == ("1", "5 B")
        page.click("clear")
        until(lambda: not page.rows("tr"), "all is cleared")
        kept.publish(channel, "constructor", event="constructor")
        until(lambda: page.text("events") == "1", "an event with the name of what objects have")


def test_retry_of_any_length(redis_server, tmp_path, inspect):
    """No pause is so long that the page's timer would overflow and fire at once."""
    with Relay(tmp_path, "--workers", "1", "--debug", **redis_server.environment) as relay:
        page = inspect(relay)
        for value, pause in RETRIES:
            text = json.dumps(f"retry: {value}\n")
            page.evaluate(f"retry = 1234; new Parser().feed({text}, () => {{}})")
            assert page.evaluate("retry") == (pause or 1234)


def test_lost_connection_is_said_and_explained(broker, tmp_path, inspect):
    """Without a history the page is told that it may have missed something, and goes on."""
    with Relay(tmp_path, "--workers", "1", "--debug", **broker.environment) as relay:
        page = inspect(relay, "demo")
        os.kill(relay.workers()[0], signal.SIGKILL)
        until(lambda: page.text("state") == "Not connected, trying again ...", "it is said")
        page.connected("demo")
        until(lambda: len(page.rows()) == 1, "the reset")
        ((name, *_, data),) = page.rows()
        assert name == "stream-reset"
        assert data.startswith('{"reason":"unknown-id"')
        assert "The relay does not know the id" in data
        broker.publish("demo", "again")
        until(lambda: page.data()[0] == "again", "the next event")


def test_lost_connection_loses_nothing(kept, channel, tmp_path, inspect):
    """With a history the page resumes at its last id by itself."""
    with Relay(tmp_path, "--workers", "1", "--debug", **kept.environment) as relay:
        page = inspect(relay, channel)
        kept.publish(channel, "before")
        until(lambda: page.data() == ["before"], "the event")
        os.kill(relay.workers()[0], signal.SIGKILL)
        until(lambda: page.text("state") == "Not connected, trying again ...", "the connection is lost")
        kept.publish(channel, "meanwhile 1", "meanwhile 2")
        until(lambda: page.data() == ["meanwhile 2", "meanwhile 1", "before"], "what it missed")


def test_drop_and_connect_by_hand(kept, channel, tmp_path, inspect):
    """Nothing comes while it is dropped; then it goes on from the last id. Other channels begin anew."""
    with Relay(tmp_path, "--workers", "1", "--debug", **kept.environment) as relay:
        page = inspect(relay)
        assert page.evaluate("document.getElementById('drop').disabled")
        page.fill("channel", f" {channel} , {channel}-b,")
        page.submit("connect")
        page.connected(channel, f"{channel}-b")
        assert f"channel={channel}%2C{channel}-b" in page.evaluate("location.search")
        kept.publish(channel, "one")
        until(lambda: page.data() == ["one"], "the event")
        page.click("drop")
        until(lambda: "stream ended" in relay.log, "its stream ends")
        assert page.text("state").startswith("Dropped")
        kept.publish(channel, "two")
        kept.publish(f"{channel}-b", "three")
        page.submit("connect")
        until(lambda: page.data() == ["three", "two", "one"], "what came meanwhile")
        kept.publish(f"{channel}-c", "before it came")
        page.fill("channel", f"{channel}-c")
        page.submit("connect")
        page.connected(f"{channel}-c")
        kept.publish(channel, "not for it")
        kept.publish(f"{channel}-c", "four")
        until(
            lambda: page.data() == ["four", "three", "two", "one"], "no event twice, and none of a channel it has left"
        )


def test_test_event_and_its_latency(redis_server, tmp_path, inspect):
    """It arrives as what it is and with the time that it took; others have none. The token is in no address."""
    environment = redis_server.environment | {"RELAY_PUBLISH_TOKEN": TOKEN}
    with Relay(tmp_path, "--workers", "2", "--debug", **environment) as relay:
        page = inspect(relay, "demo")
        assert page.evaluate("getComputedStyle(document.getElementById('send')).display") != "none"
        page.fill("event", "greeting")
        page.fill("data", 'two\nlines, "quoted"')
        page.fill("token", "wrong")
        page.submit("send")
        until(lambda: page.text("said").startswith("Not sent: publishing takes Authorization"), "it is refused")
        page.fill("token", TOKEN)
        page.submit("send")
        until(page.rows, "the event")
        ((name, _, size, took, data),) = page.rows()
        assert (name, size, data) == ("greeting", "19", 'two\nlines, "quoted"')
        assert took.endswith(" ms")
        assert float(took.removesuffix(" ms")) > 0
        until(lambda: page.text("said") == f"Arrived after {took}.", "it is said beside the form")
        redis_server.publish("demo", "of somebody else")
        until(lambda: page.data()[0] == "of somebody else", "the next event")
        assert page.rows()[0][3] == ""
        page.fill("to", "elsewhere")
        page.submit("send")
        until(lambda: "does not listen" in page.text("said"), "it is sent, and will not arrive")
        assert TOKEN not in page.evaluate("location.href + document.documentElement.outerHTML")


def test_form_is_away_where_nobody_may_publish(redis_server, tmp_path, inspect):
    """And what would bring it is said."""
    with Relay(tmp_path, "--workers", "1", "--debug", **redis_server.environment) as relay:
        page = inspect(relay)
        assert page.evaluate("getComputedStyle(document.getElementById('send')).display") == "none"
        assert "RELAY_PUBLISH_TOKEN" in page.text("off")


def test_pause_filter_and_clear(redis_server, tmp_path, inspect):
    """What is shown stands still and is looked through; what is counted goes on."""
    with Relay(tmp_path, "--workers", "1", "--debug", **redis_server.environment) as relay:
        page = inspect(relay, "demo")
        for number in range(3):
            redis_server.publish("demo", f"early {number}")
        until(lambda: page.data() == ["early 2", "early 1", "early 0"], "three events")
        page.click("pause")
        redis_server.publish("demo", '{"event":"Late","data":"3"}')
        until(lambda: page.text("events") == "4", "the next one is counted")
        assert page.data() == ["early 2", "early 1", "early 0"]
        assert page.text("shown").endswith("1 since the pause")
        page.fill("filter", "EARLY 1")
        until(lambda: page.data() == ["early 1"], "the filter, as it stands still")
        page.click("pause")
        page.fill("filter", "late")
        until(lambda: page.data() == ["3"], "by the event's name")
        redis_server.publish("demo", "early 4")
        until(lambda: page.text("events") == "5", "an event that the filter hides")
        assert page.data() == ["3"]
        page.fill("filter", "")
        until(lambda: page.data() == ["early 4", "3", "early 2", "early 1", "early 0"], "all, in order")
        page.click("clear")
        until(lambda: page.text("events") == "0", "all is cleared")
        assert page.rows() == []


def test_burst_is_counted_exactly(redis_server, tmp_path, inspect):
    """Of 2,000 events at once each counts, and the newest few hundred are shown."""
    with Relay(tmp_path, "--workers", "1", "--debug", **redis_server.environment) as relay:
        page = inspect(relay, "demo")
        pipeline = redis_server.client.pipeline(transaction=False)
        for number in range(2000):
            pipeline.publish("demo", json.dumps({"id": number, "data": f"{number:04}"}))
        pipeline.execute()
        until(lambda: page.text("last") == "1999", "the last one")
        assert (page.text("events"), page.text("bytes")) == ("2,000", "8 kB")
        assert page.data() == [f"{number:04}" for number in range(1999, 1699, -1)]
        redis_server.publish("demo", "one more")
        until(lambda: page.data()[:2] == ["one more", "1999"], "the table goes on")
        assert (page.text("events"), len(page.rows())) == ("2,001", 300)


def test_refusal_is_shown(redis_server, tmp_path, inspect):
    """In the relay's words; the page does not try again by itself."""
    environment = redis_server.environment | {"RELAY_JWT_SECRET": "s" * 40}
    with Relay(tmp_path, "--workers", "1", "--debug", **environment) as relay:
        page = inspect(relay)
        page.fill("channel", "demo")
        page.submit("connect")
        until(lambda: page.text("state").startswith("no token"), "why")
        assert page.evaluate("document.getElementById('drop').disabled")
