"""RELAY_AUTH_URL: the application says who may listen, asked over HTTP by a running relay."""

import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, urlsplit

import httpx
import jwt
import pytest
from pages import Page
from relay import Relay, environment, run, watched
from servers import PATIENCE, free_port, until
from test_readme import block

from tornado_relay.authority import CONCURRENT, FRESH_SECONDS
from tornado_relay.tokens import subscribe_token

SECRET = "s" * 40
SESSION = {"Cookie": "sessionid=hush-hush"}


class Application(ThreadingHTTPServer):
    """An application that answers with ``status``, once ``gate`` is open."""

    daemon_threads = True
    request_queue_size = 100

    def __init__(self, port=0):
        self.status = 204
        self.gate = threading.Event()
        self.gate.set()
        self.asked = []
        self.at_work = self.most_at_work = 0
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", port), Answer)
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self.gate.set()
        self.shutdown()
        self.server_close()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/may-listen/?key=1"


class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        application = self.server
        with application.lock:
            application.asked.append((self.path, self.headers))
            application.at_work += 1
            application.most_at_work = max(application.most_at_work, application.at_work)
        application.gate.wait(PATIENCE)
        with application.lock:
            application.at_work -= 1
        self.send_response(200 if self.path == "/login" else application.status)
        self.send_header("Location", "/login")
        self.end_headers()
        with suppress(ConnectionError):  # the relay has given up
            self.wfile.write(b"what it says beside does not count")

    def log_message(self, *_):
        """Nothing."""


@pytest.fixture
def application():
    running = Application()
    yield running
    running.close()


@pytest.fixture
def asking(application, redis_server, tmp_path):
    """A relay with one worker that asks the application."""
    environment = redis_server.environment | {"RELAY_AUTH_URL": application.url, "RELAY_TRUSTED_PROXIES": "127.0.0.1"}
    with Relay(tmp_path, "--workers", "1", "--log-level", "TRACE", **environment) as relay:
        yield relay


def stays_open(pages, page):
    """A stream that was refused softly begins with another comment."""
    pages.until(lambda: page.body, "its first bytes")
    assert page.body.startswith(b": sse-relay-server")


def test_application_gets_what_the_browser_sent(asking, application, redis_server, pages):
    """Cookie, Authorization, the channels in their order, the address; the rest of the URL is as it was set."""
    headers = {**SESSION, "Authorization": "Basic aHVzaA==", "X-Forwarded-For": "6.6.6.6, 203.0.113.7"}
    (page,) = pages.open(asking.port, ["/events?channel=b%26c&channel=%C3%A4&channel=a&token=hush"], headers)
    path, sent = application.asked[0]
    assert urlsplit(path).path == "/may-listen/"
    assert parse_qsl(urlsplit(path).query) == [("key", "1"), ("channel", "b&c"), ("channel", "ä"), ("channel", "a")]
    assert (sent["Cookie"], sent["Authorization"]) == (SESSION["Cookie"], "Basic aHVzaA==")
    assert sent.get_all("X-Forwarded-For") == ["203.0.113.7"]
    redis_server.publish("b&c", "hello")
    pages.until(lambda: page.events, "the event")
    assert page.status == 200
    pages.open(asking.port, ["/channel=x"])
    pages.open(asking.port, ["/channel=y"], {"Cookie": "a=1\r\nCookie: b=2"})
    assert application.asked[2][1]["Cookie"] == "a=1; b=2"
    assert not {"Cookie", "Authorization"} & set(application.asked[1][1].keys())
    assert "hush" not in asking.log
    assert "aHVzaA" not in asking.log


@pytest.mark.parametrize("status", [200, 204, 299])
def test_success_lets_in(asking, application, redis_server, pages, status):
    """Any 2xx."""
    application.status = status
    (page,) = pages.open(asking.port, ["/channel=x"], SESSION)
    redis_server.publish("x", "hello")
    pages.until(lambda: page.events, "the event")


@pytest.mark.parametrize("path", ["/channel=x", "/x", "/events?channel=y&channel=x"])
@pytest.mark.parametrize("status", [401, 403])
def test_refusal_is_passed_on(asking, application, redis_server, pages, status, path):
    """For GET and HEAD, and no event is delivered."""
    application.status = status
    (page,) = pages.open(asking.port, [path], SESSION)
    (head,) = pages.open(asking.port, [path], SESSION, method="HEAD")
    redis_server.publish("x", "secret")
    pages.until(lambda: page.body.endswith(b"\n"), "the answer")
    assert (page.status, head.status) == (status, status)
    assert page.body == b"the application does not let this client listen here\n"


