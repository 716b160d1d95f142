"""Firefox and WebKit, driven by WebDriver: over Marionette's socket, and over HTTP."""

import json
import os
import signal
import socket
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import ClassVar

import httpx
from programs import program
from servers import PATIENCE, free_port, until

# The page's own eval sees its top-level constants, which a script of WebDriver's may not see.
EVALUATE = """
  const [expression, done] = arguments
  Promise.resolve()
    .then(() => window.eval(expression))
    .then(value => done({ value }), error => done({ error: `${error}` }))
"""
FOLDERS = ("HOME", "XDG_RUNTIME_DIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME")
NO_SESSION_BUS = {"DBUS_SESSION_BUS_ADDRESS": "disabled:", "NO_AT_BRIDGE": "1"}
# WebKit draws on a display without a graphics card.
SOFTWARE = {"LIBGL_ALWAYS_SOFTWARE": "1", "WEBKIT_DISABLE_COMPOSITING_MODE": "1"}
# Seconds for one command: a browser may be slow to start.
LONG = 3 * PATIENCE
# Firefox asks its makers for nothing, shows no first page, and takes a free port for Marionette.
PREFERENCES = {
    "app.normandy.enabled": False,
    "app.update.disabledForTesting": True,
    "browser.shell.checkDefaultBrowser": False,
    "browser.startup.page": 0,
    "browser.startup.homepage_override.mstone": "ignore",
    "datareporting.policy.dataSubmissionEnabled": False,
    "extensions.update.enabled": False,
    "marionette.port": 0,
    "network.captive-portal-service.enabled": False,
    "network.connectivity-service.enabled": False,
    "services.settings.server": "data:,#remote-settings-dummy/v1",
    "toolkit.telemetry.server": "",
}


class DriverError(Exception):
    """The browser refused a command, such as one for a page that is just being left."""


class Tab:
    """One page of ``browser``; the tab that is called is the one that is switched to."""

    def __init__(self, browser, handle):
        self._browser = browser
        self._handle = handle

    def evaluate(self, expression):
        """
        Return the value of a JavaScript expression in the page, which may be a promise.

        It is None if the page is just left.
        """
        try:
            answer = self._command("ExecuteAsyncScript", script=EVALUATE, args=[expression])
        except DriverError:
            return None
        assert "error" not in answer, answer["error"]
        return answer.get("value")

    def go(self, url):
        self._command("Navigate", url=url)

    def reload(self):
        self._command("Refresh")

    def close(self):
        self._command("CloseWindow")

    def _command(self, name, **parameters):
        self._browser.command("SwitchToWindow", handle=self._handle)
        return self._browser.command(name, **parameters)


