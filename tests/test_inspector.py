"""The inspector page of debug mode, in Chromium."""

import json
import os
import signal

from relay import Relay
from servers import until


def test_inspector_shows_events_of_every_type(broker, tmp_path, browse):
    """The page of make demo: names and data as text, newest first, also after the worker was killed."""
    with Relay(tmp_path, "--workers", "1", "--debug", **broker.environment) as relay:
        page = browse(f"{relay.url}/?channel=demo,orders")
        until(
            lambda: page.evaluate("document.getElementById('state').textContent") == "Connected to demo, orders",
            "connected",
        )
        broker.publish("demo", '{"event":"greeting","id":7,"data":"<b>hello</b>\\nyou"}')
        broker.publish("orders", "plain")
        rows = "JSON.stringify([...document.querySelectorAll('tbody tr')].map(r => [...r.cells].slice(1).map(c => c.textContent)))"
        first = [["message", "7", "plain"], ["greeting", "7", "<b>hello</b>\nyou"]]
        until(lambda: sorted(json.loads(page.evaluate(rows))) == sorted(first), "both events")
        os.kill(relay.workers()[0], signal.SIGKILL)
        until(lambda: relay.log.count("stream opened") == 2, "the page is back")
        broker.publish("demo", "again")
        until(lambda: json.loads(page.evaluate(rows))[0][2] == "again", "the next event")