@pytest.mark.parametrize("status", [302, 404, 429, 500, 503])
def test_no_answer_is_a_soft_refusal(asking, application, redis_server, pages, status):
    """EventSource comes back, other clients get 503; a redirect to a page to log in at is not followed."""
    application.status = status
    (page,) = pages.open(asking.port, ["/channel=x"], SESSION)
    redis_server.publish("x", "secret")
    pages.until(lambda: page.closed, "its end")
    assert (page.status, page.events) == (200, [])
    assert page.parser.retry
    assert "secret" not in str(page.body)
    plain = httpx.get(f"{asking.url}/channel=x")
    assert (plain.status_code, "Retry-After" in plain.headers) == (503, True)
    assert f"answered {status}" in plain.text
    assert httpx.head(f"{asking.url}/channel=x").status_code == 503
    assert asking.log.count("pages are told to come back") == 1
    application.status = 204
    stays_open(pages, pages.open(asking.port, ["/channel=x"], {"Cookie": "sessionid=2"})[0])


def test_application_that_hangs_is_a_soft_refusal(asking, application, pages):
    """After 5 seconds, and the seat and the worker are free meanwhile."""
    application.gate.clear()
    (page,) = pages.open(asking.port, ["/channel=x"])
    pages.until(lambda: page.closed, "its end")
    assert page.parser.retry
    assert "does not answer" in asking.log


def test_application_that_is_not_there_is_a_soft_refusal(redis_server, tmp_path, pages):
    """Until it is."""
    port = free_port()
    flags = ("--workers", "1", "--auth-url", f"http://127.0.0.1:{port}/")
    with Relay(tmp_path, *flags, **redis_server.environment) as relay:
        for _ in range(3):
            (page,) = pages.open(relay.port, ["/channel=x"])
            pages.until(lambda page=page: page.closed, "its end")
            assert page.parser.retry
        assert relay.log.count("pages are told to come back") == 1
        application = Application(port)
        (page,) = pages.open(relay.port, ["/channel=x"])
        stays_open(pages, page)
        application.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_worker_that_ends_while_it_asks_refuses_softly(asking, application, pages, number):
    """An error would end the page's stream for good."""
    application.gate.clear()
    opened = [pages.add(Page(asking.port, "/channel=x", {"Cookie": str(n)})) for n in range(20)]
    plain = pages.add(Page(asking.port, "/channel=x", {"Accept": "*/*"}))
    until(lambda: application.at_work == CONCURRENT, "ten questions")
    asking.signal(number)
    pages.until(lambda: all(page.closed for page in [*opened, plain]), "their ends")
    assert {page.status for page in opened} == {200}
    assert all(page.parser.retry for page in opened)
    assert "Traceback" not in asking.log


def test_who_leaves_is_not_asked_about(asking, application, pages):
    """Nor holds a seat: a flood of requests that nobody waits for is none for the application."""
    application.gate.clear()
    opened = [Page(asking.port, "/channel=x", {"Cookie": str(n)}, method=("GET", "HEAD")[n % 2]) for n in range(60)]
    until(lambda: application.at_work == CONCURRENT, "ten questions")
    for page in opened:
        page.close()
    late = pages.add(Page(asking.port, "/channel=x", SESSION))
    application.gate.set()
    pages.until(lambda: late.status, "the answer to who waits")
    assert late.status == 200
    assert len(application.asked) <= 2 * CONCURRENT


def test_limit_counts_those_who_are_asked_about(application, redis_server, tmp_path, pages):
    """One address asks no more than it may have streams, by HEAD neither."""
    environment = redis_server.environment | {"RELAY_AUTH_URL": application.url}
    application.gate.clear()
    with Relay(tmp_path, "--workers", "1", "--max-connections-per-ip", "3", **environment) as relay:
        opened = [
            pages.add(Page(relay.port, "/channel=x", {"Cookie": str(n)}, method=("GET", "HEAD")[n % 2]))
            for n in range(9)
        ]
        pages.until(lambda: sum(page.closed for page in opened) == 6, "six are refused")
        until(lambda: len(application.asked) == 3, "three questions")
        application.gate.set()
        pages.until(lambda: all(page.status == 200 for page in opened), "the others are let in")


