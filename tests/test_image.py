"""The container image, built by buildah from a base made on this machine, and run."""

import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest
from pages import Pages
from programs import program
from relay import ROOT
from servers import PATIENCE, free_port, until

from tornado_relay import __version__


@pytest.fixture(scope="module")
def buildah():
    """Run buildah with a store of the test's own."""
    if os.geteuid() != 0:
        pytest.skip("a base image can be made by root only")
    binary, debootstrap = program("buildah"), program("debootstrap")
    store = Path(tempfile.mkdtemp(prefix="sse-relay-image-"))

    def command(*arguments):
        return [
            binary,
            "--root",
            f"{store}/root",
            "--runroot",
            f"{store}/run",
            "--storage-driver",
            "vfs",
            *map(str, arguments),
        ]

    def run(*arguments):
        done = subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"buildah {arguments}: {done.stderr[-3000:]}"
        return done.stdout.strip()

    run.command = command
    base = store / "base"
    subprocess.run(
        [debootstrap, "--variant=minbase", "--include=python3,python3-venv,ca-certificates", "bookworm", base],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    # The registry's certificate may be one that only this machine trusts.
    certificates = "etc/ssl/certs/ca-certificates.crt"
    shutil.copy(f"/{certificates}", base / certificates)
    (base / "etc/pip.conf").write_text(f"[global]\ncert = /{certificates}\n")
    container = run("from", "scratch")
    run("add", container, base, "/")
    run("commit", container, "localhost/relay-base")
    run("rm", container)
    run(
        "build",
        "--isolation",
        "chroot",
        "--format",
        "docker",
        "--build-arg",
        "BASE=localhost/relay-base",
        "-t",
        "sse-relay-server",
        ".",
    )
    yield run
    for container in run("containers", "-q").split():
        run("rm", container)
    shutil.rmtree(store, ignore_errors=True)


@pytest.fixture
def container(buildah):
    return buildah("from", "--pull-never", "sse-relay-server")


def test_configuration(buildah):
    """Not root, no entry point, a health check, exec forms, and SIGTERM to stop."""
    config = json.loads(buildah("inspect", "--type", "image", "sse-relay-server"))["Docker"]["config"]
    assert config["User"] == "10001:10001"
    assert not config.get("Entrypoint")
    assert config["Cmd"] == ["sse-relay-server"]
    assert config["Healthcheck"]["Test"][0] == "CMD"
    assert config["StopSignal"] == "SIGTERM"
    assert list(config["ExposedPorts"]) == ["8001/tcp"]


def test_nothing_to_build_with_is_left(buildah, container):
    """No pip, no compiler, no sources in the last stage."""
    mount = Path(buildah("mount", container))
    assert not list(mount.glob("opt/sse-relay-server/bin/pip*"))
    assert not (mount / "src").exists()
    assert not list(mount.glob("usr/bin/gcc*"))


def test_command_of_the_predecessors_readme(buildah, container, redis_server):
    """docker run IMAGE sse-relay-server --port ... --workers 4 serves, is healthy, delivers, and ends on SIGTERM."""
    port = free_port()
    env = ["--env", f"REDIS_URL={redis_server.url}", "--env", f"RELAY_HTTP_PORT={port}"]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            buildah.command(
                "run",
                "--isolation",
                "chroot",
                *env,
                container,
                "--",
                "sse-relay-server",
                "--port",
                port,
                "--workers",
                "4",
            ),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:

            def listening():
                log.seek(0)
                return re.search(rf"\[(\d+) parent\] listening on http://0.0.0.0:{port} with 4 workers", log.read())

            parent = int(until(listening, "the relay listens")[1])
            assert os.stat(f"/proc/{parent}").st_uid == 10001  # noqa: PTH116
            with Pages() as pages:
                (page,) = pages.open(port, ["/channel=image"])
                redis_server.publish("image", "hello")
                pages.until(lambda: page.events, "the event")
                assert page.data == ["hello"]
            config = json.loads(buildah("inspect", "--type", "image", "sse-relay-server"))["Docker"]["config"]
            check = config["Healthcheck"]["Test"][1:]
            buildah("run", "--isolation", "chroot", *env, container, "--", *check)
            os.kill(parent, signal.SIGTERM)
            process.wait(PATIENCE)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def test_wrong_port_of_the_predecessors_readme(buildah, container):
    """Its --port 8001:8001 never worked; here one line says what to do."""
    done = subprocess.run(
        buildah.command("run", "--isolation", "chroot", container, "--", "sse-relay-server", "--port", "8001:8001"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert "docker run -p 8001:8001" in done.stderr
    assert buildah("run", "--isolation", "chroot", container, "--", "sse-relay-server", "--version").endswith(
        __version__
    )