class Driven(Tab):
    """What both browsers have: one page, and more that `tab` opens; ended by `close`."""

    def _begin(self, url):
        super().__init__(self, self.command("GetWindowHandle"))
        self.command("SetTimeouts", script=PATIENCE * 1000)
        self.go(url)

    def tab(self, url):
        """Open one more page."""
        page = Tab(self, self._command("NewWindow", type="tab")["handle"])
        page.go(url)
        return page

    def _start(self, command, home, **more):
        """Start a program that writes only below ``home`` and starts no session bus."""
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        variables = dict.fromkeys(FOLDERS, home) | NO_SESSION_BUS | more
        self.process = subprocess.Popen(
            command,
            env=os.environ | variables,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def close(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Firefox(Driven):
    """A headless Firefox."""

    def __init__(self, profile, url):
        binary = program("firefox-esr", "firefox")
        profile.mkdir()
        lines = [f'user_pref("{name}", {json.dumps(value)});\n' for name, value in PREFERENCES.items()]
        (profile / "user.js").write_text("".join(lines))
        command = [binary, "--headless", "--no-remote", "--marionette", "--profile", profile]
        self._opened = ExitStack()
        self._start(command, profile / "home", MOZ_CRASHREPORTER_DISABLE="1")
        try:
            port_file = profile / "MarionetteActivePort"
            port = until(lambda: port_file.exists() and port_file.read_text(), "it is up", LONG)
            connection = socket.create_connection(("127.0.0.1", int(port)), LONG)
            self._socket = self._opened.enter_context(connection)
            self._stream = self._opened.enter_context(self._socket.makefile("rb"))
            self._receive()
            self.command("NewSession")
            self._begin(url)
        except BaseException:
            self.close()
            raise

    def command(self, name, **parameters):
        message = json.dumps([0, 1, f"WebDriver:{name}", parameters]).encode()
        self._socket.sendall(b"%d:%b" % (len(message), message))
        _, _, error, result = self._receive()
        if error:
            raise DriverError(error["error"], error["message"])
        is_wrapped = isinstance(result, dict) and result.keys() == {"value"}
        return result["value"] if is_wrapped else result

    def close(self):
        self._opened.close()
        super().close()

    def _receive(self):
        """A message is its length, a colon, and JSON."""
        length = 0
        while (digit := self._stream.read(1)) != b":":
            length = 10 * length + int(digit)
        return json.loads(self._stream.read(length))


class WebKit(Driven):
    """WebKitGTK's MiniBrowser, on a display that nobody sees."""

    PATHS: ClassVar = {
        "NewSession": "",
        "GetWindowHandle": "/window",
        "SwitchToWindow": "/window",
        "NewWindow": "/window/new",
        "CloseWindow": "/window",
        "SetTimeouts": "/timeouts",
        "Navigate": "/url",
        "Refresh": "/refresh",
        "ExecuteAsyncScript": "/execute/async",
    }
    METHODS: ClassVar = {"GetWindowHandle": "GET", "CloseWindow": "DELETE"}

    def __init__(self, profile, url):
        driver, server = program("WebKitWebDriver"), program("Xvfb")
        browser = program(*minibrowsers())
        reader, writer = os.pipe()
        self._display = subprocess.Popen(
            [server, "-displayfd", str(writer), "-nolisten", "tcp"],
            pass_fds=[writer],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(writer)
        with os.fdopen(reader) as told:
            display = f":{told.readline().strip()}"
        port = free_port()
        command = [driver, f"--port={port}", "--host=127.0.0.1"]
        self._start(command, profile, DISPLAY=display, GDK_BACKEND="x11", **SOFTWARE)
        self._client = httpx.Client(base_url=f"http://127.0.0.1:{port}/session", timeout=LONG)
        self._session = ""
        try:
            until(self._answers, "WebKitWebDriver is up")
            options = {"binary": browser, "args": ["--automation"]}
            wanted = {"alwaysMatch": {"webkitgtk:browserOptions": options}}
            made = self.command("NewSession", capabilities=wanted)
            self._session = f"/{made['sessionId']}"
            self._begin(url)
        except BaseException:
            self.close()
            raise

    def command(self, name, **parameters):
        method = self.METHODS.get(name, "POST")
        content = {"json": parameters} if method == "POST" else {}
        answer = self._client.request(method, self._session + self.PATHS[name], **content)
        value = answer.json()["value"]
        if isinstance(value, dict) and "error" in value and "message" in value:
            raise DriverError(value["error"], value["message"])
        return value

    def close(self):
        self._client.close()
        super().close()
        self._display.terminate()
        self._display.wait(PATIENCE)

    def _answers(self):
        try:
            return self._client.get("/../status").is_success
        except httpx.TransportError:
            return False


def minibrowsers():
    """Return where Debian and others have WebKit's browser, which is on no PATH."""
    folder = Path("/usr/lib")
    patterns = ("*/webkit2gtk-4.*/MiniBrowser", "webkit2gtk-4.*/MiniBrowser")
    return ["MiniBrowser", *(str(path) for pattern in patterns for path in folder.glob(pattern))]