def test_answer_that_is_no_http_is_a_soft_refusal(redis_server, tmp_path, pages):
    """Headers without end, another protocol, nothing at all."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        flags = ("--workers", "1", "--auth-url", f"http://127.0.0.1:{server.getsockname()[1]}/")
        with Relay(tmp_path, *flags, **redis_server.environment) as relay:
            for answer in (
                b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000,
                b"SSH-2.0\r\n\r\n",
                b"HTTP/1.1 abc\r\n\r\n",
                b"",
            ):
                page = pages.add(Page(relay.port, "/channel=x"))
                connection, _ = server.accept()
                with connection:
                    connection.recv(65536)
                    try:
                        connection.sendall(answer)
                    except ConnectionError:
                        pass  # it has seen enough
                    connection.shutdown(socket.SHUT_RDWR)
                pages.until(lambda page=page: page.closed, "its end")
                assert (page.status, bool(page.parser.retry)) == (200, True)
            assert "Traceback" not in relay.log


def test_those_who_ask_alike_share_an_answer(asking, application, pages):
    """Fifty tabs at once are one question; other cookies, channels, headers and addresses are others."""
    application.gate.clear()
    opened = [pages.add(Page(asking.port, "/channel=x", SESSION)) for _ in range(50)]
    until(lambda: len(application.asked) == 1, "the question")
    application.gate.set()
    pages.until(lambda: all(page.status for page in opened), "all are open")
    assert {page.status for page in opened} == {200}
    assert len(application.asked) == 1
    for path, more in (
        ("/channel=y", {}),
        ("/events?channel=x&channel=y", {}),
        ("/channel=x", {"Cookie": "sessionid=2"}),
        ("/channel=x", {"Authorization": "x"}),
        ("/channel=x", {"X-Forwarded-For": "1.1.1.1"}),
    ):
        asked = len(application.asked)
        pages.open(asking.port, [path], SESSION | more)
        assert len(application.asked) == asked + 1


def test_answer_is_forgotten_soon(asking, application, pages):
    """A user who may no longer listen is refused a few seconds later."""
    pages.open(asking.port, ["/channel=x"], SESSION)
    application.status = 403
    until(lambda: pages.open(asking.port, ["/channel=x"], SESSION)[0].status == 403, "refused", FRESH_SECONDS + 10)
    assert len(application.asked) == 2


def test_failure_is_not_kept(asking, application, pages):
    """Whoever comes back is asked about anew."""
    application.status = 500
    (page,) = pages.open(asking.port, ["/channel=x"], SESSION)
    pages.until(lambda: page.closed, "its end")
    application.status = 204
    (page,) = pages.open(asking.port, ["/channel=x"], SESSION)
    stays_open(pages, page)


def test_burst_does_not_flood_the_application(asking, application, pages):
    """A hundred users at once are ten questions at a time, and all of them are answered."""
    application.gate.clear()
    opened = [pages.add(Page(asking.port, "/channel=x", {"Cookie": f"sessionid={n}"})) for n in range(100)]
    until(lambda: application.at_work == CONCURRENT, "ten questions")
    assert httpx.get(f"{asking.url}/healthz").status_code == 200
    application.gate.set()
    pages.until(lambda: all(page.status for page in opened), "all are open")
    assert [page.closed for page in opened] == [False] * 100
    assert application.most_at_work == CONCURRENT
    assert len(application.asked) == 100


def test_token_and_application_must_both_let_in(application, redis_server, tmp_path, pages):
    """The token is looked at first."""
    environment = redis_server.environment | {"RELAY_AUTH_URL": application.url, "RELAY_JWT_SECRET": SECRET}
    with Relay(tmp_path, "--workers", "1", **environment) as relay:

        def status(channel, token):
            return pages.open(relay.port, [f"/channel={channel}?token={token}"])[0].status

        assert [status("x", "wrong"), status("y", subscribe_token("x", key=SECRET))] == [401, 403]
        assert not application.asked
        assert status("x", subscribe_token("x", key=SECRET)) == 200
        application.status = 403
        assert status("z", subscribe_token("z", key=SECRET)) == 403
        # The stream ends with its token all the same.
        application.status = 204
        short = jwt.encode({"channels": ["a"], "exp": time.time() + 2}, SECRET)
        (page,) = pages.open(relay.port, [f"/channel=a?token={short}"])
        pages.until(lambda: page.closed, "its end")


def test_twin_is_not_heard(application, postgres_server, tmp_path, pages):
    """The application was asked about Orders and ord*, not about orders, which an unquoted NOTIFY Orders reaches."""
    environment = postgres_server.environment | {"RELAY_AUTH_URL": application.url, "RELAY_JWT_SECRET": SECRET}
    token = subscribe_token("*", key=SECRET)
    with Relay(tmp_path, "--workers", "1", **environment) as relay:
        paths = [
            f"/events?channel=Orders&channel=ord*&token={token}",
            f"/events?channel=Orders&channel=orders&token={token}",
        ]
        opened = pages.open(relay.port, paths)
        postgres_server.execute("NOTIFY Orders, 'twin'")
        postgres_server.publish("Orders", "exact")
        pages.until(lambda: all(page.data[-1:] == ["exact"] for page in opened), "the last event")
        assert [page.data for page in opened] == [["exact"], ["twin", "exact"]]


def test_refused_streams_hold_no_seat_and_a_full_relay_does_not_ask(application, redis_server, tmp_path, pages):
    """What is cheap comes first."""
    environment = redis_server.environment | {"RELAY_AUTH_URL": application.url}
    with Relay(tmp_path, "--workers", "1", "--max-connections", "1", **environment) as relay:
        for application.status in (401, 403, 500):
            (page,) = pages.open(relay.port, ["/channel=x"], {"Cookie": str(application.status)})
            pages.until(lambda page=page: page.closed or page.body, "the answer")
        application.status = 204
        (page,) = pages.open(relay.port, ["/channel=x"])
        stays_open(pages, page)
        asked = len(application.asked)
        (full,) = pages.open(relay.port, ["/channel=x"], SESSION)
        pages.until(lambda: full.closed, "its end")
        assert not page.closed
        assert len(application.asked) == asked


def test_check_asks_too(application, redis_server, tmp_path):
    """And says what becomes of a client without cookies."""
    environment = redis_server.environment | {"RELAY_AUTH_URL": application.url}
    for status, said in ((204, "lets in a client without"), (403, "refuses a client without"), (500, "answered 500")):
        application.status = status
        done = run("check", cwd=tmp_path, **environment)
        assert f"application: RELAY_AUTH_URL {said}" in done.stdout
        assert done.returncode == (1 if status == 500 else 0)
        assert "key=1" not in done.stdout


def test_session_of_a_real_django_project(redis_server, tmp_path, pages):
    """The README's view: a user who has logged in to Django hears what is hers, and nothing else."""
    (tmp_path / "may_listen.py").write_text(block("python", "may_listen.py"))
    (tmp_path / "project.py").write_text(textwrap.dedent(DJANGO))
    django = subprocess.Popen(
        [sys.executable, "project.py"], cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, text=True
    )
    try:
        port, user, session = django.stdout.readline().split()
        more = {"RELAY_AUTH_URL": f"http://127.0.0.1:{port}/may-listen/"}
        with Relay(tmp_path, "--workers", "1", **redis_server.environment, **more) as relay:
            wanted = ["/channel=orders", f"/events?channel=orders&channel=user-{user}", "/channel=user-0", "/user-0"]
            logged_in = pages.open(relay.port, wanted, {"Cookie": f"a=b; sessionid={session}"})
            assert [page.status for page in logged_in] == [200, 200, 403, 403]
            for headers in ({}, {"Cookie": "sessionid=made-up"}):
                assert [page.status for page in pages.open(relay.port, wanted, headers)] == [401] * 4
            redis_server.publish(f"user-{user}", "for you")
            pages.until(lambda: logged_in[1].events, "the event")
    finally:
        django.kill()
        django.communicate()


