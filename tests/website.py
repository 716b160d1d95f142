"""The application's site, for pages in a browser: serves them, and takes their reports."""

import http.server
import json
import threading


class Website(http.server.ThreadingHTTPServer):
    """``page`` is at every address but those of ``answers``, which return status and text; ``reports`` is what was posted."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Request)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.page = ""
        self.answers = {}
        self.reports = []
        self._thread = threading.Thread(target=self.serve_forever)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()
        self._thread.join()


class Request(http.server.BaseHTTPRequestHandler):
    """One request of a page."""

    def do_GET(self):
        answer = self.server.answers.get(self.path)
        status, text = answer() if answer else (200, self.server.page)
        self.send_response(status)
        self.send_header("Content-Type", "text/html")
        if status == 302:
            self.send_header("Location", text)
        self.end_headers()
        self.wfile.write(text.encode())

    def do_POST(self):
        self.server.reports.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_):
        pass
