"""The site of `make docs`: built without a warning, whole, and sufficient to itself; and the commands that pages show."""

import functools
import http.server
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import httpx
import pytest
from browser import Browser
from programs import program
from relay import COMMAND, ROOT, Relay, environment, watched
from servers import until
from test_readme import PAGES, blocks

import tornado_relay
from tornado_relay import project
from tornado_relay.arguments import parser
from tornado_relay.settings import FIELDS

VARIABLES = {field.metadata["variable"] for field in FIELDS}
MAKEFILE = (ROOT / "Makefile").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()


def build(source, folder):
    """Run what `make docs` runs, on ``source``, into ``folder``."""
    (recipe,) = re.findall(r"^docs: .*\n\t\$\(BIN\)/(sphinx-build .*)", MAKEFILE, re.MULTILINE)
    *words, books, here, site = shlex.split(recipe)[1:]
    assert (books, here, site) == ("build/docs", ".", "site")
    command = [sys.executable, "-m", "sphinx", *words, folder / "books", ".", folder / "site"]
    env = environment(PYTHONPATH=str(ROOT))
    return subprocess.run(command, cwd=source, env=env, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site's folder."""
    folder = tmp_path_factory.mktemp("docs")
    done = build(ROOT, folder)
    assert (done.returncode, done.stderr) == (0, "")
    return folder / "site"


class Html(HTMLParser):
    """One page: where its links lead, what it loads, what may be linked to in it, and its text."""

    def __init__(self, path):
        super().__init__()
        self.links, self.loads, self.ids, self.text = [], [], set(), ""
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids.add(found.get("id"))
        if tag == "a":
            self.links += filter(None, [found.get("href")])
        else:
            self.loads += filter(None, map(found.get, ("src", "srcset", "href", "data", "poster", "action")))

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def pages_of_site(site):
    """Each page by its path."""
    found = {path: Html(path) for path in site.rglob("*.html")}
    assert len(found) > 20
    return found


def led_to(path, target):
    """The file of the site that ``target``, as the page at ``path`` has it, is."""
    return Path(os.path.normpath(path.parent / unquote(urlsplit(target).path))) if urlsplit(target).path else path


def test_every_link_leads_somewhere(site, pages_of_site):
    """To a file of the site, and to an anchor that is there."""
    for path, page in pages_of_site.items():
        for target in page.links:
            if urlsplit(target).scheme in {"http", "https"}:
                continue
            found = led_to(path, target)
            assert found.is_relative_to(site), (path, target)
            assert found.is_file(), (path, target)
            if anchor := unquote(urlsplit(target).fragment):
                assert anchor in pages_of_site[found].ids, (path, target)


def test_every_page_can_be_found(site, pages_of_site):
    """Each page of the repository that a reader may want is in the site, and in the navigation of the first one."""
    first = site / "README.html"
    reached = {led_to(first, target) for target in pages_of_site[first].links}
    sources = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    assert {(site / source.relative_to(ROOT)).with_suffix(".html") for source in sources} <= reached
    assert "url=README.html" in (site / "index.html").read_text()


def test_site_needs_no_other_host(site, pages_of_site):
    """Scripts, stylesheets, fonts and images are its own."""
    for path, page in pages_of_site.items():
        for target in page.loads:
            assert led_to(path, target).is_file(), (path, target)
            assert not urlsplit(target).netloc, (path, target)
    for path in site.rglob("*.css"):
        for target in re.findall(r"(?:url\(|@import)\s*[\"']?([^\"')]+)", path.read_text()):
            assert target.startswith("data:") or led_to(path, target).is_file(), (path, target)


@pytest.fixture(scope="module")
def served(site):
    """The site's address, by a web server."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=site)
    handler.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def browser(served, tmp_path):
    """A browser in which a search of the site is open."""
    opened = Browser(tmp_path, f"{served}/search.html?q=RELAY_HISTORY")
    yield opened
    opened.close()


def test_site_in_a_browser(site, served, browser):
    """A search finds the setting, by nothing from elsewhere; and no page is wider than a phone, or a window."""
    until(lambda: browser.evaluate("document.querySelectorAll('#search-results li').length > 2"), "what was found")
    loaded = browser.evaluate("performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert loaded
    assert all(name.startswith(f"{served}/") for name in loaded), loaded
    names = [str(path.relative_to(site)) for path in site.rglob("*.html") if path.name != "index.html"]
    wide = browser.evaluate(
        "(async () => {"
        "  const wide = [];"
        "  const frame = document.body.appendChild(document.createElement('iframe'));"
        f" for (const name of {names}) {{"
        "    await new Promise((loaded) => { frame.onload = loaded; frame.src = '/' + name; });"
        "    for (const width of [390, 1280, 1440, 1700]) {"
        "      frame.style.cssText = `border: 0; height: 800px; max-width: none; width: ${width}px`;"
        "      const needed = frame.contentDocument.documentElement.scrollWidth;"
        "      if (needed > width) wide.push([name, width, needed]);"
        "    }"
        "  }"
        "  return wide;"
        "})()"
    )
    assert wide == []


def test_link_that_leads_nowhere_ends_the_build(tmp_path):
    """Of a page, of an anchor, or of a page that has no place in the navigation."""
    source = tmp_path / "source"
    shutil.copytree(ROOT / "docs", source / "docs")
    for path in ROOT.glob("*.md"):
        shutil.copy(path, source)
    (source / "LOST.md").write_text("# Lost\n\n[A](docs/history.md#nowhere) and [B](docs/nowhere.md).\n")
    done = build(source, tmp_path)
    assert done.returncode == 1
    for warning in (
        "local id not found in doc 'docs/history': 'nowhere'",
        "target not found: 'docs/nowhere.md'",
        "LOST.md: WARNING: document isn't included in any toctree",
    ):
        assert warning in done.stderr


def test_reference_has_all_settings(site, pages_of_site):
    """Variable, flag and meaning of each, and no page names one that is not there."""
    page = pages_of_site[site / "docs/reference/settings.html"]
    for field in FIELDS:
        about = field.metadata
        assert about["variable"].lower().replace("_", "-") in page.ids
        assert f"flag: {about['flag']}" in page.text
        assert about["meaning"][1:] in page.text
    named = set(re.findall(r"\b(?:RELAY|LOG)_[A-Z_]*[A-Z]\b", PAGES))
    assert named <= VARIABLES | set(project.VARIABLES)


def test_reference_has_all_metrics(site, pages_of_site, redis_server, tmp_path):
    """Those that a relay has, with its words; and no page names one that is not there."""
    page = pages_of_site[site / "docs/reference/metrics.html"]
    limited = {"RELAY_MAX_CONNECTIONS": "5", **redis_server.environment}
    with watched(tmp_path, workers=1, **limited) as relay, httpx.stream("GET", f"{relay.relay.url}/channel=orders"):
        shown = httpx.get(f"{relay.url}/metrics?channels=1").text
    told = dict(re.findall(r"^# HELP (\S+) (.*)", shown, re.MULTILINE))
    assert "sse_relay_channel_streams" in told
    for name, meaning in told.items():
        assert name in page.text
        assert meaning[1:] in page.text
    named = set(re.findall(r"\b(?:sse_relay|process)_[a-z_]+[a-z]\b(?!\()", PAGES)) - {"sse_relay_server"}
    assert named <= told.keys()


def test_reference_has_all_commands(site, pages_of_site, capsys):
    """And the flags of each."""
    page = pages_of_site[site / "docs/reference/commands.html"]
    with pytest.raises(SystemExit):
        parser().parse_args(["none-of-them"])
    names = re.findall(r"[a-z-]+", capsys.readouterr().err.partition("choose from")[2].partition(")")[0])
    assert "notify" in names
    assert set(names) <= page.ids
    flags = set(re.findall(r"(?<![\w-])--[a-z-]+", page.text))
    assert {field.metadata["flag"] for field in FIELDS} | set(parser().command_flags) <= flags


def test_reference_has_all_python_names_and_modules(site, pages_of_site):
    """What the package exports, and each of its files."""
    page = pages_of_site[site / "docs/reference/python.html"]
    for name in tornado_relay.__all__:
        assert name == "__version__" or page.ids & {f"tornado_relay.{name}", f"tornado_relay.errors.{name}"}, name
    page = pages_of_site[site / "docs/reference/modules.html"]
    for path in (ROOT / "tornado_relay").rglob("*.py"):
        assert str(path.relative_to(ROOT / "tornado_relay")) in page.text


def test_architecture_names_modules_that_are_there():
    """In its drawing, too."""
    named = set(re.findall(r"[\w*/]+\.py\b", (ROOT / "docs/architecture.md").read_text()))
    assert len(named) > 30
    assert [name for name in named if not list((ROOT / "tornado_relay").glob(name))] == []


def usable(words):
    """Whether a command of a page names flags, settings, targets, units and files that exist."""
    while words and (words[0] in {"sudo", "export"} or re.match(r"[A-Z_]+=", words[0])):
        if "=" in words[0]:
            assert words[0].partition("=")[0] in VARIABLES, words
        words = words[1:]
    if not words:
        return
    name, *rest = words[0].rpartition("/")[2], *words[1:]
    if name == "sse-relay-server":
        parser().parse_args([word for word in rest if word != "--help"])
    elif name == "make":
        assert re.search(rf"^{rest[0]}:", MAKEFILE, re.MULTILINE), words
    elif name == "systemctl":
        for unit in [word for word in rest[1:] if not word.startswith("-")]:
            assert (ROOT / "systemd" / (unit if "." in unit else f"{unit}.service")).exists(), words
    elif name == "install":
        assert (ROOT / rest[-2]).exists(), words
    elif name == "docker":
        assert rest[0] in {"build", "run"}, words
        usable(rest[rest.index("sse-relay-server") + 1 :] if rest[0] == "run" else [])
    else:
        # Each of these is run as it stands by a test here or in test_readme.py, or has no words of ours.
        assert name in {"python", "python3", "pip", ".", "curl"}, words


def test_commands_of_the_pages_are_there():
    """In blocks, and in the text."""
    shown = [
        line.partition(" #")[0]
        for block in [*blocks("sh"), *blocks("sh", CONTRIBUTING)]
        for line in block.replace("\\\n", " ").splitlines()
    ]
    shown += re.findall(r"`(sse-relay-server(?: [^`]+)?)`", PAGES)
    assert len(shown) > 40
    for line in shown:
        usable(shlex.split(line))


def test_quick_start(home, channel, tmp_path):
    """Its steps, as they stand but for the port: the events of the command and of the program reach curl."""
    page = (ROOT / "docs/quickstart.md").read_text()
    _, serve, send, greet, listen = blocks("sh", page)
    (code,) = blocks("python", page)
    (tmp_path / "greet.py").write_text(code)
    program("curl")
    folder = home / f"quickstart-{channel}" / "pg"
    with Relay(tmp_path, *shlex.split(serve)[1:], "--port", "0", "--embedded-dir", folder) as relay:
        variable, address = re.findall(r"^ +(DATABASE_URL=postgresql\S+|http://127\S+)$", relay.log, re.MULTILINE)
        (shown,) = re.findall(r"`(http://127\.0\.0\.1:8001/\?\S+)`", page)
        assert address == shown.replace("8001", str(relay.port))
        assert "<title>sse-relay-server" in httpx.get(address).text
        with (tmp_path / "stream").open("w") as stream:
            curl = subprocess.Popen(shlex.split(listen.replace("8001", str(relay.port))), stdout=stream)
        try:
            until(lambda: "on demo" in relay.log, "curl is connected")
            steps = send.replace(". venv/bin/activate\n", "").replace("DATABASE_URL=postgresql://...", variable) + greet
            path = f"{Path(COMMAND).parent}:{os.environ['PATH']}"
            subprocess.run(["bash", "-ec", steps], cwd=tmp_path, env=environment(PATH=path), check=True)
            until(lambda: "Python" in (tmp_path / "stream").read_text(), "both events")
        finally:
            curl.kill()
            curl.wait()
    received = re.findall(r"^(?:event|data): (.*)", (tmp_path / "stream").read_text(), re.MULTILINE)
    assert received[:2] == ["stream-open", '{"id":"none","resumed":false}']
    assert received[2:] == ["greeting", "hello", "greeting", '{"from":"Python"}']
