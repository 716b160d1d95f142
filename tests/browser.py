"""A headless Chromium, spoken to by its debugging protocol."""

import asyncio
import base64
import json
import os
import signal
import subprocess
from urllib.parse import quote

import httpx
from programs import program
from servers import until
from tornado.websocket import websocket_connect

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
]
FLAGS += ["--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--remote-debugging-port=0"]


class Tab:
    """One page of a browser, spoken to over ``address()``, its debugging socket."""

    def __init__(self, address):
        self._address = address

    def evaluate(self, expression):
        """Return the value of a JavaScript expression in the page, which may be a promise; None if the page is just left."""
        answer = self._command("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if answer is None:
            return None
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def screenshot(self, path):
        """Save what the page looks like as a PNG."""
        path.write_bytes(base64.b64decode(self._command("Page.captureScreenshot")["data"]))

    def reload(self):
        self._command("Page.reload")

    def close(self):
        self._command("Page.close")

    def _command(self, method, **parameters):
        async def ask():
            connection = await websocket_connect(self._address(), max_message_size=100_000_000)
            await connection.write_message(json.dumps({"id": 1, "method": method, "params": parameters}))
            answer = json.loads(await connection.read_message())
            connection.close()
            while await connection.read_message() is not None:
                pass
            return answer.get("result")

        return asyncio.run(ask())


class Browser(Tab):
    """A browser with one page, and more that `tab` opens; ended by `close`. ``flags`` are Chromium's."""

    def __init__(self, profile, url, *flags):
        binary = program("chromium", "chromium-browser", "google-chrome")
        self.process = subprocess.Popen(
            [binary, *FLAGS, *flags, f"--user-data-dir={profile}", url],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.port_file = profile / "DevToolsActivePort"
        super().__init__(self._only_page)

    def close(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def tab(self, url):
        """Open one more page."""
        page = httpx.put(f"{self._debugger()}/json/new?{quote(url, safe='')}").json()
        return Tab(lambda: page["webSocketDebuggerUrl"])

    def _only_page(self):
        (page,) = [page for page in httpx.get(f"{self._debugger()}/json").json() if page["type"] == "page"]
        return page["webSocketDebuggerUrl"]

    def _debugger(self):
        port = until(
            lambda: self.port_file.exists() and self.port_file.read_text().split(), "Chromium is up", seconds=40
        )[0]
        return f"http://127.0.0.1:{port}"
