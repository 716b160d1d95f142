"""A headless Chromium, spoken to by its debugging protocol."""

import asyncio
import base64
import json
import os
import signal
import subprocess

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


class Browser:
    """One page; ended by `close`."""

    def __init__(self, profile, url):
        binary = program("chromium", "chromium-browser", "google-chrome")
        self.process = subprocess.Popen(
            [binary, *FLAGS, f"--user-data-dir={profile}", url],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.port_file = profile / "DevToolsActivePort"

    def close(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def evaluate(self, expression):
        """Return the value of a JavaScript expression in the page."""
        return self._command("Runtime.evaluate", expression=expression)["result"].get("value")

    def screenshot(self, path):
        """Save what the page looks like as a PNG."""
        path.write_bytes(base64.b64decode(self._command("Page.captureScreenshot")["data"]))

    def _command(self, method, **parameters):
        port = until(
            lambda: self.port_file.exists() and self.port_file.read_text().split(), "Chromium is up", seconds=40
        )[0]
        (page,) = [target for target in httpx.get(f"http://127.0.0.1:{port}/json").json() if target["type"] == "page"]

        async def ask():
            connection = await websocket_connect(page["webSocketDebuggerUrl"], max_message_size=100_000_000)
            await connection.write_message(json.dumps({"id": 1, "method": method, "params": parameters}))
            answer = json.loads(await connection.read_message())
            connection.close()
            while await connection.read_message() is not None:
                pass
            return answer["result"]

        return asyncio.run(ask())