DJANGO = """
    import sys
    from socketserver import ThreadingMixIn
    from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

    import django
    from django.conf import settings

    settings.configure(
        SECRET_KEY="k" * 50, ALLOWED_HOSTS=["127.0.0.1", "testserver"], ROOT_URLCONF="project",
        DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": "db.sqlite3"}},
        INSTALLED_APPS=["django.contrib.auth", "django.contrib.contenttypes", "django.contrib.sessions"],
        MIDDLEWARE=["django.contrib.sessions.middleware.SessionMiddleware",
                    "django.contrib.auth.middleware.AuthenticationMiddleware"],
    ) if not settings.configured else None
    django.setup()

    from django.contrib.auth.models import User
    from django.core.management import call_command
    from django.core.wsgi import get_wsgi_application
    from django.test import Client
    from django.urls import path
    from may_listen import may_listen

    urlpatterns = [path("may-listen/", may_listen)]


    class Quiet(WSGIRequestHandler):
        def log_message(self, *_):
            pass


    class Server(ThreadingMixIn, WSGIServer):
        daemon_threads = True


    if __name__ == "__main__":
        sys.modules["project"] = sys.modules["__main__"]
        call_command("migrate", verbosity=0)
        user = User.objects.create_user("ann", password="x")
        client = Client()
        client.force_login(user)
        server = make_server("127.0.0.1", 0, get_wsgi_application(), Server, Quiet)
        print(server.server_port, user.pk, client.cookies["sessionid"].value, flush=True)
        server.serve_forever()
"""


def test_refusals_are_counted(application, redis_server, tmp_path, pages):
    """Where the application says no, and where it does not say, apart."""
    environment = redis_server.environment | {"RELAY_AUTH_URL": application.url}
    with watched(tmp_path, workers=1, **environment) as relay:
        for channel, application.status in (("x", 403), ("y", 500)):
            pages.open(relay.relay.port, [f"/channel={channel}"])
        told = relay.metrics()
        assert told["sse_relay_refusals_total", "application"] == told["sse_relay_refusals_total", "authority"] == 1
