"""
Runs the whole example: a PostgreSQL, the relay, and Django's server; Ctrl-C ends all of them.

With DATABASE_URL set it takes that PostgreSQL in place of one of its own. SITE_PORT and EVENTS_PORT are where it serves.
"""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
from pathlib import Path

from tornado_relay.embedded import Cluster, default_home, wheel_binaries

HERE = Path(__file__).parent


@contextlib.contextmanager
def database():
    """Yield the URL of a PostgreSQL."""
    if url := os.environ.get("DATABASE_URL"):
        yield url
        return
    home = default_home().with_name("example")
    cluster = Cluster(home, wheel_binaries(home))
    if not cluster.exists:
        print("Setting up a PostgreSQL in", home, flush=True)
        cluster.create()
    cluster.start()
    try:
        cluster.create_database()
        yield cluster.url
    finally:
        cluster.stop()


@contextlib.contextmanager
def running(*command, **variables):
    """Run a command meanwhile."""
    process = subprocess.Popen(command, cwd=HERE, env=os.environ | variables)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def main():
    """Run until Ctrl-C or SIGTERM."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    site, relay = os.environ.get("SITE_PORT", "8000"), os.environ.get("EVENTS_PORT", "8001")
    manage = [sys.executable, "manage.py"]
    with contextlib.suppress(KeyboardInterrupt), database() as url:
        shared = {
            "DATABASE_URL": url,
            "RELAY_JWT_SECRET": secrets.token_urlsafe(48),
            "RELAY_URL": f"http://localhost:{relay}",
        }
        for arguments in (["migrate", "--verbosity", "0", "--skip-checks"], ["people"]):
            subprocess.run([*manage, *arguments], cwd=HERE, env=os.environ | shared, check=True)
        flags = [
            "--host",
            "127.0.0.1",
            "--port",
            relay,
            "--history",
            "1000",
            "--allowed-origins",
            f"http://localhost:{site}",
        ]
        with (
            running(sys.executable, "-m", "tornado_relay", *flags, **shared),
            running(*manage, "runserver", "--noreload", f"localhost:{site}", **shared) as server,
        ):
            print(f"\nThe board is at http://localhost:{site}\n", flush=True)
            server.wait()


if __name__ == "__main__":
    main()
