"""The template tags, rendered by a real Django project and opened in a real Chromium."""

from importlib.resources import files
from types import SimpleNamespace

import pytest
from relay import Relay
from servers import until
from team import Project
from test_readme import block

SECRET = "s" * 64


@pytest.fixture
def project(postgres_server, tmp_path):
    made = Project(tmp_path, postgres_server)
    made.run("migrate")
    return made


@pytest.fixture
def relay(project, site, tmp_path):
    environment = {"DATABASE_URL": project.url, "RELAY_HISTORY": "100", "RELAY_JWT_SECRET": SECRET}
    with Relay(tmp_path, "--workers", "2", "--allowed-origins", site.url, **environment) as running:
        project.sse_relay = {"RELAY_URL": running.url, "RELAY_JWT_SECRET": SECRET}
        yield running


def render(project, text, **context):
    """Return what the template makes of ``context``."""
    code = "from types import SimpleNamespace as namespace\nfrom django.template import Context\nfrom django.template.backends.django import DjangoTemplates\n"
    code += "engine = DjangoTemplates(dict(NAME='x', DIRS=[], APP_DIRS=True, OPTIONS={}))\n"
    code += f"print(engine.from_string({text!r}).template.render(Context({context!r})))"
    return project.python(code)


def notify(project, channel, *numbers):
    project.python(f"for number in {numbers!r}: notify({channel!r}, {{'event': 'NEW_ORDER', 'data': str(number)}})")


def test_nothing_between_rendering_and_connecting_is_lost(project, relay, site, browser):
    """Ten events: the README's page has all, in order, with a token for its own channels; another's event is not among them."""
    template = block("html", 'sse_stream "orders"').replace("console.log(e.data)", "(window.seen ??= []).push(e.data)")
    notify(project, "orders", "before")
    page = render(project, template, user_channel="user-7")
    for number in range(10):
        notify(project, ["orders", "user-7"][number % 2], number)
        notify(project, "user-8", "not for us")
    site.answers["/shop"] = lambda: (200, page)
    tab = browser.tab(f"{site.url}/shop")
    until(lambda: len(tab.evaluate("window.seen") or []) >= 10, "the events", seconds=40)
    notify(project, "orders", "live")
    until(lambda: tab.evaluate("seen.at(-1)") == "live", "the next event")
    assert tab.evaluate("seen") == [*map(str, range(10)), "live"]


def test_htmx(project, relay, site, browser):
    """The README's page with htmx and its extension: an event's HTML is put into the list, also after all workers died."""
    static = files("django_htmx") / "static/django_htmx"
    scripts = [(static / path).read_text() for path in ("htmx-2.min.js", "ext/hx-sse-2.min.js")]
    page = "<body>" + "".join(f"<script>{script}</script>" for script in scripts)
    page += render(project, block("html", "hx-ext"))
    site.answers["/shop"] = lambda: (200, page)
    notify(project, "orders", "<li>1")
    tab = browser.tab(f"{site.url}/shop")
    until(lambda: "stream opened" in relay.log, "connected", seconds=40)
    assert tab.evaluate("htmx.createEventSource.toString()").endswith("new RelaySource(url)")
    notify(project, "orders", "<li>2")
    items = "[...document.querySelectorAll('li')].map(item => item.textContent)"
    until(lambda: tab.evaluate(items) == ["1", "2"], "both orders")


def test_attributes(project):
    """Each option is an attribute, escaped; the nonce is Django's or django-csp's; without channels it is the script alone."""
    project.sse_relay = {"RELAY_URL": "https://events.example.com/"}
    rendered = render(
        project,
        "{% load sse_relay %}{% sse_stream 'a\"b' name='x' refresh='/t?a&b' credentials=True since='5f0c2a91-7' %}",
        csp_nonce="abc",
    )
    assert rendered.strip() == (
        '<script src="https://events.example.com/relay.js" nonce="abc"'
        ' data-stream="https://events.example.com/events?channel=a%22b&amp;last_event_id=5f0c2a91-7"'
        ' data-name="x" data-refresh="/t?a&amp;b" data-credentials="include"></script>'
    )
    rendered = render(project, "{% load sse_relay %}{% sse_stream %}", request=SimpleNamespace(csp_nonce="n"))
    assert rendered.strip() == '<script src="https://events.example.com/relay.js" nonce="n"></script>'
    plain = '<script src="https://events.example.com/relay.js"></script>'
    assert render(project, "{% load sse_relay %}{% sse_stream %}").strip() == plain


def test_broker_that_is_away_costs_the_page_only_the_id(project):
    """It is rendered all the same, and the log says so."""
    project.sse_relay = {"RELAY_URL": "https://events.example.com", "REDIS_URL": "redis://127.0.0.1:1"}
    rendered = render(project, "{% load sse_relay %}{% sse_url 'a' %}")
    assert "https://events.example.com/events?channel=a\n" in rendered
    assert "a page is rendered without the id of the newest event" in rendered


def test_what_is_wrong_is_said(project):
    """Without RELAY_URL, or with a channel that there cannot be."""
    code = "from tornado_relay.django.templatetags.sse_relay import sse_url\ntry: sse_url({!r})\nexcept Exception as e: print(e)"
    assert "RELAY_URL is not set" in project.python(code.format("a"))
    project.sse_relay = {"RELAY_URL": "https://events.example.com"}
    assert "channel is empty" in project.python(code.format(""))
