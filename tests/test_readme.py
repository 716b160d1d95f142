"""What the README and the pages in docs/ show is what there is."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from programs import program
from relay import COMMAND, ROOT, Relay, environment, run
from servers import PATIENCE, execute, until

from tornado_relay.cli import main
from tornado_relay.counts import RESETS
from tornado_relay.events import KEYS
from tornado_relay.settings import FIELDS
from tornado_relay.visit import MAX_CHANNELS

README = (ROOT / "README.md").read_text()
# All that a user reads: what moves from one page to another is tested as before.
PAGES = "\n".join([README, *(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))])
EXTRAS = {"postgres", "redis", "jwt", "metrics", "django", "embedded", "docs", "test"}


def blocks(language, page=PAGES):
    """The code blocks in one language, of all pages or of one."""
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


def block(language, holding, page=PAGES):
    (found,) = [text for text in blocks(language, page) if holding in text]
    return found


def headings(page):
    """A page's headings as its links name them."""
    lines = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL).splitlines()
    return {
        re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-") for line in lines if line.startswith("#")
    }


def shown(default):
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, float):
        return f"{default:g}"
    return "" if default == () else str(default)


def test_table_of_settings():
    """Variable, flag, default and meaning of each, as the code has them."""
    rows = [
        [cell.strip() for cell in row.strip("|").split(" | ")]
        for row in README.splitlines()
        if re.match(r"\| `[A-Z_]+` \| `--", row)
    ]
    expected = []
    for field in FIELDS:
        meaning = field.metadata["meaning"].replace("|", "&#124;")
        expected.append(
            [f"`{field.metadata['variable']}`", f"`{field.metadata['flag']}`", shown(field.default), meaning]
        )
    assert rows == expected


def test_table_of_event_keys():
    """All six."""
    assert re.findall(
        r"^\| `(\w+)` \| ", README.partition("## Events")[2].partition("## Settings")[0], re.MULTILINE
    ) == list(KEYS)
    assert f"up to {MAX_CHANNELS} channels" in README


def test_links_lead_to_files():
    """On the repository's web page: relative links exist, and what they name of a page is a heading of it."""
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)]+)\)", page.read_text().replace("\n", " ")):
            file, _, anchor = target.replace(" ", "").partition("#")
            if file.startswith("http"):
                continue
            found = page.parent / file if file else page
            assert found.resolve().is_relative_to(ROOT), (page, target)
            assert found.exists(), (page, target)
            if anchor:
                assert anchor in headings(found), (page, target)


