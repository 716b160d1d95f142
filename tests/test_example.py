"""The example project: a board that two people have open, each in a browser of its own."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from browser import Browser
from relay import ROOT, environment
from servers import PATIENCE, accepts, free_port, until

EXAMPLE = ROOT / "examples/board"
ITEMS = "[...document.querySelectorAll('{} span')].map(item => item.textContent)"


class Board:
    """The example, running."""

    def __init__(self, url, log):
        self.site, self.relay = free_port(), free_port()
        ports = {"SITE_PORT": str(self.site), "EVENTS_PORT": str(self.relay)}
        self.log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, EXAMPLE / "run.py"],
                env=environment(DATABASE_URL=url, **ports),
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(PATIENCE)


@pytest.fixture
def board(postgres_server, channel, tmp_path):
    name = f"board_{channel.replace('-', '_')}"
    postgres_server.execute(f"CREATE DATABASE {name}")
    running = Board(postgres_server.url.removesuffix("relay") + name, tmp_path / "board.log")
    try:
        until(lambda: accepts(running.site) and accepts(running.relay), "it serves", seconds=60)
        yield running
    finally:
        running.stop()
    assert "Traceback" not in running.log.read_text()
    assert not accepts(running.site)
    assert not accepts(running.relay)


@pytest.fixture
def log_in(board, tmp_path):
    """Open the board in a browser of a person's own."""
    browsers = []

    def log_in(name):
        page = Browser(tmp_path / name, f"http://localhost:{board.site}/")
        browsers.append(page)
        until(lambda: page.evaluate("!!document.querySelector('[name=password]')"), "the form", seconds=40)
        page.evaluate(
            f"document.querySelector('[name=username]').value = '{name}';"
            "document.querySelector('[name=password]').value = 'demo'; document.querySelector('form').submit()"
        )
        until(lambda: page.evaluate("!!document.querySelector('#tasks')"), "the board", seconds=40)
        number = len(browsers)
        until(lambda: board.log.read_text().count("stream opened") == number, "its stream")
        return page

    yield log_in
    for browser in browsers:
        browser.close()


def add(page, title, owner):
    page.evaluate(
        "(() => { const form = document.querySelector('form[hx-post]'); const { title, owner } = form.elements;"
        f"title.value = '{title}'; owner.value = [...owner.options].find(one => one.text == '{owner}').value;"
        "form.requestSubmit() })()"
    )


def tasks(page):
    return page.evaluate(ITEMS.format("#tasks"))


def notices(page):
    return page.evaluate(ITEMS.format("#notices"))


def test_board(board, log_in):
    """What one does is on the other's page, in order; notices reach whom they are for; what is rolled back nobody sees."""
    alice, bob = log_in("alice"), log_in("bob")
    assert tasks(bob) == ["Nothing to do."]
    for number in range(1, 6):
        add(alice, f"task {number}", "bob")
        until(lambda number=number: len(notices(bob)) == number, "the notice")
    expected = [f"task {number}" for number in range(1, 6)]
    until(lambda: tasks(alice) == tasks(bob) == expected, "all are on both pages")
    assert notices(bob) == [f"alice has a task for you: task {number}" for number in range(5, 0, -1)]
    assert notices(alice) == []

    add(alice, "one too many", "bob")
    answer = "document.getElementById('answer').textContent"
    until(lambda: alice.evaluate(answer) == "bob has 5 open tasks already.", "it is refused")
    bob.evaluate("document.querySelector('#tasks button').click()")
    until(lambda: alice.evaluate("document.querySelectorAll('#tasks .done').length") == 1, "the first is done")
    add(bob, "for alice", "alice")
    until(lambda: notices(alice) == ["bob has a task for you: for alice"], "her notice")
    assert len(notices(bob)) == 5
    assert "one too many" not in tasks(alice)

    until(lambda: "one too many" not in tasks(bob) and "for alice" in tasks(bob), "it is on his page")
    if "SSE_RELAY_SCREENSHOT" in os.environ:
        bob.screenshot(Path(os.environ["SSE_RELAY_SCREENSHOT"]))


def test_nobody_listens_to_anothers_channel(board, log_in):
    """The page's token is for its own channels: with it another's is refused, and without any all are."""
    alice = log_in("alice")
    url = alice.evaluate("document.body.getAttribute('sse-connect')")
    own = re.search(r"channel=(user-\d+)", url)[1]
    for stolen in (url.replace(own, f"{own}0"), re.sub(r"token=[^&]+", "", url)):
        assert httpx.get(stolen).status_code in (401, 403)
    assert httpx.head(url).status_code == 200


def test_models_are_migrated(postgres_server):
    """makemigrations finds nothing to do."""
    variables = {"DATABASE_URL": postgres_server.url, "RELAY_URL": "http://localhost", "RELAY_JWT_SECRET": "s" * 64}
    command = [sys.executable, "manage.py", "makemigrations", "--check"]
    done = subprocess.run(
        command, cwd=EXAMPLE, env=environment(**variables), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