def test_security_page_names_tests_and_settings_that_exist():
    """Each row of its table has a test that shows it."""
    page = (ROOT / "SECURITY.md").read_text()
    tests = set(re.findall(r"def (test_\w+)", "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))))
    rows = [row for row in page.splitlines() if row.startswith("| ") and "shown by" not in row]
    assert len(rows) > 10
    for row in rows:
        shown = re.findall(r"`(test_\w+)`", row.split(" | ")[3])
        assert shown, row
        assert set(shown) <= tests, row
    variables = {field.metadata["variable"] for field in FIELDS}
    assert set(re.findall(r"`((?:RELAY_|ALLOWED_)[A-Z_]+)`", page)) <= variables


def test_installation_commands_name_extras_that_exist():
    """Each pip install of the pages."""
    setup = (ROOT / "setup.py").read_text()
    named = {extra for extras in re.findall(r"sse-relay-server\[([\w,]+)\]", PAGES) for extra in extras.split(",")}
    assert named <= EXTRAS
    assert all(f'"{extra}"' in setup for extra in EXTRAS)


def test_serve_command_of_the_installation(postgres_server, tmp_path, pages):
    """With the URL and the port replaced by the test's."""
    (line,) = [text for text in blocks("sh", README) if text.startswith("DATABASE_URL=")]
    flags = line.split("sse-relay-server ")[1].split()
    assert flags == ["--port", "8001", "--host", "0.0.0.0", "--workers", "4"]
    with Relay(tmp_path, *flags, "--port", "0", **postgres_server.environment) as relay:
        assert len(relay.workers()) == 4
        (page,) = pages.open(relay.port, ["/channel=x"])
        assert page.status == 200


def test_commands(redis_server, kept_postgres, relay_on_redis, tmp_path, pages):
    """Each line of the section Commands."""
    relay = relay_on_redis
    lines = [line.partition(" #")[0].strip() for line in block("sh", "sse-relay-server listen").splitlines()]
    assert lines[0] == "sse-relay-server"
    size = "size --streams 100000 --rate 50"
    told = ("listen orders", "check", "token orders 'user-7-*' --ttl 600", size, "init-db", "--help")
    assert lines[2:] == [f"sse-relay-server {what}" for what in told]
    (page,) = pages.open(relay.port, ["/channel=orders"])
    folder = str(Path(COMMAND).parent)
    env = environment(
        **redis_server.environment,
        DATABASE_URL=kept_postgres.url,
        RELAY_JWT_SECRET="s" * 40,
        PATH=f"{folder}:{os.environ['PATH']}",
    )
    subprocess.run(lines[1], shell=True, check=True, env=env, cwd=tmp_path)
    pages.until(lambda: page.events, "the event")
    assert (page.events[0].event, page.data) == ("NEW_ORDER", ["hello"])
    for line in lines[3:]:
        subprocess.run(line, shell=True, check=True, env=env, cwd=tmp_path, capture_output=True)


def test_history_is_set_up_as_shown(postgres_server, tmp_path, pages):
    """The three lines, and a page that connects with the id that it was rendered at."""
    postgres_server.execute("CREATE DATABASE readme")
    url = postgres_server.url.removesuffix("relay") + "readme"
    export, init, start = [line.partition(" #")[0].strip() for line in block("sh", "RELAY_HISTORY=").splitlines()]
    assert export.startswith("export DATABASE_URL=postgresql://")
    variable, command = start.split()
    env = environment(DATABASE_URL=url, PATH=f"{Path(COMMAND).parent}:{os.environ['PATH']}")
    subprocess.run(init, shell=True, check=True, env=env, cwd=tmp_path, capture_output=True)
    (tmp_path / "pages.py").write_text(block("python", "pages.py"))
    code = "from django.conf import settings; settings.configure(); import pages; print(pages.orders(None).content.decode())"
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    (path,) = re.findall(r"EventSource\('http://localhost:8001(/channel=orders.*)'\)", shown.stdout)
    name, value = variable.split("=")
    with Relay(
        tmp_path, "--workers", "1", command=(command,), PATH=env["PATH"], DATABASE_URL=url, **{name: value}
    ) as relay:
        (call,) = re.findall(r"`(SELECT relay_notify.*?)`", PAGES)
        execute(url, call)
        (page,) = pages.open(relay.port, [path])
        pages.until(lambda: page.events, "what was published before the page connected")
        assert (page.events[0].event, page.data) == ("NEW_ORDER", ["hello"])


def test_event_over_http(redis_server, tmp_path, pages):
    """The command, with another port."""
    program("curl")
    token = {"RELAY_PUBLISH_TOKEN": "p" * 40}
    with Relay(tmp_path, "--workers", "1", **redis_server.environment, **token) as relay:
        (page,) = pages.open(relay.port, ["/channel=orders"])
        command = block("sh", "curl http").replace(":8001", f":{relay.port}")
        subprocess.run(command, shell=True, check=True, env=environment(**token), capture_output=True)
        pages.until(lambda: page.events, "the event")
        assert (page.events[0].event, page.data) == ("NEW_ORDER", ["hello"])


def test_page_whose_token_names_its_channels(redis_server, tmp_path, pages):
    """The view's cookie opens a stream on the user's own channels, and on no others."""
    (tmp_path / "streams.py").write_text(block("python", "streams.py"))
    code = (
        "from django.conf import settings; settings.configure(); import streams;"
        "from types import SimpleNamespace as N; print(streams.page(N(user=N(pk=7))).cookies['relay_token'].value)"
    )
    env = environment(RELAY_JWT_SECRET="s" * 40)
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    cookie = {"Cookie": f"relay_token={shown.stdout.strip()}"}
    environ = redis_server.environment | {"RELAY_JWT_SECRET": "s" * 40}
    with Relay(tmp_path, "--workers", "1", **environ) as relay:
        paths = ["/events?channel=orders&channel=user-7&channel=news-sport", "/channel=user-8"]
        assert [page.status for page in pages.open(relay.port, paths, cookie)] == [200, 403]


def test_every_reason_of_a_stream_reset_is_explained():
    """And no other is."""
    sources = "".join(path.read_text() for path in (ROOT / "tornado_relay").rglob("*.py"))
    sent = re.findall(r'(?:(?:stream_reset|reset|restart|tell)\((?:stream, )?|reason: str = )"([a-z-]+)"', sources)
    assert set(sent) == set(RESETS.at)
    table = PAGES[PAGES.index("| reason |") :].partition("\n\n")[0]
    assert set(re.findall(r"^\| `([a-z-]+)`", table, re.MULTILINE)) == set(sent)
    inspector = (ROOT / "tornado_relay/static/inspector.html").read_text()
    assert set(re.findall(r'^    "([a-z-]+)": "', inspector, re.MULTILINE)) == set(sent)


@pytest.fixture
def relay_on_redis(redis_server, tmp_path):
    with Relay(tmp_path, "--workers", "1", **redis_server.environment) as relay:
        yield relay


def test_django_example_and_its_page(postgres_server, channel, tmp_path, pages):
    """The view, called by Django's test client in a real project on PostgreSQL, reaches the page's listener."""
    view = block("python", "# views.py")
    (tmp_path / "views.py").write_text(view)
    settings = f"""
    import django
    from urllib.parse import urlsplit
    from django.conf import settings
    url = urlsplit({postgres_server.url!r})
    settings.configure(
        ALLOWED_HOSTS=["*"], ROOT_URLCONF="project",
        DATABASES={{"default": dict(ENGINE="django.db.backends.postgresql", NAME=url.path[1:], USER=url.username,
                                   PASSWORD=url.password, HOST=url.hostname, PORT=url.port)}},
    )
    django.setup()
    from django.test import Client
    from django.urls import path
    """
    project = textwrap.dedent(settings) + "import views\nurlpatterns = [path('', views.new_order)]\n"
    (tmp_path / "project.py").write_text(project)
    with Relay(tmp_path, "--workers", "1", **postgres_server.environment) as relay:
        (page,) = pages.open(relay.port, ["/channel=orders"])
        code = "import sys, project; answer = project.Client().get('/'); assert answer.content == b'ordered', answer"
        code = f"import sys; sys.modules['project'] = __import__('project'); {code}"
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment(), check=True)
        pages.until(lambda: page.events, "the event")
    (event,) = page.events
    assert (event.event, event.id, event.data) == ("NEW_ORDER", "1", '{"total":"12.50"}')


def test_javascript_of_the_page(redis_server, relay_on_redis, tmp_path):
    """It logs the order's total; run by Node with a standard EventSource."""
    node, npm = program("node"), program("npm")
    subprocess.run(
        [npm, "install", "--silent", "--no-audit", "--no-fund", "eventsource@4"],
        cwd=tmp_path,
        check=True,
        timeout=PATIENCE * 9,
    )
    script = block("javascript", "new EventSource", README).replace("http://localhost:8001", relay_on_redis.url)
    (tmp_path / "page.mjs").write_text(f"import {{ EventSource }} from 'eventsource'\n{script}\n")
    page = subprocess.Popen([node, "page.mjs"], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    try:
        until(lambda: "on orders" in relay_on_redis.log, "the page is connected")
        assert (
            run(
                "notify",
                "orders",
                '{"event":"NEW_ORDER","data":{"total":"12.50"}}',
                cwd=tmp_path,
                **redis_server.environment,
            ).returncode
            == 0
        )
        assert page.stdout.readline() == "12.50\n"
    finally:
        page.kill()
        page.communicate()


def test_redis_snippet(redis_server, relay_on_redis, pages, channel):
    """For those who do not install the package."""
    (page,) = pages.open(relay_on_redis.port, [f"/channel={channel}"])
    snippet = block("python", "redis.from_url").replace("redis://localhost:6379/0", redis_server.url)
    code = f"{snippet}\nnotify({channel!r}, {{'event': 'e', 'data': \"it's\"}})\n"
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True)
    pages.until(lambda: page.events, "the event")
    assert page.data == ["it's"]


def test_sql_snippet(postgres_server, tmp_path, pages):
    """Both statements."""
    with Relay(tmp_path, "--workers", "1", **postgres_server.environment) as relay:
        (page,) = pages.open(relay.port, ["/channel=orders"])
        for statement in block("sql", "NOTIFY orders").strip().splitlines():
            postgres_server.execute(statement)
        pages.until(lambda: len(page.events) == 2, "both events")
    assert [(event.event, event.data) for event in page.events] == [("message", "hello"), ("NEW_ORDER", "hello")]


@pytest.mark.heavy
def test_benchmark_runs(tmp_path):
    """With few streams; it writes the table and the chart that the page shows, the relay first."""
    command = [sys.executable, ROOT / "benchmarks/fanout.py", "--streams", "20", "--seconds", "1", "--out", tmp_path]
    subprocess.run(command, check=True, env=environment(), capture_output=True, timeout=PATIENCE * 9)
    measured, shown = (
        [
            re.split(r", which| \| ", line)[0]
            for line in (folder / "fanout.md").read_text().splitlines()
            if line[:2] == "| "
        ]
        for folder in (tmp_path, ROOT / "docs")
    )
    assert measured[1] == "| sse-relay-server"
    assert set(measured) <= set(shown)
    assert ET.parse(tmp_path / "fanout.svg").getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_make_targets_exist():
    """The two commands, and those of CONTRIBUTING.md."""
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README + (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_version_is_in_the_changelog():
    """Users find what they have."""
    from tornado_relay import __version__

    assert __version__.partition(".dev")[0] in (ROOT / "CHANGELOG.md").read_text()


def test_command_line_returns_its_status(capsys, tmp_path, monkeypatch):
    """main() is what setup.py names, and exits by its return value."""
    monkeypatch.chdir(tmp_path)
    for name in ("REDIS_URL", "DATABASE_URL"):
        monkeypatch.delenv(name, raising=False)
    assert main(["check"]) == 1
    assert "no broker" in capsys.readouterr().out
